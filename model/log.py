"""What is shown and kept of a run: a bar or lines, metrics.jsonl, loss.png, wandb."""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from model.checkpoint import write_file
from model.machine import Machine

SHOWN = {  # how a value of a record is printed, where its name alone does not say
    "step": "step {:,}",
    "tokens": "{:,} tokens",
    "val_bits_per_byte": "{:.3f} bits/byte",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "norm {:.2f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "share_of_peak": "{:.0%} of peak",
    "real_share": "{:.0%} real",
    "minutes": "{:.1f} min",
    "minutes_left": "{:.1f} left",
    "load_max": "busiest expert {:.2f} x",
    "load_entropy": "entropy {:.3f}",
    "idle_experts": "{} idle",
    "expert_load": None,  # too long
}


class Log:
    """Records for metrics.jsonl, loss.png and wandb; on a terminal they move a bar, elsewhere each is a line."""

    def __init__(self, args: argparse.Namespace, machine: Machine):
        self.args, self.quiet, self.records, self.bar, self.wandb = args, machine.rank != 0, [], None, None
        path = args.out_dir / "metrics.jsonl"
        if args.resume and path.exists():
            self.records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if self.quiet:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=100, unit="%", bar_format="{percentage:3.0f}% |{bar}| {postfix}", dynamic_ncols=True)
        if args.wandb != "disabled":
            import wandb

            self.wandb = wandb.init(project="jiezi", name=args.out_dir.name, mode=args.wandb, config=vars(args))

    def say(self, text: str):
        if not self.quiet:
            self.bar.write(text, file=sys.stdout) if self.bar else print(text, flush=True)

    def add(self, done: float, record: dict):
        self.records.append(record)
        if self.quiet:
            return
        forms = {name: SHOWN.get(name, name + " {:.3f}") for name in record}
        shown = "  ".join(form.format(record[name]) for name, form in forms.items() if form)
        if self.bar:
            self.bar.n = 100 * min(done, 1)
            self.bar.set_postfix_str(shown)
        if not self.bar or "val_loss" in record:
            self.say(shown)
        if self.wandb:
            self.wandb.log(record, step=record["step"])

    def write(self, directory: Path):
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write_file(directory / "metrics.jsonl", lambda temporary: temporary.write_text(lines, "utf-8"))
        write_file(directory / "loss.png", lambda temporary: plot(self.records, temporary))
        if any("expert_load" in record for record in self.records):
            write_file(directory / "experts.png", lambda temporary: plot_experts(self.records, temporary))

    def close(self):
        if self.bar:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


def plot(records: list[dict], path: Path):
    """Loss and metrics, of training and validation, over the tokens seen."""
    from matplotlib.figure import Figure

    panels = {}  # the loss, and the stage's metrics: those whose names begin with the same word share a panel
    for name in dict.fromkeys(name.removeprefix("val_") for record in records for name in record):
        if name not in SHOWN and f"val_{name}" not in SHOWN:
            panels.setdefault(name.partition("_")[0], []).append(name)
    figure = Figure(figsize=(8, 1.5 + 3 * len(panels)), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(max(len(panels), 1), squeeze=False).flat, panels.items()):
        for name in names:
            for key, style in ((name, dict(lw=1, alpha=0.7)), (f"val_{name}", dict(lw=1.5, marker="o", ms=4))):
                points = [(record["tokens"] / 1e6, record[key]) for record in records if key in record]
                if points:
                    axes.plot(*zip(*points), label=key, **style)
        axes.set(xlabel="million tokens", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png", dpi=120)


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


def plot_experts(records: list[dict], path: Path):
    """Each layer's share of tokens by expert over the tokens seen; white is an even share, blue less, red more."""
    from matplotlib.figure import Figure

    records = [record for record in records if "expert_load" in record]
    loads = np.array([record["expert_load"] for record in records])  # (records, layers, E)
    n_layers, n_experts = loads.shape[1:]
    figure = Figure(figsize=(8, 0.6 + 1.4 * n_layers), layout="constrained")
    panels = figure.subplots(n_layers, sharex=True, squeeze=False)[:, 0]
    tokens = [0, *(record["tokens"] / 1e6 for record in records)]
    for i, axes in enumerate(panels):
        image = axes.pcolormesh(
            tokens, np.arange(n_experts + 1), loads[:, i].T * n_experts, cmap="RdBu_r", vmin=0, vmax=2
        )
        axes.set(ylabel=f"expert layer {i + 1}")
    axes.set(xlabel="million tokens")
    figure.colorbar(image, ax=panels, label="load of an expert / mean load", extend="max")
    figure.suptitle("share of tokens by expert, one panel for each layer with experts")
    figure.savefig(path, format="png", dpi=120)


class Meter:
    """Time, and what happened since the last line of the log."""

    def __init__(self, peak: float, done: float):
        self.peak = peak  # floating-point operations a second that all processes together could do
        self.done_at_start = done
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

    def record(self, progress, done: float, learning_rate: float, grad_norm: float, metrics: list[str]) -> dict:
        """A line of the log. Speed counts real tokens only; the peak is what plain matrix products reach."""
        window, self.window = self.window, Counter()
        seconds_left = (time.perf_counter() - self.started) * max(0, 1 - done) / max(done - self.done_at_start, 1e-9)
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": window["loss"] / window["tokens"],
            **{name: window[name] / window["tokens"] for name in metrics if name != "expert_load"},
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_s": window["real_tokens"] / window["step_seconds"],
            "share_of_peak": window["flops"] / window["step_seconds"] / self.peak,
            "real_share": window["real_tokens"] / window["row_tokens"],
            "minutes": progress.seconds / 60,
            "minutes_left": seconds_left / 60,
            **(describe_load(window["expert_load"]) if "expert_load" in metrics else {}),
        }
