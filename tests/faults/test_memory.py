"""Too little memory, at any moment: one line that names the flags that take less, and what was saved before is whole.

The space of addresses of a process is limited, as `ulimit -v` does it, to so many MiB above what it has when the script
begins its work: at each size another step is the first that does not fit.
"""

import json
import random
import re
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import TOKENIZER, make_documents, make_pairs, make_text, snapshot, write_data

from base import cli
from model.checkpoint import check_model, save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training import cost

ROOM = [0, 8, 40, 160, 640, 1280]  # MiB
STEP = ["--batch_size", "16", "--max_seq_len", "256", "--max_steps", "2", "--save_interval", "1", "--log_interval", "1"]

# A library in C or Rust that gets no memory may end the process that it is in, as a kill does: none can catch it. With
# several workers it is one of them, of which the command speaks.
ABORTS = (-signal.SIGABRT, -signal.SIGSEGV, 127)

limited = pytest.mark.skipif(sys.platform != "linux", reason="needs a limit for memory")


def limit_memory(mib: int):
    """Of this process, from the moment when it calls the script's main()."""
    import resource  # not on Windows

    run = cli.run

    def limited_run(main, **words):
        def limited():
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + mib * 2**20,) * 2)
            main()

        run(limited, **words)

    cli.run = limited_run


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """One of 20 MB, which needs four times that to learn."""
    folder = tmp_path_factory.mktemp("model") / "sft"
    model = CausalLM(LMConfig(**PRESETS["mini"]))
    model.stop_token_ids = [2, 4]
    save_model(folder, model, TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def commands(model, tasks, tmp_path_factory) -> dict[str, tuple[list, str]]:
    """By name: what is run, and a flag that its message must name."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = make_documents("pretrain", 400, seed=3)
    chats = make_documents("sft", 400, seed=3)
    pairs = make_pairs(300)
    data = {
        "pretrain": write_data(folder / "pretrain", texts[8:], texts[:8]),
        "sft": write_data(folder / "sft", chats[8:], chats[:8], "sft"),
        "dpo": write_data(folder / "dpo", pairs[8:], pairs[:8], "dpo"),
    }
    rng = random.Random(0)
    lines = [json.dumps({"text": f"{make_text(rng)}{i}"}, ensure_ascii=False) for i in range(20_000)]
    (folder / "texts.jsonl").write_text("\n".join(lines), "utf-8")
    prompts = [json.dumps({"prompt": "春天来了。" * 40}, ensure_ascii=False)] * 64
    (folder / "prompts.jsonl").write_text("\n".join(prompts), "utf-8")
    out, base = ["--out_dir", "OUT"], ["--init_from", model]
    questions = "--questions 16 --generations 16 --max_new_tokens 100".split()
    raw = [folder / "texts.jsonl", "--workers", "1", "--output", "OUT"]
    return {
        "1-pretrain.py": (["--data", data["pretrain"], "--preset", "mini", *out, *STEP], "--batch_size auto"),
        "2-sft.py": (["--data", data["sft"], *base, *out, *STEP], "--batch_size auto"),
        "3-lora.py": (["--data", data["sft"], *base, *out, *STEP], "--batch_size auto"),
        "4-dpo.py": (["--data", data["dpo"], *base, *out, *STEP], "--batch_size auto"),
        "5-grpo.py": (["--data", tasks, *base, *out, *STEP, *questions], "--rollout_rows"),
        "eval.py": (["--model", model, "--batch", folder / "prompts.jsonl", "--batch_size", "64"], "--batch_size"),
        "export.py": ([model, "--to", "bf16", "--output", "OUT"], "close other programs"),
        "data_process.py pretrain": (["pretrain", *raw], "--workers 1"),
        "data_process.py tokenizer": (["tokenizer", *raw, "--vocab_size", "500"], "--max_mb"),
    }


COMMANDS = [
    *("1-pretrain.py", "2-sft.py", "3-lora.py", "4-dpo.py", "5-grpo.py", "eval.py", "export.py"),
    *("data_process.py pretrain", "data_process.py tokenizer"),
]


@limited
@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_too_little_memory_is_one_line_that_names_a_flag(name, commands, start, tmp_path):
    """And each command gets through with enough."""
    flags, flag = commands[name]
    script, statuses = name.split()[0], []
    for mib in ROOM:
        out = tmp_path / str(mib) / "out"
        (result,) = start(
            script, *(out if word == "OUT" else word for word in flags), patch=partial(limit_memory, mib)
        ).wait()
        statuses.append(result.status)
        aborted = script == "data_process.py" and result.status in ABORTS
        if aborted:
            assert not (out / "meta.json").exists(), mib
        elif result.status:
            line = result.error_line(status=1)
            assert line.startswith("error: out of memory: "), (mib, line)
            assert flag in line, mib
        if not aborted:
            left = [path.name for path in out.parent.rglob(".*") if not path.name.endswith((".lock", ".writing"))]
            assert not left, mib
    assert statuses[0]
    assert statuses[-1] == 0


@limited
def test_what_was_saved_before_the_memory_was_gone_is_whole(data, start, run_here, tmp_path):
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", *STEP]
    assert run_here("1-pretrain.py", *flags, "--max_seq_len", "32", "--batch_size", "2").status == 0
    before = snapshot(tmp_path / "out")
    more = ["--max_steps", "4", "--resume", "--max_seq_len", "32", "--batch_size", "2"]
    (result,) = start("1-pretrain.py", *flags, *more, patch=partial(limit_memory, 4)).wait()
    assert "--batch_size auto" in result.error_line(status=1)
    assert snapshot(tmp_path / "out") == before
    check_model(tmp_path / "out")


def test_an_estimate_above_the_memory_says_so_before_the_first_step(data, run_here, tmp_path, monkeypatch):
    """Who is killed for what it takes, as in a container, cannot say so any more."""
    flags = ["--data", data, "--preset", "tiny", "--max_seq_len", "32", "--batch_size", "2", "--max_steps", "1"]
    assert "in all" not in run_here("1-pretrain.py", *flags, "--out_dir", tmp_path / "out").out
    (tmp_path / "memory.max").write_text("5000000\n")
    monkeypatch.setattr(cost, "CGROUPS", tmp_path)
    shown = run_here("1-pretrain.py", *flags, "--out_dir", tmp_path / "out").out
    assert re.search(
        r"GiB in each process, with grad.* checkpointing, and there are 0.0 in all: --batch_size auto", shown
    )
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("7000000\n")
    assert cost.memory_of_machine() == 7_000_000
