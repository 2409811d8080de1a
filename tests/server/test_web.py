"""The pages of server/web/ in a browser without a window: what a visitor does, with a made-up server behind them.

It takes Playwright (requirements/interop.txt) and a browser: Debian's chromium, or what `playwright install chromium`
brings.
"""

import asyncio
import json
import re
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT

from images.web import launch

pytestmark = pytest.mark.extra
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

MODELS = {"pretrain": False, "sft": True, "dpo": True}  # name -> whether it chats
KEY = "mustard"


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

    async def events(body: dict, deltas: list[dict]):
        for delta in deltas:
            choice = {"index": 0, "delta": delta, **delta, "finish_reason": None}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            await asyncio.sleep(0.2 if "slow" in str(body) else 0.005)
        if "break off" in str(body):
            return
        last = {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]}
        usage = {"choices": [], "usage": {"completion_tokens": len(deltas)}}
        yield f"data: {json.dumps(last)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    def chat(body: dict):
        app.state.bodies.append(body)
        asked = body["messages"][-1]["content"]
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
        return StreamingResponse(events(body, deltas), media_type="text/event-stream")

    @app.post("/v1/completions")
    def complete(body: dict):
        app.state.bodies.append(body)
        deltas = [{"text": " and"}, {"text": " so on"}]
        return StreamingResponse(events(body, deltas), media_type="text/event-stream")

    app.mount("/", StaticFiles(directory=ROOT / "server/web", html=True))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return server, app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"


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
    with playwright.sync_playwright() as started:
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


def say(page, text: str):
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def wait(page):
    expect(page.locator("#turns")).to_have_attribute("aria-busy", "false")


def choose(page, *models: str):
    page.get_by_label("Side by side").set_checked(len(models) > 1)
    for model in models:
        page.locator("#models").get_by_label(model).check()
    for box in page.locator("#models input:checked").all():
        if box.get_attribute("value") not in models:
            box.uncheck()


def test_an_answer_streams_and_stays_after_a_reload(visit, site):
    page = visit()
    choose(page, "sft")
    expect(page.locator("#about")).to_contain_text("sft: chat model, 1,009,792 parameters, context 512")
    say(page, "Hello")
    expect(page.get_by_role("article")).to_contain_text("sft says: Hello")
    wait(page)
    expect(page.get_by_role("article")).to_contain_text("3 tokens")
    say(page, "And you?")
    expect(page.get_by_role("article").last).to_contain_text("sft says: Hello | sft says: Hello | And you?")
    wait(page)
    page.reload()
    expect(page.get_by_role("article")).to_have_count(2)
    expect(page.get_by_role("article").last).to_contain_text("And you?")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)
    page.locator("#conversations").get_by_role("button", name="Hello", exact=True).click()
    expect(page.get_by_role("article")).to_have_count(2)
    assert "temperature" not in site[0].bodies[0]  # the server's own


def test_stop_keeps_what_is_there(visit):
    page = visit()
    choose(page, "sft")
    say(page, "slow")
    expect(page.get_by_role("article")).to_contain_text("sft says")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("article")).to_contain_text("stopped")
    wait(page)
    length = len(page.get_by_role("article").inner_text())
    page.wait_for_timeout(500)
    assert len(page.get_by_role("article").inner_text()) == length
    page.reload()
    expect(page.get_by_role("article")).to_contain_text("sft says")


def test_edit_and_resend_and_regenerate(visit, site):
    page = visit()
    choose(page, "sft")
    say(page, "first")
    wait(page)
    say(page, "second")
    wait(page)
    page.get_by_role("button", name="Regenerate").click()
    wait(page)
    assert [len(body["messages"]) for body in site[0].bodies] == [1, 3, 3]
    page.get_by_role("button", name="Edit").first.click()
    area = page.locator(".question textarea")
    expect(area).to_have_value("first")
    area.press("Escape")
    expect(area).to_have_count(0)
    page.get_by_role("button", name="Edit").first.click()
    area.fill("changed")
    area.press("Enter")
    expect(page.get_by_role("article")).to_have_count(1)
    expect(page.get_by_role("article")).to_contain_text("sft says: changed")


