"""Exam questions that stand in training text, found by the windows of characters that both have."""

import re
from functools import cache

import numpy as np

from corpus.duplicates import window_hashes
from corpus.errors import BadRecord
from corpus.files import find_files, read_batches
from corpus.records import PROMPT_FIELDS, parse, prompt_of

# Of letters and digits alone, in small letters: 13 of them are a clause of Chinese and two or three English words. One
# window may be anyone's; a question stands in a text if the text has this share of its windows.
WINDOW, SHARE = 13, 0.6


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

    def stand_in(self, text: str) -> bool:
        """Whether any of the questions does."""
        hashes = np.unique(window_hashes(letters_of(text), WINDOW))
        first, end = (np.searchsorted(self.hashes, hashes, side) for side in ("left", "right"))
        shared = np.flatnonzero(end > first)
        if not len(shared):
            return False
        owners = np.concatenate([self.owners[first[i] : end[i]] for i in shared])
        return bool((np.bincount(owners, minlength=len(self.sizes)) >= SHARE * self.sizes).any())


def question_in(record: dict) -> str:
    """Of a record of an exam in any of the shapes: what is asked; with the options, where that is short."""
    record = {str(name).lower(): value for name, value in record.items()}
    asked = [message["content"] for message in prompt_of(record, PROMPT_FIELDS).messages if message["role"] == "user"]
    question = asked[-1] if asked else str(record.get("text", ""))
    if len(letters_of(question)) < WINDOW:
        question = "\n".join([question, *(str(record[option]) for option in "abcd" if record.get(option))])
    return question


@cache
def load_exams(paths: tuple[str, ...]) -> Exams:
    """The questions of files and folders. A record that holds none, such as a heading, is left out."""
    questions = []
    for batch in read_batches(find_files(paths), "text"):
        for _, record in batch.records:
            try:
                questions.append(question_in(parse(record)))
            except BadRecord:
                continue
    return Exams(questions)
