"""Training speed: tokens/s, and the fraction of this machine's matrix product rate, next to transformers and TRL.

    python -m bench.train_speed --preset mini small
    python -m bench.train_speed --preset small --data dataset/pretrain
    python -m bench.train_speed --preset tiny mini --chats             the demonstration's short chats
    python -m bench.train_speed --preset mini --chats YOUR_CHATS.jsonl
    python -m bench.train_speed --model SmolLM2-135M --batch_size 1    an open model of these sizes

Both models are the same function, of the same size, with the same optimizer (fused AdamW, float32 weights) and input:
rows packed with texts. Without --qk_norm it is a Llama, with it a Qwen3, which is what the presets train. Jiezi keeps
the texts of a row apart; transformers' model reads a row as one text, as its users' scripts do. Each runs in a process
of its own, as its users start it: Jiezi's keeps freed memory (model/machine.py), which transformers' does not. To give
both what that brings, set the environment variables MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647.

With --chats, rows are packed with chats of which only the assistant's tokens are scored, about a third; and TRL's
SFTTrainer makes the same steps on the same rows where it is installed (requirements/interop.txt).

They take turns, step by step, so that a change in the machine's speed meets all; medians are printed. The operations
counted, for all alike, are those of a model with logits at every position: 6 per weight and token, and attention inside
documents only.
"""

import argparse
import importlib.util
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from base.cli import HelpFormatter, positive, run
from bench.contest import TOKENIZER, Contest, ratio
from model.checkpoint import load_config
from model.device import keep_freed_memory
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training.cost import step_flops
from training.loss import LossFunction, next_token_loss
from training.machine import Machine
from training.optimizer import GradientBuffer, OptimizerSettings, build_optimizer, optimizer_step
from training.packing import IGNORE, Batch, PackedDataset, pack


def made_up_batch(rows: int, max_seq_len: int, vocab_size: int) -> Batch:
    """Rows of random tokens, packed with documents as long as those of a Chinese corpus: median 230 tokens."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.43, 0.5, 400 * rows), 16, max_seq_len).astype(int)
    row_of = pack(lengths, max_seq_len)
    chosen = generator.permutation(row_of.max() + 1)[:rows]
    position_ids, pairs, real = np.zeros((rows, max_seq_len), np.int64), 0, 0
    for row in range(rows):
        at = 0
        for length in lengths[row_of == chosen[row]]:
            position_ids[row, at : at + length] = np.arange(length)
            pairs, real, at = pairs + length * (length + 1) // 2, real + length, at + length
        position_ids[row, at:] = np.arange(max_seq_len - at)
    input_ids = torch.from_numpy(generator.integers(0, vocab_size, (rows, max_seq_len)))
    positions = torch.from_numpy(position_ids)
    return Batch(input_ids, input_ids.roll(-1, 1), positions, torch.zeros_like(positions), [], "train", real, pairs)


def chat_batch(file: Path | None, rows: int, max_seq_len: int) -> Batch:
    """Rows packed with the chats of a file, in any format that data_process.py reads; without one, the demo's."""
    with tempfile.TemporaryDirectory() as folder:

        def process(*words):
            subprocess.run([sys.executable, "data_process.py", *map(str, words)], check=True, stdout=subprocess.DEVNULL)

        if file is None:
            process("demo", "--output", f"{folder}/demo")
        process("sft", file or f"{folder}/demo/sft.jsonl", "--output", f"{folder}/sft")
        data = PackedDataset(f"{folder}/sft", "train", max_seq_len)
        return data.batch(data.order(0, 0)[:rows])


def training_step(
    model: CausalLM, machine: Machine, optimizer: str, batch: Batch, loss_fn: LossFunction = next_token_loss
) -> Callable[[], None]:
    """A function that does what training/loop.py does in a step, with "adamw" or "muon"."""
    optimizer, scaler = build_optimizer(model, OptimizerSettings(optimizer)), machine.scaler()
    buffer = GradientBuffer(list(model.parameters()), metrics={})
    size = batch.labels.numel()

    def step():
        on_device = batch.to(machine.device)
        with machine.autocast():
            loss_sum, tokens, _ = loss_fn(model, on_device)
        scaler.scale(loss_sum / size).backward()
        buffer.add_sums(loss=loss_sum.detach(), count=tokens, real_tokens=batch.real_tokens)
        sums = buffer.all_reduce(machine, size, lambda: scaler.unscale_(optimizer))
        optimizer_step(optimizer, buffer, scaler, sums, grad_clip=1.0)

    return step


def jiezi(config: LMConfig, batch: Batch, compiled: bool = False) -> Callable[[], None]:
    """A function that does a training step."""
    keep_freed_memory()
    torch.manual_seed(0)
    model = CausalLM(config)
    if compiled:
        model.model.compile()

    def gradients():
        loss_sum, tokens, _ = next_token_loss(model, batch)
        (loss_sum / tokens).backward()

    return with_adamw(model, gradients)


