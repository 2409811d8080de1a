"""eval.py: one answer, many answers, figures that another computation confirms, and the conversation."""

import csv
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, TIMEOUT, TOKENIZER, make_documents, write_data
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.chat import EOS, IM_END
from model.checkpoint import find_checkpoints, load_model, save_model
from model.LMConfig import LMConfig
from model.lora import apply_lora, lora_layers
from model.model import CausalLM
from server.models import find_models

TEXTS = ["春天来了，山上的花开了。", "The cat sat on the mat.\n  It did not move.", "👩‍👩‍👧 1 + 1 = 2", "x"]
CONTEXT = 96


def make_model(directory, is_chat: bool, seed: int = 0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = CausalLM(LMConfig(**sizes, num_key_value_heads=1, max_position_embeddings=CONTEXT))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    model.stop_token_ids = [EOS, IM_END] if is_chat else [EOS]
    save_model(directory, model, TOKENIZER)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"), is_chat=False)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("chat"), is_chat=True)


@pytest.fixture
def evaluate(run_here):
    def run_eval(model, *flags):
        return run_here("eval.py", "--model", model, "--device", "cpu", *flags)

    return run_eval


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------- perplexity


def transformers_figures(directory, texts: list[str]) -> dict:
    """Loss and bits per byte of texts that fit the context, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    loss, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        ids = F.pad(F.pad(ids, (1, 0), value=tokenizer.bos_token_id), (0, 1), value=tokenizer.eos_token_id)
        assert len(ids) <= CONTEXT
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0].double().log_softmax(-1)
        loss -= sum(log_probs[place, token].item() for place, token in enumerate(ids[1:]))
        tokens += len(ids) - 1
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return {"loss": loss / tokens, "bits_per_byte": loss / math.log(2) / n_bytes, "tokens": tokens, "bytes": n_bytes}


def test_perplexity_is_what_transformers_logits_give(base, tmp_path):
    """A process of its own, as a user starts it; the last line is JSON."""
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    command = [sys.executable, "eval.py", "--model", base, "--perplexity", file, "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    *table, last = result.stdout.splitlines()
    figures, expected = json.loads(last), transformers_figures(base, TEXTS)
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(expected["loss"]), rel=1e-4)
    assert (figures["texts"], figures["tokens"], figures["bytes"]) == (4, expected["tokens"], expected["bytes"])
    assert any(line.startswith("bits_per_byte") for line in table)


def test_a_text_longer_than_the_context_is_scored_whole(base, evaluate, tmp_path):
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": TEXTS[1] * 40}])
    result = evaluate(base, "--perplexity", file, "--json")
    figures = json.loads(result.out.splitlines()[-1])
    n_tokens = len(AutoTokenizer.from_pretrained(base)(TEXTS[1] * 40, add_special_tokens=False).input_ids)
    assert n_tokens > 2 * CONTEXT
    assert figures["tokens"] == n_tokens + 1
    assert figures["bytes"] == 40 * len(TEXTS[1].encode())


def test_perplexity_beyond_the_trained_length_with_and_without_scaling(base, evaluate, tmp_path):
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": TEXTS[1] * 40}])
    losses = []
    for flags in ((), ("--max_seq_len", 2 * CONTEXT), ("--max_seq_len", 2 * CONTEXT, "--rope_scaling", "yarn:2")):
        figures = json.loads(evaluate(base, "--perplexity", file, "--json", *flags).out.splitlines()[-1])
        losses.append(figures["loss"])
    assert len({round(loss, 5) for loss in losses}) == 3


def test_validation_loss_is_the_one_that_training_reports(data, run_here, evaluate, tmp_path):
    flags = ["--data", data, "--preset", "tiny", "--max_seq_len", "64", "--batch_size", "2", "--max_steps", "1"]
    assert run_here("1-pretrain.py", *flags, "--out_dir", tmp_path / "out", "--eval_rows", "1").status == 0
    reported = json.loads((tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()[-1])
    result = evaluate(tmp_path / "out", "--data", data, "--max_seq_len", "64", "--json")
    figures = json.loads(result.out.splitlines()[-1])
    for name in ("val_loss", "val_bits_per_byte"):
        assert figures[name] == pytest.approx(reported[name], rel=1e-4)


def test_several_prepared_folders_are_measured_together_and_each_alone(base, evaluate, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        documents = make_documents("pretrain", 12, seed)
        write_data(tmp_path / name, documents[6:], documents[:6])

    def figures(*folders):
        return json.loads(evaluate(base, "--data", *folders, "--max_seq_len", "64", "--json").out.splitlines()[-1])

    alone = {name: figures(tmp_path / name) for name in "ab"}
    together = figures(tmp_path / "a", tmp_path / "b")
    for name, values in alone.items():
        assert {key: together[f"{key}_{name}"] for key in values} == values
    low, high = sorted(values["val_loss"] for values in alone.values())
    assert low < together["val_loss"] < high


# --------------------------------------------------------------------------------------------------------------- choice


def write_questions(path, rows: list[dict]):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("upper", [True, False], ids=["CMMLU", "C-Eval"])
def test_choice_takes_the_most_probable_option_a_byte(upper, base, evaluate, tmp_path):
    question, options = "水在____度时沸腾。", ["一百", "零", "五十", " people people"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    scores = []
    for option in options:
        before, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in ("水在", option))
        ids = torch.tensor([tokenizer.bos_token_id, *before, *answer])
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0].log_softmax(-1)
        places = range(len(ids) - len(answer), len(ids))
        scores.append(sum(log_probs[place - 1, ids[place]].item() for place in places) / len(option.encode()))
    best = max(range(4), key=scores.__getitem__)
    assert best != max(range(4), key=lambda i: scores[i] * len(options[i].encode())), "shorter must not be better"
    rows = [dict(zip("ABCD", options), question=question, answer="ABCD"[(best + shift) % 4]) for shift in (0, 0, 0, 1)]
    if upper:
        rows = [{name.capitalize(): value for name, value in row.items()} for row in rows]
    result = evaluate(base, "--choice", write_questions(tmp_path / "q.csv", rows), "--json")
    figures = json.loads(result.out.splitlines()[-1])
    assert (figures["questions"], figures["accuracy"], figures["chance"]) == (4, 0.75, 0.25)
    assert 0 < figures["low"] < 0.75 < figures["high"] < 1


def test_an_exam_is_counted_by_subject_and_category(base, evaluate, tmp_path):
    rows = [dict(question=f"{n} + 1 = ____", A=str(n), B="0", C=str(n + 1), D="many", answer="C") for n in range(8)]
    for subject, size in (("law", 8), ("logic", 6), ("physician", 7)):
        for part, part_rows in (("dev", rows[:2]), ("val", rows[2:size])):
            (tmp_path / part).mkdir(exist_ok=True)
            write_questions(tmp_path / part / f"{subject}_{part}.csv", part_rows)
    flags = ["--choice", tmp_path, "--choice_by", "letter", "--json"]
    result = evaluate(base, *flags, "--shots", "1")
    assert result.status == 0, result.err
    *table, last = result.out.splitlines()
    figures = json.loads(last)
    assert figures["questions"] == 15
    assert {name: row["questions"] for name, row in figures["by_subject"].items()} == dict(law=6, logic=4, physician=5)
    assert {name: row["questions"] for name, row in figures["by_category"].items()} == dict(Humanities=10, Other=5)
    right = sum(round(row["questions"] * row["accuracy"]) for row in figures["by_subject"].values())
    assert figures["accuracy"] == pytest.approx(right / 15)
    mean = sum(row["accuracy"] for row in figures["by_subject"].values()) / 3
    assert figures["mean_by_subject"] == pytest.approx(mean)
    assert "cut" not in figures
    for name, row in figures["by_subject"].items():
        shown = next(line.split() for line in table if line.startswith(name))
        assert shown[1:3] == [str(row["questions"]), f"{row['accuracy']:.3f}"]

    assert evaluate(base, *flags, "--shots", "2").status == 0
    assert "law holds 2 questions, not 3" in evaluate(base, *flags, "--shots", "3").error_line(status=2)


def test_a_question_without_an_option_is_named(base, evaluate, tmp_path):
    row = dict(question="?", A="1", B="2", C="3", D="4", answer="A")
    file = write_questions(tmp_path / "q.csv", [row, row | {"C": ""}])
    assert "question 2 has no c" in evaluate(base, "--choice", file).error_line(status=2)


# ----------------------------------------------------------------------------------------------------------- one answer


def test_a_base_model_goes_on_from_the_prompt(base, evaluate):
    flags = ["--prompt", "春天", "--max_new_tokens", "12"]
    result = evaluate(base, *flags, "--temperature", "0", "--repetition_penalty", "1")
    assert result.status == 0, result.err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = tokenizer("春天", return_tensors="pt").input_ids
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert result.out.rstrip("\n") == tokenizer.decode(generated[0], skip_special_tokens=True).rstrip("\n")
    assert "12 tokens" in result.err


def test_the_seed_decides_the_answer(base, evaluate):
    flags = ["--prompt", "春天", "--max_new_tokens", "20", "--temperature", "1"]
    first, again, other = (evaluate(base, *flags, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_an_answer_per_line_of_a_batch_in_its_order(chat, evaluate, tmp_path):
    prompts = ["你好", "What is the name of the cat that sat on the mat?", "一", "水在一百度时"]
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt, "id": n} for n, prompt in enumerate(prompts)])
    greedy = ["--temperature", "0", "--max_new_tokens", "10"]
    result = evaluate(chat, "--batch", file, "--batch_size", "3", *greedy)
    assert result.status == 0, result.err
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [(record["id"], record["prompt"]) for record in records] == list(enumerate(prompts))
    for record in records:
        assert evaluate(chat, "--prompt", record["prompt"], *greedy).out == record["answer"] + "\n"


def test_a_batch_of_answered_records_keeps_their_reference(chat, evaluate, tmp_path):
    file = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "你好", "answer": "right"}])
    for _ in range(2):  # the second time on its own output
        result = evaluate(chat, "--batch", file, "--max_new_tokens", "2", "--temperature", "0")
        [record] = map(json.loads, result.out.splitlines())
        assert record["reference_answer"] == "right"
        file = write_jsonl(tmp_path / "answered.jsonl", [record])
    assert [*record] == ["prompt", "reference_answer", "answer"]


def test_answers_are_json_of_a_schema(chat, base, evaluate, tmp_path, monkeypatch):
    properties = {"n": {"type": "integer"}, "kind": {"enum": ["甲", "乙"]}}
    schema = {"type": "object", "properties": properties, "required": ["kind", "n"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema), "utf-8")
    (tmp_path / "asked.jsonl").write_text('{"prompt": "一"}\n{"prompt": "二"}\n', "utf-8")
    flags = ["--json_schema", tmp_path / "schema.json", "--temperature", 1, "--think", "off", "--max_new_tokens", 40]
    answers = [evaluate(chat, "--prompt", "你好", *flags).out]
    answers += [
        json.loads(line)["answer"]
        for line in evaluate(chat, "--batch", tmp_path / "asked.jsonl", *flags).out.splitlines()
    ]
    answers.append(evaluate(base, "--prompt", "春天", *flags).out.removeprefix("春天"))
    for answer in map(json.loads, answers):
        assert answer["kind"] in ("甲", "乙")
        assert isinstance(answer["n"], int)
    assert "the answer may have 3" in evaluate(chat, "--prompt", "x", *flags[:-1], 3).error_line(2)
    (tmp_path / "schema.json").write_text("{", "utf-8")
    assert "schema.json is not a JSON schema" in evaluate(chat, "--prompt", "x", *flags).error_line(2)
    assert "--tools" in evaluate(chat, "--prompt", "x", *flags, "--tools", "calculator").error_line(2)
    monkeypatch.setitem(sys.modules, "llguidance", None)  # not installed
    (tmp_path / "schema.json").write_text("{}", "utf-8")
    assert "pip install -r requirements/serve.txt" in evaluate(chat, "--prompt", "x", *flags).error_line(2)


def test_the_newest_model_is_taken_wherever_serve_finds_one(base, tmp_path, run_here, monkeypatch):
    folders = ["pretrain", "sft", "quickstart/dpo", ".sft.123.new"]
    for age, folder in zip((300, 200, 100, 0), folders):  # the last is still being written
        shutil.copytree(base, tmp_path / "out" / folder)
        path = tmp_path / "out" / folder / "model.safetensors"
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run_here("eval.py").out.startswith(f"out{os.sep}quickstart{os.sep}dpo: ")
    assert [*find_models([])] == ["quickstart/dpo", "sft", "pretrain"]
    (tmp_path / "out/sft").rename(tmp_path / "out/.grpo.new")  # killed before the last rename
    assert [path.name for path in find_checkpoints(tmp_path / "out")] == ["dpo", "grpo", "pretrain"]


def test_an_adapter_is_followed_to_its_base(base, tmp_path, evaluate):
    model = load_model(base)
    apply_lora(model, 4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.2)
    save_model(tmp_path / "lora", model, TOKENIZER, base)
    greedy = ["--prompt", "春天", "--temperature", "0", "--max_new_tokens", "12"]
    expected = evaluate(base, "--lora", tmp_path / "lora", *greedy).out
    assert evaluate(tmp_path / "lora", *greedy).out == expected != evaluate(base, *greedy).out


# --------------------------------------------------------------------------------------------------------- conversation


def test_a_base_model_goes_on_from_piped_lines(base):
    """A process of its own, which ends where its input ends."""
    command = [sys.executable, "eval.py", "--model", base, "--max_new_tokens", "5", "--temperature", "0"]
    run = dict(cwd=ROOT, capture_output=True, encoding="utf-8", timeout=TIMEOUT)
    result = subprocess.run(command, input="春天\n\nThe cat\n", **run)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") >= 4
    assert result.stderr.count("[5 tokens") == 2, "an empty line is no prompt"
    assert "Traceback" not in result.stderr


@pytest.fixture
def talk(evaluate, monkeypatch):
    """talk(model, lines) types the lines and returns what came."""

    def type_lines(model, lines: list[str], *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return evaluate(model, "--max_new_tokens", "8", "--seed", "0", *flags)

    return type_lines


def saved_chat(path) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in json.loads(path.read_text("utf-8"))["messages"]]


def test_commands_of_the_conversation(chat, talk, tmp_path):
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    lines = ["/system 简短", "你好", "春天", f"/save {before}", "/clear", "花", f"/save {after}", "/exit", "never read"]
    result = talk(chat, lines)
    assert (result.status, result.err.count("tokens/s")) == (0, 3)
    assert [role for role, _ in saved_chat(before)] == ["system", "user", "assistant", "user", "assistant"]
    assert saved_chat(before)[0] == ("system", "简短")
    assert saved_chat(before)[3] == ("user", "春天")
    assert [role for role, _ in saved_chat(after)] == ["system", "user", "assistant"]
    assert saved_chat(after)[1] == ("user", "花")


def test_a_command_that_is_wrong_is_answered_and_the_conversation_goes_on(chat, talk):
    result = talk(chat, ["/temperature hot", "/temperature -1", "/nonsense", "/save /no/such/folder/x", "你好"])
    assert result.status == 0
    assert result.out.count("error: ") == 3
    assert "/temperature X" in result.out
    assert result.err.count("tokens/s") == 1


def test_a_conversation_that_outgrows_the_context_slides(chat, talk):
    result = talk(chat, ["山上的花开了，小河里的水慢慢地流。"] * 12, "--system", "简短")
    assert result.status == 0
    assert "error" not in result.out
    assert result.err.count("tokens/s") == 12


def test_a_line_that_does_not_fit_is_said_and_forgotten(chat, talk, tmp_path):
    lines = ["你好", "a b c d e f g " * 60, "春天", f"/save {tmp_path / 'chat.jsonl'}"]
    result = talk(chat, lines)
    assert result.status == 0
    assert result.out.count("error: ") == 1
    roles = [role for role, _ in saved_chat(tmp_path / "chat.jsonl")]
    assert roles == ["user", "assistant"] * 2, "the line without an answer is still in the conversation"


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_no_model_at_all_names_the_command(tmp_path, run_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "python 1-pretrain.py" in run_here("eval.py").error_line(status=2)


def test_a_folder_that_is_no_model_is_one_line(tmp_path, evaluate):
    assert "no model in" in evaluate(tmp_path, "--prompt", "x").error_line(status=2)
    assert "no model in" in evaluate(tmp_path / "nothing", "--prompt", "x").error_line(status=2)


@pytest.mark.parametrize("flag", ["--perplexity", "--batch", "--choice"])
def test_an_input_file_that_is_missing_is_one_line(flag, base, evaluate, tmp_path):
    assert "nothing." in evaluate(base, flag, tmp_path / "nothing.jsonl").error_line(status=2)


@pytest.mark.parametrize("flag", ["--perplexity", "--choice"])
def test_an_empty_input_file_is_one_line(flag, base, evaluate, tmp_path):
    file = tmp_path / "input.jsonl"
    file.write_text("")
    assert file.name in evaluate(base, flag, file).error_line(status=2)


@pytest.mark.parametrize("line", ["{", "[]", '{"wrong": "field"}', '{"text": 3}'])
def test_a_bad_record_is_one_line(line, base, evaluate, tmp_path):
    file = tmp_path / "input.jsonl"
    file.write_text(json.dumps({"text": "good"}) + "\n" + line + "\n")
    assert f"{file.name}:2" in evaluate(base, "--perplexity", file).error_line(status=2)


@pytest.mark.parametrize(
    "flags",
    [
        "--max_new_tokens 0",
        "--temperature -1",
        "--temperature nan",
        "--top_k -1",
        "--top_p -0.1",
        "--top_p 1.5",
        "--min_p -0.1",
        "--min_p 2",
        "--repetition_penalty 0",
        "--repetition_penalty -1",
        "--device quantum",
    ],
)
def test_an_impossible_value_is_refused_with_the_flag_named(flags, base, run_here):
    result = run_here("eval.py", "--model", base, "--prompt", "x", *flags.split())
    assert result.status == 2, result.out + result.err
    assert flags.split()[0] in result.err


def test_a_prompt_longer_than_the_context_is_one_line(base, evaluate):
    assert f"context is {CONTEXT}" in evaluate(base, "--prompt", "a b c " * 100).error_line(status=2)


def test_web_is_serve_with_its_arguments(tmp_path, run_here):
    line = run_here("eval.py", "--web", tmp_path / "nothing", "--tools", "calculator").error_line(status=2)
    assert str(tmp_path / "nothing") in line  # find_models' own message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "\\ud800"}', "half a surrogate pair"),
        (f'{{"prompt": "{"a b c " * 100}"}}', "the prompt has"),
        ('{"messages": [{"role": "user", "content": 4}]}', "not a text"),
        ('{"messages": [{"role": "user", "content": 0}]}', "not a text"),
        ('{"messages": [{"content": "x"}]}', "role"),
        ('{"prompt": 4}', "not a text"),
    ],
    ids=["surrogate", "long", "number", "zero", "no role", "prompt"],
)
def test_a_bad_prompt_of_a_batch_is_named_with_its_line(content, words, chat, evaluate, tmp_path):
    (tmp_path / "batch.jsonl").write_text('{"prompt": "good"}\n' + content + "\n")
    line = evaluate(chat, "--batch", tmp_path / "batch.jsonl", "--max_new_tokens", "2").error_line(status=2)
    assert "batch.jsonl:2: " in line
    assert words in line


def test_a_text_in_another_encoding_is_one_line(base, evaluate, tmp_path):
    (tmp_path / "gbk.txt").write_bytes("子曰：学而时习之。\n".encode("gbk"))
    assert "gbk.txt:1: not UTF-8" in evaluate(base, "--perplexity", tmp_path / "gbk.txt").error_line(status=2)
    assert evaluate(base, "--prompt", "x", "--system", "\udcff", "--max_new_tokens", "2").status == 0


def test_a_model_that_computes_no_numbers_is_told(base, evaluate, tmp_path):
    model = load_model(base)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    save_model(tmp_path, model, TOKENIZER)
    for temperature in ("0", "1"):
        line = evaluate(tmp_path, "--prompt", "x", "--temperature", temperature).error_line(status=2)
        assert "weights are not finite" in line


def test_next_to_no_temperature_is_none(base, evaluate):
    flags = ["--prompt", "春天", "--max_new_tokens", "8"]
    assert evaluate(base, *flags, "--temperature", "1e-40").out == evaluate(base, *flags, "--temperature", "0").out


def test_an_option_longer_than_the_context_is_one_line(base, evaluate, tmp_path):
    row = dict(question="?", A="春天" * CONTEXT, B="2", C="3", D="4", answer="A")
    assert "context is" in evaluate(base, "--choice", write_questions(tmp_path / "q.csv", [row])).error_line(status=2)


def test_a_tokenizer_of_another_size_than_the_model_is_refused(base, evaluate, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["芥子芥子"])
    tokenizer.save(str(path))
    (tmp_path / "model" / "sums.json").unlink()
    assert "the tokenizer has 6401 tokens" in evaluate(tmp_path / "model", "--prompt", "x").error_line(status=2)


@pytest.mark.parametrize("device", ["cpu:5", "meta"])
def test_a_device_that_there_is_not_is_named(device, base, evaluate):
    assert f"--device {device}" in evaluate(base, "--prompt", "x", "--device", device).error_line(status=2)


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_closed_streams_are_an_end_of_input_and_nobody_who_reads(chat):
    command = shlex.join([sys.executable, "eval.py", "--model", str(chat), "--max_new_tokens", "2"])
    for words in (f"{command} <&-", f"{command} --prompt x >&-"):
        result = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
