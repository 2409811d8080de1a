"""What a model computes on: the device that --device names, and the memory that a CPU keeps."""

import ctypes
import os
import shutil
import sys

import torch

from base.cli import UserError

GPU_NOTE = "JIEZI_GPU_NOTE"  # in the environment, for all processes of a command: "due" or "given"


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device of --device. UserError if torch or this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        has_driver = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia")
        if name == "cpu" and torch.version.cuda and has_driver:
            os.environ.setdefault(GPU_NOTE, "due")
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


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies to a device: to an NVIDIA or AMD GPU without waiting for it, from pinned memory, which torch keeps until
    the copy is made. On a Mac, a copy that is not waited for reads memory that is freed (pytorch issue 189690)."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def note_unused_gpu():
    """Prints one line, once per command, if choose_device took the CPU although torch and a driver are for a GPU.

    On standard output, and after a run's report: an error stays the first line of standard error.
    """
    if os.environ.get(GPU_NOTE) == "due":
        os.environ[GPU_NOTE] = "given"
        print(
            f"no GPU found, although torch is built for CUDA {torch.version.cuda}: computing on the CPU, which is many "
            "times slower; check `nvidia-smi` and the driver's version, or give --device cpu"
        )


def keep_freed_memory():
    """Makes glibc keep freed memory for the next step, which allocates the same sizes: returning it to the system and
    getting it again, page by page, takes a tenth of a CPU's training step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation has a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def return_freed_memory():
    """Makes glibc return freed memory to the system. With --shard, layers are allocated and freed in turn and seldom
    fit into each other's gaps: a process would grow as large as one with the whole model."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is larger always has a mapping of its own
