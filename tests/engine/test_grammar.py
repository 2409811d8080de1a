"""Structured output: whatever a model of random weights would say, its answer fits the schema, however it ends."""

import json
import re
import time

import jsonschema
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from base.cli import UserError
from engine import grammar
from engine.generation import Engine, Sampling, Sequence
from engine.grammar import (
    Constraint,
    calls_rule,
    choice_rule,
    compile_grammar,
    grammar_of,
    json_rule,
    lark_grammar,
    regex_rule,
)
from engine.session import GenerationConfig, Session, read_tokens
from model.chat import BOS, EOS, IM_END, THINK, TOOL_CALL, encode

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["甲", "b"]}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
STOPS = frozenset([EOS, IM_END])
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER  # in draft 3 a time has no offset


def unlimited(monkeypatch):
    """Without the process that tries a grammar first, which takes a tenth of a second."""
    monkeypatch.setattr(grammar, "try_in_process", lambda text: None)


def answers(model, tokenizer, text: str, n: int = 4, max_new_tokens: int = 60, **flags) -> list[Sequence]:
    compiled = compile_grammar(tokenizer, text)
    engine = Engine(model, max_rows=n, **flags)
    sequences = []
    for i in range(n):
        sampling = Sampling(temperature=0.0 if i == 0 else 1.5)
        sequences.append(Sequence([BOS, 100 + i], max_new_tokens, STOPS, sampling, seed=i))
        sequences[-1].constraint = Constraint(compiled, STOPS)
        engine.submit(sequences[-1])
    while engine.busy:
        engine.step()
    return sequences


def text_of(sequence: Sequence, tokenizer) -> str:
    tokens = [token for token in sequence.tokens if token not in STOPS]
    return b"".join(tokenizer.pieces[token] for token in tokens).decode()  # strict: whole characters


# -------------------------------------------------------------------------------------------------------- what may come


@pytest.mark.parametrize("max_new_tokens", [None, 20, 60, 200])
def test_an_answer_fits_its_schema_at_any_limit(model, tokenizer, max_new_tokens):
    text = grammar_of(json_rule(PERSON))
    shortest = len(compile_grammar(tokenizer, text).plan)
    for sequence in answers(model, tokenizer, text, n=8, max_new_tokens=max_new_tokens or shortest):
        jsonschema.validate(json.loads(text_of(sequence, tokenizer)), PERSON)
        assert len(sequence.tokens) <= (max_new_tokens or shortest)
        ended = sequence.tokens[-1] in STOPS and not sequence.constraint.cut
        assert sequence.finish_reason == ("stop" if ended else "length")


SCALARS = st.one_of(
    st.just({"type": "integer"}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "string"}),
    st.builds(
        lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, st.integers(-99, 99), st.integers(0, 9)
    ),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low}, st.integers(-9, 9)),
    st.builds(
        lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n}, st.integers(0, 9), st.integers(0, 9)
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.text(max_size=5) | st.integers(-9, 9), min_size=1, max_size=4)
    ),
    st.sampled_from(["^[a-z]+;$", "^(ab|cd)*x$", "^[0-9]{3}-[0-9]{4}$", "^.*终$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "uuid", "email", "ipv4"]).map(lambda kind: {"type": "string", "format": kind}),
)


def composed(schemas):
    def of_properties(properties: dict, n: int, closed: bool) -> dict:
        schema = {"type": "object", "properties": properties, "required": [*properties][:n]}
        return schema | ({"additionalProperties": False} if closed else {})

    names = st.text('ab_"\\ 中', min_size=1, max_size=4)
    return st.one_of(
        st.builds(of_properties, st.dictionaries(names, schemas, max_size=3), st.integers(0, 3), st.booleans()),
        st.builds(lambda items, n: {"type": "array", "items": items, "minItems": n}, schemas, st.integers(0, 3)),
        st.lists(schemas, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    )


@given(schema=st.recursive(SCALARS, composed, max_leaves=6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_answers_fit_any_schema(model, tokenizer, schema, seed):
    with pytest.MonkeyPatch.context() as patch:
        unlimited(patch)
        text = grammar_of(json_rule(schema))
        torch.manual_seed(seed)
        try:
            shortest = len(compile_grammar(tokenizer, text).plan)
        except UserError:  # it is refused
            reject()
        for limit in (shortest, max(shortest, 48)):
            for sequence in answers(model, tokenizer, text, n=3, max_new_tokens=limit):
                value = json.loads(text_of(sequence, tokenizer))
                jsonschema.validate(value, schema, format_checker=FORMATS)


def test_a_text_has_no_half_of_a_surrogate_pair(tokenizer):
    matcher = compile_grammar(tokenizer, grammar_of(json_rule({"type": "string"}))).matcher
    for text, fits in (('"a\\n\\"中"', True), ('"\\ud83d"', False)):
        ids = encode(tokenizer, text)
        assert (matcher.validate_tokens(ids) == len(ids)) is fits


def test_recursive_schemas_end(model, tokenizer):
    tree = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
                "required": ["v", "kids"],
            }
        },
        "$ref": "#/$defs/node",
    }
    chain = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    }
    for schema in (tree, chain, {"type": "object"}, {}):
        for sequence in answers(model, tokenizer, grammar_of(json_rule(schema)), n=4):
            jsonschema.validate(json.loads(text_of(sequence, tokenizer)), schema)


