"""What is shown and kept of a run: a bar or lines, metrics.jsonl, loss.png; optionally wandb or TensorBoard."""

import json
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jsonlines
import numpy as np

from base.cli import forget_reader, import_extra, printable
from base.files import METRICS_FILE, write_file
from training.plots import SHOWN, plot, plot_experts

COLUMNS = 80  # of the narrowest usual terminal
FIRST = ("step", "loss", "reward", "accuracy", "tokens_per_s", "minutes_left")  # in every line, which fits in COLUMNS


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


def duration(minutes: float) -> str:
    """As "42 s", "7.3 min", "54 min" or "3.2 h"."""
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    value, unit = (minutes, "min") if minutes < 100 else (minutes / 60, "h")
    return f"{value:,.{int(value < 10)}f} {unit}"


def describe_record(record: dict, progress: float, everything: bool) -> str:
    """The fields of FIRST in one line, or all of them, in lines of COLUMNS characters."""
    step = f"{record['step']:,}"
    if progress:  # a run that --epochs or --max_minutes limits has about so many steps
        step += f"/{max(record['step'], round(record['step'] / progress)):,}"
    times = {name: duration(record[name]) for name in ("minutes", "minutes_left") if name in record}
    values = record | times | {"step": step}
    names = [name for name in FIRST if name in values]
    if everything:
        names += [name for name in values if name not in FIRST]
    forms = {name: SHOWN.get(name, name + " {:.3f}") for name in names}
    fields = [form.format(values[name]).replace(" ", "\xa0") for name, form in forms.items() if form]
    return textwrap.fill("  ".join(fields), COLUMNS, subsequent_indent="  ").replace("\xa0", " ")


@dataclass(frozen=True)
class LogSettings:
    wandb: str = "disabled"  # or "offline", "online"
    tensorboard: bool = False


class Log:
    """Records for metrics.jsonl, loss.png and wandb; on a terminal they move a bar, elsewhere each is a line.

    The line always shows FIRST; a validation prints all fields, and the sample that the model has written.
    metrics.jsonl grows line by line, so that a run can be watched; a run that is resumed takes out what came after its
    last save.
    """

    def __init__(self, settings: LogSettings, flags: dict, rank: int, out_dir: Path, directory: Path, step: int):
        """flags: for wandb. directory: where out_dir's files are until its first save. step: the last one saved."""
        self.directory, self.quiet = directory, rank != 0
        self.records = read_metrics(directory, step) if step else []
        self.bar = self.wandb = self.tensorboard = None
        if self.quiet:
            return
        write_file(directory / METRICS_FILE, self._write_records)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=100, unit="%", bar_format="{desc} |{bar}|", dynamic_ncols=True)
        if settings.wandb != "disabled":
            import wandb

            self.wandb = wandb.init(project="jiezi", name=out_dir.name, mode=settings.wandb, config=flags)
        if settings.tensorboard:  # beside out_dir, which is renamed as it is saved
            writer = import_extra("torch.utils.tensorboard", "requirements/track.txt").SummaryWriter
            self.tensorboard = writer(out_dir.parent / "tensorboard" / out_dir.name, purge_step=step + 1)

    def _write_records(self, path: Path):
        with jsonlines.open(path, "w") as lines:
            lines.write_all(self.records)

    def info(self, text: str):
        if self.quiet:
            return
        try:
            if self.bar:
                self.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
        except BrokenPipeError:  # the run goes on
            forget_reader()

    def append(self, progress: float, record: dict):
        self.records.append(record)
        if self.quiet:
            return
        with jsonlines.open(self.directory / METRICS_FILE, "a") as lines:
            lines.write(record)
        validated = any(name.startswith("val_") for name in record)
        if self.bar:
            self.bar.n = 100 * min(progress, 1)
            self.bar.set_description_str(describe_record(record, progress, everything=False))
        if not self.bar or validated:
            self.info(describe_record(record, progress, everything=validated))
        if record.get("sample"):
            self.info("  sample: " + " ".join(printable(record["sample"]).split()))
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
            self.bar = None
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def expert_load_metrics(load: np.ndarray) -> dict:
    """How a mixture of experts is used: load (layers, E), tokens by expert.

    The busiest expert's load over the mean, the lowest entropy of a layer (1: all alike), and how many are idle.
    """
    fraction = load.astype(np.float64) / load.sum(1, keepdims=True)
    entropy = -(fraction * np.log(np.maximum(fraction, 1e-9))).sum(1) / np.log(load.shape[1])
    return {
        "load_max": float(fraction.max() * load.shape[1]),
        "load_entropy": float(entropy.min()),
        "idle_experts": int((load == 0).sum()),
        "expert_load": fraction.round(5).tolist(),
    }


class Meter:
    """Time, and what happened since the last line of the log."""

    def __init__(self, peak: float, progress: float):
        self.peak = peak  # floating-point operations per second that all processes together could do
        self.progress_at_start = progress
        self.started = self.step_started = self.last_call = time.perf_counter()
        self.window = Counter()

    def start_step(self):
        self.step_started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the last call, in which validation and saving are."""
        last, self.last_call = self.last_call, time.perf_counter()
        return self.last_call - last

    def end_step(self, sums: dict[str, float]):
        """After the update: counts the sums of a step."""
        self.window.update(sums)
        self.window.update(step_seconds=time.perf_counter() - self.step_started)

    def record(self, state, progress: float, learning_rate: float, grad_norm: float, metrics: list[str]) -> dict:
        """A line of the log. Speed counts real tokens only; the peak is what plain matrix products reach."""
        window, self.window = self.window, Counter()
        elapsed = time.perf_counter() - self.started
        seconds_left = elapsed * max(0, 1 - progress) / max(progress - self.progress_at_start, 1e-9)
        return {
            "step": state.step,
            "tokens": state.tokens,
            "loss": window["loss"] / window["count"],
            **{name: window[name] / window["count"] for name in metrics if name != "expert_load"},
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_s": window["real_tokens"] / window["step_seconds"],
            "mfu": window["flops"] / window["step_seconds"] / self.peak,
            "real_fraction": window["real_tokens"] / max(window["positions"], 1),
            "minutes": state.seconds / 60,
            "minutes_left": seconds_left / 60,
            **(expert_load_metrics(window["expert_load"]) if "expert_load" in metrics else {}),
        }
