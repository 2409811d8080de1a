"""/v1/responses, asked by OpenAI's client: text, events, tools in both directions, and conversations that it stores."""

import json

import openai
import pytest
from conftest import CONTEXT
from test_api import HELLO, WEATHER, call_ids, chat

from model.chat import IM_END, THINK, encode
from server.responses import StoredResponses, messages_of

TOOL = {"type": "function"} | WEATHER["function"]


def respond(client, input="你好", model="sft", temperature=0, max_output_tokens=24, **fields):
    return client.responses.create(
        model=model, input=input, temperature=temperature, max_output_tokens=max_output_tokens, **fields
    )


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def without_ids(response) -> list[dict]:
    return [{name: value for name, value in item.model_dump().items() if "id" not in name} for item in response.output]


def test_a_response_is_the_answer_of_the_chat_endpoint(client):
    response, answer = respond(client), chat(client)
    assert response.output_text == answer.choices[0].message.content != ""
    assert (response.object, response.model) == ("response", "sft")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == answer.usage.prompt_tokens
    assert response.usage.output_tokens == 24
    assert response.usage.total_tokens == answer.usage.total_tokens
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    asked = [{"role": "system", "content": "简短"}, *HELLO]
    expected = chat(client, asked, seed=5, temperature=1).choices[0].message.content
    same = respond(client, instructions="简短", temperature=1, extra_body={"seed": 5})
    assert same.output_text == expected
    assert (same.instructions, same.temperature) == ("简短", 1)
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "你"}, {"type": "input_text", "text": "好"}]}]
    assert respond(client, parts).output_text == response.output_text


def test_an_answer_that_ends_is_completed(client, say, tokenizer):
    say("完", [*encode(tokenizer, "好。"), IM_END])
    response = respond(client, "完")
    assert (response.status, response.output_text, response.incomplete_details) == ("completed", "好。", None)
    say("静", [IM_END])
    assert respond(client, "静").output[0].content[0].text == ""


def events_of(client, input, **fields) -> tuple[list, object]:
    """The events, and the response of the last one. What each tells is checked against the final response."""
    events = list(respond(client, input, stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.output == []
    final = events[-1].response
    assert events[-1].type == f"response.{final.status}"
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == final.output
    for index, item in enumerate(final.output):
        own = [event for event in events if getattr(event, "output_index", None) == index]
        assert own[0].type == "response.output_item.added"
        assert (own[0].item.id, own[0].item.status) == (item.id, "in_progress")
        deltas = "".join(event.delta for event in own if event.type.endswith(".delta"))
        (whole,) = [item.arguments] if item.type == "function_call" else [part.text for part in item.content]
        assert deltas == whole
        for event in own:
            if event.type.endswith("text.done"):
                assert event.text == whole
            if event.type.endswith("arguments.done"):
                assert event.arguments == whole
            if event.type == "response.content_part.done":
                assert event.part.model_dump() == item.content[0].model_dump()
    return events, final


def test_events_tell_of_text_reasoning_and_calls(client, say, tokenizer):
    call = '{"name": "weather", "arguments": {"city": "上海"}}'
    thought = [THINK, *encode(tokenizer, "\n查一查\n"), THINK + 1, *encode(tokenizer, "\n\n")]
    say("天气？", [*thought, *encode(tokenizer, "我查。\n"), *call_ids(tokenizer, call, call), IM_END])
    fields = dict(tools=[TOOL], max_output_tokens=200)
    events, final = events_of(client, [user("天气？")], **fields)
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    reasoning, message, *calls = final.output
    assert reasoning.content[0].text == "查一查"
    assert message.content[0].text == final.output_text == "我查。"
    assert [json.loads(call.arguments) for call in calls] == [{"city": "上海"}] * 2
    assert calls[0].call_id != calls[1].call_id
    assert 0 < final.usage.output_tokens_details.reasoning_tokens < final.usage.output_tokens
    kinds = {event.type.removeprefix("response.") for event in events}
    assert kinds == {
        *("created", "in_progress", "completed", "output_item.added", "output_item.done"),
        *("content_part.added", "content_part.done", "output_text.delta", "output_text.done"),
        *("reasoning_text.delta", "reasoning_text.done"),
        *("function_call_arguments.delta", "function_call_arguments.done"),
    }
    assert without_ids(respond(client, [user("天气？")], **fields)) == without_ids(final)


def test_the_clients_helper_for_streams_understands_them(client, say, tokenizer):
    say("流", [*encode(tokenizer, "一二三"), IM_END])
    with client.responses.stream(model="sft", input="流") as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(texts) == stream.get_final_response().output_text == "一二三"


def test_tools_in_both_directions(client, say, tokenizer):
    call = '{"name": "weather", "arguments": {"city": "上海"}}'
    say("上海？", [*call_ids(tokenizer, call), IM_END], [*encode(tokenizer, "晴。"), IM_END])
    asked, fields = [user("上海？")], dict(tools=[TOOL], max_output_tokens=200)
    first = respond(client, asked, **fields)
    (made,) = first.output
    result = {"type": "function_call_output", "call_id": made.call_id, "output": "晴"}
    by_hand = respond(client, [*asked, *(item.model_dump() for item in first.output), result], **fields)
    stored = respond(client, [result], previous_response_id=first.id, **fields)
    spoken = chat(client, [user("上海？")], tools=[WEATHER], max_tokens=200).choices[0].message
    messages = [user("上海？"), spoken.model_dump(exclude_none=True)]
    messages.append({"role": "tool", "tool_call_id": spoken.tool_calls[0].id, "content": "晴"})
    expected = chat(client, messages, tools=[WEATHER], max_tokens=200)
    for response in (by_hand, stored):
        assert (response.output_text, response.status) == ("晴。", "completed")
        assert response.usage.input_tokens == expected.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="tool_call_id names no call"):
        respond(client, [*asked, result], **fields)


def test_tools_of_the_server_are_reported(serve, say, tokenizer):
    call = '{"name": "calculator", "arguments": {"expression": "6*7"}}'
    say("算", [*call_ids(tokenizer, call), IM_END], [*encode(tokenizer, "42。"), IM_END])
    client = serve(tools=["calculator"]).client
    first = respond(client, "算", max_output_tokens=200)
    run, message = first.output
    assert (run.type, run.name, json.loads(run.arguments), run.output) == (
        "mcp_call",
        "calculator",
        {"expression": "6*7"},
        "42",
    )
    assert message.content[0].text == "42。"
    again = respond(client, [user("算"), *(item.model_dump() for item in first.output), user("好")])
    assert again.status in ("completed", "incomplete")


def test_items_become_messages():
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": "y"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]},
        {"type": "message", "role": "assistant", "content": "c"},
        {"type": "message", "role": "assistant", "content": "d"},
    ]
    user, first, *results, second, third = messages_of(items)
    assert user == items[0]
    assert (first["reasoning_content"], len(first["tool_calls"])) == ("r", 2)
    assert [result["tool_call_id"] for result in results] == ["1", "2"]
    assert second == {"role": "assistant", "reasoning_content": "s", "content": "c"}
    assert third == {"role": "assistant", "content": "d"}


