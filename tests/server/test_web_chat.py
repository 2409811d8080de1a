"""What the chat page can do with answers and chats: Markdown, copies, versions, settings, tokens, files, shortcuts.

It takes Playwright (requirements/interop.txt) and a browser: Debian's chromium, or what `playwright install chromium`
brings.
"""

import json

import pytest
from fake_site import choose, open_settings, say, wait

pytestmark = pytest.mark.extra
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect


@pytest.fixture
def chat(visit):
    """chat(**how) opens the page and chooses a model that chats."""

    def open_chat(**how):
        page = visit(**how)
        choose(page, "sft")
        return page

    return open_chat


def item(page, name: str):
    """A chat in the list, with its menu open."""
    entry = page.locator("#conversations li", has=page.get_by_role("button", name=name, exact=True))
    entry.locator("summary").click()
    return entry


def saved(page, button) -> str:
    with page.expect_download() as download:
        button.click()
    with open(download.value.path(), encoding="utf-8") as file:
        return file.read()


def bring(page, button, name: str, content: bytes):
    with page.expect_file_chooser() as chooser:
        button.click()
    chooser.value.set_files({"name": name, "mimeType": "application/octet-stream", "buffer": content})


MARKDOWN = r"""say:# Title
**bold** [link](https://example.com/) $e^{i\pi}$

1. one
   - inner

| a | b |
|--:|---|
| 1 | 2 |

```python
def f(x): return "<b>"
```

$$
\frac{1}{2}
+ 1
$$

It costs $5 and $6, \(x\) is free."""


def test_markdown_is_drawn(chat):
    page = chat()
    say(page, MARKDOWN)
    wait(page)
    body = page.locator("article .body")
    expect(body.get_by_role("heading", name="Title")).to_be_visible()
    expect(body.locator("strong")).to_have_text("bold")
    expect(body.get_by_role("link")).to_have_attribute("href", "https://example.com/")
    expect(body.get_by_role("link")).to_have_attribute("rel", "noopener noreferrer nofollow")
    expect(body.locator("ol > li > ul > li")).to_have_text("inner")
    expect(body.locator("td")).to_have_text(["1", "2"])
    assert body.locator("td").first.evaluate("cell => getComputedStyle(cell).textAlign") == "right"
    expect(body.locator(".code-keyword").first).to_have_text("def")
    expect(body.locator(".code-string")).to_have_text('"<b>"')
    expect(body.locator("math")).to_have_count(3)
    expect(body.locator("mfrac")).to_have_count(1)
    expect(body).to_contain_text("It costs $5 and $6")


def test_a_number_with_a_full_stop_is_no_list(chat):
    page = chat()
    say(page, "say:25.")
    wait(page)
    expect(page.locator("article .body")).to_have_text("25.")
    expect(page.locator("article ol")).to_have_count(0)


