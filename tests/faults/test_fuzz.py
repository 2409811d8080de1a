"""Inputs of any kind, made at random: what reads them keeps its promise, or refuses them by a UserError or BadRecord.

A few thousand inputs by default, the same at each run. A million others, on one core in about a quarter of an hour:

    FUZZ=1000000 python -m pytest -q -s tests/faults/test_fuzz.py

prints how many each target had. What was found so is kept as @example, or in a test of its own at the end.
"""

import argparse
import contextlib
import csv
import datetime
import gzip
import io
import json
import math
import os
import random
import sys
import zipfile
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import TOKENIZER
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import data_process
from base.cli import UserError
from base.files import read_json
from corpus.cleaning import CHAT_RULES, TEXT_RULES, Dropped, clean
from corpus.errors import WrongFile
from corpus.exams import read_exam, read_table
from corpus.exports import chats_of, read_text_export
from corpus.files import RecordBatch, Structure, read_batches, read_csv, read_json_values
from corpus.kinds import KINDS, DocumentSettings, load_encoder
from corpus.look import describe, examine, first_look
from corpus.pipeline import work
from corpus.prepared import read_meta
from corpus.records import CHAT_FIELDS, PAIR_FIELDS, TASK_FIELDS, BadRecord, each_record, parse, prompt_of
from engine.generation import Sequence, TextStream
from engine.session import call_of, last_turn, read_tokens
from engine.tools import MAX_CHARACTERS, calculate, calculator, run_calls
from model.chat import BOS, IM_END, IM_START, SPECIAL_TOKENS, encode, encode_chat
from model.checkpoint import load_config
from model.LMConfig import PRESETS, LMConfig
from server.schema import ChatRequest, CompletionRequest
from training import packing
from training.log import METRICS_FILE, read_metrics
from training.rewards import read_reply

FUZZ = int(os.environ.get("FUZZ", 0))
FEW, MANY = 150, 50_000  # inputs of a target by default; of all targets together in a round of FUZZ
CHILDREN = 49 if FUZZ else 9  # of an input that hypothesis made, which takes longer than to try it
ENCODER = load_encoder(str(TOKENIZER))
PIECES = ENCODER.tokenizer.pieces
CONTROLS = len(SPECIAL_TOKENS)
COUNTS = Counter()


