"""Draws terminal.svg: what the demonstration's model answers, as it stands in a terminal.

    python quickstart.py --no-chat
    python -m images.terminal

The commands are run, and the picture holds what they printed.
"""

import argparse
import io
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
QUESTIONS = "你是谁？|What is 17 plus 8?|把 8 3 6 从小到大排列。|诸葛亮字什么？|What is the capital of France?"


def record(commands: list[list[str]], path: Path):
    """Runs each command, in the project's folder, and draws it with what it printed."""
    console = Console(record=True, width=110, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for command in commands:
        console.print(Text(f"$ python {shlex.join(command)}", style="bold green"))
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        console.print(Text(done.stdout.decode().strip()))
    path.write_text(console.export_svg(title="Jiezi 芥子"), "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/quickstart/dpo", help="folder of a model, seen from the project's")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "terminal.svg")
    args = parser.parse_args()
    flags = ["--model", args.model, "--temperature", "0"]
    record([["eval.py", *flags, "--prompt", question] for question in QUESTIONS.split("|")], args.output)


if __name__ == "__main__":
    main()
