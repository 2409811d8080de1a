"""An open model behind the API, with OpenAI's client: streaming, reasoning and tools as its template writes them."""

import json
from collections import deque

import openai
import pytest
from open_models import write_model
from transformers import AutoTokenizer

from engine.session import Session
from model.chat import encode, load_tokenizer

ASKED = [{"role": "user", "content": "天气？"}]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_model(tmp_path_factory.mktemp("open") / name, name) for name in ("thinking", "instruct")}


@pytest.fixture
def say(monkeypatch, folders):
    """say(turn, turn …): the texts that the model generates next, tags included."""
    tokenizer, turns = load_tokenizer(folders["thinking"]), deque()
    sequence = Session.sequence

    def scripted(self, prompt, seed=None):
        found = sequence(self, prompt, seed)
        found.forced.extend(turns.popleft())
        return found

    monkeypatch.setattr(Session, "sequence", scripted)
    return lambda *texts: turns.extend(ids_of(tokenizer, text) for text in texts)


def ids_of(tokenizer, text: str) -> list[int]:
    """With its tags as control tokens, and the end of the turn."""
    ids, found = [], tokenizer.template.controls.search(text)
    while found:
        ids += [*encode(tokenizer, text[: found.start()]), tokenizer.template.ids[found[0]]]
        text = text[found.end() :]
        found = tokenizer.template.controls.search(text)
    return [*ids, *encode(tokenizer, text), tokenizer.end_of_turn]


def ask(live, messages, **fields):
    return live.client.chat.completions.create(model="", messages=messages, max_tokens=200, **fields)


def test_reasoning_and_tools_streamed_and_whole(serve, say, folders):
    live, tokenizer = serve([folders["thinking"]]), load_tokenizer(folders["thinking"])
    call = '{"name": "weather", "arguments": {"city": "上海"}}'
    calling = f"<think>\n要查。\n</think>\n\n我查。\n<tool_call>\n{call}\n</tool_call>"
    say(calling, calling, "<think>\n\n</think>\n\n晴。")
    answer = ask(live, ASKED, tools=[WEATHER]).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert (answer.message.content, answer.message.reasoning_content) == ("我查。", "要查。")
    (call,) = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "上海"})
    pieces = {"content": "", "reasoning_content": ""}
    for chunk in ask(live, ASKED, tools=[WEATHER], stream=True):
        for name in pieces:
            pieces[name] += getattr(chunk.choices[0].delta, name, None) or ""
    assert pieces == {"content": "我查。", "reasoning_content": "要查。"}

    back = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    message = {
        "role": "assistant",
        "content": "我查。",
        "reasoning_content": "要查。",
        "tool_calls": [call.model_dump()],
    }
    last = ask(live, [*ASKED, message, back], tools=[WEATHER])
    assert last.choices[0].message.content == "晴。"
    function = {"name": "weather", "arguments": {"city": "上海"}}
    message = message | {"tool_calls": [{"type": "function", "function": function}]}
    theirs = AutoTokenizer.from_pretrained(folders["thinking"])
    expected = theirs.apply_chat_template(
        [*ASKED, message, back], tools=[WEATHER], add_generation_prompt=True, return_dict=False
    )
    assert last.usage.prompt_tokens == len(expected)
    assert tokenizer.prompt([*ASKED, message, back], [WEATHER]) == expected


def test_the_servers_own_tools(serve, say, folders):
    live = serve([folders["thinking"]], tools=["calculator"])
    say('<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>', "42。")
    answer = ask(live, [{"role": "user", "content": "6 × 7？"}]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("42。", "stop")


def test_what_a_template_refuses_is_a_bad_request(serve, folders):
    live = serve([folders["instruct"]])
    for messages, fields, reason in (
        ([{"role": "system", "content": "x"}, *ASKED], {}, "only user and assistant roles are supported"),
        (ASKED, {"tools": [WEATHER]}, "does not list tools"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason):
            ask(live, messages, **fields)
    assert ask(live, ASKED).usage.completion_tokens > 0


def test_tools_are_refused_at_the_start_where_no_answer_could_have_calls(run_here, folders):
    line = run_here("serve.py", folders["instruct"], "--port", 0, "--tools", "calculator").error_line(status=2)
    assert "omit --tools" in line
    assert str(folders["instruct"]) in line