def test_several_models_side_by_side_each_with_its_own_past(visit, site):
    page = visit()
    choose(page, "pretrain", "sft", "dpo")
    say(page, "Hello")
    wait(page)
    articles = page.get_by_role("article")
    expect(articles).to_have_count(3)
    expect(articles.nth(0)).to_contain_text("Hello and so on")  # the base model goes on with the text
    boxes = [articles.nth(i).bounding_box() for i in range(3)]
    assert boxes[0]["y"] == boxes[1]["y"] == boxes[2]["y"]
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    say(page, "More")
    wait(page)
    expect(articles.nth(4)).to_contain_text("sft says: Hello | sft says: Hello | More")
    expect(articles.nth(5)).to_contain_text("dpo says: Hello | dpo says: Hello | More")
    assert [body["prompt"] for body in site[0].bodies if "prompt" in body] == ["Hello", "More"]
    page.get_by_label("Side by side").uncheck()
    expect(page.locator("#models :checked")).to_have_count(1)


def test_thinking_is_folded_tools_and_code_are_shown(visit):
    page = visit()
    choose(page, "sft")
    say(page, "think, with a tool")
    wait(page)
    thought = page.get_by_text("first I think")
    expect(thought).to_be_hidden()
    page.get_by_text("Thinking", exact=True).click()
    expect(thought).to_be_visible()
    expect(page.locator("article")).to_contain_text("Tool calculator")
    expect(page.locator("article")).to_contain_text('{"expression":"6 * 7"} → 42')
    say(page, "code")
    wait(page)
    expect(page.locator("article pre")).to_have_text("print('<b>')\n")
    expect(page.locator("article").last).to_contain_text("That is all.")


def test_what_is_typed_is_text(visit):
    page = visit()
    choose(page, "sft")
    say(page, "<img src=x onerror=alert(1)><b>bold</b>")
    wait(page)
    expect(page.locator("#turns img, #turns b")).to_have_count(0)
    expect(page.get_by_role("article")).to_contain_text("<b>bold</b>")


def test_settings_are_sent_and_kept(visit, site):
    page = visit()
    choose(page, "sft")
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    for name, value in (("Temperature", "0"), ("top_p", "0.5"), ("Tokens at most", "7"), ("Seed", "3")):
        page.get_by_label(name).fill(value)
    say(page, "Hello")
    wait(page)
    body = site[0].bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0, "top_p": 0.5, "max_tokens": 7, "seed": 3,
    }  # fmt: skip
    page.reload()
    expect(page.locator("[name=seed]")).to_have_value("3")
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("9")
    say(page, "too hot")
    assert len(site[0].bodies) == 1


def test_errors_are_told(visit):
    page = visit(allowed="400 (Bad Request)")
    choose(page, "sft")
    say(page, "refuse")
    expect(page.get_by_role("alert")).to_have_text("seed: must be at least 0")
    wait(page)
    say(page, "break off")
    expect(page.get_by_role("alert").last).to_contain_text("the answer is not whole")
    expect(page.get_by_role("article").last).to_contain_text("sft says")


def test_the_oldest_turns_make_room(visit, site):
    page = visit(allowed="400 (Bad Request)")
    choose(page, "sft")
    for text in ("one", "two", "three", "a long one"):
        say(page, text)
        wait(page)
    expect(page.get_by_role("article").last).to_contain_text("without the 2 oldest turns")
    assert [message["content"] for message in site[0].bodies[-1]["messages"]][::2] == ["three", "a long one"]


def test_a_key_is_asked_for_and_kept_in_the_tab(visit, site):
    site[0].key = KEY
    page = visit(allowed="401 (Unauthorized)")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key").fill("wrong")
    dialog.get_by_label("Key").press("Enter")
    expect(dialog.get_by_label("Key")).to_have_value("")
    dialog.get_by_label("Key").fill(KEY)
    dialog.get_by_role("button", name="OK").click()
    choose(page, "sft")
    say(page, "Hello")
    expect(page.get_by_role("article")).to_contain_text("sft says: Hello")
    wait(page)
    page.reload()
    expect(page.locator("#about")).to_contain_text("sft")
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")


