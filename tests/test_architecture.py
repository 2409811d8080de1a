"""Who imports whom, and whether the recipes of docs/architecture_en.md work: followed in a copy of the project."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, TOKENIZER, make_documents, write_data

from model.checkpoint import save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM

PACKAGES = "scripts demo server training engine corpus model base".split()  # each may import those after it
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
BLOCK = re.compile(r"```(python|diff|bash)\n(.*?)```", re.DOTALL)


def imports(package: str) -> set[str]:
    """The first names of the modules that a package's files, or the scripts, import."""
    names = set()
    for path in ROOT.glob("*.py" if package == "scripts" else f"{package}/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    wrong = {*PACKAGES[: PACKAGES.index(package)], *SCRIPTS, "tests", "bench", "images", "helpers"}
    if package in ("engine", "corpus"):
        wrong |= {"engine", "corpus"} - {package}
    if package == "base":
        wrong = imports("base") - sys.stdlib_module_names - {"base"}
    assert not wrong & imports(package)


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_a_package_says_what_it_may_import(package):
    text = importlib.import_module(package).__doc__
    assert all(name in text.lower() or "all others" in text for name in imports(package) & {*PACKAGES} - {package})


def recipes(page: str) -> list[tuple[str, str]]:
    """The code blocks below the page's third heading: language, text."""
    return BLOCK.findall((ROOT / "docs" / page).read_text("utf-8").split("\n## ")[3])


def apply(diff: str, folder):
    """Changes a file as the lines of a diff say: "--- PATH", then hunks, between them "@@"."""
    for part in re.split("^--- ", diff, flags=re.MULTILINE)[1:]:
        name, _, hunks = part.partition("\n")
        source = (folder / name).read_text("utf-8")
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
            if old not in source and new in source:  # whoever works here has followed the recipe
                continue
            assert source.count(old) == 1, f"{name} has changed; the page still says:\n{old}"
            source = source.replace(old, new)
        (folder / name).write_text(source, "utf-8")


FLAGS = {  # what makes a command of the page short
    "data_process.py sft": "--workers 1",
    "focal.py": "--max_steps 2 --max_seq_len 64 --eval_rows 2 --device cpu",
    "1-pretrain.py": "--max_steps 2 --max_seq_len 64 --eval_rows 2 --device cpu",
    "eval.py": "--max_new_tokens 4 --device cpu",
}
RUN = """  # all commands in one process, for torch takes seconds to import
import runpy, sys
sys.path[:0] = [".", "tests"]
import pytest
from helpers import hurry
hurry()
for line in sys.argv[1:]:
    print("$", line, flush=True)
    _, *sys.argv = line.split()
    if sys.argv[0] == "-m":
        assert pytest.main([*sys.argv[2:], "-q", "-p", "no:cacheprovider"]) == 0
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_recipes_work(tmp_path):
    project = tmp_path / "jiezi"
    skipped = shutil.ignore_patterns(".*", "out", "dataset", "docs", "bench", "images", "__pycache__")
    shutil.copytree(ROOT, project, ignore=skipped)
    documents = make_documents("pretrain", 30, seed=1)
    write_data(project / "dataset" / "pretrain", documents[6:], documents[:6])
    save_model(project / "out" / "pretrain", CausalLM(LMConfig(**PRESETS["tiny"])), TOKENIZER)
    quizzes = [{"context": f"{i} 加 1 等于 {i + 1}。", "ask": f"{i} 加 1？", "reply": f"{i + 1}。"} for i in range(9)]
    (project / "quiz.jsonl").write_text("".join(json.dumps(quiz) + "\n" for quiz in quizzes), "utf-8")

    commands = []
    for language, text in recipes("architecture_en.md"):
        if language == "python":  # a new file, whose name stands in the first line
            ast.parse(text)
            (project / text.split()[1]).write_text(text, "utf-8")
        elif language == "diff":
            apply(text, project)
        else:
            for line in text.splitlines():
                flags = next((flags for start, flags in FLAGS.items() if line.startswith(f"python {start}")), "")
                commands.append(f"{line} {flags}")
    words = [sys.executable, "-c", RUN, *commands]
    environment = os.environ | {"PYTHONUTF8": "1"}
    result = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 加 1 等于 1。\n0 加 1？" in result.stdout  # of `show`: the context has come into the question
    assert all((project / "out" / name / "model.safetensors").exists() for name in ("focal", "nope"))
    assert json.loads((project / "out" / "window" / "config.json").read_text("utf-8"))["sliding_window"] == 16
    assert "plain_loss" in (project / "out" / "focal" / "metrics.jsonl").read_text("utf-8")
    assert json.loads((project / "out" / "nope" / "config.json").read_text("utf-8"))["model_type"] == "smollm3"


def test_both_languages_have_the_same_recipes():
    assert recipes("architecture.md") == recipes("architecture_en.md") != []
