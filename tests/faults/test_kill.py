"""kill -9 at random moments, again and again: a run that is resumed after each ends with the same bits.

All five stages, in one and in two processes, saving after every step, so that many kills come while a checkpoint is
being written. A few kills of each by default; the whole series, 50 of each, takes six minutes:

    KILLS=50 python -m pytest -q -s -m slow tests/faults/test_kill.py

KILL_SEED (0 without it, printed with every failure) decides the moments; KILLS how many there are.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import (
    SHORT_RUN,
    TIMEOUT,
    TOKENIZER,
    Processes,
    assert_same_tensors,
    make_pairs,
    records,
    run_stage,
    write_data,
)

from corpus.prepared import writing_prepared
from model.chat import encode_chat, load_tokenizer
from training.log import METRICS_FILE
from training.state import STATE_FILE

KILLS, SEED = int(os.environ.get("KILLS", 3)), os.environ.get("KILL_SEED", "0")
TIMES = ("tokens_per_s", "mfu", "minutes", "minutes_left", "sampling_seconds")  # of a record; not its content
ADAPTER = "--lora_rank 2 --lora_dropout 0.2".split()
STAGES = {  # stage: flags of its own
    "1-pretrain.py": ["--preset", "tiny"],
    "2-sft.py": [],
    "3-lora.py": ADAPTER,
    "4-dpo.py": ["--max_seq_len", "128"],
    "5-grpo.py": [*"--questions 4 --generations 4 --max_new_tokens 6 --reward".split(), "REWARD"],
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="Windows kills otherwise")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, data, chat_data) -> dict[str, Path]:
    """Prepared data by stage, and a reward that half of what an untrained model writes gets."""
    folder = tmp_path_factory.mktemp("kill")
    pairs = make_pairs(24)
    write_data(folder / "dpo", pairs[8:], pairs[:8], kind="dpo")
    tokenizer = load_tokenizer(TOKENIZER)
    with writing_prepared(folder / "rl", "rl", TOKENIZER, noted=True) as writer:
        for i in range(16):
            messages = [{"role": "user", "content": f"{i} 加 {i} 等于几？"}]
            ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
            note = json.dumps({"question": messages[0]["content"], "answer": str(2 * i)})
            parts = [(b"".join(token.to_bytes(2, "little") for token in ids), b"")]
            writer.add("val" if i < 4 else "train", parts, note=note)
    (folder / "rewards.py").write_text("def odd(reply, task):\n    return float(len(reply.content) % 2)\n")
    paths = {"1-pretrain.py": data, "2-sft.py": chat_data, "3-lora.py": chat_data, "4-dpo.py": folder / "dpo"}
    return paths | {"5-grpo.py": folder / "rl", "reward": folder / "rewards.py"}


def written(out_dir: Path) -> int:
    """When the log was last written, in nanoseconds: a run does it before its first step. 0 where there is none."""
    places = (out_dir / METRICS_FILE, out_dir.with_name(f".{out_dir.name}.writing") / METRICS_FILE)
    return max((path.stat().st_mtime_ns for path in places if path.exists()), default=0)


def alive(running: Processes) -> bool:
    return any(process.is_alive() for process in running.processes)


def shown(out_dir: Path) -> list[dict]:
    """The log without what the clock says."""
    return [{name: record[name] for name in record if name not in TIMES} for record in records(out_dir)]


def wait_until(condition: Callable[[], bool]) -> float:
    """Seconds that it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + TIMEOUT
        time.sleep(0.002)
    return time.monotonic() - begin


def kill_at_random(running: Processes, out_dir: Path, rng: random.Random, span: float) -> float:
    """Kills the processes within `span` seconds, if they still run; returns after how many."""
    wait_until(lambda: all(out.exists() for out, _ in running.files))
    if rng.random() < 0.8:  # the others come while modules, data and state are loaded
        before = written(out_dir)
        wait_until(lambda: written(out_dir) > before or not alive(running))
    moment = rng.uniform(0, 0.8 * span)
    deadline = time.monotonic() + moment
    wait_until(lambda: time.monotonic() > deadline or not alive(running))
    lag = rng.choice([0, rng.uniform(0, 0.2)])  # between one process and the next
    for process in rng.sample(running.processes, len(running.processes)):
        process.kill()
        time.sleep(lag)
    return moment


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_and_resumed_is_the_run_never_killed(stage, processes, folders, base_dir, tmp_path):
    rng, met = random.Random(f"{SEED}/{stage}/{processes}"), Counter()
    flags = [*SHORT_RUN, "--batch_size", "2", "--max_steps", "6", "--save_interval", "1", "--resume", "auto"]
    flags += ["--eval_interval", "3", *STAGES[stage], "--data", folders[stage]]
    flags = [f"{folders['reward']}:odd" if flag == "REWARD" else flag for flag in flags]
    if stage != "1-pretrain.py":
        flags = [flag for flag in flags if flag not in ("--preset", "tiny")] + ["--init_from", base_dir]
    started = 0

    def start(out_dir: Path) -> Processes:
        nonlocal started
        started += 1
        logs = tmp_path / f"logs{started}"
        return Processes(logs, run_stage, None, stage, *flags, "--out_dir", out_dir, processes=processes)

    whole = start(tmp_path / "whole")
    wait_until(lambda: written(tmp_path / "whole") or not alive(whole))
    to_end = wait_until(lambda: not alive(whole))
    results = whole.wait()
    assert [result.status for result in results] == [0] * processes, results

    number = 0
    out_dir = tmp_path / f"out{number}"
    while met["kills"] < KILLS or not met["whole"]:
        running = start(out_dir)
        moment = kill_at_random(running, out_dir, rng, to_end) if met["kills"] < KILLS else None
        results = running.wait()
        story = f"KILL_SEED={SEED}: {met}, killed after {moment} s: {results}"
        if any(result.status == -signal.SIGKILL for result in results):
            met["kills"] += 1
            met["while writing"] += any(tmp_path.rglob(".*.new"))
            met["before the first save"] += not (out_dir / STATE_FILE).exists()
            continue
        assert [result.status for result in results] == [0] * processes, story
        weights = "adapter_model.safetensors" if stage == "3-lora.py" else "model.safetensors"
        assert (out_dir / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes(), story
        assert_same_tensors(tmp_path / "whole", out_dir, weights)
        assert shown(out_dir) == shown(tmp_path / "whole"), story
        met["whole"] += 1
        number += 1
        out_dir = tmp_path / f"out{number}"
    print(f"\n{stage} in {processes} processes, KILL_SEED={SEED}: {dict(met)}")