def test_without_a_key_the_runs_are_not_asked_for_again(visit, site):
    site[0].key = KEY
    page = visit("runs.html", allowed="401 (Unauthorized)")
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_have_text("a key is needed")
    page.wait_for_timeout(3500)
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_history_can_be_deleted(visit):
    page = visit()
    page.on("dialog", lambda dialog: dialog.accept())
    choose(page, "sft")
    for text in ("one", "two", "three"):
        page.get_by_role("button", name="New chat").click()
        say(page, text)
        wait(page)
    page.get_by_role("button", name="Delete: two").click()
    expect(page.locator("#conversations li")).to_have_text(["three×", "one×"])
    page.get_by_role("button", name="Delete all").click()
    expect(page.locator("#conversations li")).to_have_count(0)
    page.reload()
    expect(page.get_by_role("article")).to_have_count(0)
    say(page, "slow")
    expect(page.get_by_role("article")).to_contain_text("sft says")
    page.get_by_role("button", name="Delete: slow").click()
    wait(page)
    expect(page.locator("#conversations li")).to_have_count(0)


def test_a_reload_keeps_what_has_been_written(visit):
    page = visit()
    choose(page, "sft")
    say(page, "slow")
    expect(page.get_by_role("article")).to_contain_text("sft says")
    page.reload()
    expect(page.get_by_role("article")).to_contain_text("sft says")


def test_two_languages_and_dark(visit):
    page = visit(locale="zh-CN", color_scheme="dark")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.get_by_role("button", name="发送")).to_be_visible()
    color = "getComputedStyle(document.documentElement).backgroundColor.match(/[0-9.]+/g).slice(0, 3)"
    brightness = f"{color}.map(Number).reduce((a, b) => a + b)"  # from 0 to 765
    assert page.evaluate(brightness) < 150
    page.get_by_role("button", name="Switch").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.get_by_role("button", name="Light: system").click()
    assert page.evaluate(brightness) > 600
    page.reload()
    expect(page.get_by_role("button", name="Light: light")).to_be_visible()
    expect(page).to_have_title("Jiezi: chat")
    assert page.evaluate(brightness) > 600


def test_every_word_is_known_in_both_languages():
    table = (ROOT / "server/web" / "page.js").read_text("utf-8").partition("const WORDS")[2].partition("\n};")[0]
    known = set(re.findall(r"^  (\w+): \[", table, re.MULTILINE))
    used = {"x_step", "x_tokens", "x_minutes", "theme_auto", "theme_light", "theme_dark", "kind_chat", "kind_base"}
    for path in (ROOT / "server/web").glob("*.*"):
        if path.suffix in (".js", ".html"):
            text = path.read_text("utf-8")
            used |= set(re.findall(r'(?:word\(|data-(?:word|label|placeholder)"?[=:] ?|startPage\()"(\w+)"', text))
    assert used <= known


@pytest.mark.parametrize("path", ["", "runs.html"])
def test_a_phone_needs_no_scrolling_to_the_side(visit, path):
    page = visit(path, viewport={"width": 360, "height": 640})
    if not path:
        choose(page, "pretrain", "sft", "dpo")
        say(page, "code " + "x" * 300)
        wait(page)
        page.get_by_role("button", name="History").click()
        expect(page.get_by_role("button", name="New chat")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="New chat")).to_be_hidden()
        page.get_by_text("Settings").click()
    else:
        expect(page.locator("#charts figure").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_keyboard_is_enough(visit):
    page = visit()
    keyboard = page.keyboard
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.locator("#models input")).to_have_count(3)
    keyboard.press("Shift+Tab")  # to the switch, then to the models
    expect(page.get_by_label("Side by side")).to_be_focused()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    keyboard.press("Shift+Tab")
    keyboard.press("ArrowUp")  # from the newest
    expect(page.locator("#models").get_by_label("sft")).to_be_checked()
    keyboard.press("Tab")
    keyboard.press("Tab")
    keyboard.type("slow")
    keyboard.press("Shift+Enter")
    keyboard.type("line")
    expect(page.get_by_label("Message")).to_have_value("slow\nline")
    keyboard.press("Enter")
    expect(page.get_by_role("article")).to_contain_text("sft says: slow line", use_inner_text=False)
    keyboard.press("Escape")
    expect(page.get_by_role("article")).to_contain_text("stopped")
    expect(page.get_by_label("Message")).to_have_value("")
    assert page.locator("[onclick], div[role=button]").count() == 0


