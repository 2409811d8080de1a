"""Fixtures: prepared data of a small made-up corpus, and ways to run the project's scripts."""

import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TOKENIZER, Processes, Result, hurry, make_documents, run_stage, write_data

from model.chat import EOS, IM_END
from model.checkpoint import save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM


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
