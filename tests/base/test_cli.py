"""How a script ends, and the commands that it prints."""

import os
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

from base import cli
from base.cli import UserError, command_line, python_command, run


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("no such preset"), 2, "error: no such preset\n"),
        (UserError('config.json: model_type "a\x1b[31m\nb"'), 2, 'error: config.json: model_type "a [31m b"\n'),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1, "error: a.txt: No such file or directory\n"),
        (OSError("cannot write a.json"), 1, "error: cannot write a.json\n"),
        (FloatingPointError("10 steps"), 1, "error: 10 steps\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (RuntimeError("CUDA out of memory.\nTried"), 1, "--batch_size auto"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, status, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == status
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("of numpy"), TypeError("of ours"), RuntimeError("of torch"), KeyError("x")]
)
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run(main)


def test_what_a_failure_left_behind_is_said(capsys):
    def main():
        raise OSError("disk full")

    with pytest.raises(SystemExit):
        run(main, aftermath="the output is as it was")
    assert capsys.readouterr().err == "error: disk full; the output is as it was\n"


def test_a_reader_that_has_had_enough_is_no_error():
    code = "from base.cli import run\nrun(lambda: [print('x' * 1000, flush=True) for _ in range(10_000)])"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1"
    result = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == ""
    assert result.stdout == "x" * 1000 + "\n"


def test_a_command_names_a_python_that_has_the_packages(monkeypatch, tmp_path):
    """An environment that is not active is named by its path; in one that is, `python` will do."""
    monkeypatch.setattr(sys, "argv", ["1-pretrain.py", "--data", "my data"])
    elsewhere = tmp_path / ("python.exe" if os.name == "nt" else "python")
    elsewhere.touch(mode=0o755)
    monkeypatch.setattr(cli.shutil, "which", lambda name: str(elsewhere))
    assert python_command() == sys.executable.removeprefix(os.getcwd() + os.sep)
    assert shlex.split(command_line())[1:] == ["1-pretrain.py", "--data", "my data"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert shlex.split(command_line())[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    monkeypatch.setattr(cli.shutil, "which", lambda name: sys.executable)
    assert python_command() == "python"
    assert command_line().startswith("torchrun --nproc_per_node 2 1-pretrain.py")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")  # machines
    assert command_line().startswith("torchrun --nnodes 3 --nproc_per_node 2 1-pretrain.py")


def test_another_process_says_what_is_wrong_with_it_alone(monkeypatch, capsys):
    """Later: where all are wrong, the first ends them before they say it too."""
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    with pytest.raises(SystemExit):
        cli._exit("no such file", 2)
    assert waits == [10]
    assert capsys.readouterr().err == "error: process 1: no such file\n"