def test_enter_that_ends_a_word_of_an_input_method_sends_nothing(visit, site):
    page = visit()
    page.get_by_label("Message").fill("你好")
    page.get_by_label("Message").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    page.wait_for_timeout(200)
    assert site[0].bodies == []


def test_with_the_real_server(visit, serve):
    page = visit(address=serve(api_key=KEY, tools=["calculator"]).url + "/", allowed="401 (Unauthorized)")
    page.get_by_role("dialog").get_by_label("Key").fill(KEY)
    page.get_by_role("dialog").get_by_label("Key").press("Enter")
    expect(page.locator("#models input")).to_have_count(2)
    page.get_by_text("Settings").click()
    page.get_by_label("Tokens at most").fill("5")
    choose(page, "pretrain", "sft")
    say(page, "你好")
    wait(page)
    articles = page.get_by_role("article")
    expect(articles.nth(0)).to_contain_text("5 tokens")
    expect(articles.nth(1)).to_contain_text("5 tokens")
    expect(page.locator(".error:visible")).to_have_count(0)
    page.goto(page.url + "runs.html")
    expect(page.get_by_text("No runs yet").or_(page.locator("#runs thead"))).to_be_visible()


def test_runs_are_drawn_and_compared(visit, site):
    page = visit("runs.html")
    table = page.locator("#runs")
    expect(table.get_by_role("row")).to_have_count(3)
    for name in ("pretrain", "more/grpo"):
        table.get_by_label(name).check()
    loss = page.locator("figure").first
    expect(loss.locator("figcaption")).to_have_text("loss")
    expect(loss.locator("polyline.curve")).to_have_count(4)  # of two runs, train and val
    expect(page.locator("figcaption", has_text="loss by source")).to_be_visible()
    expect(page.locator("figcaption", has_text="tokens_per_s")).to_have_count(0)  # it holds no number
    before = loss.locator("polyline").first.get_attribute("points")
    page.get_by_label("logarithmic y").check()
    assert loss.locator("polyline").first.get_attribute("points") != before
    page.get_by_label("minutes").check()
    expect(loss.locator("svg").first).to_contain_text("minutes")
    loss.get_by_role("img").focus()
    page.keyboard.press("ArrowLeft")
    expect(loss.locator(".legend")).to_contain_text("@ 8")
    loss.get_by_role("img").hover(position={"x": 70, "y": 60})
    expect(loss.locator(".cursor")).to_have_count(1)
    loss.get_by_text("Values").click()
    expect(loss.locator("table")).to_contain_text("pretrain loss")
    expect(page.locator(".loads td").nth(2)).to_have_text("2")
    expect(page.locator(".sample pre")).to_have_text("<b>2</b><|im_end|>")
    assert sorted(page.locator("td.differs").all_inner_texts()) == ["1", "1.5"]


def test_a_run_is_watched_while_it_grows(visit, site):
    page = visit("runs.html")
    table = page.locator("#runs")
    table.get_by_label("pretrain").check()
    table.get_by_label("more/grpo").uncheck()  # the newest is ticked at first
    metrics = site[0].out / "pretrain" / "metrics.jsonl"
    figures = page.locator("figure").first.locator("table")
    expect(figures).to_contain_text("490")
    with open(metrics, "a") as file:
        file.write('{"step": 1234, "loss": 0.123')
    page.wait_for_timeout(3500)
    expect(figures).not_to_contain_text("1,234")
    with open(metrics, "a") as file:
        file.write("4}\n")
    expect(figures).to_contain_text("1,234")
    metrics.write_text('{"step": 7, "loss": 5.0}\n')  # begun anew
    expect(figures).to_contain_text("5")
    expect(figures).not_to_contain_text("490")
