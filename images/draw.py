"""Draws LLM-structure.png and LLM-structure-moe.png from real models, and rooms.png from the real imports, so that
nothing in them can be out of date.

python -m images.draw
"""

import argparse
import ast
import importlib
import pkgutil
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM, MoEFeedForward

ROOT = Path(__file__).parent.parent
ROOMS = "scripts demo server training engine corpus model base".split()  # each may import those behind it
ROOM_COLORS = dict(zip(ROOMS, "#d9d9d9 #fbb4ae #fddaec #fdd0a2 #decbe4 #ccebc5 #9ecae1 #ffffcc".split()))
WAY = {  # of a token: under each script, the stations, and what comes out of them
    "data_process.py: from files to tokens": (
        ("", "a file: jsonl, json, csv, parquet, txt, md"),
        ("corpus.files.read_records", "records, one at a time"),
        ("corpus.cleaning.clean", "its text, or Dropped"),
        ("corpus.kinds.tokenize_texts model.chat.encode_chat", "ids; of a chat also which are trained"),
        ("corpus.prepared.PreparedWriter.add", "train.bin: uint16 (tokens,)"),
    ),
    "1-pretrain.py …: from tokens to weights": (
        ("training.packing.PackedDataset.batch", "input_ids and labels (B, T)"),
        ("model.model.Decoder", "hidden states (B, T, H)"),
        ("training.loss.next_token_loss", "the sum of -ln p: a scalar"),
        ("training.loop.Run.update", "weights that are a step better"),
        ("training.state.Checkpointer.save", "out/pretrain: model.safetensors …"),
    ),
    "eval.py: from weights to words": (
        ("model.checkpoint.load_model", "a CausalLM"),
        ("engine.generation.generate", "a token for each prompt (B,)"),
        ("engine.generation.TextStream", "text, whole characters"),
    ),
}

WEIGHTS, PLAIN, DATA = "#9ecae1", "#fdd0a2", "#d9d9d9"  # boxes: with parameters, without any, and what flows
LINE = "#808080"  # can be seen on white and on black
WIDTH, HEIGHT = 4.8, 0.74  # of a box; boxes stand 1 apart
ARROW = dict(arrowstyle="->", color=LINE, shrinkA=0, shrinkB=0)


def column(axes: Axes, x: float, title: str, boxes: list[tuple[str, str]], skips: dict[int, int] | None = None):
    """Boxes (text, colour) from the bottom up, joined by arrows. skips: what goes into a box is added in another."""
    for i, (text, colour) in enumerate(boxes):
        axes.add_patch(Rectangle((x - WIDTH / 2, i), WIDTH, HEIGHT, facecolor=colour, edgecolor=LINE))
        axes.text(x, i + HEIGHT / 2, text, ha="center", va="center", fontsize=7.5, linespacing=1.1, color="black")
        if i:
            axes.annotate("", (x, i), (x, i - 1 + HEIGHT), arrowprops=ARROW)
    for start, end in (skips or {}).items():
        side, low, high = x - WIDTH / 2 - 0.35, start - 0.13, end + HEIGHT / 2
        axes.plot([x, side, side], [low, low, high], color=LINE, lw=1)
        axes.annotate("", (x - WIDTH / 2, high), (side, high), arrowprops=ARROW)
    axes.text(x, len(boxes) - 0.1, title, ha="center", va="bottom", fontsize=10, color=LINE, weight="bold")


def named(module: nn.Module, *names: str) -> str:
    """The names of linear layers, and the shape of their matrices."""
    parts = []
    for name in names:
        n_out, n_in = module.get_submodule(name).weight.shape
        parts.append(f"{name} {n_in} → {n_out}")
    return "\n".join(parts)


def feed_forward(mlp: nn.Module) -> list[tuple[str, str]]:
    return [
        (named(mlp, "gate_proj", "up_proj"), WEIGHTS),
        ("SwiGLU: silu(gate) · up", PLAIN),
        (named(mlp, "down_proj"), WEIGHTS),
    ]


