"""What files are: structure, encoding, formats; and what must never be trained. Each case came from a public report."""

import bz2
import json
import lzma
import sys
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import data_process
from base import cli
from base.cli import UserError
from corpus.exports import redacted
from corpus.files import ReadOptions, find_files, read_batches, structure_of
from corpus.look import show_tokens
from corpus.prepared import Prepared
from corpus.records import parse
from model import chat

ROOT = Path(data_process.__file__).parent
TOKENIZER = chat.load_tokenizer(ROOT / "model/tokenizer")
GARDEN = "The garden was quiet, and the gate stood open."
LINES = [{"text": f"{GARDEN} It was day {i}."} for i in range(3)]
QUESTION = {"role": "user", "content": "问"}


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


def write(name: str, *records):
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    Path(name).write_text("\n".join(lines) + "\n", "utf-8")


def prepare(command: str, *records, flags=()) -> tuple[list[tuple[str, str]], dict]:
    """What becomes of the records: for each sequence its text and the part that is trained, and the report."""
    write("a.jsonl", *records)
    run(command, "a.jsonl", "--output", "out", "--workers", 1, "--max_bad_fraction", 1, "--val_fraction", 0, *flags)
    data = Prepared("out", "train")
    sequences = [sequence for i in range(len(data)) for sequence in data.record(i)]
    decode = [
        tuple(TOKENIZER.decode(part.tolist(), skip_special_tokens=False) for part in (ids, ids[mask == 1]))
        for ids, mask in sequences
    ]
    return decode, data.meta["report"]


def values(name: str) -> list:
    return [record for batch in read_batches(find_files([name]), "text") for _, record in batch.records]


def parsed(name: str) -> list:
    return [parse(value) for value in values(name)]


# ---- The structure of JSON ------------------------------------------------------------------------------------------

