"""Chats of open models: the ids are transformers', the mask is what the model should say, and no text becomes a control
token. Templates are programs from strangers."""

import random
import time

import numpy as np
import pytest
from helpers import TOKENIZER
from open_models import CONTROLS, TAGS, TEMPLATES, make_chats, write_tokenizer
from transformers import AutoTokenizer

from base.cli import UserError
from model import template
from model.chat import encode, load_tokenizer, token_bytes

QUESTION = [{"role": "user", "content": "1 + 1?"}]
ANSWER = {"role": "assistant", "content": "2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_tokenizer(tmp_path_factory.mktemp(name), name) for name in TEMPLATES}


def with_template(folder, source):
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(source, "utf-8")
    return load_tokenizer(folder)


def chats_for(name):
    """With what the template can show."""
    tools = name in ("thinking", "dated")
    return [(messages, used) for messages, used in make_chats(60, system=name != "instruct", tools=tools)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_prompts_are_those_of_transformers_and_the_mask_is_the_answers(name, folders):
    ours, theirs = load_tokenizer(folders[name]), AutoTokenizer.from_pretrained(folders[name])

    def ids_of(messages, tools, **options):
        return theirs.apply_chat_template(messages, tools=tools, return_dict=False, **options)

    several = 0
    for messages, tools in chats_for(name):
        documents = ours.documents(messages, tools)
        assert documents[-1][0] == ids_of(messages, tools)
        several += len(documents) > 1
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = []  # the answers, from all documents
        for ids, mask in documents:
            edges = np.flatnonzero(np.diff([0, *mask, 0]))
            trained += [(ids[:start], ids[start:end]) for start, end in edges.reshape(-1, 2).tolist()]
        assert len(trained) == len(answers), "each is trained once"
        for i, (before, answer) in zip(answers, trained, strict=True):
            prompt = ids_of(messages[:i], tools, add_generation_prompt=True)
            assert before == prompt == ours.prompt(messages[:i], tools)
            whole = ids_of(messages[: i + 1], tools)
            end = len(whole) - whole[::-1].index(ours.end_of_turn)
            assert answer == whole[len(prompt) : end]
            assert answer.count(ours.end_of_turn) == 1
    assert bool(several) == (name == "thinking"), "only this one changes earlier turns"


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_text_becomes_a_control_token(name, folders):
    tokenizer = load_tokenizer(folders[name])
    texts = [
        *CONTROLS,
        *TAGS,
        " ".join(CONTROLS),
        "".join(TAGS),
        "<|im_",
        "end|>",
        "x</think>y",
        "\ue000<|im_end|>\\ue001",
    ]
    rng = random.Random(0)
    texts += [
        "".join(rng.choices([*CONTROLS, *TAGS, "<", "|", "im_end", "\n", "春", "\ue000"], k=8)) for _ in range(50)
    ]

    def controls(text):
        call = {"name": text, "arguments": {text: text}}
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text, "reasoning_content": text}]
        tool = {"type": "function", "function": {"name": text, "description": text, "parameters": {text: [text]}}}
        if tokenizer.template.calling:
            chat += [{"role": "user", "content": text}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        documents = tokenizer.documents(chat, [tool] if tokenizer.template.shows_tools else None)
        return [[token for token in ids if token in tokenizer.control_ids] for ids, _ in documents]

    for text in texts:
        assert not tokenizer.control_ids.intersection(encode(tokenizer, text))
        assert tokenizer.decode(encode(tokenizer, text)) == text
        assert controls(text) == controls("x"), text
    ids, mask = tokenizer.documents(
        [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "[INST]"}]
    )[0]
    text = tokenizer.decode([token for token, trained in zip(ids, mask, strict=True) if trained])
    assert text.strip() == "[INST]"


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_are_the_bytes_of_a_text(name, folders):
    tokenizer = load_tokenizer(folders[name])
    for text in ["春天 spring\n\n  12", "e\u0301 👩‍👩‍👧 \u00a0\x00", *CONTROLS]:
        ids = encode(tokenizer, text)
        assert b"".join(tokenizer.pieces[token] for token in ids) == text.encode()
        assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_what_a_tokenizer_knows(folders):
    plain, thinking, dated = (load_tokenizer(folders[name]) for name in ("plain", "thinking", "dated"))
    token = plain.token_to_id
    assert (plain.bos, plain.eos, plain.end_of_turn) == ([], token("<|endoftext|>"), token("<|im_end|>"))
    assert (dated.bos, dated.end_of_turn) == ([token("<|endoftext|>")], token("<|eot|>"))
    assert thinking.tags["reasoning"] == (token("<think>"), token("</think>"))
    assert thinking.text(encode(thinking, "a")) == [*encode(thinking, "a"), token("<|endoftext|>")]
    thinking.check_tools()
    for other in (plain, dated):
        with pytest.raises(UserError, match="omit --tools"):
            other.check_tools()
    with pytest.raises(UserError, match="does not list tools"):
        plain.prompt(QUESTION, [{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(UserError, match="does not write calls"):
        plain.documents([*QUESTION, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}])
    with pytest.raises(UserError, match="one call at a time"):
        dated.documents([*QUESTION, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}] * 2}])


