"""What a server must bear: clients that leave, too many of them, strangers, floods, failures, and its own end."""

import asyncio
import concurrent.futures
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import psutil
import pytest
import torch
from conftest import CONTEXT, wait_until
from helpers import ROOT, TIMEOUT, TOKENIZER
from openai import OpenAI
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from engine.generation import Engine
from model.chat import EOS, IM_END, encode
from model.checkpoint import load_model, save_model
from model.lora import apply_lora, lora_layers
from server import api, batcher, guard
from server.models import find_models

HELLO = [{"role": "user", "content": "你好"}]
LONG = dict(model="sft", messages=HELLO, temperature=0, max_tokens=CONTEXT)


@pytest.fixture
def slow(monkeypatch):
    """Steps of an engine take long enough to act between two."""
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(0.02), step(engine))[1])


def begin(live, **fields):
    """A stream of which the first text has come."""
    stream = live.client.chat.completions.create(**LONG | fields, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    return stream


# ------------------------------------------------------------------------------------------------------ places and time


def test_a_client_that_leaves_frees_its_row(serve, slow):
    live = serve(max_rows=2, max_queue=0)
    streams = [begin(live), begin(live)]
    with pytest.raises(openai.RateLimitError):
        live.client.chat.completions.create(**LONG)
    streams[0].close()
    live.wait_for_rows(1)
    begin(live).close()
    live.wait_for_rows(1)
    with socket.create_connection(("127.0.0.1", live.port)) as sock:  # one that wanted the whole answer
        body = b'{"messages": [{"role": "user", "content": "x"}]}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        live.wait_for_rows(2)
    live.wait_for_rows(1)
    with pytest.raises(httpx.ReadTimeout):
        live.http.post("/v1/chat/completions", json={"messages": HELLO, "n": 1}, timeout=0.2)
    live.wait_for_rows(1)
    streams[1].close()
    live.wait_for_rows(0)
    assert 'jiezi_requests_total{end="left",model="sft"} 5.0' in live.http.get("/metrics").text
    wait_until(lambda: not live.served["sft"].batcher.engine.busy, "a row was not freed")


def test_one_that_waits_and_leaves_never_enters(serve, slow):
    live = serve(max_rows=1, max_queue=1)
    first = begin(live)
    with pytest.raises(httpx.ReadTimeout):
        live.http.post("/v1/chat/completions", json={"messages": HELLO}, timeout=0.2)
    live.wait_for_rows(1)
    first.close()
    live.wait_for_rows(0)


def test_too_many_are_told_to_come_again(serve, slow):
    live = serve(max_rows=1, max_queue=2)
    stream = begin(live)
    for fields in (dict(n=3), dict(n=3, stream=True)):
        reply = live.http.post("/v1/chat/completions", json={"messages": HELLO} | fields)
        assert (reply.status_code, reply.headers["Retry-After"]) == (429, "1")
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
    assert live.rows() == 1
    assert live.http.post("/v1/chat/completions", json={"messages": HELLO, "n": 4}).status_code == 400
    with concurrent.futures.ThreadPoolExecutor(12) as pool:  # all at once: as many get in as there are places
        statuses = [
            pool.submit(
                httpx.post, f"{live.url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=TIMEOUT
            )
            for _ in range(12)
        ]
        stream.close()
        statuses = [status.result().status_code for status in statuses]
    assert set(statuses) == {200, 429}
    live.wait_for_rows(0)


def test_a_request_that_takes_too_long_is_ended(serve, slow):
    live = serve(request_timeout=0.3)
    with pytest.raises(openai.APIStatusError) as error:
        live.client.chat.completions.create(**LONG)
    assert (error.value.status_code, error.value.code) == (504, "timeout")
    with pytest.raises(openai.APIError, match=r"not finished after 0\.3 seconds"):
        list(live.client.chat.completions.create(**LONG, stream=True))
    live.wait_for_rows(0)


def test_a_failure_of_the_engine_is_said_and_the_next_request_works(serve, monkeypatch, capfd):
    live = serve()
    whole = live.client.chat.completions.create(**LONG).choices
    choose = Engine._choose

    def fail(self, logits):
        monkeypatch.setattr(Engine, "_choose", choose)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Engine, "_choose", fail)
    with pytest.raises(openai.InternalServerError, match="RuntimeError"):
        live.client.chat.completions.create(**LONG)
    assert "out of memory" in capfd.readouterr().err
    assert live.client.chat.completions.create(**LONG).choices == whole
    assert live.rows() == 0


