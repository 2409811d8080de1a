"""Ctrl-C and SIGTERM in every phase, a reader that goes away, terminals of every kind: no traceback, nothing lost."""

import fcntl
import functools
import importlib
import json
import os
import pty
import random
import signal
import struct
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from helpers import (
    ROOT,
    SHORT_RUN,
    TIMEOUT,
    Processes,
    assert_same_tensors,
    make_text,
    run_stage,
    snapshot,
)

from corpus.prepared import check_prepared
from model.checkpoint import check_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals of POSIX")

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "quickstart.py")  # which imports nothing slow


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_modules_are_loaded_is_no_traceback(script, tmp_path):
    """The first slow module of each, torch or numpy, is one that presses Ctrl-C."""
    for name in ("torch", "numpy"):
        heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # what a shell's `&` takes away
        pressed = f"import os, signal, time\n{heard}\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
        (tmp_path / f"{name}.py").write_text(pressed)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_what_fails_while_modules_are_loaded_keeps_its_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("1 / 0")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "eval.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr


# ----------------------------------------------------------------------------------------------------------- a training

PHASES = {  # name: a function that is at work then, and the how manieth call of it
    "reading data": ("training.packing:PackedDataset.__init__", 2),
    "making the model": ("training.machine:Machine.init_device", 1),
    "measuring the machine": ("training.loop:matmul_rate", 1),
    "first validation": ("training.loss:evaluate", 1),
    "a step": ("training.loss:next_token_loss", 6),
    "an update": ("training.loop:optimizer_step", 3),
    "a validation": ("training.loss:evaluate", 2),
    "saving the state": ("training.state:save_tensors", 1),
    "saving the model": ("training.state:save_model", 1),
    "the first save's end": ("training.state:replace_directory", 1),
    "the last validation": ("training.loss:evaluate", 5),
    "the last save": ("training.state:save_model", 4),
    "the end": ("training.log:Log.close", 1),
}
BEFORE_TRAINING = list(PHASES)[:4]
RUN = ["--batch_size", "2", "--max_steps", "7", "--eval_interval", "2", "--save_interval", "2", "--resume", "auto"]


