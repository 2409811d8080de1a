"""Every command in README and docs runs: with small arguments, each in its own copy of the project."""

import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from helpers import PAGES, ROOT, TIMEOUT, inline_code, make_text

from corpus.fetch import read_catalogue

# What follows these words, up to the next flag, are files of the reader's; write_inputs makes one to put there.
INPUTS = dict.fromkeys(["clean", "tokenizer", "pretrain", "look", "--val", "--perplexity"], "texts.jsonl")
INPUTS |= {
    "sft": "chats.jsonl",
    "dpo": "pairs.jsonl",
    "rl": "tasks.jsonl",
    "--batch": "prompts.jsonl",
    "--choice": "exam",
}
# Flags that make a command short; it gets those that its --help knows.
LIMITS = dict(max_steps=2, steps=1, minutes=0.02, peer_minutes=0.02, max_new_tokens=4, eval_rows=4)
LIMITS |= dict(batch_size=2, max_seq_len=128, vocab_size=400, workers=1, models="96x4", lengths=256, corpora=10)
LIMITS |= dict(device="cpu", new_tokens=4, rounds=1, batch_sizes=2, only="AdamW", teacher_minutes=0.02, chats=40)
INSTALLERS = {"pip", "venv", "quickstart.py"}  # are not run: what they name must be there
RECIPES = sorted((ROOT / "docs").glob("architecture*.md"))  # tests/test_architecture.py runs what stands there
# What the others may need, since a page may begin in the middle.
FIRST = """\
python data_process.py pretrain F
python data_process.py pretrain F --output dataset/zh
python data_process.py sft F
python data_process.py sft F --output dataset/lora
python data_process.py dpo F
python data_process.py rl F
python data_process.py pretrain F --output dataset/en
python -m bench.dirt texts.jsonl --output raw.jsonl
python 1-pretrain.py
python 2-sft.py
python 3-lora.py
python 4-dpo.py
python 5-grpo.py"""