PRETTY = json.dumps(LINES, indent=2)
STRUCTURES = {
    "lines": "\n".join(map(json.dumps, LINES)),
    "blank lines first": "\n\n" + "\n".join(map(json.dumps, LINES)),
    "an array on one line": json.dumps(LINES),
    "a pretty array": PRETTY,
    "pretty objects end to end": "\n".join(json.dumps(record, indent=2) for record in LINES),
    "objects on one line": "".join(map(json.dumps, LINES)),
    "lines with commas": ",\n".join(map(json.dumps, LINES)),
    "wrapped": json.dumps({"data": LINES}),
    "wrapped, pretty": json.dumps({"version": "1.0", "n": 3, "data": LINES, "license": "x"}, indent=2),
    "wrapped after an object": json.dumps({"info": {"a": [1]}, "tags": ["a"], "rows": LINES}),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
@pytest.mark.parametrize("what", STRUCTURES)
def test_the_structure_of_json_is_recognized_whatever_the_name(what, suffix):
    Path(f"a{suffix}").write_text(STRUCTURES[what])
    assert parsed(f"a{suffix}") == LINES


@pytest.mark.parametrize("what", ["a pretty array", "wrapped, pretty", "wrapped", "pretty objects end to end", "lines"])
def test_the_structure_of_a_large_file_is_recognized_by_its_head(what):
    long = [{"text": record["text"] * 2000} for record in LINES]
    forms = {
        "a pretty array": json.dumps(long, indent=2),
        "wrapped, pretty": json.dumps({"n": 1, "data": long}, indent=2),
        "wrapped": json.dumps({"data": long}),
        "pretty objects end to end": "\n".join(json.dumps(record, indent=2) for record in long),
        "lines": "\n".join(map(json.dumps, long)),
    }
    Path("a.jsonl").write_text(forms[what])
    assert parsed("a.jsonl") == long


def test_chats_that_are_lists_are_chats():
    turns = [QUESTION, {"role": "assistant", "content": "答"}]
    for text in (json.dumps(turns), f"{json.dumps(turns)}\n{json.dumps(turns)}", json.dumps([turns, turns])):
        Path("a.jsonl").write_text(text)
        assert all(record == {"messages": turns} for record in parsed("a.jsonl"))
    Path("a.json").write_text(json.dumps({"messages": turns}, indent=1))
    assert parsed("a.json") == [{"messages": turns}]


def test_a_second_list_is_not_lost():
    Path("a.json").write_text(json.dumps({"train": LINES, "test": LINES}))
    with pytest.raises(UserError, match=r"more than one list of records \(test\)"):
        values("a.json")


def test_a_broken_first_line_is_one_bad_record():
    for first in ('{"text": "cut', '{"text": "x",', '{"a":', "[1, 2"):
        assert structure_of(f'{first}\n{{"text": "x"}}\n', True, ".jsonl").lines
    assert structure_of("[link](x)\ntext", True, ".md") is None


# ---- Bytes ----------------------------------------------------------------------------------------------------------

HANZI = [{"text": "子曰学而时习之不亦说乎有朋自远方来不亦乐乎"}]
PLAIN = "\n".join(json.dumps(record, ensure_ascii=False) for record in HANZI * 3) + "\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_unicode_of_every_kind_is_read(name, encoding):
    """PowerShell's > writes UTF-16."""
    content = {"a.json": json.dumps(HANZI * 3, ensure_ascii=False), "a.csv": "text\n" + HANZI[0]["text"] + "\n"}
    Path(name).write_bytes(content.get(name, PLAIN).replace("\n", "\r\n").encode(encoding))
    assert parsed(name)[0] == HANZI[0]


def test_gbk_is_named_and_read_where_it_is_named(capsys):
    Path("a.csv").write_bytes(("text\n" + HANZI[0]["text"] + "\n").encode("gbk"))
    for command in (["pretrain", "a.csv"], ["look", "a.csv"]):
        run(*command, status=2)
        assert (
            "a.csv: its text is not UTF-8 but GB18030 or BIG5 or EUC-KR, as it seems: save it as UTF-8"
            in capsys.readouterr().err
        )
    run("pretrain", "a.csv", "--encoding", "gbk", "--output", "out", "--workers", 1)
    assert Prepared("out", "train").meta["report"]["kept"] == 1


@pytest.mark.parametrize(("suffix", "pack"), [(".bz2", bz2.compress), (".xz", lzma.compress), ("", bz2.compress)])
def test_compression_goes_by_the_bytes(suffix, pack):
    Path(f"a.jsonl{suffix}").write_bytes(pack(PLAIN.encode()))
    assert parsed(f"a.jsonl{suffix}")[0] == HANZI[0]


def docx(path: str):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


WRONG = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "pdf": (b"%PDF-1.7\n", "a PDF document: rename it to end in .pdf"),
    "word": (docx, "a Word document: rename it to end in .docx"),
    "doc": (b"\xd0\xcf\x11\xe0" + bytes(100), "an old Office document"),
    "page": (b"<!DOCTYPE html><html>", "an HTML page"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
    "parquet": (b"PAR1" + bytes(100), "rename it to end in .parquet"),
    "bytes": (bytes(range(32)) * 40, "it is not text"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv", ".parquet"])
@pytest.mark.parametrize("what", WRONG)
def test_a_file_of_another_format_is_one_line_that_says_what_it_is(what, suffix):
    content, message = WRONG[what]
    name = f"a{suffix}"
    content(name) if callable(content) else Path(name).write_bytes(content)
    if suffix == ".parquet" and what in ("parquet", "bytes"):
        message = "broken after record 0"
    with pytest.raises(UserError, match=f"a{suffix}: .*{message}"):
        values(name)


def test_files_of_a_folder_that_are_not_read_are_listed(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "markitdown", None)
    Path("in").mkdir()
    Path("in/a.txt").write_text(GARDEN * 10)
    for name in ("b.docx", "c.pdf", "d.xyz", ".hidden"):
        Path("in", name).write_bytes(b"PK")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [path.name for path in find_files(["in"])] == ["a.txt"]
    told = capsys.readouterr().err
    assert "not read: 3 files (.docx .pdf .xyz), such as in/b.docx; for .docx .pdf: pip install" in told
    run("pretrain", "in/b.docx", status=2)
    assert "requirements/documents.txt" in capsys.readouterr().err


def test_a_readme_beside_data_is_not_trained():
    Path("in").mkdir()
    write("in/a.jsonl", *LINES)
    Path("in/README.md").write_text("# a data set card")
    assert [path.name for path in find_files(["in"])] == ["a.jsonl"]


# ---- CSV ------------------------------------------------------------------------------------------------------------

TABLES = {  # content, the rows that are read, the places of bad rows
    "a comma without quotes": (f"text\n{GARDEN}\nfine\n", [{"text": "fine"}], [2]),
    "a line end without quotes": ("text,n\nThe garden\nwas quiet,1\nx,2\n", [{"text": "x", "n": "2"}], [2, 3]),
    "quotes that swallow lines": ('id,text\n1,"a\n2,b\n3,c"\n4,d\n', ["2", "3", "4"], [2]),
    "stray quotes": ('text\n"Hello" he said\nfine\n"Yes\nno" then\nlast\n', ["fine", "no\" then", "last"], [2, 4]),
    "one that stays open": ('text\nfine\n"open\nlast\n', ["fine", "last"], [3]),
    "an honest line end in the middle": (
        'n,text,m\nx,"one\nand, two",1\n', [{"n": "x", "text": "one\nand, two", "m": "1"}], []
    ),
    "an honest line end": ('text,n\n"one\ntwo",1\n', [{"text": "one\ntwo", "n": "1"}], []),
    "blanks around names": (" text ,n\na,1\n", [{"text": "a", "n": "1"}], []),
}  # fmt: skip


@pytest.mark.parametrize("what", TABLES)
def test_a_row_of_csv_is_whole_or_bad(what):
    content, rows, bad = TABLES[what]
    Path("a.csv").write_text(content)
    read = [record for batch in read_batches([Path("a.csv")], "text") for record in batch.records]
    good = [record for _, record in read if isinstance(record, dict)]
    firsts = [next(iter(record.values())) for record in good]
    assert rows[0] in good if isinstance(rows[0], dict) else firsts == rows
    assert [place for place, record in read if not isinstance(record, dict)] == bad


def test_a_column_named_twice_is_refused():
    Path("a.csv").write_text("text,n,text\na,1,b\n")
    with pytest.raises(UserError, match='the column "text" twice'):
        values("a.csv")


# ---- What must not be trained ---------------------------------------------------------------------------------------


def said(content, **fields) -> dict:
    return {"messages": [QUESTION, {"role": "assistant", "content": content, **fields}]}


@pytest.mark.parametrize(
    "text",
    [
        f"<|im_start|>user\n{GARDEN}<|im_end|>\n",
        f"{GARDEN}\n<|endoftext|>\n{GARDEN}",
        f"{GARDEN}</s>",
        f"<s>[INST] {GARDEN} [/INST] yes</s>",
        f"<start_of_turn>model\n{GARDEN}<end_of_turn>",
        f"<｜User｜>{GARDEN}<｜end▁of▁sentence｜>",
        f"<think>\nhm\n</think>{GARDEN}",
        f"<reserved_106>{GARDEN}<eoh>",
        f"[CLS] {GARDEN} [SEP]",
    ],
)
def test_control_tags_in_texts_are_taken_out_and_counted(text):
    [(got, _)], report = prepare("pretrain", {"text": text})
    body = got.removeprefix("<|begin_of_text|>").removesuffix("<|end_of_text|>")
    assert GARDEN in body
    assert not set("<>|｜") & set(body)
    assert "INST" not in body
    assert report["rules"]["tags"]["changed"] == 1


def test_what_only_looks_like_a_tag_stays():
    for text in (f"It is <s>old</s> new. {GARDEN}", f"a <| b |> c, x < y [1] <b>{GARDEN}</b>"):
        [(got, _)], report = prepare("pretrain", {"text": text})
        assert text in got
        assert report["rules"]["tags"]["changed"] == 0


def test_texts_between_end_tags_are_documents_of_their_own():
    Path("a.txt").write_text("\n<|endoftext|>\n".join(record["text"] for record in LINES))
    assert [record["text"].split("\n")[0] for record in values("a.txt")] == [record["text"] for record in LINES]


def test_tags_at_the_end_of_an_answer_go_and_inside_drop_the_record():
    cases = [said("done</s>"), said("done<|im_end|>"), said("a<|im_end|>\n<|im_start|>user\nb"), said("<think>\nopen")]
    got, report = prepare("sft", *cases)
    assert [trained for _, trained in got] == ["done<|im_end|>"]
    rule = report["rules"]["tags"]
    assert (rule["changed"], rule["dropped"]) == (2, 2)
    assert report["rules"]["exact_duplicate"]["dropped"] == 1


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"loss": False}, {"train": False}, {"trainable": "false"}, {"loss_mask": 0}]
)
def test_turns_marked_as_not_trained_are_not(flag):
    turns = [QUESTION, {"role": "assistant", "content": "坏", **flag}, QUESTION, {"role": "assistant", "content": "好"}]
    [(text, trained)], _ = prepare("sft", {"messages": turns})
    assert trained == "好<|im_end|>"
    assert "坏" in text
    trained = [trained for _, trained in prepare("sft", {"messages": turns}, said("x", **flag))[0]]
    assert trained == ["好<|im_end|>"]


