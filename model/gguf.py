"""GGUF, the format of llama.cpp, Ollama and LM Studio: one file with weights, tokenizer and chat template.

The architectures are llama.cpp's own: llama, qwen2 with biases, qwen3 with QK-norm, glm4moe with experts (both
routers). llama_cpp.py reads such a file. Both packages are in requirements/export.txt.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor

from base.cli import UserError, import_extra
from base.files import read_json, write_file
from model.chat import SPECIAL_TOKENS, THINK, TOOLS, ChatTokenizer, load_tokenizer
from model.LMConfig import LMConfig
from model.model import CausalLM
from model.rope import rope_frequencies, scale_frequencies, yarn_size

WEIGHT_TYPES = {  # of the matrices, and gguf's name for such a file
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
# A small and sensitive part of the weights. With our names and llama.cpp's.
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight", "token_embd.weight", "output.weight")
TAGS = range(THINK, TOOLS + 2)  # <think> to </tools>


def write_gguf(path: Path, model: CausalLM, tokenizer_dir: Path, weight_type: str = "f32"):
    """Writes the model with its tokenizer. Norms and routers stay in float32; rows of no multiple of 32, in float16."""
    gguf, config = import_extra("gguf"), model.config
    arch = architecture(config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_file_type(gguf.LlamaFileType[WEIGHT_TYPES[weight_type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    add_tokenizer(writer, model, Path(tokenizer_dir))
    for name, tensor in to_gguf(model).items():
        kind = gguf.GGMLQuantizationType[matrix_type(name, tensor, weight_type).upper()]
        data = gguf.quantize(tensor.numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture(config: LMConfig) -> str:
    """llama.cpp's name. UserError for an activation or a rotation that its architectures do not have."""
    if config.hidden_act != "silu":
        raise UserError(f'llama.cpp has this architecture only with hidden_act "silu", not "{config.hidden_act}"')
    name = "glm4moe" if config.use_moe else "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if config.rope_scaling and config.rope_scaling["rope_type"] == "llama3" and name != "llama":
        raise UserError(f'llama.cpp has rope_type "llama3" only with the architecture llama, not {name}: use "yarn"')
    return name


def check_exportable(config: LMConfig, directory: Path):
    """UserError for a model or a tokenizer that llama.cpp does not have."""
    architecture(config)
    if not load_tokenizer(directory).is_own:
        pre_tokenizer(read_json(directory / "tokenizer.json"))


def matrix_type(name: str, tensor: Tensor, weight_type: str) -> str:
    """The type of a tensor in the file; its name is ours or llama.cpp's."""
    if tensor.dim() == 1 or name.endswith(("mlp.gate.weight", "ffn_gate_inp.weight")):  # a norm, a router
        return "f32"
    if weight_type.startswith("q") and tensor.shape[-1] % 32:  # 32 numbers of a row share a scale
        return "f16"
    if weight_type == "q4_0" and name in EMBEDDINGS:
        return "q8_0"
    return weight_type


def rounded(model: CausalLM, weight_type: str) -> CausalLM:
    """A copy of the model with the rounded weights of a file."""
    gguf, model = import_extra("gguf"), copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        kind = gguf.GGMLQuantizationType[matrix_type(name, parameter, weight_type).upper()]
        weights = gguf.dequantize(gguf.quantize(parameter.detach().numpy(), kind), kind)
        parameter.data = torch.from_numpy(weights)
    return model


def add_sizes(writer, config: LMConfig):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    add_scaling(writer, config.rope_scaling)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.use_moe:
        gating = import_extra("gguf").ExpertGatingFuncType[config.scoring_func.upper()]
        writer.add_expert_gating_func(gating)
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_shared_count(max(config.n_shared_experts, 1))
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_weights_scale(config.routed_scaling_factor)


def add_scaling(writer, scaling: dict | None):
    """Of the rotation; llama3's is a tensor (to_gguf)."""
    if scaling is None or scaling["rope_type"] == "llama3":
        return
    writer.add_rope_scaling_type(import_extra("gguf").RopeScalingType(scaling["rope_type"]))
    writer.add_rope_scaling_factor(scaling["factor"])
    if scaling["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast", 32))
        writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow", 1))
        usual = yarn_size(scaling["factor"])  # llama.cpp multiplies by this itself
        writer.add_rope_scaling_attn_factors(scaling.get("attention_factor", usual) / usual)


