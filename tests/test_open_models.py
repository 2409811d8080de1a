"""A model that was not made here, through every stage: with its own tokenizer and chat template."""

import json
import random
from datetime import datetime

import numpy as np
import pytest
from helpers import SENTENCES, TOKENIZER
from open_models import PLAIN, TEMPLATES, make_chats, write_model, write_records, write_tokenizer
from transformers import AutoTokenizer

from corpus.prepared import Prepared
from model.chat import TOKENIZER_FILES, decode_chat, encode_chat, load_tokenizer
from model.checkpoint import load_model

SHORT = ["--max_steps", 2, "--max_seq_len", 512, "--batch_size", 2, "--eval_rows", 2, "--warmup_steps", 1]
PREPARE = ["--workers", 1, "--val_fraction", 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("open")


@pytest.fixture(scope="module")
def model(folder):
    return write_model(folder / "model")


@pytest.fixture
def prepare(run_here, folder, model):
    """prepare(command) makes data for the model, once, and returns their folder."""

    def run(command, tokenizer=model, name=None, records=None):
        output = folder / (name or command)
        if not output.exists():
            path = write_records(folder / f"{output.name}.jsonl", (records or RECORDS[command])())
            result = run_here("data_process.py", command, path, "--tokenizer", tokenizer, "--output", output, *PREPARE)
            assert result.status == 0, result.err
            (folder / f"{output.name}.out").write_text(result.out, "utf-8")
        return output

    return run


def texts():
    rng = random.Random(1)
    return [{"text": "".join(rng.choices(SENTENCES, k=12)) + f" {i}"} for i in range(40)]


def brief():
    rng = random.Random(2)
    chats = [[{"role": "user", "content": f"{i % 30} 加 1 等于几？"}] for i in range(200)]
    for chat in chats:
        chat.append({"role": "assistant", "content": "一二三"[: rng.randint(1, 3)]})
    return [{"messages": chat} for chat in chats]


def pairs():
    asked = [{"role": "user", "content": f"{i} 加 1 等于几？"} for i in range(30)]
    answers = [({"role": "assistant", "content": text} for text in (f"{i + 1}", "不知道。")) for i in range(30)]
    return [
        dict(zip(("chosen", "rejected"), ([question, one] for one in pair))) for question, pair in zip(asked, answers)
    ]


RECORDS = {
    "pretrain": texts,
    "sft": lambda: [{"messages": messages, "tools": tools} for messages, tools in make_chats(40)],
    "dpo": pairs,
    "rl": lambda: [{"prompt": f"{i} 加 1 等于几？", "answer": f"{i + 1}"} for i in range(30)],
}


def train(run_here, script, out_dir, *flags):
    result = run_here(script, "--out_dir", out_dir, *flags, *SHORT)
    assert result.status == 0, result.err
    assert "done" in result.out
    return out_dir


def test_prepared_chats_are_those_of_transformers(prepare, model):
    data, theirs = Prepared(prepare("sft"), "train"), AutoTokenizer.from_pretrained(model)
    end = load_tokenizer(model).end_of_turn
    expected = set()
    for messages, tools in make_chats(40):
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                ids = theirs.apply_chat_template(messages[: i + 1], tools=tools, return_dict=False)
                expected.add(tuple(ids[: len(ids) - ids[::-1].index(end)]))
    assert data.meta["chat_template_sha256"] == load_tokenizer(model).template.sha256
    assert "date" not in data.meta
    for i in range(len(data)):
        ((ids, mask),) = data.record(i)
        last = int(np.flatnonzero(mask)[-1]) + 1
        assert ids[last - 1] == end
        assert tuple(ids[:last].tolist()) in expected


def test_a_date_is_that_of_the_preparation(run_here, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", "dated")
    path = write_records(tmp_path / "chats.jsonl", [{"messages": chat} for chat, _ in make_chats(20, tools=False)])
    result = run_here("data_process.py", "sft", path, "--tokenizer", tokenizer, "--output", tmp_path / "sft", *PREPARE)
    meta = json.loads((tmp_path / "sft" / "meta.json").read_text("utf-8"))
    assert f"the chat template writes the date: all of these data get {meta['date']}" in result.out
    data = Prepared(tmp_path / "sft", "train")
    fixed = load_tokenizer(data.tokenizer_dir)
    today = datetime.fromisoformat(meta["date"]).strftime("%d %b %Y")
    for i in range(len(data)):
        assert f"Today: {today}" in fixed.decode(data.record(i)[0][0].tolist())


STAGES = {
    "pretrain": ("1-pretrain.py", "pretrain", []),
    "sft": ("2-sft.py", "sft", []),
    "lora": ("3-lora.py", "sft", []),
    "dpo": ("4-dpo.py", "dpo", []),
    "grpo": ("5-grpo.py", "rl", ["--questions", 2, "--generations", 2, "--max_new_tokens", 4]),
    "distill": ("6-distill.py", "sft", ["--mode", "logits"]),
    "text": ("6-distill.py", "rl", ["--mode", "text", "--max_new_tokens", 24, "--generations", 4]),
    "on_policy": ("6-distill.py", "rl", ["--mode", "on_policy", "--questions", 2, "--max_new_tokens", 4]),
}


@pytest.fixture
def stopping(prepare, run_here, folder):
    """A teacher whose answers end: it was trained, for seconds, to say one to three characters."""
    out = folder / "out" / "teacher"
    if not out.exists():
        data = prepare("sft", name="brief", records=brief)
        flags = "--optimizer muon --learning_rate 1e-2 --max_steps 60 --epochs 99".split()
        flags += "--batch_size 8 --max_seq_len 128".split()
        start = ["--init_from", write_model(folder / "random", hidden_size=64), "--data", data, "--out_dir", out]
        result = run_here("2-sft.py", *start, *flags, "--warmup_steps", 1)
        assert result.status == 0, result.err
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_it_and_keeps_its_tokenizer(stage, model, stopping, prepare, run_here, folder):
    script, kind, flags = STAGES[stage]
    flags = [*flags, *(["--teacher", stopping] if script == "6-distill.py" else [])]
    out = train(run_here, script, folder / "out" / stage, "--init_from", model, "--data", prepare(kind), *flags)
    for name in TOKENIZER_FILES:
        assert (out / name).exists() == (model / name).exists(), name
        if (out / name).exists():
            assert (out / name).read_bytes() == (model / name).read_bytes(), name
    tokenizer, trained = load_tokenizer(out), load_model(out)
    assert trained.is_chat
    assert trained.stop_token_ids == load_model(model).stop_token_ids == [tokenizer.end_of_turn, tokenizer.eos]
    result = run_here("eval.py", "--model", out, "--prompt", "你好", "--max_new_tokens", 5, "--seed", 0)
    assert result.status == 0, result.err


@pytest.mark.parametrize("mode", ["text", "logits", "on_policy"])
def test_it_teaches_a_new_model_with_its_tokenizer(mode, stopping, prepare, run_here, folder):
    data = prepare("sft" if mode == "logits" else "rl")
    flags = ["--teacher", stopping, "--mode", mode, "--preset", "tiny", "--optimizer", "adamw", "--learning_rate", 1e-3]
    flags += [] if mode == "logits" else ["--max_new_tokens", 24, "--generations", 4]
    out = train(run_here, "6-distill.py", folder / "out" / f"new-{mode}", "--data", data, *flags)
    assert load_model(out).config.vocab_size == load_tokenizer(stopping).get_vocab_size()
    assert load_tokenizer(out).template.source == TEMPLATES["thinking"]


def test_it_teaches_a_model_with_jiezis_tokenizer_by_its_answers(stopping, prepare, run_here, folder, base_dir):
    data = prepare("rl", TOKENIZER, name="own-rl")
    flags = ["--teacher", stopping, "--mode", "text", "--init_from", base_dir, "--max_new_tokens", 24]
    flags += ["--generations", 4]
    train(run_here, "6-distill.py", folder / "own" / "student", "--data", data, *flags)
    (answers,) = (folder / "own" / "distill-text").glob("*")
    questions, chats = Prepared(data, "val"), Prepared(answers, "val")
    prompts = [questions.record(i)[0][0].tolist() for i in range(len(questions))]
    for i in range(len(chats)):
        ((ids, mask),) = chats.record(i)
        (prompt,) = [prompt for prompt in prompts if ids[: len(prompt)].tolist() == prompt]
        assert not mask[: len(prompt)].any()
        assert ids[np.flatnonzero(mask)[-1]] == load_tokenizer(TOKENIZER).end_of_turn


def test_a_base_model_learns_the_template_that_is_given(run_here, tmp_path):
    """And its adapter keeps it."""
    base = write_model(tmp_path / "base", None, is_chat=False)
    template = tmp_path / "mine.jinja"
    template.write_text(PLAIN, "utf-8")
    path = write_records(tmp_path / "chats.jsonl", [{"messages": chat} for chat, _ in make_chats(20, tools=False)])
    flags = ["--tokenizer", base, "--chat_template", template, "--output", tmp_path / "sft", *PREPARE]
    assert run_here("data_process.py", "sft", path, *flags).status == 0
    for script, name in (("2-sft.py", "model"), ("3-lora.py", "adapter")):
        out = train(run_here, script, tmp_path / "out" / name, "--init_from", base, "--data", tmp_path / "sft")
        assert load_tokenizer(out).template.source == PLAIN
        assert load_model(out).is_chat
        result = run_here("eval.py", "--model", out, "--prompt", "你好", "--max_new_tokens", 3)
        assert result.status == 0, result.err
    assert not load_model(base).is_chat


def test_eval_measures_it_on_texts_chats_and_questions(model, prepare, run_here, tmp_path):
    prepare("sft")
    path = write_records(tmp_path / "texts.jsonl", texts()[:3])
    figures = json.loads(run_here("eval.py", "--model", model, "--perplexity", path, "--json").out.splitlines()[-1])
    tokenizer = load_tokenizer(model)
    assert figures["tokens"] == sum(len(tokenizer.backend.encode(each["text"]).ids) + 1 for each in texts()[:3]) - 3
    assert figures["bytes"] == sum(len(each["text"].encode()) for each in texts()[:3])
    result = run_here("eval.py", "--model", model, "--data", prepare("sft"), "--max_seq_len", 512)
    assert result.status == 0, result.err
    questions = tmp_path / "questions.csv"
    questions.write_text("question,A,B,C,D,answer\n1 + 1?,1,2,3,4,B\n天?,上,下,左,右,A\n", "utf-8")
    for by in ("text", "letter"):
        assert run_here("eval.py", "--model", model, "--choice", questions, "--choice_by", by).status == 0
    batch = write_records(tmp_path / "batch.jsonl", [{"prompt": "你好"}, {"messages": make_chats(2)[1][0][:3]}])
    lines = run_here("eval.py", "--model", model, "--batch", batch, "--max_new_tokens", 3).out.splitlines()
    assert [*map(set, map(json.loads, lines))][0] >= {"prompt", "answer"}


def test_what_does_not_fit_is_refused_before_any_work(model, prepare, run_here, folder, tmp_path):
    sft, dpo = prepare("sft"), prepare("dpo")
    other = write_model(tmp_path / "other", "thinking")
    (other / "chat_template.jinja").write_text(PLAIN, "utf-8")
    (other / "sums.json").unlink()
    line = run_here("2-sft.py", "--init_from", other, "--data", sft, *SHORT).error_line(status=2)
    assert "another chat template than the one in" in line
    assert f"--tokenizer {other}" in line
    for script, data, flags in (
        ("4-dpo.py", dpo, []),
        ("6-distill.py", sft, ["--teacher", model]),
        ("6-distill.py", prepare("rl"), ["--teacher", model, "--mode", "text", "--max_new_tokens", 24]),
    ):
        flags = ["--init_from", other, "--data", data, "--out_dir", tmp_path / "out" / "x", *flags, *SHORT]
        assert "another chat template" in run_here(script, *flags).error_line(status=2)
        assert not (tmp_path / "out").exists(), "it has computed something"
    small = write_model(tmp_path / "small", "thinking")
    config = json.loads((small / "config.json").read_text("utf-8"))
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 40}), "utf-8")
    (small / "sums.json").unlink()
    for script, data in (("2-sft.py", sft), ("4-dpo.py", dpo)):
        flags = ["--init_from", small, "--data", data, "--out_dir", tmp_path / "out" / "x", *SHORT]
        assert run_here(script, *flags).status == 2
    chats = folder / "sft.jsonl"
    flags = ["--chat_template", other / "chat_template.jinja"]
    line = run_here("data_process.py", "sft", chats, *flags).error_line(status=2)
    assert "omit --chat_template" in line
    flags = ["--tokenizer", model, "--chat_template", tmp_path / "missing.jinja"]
    assert "is missing" in run_here("data_process.py", "sft", chats, *flags).error_line(status=2)
    bare = write_tokenizer(tmp_path / "bare", None, ["<|endoftext|>"])
    line = run_here("data_process.py", "sft", chats, "--tokenizer", bare).error_line(status=2)
    assert "has neither a chat template nor" in line
    assert "--chat_template FILE" in line


def test_serve_checks_the_tokenizer_before_it_listens(run_here, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "sums.json").unlink()
    path = folder / "tokenizer.json"
    whole = path.read_text("utf-8")
    path.write_text(whole[:1000], "utf-8")
    assert "cannot be read" in run_here("serve.py", folder, "--port", 0).error_line(status=2)
    path.unlink()
    assert "is missing" in run_here("serve.py", folder, "--port", 0).error_line(status=2)


def test_an_own_chat_is_read_back(run_here):
    tokenizer = load_tokenizer(TOKENIZER)
    for messages, tools in make_chats(24):
        ids, _ = encode_chat(tokenizer, messages, tools, add_generation_prompt=True)
        found, listed = decode_chat(tokenizer, ids)
        assert encode_chat(tokenizer, found, listed, add_generation_prompt=True)[0] == ids
        assert bool(listed) == bool(tools)
