"""data_process.py look: what files are taken for, and the figures, which meta.json holds of what was prepared."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

import data_process
from base import cli
from corpus.figures import Figures, measure
from corpus.kinds import Document
from corpus.look import main_script
from corpus.prepared import Prepared

ROOT = Path(data_process.__file__).parent
RNG = random.Random(1)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words, status=0):
    got = 0
    try:
        cli.run(lambda: data_process.main([*map(str, words), "--tokenizer", str(ROOT / "model/tokenizer")]))
    except SystemExit as leave:
        got = leave.code
    assert got == status


def han(length: int) -> str:
    return "".join(chr(RNG.randrange(0x4E00, 0x5E00)) for _ in range(length))


def write(name: str, records: list[dict]):
    Path(name).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


KINDS = {  # records, what they are, the next command
    "texts": ([{"text": han(30)}, {"text": han(40)}], "pretrain"),
    "chats": ([{"question": "问一", "answer": "答一"}, {"messages": [], "question": "问二", "answer": "答二"}], "sft"),
    "pairs": ([{"system": "短。", "question": "问", "chosen": "好", "rejected": "差"}], "dpo"),
    "questions with an answer to check": ([{"question": "问", "answer": "2\n#### 2"}], "rl"),
    "questions with options": ([{"id": 0, "Question": "问", "A": "1", "B": "2", "Answer": "A"}], "--choice"),
}


@pytest.mark.parametrize("what", KINDS)
def test_a_file_is_taken_for_what_it_is(what, capsys):
    records, command = KINDS[what]
    write("a.jsonl", records)
    run("look", "a.jsonl")
    out = capsys.readouterr().out
    assert f"a.jsonl: the first {len(records)} records, with the fields {', '.join(records[0])}\n" in out
    assert f"record format: {what}\n" in out
    assert f"{command} a.jsonl" in out.splitlines()[-1]


def test_samples_are_shown_as_they_are_trained(capsys):
    history = [[f"问{han(20)}", f"答{han(20)}"]]
    write("a.jsonl", [{"question": "问二", "answer": "答二", "history": history}])
    run("look", "a.jsonl")
    turns = [("user", history[0][0]), ("assistant", history[0][1]), ("user", "问二"), ("assistant", "答二")]
    words = [
        content.join(("[[", "⟦im_end⟧]]")) if role == "assistant" else f"{content}⟦im_end⟧" for role, content in turns
    ]
    chat = "".join(f"⟦im_start⟧{role}\n{said}\n" for (role, _), said in zip(turns, words))
    assert f"--- record 1\n⟦begin_of_text⟧{chat}picture" in capsys.readouterr().out
    write("b.jsonl", [{"question": "问", "answer": "2\n#### 2"}])
    run("look", "b.jsonl")
    assert "问⟦im_end⟧\n⟦im_start⟧assistant\n--- answer to check: 2\n" in capsys.readouterr().out
    text = han(3000)
    write("c.jsonl", [{"text": text}])
    run("look", "c.jsonl")
    beginning, end = capsys.readouterr().out.partition("--- record 1\n")[2].partition("\npicture")[0].split(" […] ")
    assert beginning.startswith(f"⟦begin_of_text⟧{text[:100]}")
    assert end.endswith(f"{text[-100:]}⟦end_of_text⟧")


def test_files_without_a_record_that_can_be_read_are_one_line(capsys):
    Path("empty.jsonl").write_text("")
    run("look", "empty.jsonl", status=2)
    assert capsys.readouterr().err == "error: empty.jsonl: no record in it\n"
    Path("broken.jsonl").write_text('{"text": "x\n')
    run("look", "broken.jsonl", status=2)
    assert capsys.readouterr().err.startswith("error: broken.jsonl:1: broken JSON")


def test_of_what_is_dropped_only_the_beginning_is_shown(capsys):
    text = han(3000)
    write("a.jsonl", [{"text": text}, {"text": text}])
    run("look", "a.jsonl")
    line = next(line for line in capsys.readouterr().out.splitlines() if "exact_duplicate" in line)
    assert text[:100] in line
    assert len(line) < 250


def test_what_would_be_dropped_and_the_figures_and_samples(capsys):
    texts = [han(20), han(100), han(400), "The cat sat on the mat and looked at the rain. " * 2]
    write("a.jsonl", [{"text": text} for text in [*texts, texts[1], "短", texts[2][:398] + "改动"]] + [{"body": "x"}])
    run("look", "a.jsonl")
    out = capsys.readouterr().out
    for line in (
        "8 records: 4 would be kept, 1 are bad",
        "a.jsonl:8: no text in the field",
        "1 dropped by length, such as 'a.jsonl:6: 短'",
        "1 dropped by exact_duplicate",
        "100.0% of the records have: text",
        "         64 to 127                 2 ####",
        "1 dropped by near_duplicate",
        "(reference: Chinese, 1.22)",
        f"--- record 1\n⟦begin_of_text⟧{texts[0]}⟦end_of_text⟧\n",
    ):
        assert line in out
    assert Path("out/look.png").stat().st_size > 5000


def test_near_duplicates_of_chats_are_counted(capsys):
    answer = han(300)
    write("a.jsonl", [{"question": f"问{i}", "answer": answer} for i in range(3)])
    run("look", "a.jsonl")
    out = capsys.readouterr().out
    assert "3 would be kept" in out
    assert "2 of those kept are near duplicates: --add_rules near_duplicate" in out


def test_only_the_beginning_of_a_large_file_is_read_and_its_size_told(capsys):
    write("a.jsonl", [{"text": han(300)} for _ in range(10_000)])
    run("look", "a.jsonl", "--records", 500)
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith("a.jsonl: the first 500 of about ")
    assert 7000 < int(told.split()[6].replace(",", "")) < 13_000


def test_unknown_fields_are_named_and_can_be_mapped(capsys):
    write("a.jsonl", [{"ask": "问", "reply": "答"}])
    run("look", "a.jsonl", status=2)
    captured = capsys.readouterr()
    assert "with the fields ask, reply" in captured.out
    assert "--fields, such as question=NAME,answer=NAME" in captured.err
    run("look", "a.jsonl", "--fields", "prose=ask", status=2)
    assert "no part is called prose: it is messages, question" in capsys.readouterr().err
    run("look", "a.jsonl", "--fields", "question=ask,answer=reply")
    out = capsys.readouterr().out
    assert "record format: chats" in out
    assert "sft a.jsonl --fields question=ask,answer=reply" in out
    write("b.jsonl", [{"body": han(50)}])
    run("look", "b.jsonl", "--fields", "text=body")
    assert "pretrain b.jsonl --fields text=body" in capsys.readouterr().out
    run("pretrain", "b.jsonl", "--fields", "text=body", "--workers", 1)
    assert len(Prepared("dataset/pretrain", "train")) == 1


def test_meta_holds_the_figures_of_what_was_kept():
    texts = [han(length) for length in (20, 50, 50, 200, 3000)]
    write("a.jsonl", [{"text": text} for text in [*texts, *texts[:3], "短"]])
    run("pretrain", "a.jsonl", "--output", "out", "--workers", 1)
    figures = json.loads(Path("out/meta.json").read_text("utf-8"))["report"]["figures"]
    assert figures["documents"] == 5
    assert figures["characters"] == {
        "sum": 3320, "mean": 664.0, "from": {"16": 1, "32": 2, "128": 1, "2048": 1},
    }  # fmt: skip
    lengths = [length for split in ("train", "val") for length in np.diff(Prepared("out", split).offsets).tolist()]
    assert figures["tokens"]["sum"] == sum(lengths)
    assert figures["scripts"] == {"Han": 1.0}


def test_scripts_are_told_apart():
    text = "汉字abcЖかな한글 .1éα"
    figures = Figures()
    figures.add(measure([Document(0, 0, [], 0, text)], 0))
    scripts = figures.as_dict()["scripts"]
    counts = {"Han": 2, "Latin": 4, "Cyrillic": 1, "Kana": 2, "Hangul": 2, "Greek": 1, "other": 3}
    assert scripts == {name: pytest.approx(count / 15, abs=1e-4) for name, count in counts.items()}
    assert [main_script(text) for text in ("春天 and", "a spring day 春", "123")] == ["Han", "Latin", None]