def fuzz(share: float, families: bool = False):
    """A target that gets this share of the inputs, one by one or in families; hypothesis remembers all of a round."""
    inputs = share * MANY if FUZZ else FEW
    often = settings(
        max_examples=math.ceil(inputs / (1 + CHILDREN) if families else inputs),
        derandomize=not FUZZ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def decorate(test):
        return pytest.mark.parametrize("number", range(max(FUZZ // MANY, 1)))(often(test))

    return decorate


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    for name, count in COUNTS.items():
        print(f"\n{name}: {count:,} inputs", end="")
    print(f"\nin all {COUNTS.total():,}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# -------------------------------------------------------------------------------------------------------------- inputs

SPICE = [
    *SPECIAL_TOKENS,
    "<0x0A>",
    "▁",
    "Human: ",
    "\n\nAssistant:",
    "<think>",
    "</think>",
    "####",
    "$1,200",
    "\0",
    "\x1b",
]
SPICE += ["e\u0301", "\u200b", "\u3000", "\ufeff", "\uffff", "\r\n", "\r", "\x85", "\u2028", "👩‍👩‍👧", "𠮷", "😀"]
SPICE += [
    '"',
    "'",
    ",",
    "\\",
    "{",
    "[",
    "}",
    "____",
    "答案：",
    "春天来了，山上的花开了。",
    "a" * 300,
    "无",
    "NaN",
    "1e999",
    "<|im_<|im_end|>end|>",
    "<s>",
    "</s>",
    "[INST]",
    "<｜User｜>",
    "<tools>[{}]</tools>",
    '<tool_call>{"name": "f", "arguments": ""}</tool_call>',
]
texts = st.lists(st.text(max_size=8) | st.sampled_from(SPICE), max_size=5).map("".join)
any_text = texts | st.lists(st.characters() | st.sampled_from(["\ud83d", "\udcff"]), max_size=5).map("".join)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | any_text
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3), max_leaves=6
)
ROLES = ["system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation", "narrator"]
calls = st.fixed_dictionaries({}, optional={"name": texts | values, "arguments": values, "function": values})
PYTHON = ["{[]: 1}", "[b'x']", "{1, 2}", "[{(1, 2): 3}]", "1j", "...", "[" * 300, "-" * 300, "1" * 5000, "{'a': {1}}"]
written = values.map(json.dumps) | values.map(repr) | st.sampled_from(PYTHON)  # a list or object as a text
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": any_text},
    optional={
        "from": st.sampled_from(ROLES),
        "value": any_text,
        "reasoning_content": any_text,
        "tool_calls": st.lists(calls, max_size=2) | written,
        "tools": written,
        "weight": scalars,
        "thinking": any_text,
    },
)
chats = st.lists(turns, max_size=4)
FIELDS = sorted(
    {name for fields in (CHAT_FIELDS, PAIR_FIELDS, TASK_FIELDS) for names in fields.values() for name in names}
)
FOREIGN = [b"\xff", datetime.date(2026, 1, 1), Decimal("1.5"), [b"x"], {"name": "x", "arguments": b"x"}]  # of parquet
records = st.dictionaries(
    st.sampled_from([*FIELDS, "text"]) | any_text,
    any_text | chats | values | written | st.sampled_from(FOREIGN),
    max_size=5,
)
shaped = st.fixed_dictionaries(  # more often than not taken for a chat, a pair or a task
    {"messages": chats, "chosen": chats | any_text, "rejected": chats | any_text, "answer": any_text | scalars},
    optional={
        "text": any_text,
        "tools": st.lists(values, max_size=2) | written,
        "system": any_text,
        "prompt": any_text,
    },
)


def child(value, rng: random.Random):
    """The same, but for a change at some place."""
    if isinstance(value, str | bytes):
        start, end = sorted(rng.choices(range(len(value) + 1), k=2))
        end = rng.choice([start, start + 1, end])
        spice = rng.choice([*SPICE, ""])
        return value[:start] + (spice if isinstance(value, str) else spice.encode()) + value[end:]
    if isinstance(value, dict) and value:
        name = rng.choice(list(value))
        to, new = rng.choice([name, name, rng.choice(FIELDS)]), rng.choice([child(value[name], rng), *value.values()])
        return {**{key: value[key] for key in value if key != name or rng.random() < 0.1}, to: new}
    if isinstance(value, list | tuple) and value:
        place = rng.randrange(len(value))
        changed = [value[place], child(value[place], rng)] if rng.random() < 0.1 else [child(value[place], rng)]
        if isinstance(value, tuple):
            return (*value[:place], changed[-1], *value[place + 1 :])
        return value[:place] + rng.choice([changed, changed, []]) + value[place + 1 :]
    return rng.choice([0, -1, True, None, 2**64, 1e308, "", [], {}, *SPICE])


def family(values: st.SearchStrategy) -> st.SearchStrategy[list]:
    """Lists: a value, its children, and theirs."""

    def descend(value, seed: int) -> list:
        rng, members = random.Random(seed), [value]
        for _ in range(CHILDREN):
            members.append(child(rng.choice(members), rng))
        return members

    return st.builds(descend, values, st.integers(0, 2**32))


@st.composite
def damaged(draw, wholes: dict[str, bytes]) -> tuple[str, list[bytes]]:
    """A name and a family of contents, with places that are cut out, or filled with something else."""
    name = draw(st.sampled_from(sorted(wholes)))
    content = bytearray(wholes[name])
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        end = place + draw(st.sampled_from([0, 1, 2, 8, len(content)]))
        content[place:end] = draw(st.binary(max_size=4) | st.sampled_from([text.encode() for text in SPICE]))
    return name, draw(family(st.just(bytes(content))))


RECORDS = [
    {"text": "春天来了，山上的花开了，小河里的水慢慢地流。", "id": 1},
    {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "text": 'x, "y"\n'},
    {"prompt": "1+1?", "chosen": "2", "rejected": "3", "answer": "#### 2", "text": "The cat sat on the mat."},
]
LINES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]


def parquet(**options) -> bytes:
    table = pyarrow.table({"text": [record["text"] for record in RECORDS], "n": [1, None, 3], "l": [[1], [], None]})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, **options)
    return file.getvalue()


FILES = {
    "a.jsonl": "\n".join(LINES).encode(),
    "a.json": f"[{', '.join(LINES)}]\n".encode(),
    "b.json": LINES[0].encode(),
    "a.csv": 'text,prompt,answer\r\n春天来了,1+1?,2\r\n"a, ""b""\n c",问,\r\n'.encode(),
    "a.txt": "春天来了。\n\nThe cat\r\nsat\rhere".encode() * 200,
    "a.md": b"\xef\xbb\xbf# title\n",
    "a.parquet": parquet(),
    "b.parquet": parquet(compression="none", use_dictionary=False),
    "wrapped.json": f'{{"version": 1, "info": {{"n": 3}}, "data": [{", ".join(LINES)}], "x": null}}'.encode(),
    "pretty.jsonl": json.dumps(RECORDS, ensure_ascii=False, indent=1).encode(),
    "values.jsonl": "".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "lines.txt": "\n".join(LINES).encode(),
    "wide.jsonl": "\n".join(LINES).encode("utf-16"),
    "wide.csv": 'text,prompt\r\n"a\nb",1\r\n'.encode("utf-16-le"),
    "chinese.txt": "春天来了，山上的花开了。\n".encode("gbk") * 9,
    "quotes.csv": b'id,text\n1,"a\n2,b\n3,c"\n4,"d" e\n5,f\n',
}
FILES |= {f"{name}.gz": gzip.compress(content) for name, content in FILES.items()}


