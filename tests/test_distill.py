"""6-distill.py: three ways to learn from a teacher, whose answers they are, and that it does as every stage does."""

import itertools
import json
import os
import shutil
import signal
from functools import partial

import pytest
import torch
from helpers import (
    TOKENIZER,
    assert_same_tensors,
    greedy,
    records,
    saved_progress,
    steps_of,
)
from safetensors.torch import load_file, save_file

from corpus.prepared import Prepared
from model.chat import IM_END, SPECIAL_TOKENS
from model.checkpoint import load_config, load_model, save_model
from training import distillation

SHORT = "--max_new_tokens 12 --max_seq_len 64 --log_interval 1 --eval_rows 4 --batch_size 8 --questions 8".split()
SHORT += "--warmup_steps 1 --learning_rate 1e-3 --min_learning_rate 1e-4 --max_steps 3".split()


@pytest.fixture(scope="session")
def chats(brief_dir):
    """The chats that the teacher learnt from: questions and answers of one to three characters."""
    return brief_dir.parent / "data"


@pytest.fixture
def flags(brief_dir, tasks, chats, tmp_path):
    """flags(mode, out_dir, …): an untrained student, and a teacher that answers with one to three characters."""

    def of(mode: str, name: str = "out", *more, data=None) -> list:
        data = data or (tasks if mode == "on_policy" else chats)
        own = ["--mode", mode, "--teacher", brief_dir, "--init_from", brief_dir.parent / "random", "--data", data]
        return ["6-distill.py", *own, "--out_dir", tmp_path / name, *SHORT, *more]

    return of


# ------------------------------------------------------------------------------------------------- what is learnt from


@pytest.mark.parametrize("mode", ["logits", "on_policy"])
def test_the_student_comes_to_say_what_the_teacher_says(mode, flags, brief_dir, run_here, tmp_path):
    own = ["--optimizer", "muon", "--learning_rate", 1e-2, "--max_steps", 12, "--epochs", 50]
    if mode == "on_policy":  # which begins with a student that can answer: the teacher's last layer
        own += ["--init_from", brief_dir, "--keep_layers", 3]
    result = run_here(*flags(mode, "out", *own))
    assert result.status == 0, result.err
    first, *lines = records(tmp_path / "out")
    assert lines[-1]["val_divergence"] < 0.5 * first["val_divergence"]
    assert lines[-1]["val_agreement"] >= first["val_agreement"]
    assert {"divergence", "cross_entropy", "agreement", "student_entropy", "teacher_entropy"} <= lines[0].keys()
    if mode == "logits":  # bits of the text, not of the divergence
        bits = [line["val_bits_per_byte"] / line["val_cross_entropy"] for line in (first, lines[-1])]
        assert bits[0] == pytest.approx(bits[1])
    else:
        assert all(line["gap"] < 1e-4 for line in lines)
        assert {"reward", "length", "ended", "val_accuracy", "val_sampled"} <= first.keys() | lines[0].keys()


@pytest.mark.parametrize("mode", ["logits", "on_policy"])
def test_there_is_nothing_to_learn_from_oneself(mode, flags, brief_dir, run_here, tmp_path):
    result = run_here(*flags(mode, "out", "--init_from", brief_dir, "--max_steps", 1))
    assert result.status == 0, result.err
    first = records(tmp_path / "out")[0]
    assert first["val_divergence"] == pytest.approx(0, abs=1e-6)
    assert first["val_agreement"] == 1


def test_chats_are_prompts_too(flags, chats, run_here, tmp_path):
    assert run_here(*flags("on_policy", "out", data=chats)).status == 0
    line = records(tmp_path / "out")[-1]
    assert "reward" not in line
    assert line["val_divergence"] > 0
    assert "val_accuracy" not in line  # no one knows what is right


