"""OpenAI's API, asked by OpenAI's client: each field, streamed and whole, and that company changes nothing."""

import concurrent.futures
import json
import math
import re

import openai
import pytest
import torch
from conftest import CONTEXT
from helpers import ROOT

from model.chat import BOS, EOS, IM_END, THINK, TOOL_CALL, encode, encode_chat
from model.checkpoint import load_model

HELLO = [{"role": "user", "content": "你好"}]
JSON = {"Content-Type": "application/json"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def chat(client, messages=HELLO, model="sft", temperature=0, max_tokens=24, **fields):
    return client.chat.completions.create(
        model=model, messages=messages, temperature=temperature, max_tokens=max_tokens, **fields
    )


def streamed(client, **fields) -> dict:
    """The choice of a streamed answer put together, and its usage."""
    whole = {"content": "", "reasoning_content": "", "tool_calls": [], "tool_runs": [], "logprobs": [], "pieces": []}
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **fields):
        if chunk.usage:
            assert chunk.choices == []
            whole["usage"] = chunk.usage.model_dump()
            continue
        (choice,) = chunk.choices
        assert "finish_reason" not in whole, "something came after the end"
        delta = choice.delta.model_dump()
        for name in ("content", "reasoning_content"):
            whole[name] += delta.get(name) or ""
        for name in ("tool_calls", "tool_runs"):
            whole[name] += delta.get(name) or []
        whole["pieces"] += [delta["content"]] if delta.get("content") else []
        whole["logprobs"] += choice.logprobs.content if choice.logprobs else []
        if choice.finish_reason:
            whole["finish_reason"] = choice.finish_reason
    return whole


# ----------------------------------------------------------------------------------------------------------- one answer


def test_models_are_listed_and_described(client):
    sft, pretrain = client.models.list().data
    assert (sft.id, sft.owned_by, sft.is_chat, sft.max_position_embeddings) == ("sft", "jiezi", True, CONTEXT)
    assert (pretrain.id, pretrain.is_chat, pretrain.parameters) == ("pretrain", False, sft.parameters)
    assert client.models.retrieve("pretrain") == pretrain
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_a_greedy_answer_is_the_one_that_eval_gives(client, models, run_here, tmp_path):
    messages = [[{"role": "user", "content": text}] for text in ("你好", "春天来了，", "Hello!")]
    messages.append([{"role": "system", "content": "简短"}, *HELLO, {"role": "assistant", "content": "好"}, *HELLO])
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    flags = ["--batch", tmp_path / "asked.jsonl", "--temperature", "0", "--max_new_tokens", "24", "--device", "cpu"]
    result = run_here("eval.py", "--model", models[0], *flags)
    answers = [json.loads(line)["answer"] for line in result.out.splitlines()]
    assert [chat(client, each).choices[0].message.content for each in messages] == answers
    assert len(set(answers)) == 4


def test_defaults_are_those_of_eval(client, run_here, models):
    from server.schema import ChatRequest

    shown = run_here("eval.py", "--help").out
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        default = re.search(rf"\n  --{name} .*?\(default:\s[^()]*\sor\s+(\S+)\)", shown, re.DOTALL).group(1)
        assert float(default) == ChatRequest.model_fields[name].default, name


