"""Four-choice exams as C-Eval and CMMLU publish them, and their questions in training text.

FILE.csv                     question, A, B, C, D, answer (CMMLU: Question, …, Answer); or another file of such records
FOLDER or FILE.zip           such files, one for each subject, in the parts dev, val and test:
    dev/law_dev.csv              a few questions to show before the one that is asked (CMMLU: dev/law.csv)
    val/law_val.csv              questions with answers, where test has none (C-Eval)
    test/law_test.csv            the exam, where it has answers (CMMLU: test/law.csv)

A question in training text is found by the windows of characters that both have.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from base.cli import UserError, one_line
from base.files import read_json
from corpus.duplicates import window_hashes
from corpus.errors import BadRecord
from corpus.files import BROKEN, ReadOptions, find_files, open_decompressed, read_batches, read_records, suffix_of
from corpus.messages import as_text, or_number
from corpus.records import PROMPT_FIELDS, parse, prompt_of

if TYPE_CHECKING:
    from pandas import DataFrame

# Of letters and digits alone, in small letters: 13 of them are a clause of Chinese and two or three English words. One
# window may be anyone's; a text contains a question if it has this fraction of its windows.
WINDOW, FRACTION = 13, 0.6


def letters_of(text: str) -> np.ndarray:
    """The code points of its letters and digits, in small letters: uint32 (N,)."""
    return np.frombuffer(re.sub(r"[\W_]+", "", text.lower()).encode("utf-32-le", "replace"), "<u4")


class Exams:
    """The windows of many questions, sorted, with whose they are."""

    def __init__(self, questions: list[str]):
        windows = [np.unique(window_hashes(letters_of(question), WINDOW)) for question in questions]
        windows = [own for own in windows if len(own)]
        self.too_short = len(questions) - len(windows)
        self.sizes = np.array([len(own) for own in windows], np.int64)  # (Q,)
        owners = np.repeat(np.arange(len(windows)), self.sizes)
        hashes = np.concatenate([*windows, np.zeros(0, np.uint64)])
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.owners = hashes[order], owners[order]  # (windows of all,)

    def occur_in(self, text: str) -> bool:
        """Whether the text contains any of the questions."""
        hashes = np.unique(window_hashes(letters_of(text), WINDOW))
        first, end = (np.searchsorted(self.hashes, hashes, side) for side in ("left", "right"))
        shared = np.flatnonzero(end > first)
        if not len(shared):
            return False
        owners = np.concatenate([self.owners[first[i] : end[i]] for i in shared])
        return bool((np.bincount(owners, minlength=len(self.sizes)) >= FRACTION * self.sizes).any())


def question_in(record: dict) -> str:
    """The question of a record of an exam in any record format; with the options, where it is short."""
    record = {str(name).lower(): value for name, value in record.items()}
    asked = [message["content"] for message in prompt_of(record, PROMPT_FIELDS).messages if message["role"] == "user"]
    question = asked[-1] if asked else str(record.get("text", ""))
    if len(letters_of(question)) < WINDOW:
        question = "\n".join([question, *(str(record[option]) for option in "abcd" if record.get(option))])
    return question


@cache
def load_exams(paths: tuple[str, ...]) -> Exams:
    """The questions of files and folders. A record without one, such as a heading, is left out."""
    questions = []
    for batch in read_batches(find_files(paths), "text"):
        for _, record in batch.records:
            try:
                questions.append(question_in(parse(record)))
            except BadRecord:
                continue
    return Exams(questions)


# ------------------------------------------------------------------------------------------------- an exam to be taken

LETTERS = "abcd"
TABLES = (".csv", ".jsonl", ".json", ".parquet")
PARTS = ("test", "val", "", "dev")  # the first that has answers is the exam; "": files that are in no part


def read_exam(path: str | Path, encoding: str = "") -> tuple["DataFrame", "DataFrame"]:
    """The questions, and those of the dev part, each a row: subject, category, question, a, b, c, d, answer.

    UserError names the file, and the question, that cannot be read.
    """
    import pandas as pd  # here, because workers need not load it

    tables = [read_table(file, records) for file, records in exam_files(Path(path), ReadOptions(encoding=encoding))]
    questions = pd.concat(tables, ignore_index=True)
    answered = questions[questions["answer"] != ""]
    if answered.empty:
        raise UserError(f"{path} has no answers")
    categories = {subject: name for name, subjects in ceval_categories().items() for subject in subjects}
    answered = answered.assign(category=answered["subject"].map(categories))
    part = next(part for part in PARTS if part in set(answered["part"]))
    return answered[answered["part"] == part].reset_index(drop=True), answered[answered["part"] == "dev"]


def ceval_categories() -> dict[str, list[str]]:
    """C-Eval's subjects in its four categories. (CMMLU's belong to several each, and are counted by subject alone.)"""
    return read_json(Path(__file__).with_suffix(".json"))


def exam_files(path: Path, options: ReadOptions) -> Iterator[tuple[Path, list[tuple[int, object]]]]:
    """The files of an exam, each with its records and their places."""
    if path.is_file() and zipfile.is_zipfile(path) and not suffix_of(path):
        yield from _zipped_files(path, options)
        return
    for file in find_files([path]):
        records = [record for batch in read_batches([file], options) for record in batch.records]
        if suffix_of(file) in TABLES or not path.is_dir():
            yield file, records


def _zipped_files(path: Path, options: ReadOptions) -> Iterator[tuple[Path, list[tuple[int, object]]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in sorted(archive.namelist()) if suffix_of(Path(name)) in TABLES]
            names = [name for name in names if not Path(name).name.startswith(".")]  # a Mac adds ._NAME to every NAME
            if not names:
                raise UserError(f"{path} has no file that ends in {', '.join(TABLES)}")
            for name in names:
                stream = io.BufferedReader(io.BytesIO(archive.read(name)))
                yield path / name, list(read_records(path / name, open_decompressed(stream), options))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, *BROKEN) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {one_line(error)}") from None


def read_table(file: Path, records: Iterable[tuple[int, object]]) -> "DataFrame":
    """The questions of a file, with the names of columns and the answers in small letters; no answer is ""."""
    rows = []
    for place, raw in records:
        try:
            original = parse(raw)
            record = {str(name).strip().lower(): value for name, value in original.items()}
            rows.append({name: as_text(or_number(record.get(name)), name) for name in ("question", *LETTERS, "answer")})
            json.dumps(rows[-1], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{file}:{place}: not UTF-8, or half a surrogate pair") from None
        except BadRecord as error:
            raise UserError(f"{file}:{place}: {error}") from None
        if len(record) < len(original):
            raise UserError(f"{file}: two columns differ only in capital letters")
    if not rows:
        raise UserError(f"{file} has no questions")
    part = next((part for part in PARTS if part and part in (file.parent.name, file.stem.rpartition("_")[2])), "")
    answers = [row["answer"].strip().lower() for row in rows]
    for number, (row, answer) in enumerate(zip(rows, answers), 1):
        if missing := [name for name in ("question", *LETTERS) if row[name] == ""]:
            raise UserError(f"{file}: question {number} has no {missing[0]}")
        if answer == "" and (any(answers) or not part):
            raise UserError(f"{file}: question {number} has no answer")
        if answer not in ("", *LETTERS):
            raise UserError(f"{file}: question {number} has the answer {answer!r}, which is none of A, B, C, D")
    subject = file.stem.removesuffix(f"_{part}")
    import pandas as pd

    return pd.DataFrame(rows).assign(answer=answers, subject=subject, part=part)