# -------------------------------------------------------------------------------------------------- what is kept


def test_a_conversation_is_continued_by_its_id(client):
    first = respond(client, instructions="简短")
    second = respond(client, "再说", previous_response_id=first.id)
    said = [*HELLO, {"role": "assistant", "content": first.output_text}, user("再说")]
    assert second.usage.input_tokens == chat(client, said, max_tokens=1).usage.prompt_tokens, "without instructions"
    third = respond(client, "再说", previous_response_id=second.id)
    said += [{"role": "assistant", "content": second.output_text}, user("再说")]
    assert third.usage.input_tokens == chat(client, said, max_tokens=1).usage.prompt_tokens
    other = respond(client, "另说", previous_response_id=first.id)
    assert other.previous_response_id == first.id
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(second.id)
    for ask in (
        lambda: respond(client, "x", previous_response_id=second.id),
        lambda: client.responses.retrieve(second.id),
        lambda: client.responses.delete(second.id),
    ):
        with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
            ask()
    assert client.responses.retrieve(third.id).id == third.id


def test_what_shall_not_be_stored_is_not(client):
    response = respond(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        respond(client, "x", previous_response_id=response.id)


def test_ids_cannot_be_guessed(client):
    names = [respond(client, max_output_tokens=1).id for _ in range(8)]
    assert len({name[:12] for name in names}) == 8
    assert all(len(name) == len("resp_") + 48 for name in names)


def test_stored_responses_take_limited_memory():
    stored = StoredResponses(limit=10_000)
    for number in range(1000):
        stored.put({"id": str(number), "text": "芥" * (number % 100)}, [])
        stored.get(str(number // 100 * 100))  # the ones in use stay
        assert stored.size == sum(map(len, stored.entries.values())) <= 10_000
    assert "999" in stored.entries
    assert "900" in stored.entries
    assert "901" not in stored.entries
    stored.put({"id": "large", "text": "a" * 20_000}, [])
    assert (stored.entries, stored.size) == ({}, 0)


# -------------------------------------------------------------------------------------------------- mistakes

WRONG = {
    "input": [dict(input=3), dict(input=[3]), dict(input=[]), dict(input=[{"type": "item_reference", "id": "x"}])],
    "input.0.content": [dict(input=[{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}])],
    "input.0.role": [dict(input=[{"role": "root", "content": "x"}]), dict(input=[{"type": "message", "content": "x"}])],
    "max_output_tokens": [dict(max_output_tokens=-2)],
    "reasoning.effort": [dict(reasoning={"effort": "much"})],
    "background": [dict(background=True)],
    "truncation": [dict(truncation="auto")],
    "conversation": [dict(conversation="conv_1")],
    "tools": [dict(tools=[{"type": "web_search"}]), dict(tools=[{"type": "function"}])],
    "temperature": [dict(temperature=3)],
    "n": [dict(n=2)],
    "messages": [dict(messages=HELLO)],
    "max_tool_calls": [dict(max_tool_calls=1)],
    "previous_response_id": [dict(previous_response_id="resp_" + "0" * 48), dict(previous_response_id="../x")],
}


@pytest.mark.parametrize(("place", "fields"), [(place, each) for place in WRONG for each in WRONG[place]], ids=str)
def test_what_cannot_be_is_refused_by_the_name_that_the_request_has(live, place, fields):
    reply = live.http.post("/v1/responses", json={"input": "x"} | fields)
    assert reply.status_code == (404 if place == "previous_response_id" else 400), reply.text
    error = reply.json()["error"]
    assert (error["param"] or "").startswith(place.partition(".")[0]), error
    assert error["message"]


def test_a_conversation_that_is_too_long_is_refused(live):
    error = live.http.post("/v1/responses", json={"input": "花" * 2 * CONTEXT}).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_a_failure_in_a_stream_is_an_event(serve, monkeypatch):
    client = serve(request_timeout=0.01).client
    monkeypatch.setattr("engine.generation.Engine.step", lambda engine: __import__("time").sleep(0.1) or [])
    events = list(respond(client, stream=True))
    assert events[-1].type == "response.failed"
    assert "not finished" in events[-1].response.error.message