def add_tokenizer(writer, model: CausalLM, directory: Path):
    """Tokens with their types and merges; for a chat model its template. A base model's text may start with a bos; in a
    chat the template adds it."""
    tokenizer = load_tokenizer(directory)
    content = read_json(directory / "tokenizer.json")
    merges = content["model"].get("merges")
    if merges is None:
        raise UserError(f"{directory / 'tokenizer.json'} is not a BPE tokenizer, which GGUF needs")
    add_pieces = add_sentencepiece if tokenizer.is_own else add_byte_level
    add_pieces(writer, tokenizer, model.config.vocab_size, content)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    if tokenizer.bos:
        writer.add_bos_token_id(tokenizer.bos[0])
    writer.add_add_bos_token(bool(tokenizer.bos) and not model.is_chat)
    end = tokenizer.eos if tokenizer.is_own or not model.is_chat else tokenizer.end_of_turn
    if end is not None:
        writer.add_eos_token_id(end)
    if model.is_chat:
        writer.add_eot_token_id(tokenizer.end_of_turn)
        own = directory / "chat_template.jinja"
        writer.add_chat_template(tokenizer.template.source if tokenizer.template else own.read_text("utf-8"))


def add_byte_level(writer, tokenizer: ChatTokenizer, rows: int, content: dict):
    """A byte-level tokenizer, as GPT-2's. Tags such as Qwen's <think> are "user defined", as in Qwen's own files."""
    kinds, types = import_extra("gguf").TokenType, []
    is_special = {token["id"]: token["special"] for token in content["added_tokens"]}
    for token_id in range(rows):
        if token_id in is_special:
            kind = kinds.CONTROL if is_special[token_id] else kinds.USER_DEFINED
        else:
            kind = kinds.UNUSED if tokenizer.id_to_token(token_id) is None else kinds.NORMAL
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(content))
    writer.add_token_list([tokenizer.id_to_token(token_id) or f"<|unused_{token_id}|>" for token_id in range(rows)])
    writer.add_token_types(types)


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {  # how a byte-level tokenizer splits a text into words -> llama.cpp's name of it
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (WORDS + r"\p{N}" + REST,): "qwen2",
    (WORDS + r"\p{N}{1,3}" + REST,): "llama-bpe",
}


def pre_tokenizer(content: dict) -> str:
    """llama.cpp's name for the pre_tokenizer of a tokenizer.json. UserError for one that it does not have."""
    whole = content.get("pre_tokenizer") or {}
    steps = []
    for step in whole.get("pretokenizers") or [whole]:
        if step.get("type") == "Split":
            steps.append(step["pattern"].get("Regex"))
        elif step.get("type") != "ByteLevel" or step.get("use_regex", True):
            steps.append(step.get("type"))
    name = PRE_TOKENIZERS.get(tuple(steps))
    if name is None or (name == "llama-bpe") != bool(content["model"].get("ignore_merges")):
        raise UserError(
            f"this tokenizer splits texts in a way that the table of llama.cpp's names does not have ({steps}): "
            "its model cannot be exported as GGUF; export it with --to bf16"
        )
    return name


def add_sentencepiece(writer, tokenizer: ChatTokenizer, rows: int, _):
    """Jiezi's own tokenizer.

    llama.cpp merges the pair whose result has the highest score, here the lowest id, as SentencePiece does. The tags of
    reasoning and tools are "user defined", as in Qwen3, so that programs show them; as a side effect llama.cpp encodes
    a typed tag as the tag.
    """
    kinds = import_extra("gguf").TokenType
    pieces, types = [], []
    for token_id in range(rows):
        piece = tokenizer.id_to_token(token_id)
        if piece is None:  # beyond the tokenizer
            kind = kinds.UNUSED
        elif token_id == 0:
            kind = kinds.UNKNOWN
        elif token_id in TAGS:
            kind = kinds.USER_DEFINED
        elif token_id < len(SPECIAL_TOKENS):
            kind = kinds.CONTROL
        elif piece.startswith("<0x"):
            kind = kinds.BYTE
        else:
            kind = kinds.NORMAL
        pieces.append(piece or f"<|unused_{token_id}|>")
        types.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(token_id) for token_id in range(len(pieces))])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(False)