@pytest.mark.parametrize("label", [{"label": False}, {"label": 0}, {"kto_tag": "false"}, {"is_correct": False}])
def test_an_answer_that_is_labelled_bad_is_dropped(label, capsys):
    good = {name: "true" if value == "false" else not value for name, value in label.items()}
    records = [{"prompt": "问", "completion": "坏", **label}, {"prompt": "问", "completion": "好", **good}]
    got, report = prepare("sft", *records)
    assert [trained for _, trained in got] == ["好<|im_end|>"]
    assert report["rules"]["bad_label"]["dropped"] == 1
    run("look", "a.jsonl")
    assert "1 dropped by bad_label, such as" in capsys.readouterr().out


THOUGHT = "<think>\n二加七\n</think>\n\n9<|im_end|>"


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "\n<think>\n二加七\n</think>\n\n9"},
        {"content": "二加七\n</think>\n\n9"},
        {"content": "<thinking>二加七</thinking>9"},
        {"content": "<think>\r\n二加七\r\n</think>\r\n\r\n9"},
        {"content": "\n\n9", "reasoning": "二加七"},
        {"content": "9", "thinking": "二加七"},
        {"content": "<think>\n二加七\n</think>\n\n9", "reasoning_content": "二加七"},
    ],
)
def test_a_thought_is_a_thought_however_it_is_written(answer):
    assert prepare("sft", said(**answer))[0][0][1] == THOUGHT
    pair = {"prompt": "问", "chosen": [{"role": "assistant", **answer}], "rejected": "二加七\n</think>\n\n8"}
    (_, chosen), (_, rejected) = prepare("dpo", pair)[0]
    assert (chosen, rejected) == (THOUGHT, THOUGHT.replace("9", "8"))