def signal_in_call(function: str, call: int, number: signal.Signals):
    """Sends a signal to this process at the call-th call of a function, MODULE:NAME."""
    module, _, path = function.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    original, calls = getattr(owner, name), 0

    def signalled(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, signalled)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run that nothing disturbs."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    flags = ["--data", data, "--out_dir", out_dir, *SHORT_RUN, *RUN]
    (result,) = Processes(out_dir.parent / "logs", run_stage, None, "1-pretrain.py", *flags).wait()
    assert result.status == 0, result.err
    return out_dir


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_costs_nothing(phase, number, data, whole, start, tmp_path):
    flags = ["--data", data, "--out_dir", tmp_path / "out", *SHORT_RUN, *RUN]
    (result,) = start("1-pretrain.py", *flags, patch=partial(signal_in_call, *PHASES[phase], number)).wait()
    if phase in BEFORE_TRAINING:  # there is nothing to save yet
        assert (result.status, result.err) in ((130, "error: interrupted\n"), (-number, ""))
        assert not (tmp_path / "out").exists()
    elif result.status:
        assert (result.status, result.err) == (128 + number, "")
        assert "\nnext: " in result.out
    (result,) = start("1-pretrain.py", *flags).wait()
    assert (result.status, result.err) == (0, "")
    assert_same_tensors(whole, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("function", ["training.rollouts:RolloutGenerator.generate", "training.state:save_model"])
def test_a_signal_while_a_stage_of_rewards_writes_or_saves(function, number, tasks, brief_dir, start, tmp_path):
    flags = ["--data", tasks, "--init_from", brief_dir, "--out_dir", tmp_path / "out", "--max_seq_len", "64"]
    flags += "--questions 4 --generations 4 --max_new_tokens 4 --batch_size 2 --max_steps 4 --resume auto".split()
    flags += ["--reward", f"{tasks.parent / 'rewards.py'}:parity", "--save_interval", "1", "--log_interval", "1"]
    (result,) = start("5-grpo.py", *flags, patch=partial(signal_in_call, function, 3, number)).wait()
    assert (result.status, result.err) == (128 + number, "")
    (result,) = start("5-grpo.py", *flags).wait()
    assert (result.status, result.err) == (0, "")
    check_model(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- other commands

CODE = f"""
import json, runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests/faults")!r}]
signals, *sys.argv = sys.argv[1:]
if signals:
    from test_signals import signal_in_call
    signal_in_call(*json.loads(signals))
    import signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell's `&` takes away
else:
    from helpers import hurry
    hurry()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(*words, signals=(), **environment) -> dict:
    """For subprocess: a script in a process of its own, which maybe sends a signal to itself."""
    words = [sys.executable, "-c", CODE, json.dumps(signals) if signals else "", *map(str, words)]
    return dict(args=words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def write_texts(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    lines = (json.dumps({"text": make_text(rng) + f"第{i}篇。"}, ensure_ascii=False) + "\n" for i in range(400))
    (folder / "texts.jsonl").write_text("".join(lines), "utf-8")
    return folder / "texts.jsonl"


PLACES = {
    "reading": ("corpus.files:read_records", 1),
    "a batch": ("corpus.pipeline:Report.without_duplicates", 1),
    "writing": ("corpus.prepared:PreparedWriter.add", 9),
    "the sums": ("corpus.prepared:PreparedWriter.finish", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("phase", PLACES)
def test_a_signal_leaves_prepared_data_as_they_were(phase, workers, number, tmp_path):
    texts, output = write_texts(tmp_path), tmp_path / "out"
    words = ["data_process.py", "pretrain", texts, "--output", output, "--workers", workers]
    assert subprocess.run(**command(*words), capture_output=True).returncode == 0
    before = snapshot(tmp_path)
    signals = (*PLACES[phase], number)
    result = subprocess.run(**command(*words, signals=signals), capture_output=True, text=True, timeout=TIMEOUT)
    assert (result.returncode, result.stderr) == (130, "error: interrupted; the output is as it was\n")
    assert snapshot(tmp_path) == before
    check_prepared(output)
    workers = [process for process in psutil.process_iter(["cmdline"]) if str(texts) in (process.info["cmdline"] or [])]
    assert not workers


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_many_prompts_are_answered(number, brief_dir, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "3 加 4 等于几？"}\n' * 9, "utf-8")
    words = ["eval.py", "--model", brief_dir, "--batch", tmp_path / "prompts.jsonl", "--device", "cpu"]
    signals = ("engine.generation:Engine.step", 2, number)
    result = subprocess.run(**command(*words, signals=signals), capture_output=True, text=True, timeout=TIMEOUT)
    assert (result.returncode, result.stderr) in ((130, "error: interrupted\n"), (-signal.SIGTERM, ""))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_server_leaves_when_it_is_told_to(number, brief_dir):
    server = subprocess.Popen(
        **command("serve.py", brief_dir, "--port", "0", "--device", "cpu", signals=("os:getcwd", -1, 0)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout.readline().startswith("http://")
    time.sleep(0.5)
    server.send_signal(number)
    _, err = server.communicate(timeout=TIMEOUT)
    assert (server.returncode, err) in ((0, ""), (-signal.SIGTERM, ""))


# ----------------------------------------------------------------------------------------------------------- terminals

NO_UTF8 = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="")


def on_terminal(words: dict, columns: int, typed: str = "") -> tuple[int, str]:
    """Runs a command on a terminal; its status, and all that stands there in the end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(**words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.write(master, typed.encode())
    shown = b""
    while True:
        try:
            block = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(master)
    return process.wait(TIMEOUT), shown.decode("utf-8", "replace")


def in_a_pipe(words: dict, **streams) -> tuple[int, str]:
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | streams
    result = subprocess.run(**words, **streams, timeout=TIMEOUT)
    return result.returncode, ((result.stdout or b"") + (result.stderr or b"")).decode("utf-8", "replace")


def reader_gone(words: dict) -> tuple[int, str]:
    """As before `| head -0`."""
    read, write = os.pipe()
    os.close(read)
    try:
        return in_a_pipe(words, stdout=write)
    finally:
        os.close(write)


def nothing_open(words: dict) -> tuple[int, str]:
    line = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words["args"]]
    return subprocess.run(**words | {"args": line}, timeout=TIMEOUT).returncode, ""


PLACES_TO_RUN = {  # name: how, with what environment
    "LANG=C": (in_a_pipe, dict(LC_ALL="C", LANG="C")),
    "no UTF-8": (in_a_pipe, NO_UTF8),
    "20 columns": (partial(on_terminal, columns=20), {}),
    "1 column": (partial(on_terminal, columns=1), dict(TERM="dumb")),
    "20 columns, no UTF-8": (partial(on_terminal, columns=20), NO_UTF8),
    "the reader is gone": (reader_gone, {}),
    "nothing is open": (nothing_open, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES_TO_RUN)
def test_the_way_from_texts_to_an_answer_wherever_it_runs(place, tmp_path):
    """In a folder whose name has blanks, quotes and, where Python can pass them on, Chinese characters."""
    run, environment = PLACES_TO_RUN[place]
    folder = tmp_path / ("my seed's $HOME" if environment is NO_UTF8 else "我的 芥子's $HOME")
    texts = write_texts(folder)
    flags = [*SHORT_RUN, "--batch_size", "2", "--max_steps", "3", "--eval_interval", "2"]
    model = ["--model", folder / "out", "--device", "cpu", "--max_new_tokens", "4"]
    for words in (
        ["data_process.py", "look", texts, "--picture", folder / "look.png"],
        ["data_process.py", "pretrain", texts, "--output", folder / "data", "--workers", "2", "--val_fraction", "0.1"],
        ["data_process.py", "show", folder / "data", "--index", "0"],
        ["1-pretrain.py", "--data", folder / "data", "--out_dir", folder / "out", *flags],
        ["eval.py", *model, "--prompt", "春天"],
    ):
        status, said = run(command(*words, **environment))
        assert status == 0, said
        assert "Traceback" not in said
        assert "Exception" not in said
    if run.__class__ is partial:
        status, said = run(command("eval.py", *model, **environment), typed="春天\n/help\n/exit\n")
        assert status == 0, said
        assert "/temperature" in said
    check_model(folder / "out")
    check_prepared(folder / "data")
    left = {path.name for path in folder.iterdir()} - {"look.png"}  # drawn last: who has no reader may have ended
    assert left == {".out.lock", "data", "out", "texts.jsonl"}
