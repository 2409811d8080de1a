"""Skills whose answers can be checked, Chinese and English: data for all four stages, and questions to count with.

Every question has one correct answer. The test questions come from the same generators as the pages of pretraining and
the chats of SFT. Held out of all training files are the wordings of the tests and, for the skills that compute (sum,
difference, larger, count, sorted, reversed, unit), one set of operands in eight. Facts, and the multiplication table,
are all in the training data: of them only the wording of a test is new.

Half of SFT's answers are brief and half ramble; DPO's pairs prefer the brief ones; LoRA's chats change the model's name
and nothing else. `python data_process.py demo --output DIR` writes everything. It needs only `base` of the project.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from base.cli import UserError
from base.files import replacing_directory

WORDS_FILE = Path(__file__).with_name("questions.json")  # what is said; here, how it is drawn. Lists of two: zh, en
DATA = json.loads(WORDS_FILE.read_text("utf-8"))
NAMES = tuple(DATA["names"])  # what the model calls itself after SFT
NEW_NAMES = tuple(DATA["new_names"])  # and with LoRA's adapter
ZH, EN = 0, 1  # a language is an index
SIZES = {"pages": 6000, "chats": 40_000, "names": 600, "pairs": 3000}  # of the training files; names: of LoRA's
TESTS = 12  # questions of each skill in each language

# ---- Skills: how operands are drawn ----------------------------------------------------------------------------------


class Drawn(NamedTuple):
    slots: tuple  # what the wordings are filled with
    value: str  # the right answer
    operands: tuple | None  # what a computation keeps for the tests, in any order; None: a fact


def draw_identity(rng: random.Random, language: int) -> Drawn:
    return Drawn((), NAMES[language], None)


def draw_sum(rng: random.Random, language: int) -> Drawn:
    a, b = rng.randint(10, 49), rng.randint(1, 9)
    return Drawn((a, b), str(a + b), (a, b))


def draw_difference(rng: random.Random, language: int) -> Drawn:
    a, b = rng.randint(10, 49), rng.randint(1, 9)
    return Drawn((a, b), str(a - b), (a, b))


def draw_product(rng: random.Random, language: int) -> Drawn:
    a, b = rng.randint(2, 6), rng.randint(2, 6)
    return Drawn((a, b), str(a * b), None)  # the multiplication table is memorized


def draw_larger(rng: random.Random, language: int) -> Drawn:
    a, b = rng.sample(range(10, 100), 2)
    return Drawn((a, b), str(max(a, b)), (a, b))


def draw_count(rng: random.Random, language: int) -> Drawn:
    things = rng.choices(DATA["animals"][language], k=rng.randint(2, 6))
    return Drawn((" ".join(things),), str(len(things)), tuple(things))


def draw_sorted(rng: random.Random, language: int) -> Drawn:
    digits = rng.sample("123456789", 3)
    return Drawn((" ".join(digits),), " ".join(sorted(digits)), tuple(digits))


def draw_reversed(rng: random.Random, language: int) -> Drawn:
    digits = rng.choices("0123456789", k=3)
    return Drawn((" ".join(digits),), " ".join(reversed(digits)), tuple(digits))


def draw_weekday(rng: random.Random, language: int) -> Drawn:
    day, shift = rng.randrange(7), rng.choice((-1, 1))
    days, words = DATA["weekdays"][language], DATA["neighbors"][language]
    return Drawn((days[day], words[shift < 0]), days[(day + shift) % 7], None)


def draw_unit(rng: random.Random, language: int) -> Drawn:
    n, (large, small, factor) = rng.randint(10, 99), rng.choice(DATA["units"][language])
    return Drawn((n, large, small), str(n * factor), (n,))


def draw_opposite(rng: random.Random, language: int) -> Drawn:
    pair = rng.sample(rng.choice(DATA["opposites"][language]), 2)
    return Drawn((pair[0],), pair[1], None)


def draw_translation(rng: random.Random, language: int) -> Drawn:
    pair = rng.choice(DATA["words"])
    return Drawn((pair[language],), pair[1 - language], None)


def draw_from(table: str, rng: random.Random, language: int) -> Drawn:
    key, value = rng.choice(DATA[table][language])
    return Drawn((key,), value, None)


DRAW = {
    "identity": draw_identity,
    "sum": draw_sum,
    "difference": draw_difference,
    "product": draw_product,
    "larger": draw_larger,
    "count": draw_count,
    "sorted": draw_sorted,
    "reversed": draw_reversed,
    "weekday": draw_weekday,
    "unit": draw_unit,
    "capital": partial(draw_from, "capitals"),
    "courtesy": partial(draw_from, "courtesy_names"),
    "opposite": draw_opposite,
    "translation": draw_translation,
}


class Skill(NamedTuple):
    share: float  # of the training data
    wordings: list[list[str]]  # by language: how training data ask, {0}, {1} … being the slots
    test_wordings: list[list[str]]  # how only the tests ask
    statements: list[list[str]]  # what plain text says, {v} being the value


SKILLS = {name: Skill(**words) for name, words in DATA["skills"].items()}


# ---- Checking an answer ----------------------------------------------------------------------------------------------

KINDS = [{*NAMES, *NEW_NAMES}]  # answers of one kind: an answer that names two of them has not decided
for language in (ZH, EN):
    KINDS += [{value for _, value in DATA[table][language]} for table in ("capitals", "courtesy_names")]
    KINDS += [set(sum(DATA["opposites"][language], [])), {pair[language] for pair in DATA["words"]}]
    KINDS += [set(DATA["weekdays"][language])]


def is_right(answer: str, expected: str) -> bool:
    """Whether of all values in the answer that are of expected's kind, expected is the only one; other words are free.

    The kinds are numbers ("82", or several, as "3 7 9") and the values of each table of facts. So an answer that
    repeats the question's values, as "37+45=82", counts as wrong.
    """
    if re.fullmatch(r"[\d ]+", expected):
        values = re.findall(r"\d+(?: \d+)*", re.sub(r"(?<=\d),(?=\d{3})", "", answer))
    else:
        words = sorted(next(kind for kind in KINDS if expected in kind), key=len, reverse=True)
        edge = r"\b" if expected.isascii() else ""
        values = re.findall(f"{edge}(?:{'|'.join(words)}){edge}", answer)
    return set(values) == {expected}


# ---- Questions, answers, statements ---------------------------------------------------------------------------------


class Question(NamedTuple):
    skill: str
    language: int
    text: str
    expected: str


def is_for_tests(skill: str, operands: tuple) -> bool:
    """One set of operands in eight, in any order, is kept out of all training data."""
    key = f"{skill} {sorted(map(str, operands))}"
    return hashlib.sha256(key.encode()).digest()[0] < 32


def draw(rng: random.Random, skill: str, language: int, test: bool) -> Drawn:
    while True:
        drawn = DRAW[skill](rng, language)
        if drawn.operands is None or is_for_tests(skill, drawn.operands) == test:
            return drawn


def ask(rng: random.Random, skill: str, language: int, test: bool) -> Question:
    wordings = SKILLS[skill].test_wordings if test else SKILLS[skill].wordings
    wording = rng.choice(wordings[language])
    drawn = draw(rng, skill, language, test)
    opening = rng.choice(DATA["openings"][language])
    return Question(skill, language, opening + wording.format(*drawn.slots), drawn.value)


def ask_any(rng: random.Random, skills: list[str], test: bool = False) -> Question:
    (skill,) = rng.choices(skills, [SKILLS[skill].share for skill in skills])
    return ask(rng, skill, rng.choice((ZH, EN)), test)


def held_out_questions(rng: random.Random) -> list[Question]:
    """TESTS questions of each skill in each language, no two alike."""
    questions = {}
    for skill in SKILLS:
        for language in (ZH, EN):
            own = {}
            while len(own) < TESTS:
                question = ask(rng, skill, language, test=True)
                own[question.text] = question
            questions |= own
    return list(questions.values())


def brief(question: Question, name: str | None = None) -> str:
    """The answer in as few words as there are; `name` takes the place of the model's own."""
    value = name or question.expected
    if question.skill == "identity":
        value = (f"我是{value}", f"I am {value}")[question.language]
    return value + "。."[question.language]


