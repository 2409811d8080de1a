"""The shapes of records: which fields are taken for what, and what is said where none is known."""

import pytest

from corpus.cleaning import Dropped, is_placeholder
from corpus.records import (
    CHAT_FIELDS,
    PAIR_FIELDS,
    BadRecord,
    chat_of,
    format_of,
    map_fields,
    pair_of,
    split_turns,
    task_of,
    text_of,
)

USER, GOOD, POOR = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "assistant"), "问好差")]
SYSTEM = {"role": "system", "content": "简短。"}
CHATS = {  # as data sets on the hubs have them: record, what the report calls it
    "firefly": ({"kind": "Dict", "input": "问", "target": "好"}, "input, answer=target"),
    "OpenOrca": (
        {"system_prompt": "", "question": "问", "response": "好"},
        "question, system=system_prompt, answer=response",
    ),
    "query": ({"query": "问", "response": "好"}, "question=query, answer=response"),
    "GSM8K_zh": (
        {"question": "Q", "answer": "A", "question_zh": "问", "answer_zh": "好", "answer_only": "1"},
        "question=question_zh, answer=answer_zh",
    ),
    "a chat and its last answer again": (
        {"prompt": "另一问", "messages": [USER, GOOD], "answer": "42"},
        "messages, answer",
    ),
    "fields filled in part": (
        {"messages": None, "prompt": "", "instruction": "问", "output": "好"},
        "instruction, answer=output",
    ),
}


@pytest.mark.parametrize(("record", "shape"), CHATS.values(), ids=CHATS)
def test_chats(record, shape):
    assert chat_of(record).messages == [USER, GOOD]
    assert format_of(record, CHAT_FIELDS) == shape


def test_a_field_of_thoughts_belongs_to_the_answer():
    """Of the R1 distillations: input, reasoning_content, content."""
    record = {"input": "问", "reasoning_content": "嗯", "content": "好", "score": 10}
    assert chat_of(record).messages == [USER, {"role": "assistant", "content": "好", "reasoning_content": "嗯"}]


def test_turns_within_one_string():
    """BELLE's: the instruction holds the turns before, and asks for the answer at its end."""
    record = {"instruction": "Human:一\nAssistant:二\n三\nHuman: 问\nAssistant:\n", "input": "", "output": "好"}
    before = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二\n三"}]
    assert chat_of(record).messages == [*before, USER, GOOD]
    for plain in ("问", "Human: 问", "写一段对话。\nHuman: 一\nAssistant: 二", "Human beings\nAssistant: x"):
        assert not split_turns(plain)
        assert chat_of({"instruction": plain, "output": "好"}).messages == [{"role": "user", "content": plain}, GOOD]


PAIRS = {
    "orca_dpo_pairs": {"system": "简短。", "question": "问", "chosen": "好", "rejected": "差"},
    "stack exchange": {"system": "简短。", "question": "问", "response_j": "好", "response_k": "差"},
}


@pytest.mark.parametrize("record", PAIRS.values(), ids=PAIRS)
def test_pairs(record):
    pair = pair_of(record)
    assert (pair.chosen, pair.rejected, pair.shared) == ([SYSTEM, USER, GOOD], [SYSTEM, USER, POOR], 2)


def test_pairs_of_two_strings_with_all_turns():
    chosen, rejected = (f"\n\nHuman: 问\n\nAssistant: {answer}" for answer in "好差")
    pair = pair_of({"chosen": chosen, "rejected": rejected})
    assert (pair.chosen, pair.rejected, pair.shared) == ([USER, GOOD], [USER, POOR], 1)


def test_a_mapping_names_any_field():
    """And who says where the question is does not mean another field, whatever its name."""
    record = {"messages": "17 replies", "prompt": "x", "title": "问", "best": "好", "worst": "差", "output": "y"}
    fields = map_fields(CHAT_FIELDS, {"question": "title", "answer": "best"})
    assert chat_of(record, fields).messages == [USER, GOOD]
    assert format_of(record, fields) == "question=title, answer=best"
    fields = map_fields(PAIR_FIELDS, {"question": "title", "chosen": "best", "rejected": "worst"})
    assert pair_of(record, fields).rejected == [USER, POOR]
    fields = map_fields(CHAT_FIELDS, {"instruction": "title", "input": "prompt", "answer": "best"})
    assert chat_of(record, fields).messages[0]["content"] == "问\nx"


@pytest.mark.parametrize(
    ("read", "record"),
    [
        (chat_of, {"ask": "问", "reply": "好"}),
        (chat_of, {"question": "问", "reply": "好"}),
        (chat_of, {"ask": "问", "answer": "好"}),
        (pair_of, {"system": "简短。", "ask": "问", "chosen": "好", "rejected": "差"}),
        (pair_of, {"question": "问", "good": "好", "bad": "差"}),
        (task_of, {"question": "问", "solution": "1"}),
        (task_of, {"ask": "问", "answer": "1"}),
    ],
)
def test_a_shape_that_is_not_known_names_its_fields_and_the_flag(read, record):
    with pytest.raises(BadRecord, match=rf"there is {', '.join(record)} .*--fields .*=NAME"):
        read(record)


TASKS = {
    "prompt": ({"prompt": "问", "answer": 12}, "12"),
    "messages": ({"messages": [USER], "answer": " 12 "}, "12"),
    "GSM8K": ({"question": "问", "answer": "12*100=<<12*100=1200>>1200\n#### 1,200"}, "1200"),
    "GSM8K_zh": ({"question": "Q", "answer": "#### 7", "question_zh": "问", "answer_only": "12"}, "12"),
    "MiniMind's gt": ({"conversations": [USER, {"role": "assistant", "content": "无"}], "gt": ["12"]}, "12"),
    "zero": ({"question": "问", "answer": 0}, "0"),
}


@pytest.mark.parametrize(("record", "answer"), TASKS.values(), ids=TASKS)
def test_tasks(record, answer):
    assert task_of(record) == ([USER], answer, None)


def test_tasks_without_one_answer_are_bad_or_dropped():
    for answer in (["1", "2"], True, "#### "):
        with pytest.raises(BadRecord, match="answer"):
            task_of({"question": "问", "answer": answer})
    with pytest.raises(Dropped, match="empty_answer"):
        task_of({"question": "问", "answer": " "})


def test_a_completion_without_a_prompt_is_a_text():
    assert text_of({"completion": "春天", "source": "wikipedia.zh2307"}, "text") == "春天"
    with pytest.raises(BadRecord, match="no text"):
        text_of({"prompt": "问", "completion": "好"}, "text")
    with pytest.raises(BadRecord, match="no text"):
        text_of({"completion": "春天"}, "body")


def test_placeholders():
    assert all(map(is_placeholder, ["", " \n", "无", "无。", "None", "N/A", "null"]))
    assert not any(map(is_placeholder, ["无法回答。", "0", "No", "好"]))
