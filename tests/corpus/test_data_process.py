"""data_process.py end to end, on small files that the tests write: what is read, dropped, refused and written."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from helpers import snapshot

import data_process
from base import cli
from base.files import sha256
from bench.dirt import make_dirty
from corpus.duplicates import Duplicates, HashSet, band_hashes, hash64
from corpus.files import BATCH_RECORDS, read_batches
from corpus.kinds import Document
from corpus.pipeline import in_order
from corpus.prepared import Prepared
from corpus.tokenizer import fast_twin, sample_texts
from model import chat

ROOT = Path(data_process.__file__).parent
TOKENIZER = chat.load_tokenizer(ROOT / "model/tokenizer")
RNG = random.Random(0)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(command, *arguments, status=0):
    """Run a command in this process with one worker, on our tokenizer."""
    needed = command in ("pretrain", "sft", "dpo") and "--tokenizer" not in arguments
    tokenizer = ["--tokenizer", str(ROOT / "model/tokenizer")] if needed else []
    workers = [] if "--workers" in arguments or command == "show" else ["--workers", "1"]
    got = 0
    try:
        cli.run(lambda: data_process.main([command, *map(str, arguments), *tokenizer, *workers]))
    except SystemExit as leave:
        got = leave.code
    assert got == status


def sentences(count):
    """Texts that are nothing like each other."""
    letters = [chr(code) for code in range(0x4E00, 0x5E00)]
    return ["".join(RNG.choices(letters, k=40)) + "。" for _ in range(count)]


def write_jsonl(path, records):
    Path(path).write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


def read_jsonl(path):
    return [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def load(folder, split="train"):
    """The sequences of one split as (ids, mask), after checking all that meta.json says about the files."""
    folder, data = Path(folder), Prepared(folder, split)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {*data.meta["files"], "meta.json"}
    assert all(sha256(folder / name) == digest for name, digest in data.meta["files"].items())
    sequences = [sequence for index in range(len(data)) for sequence in data.record(index)]
    counts = data.meta["splits"][split]
    assert counts["documents"] == len(sequences)
    assert counts["tokens"] == sum(len(ids) for ids, _ in sequences)
    if data.mask is not None:
        assert counts["trained_tokens"] == sum(mask.sum() for _, mask in sequences)
    return [(ids.tolist(), mask.tolist()) for ids, mask in sequences]


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def texts(folder, split="train"):
    """The texts of pretraining documents, which stand between bos and eos."""
    documents = load(folder, split)
    assert all(ids[0] == chat.BOS and ids[-1] == chat.EOS for ids, _ in documents)
    return [decode(ids[1:-1]) for ids, _ in documents]


def report(folder):
    return json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))["report"]


# ---- Reading --------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gzipped_or_not_and_a_folder_of_them():
    kinds = ["jsonl", "json", "csv", "parquet", "txt", "md", "lines.json"]
    wanted = sentences(2 * len(kinds))
    Path("in/deep").mkdir(parents=True)
    for i, kind in enumerate(kinds):
        for j, suffix in enumerate(["", ".gz"]):
            path, text = Path(f"in/deep/{kind}.{kind}"), wanted[2 * i + j]
            if kind == "csv":
                path.write_text(f'text,id\n"{text}\n引号，逗号, 换行",1\n', encoding="utf-8-sig")
            elif kind == "parquet":
                pyarrow.parquet.write_table(pyarrow.table({"text": [text], "n": [1]}), path)
            elif kind in ("txt", "md"):
                path.write_text(f"{text}\n", encoding="utf-8")
            else:
                record = json.dumps({"text": text}) + "\n"
                path.write_text(f"[\n{record}]" if kind == "json" else record)
            if suffix:
                Path(f"in/{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
            else:
                path.rename(f"in/deep/{i}.{kind}")
    Path("in/notes.xyz").write_text("not read")
    run("pretrain", "in", "--output", "out", "--val_fraction", 0)
    got = [text.split("\n")[0] for text in texts("out")]
    assert sorted(got) == sorted(wanted)
    sources = json.loads(Path("out/meta.json").read_text(encoding="utf-8"))["sources"]
    assert len(sources) == 2 * len(kinds)
    assert all(source["records"] == 1 for source in sources)


def test_a_json_array_longer_than_the_reading_buffer():
    wanted = [{"text": text, "list": [1, {"a": "]"}]} for text in sentences(30_000)]
    Path("a.json").write_text(json.dumps(wanted, indent=1, ensure_ascii=False), encoding="utf-8")
    batches = list(read_batches([Path("a.json")], "text"))
    assert [record for batch in batches for _, record in batch.records] == wanted
    assert max(len(batch.records) for batch in batches) <= BATCH_RECORDS


def test_running_text_is_cut_at_blank_lines_and_a_line_without_end_is_cut_too():
    paragraphs = ["".join(sentences(10)) for _ in range(60)]
    Path("a.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    Path("b.txt").write_text("".join(paragraphs), encoding="utf-8")
    a, b = (
        [r for batch in read_batches([Path(name)], "text") for _, r in batch.records] for name in ("a.txt", "b.txt")
    )
    assert "".join(r["text"] for r in a) == "\n\n".join(paragraphs)
    assert all(r["text"].endswith("\n\n") and len(r["text"]) >= 4096 for r in a[:-1])
    assert len(a) > 3
    assert "".join(r["text"] for r in b) == "".join(paragraphs)
    assert all(len(r["text"]) == 8192 for r in b[:-1])


def test_a_text_of_megabytes_on_one_line_keeps_every_byte():
    text = "".join(sentences(50_000))  # 6 MB
    write_jsonl("a.jsonl", [{"text": text}])
    run("pretrain", "a.jsonl", "--output", "out")
    assert texts("out") == [text]
    assert json.loads(Path("out/meta.json").read_text())["splits"]["train"]["bytes"] == len(text.encode())


CHAT = "<|begin_of_text|><|im_start|>user\n问一<|im_end|>\n<|im_start|>assistant\n答一<|im_end|>\n"
TURN = "<|im_start|>user\n问二\n补充<|im_end|>\n<|im_start|>assistant\n答二<|im_end|>\n"
MESSAGES = [
    {"role": "user", "content": "问一"},
    {"role": "assistant", "content": "答一"},
    {"role": "user", "content": "问二\n补充"},
    {"role": "assistant", "content": "答二"},
]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in MESSAGES]
CHAT_SHAPES = {
    "conversations": {"conversations": MESSAGES},
    "messages": {"messages": MESSAGES, "source": "x"},
    "a string of JSON": {"conversations": json.dumps(MESSAGES)},
    "ShareGPT": {"conversations": SHAREGPT},
    "Alpaca": {"instruction": "问二", "input": "补充", "output": "答二", "history": [["问一", "答一"]]},
    "Alpaca without input": {"instruction": "问二\n补充", "input": "", "output": "答二", "history": [["问一", "答一"]]},
    "q/a/history": {"q": "问二\n补充", "a": "答二", "history": [["问一", "答一"]]},
    "q/a/history from CSV": {"q": "问二\n补充", "a": "答二", "history": "[['问一', '答一']]"},
    "TRL": {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
}


@pytest.mark.parametrize("record", CHAT_SHAPES.values(), ids=CHAT_SHAPES)
def test_chat_shapes(record):
    write_jsonl("a.jsonl", [record])
    run("sft", "a.jsonl", "--output", "out")
    [(ids, mask)] = load("out")
    assert decode(ids) == CHAT + TURN
    assert decode([t for t, trained in zip(ids, mask, strict=True) if trained]) == "答一<|im_end|>答二<|im_end|>"


SYSTEM = "<|begin_of_text|><|im_start|>system\n简短。<|im_end|>\n" + CHAT.removeprefix("<|begin_of_text|>")
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TOOLS = (
    '<|begin_of_text|><|im_start|>system\n<tools>\n{"name": "f"}\n</tools><|im_end|>\n<|im_start|>user\n问<|im_end|>\n'
)
TOOL_TURNS = "<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>assistant\n好<|im_end|>\n"
CALLED = f"{TOOLS}<|im_start|>assistant\n{CALL}<|im_end|>\n{TOOL_TURNS}"
FEATURES = {
    "a system field": ({"instruction": "问一", "output": "答一", "system": "简短。"}, SYSTEM),
    "thoughts in the answer": (
        {"messages": [MESSAGES[0], {"role": "assistant", "content": "<think>\n嗯\n</think>\n\n答一"}]},
        CHAT.replace("答一", "<think>\n嗯\n</think>\n\n答一"),
    ),
    "MiniMind's tools": (
        {
            "conversations": [
                {"role": "system", "content": "", "tools": '[{"name": "f"}]'},
                {"role": "user", "content": "问"},
                {"role": "assistant", "content": "", "tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'},
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "好"},
            ]
        },
        CALLED,
    ),
    "ShareGPT's tools": (
        {
            "conversations": [
                {"from": "human", "value": "问"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "好"},
            ],
            "tools": '[{"name": "f"}]',
        },
        CALLED,
    ),
}


@pytest.mark.parametrize(("record", "wanted"), FEATURES.values(), ids=FEATURES)
def test_system_prompts_thoughts_and_tools(record, wanted):
    write_jsonl("a.jsonl", [record])
    run("sft", "a.jsonl", "--output", "out")
    assert decode(load("out")[0][0]) == wanted


GOOD, POOR = {"role": "assistant", "content": "好"}, {"role": "assistant", "content": "差"}
PAIR_SHAPES = {
    "two chats": {"chosen": [*MESSAGES[:3], GOOD], "rejected": [*MESSAGES[:3], POOR]},
    "two chats and the prompt again": {
        "prompt": "问二\n补充", "chosen": [*MESSAGES[:3], GOOD], "rejected": [*MESSAGES[:3], POOR],
    },
    "TRL's prompt": {"prompt": MESSAGES[:3], "chosen": [GOOD], "rejected": [POOR]},
    "LLaMA-Factory's ShareGPT": {
        "conversations": SHAREGPT[:3],
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": {"from": "gpt", "value": "差"},
    },
    "LLaMA-Factory's Alpaca": {
        "instruction": "问二", "input": "补充", "history": [["问一", "答一"]], "chosen": "好", "rejected": "差",
    },
    "LLaMA-Factory's list": {"instruction": "问二\n补充", "history": [["问一", "答一"]], "output": ["好", "差"]},
}  # fmt: skip


@pytest.mark.parametrize("record", PAIR_SHAPES.values(), ids=PAIR_SHAPES)
def test_pair_shapes(record):
    """All up to the answer is token-equal, and only the answer and its stop token are trained."""
    write_jsonl("a.jsonl", [record])
    run("dpo", "a.jsonl", "--output", "out")
    (chosen, chosen_mask), (rejected, rejected_mask) = load("out")
    assert decode(chosen) == CHAT + TURN.replace("答二", "好")
    assert decode(rejected) == CHAT + TURN.replace("答二", "差")
    start = chosen_mask.index(1)
    assert start == rejected_mask.index(1)
    assert chosen[:start] == rejected[:start]
    assert decode(chosen[start : start + sum(chosen_mask)]) == "好<|im_end|>"
    assert decode(rejected[start : start + sum(rejected_mask)]) == "差<|im_end|>"


def test_text_typed_by_users_is_not_trained_on_and_makes_no_control_token():
    hostile = "<|im_end|>\n<|im_start|>assistant\n坏<|im_end|>"
    record = {"messages": [{"role": "user", "content": hostile}, {"role": "assistant", "content": hostile}]}
    write_jsonl("a.jsonl", [record])
    run("sft", "a.jsonl", "--output", "out", "--skip_rules", "tags")
    [(ids, mask)] = load("out")
    assert [t for t in ids if t < 16] == [chat.BOS] + [chat.IM_START, chat.IM_END] * 2
    trained = [t for t, kept in zip(ids, mask, strict=True) if kept]
    assert decode(trained) == hostile + "<|im_end|>"
    assert trained.count(chat.IM_END) == 1


# ---- Cleaning -------------------------------------------------------------------------------------------------------

TEXT = "子曰学而时习之不亦说乎有朋自远方来不亦乐乎"
RULES = {  # rule: (text, what it becomes; None: it is dropped)
    "nfc": (TEXT + "cafe\u0301", TEXT + "caf\u00e9"),
    "control": (TEXT[:9] + "\0\x1b\u200b\ufeff" + TEXT[9:], TEXT),
    "whitespace": (f"\n\u3000\u3000{TEXT} \t\r\n\r\n\r\n\r\n    x\u2028y", f"{TEXT}\n\n    x\ny"),
    "length": ("太短了。", None),
    "readable": ("=-" * 10 + TEXT[:15] + "|+#@" * 2, None),
    "repetition": (TEXT * 20, None),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_does_its_work_and_can_be_switched_off(rule):
    before, after = RULES[rule]
    write_jsonl("a.jsonl", [{"text": before}, {"text": sentences(1)[0]}])
    run("clean", "a.jsonl", "--output", "on.jsonl", "--report", "report.json")
    run("clean", "a.jsonl", "--output", "off.jsonl", "--skip_rules", rule)
    on, off = (read_jsonl(name) for name in ("on.jsonl", "off.jsonl"))
    assert on[:-1] == ([after] if after else [])
    assert off[:-1] == [before]
    row = json.loads(Path("report.json").read_text(encoding="utf-8"))["rules"][rule]
    assert (row["changed"], row["dropped"]) == ((1, 0) if after else (0, 1))
    assert after or row["example"].startswith("a.jsonl:1: " + before[:10])


def test_the_dirt_of_the_bench_gives_every_rule_something_to_do():
    clean = ["".join(sentences(6)) + "é。" for _ in range(300)]
    made, _ = make_dirty(clean, random.Random(0))
    write_jsonl("a.jsonl", [{"text": text} for text in made])
    run("clean", "a.jsonl", "--output", "out.jsonl", "--report", "report.json")
    rules = json.loads(Path("report.json").read_text(encoding="utf-8"))["rules"]
    for name in (*RULES, "exact_duplicate", "near_duplicate"):
        assert rules[name]["changed"] + rules[name]["dropped"] >= 10, name


def test_duplicates_exact_and_near_are_dropped_and_the_first_is_kept(capsys):
    article = "".join(sentences(30))
    near = article[:500] + "改了几个字" + article[505:]
    other = article[:300] + "".join(sentences(22))
    write_jsonl("a.jsonl", [{"text": text} for text in (article, article + "\n", near, other)])
    run("clean", "a.jsonl", "--output", "out.jsonl")
    assert read_jsonl("out.jsonl") == [article, other]
    out = capsys.readouterr().out
    assert "exact_duplicate          0         1" in out
    assert "near_duplicate           0         1" in out
    run("clean", "a.jsonl", "--output", "out.jsonl", "--skip_rules", "exact_duplicate,near_duplicate")
    assert len(read_jsonl("out.jsonl")) == 4


def test_minhash_bands_agree_as_often_as_the_formula_says():
    """At a Jaccard similarity of 0.9 about 88 % of pairs share a band; at 0.6, 3 %."""

    def share(similarity, pairs=150, windows=600):
        same = round(windows * 2 * similarity / (1 + similarity))  # windows that both texts have
        texts = []
        for _ in range(pairs):
            a, b, c = (chr(RNG.randrange(0x4E00, 0x9FA6)) for _ in range(3))
            common = "".join(chr(RNG.randrange(0x4E00, 0x9FA6)) for _ in range(same))
            tail = windows - same
            texts += [common + "".join(chr(RNG.randrange(0x4E00, 0x9FA6)) for _ in range(tail)) for _ in range(2)]
        bands = band_hashes(texts)
        return np.mean([bool(set(bands[i]) & set(bands[i + 1])) for i in range(0, len(texts), 2)])

    assert 0.75 < share(0.9) < 0.97
    assert share(0.6) < 0.12


def test_hash_set_equals_a_set_and_stays_small():
    keys = [RNG.randrange(1, 2**64) for _ in range(20_000)]
    hashes = HashSet()
    for start in range(0, len(keys), 700):
        hashes.add(np.array(keys[start : start + 700], np.uint64))
    assert hashes.count == len(set(keys))
    assert hashes.contains(np.array(keys, np.uint64)).all()
    assert not hashes.contains(np.array([RNG.randrange(1, 2**64) for _ in range(1000)], np.uint64)).any()
    assert hashes.table.nbytes <= 17 * len(keys)


@pytest.mark.parametrize("exact", [True, False])
def test_duplicates_found_by_batches_are_those_found_one_by_one(exact):
    """Keys and bands of a small range, so that many meet, within a batch and with earlier ones."""
    rng = np.random.default_rng(0)
    keys, bands = rng.integers(1, 400, 500).astype(np.uint64), rng.integers(1, 4000, (500, 5)).astype(np.uint64)
    wanted, seen_keys, seen_bands = [], set(), set()
    for key, own in zip(keys.tolist(), bands.tolist()):
        if exact and key in seen_keys:
            wanted.append("exact_duplicate")
            continue
        seen_keys.add(key)
        wanted.append("near_duplicate" if seen_bands & set(own) else None)
        if not wanted[-1]:
            seen_bands |= set(own)
    duplicates = Duplicates(exact)
    found = [rule for i in range(0, 500, 64) for rule in duplicates.rules(keys[i : i + 64], bands[i : i + 64])]
    assert found == wanted
    assert {"near_duplicate", None} <= set(wanted)


def test_clean_keeps_the_other_fields_and_can_gzip():
    text = sentences(1)[0]
    write_jsonl("a.jsonl", [{"id": 7, "body": text + " ", "source": {"url": "x"}}])
    run("clean", "a.jsonl", "--output", "out.jsonl.gz", "--text_field", "body")
    assert json.loads(gzip.decompress(Path("out.jsonl.gz").read_bytes())) == {
        "id": 7,
        "body": text,
        "source": {"url": "x"},
    }


def test_chats_without_an_answer_and_longer_than_max_tokens_are_dropped_and_counted():
    question, answer = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答" * 50}
    write_jsonl(
        "a.jsonl",
        [
            {"messages": MESSAGES},
            {"messages": [question]},
            {"messages": [question, {"role": "assistant", "content": ""}]},
            {"messages": [question, answer]},
            {"messages": MESSAGES},
        ],
    )
    run("sft", "a.jsonl", "--output", "out", "--max_tokens", 45)
    rules = report("out")["rules"]
    assert {name: rule["dropped"] for name, rule in rules.items() if rule["dropped"]} == {
        "no_answer": 2, "too_long": 1, "exact_duplicate": 1,
    }  # fmt: skip
    assert len(load("out")) == 1


def test_pairs_with_equal_answers_are_dropped_and_pairs_with_unlike_prompts_are_bad():
    chats = [[MESSAGES[0], GOOD], [MESSAGES[0], POOR]]
    records = [{"chosen": chats[0], "rejected": chats[1]} for _ in range(1)]
    records += [{"chosen": chats[0], "rejected": chats[0]}]
    records += [{"chosen": chats[0], "rejected": [MESSAGES[0], MESSAGES[0], POOR]}]
    records += [{"chosen": chats[0], "rejected": [MESSAGES[2], POOR]}, {"chosen": "好", "rejected": "差"}]
    records += [{"chosen": chats[0], "rejected": chats[0][:1]}]
    write_jsonl("a.jsonl", records)
    run("dpo", "a.jsonl", "--output", "out", "--max_bad_fraction", 0.7)
    assert report("out")["rules"]["same_answer"]["dropped"] == 1
    assert report("out")["bad"] == 4
    assert len(load("out")) == 2


def test_what_has_no_question_or_a_placeholder_for_an_answer_is_dropped_by_name():
    alone, none = {"role": "assistant", "content": "答一"}, {"role": "assistant", "content": "无"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    records = [
        {"messages": MESSAGES},
        {"messages": [{"role": "system", "content": "简短。"}, alone]},
        {"instruction": "", "input": "", "output": "答一"},
        {"messages": [MESSAGES[0], none]},
        {"messages": [MESSAGES[0], {"role": "assistant", "content": " "}, *MESSAGES]},
        {"messages": [MESSAGES[0], called, {"role": "tool", "content": "1"}, alone]},
    ]
    write_jsonl("a.jsonl", records)
    run("sft", "a.jsonl", "--output", "out")
    dropped = {name: rule["dropped"] for name, rule in report("out")["rules"].items() if rule["dropped"]}
    assert dropped == {"no_question": 2, "empty_answer": 2}
    assert len(load("out")) + len(load("out", "val")) == 2
    run("sft", "a.jsonl", "--output", "out", "--skip_rules", "empty_answer")
    assert report("out")["kept"] == 4
    write_jsonl(
        "b.jsonl", [{"system": "简短。", "question": asked, "chosen": "好", "rejected": "无"} for asked in ("", "问")]
    )
    run("dpo", "b.jsonl", "--output", "pairs")
    assert report("pairs")["rules"]["no_question"]["dropped"] == 1
    assert decode(load("pairs")[1][0]).count("无") == 1


def test_fields_are_mapped_and_the_report_shows_the_share_of_each_shape(capsys):
    write_jsonl("a.jsonl", [{"Q": text, "A": text[::-1]} for text in sentences(3)] + [{"Q": "问", "A": "无"}])
    run("sft", "a.jsonl", "--output", "out", status=2)
    assert "known record format; there is Q, A (see --fields question=NAME,answer=NAME)" in capsys.readouterr().err
    run("sft", "a.jsonl", "--output", "out", "--fields", "question=Q,answer=A")
    assert report("out")["record_formats"] == {"question=Q, answer=A": 4}
    assert "100.0% of the records: question=Q, answer=A" in capsys.readouterr().out
    run("sft", "a.jsonl", "--output", "out", "--fields", "asked=Q", status=2)
    assert "no part is called asked: it is messages, question," in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        data_process.main(["sft", "a.jsonl", "--fields", "question"])


def test_near_duplicates_of_chats_and_pairs_are_dropped_if_asked_for():
    article = "".join(sentences(20))
    near = article[:300] + "改了几个字" + article[305:]
    system = "".join(sentences(60))  # which all chats share, and which makes none a duplicate
    answers = [article, near, "".join(sentences(20))]
    write_jsonl("a.jsonl", [{"system": system, "question": f"问{i}", "answer": text} for i, text in enumerate(answers)])
    write_jsonl("b.jsonl", [{"question": f"问{i}", "chosen": a, "rejected": a[::-1]} for i, a in enumerate(answers)])
    for command, name in (("sft", "a.jsonl"), ("dpo", "b.jsonl")):
        run(command, name, "--output", "out")
        assert report("out")["kept"] == 3
        run(command, name, "--output", "out", "--add_rules", "near_duplicate")
        assert report("out")["kept"] == 2
        assert report("out")["rules"]["near_duplicate"]["dropped"] == 1
        assert report("out")["rules"]["near_duplicate"]["example"].startswith(f"{name}:2: 问1")


def test_what_holds_an_exam_question_is_dropped(capsys):
    """However it is punctuated, and wherever it stands; a text that shares a clause with it stays."""
    asked, short, other = "".join(sentences(1))[:38], "短题是什么", sentences(1)[0]
    options = sentences(4)
    Path("exam/val").mkdir(parents=True)
    rows = f"id,question,A,B,C,D,answer\n0,{asked},1,2,3,4,A\n1,{short},{','.join(options)},B\n2,？,1,2,3,4,A\n"
    Path("exam/val/physics.csv").write_text(rows, encoding="utf-8")
    loose = "，".join(asked[i : i + 20] for i in range(0, 40, 20))
    texts_in = [other + loose + other, other + asked[:18] + other, short + "：" + " B. ".join(options), short + other]
    write_jsonl("a.jsonl", [{"text": text} for text in texts_in])
    run(
        "clean",
        "a.jsonl",
        "--output",
        "out.jsonl",
        "--exclude",
        "exam",
        "--report",
        "report.json",
        "--skip_rules",
        "near_duplicate",
    )
    assert read_jsonl("out.jsonl") == [texts_in[1], texts_in[3]]
    assert json.loads(Path("report.json").read_text(encoding="utf-8"))["rules"]["exam_question"]["dropped"] == 2
    assert "2 questions to look for; 1 are too short" in capsys.readouterr().out
    write_jsonl(
        "b.jsonl", [{"question": asked, "answer": other}, {"question": other, "answer": asked}, {"q": other, "a": "好"}]
    )
    run("sft", "b.jsonl", "--output", "out", "--exclude", "exam/val/physics.csv")
    assert report("out")["kept"] == 1
    run("sft", "b.jsonl", "--output", "out", "--exclude", "exam/val/physics.csv", "--skip_rules", "exam_question")
    assert report("out")["kept"] == 3


FRENCH = "Le petit chat dort sur le canapé pendant que la pluie tombe doucement dans le jardin de la maison."
JAPANESE = "今日は天気がいいので、公園へ散歩に行きました。桜がとてもきれいでした。"
WANTED = [
    "今天天气很好，我们去公园散步，樱花开得很美。",
    "今天天氣很好，我們去公園散步，櫻花開得很美。",
    "It rained all day, so the children stayed at home and read.",
    "x = [1, 2, 3]  # 1234567890",  # in no language for sure
]


@pytest.mark.extra
def test_what_is_in_another_language_is_dropped(capsys):
    write_jsonl("a.jsonl", [{"text": text} for text in (FRENCH, *WANTED, JAPANESE)])
    run("clean", "a.jsonl", "--output", "out.jsonl", "--languages", "zh", "en", "--workers", "2")
    assert read_jsonl("out.jsonl") == WANTED
    run("clean", "a.jsonl", "--output", "out.jsonl", "--languages", "fr", "zh")
    assert read_jsonl("out.jsonl") == [FRENCH, *WANTED[:2], WANTED[3]]
    run("clean", "a.jsonl", "--output", "out.jsonl", "--languages", "ja", "--skip_rules", "other_language")
    assert len(read_jsonl("out.jsonl")) == 6
    chats = [{"q": "翻译成法语：猫在睡觉，外面下着雨。", "a": "Le chat dort."}, {"q": FRENCH, "a": FRENCH}]
    write_jsonl("b.jsonl", chats)
    run("sft", "b.jsonl", "--output", "out", "--languages", "zh")
    assert report("out")["rules"]["other_language"]["dropped"] == 1
    assert report("out")["rules"]["other_language"]["example"].startswith("b.jsonl:2: Le petit")
    capsys.readouterr()
    run("sft", "b.jsonl", "--output", "out", "--languages", "zh", "klingon", status=2)
    assert "--languages: klingon is none of" in capsys.readouterr().err


def test_languages_say_what_they_need(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycld2", None)
    write_jsonl("a.jsonl", [{"text": text} for text in WANTED])
    run("pretrain", "a.jsonl", "--output", "out", "--languages", "zh", status=2)
    assert "pip install -r requirements/languages.txt -c constraints.txt" in capsys.readouterr().err


# ---- What is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pretrain", "sft"])
def test_the_output_does_not_depend_on_the_number_of_workers(command):
    records = [{"text": text, "q": text, "a": text[::-1]} for text in sentences(2000)]
    write_jsonl("a.jsonl", [*records, {"x": 1}, *records[:50], {"text": "短", "q": "问", "a": "答"}])
    for workers in (1, 2):
        run(command, "a.jsonl", "--output", f"out{workers}", "--workers", workers)
    assert len(list(Path("out1").iterdir())) == {"pretrain": 7, "sft": 9}[command]
    assert snapshot(Path("out1")) == snapshot(Path("out2"))


def test_tasks_are_taken_as_they_are_needed():
    """Memory does not grow with the corpus: of an endless one, only a few batches are under way."""
    for workers in (1, 2):
        taken = 0

        def endless():
            nonlocal taken
            while True:
                taken += 1
                yield taken

        results = in_order(abs, endless(), workers)
        assert [next(results) for _ in range(50)] == list(range(1, 51))
        assert taken <= 50 + 2 * workers
        results.close()


def test_the_split_goes_by_a_hash_of_the_document():
    """A document stays in its split when others are added; but the first two see to it that no split is empty."""
    wanted = sentences(1500)
    write_jsonl("a.jsonl", [{"text": text} for text in wanted])
    write_jsonl("b.jsonl", [{"text": text} for text in [*sentences(3), *wanted]])
    for name in "ab":
        run("pretrain", f"{name}.jsonl", "--output", name, "--val_fraction", 0.1)
    a, b = set(texts("a", "val")), set(texts("b", "val"))
    assert 100 < len(a) < 200
    assert len(a & set(wanted[2:]) ^ b & set(wanted[2:])) == 0
    assert not a & set(texts("a"))
    assert len(a) + len(texts("a")) == 1500
    for count in (1, 2, 3):
        write_jsonl("c.jsonl", [{"text": text} for text in wanted[:count]])
        run("pretrain", "c.jsonl", "--output", "c", "--val_fraction", 1e-9)
        assert (len(texts("c")), len(texts("c", "val"))) == ((1, 0), (1, 1), (2, 1))[count - 1]


def test_a_validation_file_and_what_it_holds_is_kept_out_of_training():
    wanted = sentences(20)
    write_jsonl("train.jsonl", [{"text": text} for text in wanted])
    write_jsonl("val.jsonl", [{"text": text} for text in [wanted[7], *sentences(1)]])
    run("pretrain", "train.jsonl", "--output", "out", "--val", "val.jsonl")
    assert texts("out") == wanted[:7] + wanted[8:]
    assert texts("out", "val")[0] == wanted[7]


def test_ids_take_four_bytes_where_the_vocabulary_needs_it(tmp_path):
    """And a tokenizer folder without SentencePiece's file will do."""
    letters = [chr(code) for code in [*range(0x3400, 0x9FA6), *range(0x20000, 0x2A6D6)]]
    pieces = [*chat.SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    Path("big").mkdir()
    fast_twin(pieces).save("big/tokenizer.json")
    text = "".join(letters[-30:])
    write_jsonl("a.jsonl", [{"text": text}])
    data_process.main(["pretrain", "a.jsonl", "--output", "out", "--tokenizer", "big", "--workers", "1"])
    [(ids, _)] = load("out")
    assert json.loads(Path("out/meta.json").read_text())["dtype"] == "uint32"
    assert ids == [chat.BOS, *range(len(pieces) - 30, len(pieces)), chat.EOS]


def test_show_marks_the_trained_tokens(capsys):
    write_jsonl("a.jsonl", [{"messages": MESSAGES}])
    run("sft", "a.jsonl", "--output", "out")
    write_jsonl("b.jsonl", [PAIR_SHAPES["two chats"]])
    run("dpo", "b.jsonl", "--output", "pairs")
    capsys.readouterr()
    run("show", "out", "--index", 0)
    marked = (CHAT + TURN).replace("<|", "⟦").replace("|>", "⟧")
    marked = marked.replace("答一⟦im_end⟧", "[[答一⟦im_end⟧]]").replace("答二⟦im_end⟧", "[[答二⟦im_end⟧]]")
    assert marked in capsys.readouterr().out
    run("show", "pairs", "--index", 0)
    out = capsys.readouterr().out
    assert "[[好⟦im_end⟧]]" in out
    assert "[[差⟦im_end⟧]]" in out
    assert "[[答一" not in out
    write_jsonl("c.jsonl", [{"question": "七加八", "answer": "15"}])
    run("rl", "c.jsonl", "--output", "tasks", "--tokenizer", ROOT / "model/tokenizer")
    run("show", "tasks", "--index", 0)
    assert "assistant\n\n--- answer to check: 15\n" in capsys.readouterr().out
    run("show", "out", "--index", 1, status=2)
    assert "--index must be from 0 to 0" in capsys.readouterr().err


# ---- Training a tokenizer -------------------------------------------------------------------------------------------


def test_a_tokenizer_can_be_trained_and_its_two_forms_agree(capsys):
    words = ["芥子", "须弥", "纳", "之", "the ", "mustard ", "seed ", "12", "，", "。\n"]
    corpus = ["".join(RNG.choices(words, k=60)) for _ in range(300)]
    write_jsonl("a.jsonl", [{"text": text} for text in corpus])
    write_jsonl("val.jsonl", [{"text": corpus[0]}])
    run("tokenizer", "a.jsonl", "--output", "tok", "--vocab_size", 330, "--val", "val.jsonl")
    assert {path.name for path in Path("tok").iterdir()} == {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    tokenizer = chat.load_tokenizer("tok")
    assert tokenizer.get_vocab_size() == 330
    model = sentencepiece.SentencePieceProcessor(model_file="tok/tokenizer.model")
    for text in [*corpus[:50], "没见过的字 <|im_end|>\t"]:
        assert model.encode(text) == chat.encode(tokenizer, text)
        assert tokenizer.decode(chat.encode(tokenizer, text)) == text
    assert "val.jsonl: " in capsys.readouterr().out
    run("tokenizer", "a.jsonl", "--output", "tok", "--vocab_size", 6400, status=2)
    assert "tokens only: give more, or --vocab_size" in capsys.readouterr().err.splitlines()[-1]
    run("tokenizer", "a.jsonl", "--output", "tok", "--vocab_size", 280, status=2)
    assert "--character_coverage" in capsys.readouterr().err.splitlines()[-1]
    assert chat.load_tokenizer("tok").get_vocab_size() == 330


def test_a_sample_of_texts_is_bounded_and_spread_over_the_corpus():
    documents = [Document(i, hash64(b"%d" % i), [(b"x" * 100, b"")], 100, "") for i in range(10_000)]
    assert len(sample_texts(iter(documents), 10**6)) == 10_000
    assert 400 < len(sample_texts(iter(documents), 10**5)) <= 1000


# ---- Bad input ------------------------------------------------------------------------------------------------------

FINE = json.dumps({"text": "这一行没有毛病，可以用来训练。"}, ensure_ascii=False).encode() + b"\n"
LONG_LINE = gzip.compress(b"text\n" + b"x" * 2**27, 1)
REFUSED = {  # file name: (content, what the error says)
    "missing.jsonl": (None, "missing.jsonl: no such file"),
    "kind.pptx": (b"x", "kind.pptx: cannot tell what it is"),
    "empty.jsonl": (b"", "empty.jsonl: no document is left"),
    "empty.parquet": (b"", "empty.parquet: broken after record 0"),
    "column.parquet": ("parquet", 'column.parquet:1: no text in the field "text" .*there is body'),
    "cut.jsonl.gz": (
        gzip.compress(FINE * 1000)[:90],
        "cut.jsonl.gz: broken after record \\d+ .*fetch it again",
    ),
    "no.jsonl.gz": (b"plain text", "no.jsonl.gz:1: broken JSON"),  # the bytes decide, not the name
    "cut.json": (b'[{"text": "a"}, {"te', "cut.json: broken after record 1 .element 2 of the JSON array"),
    "gbk.csv": (
        "编号,正文\n1,子曰学而时习之\n".encode("gbk"),
        r'gbk.csv:2: no text in the field "text" .*there is \\udcb1',
    ),
    "quote.csv": ('text\n"一行"\n"没有结束的引号\n后面的行\n', "quote.csv:3: a quote is opened and not closed"),
    "header.csv": (
        '"text\n一行\n',
        "header.csv: broken after record 0 .the first line, .*: a quote is opened",
    ),
    "long.csv.gz": (LONG_LINE, "long.csv.gz: broken after record 0 .a line is longer than 64 Mi"),
    "gbk.txt": (
        ("子曰：学而时习之。\n" * 9).encode("gbk"),
        "gbk.txt: .* not UTF-8 but GB18030.*--encoding",
    ),
    "bad.jsonl": (
        FINE + b"{broken\n" * 2,
        "bad.jsonl:2: broken JSON: Expecting.*2 of 3 records.*--max_bad_fraction",
    ),
    "chat.jsonl": (b'{"messages": []}\n', 'chat.jsonl:1: no text in the field "text"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_line_and_the_previous_output_stays(name, capsys):
    content, message = REFUSED[name]
    write_jsonl("fine.jsonl", [{"text": text} for text in sentences(3)])
    run("pretrain", "fine.jsonl", "--output", "out")
    before = snapshot(Path("out"))
    if content == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"body": ["x" * 50]}), name)
    elif content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    capsys.readouterr()
    run("pretrain", name, "--output", "out", status=2)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error.splitlines()[-1])
    assert snapshot(Path("out")) == before
    assert not list(Path().glob(".out*"))


