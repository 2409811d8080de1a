"""Exams: the layouts of C-Eval and CMMLU, prompts with examples, answers that transformers and lm_eval give too."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import TOKENIZER, make_text, prompt, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from base.cli import UserError
from corpus.exams import ceval_categories, read_exam
from engine import exams
from engine.exams import LETTERS, accuracy, answer_exam, log_likelihoods, wilson_interval
from model.chat import EOS, IM_END, encode
from model.checkpoint import save_model
from model.LMConfig import LMConfig

COLUMNS = ["id", "question", "A", "B", "C", "D", "answer"]
SMALL = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def make_questions(number: int, seed: int) -> list[dict]:
    """Options of different lengths, some of which begin alike; half of the questions have a blank."""
    rng, rows = random.Random(seed), []
    for i in range(number):
        options = [make_text(rng)[: rng.randint(2, 30)].strip() for _ in LETTERS]
        question = make_text(rng)[:40] + ("的意思是____。" if i % 2 else "下一句是什么？")
        rows.append(dict(zip(COLUMNS, [i, question, *options, rng.choice("ABCD")])))
    return rows


def write_csv(path: Path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def without_answers(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "answer"} for row in rows]


@pytest.fixture(scope="module")
def ceval(tmp_path_factory) -> Path:
    """C-Eval's layout: answers in dev and val, none in test."""
    folder = tmp_path_factory.mktemp("ceval-exam")
    for seed, subject in enumerate(("law", "logic", "physician")):
        rows = make_questions(20, seed)
        write_csv(folder / "dev" / f"{subject}_dev.csv", rows[:5])
        write_csv(folder / "val" / f"{subject}_val.csv", rows[5 : 10 + seed])
        write_csv(folder / "test" / f"{subject}_test.csv", without_answers(rows[15:]))
    return folder


def cmmlu_form(rows: list[dict]) -> list[dict]:
    return [{"": row["id"], **{name.capitalize(): row[name] for name in COLUMNS[1:]}} for row in rows]


@pytest.fixture(scope="module", params=["base", "chat"])
def model(request):
    model = random_model(LMConfig(**SMALL, max_position_embeddings=512))
    model.stop_token_ids = [EOS, IM_END] if request.param == "chat" else [EOS]
    return model


# ------------------------------------------------------------------------------------------------------------- reading


def test_c_eval_is_read_with_its_categories(ceval):
    questions, examples = read_exam(ceval)
    assert questions["subject"].value_counts().to_dict() == {"law": 5, "logic": 6, "physician": 7}
    assert set(zip(questions["subject"], questions["category"])) == {
        ("law", "Humanities"),
        ("logic", "Humanities"),
        ("physician", "Other"),
    }
    assert examples["subject"].value_counts().to_dict() == {"law": 5, "logic": 5, "physician": 5}
    first = make_questions(20, 0)[5]
    assert questions.iloc[0][["question", "a", "d"]].tolist() == [first["question"], first["A"], first["D"]]
    assert questions.iloc[0]["answer"] == first["answer"].lower()


def test_cmmlu_is_read_by_its_test_part(tmp_path):
    for subject, size in (("agronomy", 4), ("law_of_war", 6)):
        write_csv(tmp_path / "dev" / f"{subject}.csv", cmmlu_form(make_questions(5, 1)))
        write_csv(tmp_path / "test" / f"{subject}.csv", cmmlu_form(make_questions(size, 2)))
    (tmp_path / "test" / "._agronomy.csv").write_bytes(b"\0what a Mac leaves\xff")
    questions, examples = read_exam(tmp_path)
    assert questions["subject"].value_counts().to_dict() == {"law_of_war": 6, "agronomy": 4}
    assert questions["category"].isna().all()
    assert len(examples) == 10


def test_a_zip_file_is_read_as_the_folder_is(ceval, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "exam"), "zip", ceval.parent, ceval.name)
    for from_zip, from_folder in zip(read_exam(archive), read_exam(ceval)):
        pd.testing.assert_frame_equal(from_zip, from_folder)


def test_a_zip_file_that_is_damaged_is_refused(ceval, tmp_path):
    archive = Path(shutil.make_archive(str(tmp_path / "exam"), "zip", ceval))
    content = bytearray(archive.read_bytes())
    content[200:300] = bytes(100)  # within the first question's text
    archive.write_bytes(content)
    with pytest.raises(UserError, match="exam.zip is damaged"):
        read_exam(archive)


def test_the_categories_of_c_eval():
    categories = ceval_categories()
    assert {name: len(subjects) for name, subjects in categories.items()} == {
        "STEM": 20,
        "Social Science": 10,
        "Humanities": 11,
        "Other": 11,
    }
    assert len({subject for subjects in categories.values() for subject in subjects}) == 52


