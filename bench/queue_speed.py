"""A queue of prompts and answers of mixed lengths: with refill, as the engine writes it, and in groups.

    python -m bench.queue_speed --preset mini small

In groups, a group is written to its end before the next begins, so that rows stand idle behind the longest. The steady
rate is that of as many rows which all write on: the most that a batch of this size can give on this machine. Rounds
take turns; medians are printed.
"""

import argparse
import random
import statistics
import time

import torch

from base.cli import HelpFormatter, positive, run
from bench.contest import cpu_machine
from engine.decoding import pack_for_decoding
from engine.generation import Engine, Sampling, Sequence
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM


def make_queue(number: int, vocab_size: int) -> list[Sequence]:
    """Prompts of 8 to 128 tokens and answers of 8 to 128, both skewed towards the short as chats are."""
    rng = random.Random(0)
    queue = []
    for _ in range(number):
        length, limit = (min(8 + int(rng.expovariate(1 / 32)), 128) for _ in range(2))
        prompt = [rng.randrange(16, vocab_size) for _ in range(length)]
        queue.append(Sequence(prompt, limit, sampling=Sampling(temperature=0)))
    return queue


def write(engine: Engine, queue: list[Sequence]) -> float:
    """Seconds until all are written."""
    start = time.perf_counter()
    for sequence in queue:
        engine.submit(sequence)
    while engine.busy:
        engine.step()
    return time.perf_counter() - start


def write_in_groups(engine: Engine, queue: list[Sequence]) -> float:
    groups = [queue[i : i + engine.max_rows] for i in range(0, len(queue), engine.max_rows)]
    return sum(write(engine, group) for group in groups)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["mini", "small"], help="sizes")
    parser.add_argument("--prompts", type=positive, default=256, help="in the queue")
    parser.add_argument("--batch_size", type=positive, default=32, help="rows that are written at a time")
    parser.add_argument("--rounds", type=positive, default=3, help="measured times of each")
    args = parser.parse_args()
    cpu_machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.batch_size} rows", flush=True)
    for preset in args.preset:
        config = LMConfig(**PRESETS[preset])
        model = pack_for_decoding(CausalLM(config).eval())
        engine = Engine(model, args.batch_size)
        speeds = {"with refill": [], "in groups": [], "steady": []}
        for _ in range(args.rounds + 1):  # the first warms up
            for name, how in (("with refill", write), ("in groups", write_in_groups)):
                queue = make_queue(args.prompts, config.vocab_size)
                seconds = how(engine, queue)
                speeds[name].append(sum(len(sequence.tokens) for sequence in queue) / seconds)
            rows = [Sequence([16] * 8, 64, sampling=Sampling(temperature=0)) for _ in range(args.batch_size)]
            speeds["steady"].append(64 * args.batch_size / write(engine, rows))
        steady = statistics.median(speeds["steady"][1:])
        for name, values in speeds.items():
            speed = statistics.median(values[1:])
            print(f"{preset:8}{name:14}{speed:10,.0f} tok/s{speed / steady:8.0%} of the steady rate", flush=True)


if __name__ == "__main__":
    run(main)
