"""Draws the structure of the model and of this project, in Chinese and English: LLM-structure.png and
LLM-structure-moe.png from real models, packages.png from the real imports, token-path.png from functions that exist,
loss-annotated.png from the table of docs/loss.md.

    python -m images.draw

Chinese takes a font with its characters (Debian and Ubuntu: apt install fonts-noto-cjk); without one, only the English
pictures (NAME_en.png) are drawn.
"""

import argparse
import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from demo.picture import chinese_font
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM

ROOT = Path(__file__).parent.parent
PLACES = {  # package -> column (left, right, or None for both), row from the top; imports go down
    "scripts": (None, 0),
    "demo": (0, 1),
    "server": (1, 1),
    "training": (0, 2),
    "corpus": (0, 3),
    "engine": (1, 3),
    "model": (None, 4),
    "base": (None, 5),
}
ABOUT = {  # package -> what it is for; every text here is "Chinese|English"
    "scripts": "每个阶段一个脚本，以及数据、对话、服务、导出|one per stage; data, chat, serving, export",
    "demo": "quickstart.py 的演示|the demo of quickstart.py",
    "server": "OpenAI 接口，网页|OpenAI API, web pages",
    "training": "序列打包、损失、优化器、断点续训|packing, losses, optimizer, resuming",
    "engine": "推理：KV 缓存、采样、评测|inference: KV cache, sampling, evaluation",
    "corpus": "数据：读取、清洗、去重、分词|data: reading, cleaning, tokenizing",
    "model": "网络结构、对话格式、LoRA、检查点|the network, chat format, LoRA, checkpoints",
    "base": "原子写文件、命令行、报错（只用标准库）|atomic files, command line, errors (standard library only)",
}
PATH_OF_A_TOKEN = {  # script -> what it reads, then (function, what it returns)
    "data_process.py": (
        "文件：jsonl、csv、txt …|files: jsonl, csv, txt, …",
        ("corpus.files.read_records", "逐条记录|records, one at a time"),
        ("corpus.cleaning.clean", "清洗后的文本|cleaned text"),
        ("corpus.kinds.tokenize_texts", "token id|token ids"),
        ("corpus.prepared.PreparedWriter.add", "dataset/pretrain/train.bin"),
    ),
    "1-pretrain.py": (
        "dataset/pretrain",
        ("training.packing.PackedDataset.batch", "input_ids, labels (B, T)"),
        ("model.model.Decoder.forward", "隐藏状态 (B, T, H)|hidden states (B, T, H)"),
        ("training.loss.next_token_loss", "−ln p 之和|sum of −ln p"),
        ("training.loop.Run.update", "更新后的权重|updated weights"),
        ("training.state.Checkpointer.save", "out/pretrain/model.safetensors"),
    ),
    "eval.py": (
        "out/pretrain",
        ("model.checkpoint.load_model", "模型|the model"),
        ("engine.generation.generate", "每个提示一个 token|one token per prompt"),
        ("engine.generation.TextStream.put", "完整的字符|whole characters"),
    ),
}

LOSS_NOTES = (  # (step, loss) of a point, (step, loss) of its text, the text
    (
        (0, 8.80),
        (60, 8.75),
        "① 第 0 步：8.80 ≈ ln 6400，模型一无所知|① step 0: 8.80 ≈ ln 6400, no knowledge yet",
    ),
    (
        (20, 7.35),
        (150, 7.55),
        "② 约 15 步：学会哪些 token 常见（7.52）|② ~15 steps: which tokens are common (7.52)",
    ),
    ((200, 5.81), (290, 6.35), "③ 200 步：学会哪些 token 常相邻|③ 200 steps: which tokens follow which"),
    ((800, 4.99), (620, 5.75), "④ 缓降：每 200 步的收获递减|④ the slow part: each 200 steps gain less"),
    ((1400, 4.563), (700, 4.25), "⑤ 验证损失与训练损失接近：没有过拟合|⑤ validation close to training: no overfitting"),
)

WEIGHTS, PLAIN, DATA, PICKED = "#9ecae1", "#fdd0a2", "#e6e6e6", "#fb9a7a"  # parameters, none, data, chosen experts
COLORS = dict(zip(ABOUT, "#d9d9d9 #fbb4ae #fddaec #fdd0a2 #decbe4 #ccebc5 #9ecae1 #ffffcc".split()))
STREAM, LINE = "#d95f02", "#606060"


