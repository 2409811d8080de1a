"""What is shown and kept of a run: a bar or lines, metrics.jsonl, loss.png; wandb or TensorBoard for who wants them."""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import jsonlines
import numpy as np

from base.cli import forget_reader, import_extra
from base.files import write_file
from training.machine import Machine
from training.plots import SHOWN, plot, plot_experts

METRICS_FILE = "metrics.jsonl"


def read_metrics(directory: Path, up_to_step: float = float("inf")) -> list[dict]:
    """The records of metrics.jsonl. A kill may have cut the last line; what came after `up_to_step` is left out."""
    path = directory / METRICS_FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
            if record["step"] <= up_to_step:
                records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return records


class Log:
    """Records for metrics.jsonl, loss.png and wandb; on a terminal they move a bar, elsewhere each is a line.

    metrics.jsonl grows line by line, so that a run can be watched; a run that is resumed takes out what came after its
    last save.
    """

    def __init__(self, args: argparse.Namespace, machine: Machine, directory: Path, step: int):
        self.args, self.directory, self.quiet = args, directory, machine.rank != 0
        self.records = read_metrics(directory, step) if step else []
        self.bar = self.wandb = self.tensorboard = None
        if self.quiet:
            return
        write_file(directory / METRICS_FILE, self._write_records)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=100, unit="%", bar_format="{percentage:3.0f}% |{bar}| {postfix}", dynamic_ncols=True)
        if args.wandb != "disabled":
            import wandb

            self.wandb = wandb.init(project="jiezi", name=args.out_dir.name, mode=args.wandb, config=vars(args))
        if args.tensorboard:  # beside out_dir, which is renamed as it is saved
            writer = import_extra("torch.utils.tensorboard", "requirements/track.txt").SummaryWriter
            self.tensorboard = writer(args.out_dir.parent / "tensorboard" / args.out_dir.name, purge_step=step + 1)

    def _write_records(self, path: Path):
        with jsonlines.open(path, "w") as lines:
            lines.write_all(self.records)

    def say(self, text: str):
        if self.quiet:
            return
        try:
            if self.bar:
                self.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
        except BrokenPipeError:  # the run goes on
            forget_reader()

    def add(self, share_done: float, record: dict):
        self.records.append(record)
        if self.quiet:
            return
        with jsonlines.open(self.directory / METRICS_FILE, "a") as lines:
            lines.write(record)
        forms = {name: SHOWN.get(name, name + " {:.3f}") for name in record}
        shown = "  ".join(form.format(record[name]) for name, form in forms.items() if form)
        if self.bar:
            self.bar.n = 100 * min(share_done, 1)
            self.bar.set_postfix_str(shown)
        if not self.bar or any(name.startswith("val_") for name in record):
            self.say(shown)
        if self.wandb:
            self.wandb.log(record, step=record["step"])
        if self.tensorboard:
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, record["step"])

    def draw(self):
        write_file(self.directory / "loss.png", lambda path: plot(self.records, path))
        if any("expert_load" in record for record in self.records):
            write_file(self.directory / "experts.png", lambda path: plot_experts(self.records, path))

    def close(self):
        if self.bar:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def describe_load(load: np.ndarray) -> dict:
    """How a mixture of experts is used: load (layers, E), tokens by expert.

    The busiest expert's load over the mean, the lowest entropy of a layer (1: all alike), and how many are idle.
    """
    share = load.astype(np.float64) / load.sum(1, keepdims=True)
    entropy = -(share * np.log(np.maximum(share, 1e-9))).sum(1) / np.log(load.shape[1])
    return {
        "load_max": float(share.max() * load.shape[1]),
        "load_entropy": float(entropy.min()),
        "idle_experts": int((load == 0).sum()),
        "expert_load": share.round(5).tolist(),
    }


class Meter:
    """Time, and what happened since the last line of the log."""

    def __init__(self, peak: float, share_done: float):
        self.peak = peak  # floating-point operations a second that all processes together could do
        self.share_at_start = share_done
        self.started = self.last_call = time.perf_counter()
        self.window = Counter()

    def start_step(self):
        self.step_started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the last call, in which validation and saving are."""
        last, self.last_call = self.last_call, time.perf_counter()
        return self.last_call - last

    def end_step(self, sums: dict[str, float], row_tokens: int):
        """After the update: counts the sums of a step, and the places of its rows, padding included."""
        self.window.update(sums)
        self.window.update(row_tokens=row_tokens, step_seconds=time.perf_counter() - self.step_started)

    def record(self, progress, share_done: float, learning_rate: float, grad_norm: float, metrics: list[str]) -> dict:
        """A line of the log. Speed counts real tokens only; the peak is what plain matrix products reach."""
        window, self.window = self.window, Counter()
        elapsed = time.perf_counter() - self.started
        seconds_left = elapsed * max(0, 1 - share_done) / max(share_done - self.share_at_start, 1e-9)
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": window["loss"] / window["count"],
            **{name: window[name] / window["count"] for name in metrics if name != "expert_load"},
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_s": window["real_tokens"] / window["step_seconds"],
            "share_of_peak": window["flops"] / window["step_seconds"] / self.peak,
            "real_share": window["real_tokens"] / max(window["row_tokens"], 1),
            "minutes": progress.seconds / 60,
            "minutes_left": seconds_left / 60,
            **(describe_load(window["expert_load"]) if "expert_load" in metrics else {}),
        }
