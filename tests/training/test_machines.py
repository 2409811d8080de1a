"""Several machines, each with its own torchrun; here side by side over gloo, which is the same to the processes."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SHORT_RUN, TIMEOUT, relative_difference, saved_progress, steps_of
from safetensors.torch import load_file

from training.machine import StopRequest

KEEP_ALIVE = 1  # seconds; torchrun's own is 5, and it gives a machine up after three
SCRIPT = """
import os, runpy, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from helpers import hurry
from training import loss
hurry()
assert os.environ["GROUP_WORLD_SIZE"] == "2", "two machines"
death, calls, next_token_loss = Path({death!r}), 0, loss.next_token_loss

def dying_loss(model, batch):  # the whole second machine goes, in its third step: process and torchrun, unasked
    global calls
    calls += batch.split == "train"
    if os.environ["RANK"] == "1" and calls == 3 and death.exists():
        death.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return next_token_loss(model, batch)

loss.next_token_loss = dying_loss
runpy.run_path({script!r}, run_name="__main__")
"""


class Cluster:
    """Two machines that run the same command."""

    def __init__(self, folder: Path, data: Path, dies: bool):
        self.out_dir, death = folder / "out", folder / "death"
        if dies:
            death.touch()
        paths = {"root": str(ROOT), "tests": str(ROOT / "tests"), "script": str(ROOT / "1-pretrain.py")}
        (folder / "script.py").write_text(SCRIPT.format(**paths, death=str(death)), "utf-8")
        with socket.socket() as sock:
            sock.bind(("localhost", 0))
            self.port = sock.getsockname()[1]
        launcher = ["--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "3", "--rdzv_id", "jiezi"]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{self.port}"]
        launcher += ["--rdzv_conf", f"keep_alive_interval={KEEP_ALIVE}"]
        flags = ["--data", data, "--out_dir", self.out_dir, *SHORT_RUN, "--batch_size", "2", "--device", "cpu"]
        flags += ["--save_interval", "1", "--max_steps", "5", "--resume", "auto"]
        self.command = [sys.executable, "-m", "torch.distributed.run", *launcher, folder / "script.py", *flags]
        self.log = open(folder / "log", "wb")  # noqa: SIM115  both machines write to it

    def start_machine(self) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1"}
        # Else torch 2.13 never tells a machine that comes later where the others meet (docs/hardware.md).
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        return subprocess.Popen(list(map(str, self.command)), env=environment, stdout=self.log, stderr=self.log)

    def start_first(self) -> subprocess.Popen:
        """The one where the others meet; when it listens."""
        first, deadline = self.start_machine(), time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            with socket.socket() as sock:
                if sock.connect_ex(("localhost", self.port)) == 0:
                    return first
            time.sleep(0.1)
        raise TimeoutError(self.said())

    def said(self) -> str:
        return Path(self.log.name).read_text("utf-8")


@pytest.mark.slow
def test_two_machines_train_what_one_does(data, run_here, tmp_path):
    cluster = Cluster(tmp_path, data, dies=False)
    machines = [cluster.start_first(), cluster.start_machine()]
    assert [machine.wait(TIMEOUT) for machine in machines] == [0, 0], cluster.said()
    assert "machine  2 x cpu" in cluster.said()
    alone = ["--data", data, "--out_dir", tmp_path / "alone", *SHORT_RUN, "--batch_size", "4", "--max_steps", "5"]
    assert run_here("1-pretrain.py", *alone).status == 0
    ours, theirs = (load_file(out / "model.safetensors") for out in (cluster.out_dir, tmp_path / "alone"))
    flat = [torch.cat([tensors[name].flatten() for name in sorted(ours)]) for tensors in (ours, theirs)]
    assert relative_difference(*flat) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows kills otherwise")
def test_a_machine_that_dies_and_returns_goes_on_with_the_others(data, tmp_path):
    """The other's torchrun waits for it, and starts its processes anew; all go on from what was saved."""
    cluster = Cluster(tmp_path, data, dies=True)
    first, second = cluster.start_first(), cluster.start_machine()
    assert second.wait(TIMEOUT) == -signal.SIGKILL, cluster.said()
    assert first.poll() is None, cluster.said()
    time.sleep(5 * KEEP_ALIVE)  # as long as it takes the other to notice that a machine is gone
    again = cluster.start_machine()
    assert [machine.wait(TIMEOUT) for machine in (first, again)] == [0, 0], cluster.said()
    assert saved_progress(cluster.out_dir)["step"] == 5
    assert steps_of(cluster.out_dir) == [0, 1, 2, 3, 4, 5]


LEAVES = """
import atexit, os, sys
sys.path.insert(0, {root!r})

@atexit.register  # runs last
def tell():
    print([open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")])

from training.machine import start_machine
machine = start_machine("cpu", "float32", seed=0)
import torch
torch.optim.AdamW([torch.zeros(1)])
machine.gather("said just before the end")
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux lists a process's threads there")
def test_no_thread_of_the_connection_outlives_it(tmp_path):
    """One that lets go of a tensor while Python is ending would abort the process."""
    (tmp_path / "leaves.py").write_text(LEAVES.format(root=str(ROOT)), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--redirects", "3", "--log_dir", tmp_path / "logs", tmp_path / "leaves.py"]
    subprocess.run(command, check=True, timeout=TIMEOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    threads = [path.read_text("utf-8") for path in tmp_path.glob("logs/**/stdout.log")]
    assert len(threads) == 2
    assert not any("gloo" in names for names in threads), threads


def started_in_two(*flags) -> subprocess.Popen:
    command = [sys.executable, "1-pretrain.py", "--nproc_per_node", "2", "--device", "cpu", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_is_wrong_in_all_processes_is_one_line(tmp_path):
    out, err = (process := started_in_two("--data", tmp_path / "none")).communicate(timeout=TIMEOUT)
    assert process.returncode == 2, err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path / "none") in line
    assert out == ""


@pytest.mark.slow
def test_sigterm_to_the_process_that_started_the_others_saves_the_run(data, tmp_path):
    process = started_in_two("--data", data, "--out_dir", tmp_path / "out", *SHORT_RUN, "--epochs", "1000")
    while "step 3/" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.terminate()
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    command = out.splitlines()[-1].removeprefix("next: ")
    assert "--nproc_per_node 2" in command
    assert "torchrun" not in command
    assert saved_progress(tmp_path / "out")["step"] >= 3
    again = subprocess.run([*shlex.split(command), "--max_steps", "9"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_request_to_stop_that_a_launcher_passes_on_is_one_request(monkeypatch):
    stop, seconds = StopRequest(), [0.0]
    monkeypatch.setattr("training.machine.time.monotonic", lambda: seconds[0])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    with stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same, passed on at once
        assert (stop.made, stop.number) == (True, signal.SIGTERM)
        seconds[0] = 5.0
        with pytest.raises(KeyboardInterrupt):  # later, the user insists
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    with stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.made
    signal.signal(signal.SIGHUP, before)
