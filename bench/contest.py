"""Contestants that take turns, call by call, so that a change in the machine's speed meets all of them."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.checkpoint import save_model
from model.device import keep_freed_memory
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training.machine import Machine, matmul_rate

TOKENIZER = Path(__file__).parents[1] / "model/tokenizer"  # of all models measured
PAUSE = 0.3  # seconds between calls: threads wait busily for more work for a while


def cpu_machine() -> Machine:
    """This process alone, its memory kept as in training."""
    keep_freed_memory()
    return Machine(0, 1, torch.device("cpu"), torch.float32)


def measure_each(model: Path | None, presets: list[str], measure: Callable[[str, Path], None]):
    """measure(name, folder) of `model`, or else of a model of random weights for each preset."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    if model:
        measure(model.name, model)
        return
    for preset in presets:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), CausalLM(LMConfig(**PRESETS[preset])), TOKENIZER)
            measure(preset, Path(folder))


class Turns(NamedTuple):
    """What was measured, by the contestant's name."""

    seconds: dict[str, list[float]]  # of each call
    memory: dict[str, float]  # peak of the process, GiB
    limits: list[float]  # the machine's limit, measured between the calls
    answers: dict[str, Any]  # of the last call


class Contest:
    """Each contestant is (build, argument, ...): build(argument, ...), called in a process of its own, gives its step.

    with Contest(contestants) as contest:
        turns = contest.take_turns(5)
    """

    def __init__(self, contestants: dict[str, tuple]):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = {}, []
        for name, (build, *arguments) in contestants.items():
            self.pipes[name], theirs = context.Pipe()
            process = context.Process(target=_step_when_asked, args=(theirs, build, arguments), daemon=True)
            process.start()
            self.processes.append(process)
            theirs.close()  # so that one that dies is noticed: recv() then ends in EOFError
        self.machine = cpu_machine()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self.pipes.values():
            pipe.close()
        for process in self.processes:
            process.join(timeout=10)
            process.terminate()

    def take_turns(
        self, turns: int, *arguments, names: Iterable[str] | None = None, limit: Callable[[], float] | None = None
    ) -> Turns:
        """Each of `names` (all, unless told) does step(*arguments) in every turn; the first turn is a warm-up.

        limit: measures what the machine can do at best; the rate of a plain matrix product, unless told.
        """
        names, limit = list(names or self.pipes), limit or (lambda: matmul_rate(self.machine))
        seconds, memory, limits, answers = {name: [] for name in names}, {}, [limit()], {}
        for turn in range(turns + 1):
            for name in names:
                self.pipes[name].send(arguments)
                duration, memory[name], answers[name] = self.pipes[name].recv()
                if turn:
                    seconds[name].append(duration)
                time.sleep(PAUSE)
            limits.append(limit())
        return Turns(seconds, memory, limits, answers)


def _step_when_asked(pipe, build: Callable, arguments: list):
    import resource  # not on Windows

    step = build(*arguments)
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:  # the contest is over
            return
        start = time.perf_counter()
        answer = step(*arguments)
        seconds = time.perf_counter() - start
        pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, answer))


def ratio(seconds: dict[str, list[float]], slower: str, faster: str) -> float:
    """How many times as fast `faster` was: the median over the turns."""
    return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster]))
