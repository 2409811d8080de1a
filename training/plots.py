"""Pictures of a run: its loss and metrics, and the loads of its experts."""

from pathlib import Path

import numpy as np

# What a record has beside the loss and the stage's metrics, and is not drawn: how the log prints it.
SHOWN = {
    "step": "step {}",
    "tokens": "{:,} tokens",
    "val_bits_per_byte": "{:.3f} bits/byte",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "norm {:.2f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "mfu": "{:.0%} of peak",
    "real_fraction": "{:.0%} real",
    "minutes": "after {}",
    "minutes_left": "{} left",
    "load_max": "busiest expert {:.2f} x",
    "load_entropy": "entropy {:.3f}",
    "idle_experts": "{} idle",
    "expert_load": None,  # too long
    "sample": None,  # on a line of its own
}


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
                points = [
                    (record["tokens"] / 1e6, record[key]) for record in records if key in record and "tokens" in record
                ]
                if points:
                    axes.plot(*zip(*points), label=key, **style)
        axes.set(xlabel="million tokens", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png", dpi=120)


def plot_experts(records: list[dict], path: Path):
    """Each layer's fraction of tokens by expert over the tokens seen; white is an even load, blue less, red more."""
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
    figure.suptitle("fraction of tokens by expert, one panel for each layer with experts")
    figure.savefig(path, format="png", dpi=120)
