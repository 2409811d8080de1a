"""Which smaller weights leave a model's greedy texts as they are, token by token.

    python -m bench.weight_formats --model out/sft --texts zh_val.jsonl.gz

Every matrix is rounded to the format and multiplied in float32, so that only the rounding shows. A base model continues
the beginning of each text; a chat model answers it.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from base.cli import HelpFormatter, positive, run
from data_process import each_record, text_of
from engine.decoding import pack_for_decoding
from engine.generation import generate
from model.chat import BOS, EOS, IM_END, encode, load_tokenizer
from model.checkpoint import load_model
from model.model import CausalLM

ROWS = 50  # prompts at a time


def int8(weight: Tensor, group: int | None = None) -> Tensor:
    """Rounded to 255 values, evenly up to the largest of each row, or of each `group` numbers of a row."""
    groups = weight.reshape(-1, group or weight.shape[1])
    scale = groups.abs().amax(1, keepdim=True) / 127
    return ((groups / scale).round() * scale).view_as(weight)


FORMATS = {
    "float16": lambda weight: weight.half().float(),
    "bfloat16": lambda weight: weight.bfloat16().float(),
    "int8, a scale for 32": lambda weight: int8(weight, 32),
    "int8, a scale a row": int8,
}


@torch.no_grad()
def rounded(model: CausalLM, to_format: Callable[[Tensor], Tensor]) -> CausalLM:
    model = copy.deepcopy(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # the embedding is looked up, not multiplied
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(to_format(module.weight))
    return pack_for_decoding(model)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained model")
    parser.add_argument("--texts", required=True, metavar="FILE", help="in any format that data_process.py reads")
    parser.add_argument("--prompts", type=positive, default=200, help="this many of the texts")
    parser.add_argument("--new_tokens", type=positive, default=64, help="tokens to write to each")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, torch.device("cpu")).eval(), load_tokenizer(args.model)
    prompts = []
    for text, _ in zip(each_record(args.texts, "text", lambda record: text_of(record, "text")), range(args.prompts)):
        if model.is_chat:
            message = {"role": "user", "content": text[:20]}
            prompts.append(tokenizer.prompt([message]))
        else:
            prompts.append([BOS, *encode(tokenizer, text[:20])])

    def write(model: CausalLM) -> list[list[int | None]]:
        texts = []
        for start in range(0, len(prompts), ROWS):
            part = prompts[start : start + ROWS]
            steps = generate(model, part, args.new_tokens, stop_ids={EOS, IM_END}, temperature=0)
            texts += [[token for token in tokens if token is not None] for tokens in zip(*steps)]
        return texts

    expected = write(rounded(model, lambda weight: weight))
    for name, to_format in FORMATS.items():
        same = sum(text == wanted for text, wanted in zip(write(rounded(model, to_format)), expected))
        print(f"{name:22}{same:5} of {len(prompts)} texts of up to {args.new_tokens} tokens are the same", flush=True)


if __name__ == "__main__":
    run(main)
