"""Live servers on free ports, over small models of random weights, and what those models are to say."""

import socket
import threading
import time

import httpx
import pytest
import torch
import uvicorn
from fake_site import fake_server, write_runs
from helpers import TIMEOUT, TOKENIZER, sharp_model
from openai import OpenAI

from engine.session import Session
from engine.tools import load_tools
from images.web import launch
from model.chat import EOS, IM_END, IM_START, load_tokenizer
from model.checkpoint import save_model
from model.LMConfig import PRESETS, LMConfig
from server.api import create_app
from server.guard import TimeoutProtocol
from server.models import Served
from server.service import ServerConfig

CONTEXT = 384
FLAGS = dict(host="127.0.0.1", api_key=None, weight_dtype="float32", max_rows=16, max_queue=64, max_new_tokens=1024)
FLAGS |= dict(request_timeout=TIMEOUT, allowed_origins=(), allowed_hosts=())


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The folders of a chat model and of a base model."""
    folder = tmp_path_factory.mktemp("out")
    for name in ("sft", "pretrain"):
        model = sharp_model(LMConfig(**PRESETS["tiny"] | {"max_position_embeddings": CONTEXT}))
        model.stop_token_ids = [EOS, IM_END] if name == "sft" else [EOS]
        save_model(folder / name, model, TOKENIZER)
    return [folder / "sft", folder / "pretrain"]


def wait_until(condition, words: str):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, words
        time.sleep(0.005)


class Live:
    """A server in a thread of this process."""

    def __init__(self, directories, tools=(), **flags):
        self.served = {served.name: served for served in map(Served, directories)}
        app = create_app(self.served, ServerConfig(**FLAGS | flags), torch.device("cpu"), load_tools([*tools]))
        options = dict(http=TimeoutProtocol, ws="none", log_level="warning", timeout_graceful_shutdown=1)
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, **options))
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT)
        self.http = httpx.Client(base_url=self.url, timeout=TIMEOUT)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()

    def close(self):
        self.client.close()
        self.http.close()
        self.uvicorn.should_exit = True
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive(), "the server did not leave"

    def rows(self, name: str = "sft") -> int:
        """Answers that are being written or wait."""
        return len(self.served[name].batcher.receivers)

    def wait_for_rows(self, number: int):
        wait_until(lambda: self.rows() == number, f"there are not {number} rows")


@pytest.fixture
def serve(models):
    """serve(directories, **flags) starts a server."""
    started = []

    def start(directories=models, **flags) -> Live:
        started.append(Live(directories, **flags))
        return started[-1]

    yield start
    for live in started:
        live.close()


@pytest.fixture(scope="module")
def live(models):
    """A server that the tests of a file share."""
    live = Live(models)
    yield live
    live.close()


@pytest.fixture
def client(live) -> OpenAI:
    return live.client


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture
def say(monkeypatch, tokenizer):
    """say(user's text, turn, turn …): what the model then writes, token ids, a turn after each answer of tools."""
    scripts = {}
    sequence = Session.sequence

    def scripted(self, prompt, seed=None):
        found = sequence(self, prompt, seed)
        text = tokenizer.decode(prompt, skip_special_tokens=False)
        for asked, turns in scripts.items():
            if f"user\n{asked}<" in text.replace("<|im_start|>", ""):
                start = len(prompt) - 1 - prompt[::-1].index(IM_START) if IM_START in prompt else 0
                answered = text.count("<tool_response>") if start else 0
                found.forced.extend(turns[min(answered, len(turns) - 1)])
        return found

    monkeypatch.setattr(Session, "sequence", scripted)
    return lambda asked, *turns: scripts.update({asked: turns})


# ------------------------------------------------------------------------------------------------------ the pages


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    write_runs(out)
    server, app, address = fake_server(out)
    app.state.out = out
    yield app.state, address
    server.should_exit = True


@pytest.fixture(scope="module")
def browser():
    with pytest.importorskip("playwright.sync_api").sync_playwright() as started:
        browser = launch(started)
        yield browser
        browser.close()


@pytest.fixture
def visit(site, browser):
    """visit(PATH, **how) opens a page. After the test: no request has left the host, and the console holds no error."""
    state, fake = site
    contexts, wrong = [], []
    state.bodies.clear()
    state.key = None

    def open_page(path: str = "", allowed: str = "", address: str = fake, **how):
        context = browser.new_context(**{"locale": "en-GB", **how})
        context.set_default_timeout(8000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: request.url.startswith(address) or wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda message: (
                message.type == "error" and not (allowed and allowed in message.text) and wrong.append(message.text)
            ),
        )
        page.goto(address + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
