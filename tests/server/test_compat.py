"""What programs of others send, and what they look for: the requests at which they failed."""

import json
import shutil

import pytest
import torch
from conftest import CONTEXT
from test_api import HELLO, chat, refused

from engine.generation import Engine
from model.chat import BOS, EOS, IM_END, THINK, encode, encode_chat
from model.checkpoint import find_checkpoints, load_model
from server.service import Service

# --------------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("field", "right"),
    [("max_token", "max_tokens"), ("temprature", "temperature"), ("n_probs", None), ("top_n_sigma", None)],
)
def test_an_unknown_field_is_refused_by_name_with_the_right_one(live, field, right):
    for path in ("chat/completions", "completions", "responses"):
        body = {"prompt": "x"} if path == "completions" else {"input": "x"} if path == "responses" else {}
        error = refused(live, 400, path, **body, **{field: 1})
        assert error["param"] == field
        assert error["message"].startswith(f"{field}: this server does not know this field")
        assert right is None or f"did you mean {right}?" in error["message"]


def test_stop_texts_of_lm_eval_and_empty_ones(client, say, tokenizer):
    say("数", [*encode(tokenizer, "一二三四五六"), IM_END])
    asked = [{"role": "user", "content": "数"}]
    for stop in (["Q:", "\n\n", "</s>", "###", "五"], ["", "五"], ["五"] * 64):
        assert chat(client, asked, stop=stop).choices[0].message.content == "一二三四"
    for stop in ("", [], ["", ""], None):
        assert chat(client, asked, stop=stop).choices[0].message.content == "一二三四五六"


def test_minus_one_is_all(client, say, tokenizer):
    expected = chat(client, max_tokens=None).choices
    assert chat(client, max_tokens=-1).choices == chat(client, max_completion_tokens=-1).choices == expected
    sampled = dict(temperature=1, seed=3)
    assert chat(client, **sampled, extra_body={"top_k": -1}).choices == chat(client, **sampled).choices
    whole = client.completions.create(model="pretrain", prompt="春", max_tokens=-1, extra_body={"ignore_eos": True})
    assert whole.usage.total_tokens == CONTEXT


def test_a_completion_without_a_limit_has_16_tokens(client):
    answer = client.completions.create(model="pretrain", prompt="春", extra_body={"ignore_eos": True})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")


def test_an_answer_has_at_least_so_many_tokens(client, say, tokenizer, live):
    model = live.served["sft"].batcher.model
    weight = model.lm_head.weight.data
    weight[:, IM_END] *= 50  # of either sign: it is now very probable or very improbable, anew for each token
    try:
        lengths = {}
        for name, fields in dict(none={}, least={"min_tokens": 30}, ignore={"ignore_eos": True}).items():
            choices = chat(client, n=8, temperature=1, seed=1, max_tokens=40, extra_body=fields)
            lengths[name] = [choices.usage.completion_tokens, {choice.finish_reason for choice in choices.choices}]
    finally:
        weight[:, IM_END] /= 50
    assert lengths["none"][0] < 8 * 30
    assert lengths["least"][0] >= 8 * 30
    assert lengths["ignore"] == [8 * 40, {"length"}]


def test_a_schema_says_when_an_answer_ends(client):
    """Otherwise no token could be chosen after its end."""
    fields = dict(response_format={"type": "json_object"}, max_tokens=200, extra_body={"ignore_eos": True})
    for temperature in (0, 1):
        answer = chat(client, temperature=temperature, seed=1, **fields).choices[0]
        assert isinstance(json.loads(answer.message.content), dict)


def test_penalties_are_those_of_openai(client, live, monkeypatch):
    """logits - frequency_penalty * count - presence_penalty * (count > 0), of the generated tokens alone."""
    seen = []
    choose = Engine._choose

    def choosing(engine, logits):
        (sequence,) = engine.rows
        expected = logits[0].clone()
        for token in set(sequence.tokens):
            expected[token] -= 0.5 + 1.5 * sequence.tokens.count(token)
        chosen = choose(engine, logits)
        seen.append((chosen[0], expected.argmax().item()))
        return chosen

    monkeypatch.setattr(Engine, "_choose", choosing)
    fields = dict(presence_penalty=0.5, frequency_penalty=1.5, extra_body={"repetition_penalty": 1})
    penalized = chat(client, max_tokens=60, **fields)
    assert len(seen) == 60
    assert all(chosen == expected for chosen, expected in seen)
    monkeypatch.undo()
    plain = chat(client, max_tokens=60, extra_body={"repetition_penalty": 1})
    assert plain.choices != penalized.choices
    with_others = chat(client, max_tokens=60, n=2, **fields)  # in one batch
    assert with_others.choices[1].message == penalized.choices[0].message


