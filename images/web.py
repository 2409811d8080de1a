"""Takes web_chat.png, web_side_by_side.png, web_tokens.png and web_runs.png: the pages of server/web/ in a browser,
with the models of the demo.

    python quickstart.py --no-chat
    python -m images.web

It takes Playwright (requirements/interop.txt) and a browser: Debian's chromium, or what `playwright install chromium`
brings.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from base.cli import import_extra, run

ROOT = Path(__file__).parent.parent
MODELS = "out/quickstart/pretrain out/quickstart/sft out/quickstart/dpo".split()
QUESTIONS = {"en": ("Who are you?", "What is 17 plus 8?"), "zh": ("把 8 3 6 从小到大排列。", "诸葛亮字什么？")}
RUNS = ("quickstart/pretrain", "quickstart/sft")
SIZE = {"width": 1120, "height": 760}


def launch(playwright):
    """A browser without a window: the system's Chromium, else Playwright's own."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


def ask(page, language: str, compare: bool):
    """The questions, one after the other, each answered by the newest model, or by all side by side."""
    page.locator("#models input").first.wait_for()
    if compare:
        page.locator("#compare").check()
        for box in page.locator("#models input").all():
            box.check()
    page.locator("#settings summary").click()
    page.locator("[name=temperature]").fill("0")
    page.locator("[name=max_tokens]").fill("40")
    page.locator("#settings summary").click()
    for i, question in enumerate(QUESTIONS[language], start=1):
        page.locator("#text").fill(question)
        page.locator("#text").press("Enter")
        answers = i * page.locator("#models :checked").count()
        page.locator("article:has(.note:not(:empty))").nth(answers - 1).wait_for()  # its length says that it is whole
        page.locator('#turns[aria-busy="false"]').wait_for()


def show_tokens(page, language: str, compare: bool):
    """The oldest model, which has only been pretrained: it is surprised more often."""
    page.locator("#models input").first.check()
    page.locator("#probabilities").check()
    ask(page, language, compare)
    page.locator("[data-word=surprise]").last.click()
    page.locator("[data-word=tokens_button]").last.click()
    page.locator("article .token").nth(1).click()
    page.locator(".detail tr").last.scroll_into_view_if_needed()


def compare_runs(page, language: str, compare: bool):
    page.locator("#runs input").first.wait_for()
    for box in page.locator("#runs input").all():
        box.set_checked(box.get_attribute("value") in RUNS)
    for name in RUNS:
        page.locator(".legend", has_text=name).first.wait_for()
    page.locator("figure").first.locator("svg").first.hover(position={"x": 120, "y": 60})


SHOTS = {  # name -> page, language, light or dark, what is done there, whether several are compared
    "web_chat": ("", "en", "dark", ask, False),
    "web_side_by_side": ("", "zh", "light", ask, True),
    "web_tokens": ("", "zh", "light", show_tokens, False),
    "web_runs": ("runs.html", "en", "light", compare_runs, True),
}


def take(address: str, output: Path):
    with import_extra("playwright.sync_api", "requirements/interop.txt").sync_playwright() as playwright:
        browser = launch(playwright)
        for name, (path, language, scheme, act, compare) in SHOTS.items():
            page = browser.new_page(viewport=SIZE, locale={"zh": "zh-CN", "en": "en-GB"}[language], color_scheme=scheme)
            page.goto(address + path)
            act(page, language, compare)
            page.screenshot(path=output / f"{name}.png")
        browser.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "images", help="folder")
    args = parser.parse_args()
    command = [sys.executable, str(ROOT / "serve.py"), *MODELS, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            take(re.match(r"\S+", server.stdout.readline())[0] + "/", args.output)
        finally:
            server.terminate()


if __name__ == "__main__":
    run(main)
