"""One of several processes dies: the others say so and end, and torchrun starts all again from what was saved."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from helpers import ROOT, SHORT_RUN, TIMEOUT, assert_same_tensors, saved_progress, signal_in_pass, steps_of

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows kills otherwise")

SCRIPT = """
import os, runpy, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from helpers import hurry, signal_in_pass
hurry()
if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ({rank!r}, "0") and sys.argv.count("--resume"):
    signal_in_pass({call}, signal.SIGKILL)
runpy.run_path({script!r}, run_name="__main__")
"""


def killed(rank: int, call: int):
    if os.environ["RANK"] == str(rank):
        signal_in_pass(call, signal.SIGKILL)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_say_in_one_line_that_one_is_gone(rank, optimizer, data, start, tmp_path):
    flags = ["--data", data, "--out_dir", tmp_path / "out", *SHORT_RUN, "--batch_size", "2", "--save_interval", "1"]
    running = start("1-pretrain.py", *flags, "--optimizer", optimizer, patch=partial(killed, rank, 3), processes=2)
    dead = running.processes[rank]
    dead.join(TIMEOUT)
    died = time.monotonic()
    results = running.wait()
    assert time.monotonic() - died < 60
    assert results[rank].status == -signal.SIGKILL, results[rank].err
    line = results[1 - rank].error_line(status=1)
    assert "another process of this run has ended; continue with --resume" in line
    assert saved_progress(tmp_path / "out")["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "call"), [("0", 3), ("1", 5)])
def test_torchrun_starts_all_again_and_the_run_is_the_one_without_a_death(rank, call, data, tmp_path):
    script = SCRIPT.format(
        root=str(ROOT), tests=str(ROOT / "tests"), script=str(ROOT / "1-pretrain.py"), rank=rank, call=call
    )
    (tmp_path / "script.py").write_text(script, "utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--data", data, *SHORT_RUN, "--batch_size", "2", "--save_interval", "1", "--max_steps", "6"]
    for name, more in (("whole", []), ("cut", ["--resume", "auto"])):
        command = [
            *torchrun,
            "--max_restarts",
            "1",
            tmp_path / "script.py",
            *flags,
            "--out_dir",
            tmp_path / name,
            *more,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        assert result.returncode == 0, result.stderr
        assert ("exitcode: -9" in result.stderr) == (name == "cut"), result.stderr
    assert_same_tensors(tmp_path / "whole", tmp_path / "cut")
    assert steps_of(tmp_path / "cut") == [0, 1, 2, 3, 4, 5, 6]
