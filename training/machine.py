"""The processes of a run (data parallel, over torch.distributed) and the device that each computes on."""

import atexit
import contextlib
import importlib
import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from base.cli import LESS_MEMORY, UserError, available_cores
from model.device import choose_device, keep_freed_memory, return_freed_memory
from model.operators import card_capability

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def all_reduce(tensor: Tensor):
    """Sums the tensors of all processes, in place."""
    with _waiting_for_others():
        dist.all_reduce(tensor)


def all_gather(mine: Tensor) -> Tensor:
    """The tensors of all processes, which are of one size, end to end."""
    result = mine.new_empty(dist.get_world_size(), *mine.shape)
    with _waiting_for_others():
        dist.all_gather([*result], mine.contiguous())
    return result.flatten(0, 1)


@contextlib.contextmanager
def _waiting_for_others():
    """ConnectionError in place of torch's error where another process has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"another process of this run has ended; continue with --resume ({reason})") from None


class StopRequest:
    """Inside `with`, these signals ask the loop to save and leave; a later one ends the process at once.

    A second signal within a second is the same request, which a launcher passes on to processes that have it already.
    SIGHUP stays ignored under nohup.
    """

    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __init__(self):
        self.made = False
        self.number = 0  # of the signal
        self.time = 0.0  # when it came
        self.before = {}  # handlers by signal

    def __enter__(self):
        under_nohup = {number for number in self.SIGNALS[2:] if signal.getsignal(number) == signal.SIG_IGN}
        self.before = {number: signal.signal(number, self._ask) for number in {*self.SIGNALS} - under_nohup}
        return self

    def _ask(self, number: int, frame):
        if not self.made:
            self.made, self.number, self.time = True, number, time.monotonic()
        elif time.monotonic() > self.time + 1:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *exception):
        self.made = False
        for number, handler in self.before.items():
            signal.signal(number, handler)


@dataclass
class Machine:
    """This process among those of the run, and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer are float32
    shards: bool = False  # --shard: whether the model is sharded over the processes (training/shard.py)
    compiles: bool = False  # whether torch.compile is in use (training/compiling.py)
    stop: StopRequest = field(default_factory=StopRequest)

    def init_device(self) -> torch.device:
        """Where a new model's weights are initialized: with --shard only rank 0 does, and sends the others theirs."""
        return torch.device("meta" if self.shards and self.rank else "cpu")

    def leaves_early(self) -> bool:
        """Whether a signal has asked this process to stop. With --shard the others need it in each pass: it goes on."""
        return self.stop.made and not self.shards

    def eager(self):
        """A context without torch.compile, for passes that are too few to compile the model for them as well."""
        return torch.compiler.set_stance("force_eager") if self.compiles else contextlib.nullcontext()

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small gradients in float16's range (mixed precision); does nothing for other dtypes."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        scaler.scale(torch.zeros((), device=self.device))  # creates its state, also in a process without a row
        return scaler

    def random_state(self) -> Tensor:
        """Of the CPU, then of the GPU: bytes."""
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state())
        return torch.cat(states)

    def set_random_state(self, state: Tensor):
        """Restores a random_state(), also one of a machine without a GPU."""
        size = len(torch.get_rng_state())
        torch.set_rng_state(state[:size])
        if self.device.type != "cpu" and len(state) > size:
            torch.get_device_module(self.device).set_rng_state(state[size:])

    def rank_rows(self, rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
        """This process's micro-batches of the rows.

        With --shard every forward pass needs all processes: one that has a batch less gets an empty one at the end.
        """
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        mine = batches[self.rank :: self.world_size]
        if self.shards and len(mine) < len(batches[:: self.world_size]):
            mine.append(rows[:0])
        return mine

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums the tensors of all processes, in place."""
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

    def sum_counters(self, counts: Counter) -> Counter:
        """The sums of the counts of all processes, by name."""
        total = Counter()
        for part in self.gather(counts):
            total.update(part)
        return total


def launch(processes: int):
    """Runs this script in so many processes, as `torchrun --standalone --nproc_per_node` does, and ends with their
    exit status. Unlike torchrun it adds no traceback to a failure, and lets a run save for ten minutes."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds from SIGTERM to SIGKILL; else 30
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else torchrun warns; start_machine sets the number of threads
    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")  # torchrun asks for it, and torch for Windows is built without it
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    torchrun = importlib.import_module("torch.distributed.run")
    elastic = importlib.import_module("torch.distributed.elastic.multiprocessing")
    try:
        torchrun.main(["--standalone", "--nproc_per_node", str(processes), *sys.argv])
    except elastic.SignalException as stop:
        sys.exit(128 + stop.sigval)
    except elastic.errors.ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            sys.exit(failure.exitcode)
        print(
            f"error: process {rank} was ended by {failure.signal_name()}; if memory ran out: {LESS_MEMORY}",
            file=sys.stderr,
        )
        sys.exit(128 - failure.exitcode)
    sys.exit()


def start_machine(device: str, dtype: str, seed: int, shard: bool = False, compile: bool | None = None) -> Machine:
    """Joins the other processes if torchrun started this one, and chooses device and precision, as the flags say."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if shard and world_size == 1:
        raise UserError("--shard shards a model over several processes: give --nproc_per_node N too")
    if shard and TORCH < (2, 8):
        raise UserError(f"--shard needs torch 2.8 or newer, and this is {torch.__version__}")
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)), world_size)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    elif device.type == "cpu":
        return_freed_memory() if shard else keep_freed_memory()
        torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if world_size > 1:
        # torch's optimizers import this anyway. Imported while there is a process group, it keeps the group alive, and
        # gloo's threads with it; one that frees a tensor while Python is shutting down aborts the process.
        importlib.import_module("torch._dynamo")
        dist.init_process_group(backend(device), device_id=device if device.index is not None else None)
        atexit.register(dist.destroy_process_group)
    dtype = device_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    if dtype == torch.float32 and card_capability(device) >= (8, 0) and not compile:
        torch.set_float32_matmul_precision("high")  # TF32; a router is exempt (operators.exact_linear)
    torch.manual_seed(seed)
    return Machine(int(os.environ.get("RANK", 0)), world_size, device, dtype, shard)


def backend(device: torch.device) -> str:
    """Of the process group: a GPU's tensors go over its maker's library, all else, such as objects, over gloo."""
    if device.type == "cpu" or (device.type == "cuda" and not dist.is_nccl_available()):  # as on Windows
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def device_dtype(device: torch.device) -> torch.dtype:
    """auto_dtype of a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return auto_dtype(name, card_capability(device))


def auto_dtype(card: str, capability: tuple[int, int]) -> torch.dtype:
    """The precision of matrix products that suits a GPU, by its name and compute capability; ("", (0, 0)): no GPU.

    Before 8.0 bfloat16 is emulated: "supported", and slow. float16 is fast from 7.0 on, which brought tensor cores,
    except on the GTX 16xx, which have none and are known to give NaNs (pytorch issue 77955).
    """
    if capability >= (8, 0):
        return torch.bfloat16
    if capability >= (7, 0) and "GTX 16" not in card:
        return torch.float16
    return torch.float32


def matmul_rate(machine: Machine, size: int | None = None) -> float:
    """Peak FLOP/s: floating-point operations per second of a plain square matrix product, best of at most ten.

    Of random numbers: ones switch fewer transistors, so that a GPU at its power limit multiplies them a fifth faster.
    On a GPU four are queued at a time, so that the latency of a call is not measured. A CPU gets a third of a second:
    a smaller product reaches its peak.
    """
    on_gpu = machine.device.type != "cpu"
    size = size or (8192 if on_gpu else 1536)
    queued, seconds = (4, 2.0) if on_gpu else (1, 0.3)
    generator = torch.Generator(machine.device).manual_seed(0)  # its own: the run's random numbers stay as they are
    a = b = torch.randn(size, size, generator=generator, device=machine.device, dtype=machine.dtype)
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
