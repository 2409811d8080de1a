"""Whether prepared data are enough for a model: one line, from figures that were measured."""

from model.LMConfig import PRESETS, LMConfig

TOKENS_PER_PARAMETER = 20  # use a fixed budget of operations best (arXiv 2203.15556; docs/scaling_en.md, 1)
# The error of a validation loss falls with the square root of the number of documents: python -m bench.validation.
FEW_VALIDATION, GOOD_VALIDATION = 100, 300
# 85 chats were memorized (training loss 0.10, validation loss 1.41), 14,302 were not; 1,631 pairs raised the fraction
# of unseen pairs ranked right from 50% to 81% (docs/results_en.md, docs/lora_en.md).
FEW = {"sft": (1000, "chats", "85 were memorized, 14,302 were not"), "dpo": (500, "pairs", "1,631 were enough")}
FEW["rl"] = (100, "questions", "3,000 were enough")


def parameters_of(preset: str, vocab_size: int) -> int:
    """The number of parameters of a dense preset with tied embeddings."""
    c = LMConfig(**PRESETS[preset], vocab_size=vocab_size)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = c.hidden_size * (2 * queries + 2 * keys) + 2 * c.head_dim * bool(c.qk_norm)
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size


def is_it_enough(kind: str, counts: dict[str, dict], group: int, vocab_size: int) -> str:
    """One line that relates the counts of both splits, as PreparedWriter.counts has them, to what models need."""
    train, val = (counts[split]["documents"] // group for split in ("train", "val"))
    if kind == "pretrain":
        words = _about_tokens(counts["train"]["tokens"], vocab_size)
    else:
        few, unit, evidence = FEW[kind]
        words = f"{train:,} {unit}" + (f" are few ({evidence}): expect overfitting" if train < few else "")
    return f"is it enough? {words}; {_about_validation(train, val)}"


def _about_tokens(tokens: int, vocab_size: int) -> str:
    presets = [name for name in PRESETS if not name.endswith("-moe")]
    sizes = {name: parameters_of(name, vocab_size) for name in presets}
    fitting = [name for name in presets if sizes[name] * TOKENS_PER_PARAMETER <= tokens]
    ratio = tokens / sizes["small"]
    words = f"{tokens:,} tokens are {ratio:.3g} per parameter of the preset small ({sizes['small']:,})"
    if ratio >= TOKENS_PER_PARAMETER:
        return f"{words}: enough"
    smaller = f"--preset {fitting[-1]} has {TOKENS_PER_PARAMETER}" if fitting else "too few for any preset"
    return f"{words}, and {TOKENS_PER_PARAMETER} use a budget best: {smaller}; several epochs help up to a point"


def _about_validation(train: int, val: int) -> str:
    if val >= FEW_VALIDATION:
        return f"{val:,} for validation"
    few = f"validation on {val:,} is too few to trust" if val else "nothing is left for validation"
    fraction = min(max(GOOD_VALIDATION / max(train + val, 1), 0.02), 0.2)
    return f"{few}: give --val_fraction {fraction:.2g}, or a file with --val FILE"