def transformers(config: LMConfig, batch: Batch, compiled: bool = False) -> Callable[[], None]:
    """The same with transformers' model of this config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf()), dtype=torch.float32)
    labels = batch.labels.clone()
    labels[:, 1:] = batch.labels[:, :-1]  # transformers shifts them itself
    labels[:, 0] = IGNORE
    if compiled:
        model.compile()
    return with_adamw(model, lambda: model(input_ids=batch.input_ids, labels=labels, use_cache=False).loss.backward())


def trl(config: LMConfig, batch: Batch, compiled: bool = False) -> Callable[[], None]:
    """The same with TRL's SFTTrainer, which trains that model on rows that are packed and tokenized already."""
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    scored = torch.zeros_like(batch.labels)
    scored[:, 1:] = batch.labels[:, :-1] != IGNORE
    rows = Dataset.from_dict({"input_ids": batch.input_ids.tolist(), "completion_mask": scored.tolist()})
    flags = dict(per_device_train_batch_size=len(rows), max_length=None, torch_compile=compiled, report_to="none")
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf())),
            SFTConfig(folder, use_cpu=True, bf16=False, activation_checkpointing=False, **flags),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        )
    inputs = next(iter(trainer.get_train_dataloader()))
    return with_adamw(trainer.model, lambda: trainer.compute_loss(trainer.model, dict(inputs)).backward())


def with_adamw(model: torch.nn.Module, gradients: Callable[[], None]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        gradients()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(preset: str, config: LMConfig, batch: Batch, steps: int, compiled: bool, libraries: list[Callable]):
    contestants = {build.__name__: (build, config, batch, compiled) for build in (jiezi, *libraries)}
    with Contest(contestants) as contest:
        seconds, memory, peaks, _ = contest.take_turns(steps)
    model, peak = CausalLM(config), max(peaks)
    flops, tokens = step_flops(model, batch.real_tokens, batch.attention_pairs), batch.real_tokens
    for name, times in seconds.items():
        median = statistics.median(times)
        share = flops / median / peak
        speed = f"{median:8.3f} s/step {tokens / median:8,.0f} tok/s {share:6.1%} of {peak / 1e9:.0f} GFLOP/s"
        print(f"{preset:8}{model.num_parameters() / 1e6:8.1f}M  {name:14}{speed} {memory[name]:6.2f} GiB")
    for library in libraries:
        name = library.__name__
        print(f"{preset:8}{'':11}jiezi is {ratio(seconds, name, 'jiezi'):.2f} x as fast as {name}, step by step")


def measuring_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags that these benchmarks share, parsed; prints what is measured on."""
    parser.add_argument("--batch_size", type=positive, default=8, help="rows")
    parser.add_argument("--max_seq_len", type=positive, default=512, help="tokens in a row")
    parser.add_argument("--steps", type=positive, default=7, help="measured steps of each")
    args = parser.parse_args()
    shape = f"{args.batch_size} x {args.max_seq_len} tokens"
    print(f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {shape}", flush=True)
    return args


def cpu_name() -> str:
    """What the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["mini", "small"], help="sizes")
    parser.add_argument("--model", type=Path, help="folder of a model, whose architecture and sizes replace a preset's")
    parser.add_argument("--data", type=Path, help="prepared data; without it, random tokens in texts of natural length")
    parser.add_argument(
        "--chats", type=Path, nargs="?", const=True, help="train on a file of chats; without FILE, on the demo's"
    )
    parser.add_argument("--qk_norm", action="store_true", help="compare with transformers' Qwen3 in place of its Llama")
    parser.add_argument("--compile", action="store_true", help="both with torch.compile")
    args = measuring_flags(parser)
    libraries = [transformers]
    configs = {preset: LMConfig(**PRESETS[preset], qk_norm=args.qk_norm) for preset in args.preset}
    if args.model:
        configs = {args.model.name: load_config(args.model)}
    batch = made_up_batch(args.batch_size, args.max_seq_len, next(iter(configs.values())).vocab_size)
    if args.data:
        data = PackedDataset(args.data, "train", args.max_seq_len)
        batch = data.batch(data.order(0, 0)[: args.batch_size])
    if args.chats:
        batch = chat_batch(None if args.chats is True else args.chats, args.batch_size, args.max_seq_len)
        libraries += [trl] if importlib.util.find_spec("trl") else []
        print(f"{len(batch.documents)} chats, {batch.scored / batch.real_tokens:.0%} of their tokens are scored")
    for name, config in configs.items():
        measure(name, config, batch, args.steps, args.compile, libraries)


if __name__ == "__main__":
    run(main)
