"""The processes of a run and what they compute on."""

import argparse
import atexit
import contextlib
import ctypes
import math
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from base.cli import UserError, available_cores


@dataclass
class Machine:
    """Which of the processes this one is, and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer are float32

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up the tensors of all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value) -> list:
        """The values of all processes, in the order of their ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """UserError when torch does not know, or this machine does not have, the device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def keep_freed_memory():
    """Has glibc keep freed memory for the next step, which wants the same sizes: to give it back to the system and get
    it anew, page by page, takes a tenth of a CPU's training step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation has a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def start_machine(args: argparse.Namespace) -> Machine:
    """Joins the other processes when torchrun started this one, and chooses device and number format."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    dtype = args.dtype
    if dtype == "auto":  # bfloat16 before compute capability 8.0 is emulated: "supported", and slow
        dtype = "float32"
        if device.type == "cuda":
            dtype = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    torch.manual_seed(args.seed)
    return Machine(int(os.environ.get("RANK", 0)), world_size, device, getattr(torch, dtype))


def matmul_rate(machine: Machine, size: int = 2048) -> float:
    """The machine's limit: floating-point operations a second of a plain square matrix product, best of ten."""
    a = b = torch.ones(size, size, device=machine.device, dtype=machine.dtype)  # no random number is drawn
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