class Canvas:
    """An empty figure, `width` x `height` in units of a tenth of an inch, with boxes and arrows; y points up."""

    def __init__(self, width: float, height: float, language: str):
        self.figure = Figure(figsize=(width / 10, height / 10))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")
        self.language = language

    def words(self, text: str) -> str:
        return text.split("|")[0 if self.language == "zh" else -1]

    def text(self, x: float, y: float, text: str, size: float = 10, **style):
        self.axes.text(x, y, self.words(text), fontsize=size, **dict(ha="center", va="center") | style)

    def box(self, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 10):
        """Centred at (x, y)."""
        corner = (x - width / 2, y - height / 2)
        shape = dict(boxstyle="round,pad=0,rounding_size=0.6", facecolor=color, edgecolor=LINE, linewidth=0.8)
        self.axes.add_patch(FancyBboxPatch(corner, width, height, **shape))
        self.text(x, y, text, size, linespacing=1.25)

    def arrow(self, *points: tuple[float, float], color: str = LINE, width: float = 1.2):
        """A line through the points, with a head at the last."""
        self.axes.plot(*zip(*points), color=color, lw=width, solid_capstyle="round")
        head = dict(arrowstyle="-|>", color=color, lw=width, shrinkA=0, shrinkB=0)
        self.axes.annotate("", points[-1], points[-2], arrowprops=head)

    def save(self, path: Path):
        self.figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})


def draw_stack(canvas: Canvas, model: CausalLM, name: str):
    """The whole model, from token ids at the bottom to logits at the top."""
    config = model.config
    V, H, L, dense = config.vocab_size, config.hidden_size, config.num_hidden_layers, config.first_k_dense_replace
    layers = f"{L} 个解码层|{L} decoder layers"
    if config.use_moe:
        layers = (
            f"{dense} 个稠密解码层\n{L - dense} 个 MoE 解码层|{dense} dense decoder layer(s)\n{L - dense} MoE layers"
        )
    head = f"lm_head: {H} → {V}"
    if config.tie_word_embeddings:
        head = f"{head}\n与 embed_tokens 共享权重|{head}\ntied to embed_tokens"
    boxes = (
        ("token id (B, T)|token ids (B, T)", DATA),
        (f"embed_tokens\n{V} → {H}", WEIGHTS),
        (layers, WEIGHTS),
        ("norm: RMSNorm", WEIGHTS),
        (head, WEIGHTS),
        (f"logits (B, T, {V})", DATA),
    )
    active = model.num_parameters() - model.num_idle_parameters()
    title = f"{name}: {model.num_parameters() / 1e6:.1f} M"
    if active < model.num_parameters():
        title += f"\n每个 token 激活 {active / 1e6:.1f} M|{title}\nactive per token {active / 1e6:.1f} M"
    canvas.text(12, 74, title, 11.5, weight="bold", linespacing=1.3)
    for i, (text, color) in enumerate(boxes):
        y = 11 + 11 * i
        canvas.box(12, y, 20, 6.5, text, color)
        if i:
            canvas.arrow((12, y - 7.7), (12, y - 3.3), color=STREAM, width=2)


def draw_layer(canvas: Canvas, config: LMConfig):
    """A decoder layer: the residual stream goes straight up, two branches read it and add to it."""
    x, branch = 29, 42
    canvas.text(38, 74, "一个解码层|one decoder layer", 11.5, weight="bold")
    canvas.text(x, 6.2, f"x (B, T, {config.hidden_size})")
    canvas.text(x - 2, 24, "残差流|residual stream", 10, rotation=90, color=STREAM)
    canvas.arrow((x, 8), (x, 70), color=STREAM, width=3)
    feed_forward = "专家混合（MoE）|mixture of experts" if config.use_moe else "SwiGLU"
    for y, norm, module in (
        (12, "input_layernorm", "self_attn\n注意力|self_attn\nattention"),
        (42, "post_attention_layernorm", f"mlp\n{feed_forward.split('|')[0]}|mlp\n{feed_forward.split('|')[-1]}"),
    ):
        canvas.arrow((x, y), (branch, y), (branch, y + 2))
        canvas.box(branch, y + 5, 20, 6, f"{norm}\nRMSNorm", WEIGHTS)
        canvas.arrow((branch, y + 8), (branch, y + 11))
        canvas.box(branch, y + 14.5, 20, 7, module, WEIGHTS)
        canvas.arrow((branch, y + 18), (branch, y + 22), (x + 1.6, y + 22))
        canvas.box(x, y + 22, 3.2, 3.2, "+", PLAIN, 13)


