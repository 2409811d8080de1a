"""What the page of live runs is told: names, records as they grow, samples; and what it can not be made to read."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from helpers import ROOT

from server import runs


def write_run(directory: Path, *records: dict, end: str = "\n") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": i, **record}) for i, record in enumerate(records)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + end, "utf-8")
    return directory


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def get(out):
    """get(PATH) -> what the server answers, as JSON that a browser can read."""
    out.mkdir()
    app = FastAPI()
    app.include_router(runs.router(out))
    client = TestClient(app)

    def answer(path: str, status: int = 200):
        reply = client.get(path)
        assert reply.status_code == status, reply.text
        return json.loads(reply.text, parse_constant=pytest.fail)

    return answer


def names(get) -> list[str]:
    return [run["name"] for run in get("/api/runs")]


def test_runs_three_levels_down_the_newest_first(out, get):
    for age, name in enumerate(("sft", "a/b/c", "a/b/c/d", "a")):
        directory = write_run(out / name, {"loss": 1.5, "expert_load": [[1.0]]})
        os.utime(directory / "metrics.jsonl", (1e9, 1e9 - age))
    (out / "empty").mkdir()
    assert names(get) == ["sft", "a/b/c", "a"]
    assert get("/api/runs")[0] == {"name": "sft", "updated": 1e9, "running": False, "last": {"step": 0, "loss": 1.5}}


def test_records_go_on_where_the_last_answer_ended(out, get):
    metrics = write_run(out / "sft", {"loss": 3.0}, {"loss": 2.0}, end='\n{"step": 2, "lo') / "metrics.jsonl"
    first = get("/api/runs/sft")
    assert [record["loss"] for record in first["records"]] == [3.0, 2.0]
    with open(metrics, "a") as file:
        file.write('ss": 1.0}\n')
    second = get(f"/api/runs/sft?since={first['next']}")
    assert second["records"] == [{"step": 2, "loss": 1.0}]
    assert second["file"] == first["file"]
    assert get(f"/api/runs/sft?since={second['next']}")["records"] == []


def test_a_run_that_began_anew_is_another_file(out, get):
    write_run(out / "sft", {"loss": 3.0})
    first = get("/api/runs/sft")
    (out / "sft" / "metrics.jsonl").unlink()  # its number may be given to the next
    write_run(out / "sft", {"loss": 4.0}, {"loss": 3.5})
    assert get(f"/api/runs/sft?since={first['next']}")["file"] != first["file"]
    assert get("/api/runs/sft?since=1000000")["records"] == []


def test_a_long_run_comes_in_parts(out, get, monkeypatch):
    monkeypatch.setattr(runs, "BLOCK", 100)
    write_run(out / "sft", *({"loss": float(i)} for i in range(20)))
    found, since, more = [], 0, True
    while more:
        part = get(f"/api/runs/sft?since={since}")
        found, since, more = found + part["records"], part["next"], part["more"]
        assert len(part["records"]) < 6
    assert [record["loss"] for record in found] == list(range(20))


def test_what_is_no_record_is_passed_over(out, get, monkeypatch):
    monkeypatch.setattr(runs, "BLOCK", 1000)
    lines = ["x" * 3000, "", "[1]", '{"step": ', "[" * 900, '{"step": 1}', '"\\ud800"', '{"name": "\\ud800"}', ""]
    write_run(out / "sft", {})
    (out / "sft" / "metrics.jsonl").write_bytes(b"\xff\n" + "\n".join(lines).encode())
    found, since, more = [], 0, True
    while more:
        part = get(f"/api/runs/sft?since={since}")
        found, since, more = found + part["records"], part["next"], part["more"]
    assert found == [{"step": 1}, {"name": "\ud800"}]


def test_numbers_that_are_not_finite_are_null(out, get):
    (write_run(out / "sft", {}) / "metrics.jsonl").write_text('{"a": NaN, "b": [-Infinity], "c": 1e999, "d": 1e9}\n')
    assert get("/api/runs/sft")["records"] == [{"a": None, "b": [None], "c": None, "d": 1e9}]
    assert get("/api/runs")[0]["last"] == {"a": None, "c": None, "d": 1e9}


def test_arguments_and_samples(out, get):
    directory = write_run(out / "a" / "grpo", {})
    assert get("/api/runs/a/grpo")["run"] == {}
    assert get("/api/runs/a/grpo/samples") == []
    (directory / "run.json").write_text('{"arguments": {"seed": 0}}')
    lines = "".join(json.dumps({"step": i, "written": "春<b>"}) + "\n" for i in range(50))
    (directory / "rollouts.jsonl").write_text(lines + '{"step": 50, "wr')
    assert get("/api/runs/a/grpo")["run"]["arguments"] == {"seed": 0}
    samples = get("/api/runs/a/grpo/samples")
    assert [sample["step"] for sample in samples] == list(range(30, 50))
    assert samples[0]["written"] == "春<b>"


def test_a_run_runs_as_long_as_it_holds_its_lock(out, get):
    metrics = write_run(out / "sft", {}) / "metrics.jsonl"
    assert get("/api/runs")[0]["running"]  # no lock, and it has grown just now
    os.utime(metrics, (time.time() - 600,) * 2)
    assert not get("/api/runs")[0]["running"]
    with filelock.FileLock(out / ".sft.lock"):
        assert get("/api/runs")[0]["running"]
    os.utime(metrics)
    assert not get("/api/runs")[0]["running"]


def test_a_run_before_its_first_save_takes_the_place_of_the_one_before(out, get):
    old = write_run(out / "sft", {"loss": 1.0}) / "metrics.jsonl"
    os.utime(old, (1e9, 1e9))
    write_run(out / ".sft.writing", {"loss": 9.0})
    write_run(out / ".sft.old", {"loss": 5.0})
    assert names(get) == ["sft"]
    assert get("/api/runs/sft")["records"] == [{"step": 0, "loss": 9.0}]
    os.utime(old)
    os.utime(out / ".sft.writing" / "metrics.jsonl", (1e9, 1e9))  # what a kill has left; the old one was resumed
    assert get("/api/runs/sft")["records"] == [{"step": 0, "loss": 1.0}]


@pytest.mark.parametrize("name", ["..", "%2e%2e", "../secret", "..%2fsecret", "sft/../../secret", "/etc", "%2e"])
def test_no_name_leads_out_of_the_folder(out, get, name):
    write_run(out / "sft", {})
    write_run(out.parent / "secret", {"loss": 7.0})
    get(f"/api/runs/{name}", 404)


@pytest.mark.skipif(os.name == "nt", reason="links need a right of their own there")
def test_no_link_leads_out_of_the_folder(out, get):
    secret = write_run(out.parent / "secret", {"loss": 7.0})
    (out / "folder").symlink_to(secret)
    for name in ("metrics.jsonl", "rollouts.jsonl", "run.json"):
        directory = out / name.partition(".")[0]
        write_run(directory, {})
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(secret / "metrics.jsonl")
    assert names(get) == []


def test_it_starts_without_torch():
    command = "import sys, server.runs; sys.exit('torch' in sys.modules or 'training' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0
