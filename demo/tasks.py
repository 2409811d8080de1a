"""Questions for 5-grpo.py whose answers can be checked, and chats that teach a model two ways to answer them.

Of every kind of question a tenth of the operands is kept for the tests: the hash of a question's operands, in any
order, decides. The chats answer one half at once and the other with a trace, or with a call of the calculator; which of
the two is the better way they do not say: that is left for the rewards to find out.
"""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from demo.questions import write_jsonl
from engine.tools import calculator

SIZES = {"chats": 20_000, "questions": 10_000, "tests": 500}
CALCULATOR = calculator().schema


class Puzzle(NamedTuple):
    operands: tuple  # what a test keeps for itself, in any order
    slots: tuple  # what the wordings are filled with
    answer: str
    trace: str  # how to get there, a step a line
    extra: dict = {}  # what a reward needs beside the answer


def draw_sum(rng: random.Random) -> Puzzle:
    """Two numbers of three digits, column by column from the right: digit + digit + carry = sum."""
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    lines = []
    carry = 0
    for column in range(3):
        x, y = a // 10**column % 10, b // 10**column % 10
        lines.append(f"{x}+{y}+{carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    return Puzzle((a, b), (a, b), str(a + b), "\n".join(lines))


def draw_product(rng: random.Random) -> Puzzle:
    """Three digits times two: the second number's digits, one by one."""
    a, b = rng.randint(100, 999), rng.randint(11, 99)
    tens, ones = a * (b // 10) * 10, a * (b % 10)
    return Puzzle((a, b), (a, b), str(a * b), f"{a}*{b // 10}0={tens}\n{a}*{b % 10}={ones}\n{tens}+{ones}={a * b}")


def draw_count(rng: random.Random) -> Puzzle:
    """How often a letter stands in a word: the letters, one by one, with the count so far."""
    letters = rng.choices("abc", k=rng.randint(6, 12))
    wanted = rng.choice("abc")
    lines = []
    count = 0
    for letter in letters:
        count += letter == wanted
        lines.append(f"{letter} {count}")
    word = " ".join(letters)
    return Puzzle((word, wanted), (wanted, word), str(count), "\n".join(lines))


def draw_sorted(rng: random.Random) -> Puzzle:
    """Five numbers: the smallest of those that are left, again and again."""
    numbers = rng.sample(range(10, 100), 5)
    left, lines = list(numbers), []
    while left:
        lines.append(f"{' '.join(map(str, left))}: {min(left)}")
        left.remove(min(left))
    return Puzzle(tuple(numbers), (" ".join(map(str, numbers)),), " ".join(map(str, sorted(numbers))), "\n".join(lines))


def draw_countdown(rng: random.Random) -> Puzzle:
    """An expression of three numbers that has a given value; there may be several, so the reward computes it."""
    numbers = [rng.randint(2, 20) for _ in range(3)]
    expression = "{} {} {} {} {}".format(numbers[0], rng.choice("+-"), numbers[1], rng.choice("+-"), numbers[2])
    words = expression.split()
    first = numbers[0] + (numbers[1] if words[1] == "+" else -numbers[1])
    target = first + (numbers[2] if words[3] == "+" else -numbers[2])
    shuffled = rng.sample(numbers, 3)
    trace = f"{words[0]}{words[1]}{words[2]}={first}\n{first}{words[3]}{words[4]}={target}"
    slots = (" ".join(map(str, shuffled)), target)
    return Puzzle((*numbers, target), slots, str(target), trace, {"numbers": shuffled, "example": expression})


class Kind(NamedTuple):
    draw: Callable[[random.Random], Puzzle]
    wordings: tuple[str, ...]
    call: str = ""  # the calculator's expression, where the second way is a call and not a trace


KINDS = {
    "sums": Kind(draw_sum, ("{}加{}等于多少？", "{}+{}=?", "What is {} plus {}?")),
    "products": Kind(draw_product, ("{}乘{}等于多少？", "{}*{}=?", "What is {} times {}?"), call="{}*{}"),
    "counting": Kind(draw_count, ("{}在下面出现几次？{}", "How often is {} in {}?")),
    "sorting": Kind(draw_sorted, ("从小到大排列：{}", "Sort: {}")),
    "countdown": Kind(draw_countdown, ("用{}算出{}。", "Make from {} the number {}.")),
}


def is_test(puzzle: Puzzle) -> bool:
    operands = " ".join(sorted(map(str, puzzle.operands)))
    return hashlib.sha256(operands.encode()).digest()[0] < 26  # a tenth


def draw(rng: random.Random, kind: Kind, test: bool) -> Puzzle:
    while is_test(puzzle := kind.draw(rng)) != test:
        pass
    return puzzle


def question(rng: random.Random, kind: Kind, puzzle: Puzzle) -> dict:
    """A record for `data_process.py rl`."""
    record = {"prompt": rng.choice(kind.wordings).format(*puzzle.slots), "answer": puzzle.answer, **puzzle.extra}
    return record | ({"tools": [CALCULATOR]} if kind.call else {})


def chat(rng: random.Random, kind: Kind, puzzle: Puzzle, slow: bool) -> dict:
    """A record for `data_process.py sft`: the answer at once, or, slow, with a trace or a call of the calculator."""
    asked = question(rng, kind, puzzle)
    answer = puzzle.extra.get("example", puzzle.answer)
    messages = [{"role": "user", "content": asked["prompt"]}]
    if slow and kind.call:
        arguments = {"expression": kind.call.format(*puzzle.slots)}
        call = {"name": "calculator", "arguments": arguments}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "content": puzzle.answer})
    messages.append({"role": "assistant", "content": answer})
    if slow and not kind.call:
        messages[-1]["reasoning_content"] = puzzle.trace
    return {"messages": messages} | ({"tools": [CALCULATOR]} if kind.call else {})


def write_tasks(output: Path, seed: int = 0) -> dict[str, int]:
    """Writes for each kind, as JSON lines, and returns the numbers of records. The same seed, the same bytes.

    KIND_sft.jsonl           chats, one half of them at once, one half slow
    KIND_traces.jsonl        chats, all slow: what a teacher who knows would show
    KIND_rl.jsonl            questions with answers; KIND_rl_val.jsonl: of operands that are in no other file
    """
    written = {}
    for name, kind in KINDS.items():
        rng = random.Random(f"{seed}/{name}")
        chats = [chat(rng, kind, draw(rng, kind, test=False), slow=i % 2 == 1) for i in range(SIZES["chats"])]
        traces = [chat(rng, kind, draw(rng, kind, test=False), slow=True) for _ in range(SIZES["chats"])]
        questions = [question(rng, kind, draw(rng, kind, test=False)) for _ in range(SIZES["questions"])]
        tests = [question(rng, kind, draw(rng, kind, test=True)) for _ in range(SIZES["tests"])]
        files = {"sft": chats, "traces": traces, "rl": questions, "rl_val": tests}
        written |= {f"{name}_{suffix}": records for suffix, records in files.items()}
    write_jsonl(output, written)
    return {name: len(records) for name, records in written.items()}
