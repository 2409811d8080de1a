"""What several test files need: prepared data of a small made-up corpus, small models, and scripts in new processes."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
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
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from corpus.kinds import KINDS
from corpus.prepared import writing_prepared
from engine.generation import generate
from model.chat import BOS, EOS, encode, encode_chat, load_tokenizer
from model.LMConfig import LMConfig
from model.model import CausalLM
from training import log, loop, loss
from training.flags import parse_flags, run_settings
from training.machine import start_machine
from training.packing import open_data

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "model" / "tokenizer"
TIMEOUT = 300  # seconds after which a process is taken for stuck

# One thread a process: on a machine that has other work too, two threads wait for each other most of the time.
torch.set_num_threads(1)
os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # start_machine divides the cores by it
# The CPU's arithmetic is tested, also on a machine with a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("JIEZI_NOTES", "given")

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


def write_data(folder: Path, train: list, val: list, kind: str = "pretrain") -> Path:
    """A folder as data_process.py makes it. A sequence is a list of ids, or, unless kind is "pretrain", (ids, mask)."""
    group = len(KINDS[kind].titles)
    with writing_prepared(folder, kind, TOKENIZER, KINDS[kind].masked, group) as writer:
        for split, sequences in (("train", train), ("val", val)):
            for sequence in sequences:
                ids, mask = (sequence, []) if kind == "pretrain" else sequence
                writer.add(split, [(np.array(ids, writer.dtype).tobytes(), bytes(mask))])
    return folder


def hurry(setattr=setattr):
    """Takes the time out of the speed test and of drawing, which take seconds in every run."""
    setattr(loop, "matmul_rate", functools.partial(loop.matmul_rate, size=64))
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


def make_pairs(number: int) -> list:
    """Chats with masks, chosen and rejected in turn: the polite answer is the chosen one."""
    tokenizer, chats = load_tokenizer(TOKENIZER), []
    for i in range(number):
        question = {"role": "user", "content": f"{i % 7} 加 {i} 等于几？"}
        for answer in (f"您好，等于 {i % 7 + i}。", f"{i % 7 + i}，别烦我。" + "哼。" * (i % 5)):
            chats.append(encode_chat(tokenizer, [question, {"role": "assistant", "content": answer}]))
    return chats


def random_model(config: LMConfig, seed: int = 0) -> CausalLM:
    """With weights that are larger than at the start, so that a wrong one shows, and norms that are not 1."""
    torch.manual_seed(seed)
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model.eval()


def random_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(16, 6400, (rows, length), generator=torch.Generator().manual_seed(seed))


def sharp_model(config: LMConfig) -> CausalLM:
    """Larger weights than at the start, so that no two tokens are nearly equally probable."""
    torch.manual_seed(0)
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return model.eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(16, 6400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(model, prompts: list[list[int]], n: int, **options) -> list[list[int | None]]:
    """The tokens of each prompt."""
    return [list(tokens) for tokens in zip(*generate(model, prompts, n, temperature=0, **options))]


SHORT_RUN = [
    *"--preset tiny --max_seq_len 64 --eval_rows 2 --log_interval 1".split(),
    *"--optimizer adamw --learning_rate 1e-3 --warmup_steps 3".split(),
]


def signal_in_pass(call: int, number: signal.Signals):
    """Sends a signal to itself in this forward pass of training: within a step, before its update."""
    calls = 0
    next_token_loss = loss.next_token_loss

    def signalling_loss(model, batch):
        nonlocal calls
        calls += batch.split == "train"
        if calls == call and batch.split == "train":
            os.kill(os.getpid(), number)
        return next_token_loss(model, batch)

    loss.next_token_loss = signalling_loss


def assert_same_tensors(one: Path, other: Path, weights: str = "model.safetensors"):
    for name in (weights, "training_state/state.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys(), name
        different = [key for key in a if a[key].dtype != b[key].dtype or not a[key].equal(b[key])]
        assert not different, f"{name}: {different}"


SMALL_CONFIG = LMConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)


FIXED_WEIGHTS = ["--learning_rate", "1e-12", "--min_learning_rate", "1e-12"]  # every step sees the same model


ONCE = ["--log_interval", "1", "--eval_interval", "1000", "--save_interval", "1000", "--eval_rows", "2"]


class Observed(NamedTuple):
    """What train() did, update by update."""

    gradients: list[torch.Tensor]  # as the optimizer gets them, of all parameters
    weights: list[torch.Tensor]  # after the update
    all_reduces: list[int]  # so far


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def observe(data, out_dir, *flags, machine=None, loss_fn=loss.next_token_loss, metrics=(), model=None) -> Observed:
    seen, count = Observed([], [], []), [0]
    optimizer_step, all_reduce = loop.optimizer_step, dist.all_reduce

    def observed_step(optimizer, *rest):
        seen.gradients.append(flat(p.grad for p in model.parameters()))
        seen.all_reduces.append(count[0])
        norm = optimizer_step(optimizer, *rest)
        seen.weights.append(flat(model.parameters()))
        return norm

    def counted_all_reduce(*args, **kwargs):
        count[0] += 1
        return all_reduce(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["test", *map(str, flags)])
        hurry(patch.setattr)
        patch.setattr(loop, "optimizer_step", observed_step)
        patch.setattr(dist, "all_reduce", counted_all_reduce)
        args = parse_flags("", data=Path(data), out_dir=Path(out_dir), max_seq_len=96, warmup_steps=1)
        machine = machine or start_machine(args.device, args.dtype, args.seed)
        torch.manual_seed(args.seed)
        model = model or CausalLM(SMALL_CONFIG)
        train_set, val_set = open_data(args.data, args.mix, args.max_seq_len, "pretrain", "sft")
        run = loop.Run(run_settings(args), machine, model, train_set, metrics)
        validate = functools.partial(loss.evaluate, model, loss_fn, val_set, machine, run.batch_size)
        run.log_start(validate)
        with contextlib.suppress(SystemExit), run:  # SystemExit: a run that was stopped ends with it
            for rows in run.steps(args.batch_size * args.accumulation_steps * machine.world_size):
                run.forward_backward(loss_fn, run.batches(rows))
                run.update()
                run.log_step(validate)
    return seen


def records(out_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text("utf-8").splitlines()]


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md")])


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def snapshot(directory: Path) -> dict:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def saved_progress(out_dir: Path) -> dict:
    with safe_open(out_dir / "training_state/state.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["info"])["progress"]


def steps_of(out_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out_dir / "metrics.jsonl").read_text("utf-8").splitlines()]


def change_meta(folder, **changes):
    path = folder / "meta.json"
    values = json.loads(path.read_text("utf-8")) | {"sha256": None} | changes  # as before there were sums
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), "utf-8")