ROW = dict(zip(COLUMNS, [0, "?", "1", "2", "3", "4", "A"]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW | {"C": ""}], "law.csv: question 2 has no c"),
        ([{"question": "?", "A": "1"}], "law.csv: question 1 has no b"),
        ([ROW | {"answer": "E"}], "law.csv: question 1 has the answer 'e'"),
        ([ROW, ROW | {"answer": ""}], "law.csv: question 2 has no answer"),
        (without_answers([ROW]), "law.csv: question 1 has no answer"),
    ],
)
def test_a_question_that_is_not_whole_is_named(rows, message, tmp_path):
    write_csv(tmp_path / "law.csv", rows)
    with pytest.raises(UserError) as error:
        read_exam(tmp_path)
    assert message in str(error.value)


def test_an_exam_without_questions_or_answers_is_refused(tmp_path):
    with pytest.raises(UserError, match="no file in this folder"):
        read_exam(tmp_path)
    write_csv(tmp_path / "test" / "law_test.csv", without_answers([ROW]))
    with pytest.raises(UserError, match="has no answers"):
        read_exam(tmp_path)


# ----------------------------------------------------------------------------------------------------------- answering


def transformers_log_probs(directory, before: list[int], option: list[int]) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        log_probs = model(torch.tensor([before + option])).logits[0].double().log_softmax(-1)
    places = range(len(before) - 1, len(before) + len(option) - 1)
    return sum(log_probs[place, token].item() for place, token in zip(places, option))


def prompt_text(row: dict, answer: str) -> str:
    return f"{row['question']}\nA. {row['A']}\nB. {row['B']}\nC. {row['C']}\nD. {row['D']}\n答案：{answer}"


@pytest.mark.parametrize("by", ["letter", "text"])
def test_the_answer_is_what_transformers_finds_most_probable(by, model, tokenizer, ceval, tmp_path):
    save_model(tmp_path, model, TOKENIZER)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    questions, examples = read_exam(ceval)
    logic = questions[questions["subject"] == "logic"].reset_index(drop=True)
    results = answer_exam(model, tokenizer, logic, examples, shots=2, by=by)
    rows = make_questions(20, 1)
    for row, chosen in zip(rows[5:11], results["chosen"]):
        shown = [*rows[:2], row]
        scores = []
        for letter in "ABCD":
            keys = [rows[0]["answer"], rows[1]["answer"], letter]
            if by == "letter":
                asked, answers = [prompt_text(one, "") for one in shown], keys
            else:
                asked, answers = [one["question"] for one in shown], [one[key] for one, key in zip(shown, keys)]
            if model.is_chat:
                messages = []
                for question, answer in zip(asked, answers):
                    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                before = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
                option = theirs.encode(answers[-1], add_special_tokens=False) + [IM_END] * (by == "text")
            else:
                if by == "letter":
                    texts = [question + answer for question, answer in zip(asked, answers)]
                else:
                    texts = [q.replace("____", a) if "____" in q else q + a for q, a in zip(asked, answers)]
                end = asked[-1] if by == "letter" else asked[-1].partition("____")[0]
                text = "\n\n".join([*texts[:-1], end])
                before = theirs.encode(text)
                option = theirs.encode(text + answers[-1])[len(before) :]
            size = len(answers[-1].encode())
            scores.append(transformers_log_probs(tmp_path, before, option) / size)
        assert chosen == LETTERS[max(range(4), key=scores.__getitem__)]
    assert results["right"].tolist() == [row["answer"].lower() == c for row, c in zip(rows[5:11], results["chosen"])]


def test_an_option_is_encoded_as_it_stands_in_the_text(tokenizer):
    """In 中国, which is one token, the second letter has none of its own, and would be certain."""
    row = {"question": "中____", "a": "国", "b": "国人", "c": "。", "d": "间的花"}
    assert len(encode(tokenizer, "中国")) == 1
    (_, alone), *rest = exams.encode_question(False, tokenizer, row, [], "text")
    assert alone == encode(tokenizer, "国")
    for (before, option), text in zip(rest, ("中国人", "中。", "中间的花")):
        assert option == encode(tokenizer, text)[len(before) - 1 :] != []


def test_batches_change_nothing_and_equal_inputs_are_read_once(model):
    before = [prompt(length, seed=length) for length in (3, 40, 17, 5)]
    pairs = [(ids, [*prompt(3, seed), 7]) for seed, ids in enumerate(before)]
    letters = [(before[1], [letter]) for letter in (30, 31, 32, 33)]
    rows_read = []
    hook = model.model.register_forward_pre_hook(lambda module, inputs: rows_read.append(len(inputs[0])))
    alone = [log_likelihoods(model, [pair], batch_size=1)[0] for pair in pairs + letters]
    rows_read.clear()
    together = log_likelihoods(model, pairs + letters, batch_size=3)
    hook.remove()
    assert rows_read == [3, 2]
    assert together == pytest.approx(alone, rel=1e-4)
    assert len({round(score, 3) for score in together}) == 8


