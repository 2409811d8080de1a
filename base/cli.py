"""The command line: user errors, exit statuses, types of flags, CPU cores, and commands to be typed again."""

import argparse
import importlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


class UserError(ValueError):
    """An error that the user can fix; the message is one line that says what, where, and what to do."""


LESS_MEMORY = "--batch_size auto finds what fits; --grad_checkpointing and a lower --max_seq_len make more fit"
# Compiled here because there may be no memory left when they are needed.
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|bad_alloc|failed to map segment", re.IGNORECASE)


def lacks_memory(error: Exception) -> bool:
    """Whether the error is about memory; each library has its own type for it."""
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None


def run(main: Callable[[], None], aftermath: str = "", less_memory: str = LESS_MEMORY):
    """Calls main(). A user's error ends in one line and exit status 2, a failure of the machine in one line and 1.

    Anything else is a bug and keeps its traceback. `aftermath` says what a failure leaves behind; `less_memory` names
    the flags that reduce memory.
    """
    aftermath = aftermath and f"; {aftermath}"
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open to the end
    try:
        main()
    except UserError as error:
        _exit(str(error), 2)
    except BrokenPipeError:
        forget_reader()
    except KeyboardInterrupt:  # during its steps a training run handles it itself
        _exit(f"interrupted{aftermath}", 130)
    except (MemoryError, RuntimeError, ImportError, OSError, FloatingPointError) as error:
        if lacks_memory(error):
            reason = str(error).splitlines()[:1] or ["allocation failed"]
            _exit(f"out of memory: {less_memory} ({reason[0]}){aftermath}", 1)
        if not isinstance(error, OSError | FloatingPointError):
            raise
        where = f"{error.filename}: " if getattr(error, "filename", None) else ""
        _exit(f"{where}{getattr(error, 'strerror', None) or error}{aftermath}", 1)


def _exit(message: str, status: int):
    if sys.flags.dev_mode:  # python -X dev shows the traceback
        raise
    rank = int(os.environ.get("RANK", 0))
    if rank:  # an error of all processes is printed by rank 0; torchrun then ends the others
        time.sleep(10)
        message = f"process {rank}: {message}"
    line = UNPRINTABLE.sub(" ", message)  # the message may quote a hostile file
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def forget_reader():
    """After a BrokenPipeError (the reader of our output, such as `head`, has ended): discards further output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def printable(text: str) -> str:
    """Replaces characters that control a terminal, except for newlines and tabs, by their escapes."""
    control = ("Cc", "Cf", "Cs")
    return "".join(
        ascii(letter)[1:-1] if unicodedata.category(letter) in control and letter not in "\n\t" else letter
        for letter in text
    )


def one_line(error: Exception) -> str:
    """The message of another library's error without its newlines."""
    return " ".join(str(error).split())


def number(kind: type, is_valid: Callable[[float], bool], words: str) -> Callable[[str], float]:
    """The type of a flag: a finite int or float for which is_valid holds; words: "must be ..."."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (is_valid(value) and value < math.inf):
            raise argparse.ArgumentTypeError(f"must be {words}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


positive = number(int, lambda value: value >= 1, "at least 1")
natural = number(int, lambda value: value >= 0, "at least 0")
not_negative = number(float, lambda value: value >= 0, "at least 0")
above_zero = number(float, lambda value: value > 0, "above 0")
fraction = number(float, lambda value: 0 <= value <= 1, "from 0 to 1")


def positive_or_auto(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def import_extra(name: str, requirements: str = "requirements/export.txt") -> ModuleType:
    """Imports a package of a requirements file. UserError with the pip command if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        command = f"pip install -r {requirements} -c constraints.txt"
        raise UserError(f"the package {name} is missing or broken ({error}): {command}") from None


def available_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def join_words(words: list[str]) -> str:
    """Quotes the words for the system's shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def python_command() -> str:
    """The command for this Python: `python`, or its path if `python` is another one or missing."""
    found = shutil.which("python")  # compared by folder: in a virtual environment both are links
    if found and Path(found).absolute().parent == Path(sys.executable).absolute().parent:
        return "python"
    return sys.executable.removeprefix(os.getcwd() + os.sep)


def command_line() -> str:
    """The command that started this script."""
    words = [python_command()]
    launched = any(word.startswith("--nproc_per_node") for word in sys.argv)  # by the script itself, not by torchrun
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not launched:
        processes = ["--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
        if (machines := os.environ.get("GROUP_WORLD_SIZE", "1")) != "1":  # to be run on each, with its other flags
            processes = ["--nnodes", machines, *processes]
        words = ["torchrun", *processes]
        if python_command() != "python":  # then torchrun is not on the PATH either
            words = [python_command(), "-m", "torch.distributed.run", *processes]
    return join_words([*words, *sys.argv])


def next_step(script: str, *words) -> str:
    """The last line of a command, which says what to type after it: a script beside the one that runs."""
    return "next: " + join_words([python_command(), str(Path(sys.argv[0]).with_name(script)), *map(str, words)])