def test_reasoning_is_switched_off_as_qwen_and_openai_do(client, live, monkeypatch):
    configs = []
    of = Service._prepare

    def prepare(service, served, request, *rest):
        configs.append(request.generation_config(1000))
        return of(service, served, request, *rest)

    monkeypatch.setattr(Service, "_prepare", prepare)
    for fields in ({}, {"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        chat(client, max_tokens=1, extra_body=fields)
    chat(client, max_tokens=200, reasoning_effort="low", stop="x" * 9)
    chat(client, max_tokens=200, reasoning_effort="low", extra_body={"max_think_tokens": 7})
    assert [config.think for config in configs] == ["show", "off", "off", "show", "show"]
    assert [config.max_think_tokens for config in configs] == [0, 0, 0, 40, 7]


def test_an_answer_that_was_cut_off_is_continued(client, tokenizer):
    whole = chat(client, max_tokens=20).choices[0].message.content
    begun = [*HELLO, {"role": "assistant", "content": whole[:9]}]
    fields = {"continue_final_message": True, "add_generation_prompt": False, "repetition_penalty": 1}
    answer = chat(client, begun, extra_body=fields, max_tokens=5)
    ids, _ = encode_chat(tokenizer, begun)
    assert answer.usage.prompt_tokens == len(ids) - 2  # without <|im_end|> and the line end
    assert answer.choices[0].message.content != whole[:5]


def test_reasoning_has_two_names_in_both_directions(client, say, tokenizer, live):
    say("想", [THINK, *encode(tokenizer, "\n六七\n"), THINK + 1, *encode(tokenizer, "\n\n42"), IM_END])
    asked = [{"role": "user", "content": "想"}]
    message = chat(client, asked).choices[0].message
    assert message.reasoning == message.reasoning_content == "六七"
    pieces = [chunk.choices[0].delta for chunk in chat(client, asked, stream=True)]
    assert "".join(getattr(piece, "reasoning", "") for piece in pieces) == "六七"
    counts = set()
    for names in (["reasoning"], ["reasoning_content"], ["reasoning", "reasoning_content"]):
        said = {"role": "assistant", "content": "42"} | dict.fromkeys(names, "六七")
        counts.add(chat(client, [*asked, said, *HELLO], max_tokens=1).usage.prompt_tokens)
    bare = chat(client, [*asked, {"role": "assistant", "content": "42"}, *HELLO], max_tokens=1).usage.prompt_tokens
    assert len(counts) == 1
    assert counts.pop() > bare


def test_arguments_of_a_call_may_be_an_object(live, client):
    counts = []
    for arguments in ('{"city": "上海"}', {"city": "上海"}):
        call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
        messages.append({"role": "tool", "tool_call_id": "a", "content": "晴"})
        counts.append(chat(client, messages, max_tokens=1).usage.prompt_tokens)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("headers", [{"Content-Type": ""}, {"Content-Type": "text/plain"}], ids=str)
def test_a_request_that_does_not_say_that_it_is_json_is_told_so(live, headers):
    reply = live.http.post("/v1/chat/completions", content=json.dumps({"messages": HELLO}), headers=headers)
    assert reply.status_code == 400
    assert "Content-Type: application/json" in reply.json()["error"]["message"]


def test_the_overflow_is_said_in_the_words_that_litellm_looks_for(live):
    for path, body in (
        ("chat/completions", {"messages": [{"role": "user", "content": "花" * 5000}]}),
        ("completions", {"prompt": [EOS] * 5000}),
        ("responses", {"input": "花" * 5000}),
    ):
        error = refused(live, 400, path, **body)
        assert "this model's maximum context length is" in error["message"].lower()
        assert error["code"] == "context_length_exceeded"


def test_the_role_comes_with_the_first_token(client, say, tokenizer):
    first = next(iter(chat(client, stream=True))).choices[0].delta
    assert first.role == "assistant"
    assert first.content
    say("静", [IM_END])
    silent = [chunk.choices[0] for chunk in chat(client, [{"role": "user", "content": "静"}], stream=True)]
    assert [choice.delta.role for choice in silent] == ["assistant", None]
    assert silent[-1].finish_reason == "stop"
    roles = [chunk.choices[0].delta.role for chunk in chat(client, n=3, temperature=1, stream=True)]
    assert roles.count("assistant") == 3


# --------------------------------------------------------------------------------------------------------------- routes


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/chat/completions", 404, "did you mean /v1/chat/completions?"),
        ("POST", "/v1/v1/chat/completions", 404, "did you mean /v1/chat/completions?"),
        ("POST", "/v1/chat/completions/", 404, "did you mean /v1/chat/completions?"),
        ("POST", "/v1/embeddings", 404, "This server has /api/runs, /health, /metrics, /v1/chat/completions"),
        ("GET", "/models", 404, "did you mean /v1/models?"),
        ("DELETE", "/nothing.html", 404, "/v1/completions"),
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("PUT", "/v1/models/sft", 405, "GET"),
        ("POST", "/health", 405, "GET"),
        ("POST", "/api/runs", 405, "GET"),
        ("POST", "/", 405, "GET, HEAD"),
        ("POST", "/style.css", 405, "GET, HEAD"),
    ],
)
def test_what_is_no_route_is_told_the_right_one(live, method, path, status, words):
    reply = live.http.request(method, path, json={})
    assert (reply.status_code, words in reply.json()["error"]["message"]) == (status, True), reply.text
    assert ("Allow" in reply.headers) == (status == 405)


