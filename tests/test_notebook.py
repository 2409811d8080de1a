"""The notebook for Colab and Kaggle: its cells are run in order, in one process, with everything shrunk."""

import contextlib
import io
import json
import os
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, hurry

from demo import questions, tour
from model.LMConfig import PRESETS

NOTEBOOK = json.loads((ROOT / "notebooks" / "jiezi.ipynb").read_text("utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SHORT = {"1-pretrain.py": ["--max_steps", "2", "--eval_rows", "2", "--max_seq_len", "64", "--batch_size", "2"]}
SHORT["eval.py"] = ["--max_new_tokens", "2", "--device", "cpu"]


class Shell:
    """Runs the `!` and `%` lines of a notebook. Scripts run in this process, as torch takes seconds to import."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.scripts = monkeypatch, []

    def line(self, line: str, variables: dict):
        program, *words = shlex.split(line[1:].format_map(variables))
        if line.startswith("%"):
            assert program == "cd"
            os.chdir(*words)
        elif program == "git":
            assert words[:1] == ["clone"]
            os.mkdir(words[-1])
        elif program == "pip":
            assert words == ["install", "-q", "-r", "requirements.txt"], "would replace the torch that is there"
        else:
            assert program == "python", line
            self.python(*words)

    def python(self, script: str, *words: str) -> int:
        name = words[0] if script == "-m" else script
        self.scripts.append(name)
        flags = [] if words[0] == "demo" else SHORT.get(name, [])
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *words[script == "-m" :], *flags])
            patch.chdir(Path.cwd())
            if script == "-m":
                tour.main()  # as `python -m demo.tour`, with what is patched
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        return 0


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A shell in an empty folder, and small numbers: of questions, records, layers and steps."""
    shell = Shell(monkeypatch)

    def start(self, *command, output=None):
        words = [str(word) for word in command]
        if "pip" in words:
            return 1, False  # no corpus: stories stand in for it
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as printed:
            shell.python(*words)
        printed.seek(0)
        text = printed.read()
        if output:
            output.write_text(text, "utf-8")
        else:
            print(text)
        return 0, False

    monkeypatch.chdir(tmp_path)
    hurry(monkeypatch.setattr)
    monkeypatch.setattr(questions, "TESTS", 1)
    monkeypatch.setattr(questions, "SIZES", {"pages": 20, "chats": 40, "names": 10, "pairs": 20})
    monkeypatch.setattr(tour, "STAGES", {name: stage._replace(steps=2) for name, stage in tour.STAGES.items()})
    monkeypatch.setattr(tour.Tour, "start", start)
    monkeypatch.setattr(tour.Tour, "processes_flag", lambda self: [])
    small = dict(PRESETS["tiny"], num_hidden_layers=1)
    monkeypatch.setitem(PRESETS, "tiny", small)
    monkeypatch.setitem(PRESETS, "small", small)
    return shell


def test_the_notebook_works(shell, monkeypatch, capsys):
    shown = []
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(Image=shown.append))
    variables = {}
    for cell in CELLS:
        code = ""
        for line in [*cell.splitlines(), ""]:
            if line[:1] in ("!", "%"):
                exec(code, variables)
                shell.line(line, variables)
                code = ""
            else:
                code += line + "\n"
        exec(code, variables)
    assert [name for name in shell.scripts if name.endswith("py") and name != "eval.py"][-2:] == [
        "data_process.py",
        "1-pretrain.py",
    ]
    assert shown
    assert Path(shown[0]).exists()
    assert (Path("out") / "pretrain" / "model.safetensors").exists()
    out = capsys.readouterr().out
    assert "\ntime     about" in out
    assert "correct answers" in out


def test_the_notebook_is_without_outputs_and_in_both_languages():
    for cell in NOTEBOOK["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            assert any("\u4e00" <= character <= "\u9fff" for character in text)
            assert sum(word.isascii() and word.isalpha() for word in text.split()) > 3
        else:
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
