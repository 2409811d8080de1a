"""The demonstration as a picture that needs no explanation: what each stage learns, and what the model can do after it.

The words are English, or Chinese where this machine has a font for them.
"""

import contextlib
from pathlib import Path

FONTS = (  # with Chinese characters, as Linux, Windows and macOS bring them; a .ttc may show its Japanese face alone
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "Noto Sans CJK JP"),
    *("Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("SimHei", "Arial Unicode MS", "Droid Sans Fallback"),
)
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")  # of the stages
WORDS = {  # stages: name -> the short name, and its idea; questions: figure of a probe -> what it counts
    "en": {
        "learn": "What is learned: the loss falls as the guesses get better (in 4: as the preference gets clearer)",
        "steps": "steps",
        "loss": "loss in training",
        "stages": {
            "pretrain": ("1 pretraining", "random weights learn\nto continue a text"),
            "sft": ("2 fine-tuning", "the model of 1 learns\nto answer questions"),
            "lora": ("3 LoRA", "a small addition to the model of 2\ngives it another name"),
            "dpo": ("4 DPO", "the model of 2 learns to prefer\nthe brief of two correct answers"),
        },
        "ask": "What it can do then: asked the same questions after every stage, in words not seen in training, it …",
        "nothing": "not asked",
        "questions": {
            "right": "answers correctly",
            "old_name": "says its name is Jiezi",
            "new_name": "says its name is Mingyue",
            "brief": "answers briefly",
            "preference": "prefers the brief of a pair\n(50%: a coin toss)",
        },
    },
    "zh": {
        "learn": "学到了什么：猜得越准，损失越低（第 4 步：偏爱得越分明，损失越低）",
        "steps": "步",
        "loss": "训练损失",
        "stages": {
            "pretrain": ("1 预训练", "随机的权重\n学会把文章续写下去"),
            "sft": ("2 微调", "1 的模型\n学会回答问题"),
            "lora": ("3 LoRA", "2 的模型不动，旁边加一点权重\n给它换个名字"),
            "dpo": ("4 DPO", "2 的模型学会\n在两个对的答案里偏爱简短的"),
        },
        "ask": "学完会什么：每个阶段之后问同样的题，训练时没见过这样的问法",
        "nothing": "没有问",
        "questions": {
            "right": "答得对",
            "old_name": "说自己叫“芥子”",
            "new_name": "说自己叫“明月”",
            "brief": "答得简短",
            "preference": "两个答案里偏爱简短的\n（50%：等于抛硬币）",
        },
    },
}


def chinese_font() -> str | None:
    """The name of a font with Chinese characters that this machine has."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    for path in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:  # newer than matplotlib's list
        with contextlib.suppress(RuntimeError, OSError):  # a file that it cannot read
            fontManager.addfont(path)
    names = {font.name for font in fontManager.ttflist}
    return next((name for name in FONTS if name in names), None)


def plot(results: dict[str, dict], curves: dict[str, list[tuple[float, float]]], language: str, path: Path):
    """results: by stage, the shares that WORDS names; curves: by stage, its steps and losses. Both in order.

    Language "zh" becomes "en" where no font has Chinese characters.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    font = chinese_font() if language == "zh" else None
    words = WORDS["zh" if font else "en"]
    names, ideas = zip(*(words["stages"][stage] for stage in results))
    style = {"font.family": [font, "DejaVu Sans"] if font else ["DejaVu Sans"]}
    with rc_context(style | {"axes.spines.right": False, "axes.spines.top": False}):
        figure = Figure(figsize=(12, 6.6), layout="constrained")
        learn, ask = figure.subfigures(2, 1, height_ratios=(1.25, 1), hspace=0.04)
        learn.suptitle(words["learn"], weight="bold")
        ask.suptitle(words["ask"], weight="bold")

        panels = learn.subplots(1, len(results), sharey=True)
        for axes, stage, name, idea, color in zip(panels, results, names, ideas, COLORS):
            steps, losses = zip(*curves[stage])
            axes.plot(steps, losses, color=color, lw=2, marker="o", markevery=[0, -1])
            for i, side in ((0, "left"), (-1, "right")):
                point = (steps[i], losses[i])
                axes.annotate(f"{losses[i]:.2g}", point, (0, 8), textcoords="offset points", ha=side, color=color)
            axes.set_title(name, color=color, weight="bold", fontsize=13, pad=36)
            axes.text(0.5, 1.03, idea, transform=axes.transAxes, ha="center", va="bottom", linespacing=1.3)
            axes.set(xlabel=words["steps"], xlim=(0, 1.1 * steps[-1]), yscale="log")
            axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(axis="y", alpha=0.3)
        all_losses = [loss for points in curves.values() for _, loss in points]
        ticks = [digit * 10.0**power for power in range(-3, 2) for digit in (1, 2, 5)]
        panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[0].minorticks_off()
        panels[0].set(ylabel=words["loss"], ylim=(min(all_losses) / 1.6, max(all_losses) * 2))

        panels = ask.subplots(1, len(words["questions"]), sharey=True)
        for axes, (figure_name, title) in zip(panels, words["questions"].items()):
            shares = [result.get(figure_name) for result in results.values()]
            bars = axes.barh(names, [share or 0 for share in shares], color=COLORS, height=0.65)
            axes.bar_label(bars, [words["nothing"] if share is None else f"{share:.0%}" for share in shares], padding=4)
            axes.set_title(title, fontsize=11, linespacing=1.3, va="center", pad=17)
            axes.set(xlim=(0, 1.3), xticks=[])
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(left=False)
        panels[0].invert_yaxis()
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
