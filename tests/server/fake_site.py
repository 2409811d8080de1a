"""A made-up server behind the pages of server/web/, and what a visitor of them does."""

import asyncio
import json
import math
import re
import threading
import time
from pathlib import Path

from helpers import ROOT

MODELS = {"pretrain": False, "sft": True, "dpo": True}  # name -> whether it chats


def fake_server(out: Path):
    """The routes that the page uses. A model answers with its name, the system prompt and all it was told before."""
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse
    from fastapi.staticfiles import StaticFiles

    from server.runs import router

    app = FastAPI()
    app.state.bodies, app.state.key = [], None
    app.include_router(router(out))

    @app.middleware("http")
    async def guard(request: Request, call_next):
        locked = app.state.key and request.headers.get("authorization") != f"Bearer {app.state.key}"
        if locked and request.url.path.startswith(("/v1/", "/api/")):
            return JSONResponse({"error": {"message": "a key is needed", "code": "invalid_api_key"}}, 401)
        return await call_next(request)

    @app.get("/v1/models")
    def models():
        facts = {"created": 1.79e9, "max_position_embeddings": 512, "parameters": 1_009_792}
        return {"data": [{"id": name, "is_chat": is_chat, **facts} for name, is_chat in MODELS.items()]}

    async def events(body: dict, deltas: list[dict], finish_reason: str = "stop"):
        for delta in deltas:
            choice = {"index": 0, "delta": delta, **delta, "finish_reason": None}
            if body.get("logprobs"):
                choice["logprobs"] = log_probs(delta.get("content", ""))
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            await asyncio.sleep(0.2 if "slow" in str(body) else 0.005)
        if "break off" in str(body):
            return
        last = {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": finish_reason}]}
        usage = {"choices": [], "usage": {"completion_tokens": len(deltas), "total_tokens": 100 + len(deltas)}}
        yield f"data: {json.dumps(last)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    def chat(body: dict):
        app.state.bodies.append(body)
        asked = body["messages"][-1]["content"]
        if body.get("continue_final_message"):
            return StreamingResponse(events(body, [{"content": " and the rest."}]), media_type="text/event-stream")
        if asked.startswith("say:"):  # in pieces of up to 2,000 characters
            deltas = [{"content": piece} for piece in re.findall(r"(?s).{1,2000}", asked.removeprefix("say:"))]
            return StreamingResponse(events(body, deltas), media_type="text/event-stream")
        if "refuse" in asked:
            return JSONResponse({"error": {"message": "seed: must be at least 0"}}, 400)
        if "long" in asked and len(body["messages"]) > 3:
            return JSONResponse({"error": {"message": "too long", "code": "context_length_exceeded"}}, 400)
        words = f"{body['model']} says: " + " | ".join(message["content"] for message in body["messages"])
        pieces = re.findall(r"\S+\s*", words + (" and on" * 100 if "slow" in asked else ""))
        deltas = [{"content": piece} for piece in pieces]
        if "think" in asked:
            deltas = [{"reasoning_content": "first I "}, {"reasoning_content": "think"}, *deltas]
        if "tool" in asked:
            runs = [{"name": "calculator", "arguments": {"expression": "6 * 7"}, "result": "42"}]
            deltas = [{"tool_runs": runs}, *deltas]
        if "code" in asked:
            deltas = [{"content": "So:\n```python\n"}, {"content": "print('<b>')\n``"}, {"content": "`\nThat is all."}]
        finish_reason = "length" if "cut" in asked else "stop"
        return StreamingResponse(events(body, deltas, finish_reason), media_type="text/event-stream")

    @app.post("/v1/completions")
    def complete(body: dict):
        app.state.bodies.append(body)
        if body.get("echo"):
            return {"choices": [{"text": body["prompt"], "logprobs": echoed(body["prompt"])}]}
        deltas = [{"text": " and"}, {"text": " so on"}]
        return StreamingResponse(events(body, deltas), media_type="text/event-stream")

    app.mount("/", StaticFiles(directory=ROOT / "server/web", html=True))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return server, app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"


def log_probs(text: str) -> dict:
    """Of a piece with probability 1/2, as the chat endpoint has them."""
    entry = {"token": text, "logprob": math.log(0.5), "bytes": [*text.encode()]}
    others = [{"token": f"other{i}", "logprob": math.log(0.1), "bytes": [*f"other{i}".encode()]} for i in range(4)]
    return {"content": [entry | {"top_logprobs": [entry, *others]}]}


def echoed(text: str) -> dict:
    """Of a prompt: a token for each character, and two for one outside of ASCII; each takes 4 bits."""
    offsets = [i for i, character in enumerate(text) for _ in range(1 if character.isascii() else 2)]
    logs = [None] + [-4 * math.log(2)] * (len(offsets) - 1)
    tops = [None] + [{"x": math.log(0.75), "y": math.log(0.125)}] * (len(offsets) - 1)
    tokens = [text[i] for i in offsets]
    return {"tokens": tokens, "token_logprobs": logs, "top_logprobs": tops, "text_offset": offsets}


def write_runs(out: Path):
    """Two runs to compare, one with experts, one with samples."""
    for name, shift in (("pretrain", 0.0), ("more/grpo", 0.5)):
        directory = out / name
        directory.mkdir(parents=True)
        lines = []
        for step in range(0, 500, 10):
            record = {"step": step, "tokens": 100 * step, "minutes": step / 60, "loss": shift + 8 / (1 + step / 50)}
            if step % 100 == 0:
                record |= {f"val_loss{source}": record["loss"] + 0.1 for source in ("", "_zh", "_en")}
            if name == "pretrain":
                record |= {"expert_load": [[0.25, 0.25, 0.5, 0.0]] * 2, "load_max": 2.0, "tokens_per_s": None}
            lines.append(json.dumps(record) + "\n")
        (directory / "metrics.jsonl").write_text("".join(lines))
        (directory / "run.json").write_text(json.dumps({"arguments": {"seed": 0, "learning_rate": 1 + shift}}))
    sample = {"step": 10, "question": "1加1等于多少？", "answer": "2", "written": "<b>2</b><|im_end|>", "reward": 1.0}
    (directory / "rollouts.jsonl").write_text(json.dumps(sample) + "\n")


def say(page, text: str):
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def wait(page):
    page.locator('#turns[aria-busy="false"]').wait_for()


def open_settings(page):
    page.locator("#settings summary").click()


def choose(page, *models: str):
    page.get_by_label("Side by side").set_checked(len(models) > 1)
    for model in models:
        page.locator("#models").get_by_label(model).check()
    for box in page.locator("#models input:checked").all():
        if box.get_attribute("value") not in models:
            box.uncheck()
