"""What structured output costs: tokens per second of the engine with and without a JSON schema, in turns.

    python -m bench.grammar_speed --preset mini small --rows 1 8

The model has random weights and writes any token that the schema allows, which is more work than what a trained model
writes.
"""

import argparse
import statistics
import time

import torch

from base.cli import positive
from engine.decoding import pack_for_decoding
from engine.generation import Engine, Sampling, Sequence
from engine.grammar import Constraint, compile_grammar, grammar_of, json_rule
from model.chat import BOS, EOS, IM_END, load_tokenizer
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["红", "绿", "blue"]}},
        "note": {"type": "string"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def tokens_per_second(model, grammar, rows: int, tokens: int) -> float:
    """Of `rows` answers at a time; a row that ends is followed by another one."""
    stop_ids = frozenset([EOS, IM_END]) if grammar else frozenset()
    engine = Engine(model, rows)
    total, start, made = 0, time.perf_counter(), 0
    while total < rows * tokens:
        while len(engine.rows) + len(engine.waiting) < rows:
            sequence = Sequence([BOS, 300], tokens, stop_ids, Sampling(1.0), seed=made)
            sequence.constraint = Constraint(grammar, stop_ids) if grammar else None
            engine.submit(sequence)
            made += 1
        total += len(engine.step())
    return total / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["mini", "small"])
    parser.add_argument("--rows", nargs="+", type=positive, default=[1, 8])
    parser.add_argument("--tokens", type=positive, default=128)
    parser.add_argument("--rounds", type=positive, default=3)
    args = parser.parse_args()
    tokenizer = load_tokenizer("model/tokenizer")
    grammar = compile_grammar(tokenizer, grammar_of(json_rule({"type": "array", "items": PERSON, "minItems": 4})))
    print("preset    rows     free  constrained   ratio")
    for preset in args.preset:
        torch.manual_seed(0)
        model = pack_for_decoding(CausalLM(LMConfig(**PRESETS[preset])).eval())
        for rows in args.rows:
            rates = {None: [], grammar: []}
            for _ in range(args.rounds):
                for kind, found in rates.items():
                    found.append(tokens_per_second(model, kind, rows, args.tokens))
            free, constrained = (statistics.median(found) for found in rates.values())
            print(f"{preset:8}{rows:6}{free:9.0f}{constrained:13.0f}{constrained / free:8.2f}", flush=True)


if __name__ == "__main__":
    main()
