"""Runs to be watched in server/web/runs.html: what stands in the folders that the stages write, as JSON.

    GET /api/runs                        every run below the folder, the one that was written last first
    GET /api/runs/NAME?since=N           its arguments, and the records of metrics.jsonl from byte N on
    GET /api/runs/NAME/samples           the last answers of rollouts.jsonl

Files are read as they grow: a line that is half written waits for the next question. Only what find_runs has found can
be asked for, and no link leads out of the folder.
"""

import json
import math
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import filelock
from fastapi import APIRouter, HTTPException, Query, Response

from base.files import METRICS_FILE, ROLLOUTS_FILE, RUN_FILE

FILES = METRICS_FILE, ROLLOUTS_FILE, RUN_FILE
DEPTH = 3  # levels below the folder where a run may stand
BLOCK = 2**22  # bytes of metrics.jsonl in one reply, at most; who asks on gets the rest
TAIL = 2**18  # bytes at the end of a file in which its last lines are looked for
SAMPLES = 20
RECORDS = 10_000  # in which the last validation is looked for
RECENT = 120  # seconds; whether a run without a lock, say a copy from another machine, still grows


def router(folder: Path) -> APIRouter:
    routes = APIRouter(prefix="/api/runs")

    def run_at(name: str) -> Path:
        directory = find_runs(folder).get(name)
        if directory is None:
            raise HTTPException(404, f"there is no run {name[:100]} below {folder}")
        return directory

    @routes.get("")
    def list_runs() -> Response:
        runs = []
        for name, directory in find_runs(folder).items():
            with suppress(OSError):  # it has just been renamed, or may not be read
                runs.append(describe(name, directory))
        return as_json(sorted(runs, key=lambda run: -run["updated"]))

    @routes.get("/{name:path}/samples")
    def samples(name: str) -> Response:
        path = run_at(name) / ROLLOUTS_FILE
        return as_json(last_records(path, SAMPLES) if path.is_file() else [])

    @routes.get("/{name:path}")
    def records(name: str, since: int = Query(0, ge=0)) -> Response:
        directory = run_at(name)
        with open(directory / METRICS_FILE, "rb") as file:
            # Of another file, where a run began anew or was resumed, `since` says nothing: then one asks again from 0.
            status = os.fstat(file.fileno())
            identity = f"{status.st_ino}-{zlib.crc32(file.readline(256))}"
            file.seek(min(since, status.st_size))
            block = file.read(BLOCK)
        whole = block[: block.rfind(b"\n") + 1]
        if not whole and len(block) == BLOCK:  # no line of ours
            whole = block
        arguments = {}
        # It is written with the first save.
        with suppress(OSError, ValueError, RecursionError), open(directory / RUN_FILE, "rb") as file:
            arguments = parse(file.read(BLOCK))
        found = {"run": arguments, "file": identity, "records": list(parse_lines(whole)), "next": since + len(whole)}
        return as_json(found | {"more": len(block) == BLOCK})

    return routes


def find_runs(folder: Path) -> dict[str, Path]:
    """The folders with a metrics.jsonl, by their path below `folder`.

    Until its first save a run named X stands in .X.writing (training/state.py), beside what an earlier one has left in
    X: of the two, X is the one that was written last.
    """
    root, found = folder.resolve(), {}
    for path, directories, files in os.walk(root):  # which follows no link to a folder
        directory = Path(path)
        parts = directory.relative_to(root).parts
        if METRICS_FILE in files and parts and all(_is_ours(directory / name, root) for name in FILES):
            name = "/".join([*parts[:-1], run_name(directory)])
            newest = name not in found or _updated(directory) > _updated(found[name])
            if newest and name.isprintable():  # no page could ask for bytes that are no text
                found[name] = directory
        kept = [name for name in directories if not name.startswith(".") or name.endswith(".writing")]
        directories[:] = kept if len(parts) < DEPTH else []
    return found


def run_name(directory: Path) -> str:
    """Of a run's folder, also before its first save."""
    name = directory.name
    return name[1:].removesuffix(".writing") if name.startswith(".") else name


def describe(name: str, directory: Path) -> dict:
    records = last_records(directory / METRICS_FILE, RECORDS)
    validated = next((record for record in reversed(records) if "val_loss" in record), {})
    last = {"val_loss": validated["val_loss"]} if validated else {}
    last |= records[-1] if records else {}
    updated = _updated(directory)
    return {
        "name": name,
        "updated": updated,  # seconds since 1970
        "running": is_running(directory, updated),
        "last": {name: value for name, value in last.items() if not isinstance(value, list | dict | str)},
    }


def is_running(directory: Path, updated: float) -> bool:
    """Whether a process holds the run's lock (training/state.py); without a lock, whether it has grown just now."""
    lock = directory.with_name(f".{run_name(directory)}.lock")
    with suppress(OSError):
        if lock.is_file() and not lock.is_symlink():
            try:
                with filelock.FileLock(lock, blocking=False):
                    return False
            except filelock.Timeout:
                return True
    return time.time() - updated < RECENT


def last_records(path: Path, n: int) -> list[dict]:
    """The last n whole lines of a jsonl file, of those in its last TAIL bytes."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        block = file.read()
    return list(parse_lines(block[: block.rfind(b"\n") + 1]))[-n:]


def parse_lines(lines: bytes) -> Iterator[dict]:
    """The objects in lines of JSON; a line that holds none is left out."""
    for line in lines.splitlines():
        with suppress(ValueError, RecursionError):
            value = parse(line)
            if isinstance(value, dict):
                yield value


def parse(text: bytes) -> object:
    """JSON, with None for numbers that are not finite, which a browser could not read."""
    return json.loads(text, parse_constant=lambda name: None, parse_float=_finite)


def as_json(value: object) -> Response:
    return Response(json.dumps(value, allow_nan=False), media_type="application/json")


def _finite(text: str) -> float | None:
    return float(text) if math.isfinite(float(text)) else None


def _is_ours(path: Path, root: Path) -> bool:
    """Whether it is a file below `root`, or not there: no link that leads out, no pipe, which would be waited for."""
    try:
        return path.resolve().is_relative_to(root) and (path.is_file() or not path.exists())
    except (OSError, RuntimeError):  # links in a circle
        return False


def _updated(directory: Path) -> float:
    try:
        return (directory / METRICS_FILE).stat().st_mtime
    except FileNotFoundError:  # it has just been renamed
        return 0.0