COMMANDS = {name: data_process.parse_arguments([name, "x", "--output", "x", "--workers", "1"]) for name in KINDS}
SETTINGS = {name: data_process.document_settings(args) for name, args in COMMANDS.items()}


def control(ids: list[int]) -> list[int]:
    return [token for token in ids if token < CONTROLS]


def shown(ids: list[int]) -> str:
    return b"".join(SPECIAL_TOKENS[token].encode() if token < CONTROLS else PIECES[token] for token in ids).decode()


@contextlib.contextmanager
def or_refused(*words: str):
    """What the block does may be refused, with these words."""
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    if message is not None:
        assert all(word in message for word in words), message


# ------------------------------------------------------------------------------------------------------------- readers


def account(settings: DocumentSettings, batch: RecordBatch):
    """Every record becomes a document, is bad, or is dropped by a rule that the report knows."""
    result = work(settings, batch)
    assert len(result.documents) + len(result.bad) + len(result.dropped) == result.count == len(batch.records)
    assert {rule for rule, _, _ in result.dropped} <= set(KINDS[settings.command].rules)
    for document in result.documents:
        assert document.note.encode() or not KINDS[settings.command].noted
        for ids, mask in document.parts:
            if KINDS[settings.command].masked:
                assert len(ids) == ENCODER.dtype.itemsize * len(mask)
                assert any(mask)
            elif KINDS[settings.command].titles:
                assert max(np.frombuffer(ids, ENCODER.dtype)) < len(PIECES)


@fuzz(0.12, families=True)
@given(file=damaged(FILES), command=st.sampled_from(sorted(KINDS)))
@example(file=("a.csv", [b"\n\ntext,b\n1,2\n"]), command="clean")  # no names of columns
def test_a_damaged_file_is_read_or_refused(file, command, number, folder):
    name, contents = file
    for content in contents:
        COUNTS["damaged files"] += 1
        (folder / name).write_bytes(content)
        with or_refused(f"{folder / name}: "):
            for batch in read_batches([folder / name], "text"):
                account(SETTINGS[command], batch)


@fuzz(0.01, families=True)
@given(file=damaged(FILES))
def test_a_damaged_file_can_be_looked_at(file, number, folder):
    name, contents = file
    for content in contents:
        COUNTS["damaged files, look"] += 1
        (folder / name).write_bytes(content)
        with or_refused(name):
            look = first_look([folder / name], 100, {})
            if look.reading and look.reading.command in KINDS:
                describe(*examine(look, SETTINGS[look.reading.command]), str(TOKENIZER))
        with or_refused(name):
            for chat in each_record(folder / name, "prompt", prompt_of):
                encode_chat(ENCODER.tokenizer, *chat)


@fuzz(0.003)
@given(kept=st.lists(records | values, max_size=4), torn=st.lists(st.integers(0, 60), max_size=4))
def test_a_torn_line_costs_no_other(kept, torn, number, folder):
    """Cut anywhere, as by a full disk or a download, and the lines around it."""
    COUNTS["torn lines"] += 1
    lines = [b'{"text": "x"}']  # a first line that is whole says that these are lines
    for i, value in enumerate(kept):
        line = json.dumps(value, default=str).encode()
        lines += [line, *(line[:length] for length in torn[i : i + 1])]
    (folder / "torn.jsonl").write_bytes(b"\n".join(lines))
    found = dict(record for batch in read_batches([folder / "torn.jsonl"], "text") for record in batch.records)
    expected = {place: line for place, line in enumerate(lines, 1) if line and not line.isspace()}
    assert {place: raw.rstrip(b"\n") for place, raw in found.items()} == expected
    for raw in found.values():
        try:
            record = parse(raw)
        except BadRecord:
            continue
        assert repr(record) == repr(json.loads(raw, parse_constant=lambda name: None))


class Slow(io.StringIO):
    """Gives a few characters at a time, as a file of megabytes does."""

    size = 1

    def read(self, n: int = -1) -> str:
        return super().read(self.size)


