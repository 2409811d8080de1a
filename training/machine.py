"""The processes of a run and what they compute on."""

import argparse
import atexit
import contextlib
import ctypes
import importlib
import math
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from base.cli import UserError, available_cores
from model.operators import card_capability


def all_reduce(tensor: Tensor):
    """Adds up the tensors of all processes, in place."""
    with _waiting_for_others():
        dist.all_reduce(tensor)


@contextlib.contextmanager
def _waiting_for_others():
    """ConnectionError in place of what torch says when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"another process of this run has ended; go on with --resume ({reason})") from None


@dataclass
class Machine:
    """Which of the processes this one is, and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer are float32
    shards: bool = False  # whether the model is spread over the processes (training/shard.py)

    def making_model(self):
        """A context: with --shard one process makes the weights, and sends the others their part (shard.place)."""
        return torch.device("meta") if self.shards and self.rank else contextlib.nullcontext()

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small gradients in float16's range; does nothing for other formats."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        scaler.scale(torch.zeros((), device=self.device))  # which makes its state, for a process without a row too
        return scaler

    def random_state(self) -> Tensor:
        """Of the CPU, and then of the card: bytes."""
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return torch.cat(states)

    def set_random_state(self, state: Tensor):
        """What random_state gave, here or on a machine without a card."""
        size = len(torch.get_rng_state())
        torch.set_rng_state(state[:size])
        if self.device.type == "cuda" and len(state) > size:
            torch.cuda.set_rng_state(state[size:], self.device)

    def share(self, rows: np.ndarray, batch_size: int) -> list[tuple[np.ndarray, bool]]:
        """This process's part of the rows, a batch at a time, and whether it counts.

        With --shard every pass needs all processes: one that has fewer batches takes a row again, which does not count.
        """
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        mine = [(batch, True) for batch in batches[self.rank :: self.world_size]]
        if self.shards and len(mine) < len(batches[:: self.world_size]):
            mine.append((rows[:1], False))
        return mine

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up the tensors of all processes, in place."""
        if self.world_size > 1:
            all_reduce(tensor)
        return tensor

    def gather(self, value) -> list:
        """The values of all processes, in the order of their ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with _waiting_for_others():
                dist.all_gather_object(values, value)
        return values

    def add_up(self, counts: Counter) -> Counter:
        """The counts of all processes, by name."""
        total = Counter()
        for part in self.gather(counts):
            total.update(part)
        return total


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """UserError when torch does not know, or this machine does not have, the device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        if device.type == "meta" or (device.type == "cpu" and device.index):
            raise RuntimeError("there is no such device")
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # its masked backward can give NaN (pytorch issue 196678)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def warn_of_unused_gpu(requested: str, device: torch.device):
    """One line on standard error if --device auto took the CPU where an NVIDIA driver is installed and torch has CUDA.

    Call it when nothing can be refused any more. A command and all processes that it starts print it once.
    """
    has_driver = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia")
    unused = requested == "auto" and device.type == "cpu" and torch.version.cuda and has_driver
    if unused and not os.environ.get("JIEZI_WARNED_OF_GPU"):
        os.environ["JIEZI_WARNED_OF_GPU"] = "1"
        print(
            f"no GPU found, although torch is built for CUDA {torch.version.cuda}: computing on the CPU, which is many "
            "times slower; check `nvidia-smi` and the driver's version, or give --device cpu",
            file=sys.stderr,
        )


def keep_freed_memory():
    """Has glibc keep freed memory for the next step, which wants the same sizes: to give it back to the system and get
    it anew, page by page, takes a tenth of a CPU's training step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation has a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def return_freed_memory():
    """Has glibc give freed memory back. With --shard layers come and go, of which one seldom fits in the gaps that
    another left: a process would grow as large as one that holds the whole model."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is larger has a mapping of its own, always


def start_machine(args: argparse.Namespace) -> Machine:
    """Joins the other processes when torchrun started this one, and chooses device and number format."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.shard and world_size == 1:
        raise UserError("--shard spreads a model over several processes: torchrun --nproc_per_node N SCRIPT --shard")
    device = choose_device(args.device, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        return_freed_memory() if args.shard else keep_freed_memory()
        torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if world_size > 1:
        # torch's optimizers import this anyway. Imported when there is a group, it holds it beyond its end; and gloo's
        # threads, which nobody joins then, may let go of a tensor while Python is ending: that aborts the process.
        importlib.import_module("torch._dynamo")
        if device.type == "cuda" and dist.is_nccl_available():  # objects go over gloo, and not through the card
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:  # a CPU; or Windows, which has no NCCL
            dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    capability = card_capability(device)
    dtype = auto_dtype(name, capability) if args.dtype == "auto" else getattr(torch, args.dtype)
    if dtype == torch.float32 and capability >= (8, 0) and not args.compile:
        torch.set_float32_matmul_precision("high")  # TF32; a router is exempt (operators.exact_linear)
    if args.compile and device.type == "cuda" and not torch.utils._triton.has_triton():
        raise UserError("--compile needs Triton, which this torch does not find (Windows has none); leave it out")
    torch.manual_seed(args.seed)
    return Machine(int(os.environ.get("RANK", 0)), world_size, device, dtype, args.shard)


def auto_dtype(card: str, capability: tuple[int, int]) -> torch.dtype:
    """The number format of matrix products that suits a card, by its name and compute capability; ("", (0, 0)): none.

    bfloat16 before 8.0 is emulated: "supported", and slow. float16 is fast from 7.0 on, which brought tensor cores, but
    for the GTX 16xx, which have none, and of which NaNs are known (pytorch issue 77955).
    """
    if capability >= (8, 0):
        return torch.bfloat16
    if capability >= (7, 0) and "GTX 16" not in card:
        return torch.float16
    return torch.float32


def matmul_rate(machine: Machine, size: int | None = None) -> float:
    """The machine's peak: floating-point operations per second of a square matrix product, best of at most ten.

    A GPU queues twenty at a time, so that the launches are not measured, and starts slowly. A CPU gets a third of a
    second: a smaller product reaches its peak.
    """
    on_gpu = machine.device.type == "cuda"
    size = size or (2048 if on_gpu else 1536)
    queued, seconds = (20, 5.0) if on_gpu else (1, 0.3)
    a = b = torch.ones(size, size, device=machine.device, dtype=machine.dtype)  # no random number is drawn
    best, end = math.inf, time.perf_counter() + seconds
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(queued):
            product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, (time.perf_counter() - start) / queued)
        if time.perf_counter() > end:
            break
    return 2 * size**3 / best
