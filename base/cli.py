"""The command line: a user's mistakes, how a script ends, types of numbers, cores, and commands as one types them."""

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
    """Something that the user can mend; the message is one line that says what, where, and what to do."""


def _while_loading(kind: type[BaseException], *error):
    """Ctrl-C while a script still loads its modules, which takes seconds, is no bug that wants a traceback."""
    if kind is not KeyboardInterrupt or sys.flags.dev_mode:
        sys.__excepthook__(kind, *error)


sys.excepthook = _while_loading  # scripts import this before anything that is slow
LESS_MEMORY = "--batch_size auto finds what fits; --grad_checkpointing and a lower --max_seq_len make more fit"
# Compiled here, for there may be no memory left when they are needed.
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|bad_alloc|failed to map segment", re.IGNORECASE)


def lacks_memory(error: Exception) -> bool:
    """Whether that is what it says; each library has its own error for it."""
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None


def run(main: Callable[[], None], aftermath: str = "", less_memory: str = LESS_MEMORY):
    """Calls main(). A user's mistake ends in one line and exit status 2, a failure of the machine in one line and 1.

    Anything else is a bug, and keeps its traceback. `aftermath` says what a failure has left behind; `less_memory`
    which flags make the script take less.
    """
    aftermath = aftermath and f"; {aftermath}"
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # whoever started us has closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  to the end
    try:
        main()
    except UserError as error:
        _exit(str(error), 2)
    except BrokenPipeError:
        forget_reader()
    except KeyboardInterrupt:  # a training run answers it by itself while it takes steps
        _exit(f"interrupted{aftermath}", 130)
    except (MemoryError, RuntimeError, ImportError, OSError, FloatingPointError) as error:
        if lacks_memory(error):
            reason = str(error).splitlines()[:1] or ["nothing more can be allocated"]
            _exit(f"out of memory: {less_memory} ({reason[0]}){aftermath}", 1)
        if not isinstance(error, OSError | FloatingPointError):
            raise
        where = f"{error.filename}: " if getattr(error, "filename", None) else ""
        _exit(f"{where}{getattr(error, 'strerror', None) or error}{aftermath}", 1)


def _exit(message: str, status: int):
    if sys.flags.dev_mode:  # python -X dev shows the traceback
        raise
    rank = int(os.environ.get("RANK", 0))
    if rank:  # what is wrong in all processes one says, whose end ends the others: torchrun sees to it
        time.sleep(3)
        message = f"process {rank}: {message}"
    line = UNPRINTABLE.sub(" ", message)  # which may hold the words of a hostile file
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def forget_reader():
    """After a BrokenPipeError: what reads our words, such as `head`, has had enough; what follows goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def printable(text: str) -> str:
    """With escapes in the place of characters that would steer the terminal, but for line ends and tabs."""
    steers = ("Cc", "Cf", "Cs")
    return "".join(
        ascii(letter)[1:-1] if unicodedata.category(letter) in steers and letter not in "\n\t" else letter
        for letter in text
    )


def one_line(error: Exception) -> str:
    """What it says, for a message of ours: other people's errors have line ends in them."""
    return " ".join(str(error).split())


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def positive_or_auto(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def natural(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return int(text)


def not_negative(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return float(text)


def above_zero(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return float(text)


def import_extra(name: str, requirements: str = "requirements/export.txt") -> ModuleType:
    """A package of that requirements file. UserError, with the command, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        command = f"pip install -r {requirements} -c constraints.txt"
        raise UserError(f"the package {name} is missing or broken ({error}): {command}") from None


def available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def join_words(words: list[str]) -> str:
    """One line that the system's shell takes apart into these words again."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def python_command() -> str:
    """How to type the Python that runs this: `python`, or its path where that word means another one or none."""
    found = shutil.which("python")  # compared by folder: in a virtual environment both are links to another's Python
    if found and Path(found).absolute().parent == Path(sys.executable).absolute().parent:
        return "python"
    return sys.executable.removeprefix(os.getcwd() + os.sep)


def command_line() -> str:
    """The command that started this script, to be typed again."""
    words = [python_command()]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        processes = ["--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
        if (machines := os.environ.get("GROUP_WORLD_SIZE", "1")) != "1":  # on each; torchrun's other flags as before
            processes = ["--nnodes", machines, *processes]
        words = ["torchrun", *processes]
        if python_command() != "python":  # then torchrun is not on the PATH either
            words = [python_command(), "-m", "torch.distributed.run", *processes]
    return join_words([*words, *sys.argv])
