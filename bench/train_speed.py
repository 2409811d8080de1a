"""Training speed: tokens/s, and the share of what this machine's plain matrix products reach, beside transformers.

    python -m bench.train_speed --preset mini small
    python -m bench.train_speed --preset small --data dataset/pretrain

Both models are the same function, of the same size, with the same optimizer (fused AdamW, float32 weights) and input:
rows packed with texts. Without --qk_norm it is a Llama, with it a Qwen3, which is what the presets train. Jiezi keeps
the texts of a row apart; transformers' model reads a row as one text, as its users' scripts do. The two take
turns, step by step, so that a change in the machine's speed meets both; medians are printed. The operations counted,
for both alike, are those that Jiezi needs: 6 a weight and token, and attention inside documents only.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from model.dataset import IGNORE, Batch, PackedDataset, pack
from model.flags import HelpFormatter, positive
from model.LMConfig import PRESETS, LMConfig
from model.machine import Machine, keep_freed_memory, matmul_rate
from model.model import CausalLM
from model.training import next_token_loss, run, step_flops


def made_up_batch(rows: int, max_seq_len: int, vocab_size: int) -> Batch:
    """Rows of random tokens, packed with documents as long as those of a Chinese corpus: median 230 tokens."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.43, 0.5, 8 * rows), 16, max_seq_len).astype(int)
    row_of = pack(lengths, max_seq_len)
    position_ids, pairs, real = np.zeros((rows, max_seq_len), np.int64), 0, 0
    for row in range(rows):
        at = 0
        for length in lengths[row_of == row]:
            position_ids[row, at : at + length] = np.arange(length)
            pairs, real, at = pairs + length * (length + 1) // 2, real + length, at + length
        position_ids[row, at:] = np.arange(max_seq_len - at)
    input_ids = torch.from_numpy(generator.integers(0, vocab_size, (rows, max_seq_len)))
    positions = torch.from_numpy(position_ids)
    return Batch(input_ids, input_ids.roll(-1, 1), positions, torch.zeros_like(positions), [], "train", real, pairs)


def measure(preset: str, args: argparse.Namespace, machine: Machine):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config = LMConfig(**PRESETS[preset], qk_norm=args.qk_norm)
    if args.data:
        data = PackedDataset(args.data, "train", args.max_seq_len)
        batch = data.batch(data.order(0, 0)[: args.batch_size])
    else:
        batch = made_up_batch(args.batch_size, args.max_seq_len, config.vocab_size)
    torch.manual_seed(0)
    ours = CausalLM(config)
    hf = {name: value for name, value in config.to_hf().items() if name not in ("architectures", "model_type", "dtype")}
    theirs = Qwen3ForCausalLM(Qwen3Config(**hf)) if args.qk_norm else LlamaForCausalLM(LlamaConfig(**hf))
    labels = batch.labels.clone()
    labels[:, 1:] = batch.labels[:, :-1]  # transformers shifts them itself
    labels[:, 0] = IGNORE

    def their_step():
        theirs(input_ids=batch.input_ids, labels=labels, use_cache=False).loss.backward()

    contestants = {"jiezi": (ours, step_of(ours, batch)), "transformers": (theirs, their_step)}
    seconds, peak = take_turns(contestants, args.steps, machine)
    flops, tokens = step_flops(ours, batch.real_tokens, batch.attention_pairs), batch.real_tokens
    for name, times in seconds.items():
        median = statistics.median(times)
        share = flops / median / peak
        size = f"{preset:8}{ours.num_parameters() / 1e6:8.1f}M  {name:14}"
        print(f"{size}{median:8.3f} s/step {tokens / median:8,.0f} tok/s {share:6.1%} of {peak / 1e9:.0f} GFLOP/s")
    print(f"{preset:8}{'':11}jiezi is {ratio(seconds, 'transformers', 'jiezi'):.2f} x transformers, step by step")


def measuring_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags that these benchmarks share, parsed; prints what is measured on."""
    parser.add_argument("--batch_size", type=positive, default=8, help="rows")
    parser.add_argument("--max_seq_len", type=positive, default=512, help="tokens in a row")
    parser.add_argument("--steps", type=positive, default=7, help="measured steps of each")
    args = parser.parse_args()
    shape = f"{args.batch_size} x {args.max_seq_len} tokens"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {shape}", flush=True)
    return args


def cpu_machine() -> Machine:
    """One process on the CPU, its memory kept as in training, from which a peer gains as much."""
    keep_freed_memory()
    return Machine(0, 1, torch.device("cpu"), torch.float32)


def step_of(model: CausalLM, batch: Batch) -> Callable[[], None]:
    """A function that computes the gradients of a training step."""

    def step():
        loss_sum, tokens, _ = next_token_loss(model, batch)
        (loss_sum / tokens).backward()

    return step


def take_turns(contestants: dict, steps: int, machine: Machine) -> tuple[dict[str, list[float]], float]:
    """Seconds of each step of each (model, step), which take turns, and the best matrix-multiply rate on the way."""
    seconds = {name: [] for name in contestants}
    optimizers = {n: torch.optim.AdamW(model.parameters(), fused=True) for n, (model, _) in contestants.items()}
    peaks = [matmul_rate(machine)]
    for turn in range(steps + 1):
        for name, (_, step) in contestants.items():
            start = time.perf_counter()
            step()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
        peaks.append(matmul_rate(machine))
    return seconds, max(peaks)


def ratio(seconds: dict[str, list[float]], slower: str, faster: str) -> float:
    """How many times as fast `faster` was: the median over the turns."""
    return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["mini", "small"], help="sizes")
    parser.add_argument("--data", type=Path, help="prepared data; without it, random tokens in texts of natural length")
    parser.add_argument("--qk_norm", action="store_true", help="compare with transformers' Qwen3 in place of its Llama")
    args = measuring_flags(parser)
    machine = cpu_machine()
    for preset in args.preset:
        measure(preset, args, machine)


if __name__ == "__main__":
    run(main)