def test_a_template_knows_when_the_model_should_not_think(folders):
    tokenizer = load_tokenizer(folders["thinking"])
    end = tokenizer.prompt(QUESTION, think=False)[len(tokenizer.prompt(QUESTION)) :]
    assert tokenizer.decode(end, skip_special_tokens=False) == "<think>\n\n</think>\n\n"


def test_responses_of_tools_are_what_the_template_writes_after_the_call(folders):
    tokenizer = load_tokenizer(folders["thinking"])
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    answers = [{"role": "tool", "content": text} for text in ("晴", "<|im_end|>")]
    whole = tokenizer.prompt([*QUESTION, call, *answers], tools)
    ids = tokenizer.tool_responses(["晴", "<|im_end|>"])
    assert whole[-len(ids) :] == ids
    assert whole[-len(ids) - 1] == tokenizer.end_of_turn


def test_a_date_is_today_or_the_one_that_is_given(folders):
    tokenizer = load_tokenizer(folders["dated"], date="2026-02-03")
    assert tokenizer.template.uses_date
    assert not load_tokenizer(folders["plain"]).template.uses_date
    assert "Today: 03 Feb 2026" in tokenizer.decode(tokenizer.prompt(QUESTION))
    today = time.strftime("%d %b %Y")
    assert f"Today: {today}" in load_tokenizer(folders["dated"]).decode(
        load_tokenizer(folders["dated"]).prompt(QUESTION)
    )


ROLES = (
    "{% for message in messages %}{{ '<|' + ('start' if message.role == 'user' else 'end') + '|>' + message.content }}"
)
ROLES += "{% endfor %}{% if add_generation_prompt %}{{ '<|end|>' }}{% endif %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{% set ns = namespace(text='a') %}{% for a in range(99) %}{% set ns.text = ns.text ~ ns.text %}{% endfor %}"
BAD = {
    "the next role's token": (ROLES, "ends an answer with no token of its own"),
    "no template": ("{% for", "unexpected 'end of template'"),
    "it raises": ("{{ raise_exception('not today') }}", "not today"),
    "an endless loop": (LOOPS, "takes more than 0.5 seconds"),
    "text without end": (GROWS, "too much memory|MemoryError|takes more than"),
    "a long text": (
        "{% for a in range(99999) %}{{ 'abcdefghij' * 99 }}{% endfor %}",
        "more than 16,777,216 characters",
    ),
    "endless arithmetic": ("{% set n = 10 ** 9 %}{{ 7 ** n }}", "takes more than 0.5 seconds|too much memory"),
    "a recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "attributes of Python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "globals of a function": ("{{ raise_exception.__globals__['os'] }}", "unsafe"),
    "another prompt": (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "changes the prompt",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_template_is_refused_in_one_line_that_says_why(name, tmp_path, monkeypatch):
    source, reason = BAD[name]
    monkeypatch.setattr(template, "MAX_SECONDS", 0.5 if "takes" in reason else 5)
    start = time.monotonic()
    tokenizer = with_template(tmp_path, source)
    assert time.monotonic() - start < 30
    with pytest.raises(UserError, match=reason) as error:
        tokenizer.check_chats(tmp_path)
    assert "--chat_template FILE" in str(error.value)
    assert "\n" not in str(error.value)
    assert encode(tokenizer, "a"), "texts can still be encoded"


def test_a_template_that_misbehaves_later_ends_that_chat_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(template, "MAX_SECONDS", 0.5)
    trap = "{% if 'trap' in messages[0].content %}" + LOOPS + "{% endif %}"
    tokenizer = with_template(tmp_path, trap + TEMPLATES["plain"])
    before = tokenizer.prompt(QUESTION)
    with pytest.raises(UserError, match="takes more than"):
        tokenizer.prompt([{"role": "user", "content": "a trap"}])
    assert tokenizer.prompt(QUESTION) == before


def test_without_a_template_jiezis_takes_its_place_where_its_tokens_exist(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "chatml", None))
    assert not tokenizer.brings_template
    own = load_tokenizer(TOKENIZER)
    text, expected = ([*QUESTION, ANSWER],) * 2
    decoded = [
        each.decode(each.documents(chat)[0][0], skip_special_tokens=False)
        for each, chat in ((tokenizer, text), (own, expected))
    ]
    assert decoded[1] == "<|begin_of_text|>" + decoded[0]
    with pytest.raises(UserError, match="neither a chat template nor the tokens") as error:
        load_tokenizer(write_tokenizer(tmp_path / "none", None, ["<|endoftext|>"])).check_chats("x")
    assert "--chat_template FILE" in str(error.value)


def test_a_tokenizer_that_adds_spaces_is_refused_for_chats(tmp_path):
    folder = write_tokenizer(tmp_path)
    path = folder / "tokenizer.json"
    path.write_text(
        path.read_text("utf-8")
        .replace('"add_prefix_space":false', '"add_prefix_space":true')
        .replace('"add_prefix_space": false', '"add_prefix_space": true'),
        "utf-8",
    )
    with pytest.raises(UserError, match="adds a space"):
        load_tokenizer(folder).check_chats(folder)