@fuzz(0.005)
@given(elements=st.lists(values, max_size=4), size=st.integers(1, 9), indent=st.sampled_from([None, 1]), rest=any_text)
@example(elements=[12], size=2, indent=None, rest="")  # a number that goes on in the next block
@example(elements=[0.5], size=2, indent=None, rest="")
@example(elements=[1], size=1, indent=None, rest="  x")  # more follows, in a later block
def test_an_array_is_read_element_by_element(elements, size, indent, rest, number):
    COUNTS["JSON arrays"] += 1
    file = Slow(json.dumps(elements, indent=indent) + rest)
    file.size = size
    if rest.strip():
        with pytest.raises(ValueError, match="more follows"):
            list(read_json_values(file, Structure(False, 1, "]")))
    else:
        found = list(read_json_values(file, Structure(False, 1, "]")))
        expected = json.loads(json.dumps(elements), parse_constant=lambda name: None)
        assert repr(found) == repr(list(enumerate(expected, 1)))


# Python 3.10 can neither write NUL nor read it.
any_cell = any_text if sys.version_info >= (3, 11) else any_text.map(lambda text: text.replace("\0", ""))


@fuzz(0.005)
@given(rows=st.lists(st.tuples(any_cell, any_cell, any_cell), min_size=1, max_size=4))
@example(rows=[("\uffff", "", ""), ("a", "b", "c")])  # once the mark of the end
def test_a_csv_file_comes_back_as_it_was_written(rows, number):
    COUNTS["CSV rows"] += 1
    file = io.StringIO(newline="")
    rows = [(f"x{row[0]}", *row[1:]) for row in rows]  # a number there may be a sign that a quote took in lines
    csv.writer(file).writerows([("a", "b", "c"), *rows])
    content = file.getvalue().encode("utf-8", "surrogatepass")
    read_back = io.TextIOWrapper(io.BytesIO(content), "utf-8", "surrogateescape", newline="")
    expected = [
        tuple(
            value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape").replace("\0", "") for value in row
        )
        for row in rows
    ]
    assert [tuple(row.values()) for _, row in read_csv(read_back)] == expected