def test_calls_and_tools_written_into_the_text_become_control_tokens():
    turns = [
        {"role": "system", "content": 'You may call.\n<tools>[{"name": "f"}]</tools>'},
        QUESTION,
        {"role": "assistant", "content": 'Wait.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'},
        {"role": "tool", "content": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"},
        {"role": "assistant", "content": "好"},
    ]
    [(text, trained)], _ = prepare("sft", {"conversations": turns})
    fields = [
        {"role": "system", "content": "You may call.", "tools": '[{"name": "f"}]'},
        QUESTION,
        {"role": "assistant", "content": "Wait.", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "好"},
    ]
    assert [(text, trained)] == prepare("sft", {"conversations": fields})[0]
    got, report = prepare("sft", said("<tool_call>\n{broken\n</tool_call>"), said("好"))
    assert (len(got), report["bad"]) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "written"),
    [("", "{}"), (None, "{}"), (" ", "{}"), ('{"x":1}', '{"x":1}'), ("{'x': 1}", '{"x": 1}')]
    + [("x=1", None), ("[1]", None), ('{"x": NaN}', None), (5, None)],
)
def test_arguments_of_a_call_are_json_or_bad(arguments, written):
    call = {"function": {"name": "f", "arguments": arguments}}
    got, report = prepare("sft", said("", tool_calls=[call]), said("好"))
    assert report["bad"] == (written is None)
    if written:
        assert f'{{"name": "f", "arguments": {written}}}' in got[0][1]


def test_what_changes_a_chat_is_counted_by_name(capsys):
    answer = {"role": "assistant", "content": "一\r\n二"}
    system = {"role": "system", "content": "短"}
    records = [
        {"instruction": "问", "input": "无", "output": "答"},
        {"instruction": "问", "input": "<noinput>", "output": "答二"},
        {"instruction": "问", "input": float("nan"), "output": "答三"},
        {"system": "长", "messages": [system, QUESTION, answer]},
        {"messages": [QUESTION, answer, QUESTION]},
        {"messages": [QUESTION, answer, answer, QUESTION, answer]},
        {"messages": [QUESTION, answer, {"role": "assistant", "content": "另"}]},
    ]
    got, report = prepare("sft", *records)
    rules = report["rules"]
    assert [rules[name]["changed"] for name in ("empty_input", "second_system", "open_question")] == [2, 1, 1]
    assert (rules["double_answer"]["changed"], rules["double_answer"]["dropped"]) == (2, 1)
    assert rules["line_ends"]["changed"] == 4
    assert all("无" not in text and "nan" not in text and "\r" not in text for text, _ in got)
    assert got[4][0].count("问") == 1
    assert got[5][1].count("一") == 2
    run("look", "a.jsonl")
    assert "2 changed by empty_input, such as 'a.jsonl:1: {" in capsys.readouterr().out


# ---- Record formats -------------------------------------------------------------------------------------------------

FORMATS = {
    "numbers": {"question": "问", "answer": 4},
    "zero": {"question": "问", "answer": 0},
    "Chinese names": {"问题": "问", "回答": "答"},
    "Chinese names, 2": {"提问": "问", "答案": "答"},
    "Alpaca in Chinese": {"指令": "问", "输入": "", "输出": "答"},
    "parts": {
        "messages": [{"role": "User", "content": [{"type": "text", "text": "问"}]}, {"role": "bot", "content": "答"}]
    },
    "developer and model": {
        "messages": [{"role": "developer", "content": "短"}, QUESTION, {"role": "model", "content": "答"}]
    },
}  # fmt: skip


@pytest.mark.parametrize("what", FORMATS)
def test_a_record_format_is_known(what):
    [(text, trained)], report = prepare("sft", FORMATS[what])
    assert report["bad"] == 0
    assert "user\n问<|im_end|>" in text
    assert trained.removesuffix("<|im_end|>") in ("答", "4", "0")


def test_a_picture_in_a_message_is_bad_with_its_reason():
    parts = [{"type": "image_url", "image_url": {}}]
    _, report = prepare("sft", {"messages": [{"role": "user", "content": parts}]}, said("好"))
    assert report["bad_examples"] == ["a.jsonl:1: the content of a message has a part that is not a text but image_url"]


def test_rejected_responses_beside_messages_are_pairs():
    record = {**said("好"), "rejected_response": "差"}
    (_, chosen), (_, rejected) = prepare("dpo", record)[0]
    assert (chosen, rejected) == ("好<|im_end|>", "差<|im_end|>")
    (_, chosen), _ = prepare("dpo", {"query": "问", "response": "好", "rejected_response": "差"})[0]
    assert chosen == "好<|im_end|>"


@pytest.mark.parametrize("blank", ["", None, [], [{"role": "assistant", "content": ""}]])
def test_a_blank_half_of_a_pair_is_dropped_by_a_rule(blank):
    fine = {"prompt": "问", "chosen": "好", "rejected": "差"}
    for half in ("chosen", "rejected"):
        _, report = prepare("dpo", fine, {**fine, half: blank})
        assert (report["bad"], report["rules"]["no_answer"]["dropped"]) == (0, 1)


def test_missing_values_of_parquet_are_missing():
    table = pyarrow.table({"instruction": ["问", "问"], "input": [float("nan")] * 2, "output": ["答", "答二"]})
    pyarrow.parquet.write_table(table, "a.parquet")
    run("sft", "a.parquet", "--output", "out", "--workers", 1)
    assert Prepared("out", "train").meta["report"]["bad"] == 0