def test_a_checkpoint_that_breaks_before_its_first_use_is_one_error(serve, models, tmp_path):
    shutil.copytree(models[0], tmp_path / "sft")
    live = serve([tmp_path / "sft", models[1]])
    (tmp_path / "sft" / "model.safetensors").write_bytes(b"x")
    reply = live.http.post("/v1/chat/completions", json={"messages": HELLO})
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert "model.safetensors" in reply.json()["error"]["message"]
    answer = live.http.post("/v1/completions", json={"prompt": "x", "model": "pretrain", "max_tokens": 1})
    assert answer.status_code == 200


# ---------------------------------------------------------------------------------------------- keys, hosts and origins


def test_a_key_opens_all_but_health(serve):
    live = serve(api_key="芥子-key")
    key = {"Authorization": "Bearer 芥子-key".encode()}
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "芥子-key".encode()},
        {"Authorization": "Basic x"},
    ):
        for path in ("/v1/models", "/metrics", "/v1/models/sft", "/v1/responses/x"):
            reply = live.http.get(path, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), path
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
            reply = live.http.post(path, headers=headers, json={"messages": HELLO, "prompt": "x"})
            assert reply.status_code == 401, path
    assert live.http.get("/health").json() == {"status": "ok"}
    for path in ("/v1/models", "/metrics"):
        assert live.http.get(path, headers=key).status_code == 200
    assert live.served["sft"].batcher is None, "a model was loaded for a stranger"
    assert live.http.post("/v1/completions", headers=key, json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_pages_from_elsewhere_are_refused(live):
    url, body = "/v1/completions", {"prompt": "x", "max_tokens": 1}
    port = live.port
    for origin in (
        "https://evil.example",
        "null",
        f"http://127.0.0.1:{port + 1}",
        "http://127.0.0.1",
        "file://",
        "://[",
    ):
        reply = live.http.post(url, json=body, headers={"Origin": origin})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "foreign_origin"), origin
        assert live.http.get("/v1/models", headers={"Origin": origin}).status_code == 403
    reply = live.http.options(url, headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"})
    assert reply.status_code == 403
    assert not [name for name in reply.headers if name.startswith("access-control")]
    assert live.http.post(url, json=body, headers={"Origin": live.url}).status_code == 200
    assert live.http.post(url, content='{"prompt": "x"}', headers={"Content-Type": "text/plain"}).status_code == 400


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "[::2]", ""])
def test_a_name_that_leads_here_by_a_strangers_dns_is_refused(live, host):
    assert live.http.get("/v1/models", headers={"Host": host}).status_code == 400
    same = {"Host": "evil.example", "Origin": "http://evil.example"}
    assert live.http.post("/v1/completions", json={"prompt": "x"}, headers=same).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:8000"])
def test_names_of_this_machine_are_let_in(live, host):
    assert live.http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_server_for_the_network_answers_to_any_name(serve):
    live = serve(host="0.0.0.0")
    assert live.http.get("/v1/models", headers={"Host": "box.lan"}).status_code == 200
    assert live.http.get("/v1/models", headers={"Host": "box.lan", "Origin": "http://a.b"}).status_code == 403


# ----------------------------------------------------------------------------------------------------- what is too much


def test_a_body_that_is_too_large_is_refused(live):
    large = b" " * (guard.MAX_BODY + 1)
    reply = live.http.post("/v1/completions", content=large, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")

    def chunks():
        for _ in range(20):
            yield b" " * (guard.MAX_BODY // 10)

    try:
        reply = live.http.post("/v1/completions", content=chunks(), headers={"Content-Type": "application/json"})
        assert reply.status_code == 413
    except (httpx.WriteError, httpx.RemoteProtocolError):
        pass  # it has hung up before all was sent
    for length in ("-1", "1e9", "9" * 40):
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=TIMEOUT)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status in (400, 413), length
        connection.close()


def test_a_body_that_does_not_come_is_not_waited_for(serve, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    connection = http.client.HTTPConnection("127.0.0.1", serve().port, timeout=TIMEOUT)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", "100")
    connection.putheader("Content-Type", "application/json")
    connection.endheaders(b'{"prompt"')
    assert connection.getresponse().status == 408
    connection.close()


def test_a_flood_of_headers_ends_the_connection(live):
    with socket.create_connection(("127.0.0.1", live.port), timeout=TIMEOUT) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        try:
            for number in range(100_000):
                sock.sendall(f"X-{number}: {'x' * 100}\r\n".encode())
            pytest.fail("ten megabytes of headers were taken in")
        except OSError:
            pass
    assert live.http.get("/health").status_code == 200


def test_random_bytes_harm_nothing(live):
    rng = random.Random(0)
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", live.port), timeout=TIMEOUT) as sock:
            sock.sendall(rng.choice([b"", b"GET ", b"POST /v1/completions HTTP/1.1\r\n"]) + rng.randbytes(200))
    assert live.http.get("/health").status_code == 200


def test_unknown_routes_and_methods_are_errors_of_the_same_shape(live):
    for reply in (
        live.http.get("/v1/none"),
        live.http.get("/v1/completions"),
        live.http.get("/docs"),
    ):
        assert reply.status_code in (404, 405)
        assert reply.json()["error"]["type"] == "invalid_request_error"


# ----------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    "path",
    ["/../secret", "/..%2fsecret", "/%2e%2e/secret", "//secret", "/..\\secret", "/./../secret", "/a/../../secret"]
    + ["/link", "/%00", "/..%00/secret", "/" + "../" * 20 + "etc/passwd", "/%2fetc%2fpasswd", "/" + "a" * 5000],
)
def test_no_path_leads_out_of_the_folder_of_pages(serve, monkeypatch, tmp_path, path):
    (tmp_path / "web" / "a").mkdir(parents=True)
    (tmp_path / "web" / "index.html").write_text("the page")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "web" / "link").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(api, "WEB", tmp_path / "web")
    live = serve()
    assert httpx.get(live.url).text == "the page"
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=TIMEOUT)
    connection.request("GET", path)
    reply = connection.getresponse()
    assert reply.status in (400, 404), path
    assert b"secret" not in (said := reply.read()), said
    connection.close()


