"""Structured output as clients ask for it: OpenAI's client and its pydantic helpers, vLLM's fields, hostile schemas."""

import concurrent.futures
import json
import re
import time
from typing import Annotated, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from model.chat import THINK, TOOL_CALL, encode

HELLO = [{"role": "user", "content": "你好"}]


class Pet(BaseModel):
    name: str = Field(max_length=12)  # without a limit, nonsense hardly ever ends
    kind: Literal["猫", "狗"]
    legs: int = Field(ge=0, le=4)


class Owner(BaseModel):
    pets: list[Pet] = Field(min_length=1, max_length=2)
    note: Annotated[str, Field(max_length=9)] | None


SCHEMA = Pet.model_json_schema()
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
TOOLS = [
    {"type": "function", "function": {"name": "save", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]
STRICT = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]


def chat(client, max_tokens=100, **fields):
    fields = dict(model="sft", messages=HELLO, temperature=1.5, top_p=1, seed=1, max_tokens=max_tokens) | fields
    return client.chat.completions.create(**fields)


def is_pet(text: str):
    Pet.model_validate_json(text)


# ------------------------------------------------------------------------------------------------------ response_format


def test_parse_gives_a_pydantic_model(client):
    for model, seed in ((Pet, 1), (Pet, 2), (Owner, 3)):
        reply = client.chat.completions.parse(
            model="sft", messages=HELLO, response_format=model, temperature=0.5, max_tokens=300, seed=seed
        )
        assert isinstance(reply.choices[0].message.parsed, model)


def test_the_streaming_helper_parses_too(client):
    stream = client.chat.completions.stream(model="sft", messages=HELLO, response_format=Pet, max_tokens=300, seed=5)
    with stream as events:
        kinds = {event.type for event in events}
        assert isinstance(events.get_final_completion().choices[0].message.parsed, Pet)
    assert "content.delta" in kinds


@pytest.mark.parametrize("max_tokens", [40, 60, 300])
def test_every_answer_fits_streamed_or_not(client, max_tokens):
    fields = dict(response_format=FORMAT, max_tokens=max_tokens, n=4)
    reply = chat(client, **fields)
    streamed = {}
    for chunk in chat(client, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[choice.index] for choice in reply.choices] == [each.message.content for each in reply.choices]
    for choice in reply.choices:
        is_pet(choice.message.content)
        assert choice.finish_reason in ("stop", "length")


def test_json_object(client):
    for seed in range(4):
        reply = chat(client, response_format={"type": "json_object"}, seed=seed)
        assert isinstance(json.loads(reply.choices[0].message.content), dict)


def test_stop_strings_do_not_cut_a_document(client):
    stop = ['"', "}", "name", ","]
    is_pet(chat(client, response_format=FORMAT, stop=stop).choices[0].message.content)


def test_a_thought_comes_before_the_document(client, say, tokenizer):
    say("想", [THINK, *encode(tokenizer, "\n嗯\n"), THINK + 1])
    message = chat(client, messages=[{"role": "user", "content": "想"}], response_format=FORMAT).choices[0].message
    assert message.reasoning_content == "嗯"
    is_pet(message.content)


# ---------------------------------------------------------------------------------------------------------------- tools


def check_calls(calls, names):
    assert calls
    for call in calls:
        assert call.function.name in names
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, SCHEMA if call.function.name == "save" else {"type": "object"})


def test_required_and_named_tools(client):
    named = {"type": "function", "function": {"name": "save"}}
    for choice, names in (("required", ["save", "now"]), (named, ["save"])):
        fields = dict(tools=TOOLS, tool_choice=choice, max_tokens=200, extra_body={"think": "off"})
        for stream in (False, True):
            reply = chat(client, stream=stream, **fields)
            if stream:
                deltas = [chunk.choices[0].delta for chunk in reply if chunk.choices]
                calls = [call for delta in deltas for call in delta.tool_calls or []]
            else:
                calls = reply.choices[0].message.tool_calls
                assert reply.choices[0].finish_reason in ("tool_calls", "length")
            check_calls(calls, names)


def test_one_call_where_calls_may_not_be_parallel(client):
    for seed in range(3):
        fields = dict(tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed, max_tokens=200)
        check_calls(chat(client, **fields).choices[0].message.tool_calls, ["save", "now"])
        assert len(chat(client, **fields).choices[0].message.tool_calls) == 1


