"""The demonstration's questions: tests are never trained on, expected answers are right, and the check is strict."""

import json
import random
import re

import pytest

from demo import questions as demo
from demo.questions import EN, NAMES, NEW_NAMES, SKILLS, ZH, Question, brief, is_brief, is_right, rambling

FILES = ("pretrain", "sft", "sft_val", "lora", "lora_val", "dpo", "dpo_val", "questions")
CORPUS = ["话说天下大势，分久必合，合久必分。"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """All files of a smaller demonstration, with a corpus of one text."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SIZES", {"pages": 600, "chats": 2000, "names": 300, "pairs": 1000})
        demo.write_demo(folder, CORPUS, seed=0)
        yield folder


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def drawn(skill, test, language, number=300):
    rng = random.Random(1)
    return [demo.draw(rng, skill, language, test) for _ in range(number)]


def test_the_same_seed_writes_the_same_bytes_and_another_other_ones(folder, tmp_path):
    demo.write_demo(tmp_path / "same", CORPUS, seed=0)
    demo.write_demo(tmp_path / "other", CORPUS, seed=1)
    for name in FILES:
        content = (folder / f"{name}.jsonl").read_bytes()
        assert content == (tmp_path / "same" / f"{name}.jsonl").read_bytes()
        assert content != (tmp_path / "other" / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("language", [ZH, EN])
@pytest.mark.parametrize("skill", SKILLS)
def test_wordings_and_operands_of_the_tests_are_kept_for_them(skill, language):
    trained, kept = set(SKILLS[skill].wordings[language]), set(SKILLS[skill].test_wordings[language])
    assert len(trained) >= 4
    assert len(kept) >= 2
    assert not trained & kept
    for_training, for_tests = (
        {tuple(sorted(map(str, d.operands))) for d in drawn(skill, test, language) if d.operands}
        for test in (False, True)
    )
    assert not for_training & for_tests
    computes = skill in ("sum", "difference", "larger", "count", "sorted", "reversed", "unit")
    assert bool(for_tests) == bool(for_training) == computes


def test_no_test_question_is_in_the_training_files(folder):
    asked = {record["prompt"] for record in read(folder, "questions")}
    assert len(asked) == 2 * demo.TESTS * len(SKILLS)
    for name in ("sft", "lora", "dpo"):
        trained = {
            message["content"]
            for record in read(folder, name)
            for message in (record.get("messages") or record["prompt"])
            if message["role"] == "user"
        }
        assert len(trained) > 50
        assert not asked & trained


def test_no_statement_of_the_pretraining_text_answers_a_test_computation(folder):
    held_out = {("+", *d.slots) for language in (ZH, EN) for d in drawn("sum", True, language)}
    held_out |= {("-", *d.slots) for language in (ZH, EN) for d in drawn("difference", True, language)}
    text = "\n".join(record["text"] for record in read(folder, "pretrain"))
    stated = re.findall(r"^(\d+)(\+|-| plus | minus )(\d+)", text, re.MULTILINE)
    assert len(stated) > 1000
    signs = {" plus ": "+", " minus ": "-"}
    assert not held_out & {(signs.get(sign, sign), int(a), int(b)) for a, sign, b in stated}


@pytest.mark.parametrize("language", [ZH, EN])
@pytest.mark.parametrize("test", [False, True])
def test_computed_answers_are_right(language, test):
    def numbers(d):
        return [int(slot) for slot in d.slots if str(slot).isdigit()]

    days = demo.DATA["weekdays"][language]
    right = {
        "sum": lambda d: sum(numbers(d)),
        "difference": lambda d: numbers(d)[0] - numbers(d)[1],
        "product": lambda d: sum([numbers(d)[0]] * numbers(d)[1]),
        "larger": lambda d: sorted(numbers(d))[1],
        "count": lambda d: d.slots[0].count(" ") + 1,
        "sorted": lambda d: " ".join(digit for digit in "123456789" if digit in d.slots[0]),
        "reversed": lambda d: d.slots[0][::-1],
        "weekday": lambda d: (days * 3)[7 + days.index(d.slots[0]) + SIGN[d.slots[1]]],
        "unit": lambda d: d.slots[0] * UNIT[d.slots[1]] // UNIT[d.slots[2]],
    }
    for skill, answer in right.items():
        for d in drawn(skill, test, language):
            assert d.value == str(answer(d)), (skill, d)


SIGN = {"后": 1, "前": -1, "after": 1, "before": -1}
UNIT = {"cm": 1, "m": 100, "km": 10**5, "g": 1, "kg": 1000}
UNIT |= {"厘米": 1, "米": 100, "公里": 10**5, "克": 1, "公斤": 1000}


def test_tables_of_facts_ask_nothing_that_has_two_answers():
    for entries in (*demo.DATA["capitals"], *demo.DATA["courtesy_names"], demo.DATA["words"]):
        for column in zip(*entries):
            assert len(set(column)) == len(entries)
    for pairs in demo.DATA["opposites"]:
        words = [word for pair in pairs for word in pair]
        assert len(set(words)) == len(words)


@pytest.mark.parametrize("skill", SKILLS)
def test_own_answers_pass_the_check_whatever_the_manner(skill):
    rng = random.Random(2)
    for question in [demo.ask(rng, skill, language, test) for language in (ZH, EN) for test in (0, 1)] * 20:
        assert is_right(brief(question), question.expected)
        assert is_right(rambling(question), question.expected)
        assert is_brief(brief(question))
        assert not is_brief(rambling(question))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("82", "82"),
        ("答案是82。", "82"),
        ("The answer is 82.", "82"),
        ("It is 3,000.", "3000"),
        ("从小到大是 3 7 9。", "3 7 9"),
        ("法国的首都是巴黎。", "巴黎"),
        ("The capital is New Delhi, I think.", "New Delhi"),
        ("我叫芥子，很高兴认识你。", "芥子"),
        ("星期三", "星期三"),
    ],
)
def test_words_around_the_value_are_free(answer, expected):
    assert is_right(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "82"),
        ("82 or 83", "82"),
        ("820", "82"),
        ("182", "82"),
        ("8 2", "82"),
        ("3 9 7", "3 7 9"),
        ("3 7 9 1", "3 7 9"),
        ("3, 7, 9", "3 7 9"),
        ("巴黎、伦敦、罗马", "巴黎"),
        ("Paris or London", "Paris"),
        ("Parisian", "Paris"),
        ("孟德", "玄德"),
        ("我是明月。", "芥子"),
        ("星期三或星期四", "星期三"),
        ("星期", "星期三"),
        ("这里是城市的中心", "北京"),
    ],
)
def test_another_value_or_two_of_them_are_wrong(answer, expected):
    assert not is_right(answer, expected)


def test_lora_changes_the_name_and_only_that(folder):
    answers = {}
    for record in read(folder, "lora") + read(folder, "lora_val"):
        question, answer = (message["content"] for message in record["messages"])
        answers.setdefault(question, set()).add(answer)
    named = {q: a for q, a in answers.items() if any(name in text for text in a for name in (*NAMES, *NEW_NAMES))}
    assert len(named) > 40
    for question, own in named.items():
        assert all(is_right(answer, NEW_NAMES[EN if question.isascii() else ZH]) for answer in own)
    assert len(answers) > 3 * len(named)


def test_a_pair_differs_in_manner_and_not_in_the_answer(folder):
    pairs = read(folder, "dpo") + read(folder, "dpo_val")
    for pair in pairs:
        chosen, rejected = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        assert is_brief(chosen)
        assert not is_brief(rejected)
        assert chosen in rejected


def test_other_commands_read_every_line(folder, run_here, tmp_path):
    for command, name in (("pretrain", "pretrain"), ("sft", "sft"), ("sft", "lora"), ("dpo", "dpo")):
        val = [] if name == "pretrain" else ["--val", folder / f"{name}_val.jsonl"]
        flags = [folder / f"{name}.jsonl", *val, "--output", tmp_path / name, "--workers", 1]
        result = run_here("data_process.py", command, *flags)
        assert result.status == 0, result.err
        kept = int(re.search(r"([\d,]+) kept, 0 bad", result.out)[1].replace(",", ""))
        assert kept > 0.7 * int(re.match(r"[\d,]+", result.out)[0].replace(",", ""))


def test_the_command_mixes_a_corpus_in_and_does_without_one(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "statements", lambda rng, number: "1+1=2")
    (tmp_path / "corpus.jsonl").write_text('{"text": "分久必合"}\n', "utf-8")
    result = run_here("data_process.py", "demo", "--output", tmp_path / "a", "--corpus", tmp_path / "corpus.jsonl")
    assert result.status == 0, result.err
    assert read(tmp_path / "a", "pretrain")[0] == {"text": "分久必合"}
    assert run_here("data_process.py", "demo", "--output", tmp_path / "b").status == 0
    assert "farmer" in (tmp_path / "b" / "pretrain.jsonl").read_text("utf-8")
    (tmp_path / "corpus.jsonl").write_text('{"words": 1}\n', "utf-8")
    result = run_here("data_process.py", "demo", "--output", tmp_path / "c", "--corpus", tmp_path / "corpus.jsonl")
    assert result.status == 2
    assert "corpus.jsonl:1" in result.err


def test_a_question_names_its_own_language():
    assert brief(Question("sum", ZH, "1+1=？", "2")) == "2。"
    assert brief(Question("sum", EN, "1+1=?", "2")) == "2."


@pytest.mark.parametrize("name", ["sft.jsonl", "thesis.md"])
def test_the_command_replaces_its_own_files_only(name, run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SIZES", {"pages": 2, "chats": 2, "names": 2, "pairs": 2})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("years of work")
    result = run_here("data_process.py", "demo", "--output", tmp_path / "mine")
    assert "contains other files" in result.error_line(status=2)
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["years of work"]
    for _ in range(2):
        assert run_here("data_process.py", "demo", "--output", tmp_path / "demo").status == 0
