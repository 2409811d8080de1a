"""Saving: a kill or a full disk at any moment leaves the old checkpoint or the new one, whole."""

import argparse
import errno
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SHORT_RUN, TIMEOUT, TOKENIZER, Processes, saved_progress, signal_in_pass, snapshot, steps_of
from safetensors.torch import save_file

from model import checkpoint
from model.checkpoint import load_model, load_tensors, save_model, save_tensors
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training import state
from training.state import STATE_FILE

TINY = LMConfig(**PRESETS["tiny"])

# ------------------------------------------------------------------------------------------------------ kill, full disk


def save_and_be_killed(folder: Path, kills: int):
    """Forks a child that saves without end, kills it at a random moment, and reads what it left; again and again.

    Every save writes one number into all weights, so that a file of two saves, or of half a one, shows.
    """
    model, rng = CausalLM(TINY), random.Random(0)

    def save(number: int):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        state = {f"weight.{name}": parameter.data for name, parameter in model.named_parameters()}
        save_tensors(folder / STATE_FILE, state, info=json.dumps({"number": number}))
        save_model(folder, model, TOKENIZER)

    save(0)
    started = time.perf_counter()
    save(1)
    duration = time.perf_counter() - started
    last, last_model, torn = 1, 1, 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            number = last
            while True:
                number += 1
                save(number)
        time.sleep(rng.uniform(0, 2 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += any(folder.rglob(".*.new"))
        state, texts = load_tensors(folder / STATE_FILE)
        info = json.loads(texts["info"])
        numbers = {value.item() for tensor in state.values() for value in (tensor.min(), tensor.max())}
        assert numbers == {info["number"]}, f"the state holds {numbers}"
        weights = {value.item() for p in load_model(folder).parameters() for value in (p.min(), p.max())}
        assert len(weights) == 1, f"the model holds {weights}"
        assert last_model <= (last_model := weights.pop()) <= info["number"], "an older model came back"
        assert last <= (last := info["number"]), "an older state came back"
    print(json.dumps({"torn": torn, "last": last}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child that it has forked")
@pytest.mark.parametrize("kills", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_while_saving_leaves_the_old_or_the_new_one_whole(kills, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (result,) = Processes(tmp_path / "logs", save_and_be_killed, tmp_path / "out", kills).wait()
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert report["torn"] > 0, "no kill came while a file was being written"
    assert report["last"] > 1, "no save came to its end"
    AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len({value.item() for p in model.parameters() for value in (p.min(), p.max())}) == 1


@pytest.fixture
def trained(data, run_here, tmp_path):
    """The flags of a run of one step that has ended, without --resume; it is in tmp_path / "out"."""
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", "--max_seq_len", "32"]
    flags += ["--batch_size", "2", "--eval_rows", "1"]
    assert run_here("1-pretrain.py", *flags, "--max_steps", "1").status == 0
    return flags


@pytest.mark.parametrize("fails", ["state.safetensors", "model.safetensors"])
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(fails, trained, run_here, tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if fails in Path(path).name:
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    before = snapshot(tmp_path / "out")
    error = run_here("1-pretrain.py", *trained, "--max_steps", "2", "--resume").error_line(status=1)
    assert fails in error
    assert "No space left" in error
    after = snapshot(tmp_path / "out")
    assert before.keys() == after.keys(), "something was left lying about"
    assert after[Path("model.safetensors")] == before[Path("model.safetensors")]
    if fails == "state.safetensors":
        assert after | {Path("metrics.jsonl"): before[Path("metrics.jsonl")]} == before  # the log had grown already
    monkeypatch.undo()
    assert run_here("1-pretrain.py", *trained, "--max_steps", "2", "--resume").status == 0, "it cannot go on"


def test_a_kill_between_the_two_renames_is_mended_by_whoever_comes_next(trained, run_here, tmp_path, monkeypatch):
    rename = Path.rename

    def killed_at_the_second(path, target):
        if path.name == ".out.new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_second)
    assert run_here("1-pretrain.py", *trained, "--max_steps", "2").status == 130
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", ".out.new", "out.old"]
    assert run_here("1-pretrain.py", *trained, "--max_steps", "3", "--resume").status == 0
    assert saved_progress(tmp_path / "out")["step"] == 3
    (tmp_path / "out").rename(tmp_path / ".out.new")
    load_model(tmp_path / "out")


def test_a_kill_at_any_file_of_the_last_save_is_mended_by_resuming(data, run_here, tmp_path, monkeypatch):
    """Also where the run has nothing left to do."""
    flags = ["--data", data, "--preset", "tiny", "--max_seq_len", "32", "--batch_size", "2", "--eval_rows", "1"]
    flags += ["--max_steps", "2", "--save_interval", "1", "--out_dir"]
    replace, files = os.replace, []

    def killed_at(number: int):
        files.clear()

        def replace_or_be_killed(source, target):
            if len(files) == number:
                raise KeyboardInterrupt
            files.append(Path(target).name)
            replace(source, target)

        return replace_or_be_killed

    monkeypatch.setattr(os, "replace", killed_at(-1))
    assert run_here("1-pretrain.py", *flags, tmp_path / "whole").status == 0
    names, whole = list(files), snapshot(tmp_path / "whole")
    first = len(names) - names[::-1].index("state.safetensors") - 1  # where the last save begins
    assert "model.safetensors" in names[first:]
    for number in (first, names.index("model.safetensors", first), len(names) - 1):
        out_dir = tmp_path / str(number)
        monkeypatch.setattr(os, "replace", killed_at(number))
        assert run_here("1-pretrain.py", *flags, out_dir).status == 130
        monkeypatch.setattr(os, "replace", replace)
        assert run_here("1-pretrain.py", *flags, out_dir, "--resume").status == 0
        after = snapshot(out_dir)
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert after[Path(name)] == whole[Path(name)], f"killed before {names[number]}: another {name}"
        assert saved_progress(out_dir)["step"] == 2


def limit_file_size():
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit for the size of a file")
def test_a_file_that_the_system_refuses_leaves_the_earlier_checkpoint(trained, start, tmp_path):
    before = snapshot(tmp_path / "out")
    (result,) = start("1-pretrain.py", *trained, "--max_steps", "1", patch=limit_file_size).wait()
    assert "cannot write" in result.error_line(status=1)
    assert snapshot(tmp_path / "out") == before


# -------------------------------------------------------------------------------------- other people's files, launchers


@pytest.mark.parametrize("name", ["out", "out.old"])
def test_a_folder_that_no_run_has_made_is_not_put_away(name, data, run_here, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.md").write_text("years of work")
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", "--max_steps", "1"]
    error = run_here("1-pretrain.py", *flags).error_line(status=2)
    assert f"{name} contains something else than a run" in error
    assert (tmp_path / name / "thesis.md").read_text() == "years of work"


def test_a_run_does_not_replace_the_model_that_it_starts_from(chat_data, base_dir, run_here):
    before = snapshot(base_dir)
    result = run_here("2-sft.py", "--data", chat_data, "--init_from", base_dir, "--out_dir", base_dir)
    assert "--init_from" in result.error_line(status=2)
    assert snapshot(base_dir) == before


def test_resume_auto_begins_and_goes_on(data, run_here, tmp_path):
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", "--max_seq_len", "32"]
    flags += ["--batch_size", "2", "--eval_rows", "1", "--resume", "auto"]
    for steps in (1, 3):
        assert run_here("1-pretrain.py", *flags, "--max_steps", steps).status == 0
        assert saved_progress(tmp_path / "out")["step"] == steps
    assert not (tmp_path / "out.old").exists(), "the second run began anew"


def test_a_restart_by_torchrun_does_not_begin_anew_unasked(data, run_here, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = run_here("1-pretrain.py", "--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny")
    assert "--resume auto" in result.error_line(status=2)


def test_two_runs_do_not_write_into_one_folder(data, run_here, tmp_path):
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", "--max_seq_len", "32"]
    flags += ["--batch_size", "2", "--eval_rows", "1", "--max_steps", "1"]
    with state.lock_run(tmp_path / "out"):
        assert "another run is writing" in run_here("1-pretrain.py", *flags).error_line(status=2)
    assert run_here("1-pretrain.py", *flags).status == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no terminal to lose on Windows")
def test_a_terminal_that_goes_away_saves_first(data, start, tmp_path):
    flags = ["--data", data, "--out_dir", tmp_path / "out", *SHORT_RUN, "--batch_size", "2"]
    (result,) = start("1-pretrain.py", *flags, patch=partial(signal_in_pass, 3, signal.SIGHUP)).wait()
    assert result.status == 128 + signal.SIGHUP
    assert saved_progress(tmp_path / "out")["step"] == 2


def test_a_reader_who_goes_away_does_not_end_the_run(data, tmp_path):
    flags = ["--data", data, "--out_dir", tmp_path / "out", *SHORT_RUN, "--batch_size", "2", "--max_steps", "2"]
    command = shlex.join([sys.executable, str(ROOT / "1-pretrain.py"), *map(str, flags)])
    result = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.stdout.startswith("model ")
    assert result.stderr == ""
    assert saved_progress(tmp_path / "out")["step"] == 2


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_place_that_cannot_be_written_is_known_before_the_first_step(place, data, run_here, tmp_path):
    (tmp_path / "file").touch()
    out_dir = tmp_path / "file" if place == "a file" else tmp_path / "file" / "out"
    result = run_here("1-pretrain.py", "--data", data, "--out_dir", out_dir, "--preset", "tiny")
    assert str(out_dir) in result.error_line(status=2)
    assert "step" not in result.out


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder of Linux in which no file can be made")
def test_a_place_where_no_file_can_be_is_not_taken_for_one_that_is_locked(data, run_here):
    line = run_here("1-pretrain.py", "--data", data, "--out_dir", "/proc/x", "--preset", "tiny").error_line(status=2)
    assert "/proc/x cannot be written" in line


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_link_is_followed_and_not_replaced(trained, run_here, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    flags = [tmp_path / "link" if flag == tmp_path / "out" else flag for flag in trained]
    for _ in range(2):  # the second puts the first away
        assert run_here("1-pretrain.py", *flags, "--max_steps", "1").status == 0
        assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == [".out.lock", "out", "out.old"]
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    flags = [tmp_path / "circle" if flag == tmp_path / "out" else flag for flag in trained]
    assert "circle" in run_here("1-pretrain.py", *flags).error_line(status=2)


@pytest.mark.parametrize(("place", "words"), [("/", "mounted"), (".", "contains something else"), ("disk", "mounted")])
def test_a_place_that_cannot_be_replaced_is_known_before_the_first_step(
    place, words, data, run_here, tmp_path, monkeypatch
):
    (tmp_path / "thesis.md").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) in ("/", "disk"))
    result = run_here("1-pretrain.py", "--data", data, "--out_dir", place, "--preset", "tiny")
    assert words in result.error_line(status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.md"]


def test_without_git_a_run_does_not_know_its_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert state.git_commit() is None


def other_seed(name: str):
    """Has the second process start with another value of a flag."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *args):
        flags = parse(self, *args)
        if os.environ["RANK"] == "1":
            setattr(flags, name, 7)
        return flags

    argparse.ArgumentParser.parse_args = parsed


@pytest.mark.parametrize("name", ["seed", "save_interval"])
def test_processes_that_were_started_unlike_are_told(name, data, start, tmp_path):
    flags = ["--data", data, "--out_dir", tmp_path / "out", *SHORT_RUN, "--batch_size", "2"]
    for result in start("1-pretrain.py", *flags, patch=partial(other_seed, name), processes=2).wait():
        assert f"of {name} process" in result.error_line(status=2)


KILLED_ONCE = """
import os, runpy, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from helpers import hurry, signal_in_pass
hurry()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    signal_in_pass(5, signal.SIGKILL)
runpy.run_path({script!r}, run_name="__main__")
"""


def test_one_command_serves_the_first_start_and_every_restart(data, tmp_path):
    """The process is killed in its third step; torchrun starts the same command again, which goes on from the save."""
    paths = {"root": str(ROOT), "tests": str(ROOT / "tests"), "script": str(ROOT / "1-pretrain.py")}
    (tmp_path / "killed.py").write_text(KILLED_ONCE.format(**paths), "utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--max_restarts",
        "1",
        tmp_path / "killed.py",
    ]
    command += [
        "--data",
        data,
        "--out_dir",
        tmp_path / "out",
        *SHORT_RUN,
        "--batch_size",
        "2",
        "--accumulation_steps",
        "2",
    ]
    command += ["--save_interval", "1", "--max_steps", "4", "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    assert saved_progress(tmp_path / "out")["step"] == 4
    assert steps_of(tmp_path / "out") == [0, 1, 2, 3, 4]