def commands_of(page: str) -> list[str]:
    """The commands in a page's blocks, fenced or indented, and in its inline code, if they name what they run."""
    page = page.replace("\\\n", " ")
    blocks = re.findall(r"^ *```.*?^ *```|^ {4}.*?$", page, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += [code for code in inline_code(page) if re.search(r"\.py\b| -[mcr] (?!torch)", code)]
    return [line for line in lines if re.match(r"(python[\d.]*|torchrun|pip) ", line)]


def parse(command: str) -> tuple[list[str], list[str], list[str]]:
    """What comes after `python` in a command: how it is started, the script, its arguments."""
    words = shlex.split(command.partition(" > ")[0], comments=True)
    place = next((i for i, word in enumerate(words) if word in ("-m", "-c") or word.endswith(".py")), None)
    if place is None:
        raise ValueError(f"what does this run? {command}")
    end = place + 1 + (words[place] in ("-m", "-c"))
    start = words[1:place]
    if words[0] == "torchrun":  # for any number of processes
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = []
    for word in words[end:]:
        if word.startswith("-") or not arguments or arguments[-1] not in INPUTS.values():
            arguments += [word, INPUTS[word]] if word in INPUTS else [word]
    return start, words[place:end], arguments


def execute(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    options = dict(capture_output=True, encoding="utf-8", timeout=TIMEOUT, input="你好\n/exit\n")
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, **options)


@functools.cache
def flags_of(*script: str) -> set[str]:
    return set(re.findall(r"--(\w+)", execute([*script, "--help"], ROOT).stdout))


def run(command: str, folder: Path):
    start, script, arguments = parse(command)
    if script[0] != "-c" and "--help" not in arguments:
        known = flags_of(*script, *arguments[: script == ["data_process.py"]])
        limits = {name: value for name, value in LIMITS.items() if name in known}
        if "--preset" in arguments or (script == ["1-pretrain.py"] and "--init_from" not in arguments):
            limits["preset"] = "tiny-moe" if any(word.endswith("-moe") for word in arguments) else "tiny"
        arguments += [word for name, value in limits.items() for word in (f"--{name}", str(value))]
    result = execute([*start, *script, *arguments], folder)
    assert result.returncode == 0, result.stderr or result.stdout
    assert "Traceback" not in result.stderr, result.stderr


def write_inputs(folder: Path):
    texts = [make_text(random.Random(seed)) for seed in range(200)]
    pairs = [{"prompt": text[:30], "chosen": text[:60], "rejected": text[-40:]} for text in texts]
    chats = [{"instruction": pair["prompt"], "output": pair["chosen"]} for pair in pairs]
    prompts = [{"prompt": "你好"}, {"messages": [{"role": "user", "content": "Hello"}]}]
    tasks = [{"prompt": text[:30], "answer": str(number)} for number, text in enumerate(texts)]
    files = dict(texts=[{"text": text} for text in texts], chats=chats, pairs=pairs, prompts=prompts, tasks=tasks)
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for part in ("dev", "val"):  # an exam as C-Eval comes
        (folder / "exam" / part).mkdir(parents=True)
        rows = "".join(f"{number} + 1 = ?,{number + 1},0,3,4,A\n" for number in range(3, 8))
        (folder / "exam" / part / f"sums_{part}.csv").write_text(f"question,A,B,C,D,answer\n{rows}")


PAGES_TO_RUN = [page for page in PAGES if page not in RECIPES]
COMMANDS = list(dict.fromkeys(command for page in PAGES_TO_RUN for command in commands_of(page.read_text("utf-8"))))
TO_INSTALL = [command for command in COMMANDS if INSTALLERS & set(shlex.split(command, comments=True))]
TO_FETCH = [command for command in COMMANDS if "data_process.py fetch" in command]  # needs a hub
TO_SERVE = [command for command in COMMANDS if "serve.py" in shlex.split(command, comments=True)]  # until told to end
NOT_RUN = {*TO_INSTALL, *TO_FETCH, *TO_SERVE}
TO_RUN = list({str(parse(command)): command for command in COMMANDS if command not in NOT_RUN}.values())
NEEDS_EXTRA = re.compile(r"export\.py .*--to (gguf|ollama)|--languages")  # packages of quickstart.EXTRA


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project, with data and models."""
    folder = tmp_path_factory.mktemp("project")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    write_inputs(folder)
    for command in FIRST.splitlines():
        run(command, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in TO_RUN if not NEEDS_EXTRA.search(command)])
def test_command_runs(command, project, tmp_path):
    shutil.copytree(project, tmp_path / "project")
    run(command, tmp_path / "project")
    shutil.rmtree(tmp_path / "project")


@pytest.mark.extra
@pytest.mark.parametrize("command", [command for command in TO_RUN if NEEDS_EXTRA.search(command)])
def test_command_of_extra_packages_runs(command, project, tmp_path):
    test_command_runs(command, project, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", TO_SERVE)
def test_what_is_served_answers(command, project):
    start, script, arguments = parse(command)
    words = [sys.executable, *start, *script, *arguments, "--port", "0", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BROWSER": "true"}
    server = subprocess.Popen(words, cwd=project, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{address}/health", timeout=TIMEOUT) as answer:
            assert json.load(answer) == {"status": "ok"}
        server.send_signal(signal.SIGINT)
        assert server.wait(TIMEOUT) == 0
    finally:
        server.kill()


@pytest.mark.parametrize("command", TO_INSTALL)
def test_what_an_installing_command_names_is_there(command):
    files = [word for word in shlex.split(command, comments=True) if word.endswith((".py", ".txt"))]
    assert [name for name in files if not (ROOT / name).exists()] == []
    if "quickstart.py" in files:
        assert set(re.findall(r"--(\w+)", command)) <= flags_of("quickstart.py")


@pytest.mark.parametrize("command", TO_FETCH)
def test_what_a_command_fetches_is_in_the_catalogue(command):
    assert parse(command)[2][1] in read_catalogue()
    assert set(re.findall(r"--(\w+)", command)) <= flags_of("data_process.py", "fetch")


def test_commands_are_found_and_understood():
    page = "`python a.py`, `python`\n\n    python -m b --val x y --c  # d\n\n```\ntorchrun --x 1 \\\n e.py > f\n```\n"
    assert commands_of(page) == ["python -m b --val x y --c  # d", "torchrun --x 1   e.py > f", "python a.py"]
    assert parse("python -X dev -m b --val x y --c  # d") == (
        ["-X", "dev"],
        ["-m", "b"],
        ["--val", "texts.jsonl", "--c"],
    )
    assert parse("torchrun --x 1 e.py > f")[1:] == (["e.py"], [])
    with pytest.raises(ValueError, match="what does this run"):
        parse("torchrun --nproc_per_node 2")