def test_the_parts_of_an_answer(client):
    answer = chat(client, max_tokens=7)
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "sft", "length")
    assert answer.id.startswith("chatcmpl-")
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 7 + answer.usage.prompt_tokens)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs is None
    assert chat(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


def test_prompt_tokens_are_those_of_the_template(client, tokenizer):
    messages = [{"role": "system", "content": "简短"}, *HELLO, {"role": "assistant", "content": "好"}, *HELLO]
    ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert chat(client, messages, max_tokens=1).usage.prompt_tokens == len(ids)
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    developer = [{"role": "developer", "content": "简短"}, {"role": "user", "content": parts}, *messages[2:]]
    assert chat(client, developer).choices[0].message == chat(client, messages).choices[0].message


def test_an_answer_that_ends_by_itself_says_stop(client, say, tokenizer):
    say("结束", [*encode(tokenizer, "好的。"), IM_END])
    answer = chat(client, [{"role": "user", "content": "结束"}])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("好的。", "stop")


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=0),
        dict(temperature=1.0, seed=5),
        dict(temperature=1.5, top_p=0.5, seed=5, extra_body=dict(top_k=20, min_p=0.01, repetition_penalty=1.5)),
        dict(temperature=0, logprobs=True, top_logprobs=3),
    ],
    ids=str,
)
def test_streamed_is_whole(client, fields):
    answer, stream = chat(client, **fields), streamed(client, **fields)
    assert stream["content"] == answer.choices[0].message.content != ""
    assert len(stream["pieces"]) > 5
    assert stream["finish_reason"] == answer.choices[0].finish_reason
    assert stream["usage"] == answer.usage.model_dump()
    assert stream["logprobs"] == (answer.choices[0].logprobs.content if "logprobs" in fields else [])