def test_choices_regexes_and_grammars(model, tokenizer):
    for sequence in answers(model, tokenizer, grammar_of(choice_rule(["是", "否", 'a "b"\n'])), n=8):
        assert text_of(sequence, tokenizer) in ("是", "否", 'a "b"\n')
    for regex in (r"[a-z]+/\d{2}", "(甲|乙)*丙", r".*END", "(a{2,5}b)+"):
        for sequence in answers(model, tokenizer, grammar_of(regex_rule(regex)), n=4):
            assert re.fullmatch(regex, text_of(sequence, tokenizer)), regex
    sums = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]*/'
    gbnf = 'root ::= number ("+" number)*\nnumber ::= [1-9] [0-9]*'
    for text in (sums, gbnf):
        for sequence in answers(model, tokenizer, lark_grammar(text), n=4):
            assert re.fullmatch(r"[1-9]\d*(\+[1-9]\d*)*", text_of(sequence, tokenizer))


# ------------------------------------------------------------------------------------------------------------ company


def test_rows_without_a_grammar_are_bit_identical(model, tokenizer):
    def free(constraint):
        engine = Engine(model, max_rows=4, keep_log_probs=True)
        sequences = [Sequence([BOS, 200 + i], 40, STOPS, Sampling(1.0, top_p=0.9), seed=i) for i in range(4)]
        sequences[1].constraint = constraint
        for sequence in sequences:
            engine.submit(sequence)
        while engine.busy:
            engine.step()
        return [(sequence.tokens, sequence.log_probs) for sequence in sequences]

    alone = free(None)
    constrained = free(Constraint(compile_grammar(tokenizer, grammar_of(json_rule(PERSON))), STOPS))
    assert [alone[i] for i in (0, 2, 3)] == [constrained[i] for i in (0, 2, 3)]
    assert alone[1] != constrained[1]


def test_log_probs_are_the_models_own_and_forced_tokens_are_not_chosen(model, tokenizer):
    (sequence, *_) = answers(model, tokenizer, grammar_of(json_rule(PERSON)), keep_log_probs=True)
    ids = torch.tensor([sequence.prompt + sequence.tokens[:-1]])
    expected = model(ids)[0, 1:].log_softmax(-1).gather(1, torch.tensor(sequence.tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(sequence.log_probs), expected, atol=1e-4)
    assert 0 < sum(sequence.chosen) < len(sequence.chosen)  # a token without an alternative was not chosen


# ------------------------------------------------------------------------------------------------- thoughts and calls


def chat(model, tokenizer, text: str, say: list[int], trigger=None, **flags):
    """An answer that the model would begin with `say`."""
    config = GenerationConfig(**dict(temperature=1.0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=80) | flags)
    session = Session(model, tokenizer, config, grammar=compile_grammar(tokenizer, text, trigger))
    sequence = session.sequence([BOS, 300], seed=1)
    engine = Engine(model, max_rows=1)
    engine.submit(sequence)
    said, take = list(say), sequence.take
    sequence.take = lambda token: take(said.pop(0) if said and not sequence.forced else token)
    while engine.busy:
        engine.step()
    return sequence, read_tokens(sequence.tokens, tokenizer)


def test_the_document_begins_after_the_thought(model, tokenizer):
    thought = [THINK, *encode(tokenizer, "\n想一想\n"), THINK + 1]
    text = grammar_of(json_rule(PERSON))
    sequence, reply = chat(model, tokenizer, text, thought)
    assert reply.reasoning == "想一想"
    assert sequence.tokens[: len(thought)] == thought
    jsonschema.validate(json.loads(reply.content), PERSON)
    endless = [THINK, *encode(tokenizer, "想" * 200)]
    sequence, reply = chat(model, tokenizer, text, endless)  # the thought is ended in time
    assert reply.reasoning.startswith("想想想")
    assert len(sequence.tokens) <= 80
    jsonschema.validate(json.loads(reply.content), PERSON)
    sequence, reply = chat(model, tokenizer, text, endless, think="off")
    assert THINK not in sequence.tokens


WEATHER = {"name": "weather", "parameters": PERSON, "strict": True}
TIME = {"name": '时间"', "parameters": None}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, TIME)]