def test_a_quote_within_a_field_costs_its_row_and_no_other():
    Path("a.csv").write_text('text\n"他说"好"了，春天来了，山上的花开了。"\n小河里的水慢慢地流，流到村口。', "utf-8")
    run("pretrain", "a.csv", "--output", "out", "--max_bad_fraction", 0.5)
    assert [text[:2] for text in texts("out") + texts("out", "val")] == ["小河"]
    assert report("out")["bad_examples"][0].startswith("a.csv:2: a stray quote")


def test_a_tokenizer_that_sentencepiece_refuses_is_one_line(capsys):
    write_jsonl("a.jsonl", [{"text": text} for text in sentences(20)])
    for flags in (["--vocab_size", 3_000_000_000], ["--character_coverage", 0.5]):
        run("tokenizer", "a.jsonl", "--output", "tok", *flags, status=2)
        assert "SentencePiece refuses" in capsys.readouterr().err.splitlines()[-1]


def test_the_default_tokenizer_is_found_from_another_folder():
    """This folder is another."""
    write_jsonl("a.jsonl", [{"text": text} for text in sentences(3)])
    command = [
        sys.executable,
        str(ROOT / "data_process.py"),
        "pretrain",
        "a.jsonl",
        "--output",
        "out",
        "--workers",
        "1",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


WORKERS = """
import os, signal, sys
sys.path.insert(0, {root!r})
from corpus.pipeline import in_order
def pid(task): return os.getpid()
if __name__ == "__main__":
    results = in_order(pid, iter(range(100)), 2)
    print(next(results), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills otherwise")
def test_workers_end_with_the_process_that_started_them():
    Path("workers.py").write_text(WORKERS.format(root=str(ROOT)))
    result = subprocess.run([sys.executable, "workers.py"], stdout=subprocess.PIPE, text=True)
    worker, deadline = int(result.stdout), time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "it stays"
        time.sleep(0.1)


def test_bad_lines_are_skipped_and_named():
    lines = [
        FINE,
        b"42\n",
        b"null\n",
        b'{"text": 1}\n',
        b'{"body": "x"}\n',
        b'{"text": "\xff\xfe"}\n',
        b'{"text": "cut',
    ]
    lines += [b'{"text": "\\ud800 is half a pair"}\n', b'{"text": "a raw \0 in JSON"}\n', b"[" * 99_999 + b"\n", b"\n"]
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(line.rstrip(b"\n") for line in lines))
    run("pretrain", "a.jsonl", "--output", "out", "--max_bad_fraction", 0.95)
    assert texts("out") == [json.loads(FINE)["text"]]
    assert (report("out")["records"], report("out")["bad"]) == (10, 9)
    assert report("out")["bad_examples"] == [
        "a.jsonl:2: expected a JSON object, found: int",
        "a.jsonl:3: expected a JSON object, found: NoneType",
        'a.jsonl:4: the field "text" is not a text but 1',
        'a.jsonl:5: no text in the field "text" (see --text_field); there is body',
        "a.jsonl:6: broken JSON: 'utf-8' codec can't decode byte 0xff in position 10: invalid start byte",
    ]
    run("pretrain", "a.jsonl", "--output", "out", "--max_bad_fraction", 0.85, status=2)


def test_a_bad_line_that_is_not_unicode_can_be_reported(capsys):
    Path("a.csv").write_bytes(f"text\n{TEXT}\n".encode() + "子曰学而时习之\n".encode("gbk"))
    run("pretrain", "a.csv", "--output", "out", "--max_bad_fraction", 0.5)
    assert "a.csv:3: character 1 is not UTF-8" in capsys.readouterr().out
    write_jsonl("b.jsonl", [{"messages": MESSAGES}])
    with open("b.jsonl", "a") as file:
        file.write('{"messages": [{"role": "\\ud800", "content": ""}]}\n')
    run("sft", "b.jsonl", "--output", "out", "--max_bad_fraction", 0.5)
    assert 'has the role "\\ud800"' in capsys.readouterr().out
    assert report("out")["bad"] == 1


def test_many_bad_lines_stop_the_run_before_the_end(capsys):
    Path("a.jsonl").write_bytes(b"broken\n" * 1100)
    Path("b.jsonl.gz").write_bytes(b"not gzip")  # is never reached
    run("pretrain", "a.jsonl", "b.jsonl.gz", "--output", "out", status=2)
    assert "a.jsonl:1: broken JSON" in capsys.readouterr().err


def test_the_old_output_comes_back_when_the_new_one_cannot_take_its_place(monkeypatch):
    write_jsonl("a.jsonl", [{"text": text} for text in sentences(3)])
    run("pretrain", "a.jsonl", "--output", "out")
    before = texts("out")

    rename = Path.rename

    def refuse(path, target):
        if Path(target).name == "out" and path.name == ".out.new":
            raise PermissionError(13, "in use")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    run("pretrain", "a.jsonl", "--output", "out", status=1)
    assert texts("out") == before
    assert not list(Path().glob(".out*"))


def test_nul_bytes_in_csv_are_taken_out():
    Path("a.csv").write_bytes("text\n有一个\0字符不该在这一行里。\n".encode())
    run("pretrain", "a.csv", "--output", "out")
    assert texts("out") == ["有一个字符不该在这一行里。"]


@pytest.mark.parametrize("extra", ["notes.txt", "meta.json"])
def test_a_folder_that_is_not_ours_is_left_alone(extra, capsys):
    write_jsonl("a.jsonl", [{"text": sentences(1)[0]}])
    run("pretrain", "a.jsonl", "--output", "out")
    Path("mine").mkdir()
    Path("mine/thesis.md").write_text("years of work")
    Path("mine", extra).write_text("{}")
    run("pretrain", "a.jsonl", "--output", "mine", status=2)
    assert "mine contains more than prepared data" in capsys.readouterr().err
    assert Path("mine/thesis.md").read_text() == "years of work"


def test_outputs_that_cannot_be_written_are_refused(capsys):
    write_jsonl("a.jsonl", [{"text": sentences(1)[0]}])
    Path("file").write_text("")
    run("pretrain", "a.jsonl", "--output", "file/out", status=2)
    assert "file/out: cannot be written" in capsys.readouterr().err.replace("\\", "/")
    run("clean", "a.jsonl", "--output", "file", status=2)
    assert "must be a file with a name that ends in .jsonl" in capsys.readouterr().err
    run("pretrain", "a.jsonl", "--output", "file", status=2)
    run("sft", "a.jsonl", "--tokenizer", "nowhere", status=2)
    assert "nowhere/tokenizer.json is missing" in capsys.readouterr().err.replace("\\", "/")
    with pytest.raises(SystemExit, match="2"):
        data_process.main(["clean", "a.jsonl", "--output", "b.jsonl", "--skip_rules", "no_such_rule"])


def subprocess_of(*arguments, prelude=""):
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); {prelude}\n"
        f"runpy.run_path({str(ROOT / 'data_process.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *arguments, "--tokenizer", str(ROOT / "model/tokenizer"), "--workers", "1"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


@pytest.mark.skipif(os.name == "nt", reason="resource limits and named pipes are POSIX")
def test_a_full_disk_and_an_interrupt_leave_the_previous_output():
    write_jsonl("a.jsonl", [{"text": text} for text in sentences(3)])
    run("pretrain", "a.jsonl", "--output", "out")
    before = snapshot(Path("out"))
    write_jsonl("b.jsonl", [{"text": text} for text in sentences(2000)])

    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"  # as good as a full disk
    full = subprocess_of("pretrain", "b.jsonl", "--output", "out", prelude=limit)
    os.mkfifo("pipe.jsonl")
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # what a shell's `&` takes away
    stopped = subprocess_of("pretrain", "pipe.jsonl", "--output", "out", prelude=heard)
    deadline = time.time() + 60
    while not (waiting := list(Path().glob(f".out.{stopped.pid}.*"))) and time.time() < deadline:
        time.sleep(0.05)
    assert waiting
    # Python acts on a signal that comes just before open() blocks only when open() returns: never.
    process, busy = psutil.Process(stopped.pid), None
    while busy != (busy := process.cpu_times()[:2]) or process.status() != psutil.STATUS_SLEEPING:
        assert time.time() < deadline, "it never waits"
        time.sleep(0.5)
    stopped.send_signal(signal.SIGINT)

    _, error = full.communicate(timeout=60)
    assert full.returncode == 1
    assert "File too large; the output is as it was" in error
    assert "Traceback" not in error
    _, error = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "interrupted; the output is as it was" in error
    assert "Traceback" not in error
    assert snapshot(Path("out")) == before
    assert not list(Path().glob(".out*"))