SCRIPTS = {
    "Tibetan": "བོད་སྐད་ནི་བོད་མིའི་སྐད་ཡིག་ཡིན།",
    "Arabic with vowels": "بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ ٱلرَّحِيمِ",
    "Hebrew with points": "בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "C": "for (i = 0; i < n; ++i) { *p++ = (a[i] >> 8) & 0xff; *p++ = ~(b[i] ^ c[j]) | (d << 1); }",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_and_code_are_readable(script):
    assert prepare("pretrain", {"text": SCRIPTS[script]})[1]["rules"]["readable"]["dropped"] == 0


# ---- Control tokens on the screen -----------------------------------------------------------------------------------


def test_control_tokens_never_look_like_the_same_letters():
    ids = [3, *chat.encode(TOKENIZER, "<|im_start|>⟦im_start⟧"), 4]
    assert show_tokens(ids, None, TOKENIZER, False) == r"⟦im_start⟧<|im_start|>\u27e6im_start\u27e7⟦im_end⟧"
    colored = show_tokens(ids, [0] * (len(ids) - 1) + [1], TOKENIZER, True)
    assert colored.startswith("\033[7m⟦im_start⟧\033[27m<|im_start|>")
    assert colored.endswith("\033[32m\033[7m⟦im_end⟧\033[27m\033[39m")


# ---- Chat exports ---------------------------------------------------------------------------------------------------

EXPORTS = {
    "WhatsApp, Android.txt": (
        "12/30/20, 9:15 PM - Messages and calls are end-to-end encrypted.\n12/30/20, 9:15 PM - Ann: Hi\n"
        "12/30/20, 9:16 PM - Ben Li: Hello Ann\nsecond line\n12/30/20, 9:17 PM - Ann: <Media omitted>\n"
    ),
    "WhatsApp, iPhone.txt": (
        "\ufeff[30.12.20, 21:15:03] Ann: \u200eHi\r\n[30.12.20, 21:16:03] Ben Li: Hello Ann\r\nsecond line\r\n"
        "\u200e[30.12.20, 21:17:03] Ann: \u200eimage omitted\r\n"
    ),
    "Telegram.txt": "Ann, [30.12.2020 21:15]\nHi\n\nBen Li, [30.12.2020 21:16]\nHello Ann\nsecond line\n",
    "WeChat.txt": "2020-12-30 21:15:03 Ann\nHi\n\n2020-12-30 21:16:03 Ben Li\nHello Ann\nsecond line\n",
    "WeChat, 2.txt": "Ann 2020/12/30 21:15\nHi\n\nBen Li 2020/12/30 21:16\nHello Ann\nsecond line\n",
    "WeChat.csv": (
        'Type,IsSender,StrContent,StrTime,NickName\n1,0,Hi,2020-12-30 21:15:03,Ann\n3,0,<img>,2020-12-30 21:15:04,Ann\n'
        '1,1,"Hello Ann\nsecond line",2020-12-30 21:16:03,Ben Li\n'
    ),
    "Telegram.json": json.dumps(
        {
            "name": "Ann",
            "type": "personal_chat",
            "id": 1,
            "messages": [
                {"type": "service", "date": "2020-12-30T21:00:00", "actor": "Ann", "action": "x", "text": ""},
                {"type": "message", "date": "2020-12-30T21:15:00", "from": "Ann", "text": ["H", {"text": "i"}]},
                {"type": "message", "date": "2020-12-30T21:16:00", "from": "Ben Li", "text": "Hello Ann\nsecond line"},
            ],
        },
        indent=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_a_chat_export_becomes_a_chat(name, capsys):
    Path(name).write_text(EXPORTS[name], "utf-8")
    run("sft", name, "--speaker", "Ben Li", "--output", "out", "--workers", 1, "--val_fraction", 0)
    [(ids, _)] = Prepared("out", "train").record(0)
    text = TOKENIZER.decode(ids.tolist(), skip_special_tokens=False)
    assert "user\nHi<|im_end|>\n<|im_start|>assistant\nHello Ann\nsecond line<|im_end|>" in text
    run("sft", name, "--speaker", "Bob", status=2)
    assert "no one in it is called Bob; give --speaker one of: Ann, Ben Li" in capsys.readouterr().err
    run("sft", name, "--speaker", "Ben Li", "--redact", "--output", "out", "--workers", 1, "--val_fraction", 0)
    [(ids, _)] = Prepared("out", "train").record(0)
    assert "Hello [NAME]" in TOKENIZER.decode(ids.tolist())


def test_chats_of_an_export_are_days():
    lines = [f"{day}/1/21, 9:{minute}0 - {name}: {day}{name}" for day in (1, 2) for minute, name in enumerate("ABA")]
    Path("a.txt").write_text("\n".join(lines))
    run("sft", "a.txt", "--speaker", "B", "--output", "out", "--workers", 1, "--val_fraction", 0)
    assert len(Prepared("out", "train")) == 2


def test_redaction():
    text = "Ann Lee和Ann: +1 (555) 123-4567, 身份证110101199003071234, a@b.com, https://x.y/z room 42"
    assert (
        redacted(text, ["Ann Lee", "B"])
        == "[NAME]和[NAME]: [NUMBER], 身份证[NUMBER], [ADDRESS] [ADDRESS] room [NUMBER]"
    )


def test_a_chat_export_without_a_speaker_says_what_to_do(capsys):
    Path("a.txt").write_text(EXPORTS["WeChat.txt"] + EXPORTS["WeChat.txt"])
    run("sft", "a.txt", status=2)
    assert "--speaker NAME for a chat export" in capsys.readouterr().err
    run("look", "a.txt")
    assert "it seems a chat export: sft with --speaker Ann or Ben Li makes chats" in capsys.readouterr().out
    run("sft", "a.txt", "--redact", status=2)
    assert "--redact is for a chat export" in capsys.readouterr().err


# ---- Other forms of the same faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"instruction": "问", "context": "文", "response": "答"}, "问\n文"),
        ({"question": "问", "passage": "文", "answer": "答"}, "问\n文"),
        ({"prompt": "问", "input": "文", "output": "答"}, "问\n文"),
        ({"prompt": "做：问\n文", "instruction": "问", "input": "文", "output": "答"}, "做：问\n文"),
        ({"prompt": "问", "input": "问", "output": "答"}, "问"),
        ({"question": "问", "options": ["甲", "乙"], "answer": "A"}, "问\nA. 甲\nB. 乙"),
        ({"question": "问", "options": "A. 甲\nB. 乙", "answer": "A"}, "问\nA. 甲\nB. 乙"),
        ({"question": "问", "A": "甲", "B": "乙", "answer": "A"}, "问\nA. 甲\nB. 乙"),
        ({"question": "问", "choices": {"text": ["甲", "乙"], "label": ["A", "B"]}, "answer": "A"}, "问\nA. 甲\nB. 乙"),
        ({"question": "问\nA) 甲\nB) 乙", "options": ["甲", "乙"], "answer": "A"}, "问\nA) 甲\nB) 乙"),
        ({"question": "1+4?", "options": ["1", "4"], "answer": "A"}, "1+4?\nA. 1\nB. 4"),
        ({"prompt": "问", "options": {"temperature": 0.7, "top_p": 1}, "response": "答"}, "问"),
        ({**said("答"), "context": "文"}, "问"),
    ],
)
def test_what_is_asked_is_whole(record, question):
    [(text, _)], _ = prepare("sft", record)
    assert text.startswith(f"<|begin_of_text|><|im_start|>user\n{question}<|im_end|>")


def test_a_question_beside_an_instruction_is_bad_and_functions_are_tools():
    record = {**said("答"), "functions": [{"name": "f"}]}
    got, report = prepare("sft", record, {"instruction": "做", "question": "问", "output": "答"})
    assert '{"name": "f"}' in got[0][0]
    assert "an instruction and a question: say which one asks" in report["bad_examples"][0]


def test_an_encoding_that_is_wrong_for_utf_8_is_not_used():
    Path("a.txt").write_text("花园很安静大门敞开着没有人来", "utf-8")
    for encoding in ("gb18030", "latin-1"):
        options = ReadOptions("text", encoding)
        [(_, record)] = next(read_batches([Path("a.txt")], options)).records
        assert record == {"text": "花园很安静大门敞开着没有人来"}
    Path("b.txt").write_bytes(b"caf\xc3\xa9 and the garden gate\n")  # too little to tell
    [(_, record)] = next(read_batches([Path("b.txt")], ReadOptions("text", "latin-1"))).records
    assert record == {"text": "cafÃ© and the garden gate\n"}


@pytest.mark.parametrize(
    "flag",
    [{"masked": True}, {"ignore": True}, {"skip": "true"}, {"train_on_turn": False}, {"do_train": False}]
    + [{"weights": 0}, {"loss_weight": "0.0"}, {"learn": "n"}, {"compute_loss": False}, {"loss_scale": 0}],
)
def test_flags_of_turns_and_of_records_have_many_names(flag):
    turns = [QUESTION, {"role": "assistant", "content": "坏", **flag}, QUESTION, {"role": "assistant", "content": "好"}]
    got, report = prepare("sft", {"messages": turns}, {"instruction": "问", "output": "坏", **flag})
    assert [trained for _, trained in got] == ["好<|im_end|>"]
    assert report["rules"]["no_answer"]["dropped"] == 1
    pair = {"prompt": "问", "chosen": "好", "rejected": "差"}
    assert len(prepare("dpo", pair, {**pair, "prompt": "再问", **flag})[0]) == 2


def test_a_flag_that_may_mean_either_is_bad_and_a_field_of_a_record_may_mean_anything():
    fields = {"ignore": "the stop words", "skip": "x", "mask": [1], "weight": 0.5, "label": "other"}
    got, report = prepare("sft", said("甲", mask=1), {"instruction": "问", "output": "好", **fields})
    assert ([trained for _, trained in got], report["bad"]) == (["好<|im_end|>"], 1)


@pytest.mark.parametrize(
    "label",
    [{"label": "negative"}, {"kto_label": False}, {"Label": False}, {"thumbs": "down"}, {"is_rejected": True}]
    + [{"label": "差"}, {"preference": "rejected"}, {"liked": False}, {"is_desirable": 0}, {"quality": "bad"}],
)
def test_bad_labels_have_many_names_also_on_the_last_turn(label):
    got, report = prepare("sft", {"prompt": "问", "completion": "坏", **label}, said("坏", **label), said("好"))
    assert [trained for _, trained in got] == ["好<|im_end|>"]
    assert report["rules"]["bad_label"]["dropped"] == 2


def test_a_class_is_no_label():
    record = {"instruction": "Classify", "input": "a bad film", "output": "negative", "label": "negative"}
    assert len(prepare("sft", record)[0]) == 1
    assert len(prepare("rl", {"prompt": "问", "answer": "cat", "label": 0})[0]) == 1
    assert (
        prepare("rl", {"prompt": "问", "answer": "4"}, {"prompt": "再", "answer": "5", "label": False})[1]["kept"] == 1
    )


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "[THINK]二加七[/THINK]9"},
        {"content": "◁think▷二加七◁/think▷9"},
        {"content": "<seed:think>二加七</seed:think>9"},
        {"content": "<|begin_of_thought|>二加七<|end_of_thought|>\n\n9"},
        {"content": "<|START_THINKING|>二加七<|END_THINKING|>9"},
        {"content": "&lt;think&gt;二加七&lt;/think&gt;9"},
        {"content": "\ufeff<think >二加七</think >9"},
        {"content": "<analysis>二加七</analysis>9"},
        {"content": "<思考>二加七</思考>9"},
        {"content": "二加七</thinking>9"},
        {"content": "9", "thought": "二加七"},
        {"content": "9", "cot": "二加七"},
    ],
)
def test_thoughts_of_other_templates_are_thoughts(answer):
    assert prepare("sft", said(**answer))[0][0][1] == THOUGHT


