"""How time and memory grow: with the size of the model, the length of the rows and the size of the corpus.

    python -m bench.growth                                       about 10 minutes; draws out/growth.png
    python -m bench.growth --models 96x4 256x5 --lengths --corpora 10 100        a list without a value: not measured

model    width x layers, in between and at the presets; AdamW steps on rows packed with texts of natural length
length   each row is one text, so that attention is at its dearest; as many tokens in a step for every length
corpus   prepared data of random tokens in texts of natural length, as much as text of so many MB gives. `open` is
         PackedDataset and the first batch, in a process of its own, and `memory` its peak resident memory (VmHWM) less
         the resident memory before. `batch` is the mean time of making a batch, and its share of a step of `mini`.
         `start` is from the start of 1-pretrain.py to its first step, the first validation included.
"""

import argparse
import math
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from base.cli import HelpFormatter, UserError, positive, run
from bench.contest import TOKENIZER, Contest
from bench.memory import resident
from bench.train_speed import jiezi, made_up_batch
from corpus.prepared import writing_prepared
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training.cost import step_flops
from training.packing import Batch, PackedDataset

ROOT = Path(__file__).resolve().parent.parent
BYTES_OF_TOKEN = 3.3  # of text: the README's corpus has 74 MB and 22.3 M tokens


def sized(name: str) -> LMConfig:
    """A model of the presets' proportions from a name such as 256x5: width x layers."""
    try:
        width, layers = map(int, name.split("x"))
    except ValueError:
        raise UserError(f"--models {name}: not WIDTHxLAYERS, such as 256x5") from None
    heads = width // (64 if width >= 256 else 32)
    return LMConfig(
        hidden_size=width,
        intermediate_size=round(width * 8 / 3 / 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2 - heads % 2,
    )


def one_text_a_row(rows: int, max_seq_len: int, vocab_size: int) -> Batch:
    positions = torch.arange(max_seq_len).repeat(rows, 1)
    input_ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocab_size, (rows, max_seq_len)))
    tokens, pairs = rows * max_seq_len, rows * max_seq_len * (max_seq_len + 1) // 2
    documents = [0] * rows
    return Batch(input_ids, input_ids.roll(-1, 1), positions, positions * 0, documents, "train", tokens, pairs)


def step_time(config: LMConfig, batch: Batch, steps: int) -> tuple[CausalLM, float]:
    """Prints and returns the median seconds of a step; the percentage is of what plain matrix products reach."""
    with Contest({"": (jiezi, config, batch)}) as contest:
        seconds, _, peaks, _ = contest.take_turns(steps)
    model, median = CausalLM(config), statistics.median(seconds[""])
    mfu = step_flops(model, batch.real_tokens, batch.attention_pairs) / median / max(peaks)
    per_token = median / batch.real_tokens * 1e6
    print(f"{median:10.3f} s/step{per_token:10,.0f} us/token{mfu:8.0%} of {max(peaks) / 1e9:.0f} GFLOP/s", flush=True)
    return model, median


def write_corpus(folder: Path, megabytes: float):
    """Prepared data of as many random tokens as text of so many MB has."""
    generator = np.random.default_rng(0)
    tokens_of = {"train": megabytes * 1e6 / BYTES_OF_TOKEN, "val": 50_000}
    with writing_prepared(folder, "pretrain", TOKENIZER) as writer:
        block = generator.integers(16, 6400, 2**20).astype(writer.dtype)
        for split, tokens in tokens_of.items():
            lengths = np.clip(generator.lognormal(5.43, 0.5, int(tokens / 250)), 16, None).astype(np.int64)
            starts = lengths.cumsum() % (len(block) - lengths.max())  # in the block
            for start, length in zip(starts.tolist(), lengths.tolist()):
                writer.add(split, [(block[start : start + length].tobytes(), b"")])


def open_corpus(folder: Path, rows: int, max_seq_len: int) -> dict:
    before, start = resident("VmRSS"), time.perf_counter()
    data = PackedDataset(folder, "train", max_seq_len)
    order = data.order(0, 0)
    data.batch(order[:rows])
    opened = time.perf_counter()
    memory = resident("VmHWM") - before
    batches = [order[i : i + rows] for i in range(0, min(len(order), 100 * rows), rows)]
    start_batches = time.perf_counter()
    for batch_rows in batches:
        data.batch(batch_rows)
    batch = (time.perf_counter() - start_batches) / len(batches)
    documents = int(data.piece_document[-1]) + 1
    return dict(open=opened - start, memory=memory, batch=batch, tokens=data.n_tokens, documents=documents)