def test_models_with_a_slash_are_the_list(live):
    assert live.http.get("/v1/models/").json() == live.http.get("/v1/models").json()


# ------------------------------------------------------------------------------------------------ browsers and proxies

SITE = "https://chat.example.com"


def test_a_site_that_was_allowed_may_call(serve):
    live = serve(allowed_origins=(SITE,), api_key="hush")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    reply = live.http.options("/v1/chat/completions", headers={"Origin": SITE} | asks)
    assert reply.status_code == 200, "a preflight request has no key"
    assert reply.headers["Access-Control-Allow-Origin"] == SITE
    assert "authorization" in reply.headers["Access-Control-Allow-Headers"].lower()
    body, key = {"messages": HELLO, "max_tokens": 1}, {"Authorization": "Bearer hush"}
    for headers, status in (({}, 401), (key, 200)):
        reply = live.http.post("/v1/chat/completions", json=body, headers={"Origin": SITE} | headers)
        assert (reply.status_code, reply.headers["Access-Control-Allow-Origin"]) == (status, SITE)
    for origin in ("https://evil.example", "http://chat.example.com", f"{SITE}.evil.example", "null"):
        for reply in (
            live.http.options("/v1/chat/completions", headers={"Origin": origin} | asks),
            live.http.post("/v1/chat/completions", json=body, headers={"Origin": origin} | key),
        ):
            assert reply.status_code == 403
            assert "Access-Control-Allow-Origin" not in reply.headers
            assert "--allowed_origins" in reply.json()["error"]["message"]
    assert live.http.post("/v1/chat/completions", json=body, headers={"Origin": live.url} | key).status_code == 200


def test_all_sites_may_be_allowed(serve):
    reply = serve(allowed_origins=("*",)).http.get("/v1/models", headers={"Origin": "app://obsidian.md"})
    assert (reply.status_code, reply.headers["Access-Control-Allow-Origin"]) == (200, "*")


def test_a_name_that_was_allowed_is_the_servers(serve):
    live = serve(allowed_hosts=("Chat.example.com",))
    page = {"Host": "chat.example.com:8443", "Origin": "https://chat.example.com:8443"}
    assert live.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=page).status_code == 200
    assert live.http.get("/v1/models", headers={"Host": "localhost"}).status_code == 200
    for host in (
        "evil.example",
        "x.chat.example.com",
        "chat.example.com.",
        "chat.example.com:80:80",
        "chat.example.comx",
    ):
        reply = live.http.get("/v1/models", headers={"Host": host})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unknown_host"), host
        assert "--allowed_hosts" in reply.json()["error"]["message"]
    restricted = serve(host="0.0.0.0", allowed_hosts=("chat.example.com",))
    assert restricted.http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400
    assert serve(allowed_hosts=("*",)).http.get("/v1/models", headers={"Host": "any.example"}).status_code == 200


