"""What a model generates while it is trained: a learner sees noise turn into words, and words into sentences."""

from engine.decoding import shared_copy
from engine.generation import generate
from model.chat import load_tokenizer
from model.model import CausalLM
from training.machine import Machine
from training.packing import PackedDataset

PROMPT_TOKENS, NEW_TOKENS = 8, 32


def sample_text(model: CausalLM, machine: Machine, data: PackedDataset, prompt: str | None) -> dict[str, str]:
    """{"sample": a prompt and its continuation} on rank 0; without a prompt, that of the first text of `data`.

    The random numbers are its own, so that a run is the same with it and without it. With --shard no process has a
    whole model to generate with: {}, as for an empty prompt.
    """
    if machine.rank or machine.shards or prompt == "":
        return {}
    tokenizer = load_tokenizer(data.tokenizer_dir)
    folder = next(iter(data.folders.values()))
    ids = folder.tokens[: PROMPT_TOKENS + 1].tolist() if prompt is None else tokenizer.text_prompt(prompt)
    steps = generate(shared_copy(model).eval(), [ids], NEW_TOKENS, {tokenizer.eos}, seed=0, temperature=0.8)
    return {"sample": tokenizer.decode([*ids, *(token for (token,) in steps)])}
