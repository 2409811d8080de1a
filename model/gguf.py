"""GGUF, the format of llama.cpp, Ollama and LM Studio: one file with weights, tokenizer and chat template.

The architectures are llama.cpp's own: llama, qwen3 with QK-norm, glm4moe with experts (both routers). llama_cpp.py
reads such a file. Both packages are in requirements/export.txt.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor

from base.cli import UserError, import_extra
from base.files import read_json, write_file
from model.chat import BOS, EOS, IM_END, SPECIAL_TOKENS, THINK, TOOLS, load_tokenizer
from model.LMConfig import LMConfig
from model.model import CausalLM

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
    """llama.cpp's name. UserError for an activation that its architectures do not have."""
    if config.hidden_act != "silu":
        raise UserError(f'llama.cpp has this architecture only with hidden_act "silu", not "{config.hidden_act}"')
    if config.use_moe:
        return "glm4moe"
    return "qwen3" if config.qk_norm else "llama"


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


def add_tokenizer(writer, model: CausalLM, directory: Path):
    """Tokens with their types, scores and merges; for a chat model its template.

    llama.cpp merges the pair whose result has the highest score, here the lowest id, as SentencePiece does. The tags of
    reasoning and tools are "user defined", as in Qwen3, so that programs show them; as a side effect llama.cpp encodes
    a typed tag as the tag. A base model's text starts with a bos; in a chat the template adds it.
    """
    kinds, tokenizer = import_extra("gguf").TokenType, load_tokenizer(directory)
    pieces, types = [], []
    for token_id in range(model.config.vocab_size):
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
    merges = read_json(directory / "tokenizer.json")["model"].get("merges")
    if merges is None:
        raise UserError(f"{directory / 'tokenizer.json'} is not a BPE tokenizer, which GGUF needs")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(token_id) for token_id in range(len(pieces))])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(not model.is_chat)
    writer.add_add_space_prefix(False)
    if model.is_chat:
        writer.add_eot_token_id(IM_END)
        writer.add_chat_template((directory / "chat_template.jinja").read_text("utf-8"))


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


def write_modelfile(path: Path, model: CausalLM, gguf_file: Path):
    """The Modelfile for `ollama create`: the file, a Go template, stop tokens, and eval.py's sampling parameters."""
    template = "{{ .Prompt }}"  # a base model continues a text
    if model.is_chat:
        template = Path(__file__).with_name("ollama.gotmpl").read_text("utf-8").rstrip("\n")
    parameters = {
        "num_ctx": model.config.max_position_embeddings,
        "temperature": 0.7,
        "top_p": 0.9,
        "repeat_penalty": 1.1,
    }
    lines = [f"FROM ./{gguf_file.name}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    for token_id in sorted(set(model.stop_token_ids)):
        if not 0 <= token_id < len(SPECIAL_TOKENS):
            raise UserError(f"generation_config.json lets the model stop at {token_id}, which is not a control token")
        lines.append(f'PARAMETER stop "{SPECIAL_TOKENS[token_id]}"')
    write_file(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n", "utf-8"))