def test_a_prompt_that_does_not_fit_loses_examples_then_its_beginning(tokenizer):
    model = random_model(LMConfig(**SMALL, max_position_embeddings=120))
    row = {"question": "水在一百度时", "a": "沸腾", "b": "b", "c": "c", "d": "d", "answer": "a"}
    alone = exams.encode_question(False, tokenizer, row, [], "text")
    assert exams.encode_options(model, tokenizer, row, [], "text") == (alone, False)
    long = row | {"question": "一二三四五六七八九十" * 20}
    short = row | {"question": "天"}
    pairs, cut = exams.encode_options(model, tokenizer, row, [long, short], "text")
    assert cut
    assert pairs == exams.encode_question(False, tokenizer, row, [short], "text")
    pairs, cut = exams.encode_options(model, tokenizer, long | {"question": long["question"] * 3}, [short], "text")
    assert cut
    assert {len(before) + len(option) for before, option in pairs} == {120}
    assert pairs[0][0][-5:] == encode(tokenizer, long["question"])[-5:]


def test_more_examples_than_there_are_is_refused(tokenizer, ceval):
    model = random_model(LMConfig(**SMALL))
    with pytest.raises(UserError, match="the dev part of law holds 5 questions, not 6"):
        answer_exam(model, tokenizer, *read_exam(ceval), shots=6)


def test_weights_that_are_not_finite_are_said(tokenizer, ceval):
    model = random_model(LMConfig(**SMALL))
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        answer_exam(model, tokenizer, *read_exam(ceval))


# ------------------------------------------------------------------------------------------------------------ counting


def test_accuracy_by_subject_with_its_interval():
    results = pd.DataFrame({"subject": ["b"] * 3 + ["a"], "right": [True, False, True, False]})
    table = accuracy(results, "subject")
    assert table["questions"].to_dict() == {"a": 1, "b": 3}
    assert table["accuracy"].to_dict() == {"a": 0, "b": pytest.approx(2 / 3)}
    assert (table.loc["b", "low"], table.loc["b", "high"]) == wilson_interval(2 / 3, 3)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_is_wilson_s(right, n, low, high):
    """The last is the example of Newcombe 1998 (Statistics in Medicine 17), table I."""
    assert wilson_interval(right / n, n) == pytest.approx((low, high), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------- interop

# lm-evaluation-harness brings a hundred packages, so it has an environment of its own:
#   python -m venv out/lm_eval
#   out/lm_eval/bin/pip install torch==2.13.0 "lm_eval[hf]>=0.4.13,<0.5" -c constraints.txt
#   JIEZI_INTEROP_PYTHON=out/lm_eval/bin/python python quickstart.py test -m slow -k interop
INTEROP_PYTHON = os.environ.get("JIEZI_INTEROP_PYTHON") or (sys.executable if find_spec("lm_eval") else None)
LM_EVAL = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


def lm_eval_accuracy(folder: Path, model: Path, rows: list[dict], examples: list[dict], shots: int, by: str) -> float:
    """What lm-evaluation-harness says of the same questions."""
    for name, part in (("test", rows), ("dev", examples)):
        (folder / f"{name}.json").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in part), "utf-8")
    listed = r"{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案："
    task = {
        "task": "our_exam",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {name: str(folder / f"{name}.json") for name in ("test", "dev")}},
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_text": listed.replace(r"\n", "\n") if by == "letter" else "{{question.split('____')[0]}}",
        "doc_to_choice": [*"ABCD"] if by == "letter" else "{{[A, B, C, D]}}",
        "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
    }
    (folder / "our_exam.yaml").write_text(json.dumps(task, ensure_ascii=False), "utf-8")  # JSON is YAML
    command = [INTEROP_PYTHON, "-c", LM_EVAL, "run", "--model", "hf", "--tasks", "our_exam", "--device", "cpu"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--include_path", folder]
    command += ["--num_fewshot", str(shots), "--output_path", folder / "result.json", "--batch_size", "4"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("result*.json")
    figures = json.loads(path.read_text("utf-8"))["results"]["our_exam"]
    return figures["acc,none" if by == "letter" else "acc_bytes,none"]


@pytest.mark.slow
@pytest.mark.skipif(INTEROP_PYTHON is None, reason="lm_eval is not installed: see above")
@pytest.mark.parametrize(("by", "shots"), [("letter", 0), ("letter", 3), ("text", 0)])
def test_interop_accuracy_is_that_of_lm_eval_to_one_question(by, shots, tokenizer, tmp_path):
    model = random_model(LMConfig(**SMALL, max_position_embeddings=1024))
    save_model(tmp_path / "model", model, TOKENIZER)
    rows, examples = make_questions(80, 5), make_questions(5, 6)
    write_csv(tmp_path / "exam/test/law.csv", rows)
    write_csv(tmp_path / "exam/dev/law.csv", examples)
    results = answer_exam(model, tokenizer, *read_exam(tmp_path / "exam"), shots=shots, by=by)
    assert not results["cut"].any()
    theirs = lm_eval_accuracy(tmp_path, tmp_path / "model", rows, examples, shots, by)
    assert abs(results["right"].sum() - theirs * len(rows)) <= 1.01