def start_of_run(folder: Path, rows: int, max_seq_len: int) -> float:
    """Seconds from the start of the script to its first step."""
    flags = ["--preset", "mini", "--data", folder, "--out_dir", folder / "out", "--device", "cpu", "--max_steps", "1"]
    flags += ["--batch_size", str(rows), "--max_seq_len", str(max_seq_len)]
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "1-pretrain.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("first validation loss"):  # the last word before the first step
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise OSError(f"1-pretrain.py ended with status {process.returncode} before its first step")


def plot(panels: dict[str, tuple[str, dict[str, list[tuple[float, float]]]]], path: Path):
    """A panel for each thing that grows: its name -> label of the y-axis, and lines of points (x, y)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, (label, lines)) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items()):
        for name, points in lines.items():
            axes.loglog(*zip(*points), marker="o", ms=4, label=name)
        numbers, values = zip(*(point for points in lines.values() for point in points))
        lowest, highest = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        axes.set(xlabel=title, ylabel=label, ylim=(10.0**lowest, 10.0**highest))  # whole decades: each has its tick
        ticks = sorted(set(numbers))
        axes.set_xticks(ticks, [f"{number:.3g}" if number < 100 else f"{number}" for number in ticks], size=8)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    models = ["96x4", "160x5", "256x5", "384x6", "512x8", "640x11", "768x15"]
    parser.add_argument("--models", nargs="*", default=models, help="width x layers")
    parser.add_argument("--lengths", nargs="*", type=positive, default=[256, 512, 1024, 2048, 4096], help="of rows")
    parser.add_argument("--corpora", nargs="*", type=positive, default=[10, 100, 1000, 2000], help="MB of text")
    parser.add_argument("--batch_size", type=positive, default=8, help="rows")
    parser.add_argument("--max_seq_len", type=positive, default=512, help="tokens in a row, but for --lengths")
    parser.add_argument("--steps", type=positive, default=3, help="measured steps of each")
    parser.add_argument("--plot", type=Path, default=Path("out/growth.png"), help="where the picture goes")
    args = parser.parse_args()
    sizes = args.batch_size, args.max_seq_len
    tokens = args.batch_size * args.max_seq_len
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, {tokens:,} tokens a step", flush=True
    )

    by_model = []
    for name in args.models:
        print(f"model   {name:>8}", end="")
        config = sized(name)
        batch = made_up_batch(*sizes, config.vocab_size)
        model, seconds = step_time(config, batch, args.steps)
        by_model.append((model.num_parameters() / 1e6, seconds / batch.real_tokens * 1e6))
    by_length, mini = [], LMConfig(**PRESETS["mini"])
    for length in args.lengths:
        print(f"length  {length:>8,}", end="")
        batch = one_text_a_row(max(tokens // length, 1), length, mini.vocab_size)
        _, seconds = step_time(mini, batch, args.steps)
        by_length.append((length, seconds / batch.real_tokens * 1e6))
    if args.corpora:
        print("step of mini    ", end="")
        _, step = step_time(mini, made_up_batch(*sizes, mini.vocab_size), args.steps)
    opened, started = [], []
    for megabytes in args.corpora:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "data"
            write_corpus(folder, megabytes)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(open_corpus, folder, *sizes).result()
            start = start_of_run(folder, *sizes)
        print(
            f"corpus  {megabytes:>8,} MB{found['tokens'] / 1e6:8.1f} M tokens{found['documents']:11,} texts   "
            f"open {found['open']:6.2f} s {found['memory'] / 2**20:5.0f} MiB   "
            f"batch {found['batch'] * 1e3:.2f} ms, {found['batch'] / step:.2%} of a step   start {start:5.1f} s",
            flush=True,
        )
        opened.append((megabytes, found["open"]))
        started.append((megabytes, start))
    panels = {
        "million parameters": ("us a token", {"training step": by_model}),
        "tokens in a row": ("us a token", {"training step, mini": by_length}),
        "MB of text": ("seconds", {"opening the data": opened, "start to first step, mini": started}),
    }
    plot({title: panel for title, panel in panels.items() if all(panel[1].values())}, args.plot)


if __name__ == "__main__":
    run(main)