@pytest.mark.parametrize("max_new_tokens", [40, 150])
def test_calls_are_valid(model, tokenizer, max_new_tokens):
    text = grammar_of(calls_rule(TOOLS, tokenizer.tags["tool_call"], several=True))
    for temperature in (0.0, 1.0, 2.0):
        _, reply = chat(model, tokenizer, text, [], max_new_tokens=max_new_tokens, temperature=temperature, think="off")
        assert reply.tool_calls
        assert not reply.content.strip()
        for call in reply.tool_calls:
            assert call["name"] in ("weather", '时间"')
            jsonschema.validate(call["arguments"], PERSON if call["name"] == "weather" else {"type": "object"})


def test_the_arguments_of_a_call_in_free_text_are_valid(model, tokenizer):
    text = grammar_of(calls_rule(TOOLS[:1], tokenizer.tags["tool_call"], several=False))
    say = [*encode(tokenizer, "我来查。"), TOOL_CALL]
    sequence, reply = chat(model, tokenizer, text, say, trigger=TOOL_CALL)
    assert reply.content.startswith("我来查。")
    jsonschema.validate(reply.tool_calls[0]["arguments"], PERSON)
    sequence, reply = chat(model, tokenizer, text, say, trigger=TOOL_CALL, max_new_tokens=8)  # too little for a call
    assert not reply.tool_calls
    assert sequence.finish_reason == "length"
    sequence, reply = chat(model, tokenizer, text, encode(tokenizer, "你好。"), trigger=TOOL_CALL)
    assert reply.content.startswith("你好。")


# ------------------------------------------------------------------------------------------------------------ attacks


def nested(depth: int) -> dict:
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def crossed(depth: int) -> dict:
    """A small schema whose alternatives multiply when they are combined."""
    names = [
        {"anyOf": [{"properties": {f"{letter}{i}": {"type": "string"}}} for letter in "abcd"]} for i in range(depth)
    ]
    return {"type": "object", "allOf": names}


HOSTILE = {
    "100,000 words": {"enum": [f"w{i}" for i in range(100_000)]},
    "many words": {"enum": [f"w{i}" for i in range(9_000)]},
    "many forms": {
        "anyOf": [{"properties": {f"k{i}": {"type": "integer"}}, "required": [f"k{i}"]} for i in range(1000)]
    },
    "long text": {"type": "string", "minLength": 10**9},
    "many items": {"type": "array", "items": PERSON, "minItems": 10**6},
    "deep": nested(400),
    "loop": {"$ref": "#"},
    "two loops": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "endless": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "doubling": {
        "$defs": {
            f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2, "minItems": 2}
            for i in range(40)
        }
        | {"d40": {"type": "null"}},
        "$ref": "#/$defs/d0",
    },
    "crossed": crossed(12),
    "optional": {
        "type": "object",
        "properties": {f"p{i}": {"type": "integer"} for i in range(500)},
        "minProperties": 1,
    },
    "foreign": {"$ref": "https://example.com/schema.json"},
    "unknown": {"type": "no such type"},
    "nothing": {"type": "string", "enum": [1]},
    "pattern": {"type": "string", "pattern": "^(a|a)*(a*)*(.*a){20}b$"},
    "look-ahead": {"type": "string", "pattern": "^(?=a)a$"},
    "options": {"type": "string", "x-guidance": {"lenient": True, "whitespace_pattern": "x"}},
}
HOSTILE = {name: grammar_of(json_rule(schema)) for name, schema in HOSTILE.items()} | {
    "repeated": "start: /(a{1000}){1000}/",
    "repeated inside": "start: /x?(a{0,100}b{0,100}){0,500}(c{1000}){1000}/",
    "repeated, or not": "start: /b|(a{1000}){1000}/",
    "nested repeats": "start: /((a{0,100}){0,100}){0,100}x/",
    "letters": r"start: /\p{L}{1,2000}[0-9]*/",
    "empty loop": 'start: a\na: a | ""',
    "endless rule": 'start: "x" start',
    "no rule": "start: missing",
    "broken": "start: (((",
    "json": "start: %json {",
    "not a grammar": "�\x00\n::=",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_bounded(model, tokenizer, name):
    start, slowest, compiled, refusal = time.process_time(), 0.0, None, ""
    try:
        compiled = compile_grammar(tokenizer, HOSTILE[name])
    except UserError as error:
        refusal = str(error)
    compiling = time.process_time() - start  # of this process; the other one's is limited
    if compiled:
        sequence = Sequence([BOS, 7], 512, STOPS, Sampling(2.0), seed=0)
        sequence.constraint = Constraint(compiled, STOPS)
        engine = Engine(model, max_rows=1)
        engine.submit(sequence)
        while engine.busy:
            start = time.process_time()
            engine.step()
            slowest = max(slowest, time.process_time() - start)
        text_of(sequence, tokenizer)
    print(f"{name}: {compiling:.2f} s, slowest step {slowest:.3f} s, {refusal or 'used'}")
    assert compiling < 6  # CPU seconds
    assert slowest < 1
    assert "\n" not in refusal
    assert len(refusal) < 500