# ------------------------------------------------------------------------------------------------- log-probabilities


@torch.no_grad()
def test_a_prompt_is_echoed_with_its_log_probabilities(client, tokenizer, models):
    ids = [BOS, *encode(tokenizer, "春天来了，花开了。One two three.")]
    text = "春天来了，花开了。One two three."
    log_probs = load_model(models[1]).eval()(torch.tensor([ids]))[0].log_softmax(-1)  # (T, V)
    expected = log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    greedy = dict(model="pretrain", temperature=0, extra_body={"repetition_penalty": 1})
    for prompt in ([ids], text):
        echo = client.completions.create(prompt=prompt, max_tokens=0, logprobs=3, echo=True, **greedy)
        choice = echo.choices[0]
        assert (choice.text, choice.finish_reason, echo.usage.completion_tokens) == (text, "length", 0)
        assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
        assert choice.logprobs.text_offset[:3] == [0, 0, len(tokenizer.decode(ids[:2]))]
        for top, row in zip(choice.logprobs.top_logprobs[1:], log_probs):
            assert sorted(top.values()) == pytest.approx(sorted(row.topk(3).values.tolist()), abs=1e-3)
    answer = client.completions.create(prompt=[ids], max_tokens=12, logprobs=3, **greedy).choices[0]
    both = client.completions.create(prompt=[ids], max_tokens=12, logprobs=3, echo=True, **greedy).choices[0]
    assert both.text == text + answer.text
    assert len(both.logprobs.token_logprobs) == len(ids) + 12
    assert both.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-3)
    stream = client.completions.create(prompt=[ids], max_tokens=12, logprobs=3, echo=True, stream=True, **greedy)
    pieces = [chunk.choices[0] for chunk in stream]
    assert "".join(piece.text for piece in pieces) == both.text
    tokens = [token for piece in pieces if piece.logprobs for token in piece.logprobs.tokens]
    assert tokens == both.logprobs.tokens


def test_echo_does_not_depend_on_company_and_is_not_stopped(client, tokenizer):
    prompts = ["春天来了。", "one two three", "花", "春天来了。"]
    fields = dict(model="pretrain", max_tokens=1, temperature=0, logprobs=1, echo=True, n=2, stop=["春", "o"])
    alone = [client.completions.create(prompt=prompt, **fields).choices for prompt in prompts]
    together = client.completions.create(prompt=prompts, **fields).choices
    for i, choices in enumerate(alone):
        for one, other in zip(choices, together[2 * i : 2 * i + 2]):
            assert one.text.startswith(prompts[i])
            assert one.text == other.text
            assert one.logprobs.token_logprobs[1:] == pytest.approx(other.logprobs.token_logprobs[1:], abs=1e-4)
    without = client.completions.create(model="pretrain", prompt="花", max_tokens=0, echo=True).choices[0]
    assert (without.text, without.logprobs) == ("花", None)


def test_the_longest_prompt_is_echoed_and_memory_stays_small(live, client):
    ids = [BOS] + [20] * (CONTEXT - 2)
    fields = dict(model="pretrain", max_tokens=0, logprobs=5, echo=True)
    choices = client.completions.create(prompt=[ids] * 16, **fields).choices
    assert len(choices) == 16
    assert all(len(choice.logprobs.tokens) == CONTEXT - 1 for choice in choices)


# ------------------------------------------------------------------------------------------------------------- exports


def test_an_export_is_not_the_default_model(models, tmp_path, run_here):
    out = tmp_path / "out"
    shutil.copytree(models[0], out / "sft")
    assert run_here("export.py", out / "sft", "--to", "bf16").status == 0
    assert (out / "sft-bf16" / "model.safetensors").exists()
    assert find_checkpoints(out) == [out / "sft"]
    result = run_here(
        "eval.py", "--model", out / "sft-bf16", "--prompt", "x", "--max_new_tokens", "1", "--device", "cpu"
    )
    assert result.status == 0, result.err
