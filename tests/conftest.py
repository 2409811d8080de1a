"""What several test files need: prepared data of a small made-up corpus, and ways to run the project's scripts."""

import functools
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from model import log, training
from model.chat import BOS, EOS, encode, encode_chat, load_tokenizer, tokenizer_fingerprint
from model.checkpoint import save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "model" / "tokenizer"
TIMEOUT = 300  # seconds after which a process is taken for stuck

# One thread a process: on a machine that has other work too, two threads wait for each other most of the time.
torch.set_num_threads(1)
os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # start_machine divides the cores by it

SENTENCES = [
    "春天来了，山上的花开了。",
    "小河里的水慢慢地流。",
    "老师问了一个问题，没有人回答。",
    "火车早上七点出发，下午到上海。",
    "这本书我读了两遍，还是不太明白。",
    "水在一百度时沸腾。",
    "The cat sat on the mat and looked at the rain. ",
    "She opened the old book. ",
    "Twelve people came, and nobody spoke. ",
    "1 + 1 = 2, 3 × 7 = 21. ",
]


def make_text(rng: random.Random) -> str:
    """A text of natural length: most are short, some are long."""
    return "".join(rng.choices(SENTENCES, k=min(1 + int(rng.expovariate(0.25)), 40)))


def make_documents(kind: str, number: int, seed: int) -> list:
    """Token ids of texts (kind "pretrain"), or the ids and loss masks of chats ("sft")."""
    rng, tokenizer = random.Random(seed), load_tokenizer(TOKENIZER)
    if kind == "pretrain":
        return [[BOS, *encode(tokenizer, make_text(rng)), EOS] for _ in range(number)]
    chats = []
    for _ in range(number):
        turns = [("user", make_text(rng)[:60]), ("assistant", make_text(rng)[:90])] * rng.randint(1, 2)
        chats.append(encode_chat(tokenizer, [{"role": role, "content": content} for role, content in turns]))
    return chats


def write_data(folder: Path, train: list, val: list, kind: str = "pretrain", **meta) -> Path:
    """A folder as data_process.py makes it. A document is a list of ids, or, unless kind is "pretrain", (ids, mask)."""
    folder.mkdir(parents=True)
    for split, documents in (("train", train), ("val", val)):
        if kind != "pretrain":
            mask = [bit for _, bits in documents for bit in bits]
            np.array(mask, np.uint8).tofile(folder / f"{split}.mask")
            documents = [ids for ids, _ in documents]
        np.array([token for ids in documents for token in ids], np.uint16).tofile(folder / f"{split}.bin")
        np.cumsum([0, *map(len, documents)], dtype=np.int64).tofile(folder / f"{split}.idx")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    own = {
        "format_version": 1,
        "kind": kind,
        "dtype": "uint16",
        "vocab_size": load_tokenizer(TOKENIZER).get_vocab_size(),
        "tokenizer": str(TOKENIZER),
        "tokenizer_sha256": tokenizer_fingerprint(TOKENIZER),
        "files": files,
    }
    (folder / "meta.json").write_text(json.dumps(own | meta), encoding="utf-8")
    return folder


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
    save_model(directory, CausalLM(LMConfig(**PRESETS["tiny"])), TOKENIZER, is_chat=True)
    return directory


def hurry(setattr=setattr):
    """Takes the time out of the speed test and of drawing, which take seconds in every run."""
    setattr(training, "matmul_rate", functools.partial(training.matmul_rate, size=64))
    setattr(log, "plot", lambda records, path: path.touch())


class Result(NamedTuple):
    status: int
    out: str
    err: str

    def error_line(self, status: int) -> str:
        """The message, where the run ended with this status and one line that says why."""
        assert self.status == status, self.err or self.out
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err


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


# A server that has imported the slow modules forks a process in no time; where there is none, each imports them itself.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload(["torch._dynamo", "safetensors.torch", "tokenizers", "pytest"])


class Processes:
    """A function running in one or several new processes, which know each other as those of torchrun do."""

    def __init__(self, folder: Path, function, *args, processes: int = 1):
        with socket.socket() as sock:
            sock.bind(("localhost", 0))
            port = sock.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [(folder / f"out.{rank}", folder / f"err.{rank}") for rank in range(processes)]
        self.processes = []
        for rank, files in enumerate(self.files):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            arguments = (function, args, {name: str(value) for name, value in environment.items()}, *files)
            self.processes.append(CONTEXT.Process(target=_in_new_process, args=arguments, daemon=True))
            self.processes[-1].start()

    def wait(self) -> list[Result]:
        deadline = time.monotonic() + TIMEOUT
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        stuck = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for process in self.processes:
            process.kill()
        output = [[path.read_text("utf-8") for path in files] for files in self.files]
        assert not stuck, f"processes {stuck} did not end: {output}"
        return [Result(process.exitcode, *texts) for process, texts in zip(self.processes, output)]


def _in_new_process(function, args, environment: dict[str, str], out: Path, err: Path):
    os.chdir(ROOT)
    os.environ.update(environment)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
        stream.reconfigure(encoding="utf-8")
    function(*args)


def run_stage(patch, script: str, *flags):
    """A stage script, after `patch`, a function that may change the project."""
    hurry()
    if patch:
        patch()
    sys.argv = [script, *map(str, flags)]
    runpy.run_path(script, run_name="__main__")


@pytest.fixture
def start(tmp_path_factory):
    """start(script, *flags, patch=None, processes=1) runs a script in new processes; .wait() gives their results."""

    def start_processes(script: str, *flags, patch=None, processes: int = 1) -> Processes:
        return Processes(tmp_path_factory.mktemp("run"), run_stage, patch, script, *flags, processes=processes)

    return start_processes