# ------------------------------------------------------------------------------------------------------------- serve.py


class Started:
    """serve.py in a process of its own."""

    def __init__(self, *flags, cwd=ROOT, **environment):
        words = [sys.executable, ROOT / "serve.py", "--port", "0", "--device", "cpu", *map(str, flags)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        self.process = subprocess.Popen(words, cwd=cwd, env=environment, **options)
        self.line = self.process.stdout.readline()
        self.url = self.line.split()[0] if self.line else ""

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, err


def test_serve_starts_serves_and_leaves(models, tmp_path):
    (tmp_path / "out").symlink_to(models[0].parent)
    newest = max(models, key=lambda path: (path / "model.safetensors").stat().st_mtime)
    started = Started(cwd=tmp_path, JIEZI_API_KEY="abc")
    try:
        client = OpenAI(base_url=f"{started.url}/v1", api_key="abc", max_retries=0)
        assert [model.id for model in client.models.list()] == [newest.name, *({"sft", "pretrain"} - {newest.name})]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="abd").models.list()
        short = client.chat.completions.create(**LONG | dict(max_tokens=4), stream=True)
        next(short)
        status, err = started.end()
        assert len(list(short)) > 1, "an answer that was nearly done was cut off"
    finally:
        started.process.kill()
    assert (status, err) == (0, "")


def test_a_long_answer_does_not_keep_it_from_leaving(serve, slow):
    live = serve()
    stream = begin(live, extra_body={"repetition_penalty": 1.0})
    live.close()  # with a second of grace, in which it cannot end
    with pytest.raises(openai.APIConnectionError):
        list(stream)
    assert not live.served["sft"].batcher.thread.is_alive()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere"], "no model in nowhere"),
        (["out/sft", "again/sft"], "the same name"),
        (["out/sft", "--port", "70000"], "cannot listen"),
        (["out/sft", "--host", "203.0.113.9"], "cannot listen"),
        (["out/sft", "--tools", "abacus"], "abacus"),
        (["out/sft", "--device", "quantum"], "quantum"),
        (["out/sft", "--api_key", ""], "the API key is empty"),
    ],
)
def test_mistakes_are_one_line(flags, words, models, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    for name in ("out", "again"):
        (tmp_path / name).symlink_to(models[0].parent)
    assert words in run_here("serve.py", *flags).error_line(status=2)


def test_no_model_at_all_and_a_port_that_is_taken_are_one_line(tmp_path, monkeypatch, models, run_here, live):
    monkeypatch.chdir(tmp_path)
    assert "python 1-pretrain.py" in run_here("serve.py").error_line(status=2)
    assert "give another --host or --port" in run_here("serve.py", models[0], "--port", live.port).error_line(status=2)


def test_help_does_not_tell_the_key(run_here, monkeypatch):
    monkeypatch.setenv("JIEZI_API_KEY", "hush")
    assert "hush" not in run_here("serve.py", "--help").out


def test_without_its_packages_it_names_the_command(monkeypatch, run_here):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    line = run_here("serve.py").error_line(status=2)
    assert "pip install -r requirements/serve.txt -c constraints.txt" in line


def test_models_are_found_newest_first_and_without_the_broken(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["pretrain", "sft", "broken", ".sft.new"]):
        shutil.copytree(models[age % 2], tmp_path / "out" / name)
        os.utime(tmp_path / "out" / name / "model.safetensors", (1000 - age, 1000 - age))
    (tmp_path / "out" / "broken" / "config.json").write_text("{}")
    assert list(find_models([])) == ["pretrain", "sft"]
    assert "broken" in capsys.readouterr().err


def test_an_adapter_comes_with_its_model(models, tmp_path, serve, run_here):
    model = load_model(models[1])
    apply_lora(model, r=4)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.5)
    model.stop_token_ids = [EOS, IM_END]
    save_model(tmp_path / "lora", model, TOKENIZER, base_dir=models[1])
    live = serve([tmp_path / "lora", models[1]])
    assert [one.is_chat for one in live.client.models.list()] == [True, False]
    answer = live.client.chat.completions.create(model="lora", messages=HELLO, temperature=0, max_tokens=12)
    flags = ["--lora", tmp_path / "lora", "--prompt", HELLO[0]["content"], "--temperature", "0", "--device", "cpu"]
    result = run_here("eval.py", "--model", models[1], *flags, "--max_new_tokens", "12")
    assert result.out == answer.choices[0].message.content + "\n"
    texts = [live.client.completions.create(model=name, prompt="x", temperature=0) for name in ("lora", "pretrain")]
    assert texts[0].choices[0].text != texts[1].choices[0].text


