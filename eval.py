"""Look at a model: let it write, and measure it.

    python eval.py                                              the newest model under out/, interactively
    python eval.py --model out/pretrain --prompt 春天           one text, from its beginning
    python eval.py --perplexity FILE --json                     loss a token and bits per byte on a text
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data_process import find_files, parse, read_batches, text_of
from model.chat import BOS, EOS, encode, load_tokenizer
from model.checkpoint import load_model
from model.generation import TextStream, generate
from model.training import HelpFormatter, choose_device, positive, run

STAGES = ("pretrain", "sft", "lora", "dpo")


def newest_model(out: Path = Path("out")) -> Path:
    models = [out / stage for stage in STAGES if (out / stage / "model.safetensors").exists()]
    if not models:
        raise FileNotFoundError("no model under out/; train one with: python 1-pretrain.py, or name one with --model DIR")
    return max(models, key=lambda directory: (directory / "model.safetensors").stat().st_mtime)


def complete(model, tokenizer, prompt: str, args: argparse.Namespace):
    """Writes the prompt and what the model makes of it to the screen, as it comes; then the speed."""
    stream = TextStream(tokenizer)
    print(prompt, end="", flush=True)
    start, count = time.perf_counter(), 0
    tokens = generate(
        model,
        [[BOS] + encode(tokenizer, prompt)],
        args.max_new_tokens,
        stop_ids={EOS},
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
    )
    for (token_id,) in tokens:
        print(stream.add(token_id), end="", flush=True)
        count += 1
    print(stream.end(), flush=True)
    seconds = time.perf_counter() - start
    print(f"[{count} tokens, {count / seconds:.0f} tokens/s]", file=sys.stderr)


def interact(model, tokenizer, args: argparse.Namespace):
    """Reads a beginning, writes its continuation, until Ctrl-D or Ctrl-C at the prompt. Ctrl-C stops a long text."""
    print("A base model continues texts: type the beginning of one. Ctrl-C stops a text, Ctrl-D ends.")
    while True:
        try:
            prompt = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            complete(model, tokenizer, prompt, args)
        except KeyboardInterrupt:
            print(" …")
        except ValueError as error:
            print(f"error: {error}")


@torch.inference_mode()
def perplexity(model, tokenizer, file: str, text_field: str) -> dict:
    """Mean loss a token in nats, its exponential, and bits per UTF-8 byte, over every text of the file.

    A text longer than the context is read in pieces; the first tokens of a piece are told without those before it.
    """
    device, context = model.lm_head.weight.device, model.config.max_position_embeddings
    loss, tokens, texts, size = 0.0, 0, 0, 0
    for batch in read_batches(find_files([file]), text_field):
        for _, record in batch.records:
            text = text_of(parse(record), text_field)
            ids = torch.tensor([BOS, *encode(tokenizer, text), EOS], device=device)
            for start in range(0, len(ids) - 1, context):
                piece = ids[start : start + context + 1]
                logits = model(piece[None, :-1])[0]  # (T, V)
                loss += F.cross_entropy(logits.float(), piece[1:], reduction="sum").item()
            texts, tokens, size = texts + 1, tokens + len(ids) - 1, size + len(text.encode())
    if not size:
        raise ValueError(f"{file} holds no text")
    bits = loss / math.log(2) / size
    figures = {"loss": loss / tokens, "perplexity": math.exp(loss / tokens), "bits_per_byte": bits}
    return figures | {"texts": texts, "tokens": tokens, "bytes": size}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", type=Path, help="folder of a model; without it, the newest under out/")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--prompt", help="write once from this beginning, and leave")
    parser.add_argument("--perplexity", metavar="FILE", help="measure on a text file (any that data_process.py reads)")
    parser.add_argument("--text_field", default="text", help="where the text stands in a record of that file")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    group = parser.add_argument_group("how it writes")
    group.add_argument("--max_new_tokens", type=positive, default=200, help="tokens at most")
    group.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token")
    group.add_argument("--top_k", type=int, default=0, help="only the k most probable tokens; 0: all")
    group.add_argument("--top_p", type=float, default=0.95, help="only the most probable that make up this share")
    group.add_argument("--min_p", type=float, default=0.0, help="only tokens at least this share of the most probable")
    group.add_argument("--repetition_penalty", type=float, default=1.1, help="1: none")
    group.add_argument("--seed", type=int, help="the same seed writes the same text")
    args = parser.parse_args()
    directory = args.model or newest_model()
    model = load_model(directory, choose_device(args.device)).eval()
    tokenizer = load_tokenizer(directory)
    if args.perplexity:
        figures = perplexity(model, tokenizer, args.perplexity, args.text_field)
        for name, value in figures.items():
            print(f"{name:15}{value:,.4f}" if isinstance(value, float) else f"{name:15}{value:,}")
        if args.json:
            print(json.dumps(figures))
    elif args.prompt is not None:
        complete(model, tokenizer, args.prompt, args)
    else:
        print(f"{directory}: {model.num_parameters():,} parameters")
        interact(model, tokenizer, args)


if __name__ == "__main__":
    run(main)