def test_a_seed_decides_and_choices_have_each_their_own(client):
    answers = [chat(client, temperature=1, seed=7, n=4) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4
    assert [choice.index for choice in answers[0].choices] == [0, 1, 2, 3]
    assert answers[0].usage.completion_tokens == 4 * 24
    assert answers[0].usage.prompt_tokens == chat(client).usage.prompt_tokens
    assert chat(client, temperature=1, seed=7).choices[0].message.content == texts[0][0]
    assert chat(client, temperature=1, seed=8).choices[0].message.content != texts[0][0]
    together = ["", "", "", ""]
    for chunk in chat(client, temperature=1, seed=7, n=4, stream=True):
        (choice,) = chunk.choices
        together[choice.index] += choice.delta.content or ""
    assert together == texts[0]


def test_sampling_fields_reach_the_sampler(client):
    greedy = chat(client).choices[0].message.content
    for narrow in (dict(top_p=0.0), dict(extra_body={"top_k": 1}), dict(extra_body={"min_p": 1.0})):
        assert chat(client, temperature=2, **narrow).choices[0].message.content == greedy
    assert chat(client, temperature=1e-30).choices[0].message.content == greedy
    fields = dict(extra_body={"repetition_penalty": 1.0}, max_tokens=100)
    plain, penalized = (chat(client, **fields | extra) for extra in ({}, dict(extra_body={"repetition_penalty": 10})))
    assert plain.choices[0].message.content != penalized.choices[0].message.content


# ---------------------------------------------------------------------------------------------------- log-probabilities


@torch.no_grad()
def test_log_probabilities_are_the_models(client, models, tokenizer):
    answer = chat(client, max_tokens=6, logprobs=True, top_logprobs=4).choices[0]
    model, said = load_model(models[0]).eval(), answer.logprobs.content
    ids, _ = encode_chat(tokenizer, HELLO, add_generation_prompt=True)
    assert len(said) == 6
    assert b"".join(bytes(each.bytes) for each in said).decode() == answer.message.content
    for each in said:
        log_probs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        top = log_probs.topk(4)
        assert [other.logprob for other in each.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-3)
        token = next(i for i in top.indices.tolist() if log_probs[i].item() == pytest.approx(each.logprob, abs=1e-3))
        ids.append(token)


def test_log_probabilities_of_completions(client):
    answer = client.completions.create(model="pretrain", prompt="春天", max_tokens=8, temperature=0, logprobs=2)
    choice = answer.choices[0]
    said = choice.logprobs
    assert [len(part) for part in (said.tokens, said.token_logprobs, said.text_offset, said.top_logprobs)] == [8] * 4
    assert said.text_offset == sorted(said.text_offset)
    assert all(math.isfinite(each) and each <= 0 for each in said.token_logprobs)
    for token, offset in zip(said.tokens, said.text_offset):
        assert "\ufffd" in token or choice.text[offset:].startswith(token)
    answer = client.completions.create(model="pretrain", prompt="春天", logprobs=0)
    assert answer.choices[0].logprobs.top_logprobs is None


def test_log_probabilities_end_where_the_text_is_stopped(client, say, tokenizer):
    say("数", [*encode(tokenizer, "一二三四五六七"), IM_END])
    fields = dict(messages=[{"role": "user", "content": "数"}], stop="四五", logprobs=True)
    answer = chat(client, **fields).choices[0]
    assert answer.message.content == "一二三"
    assert b"".join(bytes(each.bytes) for each in answer.logprobs.content).decode() == "一二三"
    assert streamed(client, **fields)["logprobs"] == answer.logprobs.content


# ----------------------------------------------------------------------------------------------------------------- ends

STOPS = [
    ("二", "一"),
    ("三四五", "一二"),
    ("👍🏽", "一二三四五 "),
    ("五 👍", "一二三四"),
    ("d\ne", "一二三四五 👍🏽 ab c"),
]
STOPS += [(["x", "四", "b c"], "一二三"), (["一"], "")]


@pytest.mark.parametrize(("stop", "expected"), STOPS, ids=str)
def test_stop_strings_across_tokens_and_bytes(client, say, tokenizer, stop, expected):
    text = "一二三四五 👍🏽 ab cd\ne f"
    say("数数", [*encode(tokenizer, text), IM_END])
    fields = dict(messages=[{"role": "user", "content": "数数"}], stop=stop, max_tokens=100)
    answer, stream = chat(client, **fields), streamed(client, **fields)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    assert (stream["content"], stream["finish_reason"]) == (expected, "stop")
    assert stream["usage"] == answer.usage.model_dump()
    assert answer.usage.completion_tokens < len(encode(tokenizer, text))


def test_a_stop_string_that_does_not_come_holds_nothing_back_for_ever(client, say, tokenizer):
    say("喊", [*encode(tokenizer, "啊啊啊啊啊\n\n"), IM_END])
    for stop in ("啊啊啊啊啊啊", "\n\n\n", ["啊b", "\n\nb"]):
        assert streamed(client, messages=[{"role": "user", "content": "喊"}], stop=stop)["content"] == "啊啊啊啊啊\n\n"


def test_no_piece_ends_within_a_character(client, say, tokenizer):
    text = "龘靐齉👩‍👩‍👧‍👦𠮷"
    say("难字", [*encode(tokenizer, text), IM_END])
    stream = streamed(client, messages=[{"role": "user", "content": "难字"}], max_tokens=200)
    assert stream["content"] == text
    assert not any("\ufffd" in piece for piece in stream["pieces"])
    fields = dict(messages=[{"role": "user", "content": "难字"}], max_tokens=1)
    cut = streamed(client, **fields)
    assert (cut["content"], cut["finish_reason"]) == ("\ufffd", "length")
    assert chat(client, **fields).choices[0].message.content == "\ufffd"


def test_the_end_of_the_context_is_length(client):
    answer = chat(client, max_tokens=100_000)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == CONTEXT


def test_more_than_the_server_allows_is_length(serve):
    answer = chat(serve(max_new_tokens=9).client, max_tokens=None)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (9, "length")


# --------------------------------------------------------------------------------------------------- thinking and tools


def test_reasoning_stands_apart(client, say, tokenizer):
    thought = [THINK, *encode(tokenizer, "\n六七\n四十二\n"), THINK + 1, *encode(tokenizer, "\n\n答：\n42。\n"), IM_END]
    say("想", thought)
    asked = [{"role": "user", "content": "想"}]
    answer, stream = chat(client, asked), streamed(client, messages=asked)
    assert answer.choices[0].message.reasoning_content == stream["reasoning_content"] == "六七\n四十二"
    assert answer.choices[0].message.content == stream["content"] == "答：\n42。\n"
    assert not hasattr(chat(client).choices[0].message, "reasoning_content")


def test_off_keeps_it_from_thinking(client, live):
    model = live.served["sft"].batcher.model
    weight = model.lm_head.weight.data  # (in, out), as it is laid out for decoding
    weight[:, THINK] *= 4
    try:
        fields = dict(messages=[{"role": "user", "content": "想想"}], seed=0, temperature=1, max_tokens=60)
        texts = [streamed(client, **fields, extra_body={"think": think}) for think in ("show", "off")]
    finally:
        weight[:, THINK] /= 4
    assert texts[0]["reasoning_content"]
    assert not texts[1]["reasoning_content"]


def call_ids(tokenizer, *calls: str) -> list[int]:
    return [token for call in calls for token in (TOOL_CALL, *encode(tokenizer, f"\n{call}\n"), TOOL_CALL + 1)]


def test_a_round_trip_of_tools(client, say, tokenizer):
    calls = [f'{{"name": "weather", "arguments": {{"city": "{city}"}}}}' for city in ("上海", "北京")]
    calling = [*encode(tokenizer, "我查。\n"), *call_ids(tokenizer, *calls), IM_END]
    say("天气？", calling, [*encode(tokenizer, "晴。"), IM_END])
    asked = [{"role": "user", "content": "天气？"}]
    answer = chat(client, asked, tools=[WEATHER], max_tokens=200).choices[0]
    stream = streamed(client, messages=asked, tools=[WEATHER], max_tokens=200)
    assert answer.finish_reason == stream["finish_reason"] == "tool_calls"
    assert answer.message.content == stream["content"] == "我查。"
    made = answer.message.tool_calls
    assert [call.function.name for call in made] == ["weather"] * 2
    assert [json.loads(call.function.arguments) for call in made] == [{"city": "上海"}, {"city": "北京"}]
    assert [call["function"] for call in stream["tool_calls"]] == [call.function.model_dump() for call in made]
    assert [call["index"] for call in stream["tool_calls"]] == [0, 1]
    assert len({call.id for call in made}) == 2

    results = [{"role": "tool", "tool_call_id": call.id, "content": city} for call, city in zip(made, "沪京")]
    first = chat(client, asked, tools=[WEATHER], max_tokens=200, parallel_tool_calls=False).choices[0]
    assert (len(first.message.tool_calls), first.finish_reason) == (1, "tool_calls")
    again = [*asked, answer.message.model_dump(exclude_none=True), *results[::-1]]  # in any order
    given = [json.loads(call) for call in calls]
    rendered = [*asked, {"role": "assistant", "content": "我查。", "tool_calls": given}]
    rendered += [{"role": "tool", "content": city} for city in "沪京"]
    expected, _ = encode_chat(tokenizer, rendered, [WEATHER], add_generation_prompt=True)
    last = chat(client, again, tools=[WEATHER], max_tokens=200)
    assert last.usage.prompt_tokens == len(expected)
    assert (last.choices[0].message.content, last.choices[0].finish_reason) == ("晴。", "stop")


def test_a_conversation_goes_back_token_by_token(live, tokenizer):
    """What OpenAI's form loses nothing of: the ids of a chat with thoughts and calls are those of the template."""
    from server.schema import ChatRequest

    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": "值"}'}}
    other = {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    messages = [*HELLO, {"role": "assistant", "content": None, "reasoning_content": "想", "tool_calls": [call, other]}]
    messages += [{"role": "tool", "tool_call_id": name, "content": name.upper()} for name in "ba"]
    plain = [*HELLO, {"role": "assistant", "reasoning_content": "想"}, *({"role": "tool", "content": x} for x in "AB")]
    plain[1]["tool_calls"] = [{"name": "f", "arguments": {"x": "值"}}, {"name": "g", "arguments": {}}]
    assert encode_chat(tokenizer, ChatRequest(messages=messages).chat()) == encode_chat(tokenizer, plain)


def test_a_call_is_written_only_where_somebody_could_answer_it(client, live):
    weight = live.served["sft"].batcher.model.lm_head.weight.data
    weight[:, TOOL_CALL] *= 50
    try:
        fields = dict(messages=[{"role": "user", "content": "查"}], max_tokens=60, temperature=1, seed=1)
        with_tools = chat(client, tools=[WEATHER], **fields)
        without = [chat(client, **fields), chat(client, tools=[WEATHER], tool_choice="none", **fields)]
    finally:
        weight[:, TOOL_CALL] /= 50
    assert "<tool_call>" in with_tools.choices[0].message.content, "what is no call was lost"
    assert not any("<tool_call>" in answer.choices[0].message.content for answer in without)
    assert without[0].usage == without[1].usage, "tool_choice none shows no tools"


@pytest.mark.parametrize("text", ["no JSON", '{"name": 3}', "[1]", '{"name": "f", "arguments": NaN}'])
def test_a_call_that_is_none_is_content(client, say, tokenizer, text):
    say("坏", [*encode(tokenizer, "a"), *call_ids(tokenizer, text), IM_END])
    asked = [{"role": "user", "content": "坏"}]
    answer = chat(client, asked, tools=[WEATHER], max_tokens=200).choices[0]
    assert (answer.message.tool_calls, answer.finish_reason) == (None, "stop")
    assert answer.message.content == f"a<tool_call>\n{text}\n</tool_call>"
    assert streamed(client, messages=asked, tools=[WEATHER], max_tokens=200)["content"] == answer.message.content


def test_a_call_that_is_cut_off_is_content_and_length(client, say, tokenizer):
    call = call_ids(tokenizer, '{"name": "weather", "arguments": {}}')
    say("断", call)
    answer = chat(client, [{"role": "user", "content": "断"}], tools=[WEATHER], max_tokens=len(call) - 4).choices[0]
    assert answer.finish_reason == "length"
    assert answer.message.content.startswith('<tool_call>\n{"name": "weather"')


def test_half_a_surrogate_pair_in_a_call_breaks_nothing(client, say, tokenizer):
    say("半", [*call_ids(tokenizer, '{"name": "weather", "arguments": {"city": "\\ud800"}}'), IM_END])
    answer = chat(client, [{"role": "user", "content": "半"}], tools=[WEATHER], max_tokens=200).choices[0]
    assert json.loads(answer.message.tool_calls[0].function.arguments) == {"city": "?"}


def test_tools_of_the_server_run_while_it_writes(serve, say, tokenizer):
    call = '{"name": "calculator", "arguments": {"expression": "6*7"}}'
    turns = [*encode(tokenizer, "算。\n"), *call_ids(tokenizer, call), IM_END], [*encode(tokenizer, "42。"), IM_END]
    say("算", *turns)
    client, asked = serve(tools=["calculator"]).client, [{"role": "user", "content": "算"}]
    answer, stream = chat(client, asked, max_tokens=200).choices[0], streamed(client, messages=asked, max_tokens=200)
    runs = [{"name": "calculator", "arguments": {"expression": "6*7"}, "result": "42"}]
    assert answer.message.tool_runs == stream["tool_runs"] == runs
    assert answer.message.content == stream["content"] == "算。\n42。"
    assert answer.finish_reason == stream["finish_reason"] == "stop"
    assert answer.message.tool_calls is None
    assert stream["usage"]["completion_tokens"] == sum(map(len, turns))
    cut = chat(client, asked, max_tokens=35).choices[0]
    assert cut.finish_reason == "length"
    theirs = chat(client, asked, tools=[WEATHER], max_tokens=200).choices[0]
    assert theirs.finish_reason == "tool_calls", "a request with tools of its own runs them itself"


# ---------------------------------------------------------------------------------------------------------- completions


def test_completions_go_on_from_texts_and_tokens(client, tokenizer):
    ids = [BOS, *encode(tokenizer, "春天")]
    answers = [
        client.completions.create(model="pretrain", prompt=prompt, max_tokens=8, temperature=0)
        for prompt in ("春天", ids, ["春天", "花"], [ids, [BOS, *encode(tokenizer, "花")]])
    ]
    texts = [[choice.text for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1] == texts[2][:1] == texts[3][:1]
    assert texts[2] == texts[3]
    assert answers[0].usage.prompt_tokens == len(ids)
    assert answers[0].object == "text_completion"
    several = client.completions.create(model="pretrain", prompt=["春天", "花"], max_tokens=8, n=2, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.prompt_tokens == answers[2].usage.prompt_tokens
    pieces = client.completions.create(model="pretrain", prompt="春天", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == texts[0][0]
    stopped = client.completions.create(model="pretrain", prompt="春天", temperature=0, stop=texts[0][0][2:4])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (texts[0][0][:2], "stop")
    assert client.completions.create(model="sft", prompt="春天", max_tokens=3).usage.completion_tokens == 3


def test_a_completion_is_the_one_that_eval_gives(client, models, run_here):
    flags = ["--prompt", "春天", "--temperature", "0", "--max_new_tokens", "12", "--device", "cpu"]
    result = run_here("eval.py", "--model", models[1], *flags)
    answer = client.completions.create(model="pretrain", prompt="春天", temperature=0, max_tokens=12)
    assert result.out == f"春天{answer.choices[0].text}\n"


# -------------------------------------------------------------------------------------------------------------- company


def test_fifty_at_a_time_are_as_one_at_a_time(live, client):
    texts = [f"{'花' * (i % 9)} {i}" for i in range(50)]

    def write(text):
        return streamed(client, messages=[{"role": "user", "content": text}], max_tokens=16 + len(text))

    alone = [write(text) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        together = list(pool.map(write, texts))
    assert [each["content"] for each in together] == [each["content"] for each in alone]
    assert [each["usage"] for each in together] == [each["usage"] for each in alone]
    assert live.rows() == 0


def test_what_is_unlike_shares_a_batch(client):
    ways = [dict(temperature=0), dict(temperature=1, seed=1), dict(logprobs=True), dict(logprobs=True, top_logprobs=2)]
    ways += [dict(n=3, temperature=1, seed=2), dict(stop=["的", "a"]), dict(extra_body={"repetition_penalty": 1.0})]

    def write(way):
        return [choice.model_dump() for choice in chat(client, **way).choices]

    alone = [write(way) for way in ways]
    with concurrent.futures.ThreadPoolExecutor(len(ways)) as pool:
        together = list(pool.map(write, ways))
    for one, other in zip(alone, together):
        for choice in [*one, *other]:
            choice["logprobs"] = choice["logprobs"] and [each["bytes"] for each in choice["logprobs"]["content"]]
        assert one == other


# ------------------------------------------------------------------------------------------------------------- mistakes


def refused(live, status: int, path: str = "chat/completions", **body) -> dict:
    body = {"messages": HELLO} | body if path.startswith("chat") else body
    reply = live.http.post(f"/v1/{path}", content=json.dumps(body), headers=JSON)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_a_model_that_is_not_there(live):
    error = refused(live, 404, model="gpt-4o")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "sft" in error["message"]
    reply = live.http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1})
    assert reply.json()["model"] == "sft", "without a model, the first"
    assert "/v1/completions" in refused(live, 400, model="pretrain")["message"]


@pytest.mark.parametrize("length", [CONTEXT, 5000])
def test_a_prompt_that_does_not_fit_is_refused_and_nothing_dropped(live, length):
    long = "a b c d " * length
    messages = [*HELLO, {"role": "assistant", "content": long}, *HELLO]
    error = refused(live, 400, messages=messages)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert str(CONTEXT) in error["message"]
    assert refused(live, 400, "completions", prompt=[EOS] * CONTEXT)["code"] == "context_length_exceeded"


BAD_FIELDS = [
    *(dict(temperature=value) for value in (-0.1, 2.1, 1e308, "hot", [1], True and "x")),
    *(dict(top_p=value) for value in (-1, 1.1)),
    *(dict(top_k=value) for value in (-2, 2**40, 1.5)),
    *(dict(repetition_penalty=value) for value in (0, -1, 1e308, 1e-300)),
    *(dict(max_tokens=value) for value in (0, -2, 2**80, 1.5)),
    *(dict(n=value) for value in (0, 65, 10**30)),
    *(dict(seed=value) for value in (2**64, -(2**63) - 1, "a")),
    *(dict(stop=value) for value in (["a"] * 65, [3], "x" * 300, {"a": 1})),
    *(dict(messages=value) for value in ([], [{}], "hi", [3], [{"role": "user"}], [{"role": "user", "content": None}])),
    dict(messages=[{"role": "root", "content": "x"}]),
    dict(messages=[{"role": "user", "content": 3}]),
    dict(messages=[{"role": "user", "content": "x"}] * 1025),
    dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]),
    dict(messages=[*HELLO, {"role": "tool", "tool_call_id": "x", "content": "1"}]),
    dict(messages=[*HELLO, {"role": "assistant", "tool_calls": [{"id": "a", "function": {}}]}]),
    dict(top_logprobs=2),
    dict(logprobs=True, top_logprobs=21),
    dict(stream_options={"include_usage": True}),
    dict(presence_penalty=2.1),
    dict(frequency_penalty=-2.1),
    dict(logit_bias={"5": 100}),
    dict(tools=[{"type": "function"}]),
    dict(tools=[{"type": "retrieval"}]),
    dict(tools=[WEATHER] * 65),
    dict(functions=[{"name": "f"}]),
    dict(think="loudly"),
    dict(reasoning_effort="much"),
    dict(chat_template_kwargs={"enable_thinking": False, "tone": "kind"}),
    dict(continue_final_message=True),
    dict(add_generation_prompt=False),
    dict(max_token=5),
    dict(include_stop_str_in_output=True),
]


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=lambda fields: str(fields)[:60])
def test_what_cannot_be_is_refused(live, fields):
    error = refused(live, 400, **fields)
    assert error["type"] == "invalid_request_error"
    assert next(iter(fields)) in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        *(dict(prompt=value) for value in ([], [[]], {}, 3, [1, "a"], [-1], [6400], [2**70], ["a"] * 65)),
        *(
            dict(prompt="a", **extra)
            for extra in (dict(messages=HELLO), dict(suffix="b"), dict(best_of=2), dict(logprobs=6))
        ),
        dict(),
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_what_cannot_be_completed_is_refused(live, fields):
    assert refused(live, 400, "completions", **fields)["message"]


def test_what_is_too_deep_or_no_text_is_refused_wherever_it_stands(live):
    deep = json.loads("[" * 40 + "]" * 40)
    for fields in (dict(tools=[WEATHER | {"x": deep}]), dict(metadata=deep)):
        assert "nested deeper than 32" in refused(live, 400, **fields)["message"]
    for fields in (dict(messages=[{"role": "user", "content": "\ud800"}]), dict(stop=["\udc00"]), dict(model="\ud800")):
        assert "surrogate" in refused(live, 400, **fields)["message"]
    assert "surrogate" in refused(live, 400, "completions", prompt=["a", "\ud800"])["message"]
    assert refused(live, 400, tools=[WEATHER | {"x": math.nan}])


def test_what_does_no_harm_is_ignored(client):
    extra = dict(store=True, metadata={"a": "b"}, service_tier="auto", modalities=["text"], nonsense=None)
    extra |= dict(
        presence_penalty=0, frequency_penalty=0.0, logit_bias={}, response_format={"type": "text"}, top_k=None
    )
    assert chat(client, user="me", extra_body=extra).choices == chat(client).choices


NO_REQUESTS = [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"messages": NaN}']
NO_REQUESTS += [b"[" * 100_000, b'{"a":' * 50_000]
FIELDS = [
    '"temperature": NaN',
    '"top_p": Infinity',
    '"min_p": -Infinity',
    '"temperature": 1e400',
    '"seed": ' + "9" * 5000,
]
for number in FIELDS:
    NO_REQUESTS.append(b'{"messages": [{"role": "user", "content": "x"}], ' + number.encode() + b"}")


@pytest.mark.parametrize("body", NO_REQUESTS, ids=lambda body: body[-40:])
def test_a_body_that_is_no_request(live, body):
    reply = live.http.post("/v1/chat/completions", content=body, headers=JSON)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_the_docs_name_what_the_schema_knows():
    from server.schema import ChatRequest, CompletionRequest

    for page in ("serve.md", "serve_en.md"):
        text = (ROOT / "docs" / page).read_text("utf-8")
        fields = ChatRequest.model_fields | CompletionRequest.model_fields
        known = {info.alias or name for name, info in fields.items()}
        assert {name for name in known if f"`{name}`" not in text} == set(), page