def written(folder, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """Prompts and answers that a teacher has left."""
    data = Prepared(folder, split)
    found = []
    for index in range(len(data)):
        ((ids, mask),) = data.record(index)
        begin = mask.tolist().index(1)
        assert mask[begin:].all()
        found.append((ids[:begin].tolist(), ids[begin:].tolist()))
    return found


def test_a_text_is_what_the_teacher_would_answer(flags, brief_dir, tasks, chats, run_here, start, tmp_path):
    for data in (tasks, chats):
        run = flags("text", "out", "--temperature", 0, "--prompts", 6, "--max_steps", 1, data=data)
        assert run_here(*run).status == 0
        (folder,) = (tmp_path / "distill-text").iterdir()
        answers = written(folder)
        prompts = [prompt for prompt, _ in answers]
        asked = Prepared(data, "train")
        for index, prompt in enumerate(prompts):
            ((ids, mask),) = asked.record(index)
            assert prompt == ids.tolist()[: len(ids) if data == tasks else mask.tolist().index(1)]
        model = load_model(brief_dir).eval()
        for (_, answer), alone in zip(answers, greedy(model, prompts, 12, stop_ids={IM_END}), strict=True):
            assert answer == [token for token in alone if token is not None]
        if data == chats:
            return
        files = {path.name: path.read_bytes() for path in folder.glob("train.*")}
        shutil.rmtree(folder)
        two = start(*run, processes=2).wait()
        assert [result.status for result in two] == [0, 0], two
        assert {path.name: path.read_bytes() for path in folder.glob("train.*")} == files
        shutil.rmtree(tmp_path / "distill-text")


def test_a_teacher_with_its_own_tokenizer_teaches_the_same_texts(flags, brief_dir, tasks, run_here, tmp_path):
    """The same teacher, but its tokenizer has other numbers for all pieces, and its embedding the rows to match."""
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    vocab, first = content["model"]["vocab"], len(SPECIAL_TOKENS) + 256  # control tokens and bytes keep theirs
    new_id = torch.cat((torch.arange(first), first + torch.randperm(len(vocab) - first)))
    content["model"]["vocab"] = {piece: new_id[token_id].item() for piece, token_id in vocab.items()}
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    model = load_model(brief_dir)
    model.model.embed_tokens.weight.data[new_id] = model.lm_head.weight.detach().clone()
    save_model(tmp_path / "teacher", model, tmp_path / "tokenizer")
    found = {}
    for teacher in (brief_dir, tmp_path / "teacher"):
        run = flags("text", "out", "--teacher", teacher, "--temperature", 0, "--prompts", 6, data=tasks)
        result = run_here(*run, "--max_steps", 1)
        assert result.status == 0, result.err
        (folder,) = (tmp_path / "distill-text").iterdir()
        found[teacher] = written(folder)
        shutil.rmtree(tmp_path / "distill-text")
    assert found[brief_dir] == found[tmp_path / "teacher"]
    result = run_here(*flags("logits", "out", "--teacher", tmp_path / "teacher"))
    assert "another tokenizer" in result.error_line(status=2)


def test_texts_are_written_once_and_anew_for_other_flags(flags, run_here, tmp_path, monkeypatch):
    assert run_here(*flags("text", "a", "--prompts", 8)).status == 0
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "chats_of", None)
        assert run_here(*flags("text", "b", "--prompts", 8)).status == 0
    assert_same_tensors(tmp_path / "a", tmp_path / "b")
    assert run_here(*flags("text", "c", "--prompts", 8, "--seed", 1)).status == 0
    assert len([*(tmp_path / "distill-text").iterdir()]) == 2


def test_only_right_answers_are_learnt_if_so_asked(flags, tasks, run_here, tmp_path):
    def lengths(*more) -> list[int]:
        shutil.rmtree(tmp_path / "distill-text", ignore_errors=True)
        reward = ["--reward", f"{tasks.parent / 'rewards.py'}:parity"]
        assert run_here(*flags("text", "out", "--max_steps", 1, *reward, *more, data=tasks)).status == 0
        (folder,) = (tmp_path / "distill-text").iterdir()
        return [len(answer) - 1 for _, answer in written(folder)]  # without the stop token

    every = lengths()
    assert lengths("--only_right") == [length for length in every if length % 2]
    assert any(length % 2 == 0 for length in every), "all were right, so this shows nothing"


# ------------------------------------------------------------------------------------------------------------- students


def test_a_student_of_some_layers(flags, brief_dir, run_here, tmp_path):
    own = ["--init_from", brief_dir, "--keep_layers", 0, 3, "--keep_ffn", 100]
    result = run_here(*flags("logits", "out", *own))
    assert result.status == 0, result.err
    config = load_config(tmp_path / "out")
    assert (config.num_hidden_layers, config.intermediate_size) == (2, 100)
    assert run_here(*flags("logits", "out", *own, "--max_steps", 4), "--resume").status == 0
    assert saved_progress(tmp_path / "out")["step"] == 4


def test_a_new_student_learns_texts_with_a_teacher(brief_dir, data, run_here, tmp_path):
    own = ["--teacher", brief_dir, "--preset", "tiny-moe", "--data", data, "--out_dir", tmp_path / "out", *SHORT]
    result = run_here("6-distill.py", *own, "--ce_weight", 0.5)
    assert result.status == 0, result.err
    line = records(tmp_path / "out")[-1]
    assert line["loss"] == pytest.approx(line["divergence"] + 0.5 * line["cross_entropy"], rel=1e-4)
    assert "load_max" in line
    assert "first validation loss" in result.out
    assert "warning" not in result.out


@pytest.mark.parametrize("mode", ["text", "logits", "on_policy"])
def test_an_adapter_learns(mode, flags, run_here, tmp_path):
    result = run_here(*flags(mode, "out", "--lora_rank", 2))
    assert result.status == 0, result.err
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    assert records(tmp_path / "out")[-1]["grad_norm"] > 0


# ------------------------------------------------------------------------------------------------- as every stage does