def test_an_answer_and_its_code_are_copied(chat):
    page = chat(permissions=["clipboard-read", "clipboard-write"])
    say(page, MARKDOWN)
    wait(page)
    page.locator("figure.code").get_by_role("button", name="Copy").click()
    expect(page.locator("figure.code").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == 'def f(x): return "<b>"\n'
    page.locator("article footer").get_by_role("button", name="Copy").click()
    expect(page.locator("article footer").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN.removeprefix("say:")


def test_copying_works_without_a_secure_context(chat):
    page = chat(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error()) }")
    say(page, "say:by hand")
    wait(page)
    page.locator("article footer").get_by_role("button", name="Copy").click()
    expect(page.locator("article footer").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "by hand"


def test_a_chat_gets_a_name_and_is_found_by_what_was_said(chat):
    page = chat()
    for text in ("say:an apple", "say:a pear"):
        page.get_by_role("button", name="New chat").click()
        say(page, text)
        wait(page)
    item(page, "say:an apple").get_by_role("button", name="Rename").click()
    page.get_by_label("Name").fill("Fruit")
    page.get_by_label("Name").press("Enter")
    names = page.locator("#conversations li > button")
    expect(names).to_have_text(["say:a pear", "Fruit"])
    for words, found in (("APPLE", ["Fruit"]), ("fru", ["Fruit"]), ("pear", ["say:a pear"]), ("plum", [])):
        page.get_by_label("Search chats").fill(words)
        expect(names).to_have_text(found)
    expect(page.get_by_text("Nothing found")).to_be_visible()
    page.reload()
    expect(names).to_have_text(["say:a pear", "Fruit"])


def test_the_open_chat_keeps_a_new_name_when_it_goes_on(chat):
    page = chat()
    say(page, "Hello")
    wait(page)
    item(page, "Hello").get_by_role("button", name="Rename").click()
    page.get_by_label("Name").fill("Greeting")
    page.get_by_label("Name").press("Enter")
    say(page, "more")
    wait(page)
    expect(page.locator("#conversations li > button")).to_have_text(["Greeting"])


def test_a_chat_leaves_as_markdown_and_json_and_comes_back(chat):
    page = chat()
    say(page, "think of it")
    wait(page)
    text = saved(page, item(page, "think of it").get_by_role("button", name="Export Markdown"))
    assert text == "# think of it\n\n## You\n\nthink of it\n\n## sft\n\n> first I think\n\nsft says: think of it\n"
    exported = saved(page, page.get_by_role("button", name="Export all"))
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all").click()
    expect(page.locator("#conversations li")).to_have_count(0)
    bring(page, page.get_by_role("button", name="Import"), "chats.json", exported.encode())
    expect(page.locator("#status")).to_have_text("Imported chats: 1")
    page.locator("#conversations").get_by_role("button", name="think of it", exact=True).click()
    expect(page.get_by_role("article")).to_contain_text("sft says: think of it")


def test_a_hostile_file_of_chats_brings_nothing_that_breaks_the_page(chat):
    page = chat()
    deep = {"text": "end", "answers": {}}
    for i in range(300):
        deep = {"text": f"turn {i}", "answers": {"sft": {"content": "x", "pieces": [[1]]}}, "next": [deep], "at": "0"}
    chats = [None, 5, [], {"next": "x"}, {"next": [None, {"text": {}}], "settings": [1]}]
    chats += [{"next": [{"text": "odd", "answers": {"sft": 1, "__proto__": {"content": "y"}, "dpo": {"runs": [1]}}}]}]
    chats += [{"id": "../x", "name": 7, "time": "now", "at": 1e9, "next": [deep], "settings": {"seed": {}}}]
    button = page.get_by_role("button", name="Import")
    bring(page, button, "chats.json", json.dumps({"format": "jiezi-chats", "chats": chats}).encode())
    expect(page.locator("#status")).to_have_text("Imported chats: 3")
    page.locator("#conversations").get_by_role("button", name="turn 299", exact=True).click()
    expect(page.locator("#turns > li")).to_have_count(301)
    page.locator("#conversations").get_by_role("button", name="odd", exact=True).click()
    expect(page.locator("#turns > li")).to_have_count(1)
    for text in ("{", "[]", '{"format": "jiezi-chats"}', '{"format": "jiezi-chats", "chats": 3}'):
        bring(page, button, "chats.json", text.encode())
        expect(page.locator("#status")).to_contain_text("not a JSON export")


def test_each_version_of_a_turn_keeps_what_followed_it(chat, site):
    page = chat()
    for text in ("one", "two"):
        say(page, text)
        wait(page)
    page.get_by_role("button", name="Regenerate").first.click()
    wait(page)
    articles = page.get_by_role("article")
    expect(articles).to_have_count(1)
    expect(page.locator(".versions")).to_contain_text("2/2")
    expect(page.get_by_role("button", name="Next version")).to_be_disabled()
    page.get_by_role("button", name="Previous version").click()
    expect(articles).to_have_count(2)
    page.reload()
    expect(articles).to_have_count(2)
    page.get_by_role("button", name="Next version").click()
    say(page, "three")
    wait(page)
    assert [message["content"] for message in site[0].bodies[-1]["messages"]] == ["one", "sft says: one", "three"]


def test_an_answer_that_was_cut_is_continued(chat, site):
    page = chat()
    say(page, "cut")
    wait(page)
    expect(page.get_by_role("article")).to_contain_text("cut at the limit")
    page.get_by_role("button", name="Continue").click()
    wait(page)
    expect(page.get_by_role("article")).to_contain_text("sft says: cut and the rest.")
    expect(page.get_by_role("button", name="Continue")).to_be_hidden()
    body = site[0].bodies[-1]
    assert body["messages"][-1] == {"role": "assistant", "content": "sft says: cut"}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def test_a_base_model_continues_its_own_text(visit, site):
    page = visit()
    choose(page, "pretrain")
    say(page, "slow")
    expect(page.get_by_role("article")).to_contain_text("slow and")
    page.get_by_role("button", name="Stop").click()
    wait(page)
    page.get_by_role("button", name="Continue").click()
    wait(page)
    assert site[0].bodies[-1]["prompt"] == "slow and"


def test_every_setting_is_sent_kept_per_chat_and_reset(chat, site):
    page = chat()
    open_settings(page)
    given = {"temperature": 0.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2}
    given |= {"max_tokens": 9, "seed": 3, "max_think_tokens": 20}
    for name, value in given.items():
        page.locator(f"[name={name}]").fill(str(value))
    page.locator("[name=think]").select_option("off")
    page.locator("[name=stop]").fill("END\n\\n\\n")
    page.locator("[name=system]").fill("Be brief.")
    say(page, "Hello")
    wait(page)
    body = site[0].bodies[-1]
    assert {name: body[name] for name in given} == given
    assert (body["think"], body["stop"], body["messages"][0]["content"]) == ("off", ["END", "\n\n"], "Be brief.")
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("button", name="Reset settings").click()
    expect(page.locator("[name=seed]")).to_have_value("")
    say(page, "again")
    wait(page)
    assert set(site[0].bodies[-1]) == {"model", "stream", "stream_options", "max_tokens", "messages"}
    page.locator("#conversations").get_by_role("button", name="Hello", exact=True).click()
    expect(page.locator("[name=seed]")).to_have_value("3")
    expect(page.locator("[name=stop]")).to_have_value("END\n\\n\\n")


def test_time_to_first_token_and_the_context_are_shown(chat):
    page = chat()
    say(page, "Hello")
    wait(page)
    expect(page.get_by_role("article")).to_contain_text("first token 0.")
    expect(page.locator("#context")).to_contain_text("context 103 / 512")
    assert page.locator("#context meter").evaluate("meter => [meter.value, meter.max]") == [103, 512]


def test_the_tokens_of_an_answer(chat, site):
    page = chat()
    page.get_by_label("Token probabilities").check()
    say(page, "say:" + "half" * 500 + "\n🙂")
    wait(page)
    assert (site[0].bodies[0]["logprobs"], site[0].bodies[0]["top_logprobs"]) == (True, 5)
    page.reload()
    page.get_by_role("button", name="Tokens", exact=True).click()
    tokens = page.locator(".token")
    expect(tokens).to_have_count(2)
    expect(page.locator(".tokens .note")).to_contain_text("2 tokens, perplexity 2.")
    expect(tokens.last).to_have_text("⏎🙂")
    shade = tokens.last.evaluate("token => token.style.getPropertyValue('--shade')")
    assert float(shade) == pytest.approx(0.5, abs=1e-3)
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator(".detail")).to_contain_text("50% · 1 bits")
    expect(page.get_by_role("table", name="Alternatives").get_by_role("row")).to_have_count(5)
    expect(page.locator(".detail tr").last).to_contain_text("other3")
    page.get_by_role("button", name="Tokens", exact=True).click()
    expect(page.locator(".body").last).to_be_visible()


def test_where_a_prompt_surprised_the_model(chat, site):
    page = chat()
    say(page, "a春🙂")
    wait(page)
    page.get_by_role("button", name="Where was the model surprised?").click()
    tokens = page.locator(".token")
    expect(tokens).to_have_text(["a", "春", "🙂"])
    body = site[0].bodies[-1]
    assert body == {"model": "sft", "prompt": "a春🙂", "max_tokens": 0, "echo": True, "logprobs": 5}
    expect(page.locator(".tokens .note")).to_contain_text("2.29 bits per byte")  # 16 bits, 3 + 4 bytes
    tokens.nth(1).click()
    expect(page.locator(".detail")).to_contain_text("8 bits · 2.67 bits per byte")
    expect(page.locator(".detail tr").first).to_contain_text("75%")
    tokens.first.click()
    expect(page.locator(".detail")).to_contain_text("no probability")


def test_text_files_come_into_the_prompt(chat, site):
    page = chat()
    button = page.get_by_role("button", name="Add a text file")
    bring(page, button, "a.py", "print('春')\n```\n".encode())
    expect(page.get_by_label("Message")).to_have_value("a.py:\n````\nprint('春')\n```\n````\n")
    for content in (b"\xff\xfe", b"a\0b", b"x" * 200_001):
        bring(page, button, "b.bin", content)
        expect(page.locator("#status")).to_contain_text("b.bin is not UTF-8 text")
        page.evaluate("document.querySelector('#status').textContent = ''")
    page.get_by_label("Message").fill("")
    page.evaluate(
        """() => {
          const dropped = new DataTransfer();
          dropped.items.add(new File(["dropped"], "c.txt"));
          const event = new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true });
          document.querySelector("#turns").dispatchEvent(event);
        }"""
    )
    expect(page.get_by_label("Message")).to_have_value("c.txt:\n```\ndropped\n```\n")


def test_shortcuts_and_the_sheet_that_lists_them(chat, site):
    page = chat(permissions=["clipboard-read", "clipboard-write"])
    say(page, "say:one")
    wait(page)
    page.keyboard.press("Alt+r")
    expect(page.locator(".versions")).to_contain_text("2/2")
    wait(page)
    page.keyboard.press("Alt+c")
    page.wait_for_function("async () => (await navigator.clipboard.readText()) === 'one'")
    page.keyboard.press("Alt+k")
    expect(page.get_by_label("Search chats")).to_be_focused()
    page.keyboard.press("Alt+s")
    expect(page.get_by_label("Temperature")).to_be_visible()
    page.keyboard.press("Alt+e")
    expect(page.locator(".question textarea")).to_be_focused()
    page.keyboard.type("?")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("Alt+n")
    expect(page.get_by_role("article")).to_have_count(0)
    page.locator("#turns").focus()
    page.keyboard.press("?")
    sheet = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(sheet.get_by_role("row")).to_have_count(12)
    page.keyboard.press("Escape")
    expect(sheet).to_have_count(0)