def draw_attention(canvas: Canvas, config: LMConfig):
    """Each group of query heads reads one key-value head."""
    N, K, D, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
    left, right = 57, 98
    middle = (left + right) / 2
    canvas.text(middle, 74, "self_attn：分组查询注意力（GQA）|self_attn: grouped-query attention", 11.5, weight="bold")
    step = (right - left) / N
    for head in range(N):
        x = left + step * (head + 0.5)
        group = left + (right - left) / K * (head // (N // K) + 0.5)
        canvas.axes.plot([x, group], [65, 58.9], color=LINE, lw=0.8)
        canvas.box(x, 66.5, step - 0.8, 3.4, f"q{head}", WEIGHTS, 9)
    for head in range(K):
        x = left + (right - left) / K * (head + 0.5)
        canvas.box(x, 57, min(14, (right - left) / K - 1), 3.8, f"k{head}  v{head}", WEIGHTS)
    norm = "q_norm, k_norm, RoPE" if config.qk_norm else "RoPE"
    for y, text in (
        (52.5, f"q_proj: {H} → {N} × {D}      k_proj, v_proj: {H} → {K} × {D}"),
        (49, f"{norm}, softmax(q·kᵀ / √{D})·v"),
        (45.5, f"o_proj: {N} × {D} → {H}"),
        (42, "因果：只看同一文档中自己和之前的 token|causal: a token sees itself and earlier ones of its document"),
    ):
        canvas.text(middle, y, text, 9.5)


def draw_swiglu(canvas: Canvas, x: float, y: float, H: int, inner: int):
    """down(silu(gate(x)) * up(x)), from left to right."""
    canvas.text(x - 19.5, y, "x")
    for dy, name in ((3.6, "gate_proj"), (-3.6, "up_proj")):
        canvas.arrow((x - 18.5, y), (x - 16, y + dy))
        canvas.box(x - 10, y + dy, 12, 5.6, f"{name}\n{H} → {inner}", WEIGHTS, 9)
        canvas.arrow((x - 4, y + dy), (x - 1.2, y + dy / 4))
    canvas.box(x + 2.2, y, 6.8, 4.6, "silu(g)·u", PLAIN, 9)
    canvas.arrow((x + 5.6, y), (x + 8, y))
    canvas.box(x + 14, y, 12, 5.6, f"down_proj\n{inner} → {H}", WEIGHTS, 9)


def draw_experts(canvas: Canvas, config: LMConfig):
    """The router and its experts, of which the coloured ones compute this token."""
    n, k, H = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size
    canvas.text(77.5, 36.5, "mlp：专家混合（MoE）|mlp: mixture of experts", 11.5, weight="bold")
    canvas.box(69, 31, 24, 4.4, f"gate: {H} → {n}, {config.scoring_func}, top-{k}", WEIGHTS, 9.5)
    chosen = {n * (2 * i + 1) // (2 * k) for i in range(k)}  # any k would do
    for expert in range(n):
        x = 56 + 26 / n * (expert + 0.5)
        canvas.box(x, 23.5, 26 / n - 0.4, 3.6, "", PICKED if expert in chosen else WEIGHTS)
        if expert in chosen:
            canvas.arrow((69, 28.8), (x, 25.4))
    canvas.text(69, 19.8, f"{n} 个路由专家，每个 token 用 {k} 个|{n} routed experts, {k} per token", 9.5)
    if config.n_shared_experts:
        canvas.box(91, 23.5, 12, 3.6, "", PICKED)
        canvas.text(91, 19.8, "共享专家：所有 token|shared: every token", 9.5)
    canvas.text(77.5, 15.8, "每个专家是一个 SwiGLU，输出加权求和：|each expert is a SwiGLU; outputs are summed:", 9.5)
    draw_swiglu(canvas, 77.5, 8, H, config.moe_intermediate_size)


def draw_structure(preset: str, language: str, path: Path):
    with torch.device("meta"):  # shapes without numbers
        model = CausalLM(LMConfig(**PRESETS[preset]))
    canvas = Canvas(100, 78, language)
    draw_stack(canvas, model, preset)
    draw_layer(canvas, model.config)
    draw_attention(canvas, model.config)
    if model.config.use_moe:
        draw_experts(canvas, model.config)
    else:
        canvas.text(77.5, 33, "mlp: SwiGLU", 11.5, weight="bold")
        draw_swiglu(canvas, 77.5, 21, model.config.hidden_size, model.config.intermediate_size)
    for x, color, text in (
        (4, WEIGHTS, "有参数|has parameters"),
        (19, PLAIN, "无参数|no parameters"),
        (34, DATA, "数据|data"),
    ):
        canvas.box(x, 2, 2.4, 1.8, "", color)
        canvas.text(x + 2, 2, text, 9, ha="left")
    canvas.save(path)


def imported_packages(package: str) -> Iterator[str]:
    """The project's packages that the files of one (or the scripts) import, with repetitions."""
    for path in ROOT.glob("*.py" if package == "scripts" else f"{package}/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                yield (node.module or "").partition(".")[0]
            elif isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)


def draw_packages(language: str, path: Path):
    """An arrow means "imports", directly or through the packages on the way."""
    canvas = Canvas(100, 66, language)
    place = {name: (50 if side is None else 27 + 46 * side, 60 - 10.8 * row) for name, (side, row) in PLACES.items()}
    below = {package: set(imported_packages(package)) & place.keys() - {package} for package in place}
    for package, (x, y) in place.items():
        for other in below[package] - {far for near in below[package] for far in below[near]}:
            x_other, y_other = place[other]
            canvas.arrow((x + 0.4 * (x_other - x), y - 3), (x_other, y_other + 3.1))
    for package, (x, y) in place.items():
        canvas.box(x, y, 66 if x == 50 else 43, 6, "", COLORS[package])
        canvas.text(x, y + 1.3, package + ("" if package == "scripts" else "/"), 11.5, weight="bold")
        canvas.text(x, y - 1.4, ABOUT[package], 9.5)
    canvas.save(path)


def draw_token_path(language: str, path: Path):
    """A column for each script, from the top down. AttributeError where a function that it names does not exist."""
    canvas = Canvas(100, 56, language)
    for i, (script, (source, *stations)) in enumerate(PATH_OF_A_TOKEN.items()):
        x = 17 + 33 * i
        canvas.text(x, 53.5, script, 12, weight="bold")
        canvas.text(x, 50.6, source, 9.5, color=LINE)
        for j, (function, result) in enumerate(stations):
            pkgutil.resolve_name(function)
            package, _, name = function.partition(".")
            y = 45 - 9.6 * j
            canvas.box(x, y, 30, 6.8, "", COLORS[package])
            canvas.text(x, y + 1.5, name, 10.5, weight="bold")
            canvas.text(x, y - 1.6, result, 9.5)
            canvas.arrow((x, y + 6.2 if j else y + 4.6), (x, y + 3.5))
    canvas.save(path)


def draw_loss(language: str, path: Path):
    """The losses of `mini` in docs/loss.md, with notes."""
    table = next(part for part in (ROOT / "docs/loss.md").read_text("utf-8").split("\n\n") if "| 1,436 |" in part)
    rows = re.findall(r"^\| ([\d,]+) \| [^|]+ \| ([\d.]*) ?\| ([\d.]*)", table, re.MULTILINE)
    canvas = Canvas(100, 56, language)
    axes = canvas.figure.add_axes((0.08, 0.1, 0.9, 0.87), xlim=(-20, 1460), ylim=(4, 9.1))
    axes.set(xlabel=canvas.words("步|step"), ylabel=canvas.words("损失（−ln p）|loss (−ln p)"))
    for column, name in ((1, "训练|training"), (2, "验证|validation")):
        points = [(int(row[0].replace(",", "")), float(row[column])) for row in rows if row[column]]
        axes.plot(*zip(*points), marker=".", label=canvas.words(name))
    for point, place, text in LOSS_NOTES:
        axes.annotate(canvas.words(text), point, place, va="center", arrowprops=dict(arrowstyle="->", color=LINE))
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.85))
    canvas.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="a dense size; its -moe form is drawn too")
    parser.add_argument("--output", type=Path, default=Path("images"), help="folder")
    args = parser.parse_args()
    fonts = {"en": "DejaVu Sans", "zh": chinese_font()}
    for language, font in fonts.items():
        if font is None:
            print("no font with Chinese characters: only the English pictures are drawn")
            continue
        suffix = "_en.png" if language == "en" else ".png"
        with rc_context({"font.family": [font, "DejaVu Sans"]}):
            draw_structure(args.preset, language, args.output / f"LLM-structure{suffix}")
            draw_structure(f"{args.preset}-moe", language, args.output / f"LLM-structure-moe{suffix}")
            draw_packages(language, args.output / f"packages{suffix}")
            draw_token_path(language, args.output / f"token-path{suffix}")
            draw_loss(language, args.output / f"loss-annotated{suffix}")


if __name__ == "__main__":
    main()
