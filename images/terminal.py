"""Draws terminal.png: what the demonstration's model answers, as it stands in a terminal.

    python quickstart.py --no-chat
    python -m images.terminal

The commands are run, and the picture holds what they printed. To draw it takes a font with Chinese characters (on
Debian and Ubuntu: apt install fonts-noto-cjk); to look at it takes none.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from unicodedata import east_asian_width

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from base.cli import UserError, run
from demo.picture import FONTS, chinese_font

ROOT = Path(__file__).parent.parent
QUESTIONS = "你是谁？|What is 17 plus 8?|把 8 3 6 从小到大排列。|诸葛亮字什么？|What is the capital of France?"
TITLE, COLUMNS, SIZE = "Jiezi 芥子", 104, 11  # of the letters, in points
CELL, LINE = 0.602 * SIZE, 1.5 * SIZE  # of DejaVu Sans Mono, which comes with matplotlib; a Chinese character takes two
WINDOW, BAR, PROMPT, COMMAND, OUTPUT = "#1e222a", "#2c313c", "#98c379", "#ffffff", "#c5c8c6"
BUTTONS = "#ff5f57 #febc2e #28c840".split()


def record(commands: list[list[str]]) -> str:
    """Runs each command, in the project's folder; returns them with what they printed."""
    lines = []
    for command in commands:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        lines += [f"$ python {shlex.join(command)}", done.stdout.decode().strip()]
    return "\n".join(lines)


def cells(text: str) -> int:
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def wrap(line: str) -> list[str]:
    rows = [""]
    for character in line:
        if cells(rows[-1] + character) > COLUMNS:
            rows.append("")
        rows[-1] += character
    return rows


def draw(text: str, path: Path):
    """A window with the text in it; lines that begin with "$ " are commands. Characters stand in a grid of cells."""
    font = chinese_font()
    if font is None:
        raise UserError(f"no font with Chinese characters is installed: get one, such as {FONTS[0]} (fonts-noto-cjk)")
    lines = [(row, line.startswith("$ ")) for line in text.splitlines() for row in wrap(line)]
    width, height = (COLUMNS + 4) * CELL, (len(lines) + 3.2) * LINE  # points
    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    round_corners = dict(boxstyle="round,pad=0,rounding_size=9", linewidth=0)
    axes.add_patch(FancyBboxPatch((0, 0), width, height, facecolor=BAR, **round_corners))
    axes.add_patch(FancyBboxPatch((0, 1.7 * LINE), width, height - 1.7 * LINE, facecolor=WINDOW, **round_corners))
    axes.fill_between([0, width], 1.7 * LINE, 1.7 * LINE + 9, facecolor=WINDOW, linewidth=0)  # no corners at the bar
    axes.scatter([18, 36, 54], [0.85 * LINE] * 3, s=95, c=BUTTONS, linewidths=0)
    style = dict(family=["DejaVu Sans Mono", font], va="baseline")
    axes.text(width / 2, 1.1 * LINE, TITLE, color=OUTPUT, fontsize=SIZE, ha="center", **style)
    for y, (row, is_command) in enumerate(lines, start=3):
        for i, character in enumerate(row):
            size = SIZE if cells(character) == 1 else 1.9 * CELL  # a Chinese character is as wide as it is high
            color = OUTPUT if not is_command else PROMPT if (i, character) == (0, "$") else COMMAND
            axes.text((2 + cells(row[:i])) * CELL, y * LINE, character, color=color, fontsize=size, **style)
    figure.savefig(path, format="png", dpi=160, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/quickstart/dpo", help="folder of a model, seen from the project's")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "terminal.png")
    args = parser.parse_args()
    flags = ["--model", args.model, "--temperature", "0"]
    draw(record([["eval.py", *flags, "--prompt", question] for question in QUESTIONS.split("|")]), args.output)


if __name__ == "__main__":
    run(main)