def to_gguf(model: CausalLM) -> dict[str, Tensor]:
    """The tensors with llama.cpp's names: experts stacked, a llama's queries and keys in the order of its rotation."""
    gguf, config = import_extra("gguf"), model.config
    tensors, experts = {}, {}
    for name, tensor in model.state_dict().items():
        layer, found, rest = name.partition(".experts.")
        if found:  # rest is NUMBER.PROJECTION.weight
            experts.setdefault(f"{layer}.experts.{rest.partition('.')[2]}", []).append(tensor)
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            tensors[name] = tensor
    tensors |= {name: torch.stack(parts) for name, parts in experts.items()}  # (E, I, H) or (E, H, I)
    if config.use_moe:
        tensors = required_by_glm4moe(config) | tensors
    enum = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture(config))
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    translated = {}
    for name, tensor in tensors.items():
        if architecture(config) == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleave_halves(tensor, config.head_dim)
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        translated[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor.float().contiguous().cpu()
    if config.rope_scaling and config.rope_scaling["rope_type"] == "llama3":
        frequencies = rope_frequencies(config.head_dim, config.rope_theta)
        scaled, _ = scale_frequencies(frequencies, config.head_dim, config.rope_theta, config.rope_scaling)
        translated["rope_freqs.weight"] = frequencies / scaled
    return translated


def required_by_glm4moe(config: LMConfig) -> dict[str, Tensor]:
    """Zeros for the balancing bias and the shared expert, which llama.cpp's glm4moe always reads."""
    zeros = {}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        H, size = config.hidden_size, config.moe_intermediate_size
        zeros[f"{mlp}.gate.e_score_correction_bias"] = torch.zeros(config.n_routed_experts)
        if not config.n_shared_experts:
            zeros[f"{mlp}.shared_experts.gate_proj.weight"] = torch.zeros(size, H)
            zeros[f"{mlp}.shared_experts.up_proj.weight"] = torch.zeros(size, H)
            zeros[f"{mlp}.shared_experts.down_proj.weight"] = torch.zeros(H, size)
    return zeros


def interleave_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of each head to 0, D/2, 1, D/2 + 1, …: llama.cpp's llama rotates neighbours, ours halves."""
    heads = weight.unflatten(0, (-1, 2, head_dim // 2))  # (heads, 2, D / 2, H)
    return heads.transpose(1, 2).flatten(0, 2)  # (heads * D, H)


def write_modelfile(path: Path, model: CausalLM, gguf_file: Path, tokenizer: ChatTokenizer, sampling: dict):
    """The Modelfile for `ollama create`: the file, a Go template, stop tokens, and eval.py's sampling parameters.

    Ollama has a template for each family of open models, which it finds by the one in the file. sampling: temperature,
    top_p and repetition_penalty.
    """
    template = "{{ .Prompt }}"  # a base model continues a text
    if model.is_chat:
        template = Path(__file__).with_name("ollama.gotmpl").read_text("utf-8").rstrip("\n")
    parameters = {
        "num_ctx": model.config.max_position_embeddings,
        "temperature": sampling["temperature"],
        "top_p": sampling["top_p"],
        "repeat_penalty": sampling["repetition_penalty"],
    }
    lines = [f"FROM ./{gguf_file.name}"]
    if tokenizer.is_own or not model.is_chat:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    for token_id in sorted(set(model.stop_token_ids)):
        token = tokenizer.id_to_token(token_id) if token_id in tokenizer.control_ids else None
        if token is None or not token.isprintable() or '"' in token:
            raise UserError(f"generation_config.json lets the model stop at {token_id}, which is not a control token")
        lines.append(f'PARAMETER stop "{token}"')
    write_file(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n", "utf-8"))