def test_strict_tools_have_valid_arguments_whenever_they_are_called(client, say, tokenizer):
    say("叫", [*encode(tokenizer, "好的。"), TOOL_CALL])
    reply = chat(client, messages=[{"role": "user", "content": "叫"}], tools=STRICT, max_tokens=200)
    assert reply.choices[0].message.content.startswith("好的。")
    check_calls(reply.choices[0].message.tool_calls, ["save"])


def test_tools_or_a_document(client):
    for seed in range(6):
        message = chat(client, tools=TOOLS, response_format=FORMAT, seed=seed, max_tokens=200).choices[0].message
        if message.tool_calls:
            check_calls(message.tool_calls, ["save", "now"])
        else:
            is_pet(message.content)


def test_pydantic_tools(client):
    reply = client.chat.completions.parse(
        model="sft",
        messages=HELLO,
        tools=[openai.pydantic_function_tool(Pet)],
        tool_choice="required",
        temperature=1,
        seed=0,
        max_tokens=300,
        parallel_tool_calls=False,
    )
    (call,) = reply.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Pet)


# ------------------------------------------------------------------------------------------------------- vLLM's fields


FIELDS = {
    "json": (SCHEMA, is_pet),
    "regex": (r"\d{3}-\d{4}", lambda text: re.fullmatch(r"\d{3}-\d{4}", text)),
    "choice": (["是", "不是"], lambda text: text in ("是", "不是")),
    "grammar": ('root ::= [ab]+ "。"', lambda text: re.fullmatch("[ab]+。", text)),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_vllm(client, name):
    value, check = FIELDS[name]
    for extra in ({f"guided_{name}": value}, {"structured_outputs": {name: value}}):
        assert check(chat(client, extra_body=extra).choices[0].message.content) is not False
        reply = client.completions.create(model="pretrain", prompt="春天", max_tokens=60, n=2, extra_body=extra)
        for choice in reply.choices:
            assert check(choice.text) is not False


def test_a_schema_as_text(client):
    is_pet(chat(client, extra_body={"guided_json": json.dumps(SCHEMA)}).choices[0].message.content)


# ------------------------------------------------------------------------------------------------------------- refusals


REFUSED = {
    "two structures": dict(response_format=FORMAT, guided_choice=["a"]),
    "no schema": dict(response_format={"type": "json_schema"}),
    "no type": dict(response_format={"type": "yaml"}),
    "no choice": dict(guided_choice=[]),
    "no json": dict(guided_json="{"),
    "unknown keyword": dict(guided_json={"type": "array", "contains": {"type": "integer"}}),
    "no tool": dict(tool_choice="required"),
    "another tool": dict(tool_choice={"type": "function", "function": {"name": "x"}}, tools=TOOLS),
    "look-ahead": dict(guided_regex="(?=a)a"),
    "broken regex": dict(guided_regex="("),
    "broken grammar": dict(guided_grammar="start: ((("),
    "few tokens": dict(response_format=FORMAT, max_tokens=4),
    "grammar and tools": dict(guided_grammar='start: "a"', tools=TOOLS),
    "100,000 alternatives": dict(guided_choice=[f"w{i}" for i in range(100_000)]),
    "a loop": dict(guided_json={"$ref": "#"}),
    "endless": dict(guided_json={"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
    "unknown function": dict(structured_outputs={"json": SCHEMA, "regex": "a"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(live, name):
    body = dict(model="sft", messages=HELLO, max_tokens=60) | REFUSED[name]
    reply = live.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    message = reply.json()["error"]["message"]
    assert "\n" not in message
    assert len(message) < 600


def test_a_schema_that_explodes_blocks_nobody(live):
    """While schemas that take seconds are compiled, other requests are answered."""
    forms = [[{"properties": {f"{letter}{i}": {"type": "string"}}} for letter in "abcd"] for i in range(12)]

    def post(number: int) -> int:
        schema = {"type": "object", "allOf": [{"anyOf": form} for form in forms], "title": str(number)}
        body = dict(model="sft", messages=HELLO, max_tokens=20, guided_json=schema)
        return live.http.post("/v1/chat/completions", json=body).status_code

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        posted = [pool.submit(post, i) for i in range(2)]
        start = time.perf_counter()
        for _ in range(3):
            assert live.http.post("/v1/completions", json=dict(model="pretrain", prompt="a", max_tokens=3)).is_success
        assert live.http.get("/health").is_success
        print(f"3 answers in {time.perf_counter() - start:.2f} s; done: {[one.done() for one in posted]}")
        assert {one.result() for one in posted} <= {200, 400}
