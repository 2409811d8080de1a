"""The pages of server/web/ in a browser without a window: what a visitor does, with a made-up server behind them.

It takes Playwright (requirements/interop.txt) and a browser: Debian's chromium, or what `playwright install chromium`
brings.
"""

import re

import pytest
from fake_site import choose, open_settings, say, wait
from helpers import ROOT

pytestmark = pytest.mark.extra
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

KEY = "mustard"


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
    page.get_by_role("button", name="Regenerate").last.click()
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
    page.locator("article").get_by_text("Thinking", exact=True).click()
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
    open_settings(page)
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
    open_settings(page)
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


def delete(page, chat: str):
    item = page.locator("#conversations li", has=page.get_by_role("button", name=chat, exact=True))
    item.locator("summary").click()
    item.get_by_role("button", name="Delete").click()


def test_history_can_be_deleted(visit):
    page = visit()
    page.on("dialog", lambda dialog: dialog.accept())
    choose(page, "sft")
    for text in ("one", "two", "three"):
        page.get_by_role("button", name="New chat").click()
        say(page, text)
        wait(page)
    delete(page, "two")
    expect(page.locator("#conversations [type=button]:first-child")).to_have_text(["three", "one"])
    page.get_by_role("button", name="Delete all").click()
    expect(page.locator("#conversations li")).to_have_count(0)
    page.reload()
    expect(page.get_by_role("article")).to_have_count(0)
    say(page, "slow")
    expect(page.get_by_role("article")).to_contain_text("sft says")
    delete(page, "slow")
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
    known = set(re.findall(r"^  (\w+): \[", (ROOT / "server/web/words.js").read_text("utf-8"), re.MULTILINE))
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
        open_settings(page)
    else:
        expect(page.locator("#charts figure").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_keyboard_is_enough(visit):
    page = visit()
    keyboard = page.keyboard
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.locator("#models input")).to_have_count(3)
    keyboard.press("Shift+Tab")  # to the files, then to the switches, then to the models
    expect(page.get_by_role("button", name="Add a text file")).to_be_focused()
    keyboard.press("Shift+Tab")
    keyboard.press("Shift+Tab")
    expect(page.get_by_label("Side by side")).to_be_focused()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    keyboard.press("Shift+Tab")
    keyboard.press("ArrowUp")  # from the newest
    expect(page.locator("#models").get_by_label("sft")).to_be_checked()
    for _ in range(4):
        keyboard.press("Tab")
    keyboard.type("slow")
    keyboard.press("Shift+Enter")
    keyboard.type("line")
    expect(page.get_by_label("Message")).to_have_value("slow\nline")
    keyboard.press("Enter")
    expect(page.get_by_role("article")).to_contain_text("sft says: slow\nline", use_inner_text=True)
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
    open_settings(page)
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


def test_tokens_and_continuations_of_the_real_server(visit, serve):
    page = visit(address=serve().url + "/")
    expect(page.locator("#models input")).to_have_count(2)
    page.get_by_label("Token probabilities").check()
    open_settings(page)
    page.get_by_label("Tokens at most").fill("5")
    open_settings(page)
    for i, model in enumerate(("sft", "pretrain")):
        choose(page, model)
        say(page, "你好 a🙂b")
        wait(page)
        page.get_by_role("button", name="Continue").click()
        wait(page)
        article = page.get_by_role("article").last
        expect(article).to_contain_text("10 tokens")
        article.get_by_role("button", name="Tokens", exact=True).click()
        expect(article.locator(".tokens .note")).to_contain_text("10 tokens, perplexity")
        article.locator(".token").first.click()
        expect(article.locator(".detail tr")).to_have_count(5)
        question = page.locator(".question").nth(i)
        question.get_by_role("button", name="Where was the model surprised?").click()
        expect(question.locator(".tokens .note")).to_contain_text("bits per byte")
        assert "".join(question.locator(".token").all_inner_texts()) == "你好 a🙂b"
    expect(page.locator(".error:visible")).to_have_count(0)


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