@pytest.mark.slow
def test_minutes_of_clients_that_come_and_leave_take_no_more_memory(models):
    started = Started(models[0], "--max_rows", "8", "--max_queue", "8")
    process, rng = psutil.Process(started.process.pid), random.Random(0)
    client = OpenAI(base_url=f"{started.url}/v1", api_key="none", max_retries=0)

    def visit(seed: int):
        rng = random.Random(seed)
        fields = dict(LONG, max_tokens=rng.randint(1, 60), n=rng.randint(1, 3), logprobs=rng.random() < 0.3)
        try:
            stream = client.chat.completions.create(**fields, stream=True)
            for i, _ in enumerate(stream):
                if i > rng.randint(0, 200):
                    break
            stream.close()
        except openai.RateLimitError:
            time.sleep(0.05)

    sizes, end = [], time.monotonic() + 180
    try:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            while time.monotonic() < end:
                list(pool.map(visit, [rng.random() for _ in range(100)]))
                sizes.append(process.memory_info().rss)
        assert process.num_threads() < 64
        text = httpx.get(f"{started.url}/metrics").text
        assert 'jiezi_rows{model="sft",state="running"} 0.0' in text
    finally:
        status, _ = started.end()
    third = len(sizes) // 3
    assert status == 0
    assert third > 3
    assert max(sizes[-third:]) < 1.05 * max(sizes[third : 2 * third]), sizes


@pytest.mark.parametrize("seconds", [0, TIMEOUT])
def test_the_engine_and_the_event_loop_take_turns(serve, say, tokenizer, monkeypatch, seconds):
    """A step starts when the tokens of the last one are sent; those of fast steps are sent together."""
    events = []
    step, send, wake = Engine.step, RequestResponseCycle.send, asyncio.BaseEventLoop.call_soon_threadsafe

    def counted_step(engine):
        events.append("step")
        return step(engine)

    async def counted_send(self, message):
        await send(self, message)
        if b'"content": "' in (body := message.get("body", b"")) and b'"content": ""' not in body:
            events.append("chunk")

    def counted_wake(self, callback, *arguments, **options):
        if threading.current_thread().name == "engine":
            events.append("hand over")
        return wake(self, callback, *arguments, **options)

    monkeypatch.setattr(Engine, "step", counted_step)
    monkeypatch.setattr(RequestResponseCycle, "send", counted_send)
    monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", counted_wake)
    monkeypatch.setattr(batcher, "MAX_WAIT", TIMEOUT)
    monkeypatch.setattr(batcher, "INTERVAL", seconds)
    say("字", [*encode(tokenizer, "天地玄黄宇宙洪荒"), IM_END])
    live = serve()
    messages = [{"role": "user", "content": "字"}]
    stream = live.client.chat.completions.create(model="sft", messages=messages, stream=True)
    n = sum(bool(chunk.choices[0].delta.content) for chunk in stream)
    turns = events[events.index("step") :]
    if seconds:  # the first token, the others, and the token that ends the turn
        assert turns == ["step", "hand over", "chunk", *["step"] * n, "hand over", *["chunk"] * (n - 1)]
    else:
        assert turns == [*["step", "hand over", "chunk"] * n, "step", "hand over"]
