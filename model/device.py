"""What a model computes on: the device that --device names, and the memory that a CPU keeps."""

import ctypes
import sys

import torch

from base.cli import UserError

NO_CARD = "computing on the CPU, many times slower; look at `nvidia-smi` and the driver's version, or give --device cpu"


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """UserError when torch does not know, or this machine does not have, the device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cpu" and torch.version.cuda and local_rank == 0:
            print(f"no card found, though this torch is made for CUDA {torch.version.cuda}: {NO_CARD}", file=sys.stderr)
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
