"""What a model computes on: the device that --device names, and the memory that a CPU keeps."""

import ctypes
import os
import shutil
import sys

import torch

from base.cli import UserError
from base.packages import torch_command, untested_versions
from model.operators import try_flash

NOTES = "JIEZI_NOTES"  # in the environment, for all processes of a command: "due" or "given"


def choose_device(name: str, local_rank: int = 0, processes: int = 1) -> torch.device:
    """The torch device of --device. UserError if torch or this machine does not have it, or cannot compute on it."""
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
        if name == "mps" and processes > 1:
            name = "cpu"
        if name == "cpu" and (shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia")):
            os.environ.setdefault(NOTES, "due")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "mps") and device.index is None:
            device = torch.device(name, local_rank)
        if device.type == "meta" or (device.type == "cpu" and device.index):
            raise RuntimeError("there is no such device")
        if device.type == "mps" and processes > 1:
            raise RuntimeError("only one process can use a Mac's GPU; several compute with --device cpu")
        run_a_kernel(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if "no kernel image" in reason:
            reason += f"; a build of torch that has them: {torch_command()}"
        raise UserError(f"--device {name}: {reason}") from None
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its masked backward can give NaN (pytorch issue 196678)
        try_flash(device)
    return device


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies to a device: to an NVIDIA or AMD GPU without waiting for it, from pinned memory, which torch keeps until
    the copy is made. On a Mac, a copy that is not waited for reads memory that is freed (pytorch issue 189690)."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def run_a_kernel(device: torch.device):
    """A build of torch may see a GPU, and allocate on it, without having any code for it."""
    torch.ones(2, device=device).sum().item()


def print_notes():
    """Prints, once per command, that a GPU is not used although there is a driver for one, and which packages are not
    of a tested version.

    On standard output, and after a run's report: an error stays the first line of standard error.
    """
    note = os.environ.get(NOTES)
    if note == "given":
        return
    os.environ[NOTES] = "given"
    if note == "due" and torch.version.cuda:
        print(
            f"no GPU found, although torch is built for CUDA {torch.version.cuda}: computing on the CPU, which is many "
            "times slower; check `nvidia-smi` and the driver's version, or give --device cpu"
        )
    elif note == "due":
        print(
            "the GPU is not used, because this torch is built for CPUs: computing on the CPU, which is many times "
            f"slower; a torch for the GPU: {torch_command()}"
        )
    if versions := untested_versions():
        print(f"not the versions that are tested: {', '.join(versions)}; constraints.txt has the tested ones")


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
