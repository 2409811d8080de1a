"""Open models: each family as GGUF in llama.cpp, its adapter in PEFT, and the real SmolLM2 in transformers."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import greedy
from open_models import write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from model import gguf
from model.chat import encode_chat, load_tokenizer
from model.checkpoint import load_model, save_model
from model.llama_cpp import LlamaCpp
from model.lora import apply_lora, lora_layers
from model.verify import verify_gguf

pytestmark = pytest.mark.extra

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}]
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500000.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10000.0)
FAMILIES = {  # model type: what differs, the pre-tokenizer, the template
    "llama": (dict(tie_word_embeddings=True), "smollm", "plain"),
    "llama3": (dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=32)), "llama-bpe", "dated"),
    "linear": (dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)), "gpt-2", "plain"),
    "yarn": (dict(rope_parameters=YARN | dict(attention_factor=1.3)), "gpt-2", "plain"),
    "qwen2": (dict(tie_word_embeddings=True), "qwen2", "thinking"),
    "qwen3": (dict(head_dim=32, rope_parameters=YARN), "qwen2", "thinking"),
    "mistral": (dict(sliding_window=None), "gpt-2", "instruct"),
}


def split(pattern: str) -> list[dict]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL]


def make_model(folder: Path, name: str):
    """A random model of transformers with a byte-level tokenizer; returns the former."""
    changes, pre, template = FAMILIES[name]

    write_tokenizer(folder, template)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    patterns = {name: parts[0] for parts, name in gguf.PRE_TOKENIZERS.items()}
    if pre == "smollm":
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": DIGITS}
    elif pre != "gpt-2":
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": split(patterns[pre])}
    content["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    content["model"]["ignore_merges"] = pre == "llama-bpe"
    path.write_text(json.dumps(content), "utf-8")
    tokenizer = load_tokenizer(folder)
    kind = name if name in ("qwen2", "qwen3", "mistral") else "llama"
    sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=512, vocab_size=tokenizer.get_vocab_size() + 30)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | changes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    theirs.generation_config.eos_token_id = [tokenizer.end_of_turn]
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama3"])
def test_a_family_answers_in_llama_cpp_as_here(name, tmp_path, run_here):
    make_model(tmp_path / "open", name)
    result = run_here("export.py", tmp_path / "open", "--to", "gguf", "--type", "f32")
    assert result.status == 0, result.err
    model, tokenizer = load_model(tmp_path / "open").eval(), load_tokenizer(tmp_path / "open")
    llama_cpp = LlamaCpp(tmp_path / "open-gguf" / "open-f32.gguf", 256, threads=1, exact=True)
    chat = [{"role": "user", "content": "Where is the 12th moon? 春天来了！"}]
    ids, _ = encode_chat(tokenizer, chat, add_generation_prompt=True)
    assert llama_cpp.encode_chat(chat) == ids
    ids += list(range(60))  # beyond the trained length of the scaled ones
    ours, theirs = greedy(model, [ids], 24)[0], llama_cpp.generate(ids, 24)["tokens"]
    assert theirs == ours[: len(theirs)] != []
    # It ends where it would stop, and ours with it.
    assert len(theirs) == 24 or theirs[-1] in model.stop_token_ids or ours[len(theirs)] in model.stop_token_ids


def test_an_unknown_way_to_split_words_is_refused_before_any_work(tmp_path, run_here):
    make_model(tmp_path / "open", "qwen2")
    path = tmp_path / "open" / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace("'ll|", "'xy|"), "utf-8")
    result = run_here("export.py", tmp_path / "open", "--to", "gguf")
    assert result.status == 2
    assert "export it with --to bf16" in result.err
    assert not list((tmp_path / "open-gguf").glob("*"))


def test_ollama_gets_the_stop_tokens_and_uses_its_own_template(tmp_path, run_here):
    make_model(tmp_path / "open", "qwen3")
    assert run_here("export.py", tmp_path / "open", "--to", "ollama").status == 0
    lines = (tmp_path / "open-ollama" / "Modelfile").read_text("utf-8").splitlines()
    assert lines[0] == "FROM ./open-f16.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert not any(line.startswith("TEMPLATE") for line in lines)


@pytest.mark.parametrize("name", ["qwen2", "llama3"])
@torch.no_grad()
def test_an_adapter_loads_on_the_original_model_in_peft(name, tmp_path):
    from peft import PeftModel

    theirs = make_model(tmp_path / "open", name)
    model, ids = load_model(tmp_path / "open").eval(), torch.randint(300, (2, 90))
    apply_lora(model, r=4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.2)
    save_model(tmp_path / "adapter", model, tmp_path / "open", base_dir=tmp_path / "open")
    adapted = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert torch.allclose(adapted(ids).logits, model(ids), atol=1e-4)
    merged = load_model(tmp_path / "adapter").eval()
    assert torch.allclose(merged(ids), model(ids), atol=1e-4)


@pytest.mark.parametrize("kind", ["bf16", "merged"])
def test_the_other_exports_open_in_transformers(kind, tmp_path, run_here):
    make_model(tmp_path / "open", "qwen2")
    model = load_model(tmp_path / "open")
    apply_lora(model, r=2)
    save_model(tmp_path / "adapter", model, tmp_path / "open", base_dir=tmp_path / "open")
    result = run_here("export.py", tmp_path / ("adapter" if kind == "merged" else "open"), "--to", kind)
    assert result.status == 0, result.err
    assert "transformers: the same most probable token" in result.out


SMOLLM2 = Path(os.environ.get("JIEZI_OPEN_MODELS", "nowhere")) / "smollm2"  # see fetch_open_models.py


@pytest.mark.skipif(not SMOLLM2.exists(), reason="JIEZI_OPEN_MODELS names no folder of models")
@torch.no_grad()
def test_smollm2_is_itself(tmp_path):
    folder, question = SMOLLM2, [{"role": "user", "content": "What is the capital of France?"}]
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    ids, _ = encode_chat(tokenizer, question, add_generation_prompt=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = torch.tensor([ids])
    assert torch.allclose(model(batch), theirs(batch).logits, atol=1e-4)
    answer = theirs.generate(batch, max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    assert greedy(model, [ids], len(answer))[0] == answer
    gguf.write_gguf(tmp_path / "smol.gguf", model, folder, "f32")
    verify_gguf(tmp_path / "smol.gguf", model, folder, "f32")
    assert LlamaCpp(tmp_path / "smol.gguf", 256, threads=2, exact=True).generate(ids, len(answer))["tokens"] == answer