@fuzz(0.08, families=True)
@given(contents=family(any_text | st.binary(max_size=60)), name=st.sampled_from(["a.txt", "a.md.gz"]))
def test_running_text_comes_back_whole(contents, name, number, folder):
    for content in contents:
        COUNTS["running text"] += 1
        content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        content = b"x\n" + content  # neither JSON nor the signature of a format
        (folder / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
        found = None
        with or_refused(name, "text"):
            found = [record["text"] for batch in read_batches([folder / name], "text") for _, record in batch.records]
        assert (
            found is None
            or "".join(found) == io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", "surrogateescape").read()
        )


EXPORT = [
    "12/30/20, 9:15 PM - Ann: Hi\n",
    "[30.12.20, 21:16:03] Ben: \u200eHello\n",
    "12/30/20, 9:15 PM - Ann changed the subject\n",
    "2020-12-30 21:15:03 Ann\n你好\n",
    "Ben, [30.12.2020 21:16]\n",
    "Ann 2020年12月30日 下午9:15\n",
    "<Media omitted>\n",
]


@fuzz(0.02, families=True)
@given(relatives=family(st.lists(st.sampled_from(EXPORT) | any_text, max_size=8)), redact=st.booleans())
def test_a_chat_export_of_any_text_is_read_or_refused(relatives, redact, number):
    for parts in relatives:
        COUNTS["chat exports"] += 1
        text = "".join(part for part in parts if isinstance(part, str)) if isinstance(parts, list) else str(parts)
        with contextlib.suppress(WrongFile):
            messages = read_text_export(text)
            for record in chats_of(messages, "Ben", redact):
                roles = [turn["role"] for turn in record["messages"]]
                assert roles == ["user", "assistant"] * (len(roles) // 2)
                assert all(turn["content"].strip() for turn in record["messages"])
                assert not redact or not any("Ann" in turn["content"] for turn in record["messages"])


# ------------------------------------------------------------------------------------- records, rules, tokens and chats


@fuzz(0.2, families=True)
@given(relatives=family(records | shaped | values), command=st.sampled_from(sorted(KINDS)), as_bytes=st.booleans())
@example(relatives=[{"prompt": [], "answer": "1"}], command="rl", as_bytes=False)
@example(relatives=[{"prompt": "\ud800", "answer": "1"}], command="rl", as_bytes=True)
@example(relatives=[{"prompt": "a", "answer": "1", "x": "\ud800"}], command="rl", as_bytes=True)
@example(relatives=[{"prompt": "a", "answer": "1", "x": b""}], command="rl", as_bytes=False)
@example(relatives=[{"prompt": "a", "answer": "b", "tools": text} for text in PYTHON], command="sft", as_bytes=True)
@example(relatives=[{"prompt": "a", "answer": "b", "tools": [b""]}], command="sft", as_bytes=False)
def test_a_record_of_any_shape_is_accounted_for(relatives, command, as_bytes, number):
    for record in relatives:
        COUNTS["records"] += 1
        record = json.dumps(record, default=str).encode() if as_bytes else record
        account(SETTINGS[command], RecordBatch(Path("x"), [(1, record)], 0))


names = st.sampled_from([*sum((tuple(kind.fields) for kind in KINDS.values()), ()), "x", ""]) | texts


@fuzz(0.003)
@given(
    pairs=st.lists(st.tuples(names.filter(str.isprintable), st.sampled_from(FIELDS) | texts), max_size=3),
    record=shaped | records,
    command=st.sampled_from(sorted(KINDS)),
)
def test_fields_are_mapped_or_refused(pairs, record, command, number):
    COUNTS["--fields"] += 1
    with or_refused("--fields: no part is called "), contextlib.suppress(argparse.ArgumentTypeError):
        args = argparse.Namespace(**vars(COMMANDS[command]))
        args.fields = data_process.mapping(",".join(map("=".join, pairs)))
        account(data_process.document_settings(args), RecordBatch(Path("x"), [(1, record)], 0))


@fuzz(0.15, families=True)
@given(relatives=family(texts))
@example(relatives=["e\u200b\u0301 000000000"])  # é, once the invisible mark between is gone
def test_a_clean_text_stays_as_it_is(relatives, number):
    changed = Counter()
    for text, rules in product(relatives, (TEXT_RULES, CHAT_RULES)):
        COUNTS["cleaning rules"] += rules is TEXT_RULES
        with contextlib.suppress(Dropped):
            once = clean(text, rules, rules, Counter())
            assert clean(once, rules, rules, changed) == once
            assert not changed.total()


@fuzz(0.15, families=True)
@given(relatives=family(texts))
def test_a_text_becomes_tokens_and_comes_back(relatives, number):
    """And none of them is a control token; SentencePiece gives the same; streamed it is the same text."""
    for text in relatives:
        COUNTS["tokenizer"] += 1
        ids = encode(ENCODER.tokenizer, text)
        assert ENCODER.encode(text) == ids
        text = text.replace("▁", " ")  # which stands for a space in the vocabulary
        assert not control(ids)
        assert shown(ids) == ENCODER.tokenizer.decode(ids, skip_special_tokens=False) == text
        stream = TextStream(ENCODER.tokenizer)
        assert "".join([stream.put(token) for token in ids]) == text
        assert stream.end() == ""


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
called = st.fixed_dictionaries({"name": texts, "arguments": st.dictionaries(texts, plain, max_size=2)})
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": texts},
    optional={"reasoning_content": texts, "tool_calls": st.lists(called, max_size=2)},
)


def without_words(message: dict) -> dict:
    """The same message with an x for every text."""
    words = {name: message[name] and "x" for name in ("content", "reasoning_content") if name in message}
    return message | words | {"tool_calls": [{"name": "x", "arguments": {}} for _ in message.get("tool_calls", [])]}


@pytest.fixture(scope="module")
def transformers():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@fuzz(0.005)
@given(
    chat=st.lists(messages, min_size=1, max_size=4),
    tools=st.lists(st.dictionaries(texts, plain, max_size=2), max_size=2),
)
def test_a_chat_is_what_the_template_writes_and_no_word_is_a_control_token(chat, tools, number, transformers):
    COUNTS["chats"] += 1
    ids, mask = encode_chat(ENCODER.tokenizer, chat, tools)
    expected = transformers.apply_chat_template(chat, tools=tools or None, tokenize=False)
    assert shown(ids) == expected.replace("▁", " ")
    bare = [without_words(message) for message in chat]
    assert control(ids) == control(encode_chat(ENCODER.tokenizer, bare, [{}] * len(tools))[0])
    trained = [token for token, kept in zip(ids, mask, strict=True) if kept]
    assert trained.count(IM_END) == sum(message["role"] == "assistant" for message in chat)
    assert IM_START not in trained


@fuzz(0.005)
@given(message=messages)
def test_what_an_assistant_says_is_read_as_it_was_written(message, number):
    COUNTS["replies, written and read"] += 1
    message |= {"role": "assistant"}
    ids, mask = encode_chat(ENCODER.tokenizer, [message])
    tokens = [token for token, kept in zip(ids, mask, strict=True) if kept]
    reply = read_tokens(tokens, ENCODER.tokenizer)
    for found, name in ((reply.content, "content"), (reply.reasoning, "reasoning_content")):
        assert found.strip("\n") == message.get(name, "").replace("▁", " ").strip("\n")
    spaced = json.loads(json.dumps(message.get("tool_calls", []), ensure_ascii=False).replace("▁", " "))
    assert reply.tool_calls == spaced


@fuzz(0.05, families=True)
@given(
    relatives=family(
        st.lists(
            st.integers(0, CONTROLS - 1) | st.integers(0, len(PIECES) - 1) | texts | written, min_size=1, max_size=12
        )
    )
)
@example(relatives=[[7, '{"name": ["calculator"], "arguments": {}}', 8]])
def test_whatever_a_model_writes_is_read_and_its_calls_are_answered(relatives, number):
    tools = {"calculator": calculator()}
    for parts in (relative for relative in relatives if relative and isinstance(relative, list)):
        COUNTS["replies of any tokens"] += 1
        tokens = []
        for part in parts:
            tokens += [part % len(PIECES)] if isinstance(part, int) else encode(ENCODER.tokenizer, str(part))
        for sequence in (tokens, [*tokens, IM_END], [IM_START, *tokens, IM_END]):
            reply = read_tokens(last_turn(sequence, ENCODER.tokenizer), ENCODER.tokenizer)
            answers = run_calls(tools, reply.tool_calls)
            if answers:
                ids = ENCODER.tokenizer.tool_responses(answers)
                assert control(ids) == [IM_START, *[9, 10] * len(answers), IM_END, IM_START]
            if sequence:
                read_reply(Sequence([BOS], 9, tokens=sequence, finish_reason="stop"), ENCODER.tokenizer)


@fuzz(0.05, families=True)
@given(relatives=family(any_text | written))
def test_a_call_of_any_text_is_answered(relatives, number):
    for text in relatives:
        COUNTS["tool calls"] += 1
        (answer,) = run_calls({"calculator": calculator()}, [call_of(text)])
        encode(ENCODER.tokenizer, answer)


# ------------------------------------------------------------------------------------------------------- the calculator

numbers = st.integers(0, 10**12 - 1).map(str) | st.tuples(st.integers(0, 999), st.integers(0, 999)).map(
    "{0[0]}.{0[1]}".format
)
expressions = st.recursive(
    numbers,
    lambda inner: (
        st.tuples(inner, st.sampled_from([*"+-*/×÷−", " - "]), inner).map("".join)
        | inner.map("({})".format)
        | inner.map("（{}）".format)
        | inner.map("-{}".format)
    ),
    max_leaves=12,
)


def by_python(expression: str) -> Fraction | None:
    """The value, by Python's own grammar; None where there is none."""
    expression = expression.translate(str.maketrans("×÷−（）", "*/-()"))
    words, number = [], ""
    for letter in expression + " ":
        if letter in "0123456789.":
            number += letter
        else:
            words += [f"Fraction('{number}')"] * bool(number) + [letter]
            number = ""
    try:
        return eval("".join(words), {"Fraction": Fraction})
    except ZeroDivisionError:
        return None


@fuzz(0.05, families=True)
@given(expression=expressions, seed=st.integers(0, 2**32))
def test_the_calculator_counts_as_python_does(expression, seed, number):
    rng, known = random.Random(seed), ["0", "1", "0.5", "7", expression]
    for _ in range(1 + CHILDREN):
        COUNTS["calculator, sums"] += 1
        result = calculate(expression)
        if len(expression) > MAX_CHARACTERS:
            assert result.startswith("error: the expression is longer")
        elif (value := by_python(expression)) is None:
            assert result == "error: division by zero"
        elif value.denominator == 1:
            assert result == str(value)
        else:
            assert abs(Fraction(result) - value) <= max(Fraction(1, 10**6), abs(value) / 10**15)
        one, other = rng.choices(known, k=2)
        expression = rng.choice([f"({one})", f"-{one}", *(f"{one}{sign}{other}" for sign in "+-*/")])
        known.append(expression)


@fuzz(0.01)
@given(expression=any_text | st.text("0123456789.+-*/() ×÷²٣", max_size=70))
def test_the_calculator_answers_whatever_is_asked(expression, number):
    COUNTS["calculator, any text"] += 1
    assert isinstance(calculate(expression), str)


# ----------------------------------------------------------------------------------------------------------- the packer


def packed(tokens: np.ndarray, mask: np.ndarray | None, lengths: list[int], group: int, max_seq_len: int):
    """The packed dataset of these documents, without files."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    meta = {"vocab_size": 2**16, "tokenizer_sha256": "", "masked": mask is not None}
    prepared = SimpleNamespace(
        **dict(tokens=tokens, mask=mask, offsets=offsets, group=group, token_bytes=np.ones(2**16)),
        **dict(folder=Path("x"), tokenizer_dir=Path("x"), kind="pretrain", meta=meta),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "Prepared", lambda folder, split: prepared)
        dataset = packing.PackedDataset("x", "train", max_seq_len)
    return dataset, offsets


def trained_pairs(dataset: packing.PackedDataset) -> list[tuple[int, int, int, int]]:
    """Token, its label, its document and its place there, of all that is scored; each row is checked on the way."""
    pairs = []
    for row in dataset.order(seed=0, epoch=0):
        batch = dataset.batch(np.array([row]))
        assert batch.real_tokens <= dataset.max_seq_len
        inputs, labels, positions, owners = (
            tensor[0].tolist() for tensor in (batch.input_ids, batch.labels, batch.position_ids, batch.document_index)
        )
        assert sum(owner >= 0 for owner in owners) == batch.real_tokens
        for token, label, position, owner in zip(inputs, labels, positions, owners):
            if label != packing.IGNORE:
                pairs.append((token, label, batch.documents[owner], position))
    return sorted(pairs)


@fuzz(0.03, families=True)
@given(lengths=st.lists(st.integers(0, 40) | st.just(1), max_size=12), seed=st.integers(0, 2**32))
def test_the_packer_loses_and_doubles_no_token_of_a_text(lengths, seed, number):
    rng = random.Random(seed)
    for _ in range(1 + CHILDREN):
        COUNTS["packer, texts"] += 1
        max_seq_len = rng.randint(1, 50)
        tokens = np.arange(sum(lengths), dtype=np.uint16)  # each another: a pair of neighbours says where it is
        dataset, offsets = packed(tokens, None, lengths, 1, max_seq_len)
        expected = [
            (token, token + 1, document, (token - int(offsets[document])) % max_seq_len)
            for document, length in enumerate(lengths)
            for token in range(offsets[document], offsets[document] + length - 1)
        ]
        assert trained_pairs(dataset) == expected
        assert dataset.n_tokens == len(expected)
        lengths = [rng.choice([*lengths, rng.randint(0, 40)]) for _ in range(rng.randint(0, 12))]


@fuzz(0.03, families=True)
@given(
    documents=st.lists(st.lists(st.booleans(), min_size=1, max_size=30), max_size=10),
    group=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32),
)
def test_the_packer_loses_and_doubles_no_token_of_a_chat_but_what_it_says(documents, group, seed, number):
    rng = random.Random(seed)
    for _ in range(1 + CHILDREN):
        COUNTS["packer, chats and pairs"] += 1
        max_seq_len = rng.randint(1, 50)
        documents = documents[: len(documents) // group * group]
        mask = np.array([trained for document in documents for trained in document], np.uint8)
        lengths = [len(document) for document in documents]
        dataset, offsets = packed(np.arange(len(mask), dtype=np.uint16), mask, lengths, group, max_seq_len)
        limit = max_seq_len // group
        kept, cut, expected = [], 0, []
        for first in range(0, len(documents), group):
            together = range(first, first + group)
            if all(any(documents[i][1 : limit + 1]) for i in together):
                kept += together
                cut += sum(lengths[i] - 1 > limit for i in together)
        for i in kept:
            for place, trained in enumerate(documents[i][1 : limit + 1]):
                token = int(offsets[i]) + place
                expected += [(token, token + 1, i, place)] if trained else []
        assert trained_pairs(dataset) == expected
        assert (dataset.truncated, dataset.dropped) == (cut, len(documents) - len(kept))
        documents = [rng.choices([True, False], k=rng.randint(1, 30)) for _ in range(rng.randint(0, 10))]


# -------------------------------------------------------------------------------------------- exams, requests, settings

EXAM = 'id,question,A,B,C,D,answer\n0,1+1=____,1,2,3,4,B\n1,"春, 夏",1,2,3,4,a\n'.encode()


def zipped(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"val/{name}.csv", content)
    return file.getvalue()


EXAMS = {
    "law_val.csv": EXAM,
    "law.csv": EXAM.replace(b"answer", b"Answer"),
    "exam.zip": zipped(law_val=EXAM, b_val=EXAM),
}


@fuzz(0.01, families=True)
@given(file=damaged(EXAMS))
@example(file=("law_val.csv", [b"question,A,a,B,C,D,answer\n?,1,2,3,4,5,A\n"]))
@example(file=("law_val.csv", [b"question,A,B,C,D,answer\n0,?,,2,3,4,A\n"]))  # more fields than columns
@example(file=("exam.zip", [EXAMS["exam.zip"][1:], EXAMS["exam.zip"][:-1]]))
def test_a_damaged_exam_is_read_or_refused(file, number, folder):
    name, contents = file
    for content in contents:
        COUNTS["exams"] += 1
        (folder / name).write_bytes(content)
        with or_refused(name):
            questions, _ = read_exam(folder / name)
            assert len(questions)
            assert set(questions["answer"]) <= set("abcd")


@fuzz(0.001)
@given(
    rows=st.lists(
        st.tuples(*[texts.filter(lambda text: text and "\0" not in text)] * 5, st.sampled_from("ABCDabcd")),
        min_size=1,
        max_size=3,
    )
)
def test_an_exam_comes_back_as_it_was_written(rows, number):
    COUNTS["exam rows"] += 1
    file = io.StringIO(newline="")
    rows = [(f"x{row[0]}", *row[1:]) for row in rows]
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("question", *"ABCD", "answer"), *rows])
    file.seek(0)
    table = read_table(Path("x_val.csv"), read_csv(file))
    found = table[["question", *"abcd", "answer"]].itertuples(index=False, name=None)
    assert list(found) == [(*row[:5], row[5].lower()) for row in rows]


bodies = st.fixed_dictionaries(
    {"messages": chats | values},
    optional={
        "prompt": any_text | values,
        "tools": st.lists(
            st.fixed_dictionaries(
                {
                    "type": st.just("function"),
                    "function": st.dictionaries(
                        st.sampled_from(["name", "parameters", "description"]), any_text | values
                    ),
                }
            ),
            max_size=2,
        ),
        "tool_choice": st.sampled_from(["auto", "none", "required"]),
        "stop": any_text | st.lists(any_text, max_size=5) | values,
        **dict.fromkeys(("temperature", "n", "max_tokens", "seed", "stream", "logprobs", "stream_options"), values),
    },
)


@fuzz(0.05, families=True)
@given(relatives=family(bodies | values))
def test_a_request_of_any_shape_becomes_a_prompt_or_is_refused(relatives, number):
    for body, kind in product(relatives, (ChatRequest, CompletionRequest)):
        COUNTS["requests"] += kind is ChatRequest
        try:
            request = kind.model_validate(body)
            chat = request.chat() if kind is ChatRequest else []
        except ValueError:  # pydantic's errors too: what the server answers with status 400
            continue
        if kind is ChatRequest:
            ids, _ = encode_chat(ENCODER.tokenizer, chat, request.offered_tools, add_generation_prompt=True)
            bare = [without_words(message) for message in chat]
            assert control(ids) == control(encode_chat(ENCODER.tokenizer, bare, request.offered_tools, True)[0])
        else:
            for prompt in request.prompt:
                assert not isinstance(prompt, str) or not control(encode(ENCODER.tokenizer, prompt))


CONFIGS = [LMConfig(**PRESETS[name]).to_hf() for name in ("tiny", "small-moe")]
CONFIGS.append(LMConfig(**PRESETS["tiny-moe"] | dict(scoring_func="softmax", qk_norm=False)).to_hf())
META = dict(format_version=2, kind="sft", masked=True, group=1, dtype="uint16", vocab_size=6400, files={}, splits={})


@fuzz(0.03, families=True)
@given(
    whole=st.sampled_from([*CONFIGS, META]),
    changes=st.dictionaries(st.sampled_from(sorted({*CONFIGS[0], *CONFIGS[1], *META})), values, max_size=3),
    seed=st.integers(0, 2**32),
)
def test_settings_of_any_value_are_taken_or_refused(whole, changes, seed, number, folder):
    rng, content = random.Random(seed), whole | changes
    for _ in range(1 + CHILDREN):
        COUNTS["config.json and meta.json"] += 1
        for name, read in (("config.json", load_config), ("meta.json", read_meta)):
            (folder / name).write_text(json.dumps(content))
            with or_refused(name):
                assert read(folder)
        name = rng.choice(list(content))
        content |= {name: child(content[name], rng)}


@fuzz(0.03, families=True)
@given(relatives=family(st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode())))
def test_any_bytes_are_json_or_refused(relatives, number, folder):
    for content in relatives:
        COUNTS["JSON files"] += 1
        (folder / METRICS_FILE).write_bytes(content)
        assert all("step" in record for record in read_metrics(folder))
        with or_refused("is damaged: "):
            assert isinstance(read_json(folder / METRICS_FILE), dict)


@pytest.mark.parametrize("depth", [100, *range(880, 1000, 6), 10_000])
def test_a_record_that_is_nested_deep_is_accounted_for(depth, folder):
    """Near Python's limit some functions still get through and others do not."""
    deep = "[" * depth + "]" * depth
    chat = (
        f'{{"prompt": "问", "answer": "答", "chosen": "a", "rejected": "b", "text": "x", "tools": {deep}, "x": {deep}}}'
    )
    for command, own in SETTINGS.items():
        account(own, RecordBatch(Path("x"), [(1, chat.encode())], 0))
        (folder / "deep.json").write_text(f"[{chat}]", "utf-8")
        with or_refused("deep.json"):
            for batch in read_batches([folder / "deep.json"], "text"):
                account(own, batch)
        with or_refused("deep.json"):
            list(each_record(folder / "deep.json", command, prompt_of))