@pytest.mark.parametrize("mode", ["logits", "on_policy"])
def test_rows_at_once_one_by_one_and_in_two_processes_are_the_same_step(mode, flags, run_here, start, tmp_path):
    def weights(name: str) -> torch.Tensor:
        tensors = load_file(tmp_path / name / "model.safetensors")
        return torch.cat([tensors[name].flatten() for name in sorted(tensors)])

    run = partial(flags, mode)
    common = ["--max_steps", 1, "--optimizer", "muon"]
    by_pass = {"many": (8, 1), "one": (1, 8), "two": (4, 1)}  # rows a pass, passes; on_policy packs them as they come
    for name, (rows, passes) in by_pass.items():
        size = ["--batch_size", rows, "--accumulation_steps", passes]
        processes = 2 if name == "two" else 1
        if processes == 2:
            results = start(*run(name, *common, *size), processes=2).wait()
            assert [result.status for result in results] == [0, 0], results
        else:
            assert run_here(*run(name, *common, *size)).status == 0
    torch.testing.assert_close(weights("one"), weights("many"), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights("two"), weights("many"), atol=1e-5, rtol=1e-4)


def killed_in_pass(number: int):
    """Kills the process in this forward pass of training."""
    loss, passes = distillation.distillation_loss, itertools.count(1)

    def killing(model, batch, **rest):
        if batch.split == "train" and model.training and next(passes) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, batch, **rest)

    distillation.distillation_loss = killing


@pytest.mark.parametrize("mode", ["logits", "on_policy"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(mode, flags, start, tmp_path):
    more = ["--save_interval", 1, "--max_steps", 4, "--divergence", "jsd", "--temperature", 1.5]
    whole = start(*flags(mode, "whole", *more))
    cut = start(*flags(mode, "cut", *more), patch=partial(killed_in_pass, 3))
    assert whole.wait()[0].status == 0
    assert cut.wait()[0].status == -signal.SIGKILL
    assert 0 < saved_progress(tmp_path / "cut")["step"] < 4
    (result,) = start(*flags(mode, "cut", *more), "--resume").wait()
    assert result.status == 0, result.err
    assert_same_tensors(tmp_path / "whole", tmp_path / "cut")
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "whole")


@pytest.mark.parametrize("mode", ["logits", "on_policy"])
def test_a_teacher_without_numbers_changes_nothing_and_ends_the_run(mode, flags, brief_dir, run_here, tmp_path):
    shutil.copytree(brief_dir, tmp_path / "broken")
    path = tmp_path / "broken/model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    result = run_here(*flags(mode, "out", "--teacher", tmp_path / "broken", "--max_steps", 20, "--questions", 1))
    assert "10 steps in a row were not finite" in result.error_line(status=1)


@pytest.mark.parametrize(
    ("mode", "more", "named"),
    [
        ("logits", ["--teacher", "nobody"], "no teacher in nobody"),
        ("text", ["--teacher", "nobody"], "no teacher in nobody"),
        ("logits", ["--data", "RL"], "needs pretrain or sft data"),
        ("logits", ["--jsd_beta", 1], "give --divergence forward or reverse"),
        ("on_policy", ["--temperature", 0], "--temperature 0 is for --mode text"),
        ("logits", ["--preset", "tiny", "--keep_layers", 0], "nothing to keep"),
        ("logits", ["--preset", "tiny"], "--preset is the size of a new model"),
        ("logits", ["--keep_layers", 0, 9], "increasing numbers from 0 to 3"),
        ("logits", ["--keep_layers", 0, "--lora_rank", 2], "an adapter belongs to a model on disk"),
        ("on_policy", ["--keep_ffn", 8], "--mode text or logits"),
        ("text", ["--only_right"], "only rl data say"),
        ("text", ["--max_new_tokens", 1], "was answered within --max_new_tokens 1"),
        ("logits", ["--out_dir", "TEACHER"], "would replace the folder of --teacher"),
    ],
)
def test_what_cannot_be_is_one_line(mode, more, named, flags, tasks, brief_dir, run_here):
    words = {"RL": tasks, "TEACHER": brief_dir}
    result = run_here(*flags(mode), *[words.get(word, word) for word in more])
    assert named in result.error_line(status=2)


def test_a_foreign_teacher_teaches_but_does_not_write(flags, chats, run_here, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(GPT2Config(vocab_size=6400, bos_token_id=1, eos_token_id=2, **sizes)).save_pretrained(
        tmp_path / "gpt2"
    )
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path / "gpt2")
    for mode in ("logits", "on_policy"):
        result = run_here(*flags(mode, mode, "--teacher", tmp_path / "gpt2"))
        assert result.status == 0, result.err
    result = run_here(*flags("text", "out", "--teacher", tmp_path / "gpt2"))
    assert "does not generate with" in result.error_line(status=2)
    assert json.loads((tmp_path / "logits/run.json").read_text("utf-8"))["arguments"]["teacher"].endswith("gpt2")