def draw(config: LMConfig, name: str, path: Path):
    model = CausalLM(config)
    layer, n_layers, hidden = model.model.layers[-1], config.num_hidden_layers, config.hidden_size
    idle = model.num_idle_parameters()
    at_work = f",\n{(model.num_parameters() - idle) / 1e6:.1f} M at work on a token" if idle else ""
    tied = "\nthe matrix of embed_tokens" if config.tie_word_embeddings else ""
    leading = config.first_k_dense_replace if config.use_moe else 0
    kinds = f"{leading} dense, {n_layers - leading} with experts" if leading else f"all alike, {hidden} wide"
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()

    column(
        axes,
        0,
        f"{name}: {model.num_parameters() / 1e6:.1f} M parameters{at_work}",
        [
            ("token ids (B, T)", DATA),
            (f"embed_tokens {config.vocab_size} → {hidden}", WEIGHTS),
            (f"{n_layers} decoder layers\n{kinds}", WEIGHTS),
            ("norm: RMSNorm", WEIGHTS),
            (f"lm_head {hidden} → {config.vocab_size}{tied}", WEIGHTS),
            (f"logits (B, T, {config.vocab_size})", DATA),
        ],
    )
    column(
        axes,
        6,
        "a decoder layer",
        [
            (f"x (B, T, {hidden})", DATA),
            ("input_layernorm: RMSNorm", WEIGHTS),
            (f"self_attn: {config.num_attention_heads} query heads", WEIGHTS),
            ("+", PLAIN),
            ("post_attention_layernorm: RMSNorm", WEIGHTS),
            (f"mlp: {'mixture of experts' if layer.has_experts else 'SwiGLU'}", WEIGHTS),
            ("+", PLAIN),
            (f"x (B, T, {hidden})", DATA),
        ],
        skips={1: 3, 4: 6},
    )
    attention = layer.self_attn
    norms = "q_norm, k_norm: RMSNorm of a head; " if config.qk_norm else ""
    column(
        axes,
        12,
        "self_attn",
        [
            (named(attention, "q_proj", "k_proj") + "\n" + named(attention, "v_proj"), WEIGHTS),
            (f"{norms}RoPE\nθ = {config.rope_theta:,.0f}", WEIGHTS if config.qk_norm else PLAIN),
            (f"softmax(q kᵀ / √{config.head_dim}) v, causal, in its document", PLAIN),
            (named(attention, "o_proj"), WEIGHTS),
        ],
    )
    if isinstance(layer.mlp, MoEFeedForward):
        n, k, scores = config.n_routed_experts, config.num_experts_per_tok, config.scoring_func
        column(
            axes,
            18,
            "mlp",
            [
                (f"gate: router {hidden} → {n}, {scores}, the {k} best", WEIGHTS),
                (f"{k} of {n} experts, weighted, each:", PLAIN),
                *feed_forward(layer.mlp.experts[0]),
            ]
            + (
                [(f"+ shared_experts of {layer.mlp.shared_experts.down_proj.in_features}, for all tokens", WEIGHTS)]
                if layer.mlp.shared_experts
                else []
            ),
        )
    else:
        column(axes, 18, "mlp", feed_forward(layer.mlp))
    axes.set(xlim=(-2.9, 20.6), ylim=(-0.1, 8.4), aspect="equal")
    axes.axis("off")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def imported_names(path: Path) -> Iterator[str]:
    """The modules that a file's import statements name, each as often as it is named."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def count_imports() -> Counter[tuple[str, str]]:
    """How many import statements of one room's files name another room: (importer, imported) -> number."""
    counts, scripts = Counter(), {path.stem for path in ROOT.glob("*.py")}
    for room in ROOMS:
        for path in ROOT.glob("*.py" if room == "scripts" else f"{room}/*.py"):
            for name in imported_names(path):
                other = name.partition(".")[0]
                other = "scripts" if other in scripts else other
                if other in ROOMS and other != room:
                    counts[room, other] += 1
    return counts


