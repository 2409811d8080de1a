"""Chats of real open models, by their own templates: the ids are those of transformers. The files are fetched, once, to
the folder of JIEZI_OPEN_MODELS; JIEZI_CHATS names a jsonl file of {"conversations"} to compare, else chats are made up.
"""

import copy
import gzip
import json
import os
from pathlib import Path

import pytest
from open_models import TOOL, make_chats
from transformers import AutoTokenizer

from model.chat import load_tokenizer

FAMILIES = ("smollm2", "qwen3", "qwen2_5", "llama3_2")
NUMBER = 400

pytestmark = pytest.mark.extra


@pytest.fixture(scope="session")
def open_models(tmp_path_factory):
    folder = Path(os.environ.get("JIEZI_OPEN_MODELS") or tmp_path_factory.mktemp("open"))
    if not all((folder / name / "tokenizer.json").exists() for name in FAMILIES):
        from fetch_open_models import write_open_models

        write_open_models(folder)
    return folder


def real_chats() -> list[tuple[list[dict], list | None]]:
    """A quarter each as they are, with thoughts, with a call of a tool, and with one more turn."""
    path = os.environ.get("JIEZI_CHATS")
    if not path:
        return make_chats(NUMBER)
    with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
        records = [json.loads(line)["conversations"] for line in file]
    chats = []
    for i, messages in enumerate(copy.deepcopy(records[:: len(records) // NUMBER][:NUMBER])):
        tools, first = None, messages[1]["content"]
        if i % 4 == 1:
            messages[-1]["reasoning_content"] = f"想一想：\n{first[:30]}"
        elif i % 4 == 2:
            tools, call = [TOOL], {"name": "weather", "arguments": {"city": messages[0]["content"][:9]}}
            calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
            messages[1:1] = [calling, {"role": "tool", "content": first[:40]}]
        elif i % 4 == 3:
            messages += [{"role": "user", "content": "再说一遍"}, {"role": "assistant", "content": first[::-1]}]
        chats.append((messages, tools))
    return chats


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers(name, open_models):
    ours, theirs = load_tokenizer(open_models / name), AutoTokenizer.from_pretrained(open_models / name)
    assert not ours.problem
    answers = trained = 0
    for messages, tools in real_chats():
        documents = ours.template.documents(messages, tools)  # also where the template leaves tools out
        assert documents[-1][0] == theirs.apply_chat_template(messages, tools=tools, return_dict=False)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        prompt = theirs.apply_chat_template(messages[:last], tools=tools, return_dict=False, add_generation_prompt=True)
        assert documents[-1][0][: len(prompt)] == prompt == ours.template.prompt(messages[:last], tools)
        answers += sum(message["role"] == "assistant" for message in messages)
        trained += sum(mask.count(1) and str(mask).count("0, 1") + mask[0] for _, mask in documents)
    assert trained == answers