def test_thoughts_that_are_open_drop_the_record_and_other_tags_stay():
    got, report = prepare("sft", said("<thinking>hm\n4"), said("甲"))
    assert (len(got), report["rules"]["tags"]["dropped"]) == (1, 1)
    for code in ("Use\n```xml\n<analysis>x</analysis>\n```", "<analysis><item/></analysis>", "<reasoning> is a tag"):
        assert prepare("sft", said(code))[0][0][1] == f"{code}<|im_end|>"
    inner = "<think>\nwrite <analysis>x</analysis>\n</think>\n\n4 <analysis>x</analysis>"
    assert prepare("sft", said(inner))[0][0][1] == f"{inner}<|im_end|>"


@pytest.mark.parametrize(
    "content",
    ['<function_call>{"name":"f","arguments":{}}</function_call>', '<functioncall> {"name": "f"}', "[TOOL_CALLS][{}]"]
    + ['<|tool_call|>[{"name":"f"}]<|/tool_call|>', '<|python_tag|>{"name":"f"}', "✿FUNCTION✿: f\n✿ARGS✿: {}"]
    + ["<|tool▁calls▁begin|>x", '<invoke name="f"></invoke>', "Wait.\n<tool_calls>[]</tool_calls>", "<tool_code>f()"],
)
def test_calls_in_other_forms_are_bad(content):
    got, report = prepare("sft", said(content), said("Call `<function=f>` or std::function<int>."))
    assert (len(got), report["bad"]) == (1, 1)


