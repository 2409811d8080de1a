"""What README and docs name exists: functions, classes, files, flags, links; and both languages have the same pages."""

import ast
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import PAGES, ROOT, inline_code

from base.cli import UserError
from images import draw, terminal

SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("tests/*/*.py")]
TEXT = "\n".join(path.read_text("utf-8") for path in SOURCES)
WORDS = set(re.findall(r"[A-Za-z_]\w*", TEXT)) | {path.stem for path in SOURCES}
FILES = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if ".venv" not in path.parts}
OF_OTHERS = {
    "from_pretrained",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "apply_chat_template",
    "PeftModel",
    "your_corpus",
    "node_rank",
    "master_addr",
}
OF_TORCHRUN = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr"}
NAME = re.compile(r"_?[a-z]+(?:_[a-z0-9]+)+|(?:[A-Z][a-z0-9]+){2,}\w*|[A-Z]{2,}(?:_[A-Z]+)+")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_exists(page):
    text = page.read_text("utf-8")
    names = {name for code in inline_code(text) for name in NAME.findall(code)}
    assert names <= WORDS | OF_OTHERS, names - WORDS - OF_OTHERS
    scripts = {name for code in inline_code(text) for name in re.findall(r"(?<![\w/])(?:[\w-]+/)*[\w-]+\.py\b", code)}
    known = FILES | {path.rpartition("/")[2] for path in FILES}
    assert scripts <= known, scripts - known
    flags = set(re.findall(r"(?<![\w-])--[a-z]\w+", text))
    assert {flag for flag in flags if flag not in TEXT} <= OF_TORCHRUN
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_every_page_is_there_in_both_languages():
    for folder in (ROOT, ROOT / "docs"):
        english = {path.name for path in folder.glob("*_en.md")}
        chinese = {path.name for path in folder.glob("*.md")} - english - {"CONTRIBUTING.md"}
        assert {name.replace(".md", "_en.md") for name in chinese} == english


def test_the_terminal_picture_holds_what_a_command_printed(tmp_path, monkeypatch):
    text = terminal.record([["quickstart.py", "--help"]])
    assert text.startswith("$ python quickstart.py --help\n")
    assert "--minutes" in text
    monkeypatch.setattr(terminal, "chinese_font", lambda: "DejaVu Sans")  # there is one wherever matplotlib is
    monkeypatch.setattr(terminal, "TITLE", "Jiezi")
    terminal.draw(text, tmp_path / "terminal.png")
    assert (tmp_path / "terminal.png").stat().st_size > 10_000
    monkeypatch.setattr(terminal, "chinese_font", lambda: None)
    with pytest.raises(UserError, match="no font with Chinese characters"):
        terminal.draw(text, tmp_path / "terminal.png")


def test_pictures_load_nothing_from_elsewhere():
    for path in ROOT.glob("images/*.svg"):
        assert not re.search(r"(?:href|src|url\()[^>]*http", path.read_text("utf-8")), path


def test_pictures_of_the_structure_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["draw", "--preset", "tiny", "--output", str(tmp_path)])
    monkeypatch.setattr(draw, "chinese_font", lambda: None)  # the machine may have none
    draw.main()
    names = ("LLM-structure", "LLM-structure-moe", "packages", "token-path", "loss-annotated")
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_en.png" for name in names}


@pytest.mark.parametrize("page", ["pretrain.md", "pretrain_en.md"])
def test_the_attention_that_a_page_builds_equals_torchs(page, capsys):
    section = (ROOT / "docs" / page).read_text("utf-8").split("\n## ")[1]
    exec("".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)), found := {})
    expected = F.scaled_dot_product_attention(found["q"], found["k"], found["v"], is_causal=True)
    weights = found["scores"].masked_fill(found["future"], -torch.inf).softmax(-1)
    assert torch.allclose(weights @ found["v"], expected, atol=1e-6)
    for line in capsys.readouterr().out.splitlines():  # what it prints is on the page
        assert line.strip() in section


def test_messages_in_the_troubleshooting_pages_are_printed():
    code = [path for path in SOURCES if ROOT / "tests" not in path.parents]
    constants = {
        node.value
        for path in code
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    messages = {}  # by language: the first cells' inline code
    for page in ROOT.glob("docs/troubleshooting*.md"):
        cells = re.findall(r"^\| (.*?) \|", page.read_text("utf-8"), flags=re.MULTILINE)
        messages[page.name] = [message for cell in cells for message in inline_code(cell) if " " in message]
        for part in (part for message in messages[page.name] for part in message.split("…")):
            assert any(part in constant for constant in constants), f"{page.name}: {part}"
    assert messages["troubleshooting.md"] == messages["troubleshooting_en.md"] != []