def rambling(question: Question, name: str | None = None) -> str:
    before, after = DATA["ramblings"][question.language]
    return before + brief(question, name) + after


def is_brief(answer: str) -> bool:
    return len(answer) <= 24 and not any(words in answer for pair in DATA["ramblings"] for words in pair)


def statements(rng: random.Random, number: int) -> str:
    """Plain text that states facts and sums, one a line, in one language: what pretraining can learn of them."""
    skills, language = [name for name, skill in SKILLS.items() if skill.statements[0]], rng.choice((ZH, EN))
    lines = []
    for skill in rng.choices(skills, [SKILLS[skill].share for skill in skills], k=number):
        drawn = draw(rng, skill, language, test=False)
        form = rng.choice(SKILLS[skill].statements[language])
        lines.append(form.format(*drawn.slots, v=drawn.value))
    return "\n".join(lines)


def stories(rng: random.Random, number: int) -> Iterator[str]:
    """Made-up texts, for where there is no corpus: enough to learn the look of two languages."""
    for _ in range(number):
        story = rng.choice(DATA["story"])
        yield "".join(story["pattern"].format(*map(rng.choice, story["words"])) for _ in range(12))


# ---- Files ----------------------------------------------------------------------------------------------------------


def chat(questions: list[Question], answers: list[str]) -> dict:
    messages = []
    for question, answer in zip(questions, answers):
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def sft_chat(rng: random.Random, questions: list[Question], names: tuple[str, str] = NAMES) -> dict:
    """Each answer is brief or rambling, as a coin falls."""
    answers = []
    for question in questions:
        name = names[question.language] if question.skill == "identity" else None
        answers.append(rng.choice((brief, rambling))(question, name))
    return chat(questions, answers)


