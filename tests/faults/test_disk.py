"""A disk that is full, cannot be written, or whose folder is gone: one line, and what was there before still loads.

On a disk of their own, in memory, which only root may mount; without it these tests are skipped. Full disks at single
files, and a limit for their size, are tried everywhere: tests/training/test_state.py, tests/corpus.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_pairs, make_text, saved_progress, snapshot, write_data

from corpus.prepared import check_prepared
from demo import tasks
from model.checkpoint import check_model
from training.schedule import TrainState

SIZE = 64 * 2**20

pytestmark = pytest.mark.slow


class Disk:
    """A small disk."""

    def __init__(self, folder: Path):
        self.folder = folder

    def leave(self, free: int | None):
        """Fills it up to so many bytes, or empties it of what fills it."""
        filler = self.folder / ".filler"
        filler.unlink(missing_ok=True)
        if free is not None:
            room = os.statvfs(self.folder)
            with open(filler, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(room.f_bavail * room.f_frsize - free, 4096))

    def remount(self, how: str):
        subprocess.run(["mount", "-o", f"remount,{how}", self.folder], check=True)

    def left(self) -> list[str]:
        """What hidden neighbours were left lying about."""
        names = {path.name for path in self.folder.rglob(".*")} - {".filler"}
        return [name for name in names if not name.endswith(".lock")]


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", tmp_path / "disk"]
    if sys.platform != "linux" or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted")
    yield Disk(tmp_path / "disk")
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


@pytest.fixture
def flags(data, disk) -> list:
    flags = ["--data", data, "--out_dir", disk.folder / "out", "--preset", "tiny", "--max_seq_len", "32"]
    return [*flags, "--batch_size", "2", "--eval_rows", "1", "--save_interval", "1", "--log_interval", "1"]


@pytest.mark.parametrize("new", [True, False], ids=["a new run", "resumed"])
@pytest.mark.parametrize("free", [0, 4096, 100_000, 3 * 10**6, 14 * 10**6, 15 * 10**6, 19 * 10**6])
def test_a_disk_that_fills_up_at_any_place_leaves_the_checkpoint_before(free, new, flags, disk, run_here):
    """A state of 13 MB, a model of 4 MB, and the small files beside them: at each of the sizes another file fails."""
    assert run_here("1-pretrain.py", *flags, "--max_steps", "1").status == 0
    disk.leave(free)
    result = run_here("1-pretrain.py", *flags, "--max_steps", "3", *([] if new else ["--resume"]))
    if result.status:
        assert "No space left" in result.error_line(status=2 if "--out_dir" in result.err else 1)
    disk.leave(None)
    check_model(disk.folder / "out")
    assert saved_progress(disk.folder / "out")["step"] in (1, 2, 3)
    assert run_here("1-pretrain.py", *flags, "--max_steps", "3", "--resume").status == 0
    assert saved_progress(disk.folder / "out")["step"] == 3


def test_a_disk_that_cannot_be_written_is_known_before_the_first_step(flags, disk, run_here):
    assert run_here("1-pretrain.py", *flags, "--max_steps", "1").status == 0
    before = snapshot(disk.folder / "out")
    disk.remount("ro")
    for more in ([], ["--resume"]):
        result = run_here("1-pretrain.py", *flags, "--max_steps", "3", *more)
        assert "Read-only" in result.error_line(status=2)
        assert "step 2" not in result.out
    assert snapshot(disk.folder / "out") == before


def test_a_folder_that_vanishes_is_one_line(flags, disk, run_here, monkeypatch):
    advance = TrainState.advance

    def advance_and_lose(self, *args):
        advance(self, *args)
        if self.step == 2:
            shutil.rmtree(disk.folder / "out")

    monkeypatch.setattr(TrainState, "advance", advance_and_lose)
    result = run_here("1-pretrain.py", *flags, "--max_steps", "3")
    assert "metrics.jsonl" in result.error_line(status=1)


@pytest.fixture
def inputs(tmp_path) -> dict[str, Path]:
    """Raw files for each command."""
    rng = random.Random(0)
    texts = [make_text(rng) + f"第{i}篇。" for i in range(300)]
    chats = [
        {"messages": [{"role": "user", "content": f"{i}？"}, {"role": "assistant", "content": text}]}
        for i, text in enumerate(texts)
    ]
    rows = {"text": [{"text": text} for text in texts], "chat": chats}
    for name, records in rows.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return {name: tmp_path / f"{name}.jsonl" for name in rows}


COMMANDS = {
    "pretrain": ["pretrain", "text", "--workers", "1"],
    "sft": ["sft", "chat", "--workers", "1"],
    "tokenizer": ["tokenizer", "text", "--vocab_size", "500", "--workers", "1"],
    "clean": ["clean", "text", "--workers", "1"],
    "demo": ["demo", "--tasks"],
}


@pytest.mark.parametrize("fault", ["full", "nearly full", "read-only"])
@pytest.mark.parametrize("command", COMMANDS)
def test_data_that_cannot_be_written_leave_what_was_there(command, fault, inputs, disk, run_here, monkeypatch):
    output = disk.folder / ("out.jsonl" if command == "clean" else "out")
    words = [inputs.get(word, word) for word in COMMANDS[command]]
    monkeypatch.setattr(tasks, "SIZES", {"chats": 500, "questions": 50, "tests": 5})
    assert run_here("data_process.py", *words, "--output", output).status == 0
    before = snapshot(disk.folder)
    disk.remount("ro") if fault == "read-only" else disk.leave(0 if fault == "full" else 20_000)
    result = run_here("data_process.py", *words, "--output", output)
    assert ("Read-only" if fault == "read-only" else "No space left") in result.err
    assert "Traceback" not in result.err
    assert result.status in (1, 2)
    disk.remount("rw")
    disk.leave(None)
    assert snapshot(disk.folder) == before
    if command in ("pretrain", "sft"):
        check_prepared(output)


@pytest.mark.parametrize("free", [0, 300_000, 2_000_000])
def test_an_export_and_a_cache_that_do_not_fit_leave_nothing(free, base_dir, disk, run_here, tmp_path):
    pairs = make_pairs(300)
    data = write_data(tmp_path / "dpo", pairs[8:], pairs[:8], kind="dpo")
    shutil.copytree(base_dir, disk.folder / "sft")
    disk.leave(free)
    before = snapshot(disk.folder / "sft")
    for to in ("bf16", "untied"):
        result = run_here("export.py", disk.folder / "sft", "--to", to)
        assert "No space left" in result.error_line(status=1 if "No space" in result.err else 2)
        assert disk.left() == []
    assert snapshot(disk.folder / "sft") == before
    disk.leave(0)
    run = ["--data", data, "--init_from", disk.folder / "sft", "--out_dir", disk.folder / "dpo", "--max_seq_len", "128"]
    result = run_here("4-dpo.py", *run, "--max_steps", "1", "--batch_size", "2")
    assert "No space left" in result.error_line(status=1)
    assert not [*disk.folder.rglob("*.bin"), *(disk.folder / "dpo-reference").glob("*")]