@pytest.mark.parametrize("turn", [{"output": "4"}, {"content": "", "result": "4"}, {"content": "<tool_response>4"}])
def test_what_a_tool_answers_is_read(turn):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    answer = {"role": "assistant", "content": "好"}
    got, report = prepare(
        "sft",
        {"messages": [QUESTION, call, {"role": "tool", **turn}, answer]},
        {"messages": [QUESTION, call, {"role": "tool", "tool_responses": ["4"]}, answer]},
    )
    assert "<tool_response>\n4\n</tool_response>" in got[0][0]
    assert report["bad"] == 1
    blank = {"role": "tool", "content": "", "tool_call_id": "1"}
    assert prepare("sft", {"messages": [QUESTION, call, blank, answer]})[1]["kept"] == 1


QUOTES = {
    "a pair that swallows rows": ('q,a\nx,"an open quote\ny,two\nz,three"\nlast,one\n', [2]),
    "one in the next row": ('q,a\nx,"open\ny,two"\nlast,one\n', [2]),
    "a poem": ('q,a\n写诗,"床前明月光,疑是地上霜\n举头望明月,低头思故乡"\nlast,one\n', []),
    "prose": ('q,a\nlist,"one\nthree, four"\nlast,one\n', []),
    "code": ('q,a\nlist,"def f():\n    return a,b"\nlast,one\n', []),
    "a table": ('q,a\ntable,"a,b\nc,d\ne,f"\nlast,one\n', []),
}


@pytest.mark.parametrize("what", QUOTES)
def test_quotes_that_swallow_rows_are_bad_and_quoted_lines_are_not(what):
    content, bad = QUOTES[what]
    Path("a.csv").write_text(content)
    read = [record for batch in read_batches([Path("a.csv")], "text") for record in batch.records]
    assert [place for place, record in read if not isinstance(record, dict)] == bad
    assert {"q": "last", "a": "one"} in [record for _, record in read]


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_other_separators_of_columns_are_named(mark):
    Path("a.csv").write_text(f"q{mark}a\nIs it?{mark}Yes, it is.\n")
    with pytest.raises(UserError, match="its columns are separated by"):
        values("a.csv")


