"""Rewards that can be checked: a function of the answer and of the task, without a judge.

An answer counts only if it is one: the model ended it by itself, with at most one thought, which it closed, and no
other control token, but for calls of tools. What it says in its thoughts is not its answer.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

from base.cli import UserError
from base.files import load_module
from engine.generation import Sequence
from engine.session import Reply, last_turn, read_tokens
from engine.tools import calculate
from model.chat import ChatTokenizer

RewardFunction = Callable[[Reply, dict], float]  # (the answer, the task's note) -> from 0 to 1


def exact(reply: Reply, task: dict) -> float:
    """1 where the answer is the expected one, blanks and a full stop at the end aside."""
    return float(_plain(reply.content) == _plain(task["answer"]))


def number(reply: Reply, task: dict) -> float:
    """1 where the answer is one number, and within the task's `tolerance` (without one 1e-6) of the expected one."""
    found = re.fullmatch(r"[-+]?\d+(?:\.\d+)?", _plain(reply.content))
    if not found or not reply.content.isascii():
        return 0.0
    return float(abs(float(found[0]) - _value(task["answer"])) <= task.get("tolerance", 1e-6))


def pattern(reply: Reply, task: dict) -> float:
    """1 where the whole answer matches the regular expression that the task gives as its answer."""
    return float(re.fullmatch(task["answer"], reply.content.strip()) is not None)


def countdown(reply: Reply, task: dict) -> float:
    """1 where the answer is an expression with the value of the task's answer that uses each of its `numbers` once."""
    expression = reply.content.strip()
    if calculate(expression) != task["answer"]:  # before any number is read: they may have thousands of digits
        return 0.0
    return float(sorted(map(int, re.findall(r"\d+", expression))) == sorted(task["numbers"]))


REWARDS: dict[str, RewardFunction] = {f.__name__: f for f in (exact, number, pattern, countdown)}


def _plain(text: str) -> str:
    return text.strip().rstrip("。.").strip()


def _value(answer: str) -> float:
    """The number that a task expects, maybe written as 1,200. ValueError if it is none."""
    value = float(answer.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", answer) else answer)
    if not math.isfinite(value):
        raise ValueError("not a number")
    return value


def _tolerance(task: dict) -> float:
    """ValueError where it is no number from 0 on."""
    value = task.get("tolerance", 1e-6)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError("not a tolerance")
    return value


def _check_countdown(task: dict):
    """ValueError where no expression could be right: no whole numbers, or an answer that calculate() never writes."""
    numbers = task["numbers"]
    if not numbers or any(type(number) not in (int, float) or number % 1 or number < 0 for number in numbers):
        raise ValueError("not whole numbers")
    if calculate(task["answer"]) != task["answer"]:
        raise ValueError("not a number as it is computed")


NEEDS = {  # what a reward function reads of a task, so that it fails before training and not in the middle
    "number": lambda task: (_value(task["answer"]), _tolerance(task)),
    "pattern": lambda task: re.compile(task["answer"]),
    "countdown": _check_countdown,
}


def check_tasks(name: str, tasks: list[dict], where: str):
    """UserError names the first task that the reward function cannot judge, and how many there are."""
    failed = []
    for index, task in enumerate(tasks):
        try:
            NEEDS.get(name, bool)(task)
        except (ValueError, KeyError, TypeError, re.error):
            failed.append(index)
    if failed:
        raise UserError(
            f"{where}: --reward {name} cannot judge the answer {tasks[failed[0]].get('answer')!r} of task {failed[0]}, "
            f"nor {len(failed) - 1} more: correct the answers, or choose another --reward"
        )


def load_reward(name: str) -> RewardFunction:
    """One of REWARDS, or FILE.py:FUNCTION. UserError for anything else."""
    if name in REWARDS:
        return REWARDS[name]
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).exists():
        raise UserError(f"no reward is called {name}: it is {', '.join(REWARDS)}, or FILE.py:FUNCTION")
    module = load_module(Path(file), "reward")
    if not callable(getattr(module, function, None)):
        raise UserError(f"{file} has no function {function}")
    return getattr(module, function)


def read_reply(sequence: Sequence, tokenizer: ChatTokenizer) -> Reply | None:
    """The answer, if it keeps the rules above; else None, which has no reward."""
    tokens = sequence.tokens
    if sequence.finish_reason != "stop" or tokens[-1] != tokenizer.end_of_turn:
        return None
    turn = last_turn(tokens, tokenizer)
    before = sequence.prompt if len(turn) == len(tokens) else []
    opened = tokenizer.open_part(before)  # the part that is open
    thoughts = int(opened == "reasoning")
    for token in turn[turn[0] == tokenizer.start_of_turn : -1]:  # without its header and its end
        if opened is None and (part := tokenizer.opened_part(token)):
            opened = part
            thoughts += part == "reasoning"
        elif opened is not None and token == tokenizer.tags[opened][1]:
            opened = None
        elif token in tokenizer.control_ids:
            return None
    if opened is not None or thoughts > 1:
        return None
    return read_tokens(turn, tokenizer, before)
