"""The page of live runs in a browser: its table, its axes, its samples, at any width.

It takes Playwright (requirements/interop.txt) and a browser: Debian's chromium, or what `playwright install chromium`
brings.
"""

import json
import os
import re

import pytest

pytestmark = pytest.mark.extra
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

LABELS = """picture => {
  const box = picture.getBoundingClientRect();
  return [...picture.querySelectorAll("text")].map((text) => {
    const label = text.getBoundingClientRect();
    const across = label.left >= box.left - 1 && label.right <= box.right + 1;
    return [text.textContent, across && label.top >= box.top - 1 && label.bottom <= box.bottom + 1];
  });
}"""


@pytest.fixture
def run(site):
    """A run with large, small and negative numbers that holds its lock, as one that is running does."""
    import filelock

    directory = site[0].out / "wide"
    directory.mkdir(exist_ok=True)
    metrics = directory / "metrics.jsonl"
    record = {"tokens_per_s": 12345.6, "loss": 2.5, "reward": -1234.5, "tiny": -0.000123}
    records = [
        {"step": i, "tokens": i * 10**8, "minutes": i, "minutes_left": 90 - i}
        | {name: value * (1 + i / 10) for name, value in record.items()}
        | ({"val_loss": 2.75, "sample": "从前"} if i == 3 else {})
        for i in range(6)
    ]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    lock = filelock.FileLock(site[0].out / ".wide.lock", thread_local=False)
    with lock:
        yield metrics
    metrics.unlink()
    os.rmdir(directory)


@pytest.mark.parametrize("locale", ["en-GB", "zh-CN", "ar-EG"])
def test_no_label_of_an_axis_is_cut(visit, run, locale):
    page = visit("runs.html", locale=locale, viewport={"width": 360, "height": 700})
    page.locator("#runs input[value=wide]").check()
    for x in ("step", "tokens", "minutes"):
        page.locator(f"[name=x][value={x}]").check()
        expect(page.locator("#charts figure")).not_to_have_count(0)
        for picture in page.locator("#charts figure > svg").all():
            labels = picture.evaluate(LABELS)
            assert labels
            assert not [text for text, inside in labels if not inside]
    reward = page.locator("figure", has=page.locator("figcaption", has_text="reward")).locator("svg").first
    assert any(text.startswith(("-", "−", "\u200e-", "؜-")) for text, _ in reward.evaluate(LABELS))


def test_the_axes_have_names(visit, run):
    page = visit("runs.html")
    page.locator("#runs input[value=wide]").check()
    loss = page.locator("#charts figure > svg").first
    expect(loss).to_contain_text("loss (nats per token)")
    expect(loss).to_contain_text("steps")
    page.get_by_role("button", name="中文").click()
    expect(loss).to_contain_text("损失（nat/token）")


def test_the_table_tells_speed_time_left_and_validation_loss(visit, run):
    page = visit("runs.html")
    row = page.locator("#runs tr", has_text="wide")
    told = ["running", "5", "3.75", "2.75", "18,518", "85 min", re.compile(r"\d")]
    expect(row.get_by_role("cell")).to_have_text(told)


def test_on_a_phone_a_run_is_a_card(visit, run):
    page = visit("runs.html", viewport={"width": 360, "height": 640})
    row = page.locator("#runs tr", has_text="wide")
    box = row.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    cell = row.locator("td", has_text="85 min")
    assert cell.evaluate("cell => getComputedStyle(cell, '::before').content") == '"Time left"'


def test_samples_appear_as_they_arrive(visit, run):
    page = visit("runs.html")
    page.locator("#runs input[value=wide]").check()
    samples = page.locator("section", has_text="Samples: wide").locator(".sample")
    expect(samples).to_have_count(1)
    with open(run, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 6, "loss": 1.0, "sample": "<b>春</b>"}) + "\n")
    expect(samples.first.locator("pre")).to_have_text("<b>春</b>")


def test_charts_are_chosen(visit, run):
    page = visit("runs.html")
    page.locator("#runs input[value=wide]").check()
    titles = page.locator("#charts figcaption")
    expect(titles).to_have_text(["loss", "reward", "tokens_per_s", "tiny"])
    page.locator("#which").get_by_label("reward").uncheck()
    page.locator("#which").get_by_label("tiny").uncheck()
    expect(titles).to_have_text(["loss", "tokens_per_s"])
    page.reload()
    expect(titles).to_have_text(["loss", "tokens_per_s"])
    page.locator("#which").get_by_label("tiny").check()
    expect(titles).to_have_text(["loss", "tokens_per_s", "tiny"])