@pytest.mark.parametrize("tag", ["<|endoftext|>", "<｜end▁of▁sentence｜>", "<eos>"])
def test_texts_on_one_line_are_not_glued_together(tag):
    [(text, _)], _ = prepare("pretrain", {"text": f"{GARDEN}{tag}The end.{tag}"})
    assert f"{GARDEN}\n\nThe end.<|end_of_text|>" in text


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\n短<|im_end|>\n<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] <<SYS>>\n短\n<</SYS>>\n\n问 [/INST] 答 </s><s>[INST] 再问 [/INST]",
        "[INST] 问 [/INST] 答 [INST] 再问 [/INST]",
        "<｜User｜>问<｜Assistant｜>答<｜end▁of▁sentence｜><｜User｜>再问<｜Assistant｜>",
        "<start_of_turn>user\n问<end_of_turn>\n<start_of_turn>model\n答<end_of_turn>\n<start_of_turn>user\n再问",
    ],
)
def test_several_turns_in_one_prompt_are_dropped(prompt):
    fine = {"prompt": "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n", "completion": "好", "answer": "好"}
    for command, answer in (("sft", "completion"), ("rl", "answer")):
        got, report = prepare(command, {"prompt": prompt, answer: "好"}, fine)
        assert (len(got), report["rules"]["tags"]["dropped"]) == (1, 1)


def test_blank_answers_are_dropped_and_thoughts_alone_are_not():
    blank = [said("\u3000"), said("\xa0无\u3000"), said("\n\t")]
    got, report = prepare("sft", *blank, said("", reasoning_content="二加七"), said("好"))
    assert (len(got), report["rules"]["empty_answer"]["dropped"]) == (2, 3)
    pair = {"prompt": "问", "chosen": "好", "rejected": "差"}
    halves = [{**pair, "rejected": half} for half in (" ", "\u3000", "好 ", "None")]
    halves += [{"chosen": [QUESTION, {"role": "assistant", "content": "好"}], "rejected": half} for half in ("", None)]
    got, report = prepare("dpo", pair, *halves)
    assert (len(got), report["bad"]) == (4, 0)
    assert report["rules"]["same_answer"]["dropped"] == 1


@pytest.mark.parametrize("answer", ["4</s>", "\u200b4", "4<|im_end|>\n"])
def test_an_answer_to_check_is_cleaned(answer):
    prepare("rl", {"prompt": "问", "answer": answer})
    assert json.loads(Path("out/train.jsonl").read_text())["answer"] == "4"


def test_answers_to_check_that_are_blank_are_dropped_and_others_bad():
    _, report = prepare("rl", *({"prompt": f"问{i}", "answer": blank} for i, blank in enumerate(("", None, True, "4"))))
    assert (report["rules"]["empty_answer"]["dropped"], report["bad"], report["kept"]) == (2, 1, 1)


def test_what_an_app_adds_to_messages_goes():
    names = ["Ann", "Bob", "Bob", "Bob", "Bob", "Ann", "Bob", "Bob"]
    texts = [
        "hi",
        "yes <This message was edited>",
        "IMG-1.jpg (file attached)\nlook",
        "Missed voice call",
        "image omitted",
    ]
    texts += ["call?", "video call tomorrow at 8", "[文件] a.doc\n[图片]\n看 [微笑]"]
    lines = [f"2024-01-03, 21:1{i} - {name}: {text}" for i, (name, text) in enumerate(zip(names, texts))]
    Path("a.txt").write_text("\n".join(lines), "utf-8")
    [batch] = read_batches([Path("a.txt")], ReadOptions("text", speaker="Bob"))
    [(_, chat)] = batch.records
    contents = [turn["content"] for turn in chat["messages"]]
    assert contents == ["hi", "yes\nlook", "call?", "video call tomorrow at 8\n看 [微笑]"]


def test_a_record_with_a_list_of_objects_is_no_wrapper():
    record = {"images": [{"url": "x"}], "text": GARDEN}
    Path("a.json").write_text(json.dumps(record))
    assert parsed("a.json") == [record]


TABLE = "| 年 | 数 |\n|------|-------|\n| 1 | 2 |\n| 3 | 4 |"


@pytest.mark.parametrize("text", [TABLE, "⠓⠑⠇⠇⠕ ⠺⠕⠗⠇⠙ ⠞⠓⠊⠎"])
def test_tables_and_braille_are_readable(text):
    assert prepare("pretrain", {"text": text})[1]["rules"]["readable"]["dropped"] == 0
    assert prepare("pretrain", {"text": "=-=-=-=-=-=-=- x"}, {"text": GARDEN})[1]["rules"]["readable"]["dropped"] == 1


def test_messages_name_what_is_wrong(capsys):
    Path("a.zip").write_bytes(b"PK\x03\x04" + bytes(40))
    run("pretrain", "a.zip", status=2)
    assert "a.zip: it is a zip archive or an Office document: unpack it" in capsys.readouterr().err
    Path("a.jsonl").write_text("[" + ",\n".join(map(json.dumps, LINES)))
    run("pretrain", "a.jsonl", status=2)
    assert "a.jsonl: broken after record 2 (element 3 of the JSON array" in capsys.readouterr().err
    write("a.jsonl", {f"field{i}": 1 for i in range(400)})
    run("sft", "a.jsonl", status=2)
    assert "field11, … (see --fields" in capsys.readouterr().err
