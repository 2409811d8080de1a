"""Figures of documents: lengths, tokens, scripts; as numbers for meta.json, in the terminal and as a picture."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from corpus.kinds import Document

# Where a run of code points begins, and whose letters they are: coarse, but honest. Latin is not English.
BLOCKS = [
    (0x00, "other"), (0x41, "Latin"), (0x5B, "other"), (0x61, "Latin"), (0x7B, "other"), (0xC0, "Latin"),
    (0x250, "other"), (0x370, "Greek"), (0x400, "Cyrillic"), (0x530, "other"), (0x600, "Arabic"), (0x780, "other"),
    (0x1E00, "Latin"), (0x1F00, "other"), (0x3040, "Kana"), (0x3100, "other"), (0x3400, "Han"), (0xA000, "other"),
    (0xAC00, "Hangul"), (0xD7B0, "other"), (0xF900, "Han"), (0xFB00, "other"), (0x20000, "Han"), (0x323B0, "other"),
]  # fmt: skip
SCRIPTS = sorted({script for _, script in BLOCKS})
STARTS = np.array([start for start, _ in BLOCKS])
SCRIPT_IDS = np.array([SCRIPTS.index(script) for _, script in BLOCKS])
EVERY, HEAD = 16, 4096  # scripts are counted in every 16th document, in its first characters
LENGTHS = ("characters", "tokens")


def measure(documents: list[Document], token_size: int) -> np.ndarray:
    """One row per document: characters, tokens (of `token_size` bytes), characters by script; int64 (N, 2 + S)."""
    table = np.zeros((len(documents), len(LENGTHS) + len(SCRIPTS)), np.int64)
    for i, document in enumerate(documents):
        tokens = sum(len(ids) for ids, mask in document.parts) // token_size if token_size else 0
        table[i, : len(LENGTHS)] = len(document.text), tokens
        if i % EVERY == 0:
            codes = np.frombuffer(document.text[:HEAD].encode("utf-32-le"), "<u4")
            ids = SCRIPT_IDS[np.searchsorted(STARTS, codes, "right") - 1]
            table[i, len(LENGTHS) :] = np.bincount(ids, minlength=len(SCRIPTS))
    return table


class Figures:
    """Sums over the documents that were kept, and how many are of which length: from 2^(i-1) on, below 2^i."""

    def __init__(self):
        self.histograms = np.zeros((len(LENGTHS), 40), np.int64)
        self.sums = np.zeros(len(LENGTHS) + len(SCRIPTS), np.int64)
        self.documents = 0

    def add(self, table: np.ndarray):
        """Rows of measure()."""
        self.documents += len(table)
        self.sums += table.sum(0)
        for histogram, lengths in zip(self.histograms, table.T):
            histogram += np.bincount(np.frexp(lengths)[1], minlength=len(histogram))

    def as_dict(self) -> dict:
        """Means, histograms ({"from": count}) and the fractions of scripts in a sample."""
        scripts = dict(zip(SCRIPTS, self.sums[len(LENGTHS) :].tolist()))
        characters = max(sum(scripts.values()), 1)
        fractions = {script: round(count / characters, 4) for script, count in scripts.items() if count}
        figures = {"documents": self.documents, "scripts": dict(sorted(fractions.items(), key=lambda pair: -pair[1]))}
        for name, total, histogram in zip(LENGTHS, self.sums.tolist(), self.histograms):
            if total:
                counts = {2**i >> 1: count for i, count in enumerate(histogram.tolist()) if count}
                figures[name] = {"sum": total, "mean": round(total / self.documents, 1), "from": counts}
        return figures


def lines_of(figures: dict) -> list[str]:
    """The lines for a terminal of Figures.as_dict()."""
    fractions = ", ".join(f"{script} {fraction:.0%}" for script, fraction in figures["scripts"].items())
    lines = [f"scripts: {fractions} (one document of {EVERY}; Latin covers every language written in it)"]
    for name in filter(figures.get, LENGTHS):
        lines.append(f"{name} per document: {figures[name]['mean']:,.1f} on average")
        counts = figures[name]["from"]
        most = max(counts.values())
        for start, count in counts.items():
            bar = "#" * round(40 * count / most) or "."
            lines.append(f"  {start:>9,} to {max(2 * start - 1, 0):<11,} {count:>9,} {bar}")
    return lines


def draw(figures: dict, path: Path):
    """The histograms, side by side, and the fractions of scripts."""
    from matplotlib.figure import Figure

    names: Iterable[str] = [name for name in LENGTHS if name in figures]
    figure = Figure(figsize=(4 * (len(names) + 1), 3), layout="constrained")
    *panels, last = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    for axes, name in zip(panels, names):
        starts, counts = zip(*figures[name]["from"].items())
        axes.bar([f"{start:,}" for start in starts], counts)
        axes.set(xlabel=f"{name} per document, from", ylabel="documents")
        axes.tick_params(axis="x", rotation=90)
    last.barh(list(figures["scripts"]), list(figures["scripts"].values()))
    last.invert_yaxis()
    last.set(xlabel="fraction of characters", xlim=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