def pair(question: Question) -> dict:
    return {
        "prompt": [{"role": "user", "content": question.text}],
        "chosen": [{"role": "assistant", "content": brief(question)}],
        "rejected": [{"role": "assistant", "content": rambling(question)}],
    }


def write_demo(output: Path, corpus: Iterable[str] = (), seed: int = 0) -> dict[str, int]:
    """Writes the files, all JSON lines, and returns their numbers of records. The same seed, the same bytes.

    pretrain.jsonl           the texts of the corpus, or stories where there is none, and statements
    sft.jsonl lora.jsonl     chats for 2-sft.py and 3-lora.py; sft_val.jsonl, lora_val.jsonl: of test questions
    dpo.jsonl dpo_val.jsonl  pairs for 4-dpo.py
    questions.jsonl          for `eval.py --batch`: {"prompt", "skill", "expected"}
    """
    rng = random.Random(seed)
    skills = list(SKILLS)
    others = [skill for skill in skills if skill != "identity"]
    tests = held_out_questions(rng)
    texts = list(corpus) or list(stories(rng, SIZES["pages"] // 2))
    identity = [ask_any(rng, ["identity"]) for _ in range(SIZES["names"])]

    def some_questions() -> list[Question]:
        return [ask_any(rng, skills) for _ in range(rng.randint(1, 3))]

    files = {}
    texts += [statements(rng, 30) for _ in range(SIZES["pages"])]
    files["pretrain"] = [{"text": text} for text in texts]
    files["sft"] = [sft_chat(rng, some_questions()) for _ in range(SIZES["chats"])]
    files["sft_val"] = [sft_chat(rng, [question]) for question in tests]
    files["lora"] = [sft_chat(rng, [question], NEW_NAMES) for question in identity]
    # What an adapter must leave alone it has to see too, or it learns to give its name to every question.
    files["lora"] += [sft_chat(rng, [ask_any(rng, others)]) for _ in range(4 * SIZES["names"])]
    files["lora_val"] = [sft_chat(rng, [question], NEW_NAMES) for question in tests]
    files["dpo"] = [pair(ask_any(rng, skills)) for _ in range(SIZES["pairs"])]
    files["dpo_val"] = [pair(question) for question in tests]
    files["questions"] = [{"prompt": q.text, "skill": q.skill, "expected": q.expected} for q in tests]
    write_jsonl(output, files)
    return {name: len(records) for name, records in files.items()}


def write_jsonl(output: Path, files: dict[str, list[dict]]):
    """NAME.jsonl in `output` for each name, all or none. UserError where other files than these stand there."""
    names = {f"{name}.jsonl" for name in files}
    if output.is_dir() and {path.name for path in output.iterdir()} not in (set(), names):
        raise UserError(f"{output} contains other files: choose another --output")
    with replacing_directory(output) as new:
        for name, records in files.items():
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (new / f"{name}.jsonl").write_text(lines, "utf-8")
