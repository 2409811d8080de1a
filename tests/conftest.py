"""Fixtures: prepared data of a small made-up corpus, and ways to run the project's scripts."""

import json
import random
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TOKENIZER, Processes, Result, hurry, make_documents, run_stage, write_data

from base.cli import available_cores
from corpus.prepared import writing_prepared
from model.chat import EOS, IM_END, encode_chat, load_tokenizer
from model.checkpoint import save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM

FAST = "not slow and not extra"  # the marks that pyproject.toml chooses

if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have the tests' runs ignore it

# Half of what an untrained model writes gets a reward, so that groups differ.
REWARD = (
    "def parity(reply, task):\n    return float(len(reply.content) % 2)\n\ndef same(reply, task):\n    return 0.0\n"
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """What `-n auto` means: all fast tests run in a process per core, at most four; chosen ones in this process."""
    chosen = config.args_source == config.ArgsSource.ARGS or config.option.keyword or config.option.markexpr != FAST
    return 0 if chosen else min(available_cores(), 4)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Texts: 60 to train on, 12 to validate."""
    documents = make_documents("pretrain", 72, seed=1)
    return write_data(tmp_path_factory.mktemp("data") / "pretrain", documents[12:], documents[:12])


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory) -> Path:
    """Chats with loss masks: 60 to train on, 8 to validate."""
    chats = make_documents("sft", 68, seed=2)
    return write_data(tmp_path_factory.mktemp("data") / "sft", chats[8:], chats[:8], kind="sft")


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory) -> Path:
    """A chat model of random weights, to adapt."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base")
    model = CausalLM(LMConfig(**PRESETS["tiny"]))
    model.stop_token_ids = [EOS, IM_END]
    save_model(directory, model, TOKENIZER)
    return directory


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """A folder of 24 questions, and beside it rewards.py."""
    folder = tmp_path_factory.mktemp("tasks") / "rl"
    tokenizer = load_tokenizer(TOKENIZER)
    with writing_prepared(folder, "rl", TOKENIZER, noted=True) as writer:
        for i in range(24):
            question = f"{i % 5} 加 {i} 等于几？"
            ids, _ = encode_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
            ids = torch.tensor(ids).numpy().astype(writer.dtype).tobytes()
            note = json.dumps({"question": question, "answer": str(i % 5 + i)})
            writer.add("val" if i < 4 else "train", [(ids, b"")], note=note)
    (folder.parent / "rewards.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="session")
def brief_dir(tmp_path_factory) -> Path:
    """A model that answers with one to three characters and stops: enough for some answers to be better than others."""
    folder = tmp_path_factory.mktemp("brief")
    tokenizer = load_tokenizer(TOKENIZER)
    rng = random.Random(0)
    chats = []
    for i in range(200):
        messages = [{"role": "user", "content": f"{i % 5} 加 {i % 29} 等于几？"}]
        messages.append({"role": "assistant", "content": "一二三"[: rng.randint(1, 3)]})
        chats.append(encode_chat(tokenizer, messages))
    write_data(folder / "data", chats[10:], chats[:10], kind="sft")
    torch.manual_seed(0)
    save_model(folder / "random", CausalLM(LMConfig(**PRESETS["tiny"])), TOKENIZER)
    options = (
        "--max_seq_len 64 --batch_size 8 --optimizer muon --learning_rate 1e-2 --max_steps 25 --eval_rows 2".split()
    )
    paths = ["--data", folder / "data", "--init_from", folder / "random", "--out_dir", folder / "sft"]
    command = [None, "2-sft.py", *paths, *options, "--warmup_steps", 1]
    (result,) = Processes(folder / "logs", run_stage, *command).wait()
    assert result.status == 0, result.err
    return folder / "sft"


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(script, *flags) runs a script in this process, which is much quicker than starting another."""

    def run_script(script: str, *flags) -> Result:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, flags)])
            hurry(patch.setattr)
            capsys.readouterr()
            status = 0
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as leave:
                status = leave.code or 0
            except KeyboardInterrupt:  # a signal that the script should have caught; it must not end the tests
                status = -signal.SIGINT
            return Result(status, *capsys.readouterr())

    return run_script


@pytest.fixture
def start(tmp_path_factory):
    """start(script, *flags, patch=None, processes=1) runs a script in new processes; .wait() gives their results."""

    def start_processes(script: str, *flags, patch=None, processes: int = 1) -> Processes:
        return Processes(tmp_path_factory.mktemp("run"), run_stage, patch, script, *flags, processes=processes)

    return start_processes