def draw_imports(axes: Axes):
    """Rooms on a diagonal: a line to the right and down for each import, with the number of statements at its bend."""
    places = {room: (2.45 * i, i) for i, room in enumerate(ROOMS)}
    for (importer, imported), number in count_imports().items():
        (x, y), (corner, end) = places[importer], places[imported]
        side = 1 if corner > x else -1
        axes.plot([x + side * WIDTH / 2, corner], [y, y], color=LINE, lw=1)
        axes.annotate("", (corner, end - side * HEIGHT / 2), (corner, y), arrowprops=ARROW)
        circle = dict(boxstyle="circle,pad=0.25", facecolor=ROOM_COLORS[imported], edgecolor=LINE)
        axes.text(corner, y, f"{number}", ha="center", va="center", fontsize=7.5, color="black", bbox=circle)
    for room, (x, y) in places.items():
        names = sorted(path.stem for path in ROOT.glob("*.py"))
        stages = [name for name in names if name[0].isdigit()]
        scripts = f"{stages[0]} to {stages[-1]} {' '.join(names[len(stages) :])}"
        sentence = scripts if room == "scripts" else importlib.import_module(room).__doc__
        text = "\n".join(textwrap.wrap(f"{room}: {re.split(': |[.] ', sentence)[0]}", 34))
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        axes.add_patch(Rectangle(corner, WIDTH, HEIGHT, facecolor=ROOM_COLORS[room], edgecolor=LINE))
        axes.text(x, y, text, ha="center", va="center", fontsize=7.5, linespacing=1.1, color="black")
    words = "who imports whom: from the importer to the right,\nthen down; at the bend, how many imports"
    axes.text(-WIDTH / 2, 5.6, words, fontsize=9, color=LINE, weight="bold", linespacing=1.4)
    axes.set(xlim=(-2.8, 19.7), ylim=(7.4, -0.6), aspect="equal")
    axes.axis("off")


def draw_way(axes: Axes):
    """A column for each script, from the top down, and how one leads to the next."""
    last = 0  # box of the column before
    for i, (title, stations) in enumerate(WAY.items()):
        x, boxes = 7 * i, []
        for names, result in stations:
            for name in names.split():
                pkgutil.resolve_name(name)  # AttributeError where there is no such function any more
            text = names.replace(" ", " or\n") + f"\n{result}"
            boxes.append((text.strip(), ROOM_COLORS[names.partition(".")[0] or "scripts"]))
        column(axes, x, "", boxes)
        axes.text(x, -0.3, title, ha="center", fontsize=9, color=LINE, weight="bold")
        if i:
            bottom, top, middle = last + HEIGHT / 2, HEIGHT / 2, x - 3.5
            axes.plot([x - 7 + WIDTH / 2, middle, middle], [bottom, bottom, top], color=LINE, lw=1)
            axes.annotate("", (x - WIDTH / 2, top), (middle, top), arrowprops=ARROW)
        last = len(boxes) - 1
    axes.set(xlim=(-2.8, 19), ylim=(4.9, -0.9), aspect="equal")
    axes.axis("off")


def draw_rooms(path: Path):
    figure = Figure(figsize=(12, 7.85), layout="constrained")
    figure.patch.set_alpha(0)
    imports, way = figure.subplots(2, 1, height_ratios=(8, 5.8))
    draw_imports(imports)
    draw_way(way)
    figure.savefig(path, dpi=140, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="a dense size; its -moe form is drawn too")
    parser.add_argument("--output", type=Path, default=Path("images"), help="folder")
    args = parser.parse_args()
    with torch.device("meta"):  # shapes without numbers
        for preset, name in ((args.preset, "LLM-structure.png"), (f"{args.preset}-moe", "LLM-structure-moe.png")):
            draw(LMConfig(**PRESETS[preset]), preset, args.output / name)
    draw_rooms(args.output / "rooms.png")


if __name__ == "__main__":
    main()
