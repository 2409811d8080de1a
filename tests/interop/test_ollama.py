"""The Modelfile's template, executed by Go's text/template, is the project's chat; and what Ollama reads off it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import TOKENIZER

from model.chat import encode_chat, load_tokenizer
from model.verify import CHAT, TOOL

TEMPLATE = Path("model/ollama.gotmpl").read_text("utf-8").rstrip("\n")
CALLS = [{"function": {"name": name, "arguments": {"n": 1}}} for name in ("plus", "minus")]
CHATS = [
    ([{"role": "user", "content": "你好"}], None),
    ([{"role": "user", "content": "Hello"}], [TOOL, TOOL]),
    (CHAT[:2], None),
    (CHAT[:4], [TOOL]),
    (CHAT, [TOOL]),
    (
        [
            {"role": "user", "content": "1 + 1"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS},
            {"role": "tool", "content": "2"},
            {"role": "tool", "content": "0"},
        ],
        None,
    ),
]


def compact(text: str) -> str:
    """Go writes JSON without spaces and with sorted keys: both are made alike before they are compared."""
    return re.sub(r"^\{.*\}$", lambda found: json.dumps(json.loads(found[0]), sort_keys=True), text, flags=re.M)


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go, whose text/template Ollama uses: apt install golang-go")
@pytest.mark.parametrize(("messages", "tools"), CHATS)
def test_a_chat_through_the_template_is_the_projects(messages, tools, go_program):
    spoken = [message | {"thinking": message.get("reasoning_content", "")} for message in messages]
    request = json.dumps({"template": TEMPLATE, "messages": spoken, "tools": tools})
    result = subprocess.run([go_program], input=request, capture_output=True, encoding="utf-8", check=True)
    tokenizer = load_tokenizer(TOKENIZER)
    ids, _ = encode_chat(tokenizer, messages, tools, add_generation_prompt=True)
    assert compact(result.stdout) == compact(tokenizer.decode(ids, skip_special_tokens=False))


@pytest.fixture(scope="module")
def go_program(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("go") / "ollama_template"
    subprocess.run(["go", "build", "-o", str(program), "tests/interop/ollama_template.go"], check=True)
    return program


def test_ollama_finds_the_tags_of_tools_and_thinking():
    """It takes the first text within `if .ToolCalls`, and those around .Thinking (parseTag, InferTags)."""
    calls = re.search(r"\{\{- if \.ToolCalls \}\}\s*(?:\{\{- range [^}]*\}\})([^{]*)", TEMPLATE)
    assert calls[1].strip() == "<tool_call>"
    thinking = re.search(r"\{\{ if \.Thinking \}\}([^{]*)\{\{ \.Thinking \}\}([^{]*)\{\{ end \}\}", TEMPLATE)
    assert (thinking[1].strip(), thinking[2].strip()) == ("<think>", "</think>")
