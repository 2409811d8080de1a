"""A reward is for an answer that is one, and for nothing else."""

import random

import pytest
from helpers import TOKENIZER

from base.cli import UserError
from engine.generation import Sequence
from model.chat import EOS, IM_END, IM_START, THINK, TOOL_CALL, TOOL_RESPONSE, encode, load_tokenizer
from training.rewards import check_tasks, load_reward, read_reply

TOK = load_tokenizer(TOKENIZER)


def written(*parts: str | int, reason: str = "stop") -> Sequence:
    tokens = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else encode(TOK, part)
    sequence = Sequence([1], 100, tokens=tokens)
    sequence.finish_reason = reason
    return sequence


def score(name: str, *parts: str | int, reason: str = "stop", **task) -> float:
    reply = read_reply(written(*parts, reason=reason), TOK)
    return 0.0 if reply is None else load_reward(name)(reply, {"answer": "42"} | task)


@pytest.mark.parametrize(
    ("parts", "reward"),
    [
        (("42", IM_END), 1),
        (("42。", IM_END), 1),
        ((" 42.\n", IM_END), 1),
        ((THINK, "\n6*7=42\n", THINK + 1, "\n\n42", IM_END), 1),
        ((THINK, "\n42\n", THINK + 1, "\n\n41", IM_END), 0),  # the answer stands in the thought alone
        ((THINK, "\n42\n", THINK + 1, IM_END), 0),
        ((THINK, "\n42", IM_END), 0),  # a thought that is not closed
        (("42", THINK + 1, IM_END), 0),
        ((THINK, THINK + 1, THINK, THINK + 1, "42", IM_END), 0),  # two thoughts
        ((THINK, THINK, "x", THINK + 1, "42", IM_END), 0),
        (("41 42", IM_END), 0),  # two answers
        (("42 42", IM_END), 0),
        (("４２", IM_END), 0),
        (("042", IM_END), 0),
        (("The answer is 42", IM_END), 0),
        (("42", IM_START, "user\n", IM_END), 0),
        (("4", 13, "2", IM_END), 0),  # a control token has no text, and would be overlooked
        (("<think>x</think>42", IM_END), 0),  # typed, not thought
        (("42", EOS), 0),
        ((IM_END,), 0),
    ],
)
def test_only_the_answer_itself_is_exact(parts, reward):
    assert score("exact", *parts) == reward


def test_an_answer_that_was_cut_has_no_reward():
    assert score("exact", "42", reason="length") == 0
    assert score("exact", "42", IM_END, reason="length") == 0


def test_an_answer_after_a_call_counts_by_itself():
    call = [TOOL_CALL, '\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n', TOOL_CALL + 1, IM_END]
    said = ["\n", IM_START, "user\n", TOOL_RESPONSE, "\n42\n", TOOL_RESPONSE + 1, IM_END, "\n", IM_START, "assistant\n"]
    assert score("exact", *call, *said, "42", IM_END) == 1
    assert score("exact", *call, *said, "41", IM_END) == 0
    assert score("exact", *call, *said, THINK, IM_END) == 0
    assert score("exact", *call) == 0


@pytest.mark.parametrize(
    ("text", "task", "reward"),
    [
        ("42", {}, 1),
        ("42.0", {}, 1),
        ("41.9", {}, 0),
        ("41.9", {"tolerance": 0.2}, 1),
        ("-42", {"answer": "-42"}, 1),
        ("42 apples", {}, 0),
        ("1e1", {"answer": "10"}, 0),
        ("٤٢", {}, 0),
        ("nan", {}, 0),
    ],
)
def test_a_number_is_compared_as_one(text, task, reward):
    assert score("number", text, IM_END, **task) == reward


def test_a_pattern_matches_the_whole_answer():
    assert score("pattern", "2026-11-25", IM_END, answer=r"\d{4}-\d\d-\d\d") == 1
    assert score("pattern", "on 2026-11-25", IM_END, answer=r"\d{4}-\d\d-\d\d") == 0


@pytest.mark.parametrize(
    ("text", "reward"),
    [("3*(4+10)", 1), ("(10 + 4) * 3", 1), ("42", 0), ("3*4+30", 0), ("3*(4+10)+0", 0), ("3*(4+", 0)],
)
def test_countdown_computes_what_was_written(text, reward):
    assert score("countdown", text, IM_END, numbers=[3, 4, 10]) == reward


def test_no_random_string_of_tokens_is_ever_an_error():
    rng = random.Random(0)
    for _ in range(2000):
        tokens = rng.choices([*range(16), *encode(TOK, "42\n{}")], k=rng.randint(1, 12))
        sequence = written(*tokens, reason=rng.choice(["stop", "length"]))
        read_reply(sequence, TOK)


def test_a_reward_of_the_users_own(tmp_path):
    (tmp_path / "mine.py").write_text("def brief(reply, task):\n    return 1 / len(reply.content)\n")
    assert score(f"{tmp_path / 'mine.py'}:brief", "四十二。", IM_END) == 0.25
    (tmp_path / "broken.py").write_text("def brief(\n")
    for wrong in ("brief", "nowhere.py:brief", f"{tmp_path / 'mine.py'}:missing", f"{tmp_path / 'broken.py'}:brief"):
        with pytest.raises(UserError):
            load_reward(wrong)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("number", {"answer": "twelve"}),
        ("number", {"answer": "1,20"}),
        ("number", {"answer": "nan"}),
        ("pattern", {"answer": "("}),
        ("number", {"answer": "4", "tolerance": "0.1"}),
        ("number", {"answer": "4", "tolerance": True}),
        ("number", {"answer": "4", "tolerance": -1}),
        ("countdown", {"answer": "24"}),
        ("countdown", {"answer": "24", "numbers": ["4", "6"]}),
        ("countdown", {"answer": "24", "numbers": []}),
        ("countdown", {"answer": "24", "numbers": [2.5, 4]}),
        ("countdown", {"answer": "24.0", "numbers": [4, 6]}),
        ("countdown", {"answer": "twelve", "numbers": [4, 6]}),
    ],
)
def test_tasks_that_a_reward_cannot_judge_are_named_before_training(name, task):
    fine = {"answer": "3" if name == "countdown" else "1,200.5", "numbers": [1, 2]}
    check_tasks(name, [fine], "x")
    with pytest.raises(UserError, match=rf"x: --reward {name} cannot judge the answer .* of task 1, nor 0 more"):
        check_tasks(name, [fine, task], "x")


def test_a_number_with_commas_is_judged():
    assert score("number", "1200.5", IM_END, answer="1,200.5") == 1
