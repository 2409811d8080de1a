"""Files that are cut, emptied, removed, of another run, or have a bit that flipped: refused by name, or read as before.

Every file of a run, of an adapter and of prepared data, each damaged in 15 ways, one at a time: a thousand cases. What
reads it must refuse it with a UserError that names it, or must get exactly what the whole file gives; and where nobody
reads it, `data_process.py check` must find it.
"""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import ROOT, TOKENIZER, hurry, make_documents, make_pairs, write_data

import data_process
from base.cli import UserError
from corpus import prepared
from corpus.prepared import Prepared, writing_prepared
from model.chat import encode, encode_chat, load_tokenizer
from model.checkpoint import load_adapter, load_model
from model.LMConfig import LMConfig
from model.lora import apply_lora
from model.model import CausalLM
from training import loop
from training.flags import LORA_FLAGS, parse_flags, run_settings
from training.log import read_metrics
from training.loss import evaluate, next_token_loss
from training.machine import start_machine
from training.optimizer import build_optimizer
from training.packing import PackedDataset, open_data
from training.plots import plot
from training.state import STATE_FILE, Checkpointer

FLIPS = 8  # bits of each file, one at a time, at random places
CONFIG = LMConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)


def ways(path: Path, other: Path) -> Iterator[tuple[str, bytes | None]]:
    """Names of damages, with what the file then holds; None: it is removed. other: the same file of another folder."""
    content = path.read_bytes()
    rng = random.Random(path.name)
    yield "removed", None
    yield "emptied", b""
    yield "cut to half", content[: len(content) // 2]
    yield "cut by a byte", content[:-1]
    yield "a byte longer", content + b"\0"
    yield "zeros", bytes(len(content))
    yield "of another", other.read_bytes()
    for _ in range(FLIPS if content else 0):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place} flipped", bytes(flipped)


class Survey(NamedTuple):
    """What became of the damages of a file."""

    refused: list[str]
    harmless: list[str]  # what was read is what the whole file gives


def survey(folder: Path, other: Path, name: Path, read: Callable[[Path], object]) -> Survey:
    """Damages one file of `folder` in every way. AssertionError where one is taken without a word."""
    path, result = folder / name, Survey([], [])
    whole, expected = path.read_bytes(), read(folder)
    for way, content in ways(path, other / name):
        if content == whole:
            continue
        path.unlink() if content is None else path.write_bytes(content)
        found = message = None
        try:
            found = read(folder)
        except UserError as error:
            message = str(error)
        finally:
            path.write_bytes(whole)
        if message:
            assert "\n" not in message, (way, message)
            assert name.name in message or re.search(rf"{folder}(?!/)", message), (way, message)
            result.refused.append(way)
        else:
            result.harmless.append(way)
            # Weights of another run of the same size are that run's model, whole; files of tensors go around alone.
            swapped = way == "of another" and name.name in ("model.safetensors", "adapter_model.safetensors")
            assert found == expected or swapped, f"{name}, {way}: taken without a word"
    assert read(folder) == expected
    return result


def content(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: (tensor.shape, tensor.cpu().numpy().tobytes()) for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------- checkpoints


def arguments(data: Path, out_dir: Path, *flags: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["test", *flags])
        options = dict(max_seq_len=32, batch_size=4, max_steps=2, save_interval=1, eval_rows=1, log_interval=1)
        return parse_flags("", LORA_FLAGS, data=data, out_dir=out_dir, **options)


def train_run(folder: Path, data: Path, seed: int, base: Path | None = None) -> Path:
    """A run of two steps; with `base`, of an adapter for it."""
    args = arguments(data, folder, "--seed", str(seed), *(["--init_from", str(base)] if base else []))
    machine = start_machine(args.device, args.dtype, args.seed)
    model = load_model(base) if base else CausalLM(CONFIG)
    if base:
        apply_lora(model, 2, targets=["q_proj"])
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch.setattr)
        train_set, val_set = open_data(data, None, args.max_seq_len, "pretrain")
        run = loop.Run(run_settings(args), machine, model, train_set)
        with run:
            for rows in run.steps(args.batch_size):
                run.forward_backward(next_token_loss, run.batches(rows))
                run.update()
                run.log_step(partial(evaluate, model, next_token_loss, val_set, machine, args.batch_size))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    """Two prepared folders for pretraining."""
    folders = []
    for seed in (1, 2):
        documents = make_documents("pretrain", 24, seed)
        folders.append(write_data(tmp_path_factory.mktemp("texts") / "pretrain", documents[4:], documents[:4]))
    return folders


@pytest.fixture(scope="module")
def runs(texts, tmp_path_factory) -> list[Path]:
    """Two runs of other seeds."""
    return [train_run(tmp_path_factory.mktemp("runs") / "out", texts[0], seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def adapters(texts, runs, tmp_path_factory) -> list[Path]:
    """Adapters of the first run, of other seeds."""
    return [train_run(tmp_path_factory.mktemp("adapters") / "out", texts[0], seed, runs[0]) for seed in (0, 1)]


def read_model(folder: Path):
    """What eval.py has of a model."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = encode(tokenizer, "春天来了，the cat <unk>。\n")
    return content(model.state_dict()), vars(model.config), model.stop_token_ids, ids, tokenizer.decode(ids)


def read_state(data: Path, folder: Path, base: Path | None = None):
    """What a resumed run begins with."""
    args = arguments(data, folder, "--resume", *(["--init_from", str(base)] if base else []))
    machine = start_machine(args.device, args.dtype, args.seed)
    train_set, _ = open_data(data, None, args.max_seq_len, "pretrain")
    model = load_model(base) if base else CausalLM(CONFIG)
    if base:
        apply_lora(model, 2, targets=["q_proj"])
    settings = run_settings(args)
    optimizer = build_optimizer(model, settings.optimizer)
    checkpointer = Checkpointer(settings.saving, settings.flags, machine, model, optimizer, machine.scaler(), train_set)
    try:
        progress = checkpointer.resume()
    finally:
        checkpointer.lock.release()
    moments = {checkpointer.names[p]: content(state) for p, state in optimizer.state.items()}
    return content(model.state_dict()), moments, vars(progress), machine.random_state().tolist()


MODEL_FILES = ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "sums.json"]
MODEL_FILES += ["tokenizer_config.json", "chat_template.jinja", "tokenizer.model"]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_model(name, runs):
    result = survey(runs[0], runs[1], Path(name), read_model)
    harmless = {"sums.json": ["removed", "cut by a byte"], "model.safetensors": ["of another"]}  # a line end at the end
    assert len(result.refused) >= 6 + FLIPS - 2, result
    assert [way for way in result.harmless if "flipped" not in way] == harmless.get(name, []), result


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "generation_config.json"])
def test_an_adapter(name, runs, adapters):
    def read(folder: Path):
        model = load_model(runs[0])
        load_adapter(model, folder, runs[0])
        return content(model.state_dict())

    result = survey(adapters[0], adapters[1], Path(name), read)
    assert len(result.refused) >= 6 + FLIPS - 1, result  # a bit of the word "sha256": then nothing is compared


def test_a_training_state(texts, runs, adapters):
    for folders, base in ((runs, None), (adapters, runs[0])):
        result = survey(*folders, Path(STATE_FILE), lambda folder, base=base: read_state(texts[0], folder, base))
        assert len(result.refused) == 7 + FLIPS, result


def test_a_run_reads_nothing_of_its_own_but_the_state_and_the_config(texts, runs):
    """The other files are written anew at the next save. A config that does not fit is refused."""
    for name in ("run.json", "metrics.jsonl", "loss.png", *MODEL_FILES[1:]):
        result = survey(*runs, Path(name), lambda folder: read_state(texts[0], folder))
        assert not result.refused, (name, result)
    result = survey(*runs, Path("config.json"), lambda folder: read_state(texts[0], folder))
    assert len(result.refused) >= 4, result


def test_a_log(runs):
    """What is left of it is read; no damage ends a run, or its picture."""
    path = runs[0] / "metrics.jsonl"
    whole = path.read_bytes()
    for way, damaged in ways(path, runs[1] / "metrics.jsonl"):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        records = read_metrics(runs[0])
        assert len(records) <= whole.count(b"\n"), way
        plot(records, runs[0] / "picture.png")
    (runs[0] / "picture.png").unlink()
    path.write_bytes(whole)


# -------------------------------------------------------------------------------------------------------- prepared data


def write_questions(folder: Path, seed: int) -> Path:
    tokenizer = load_tokenizer(TOKENIZER)
    with writing_prepared(folder, "rl", TOKENIZER, noted=True) as writer:
        for i in range(8):
            messages = [{"role": "user", "content": f"{seed} + {i} ="}]
            ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
            note = json.dumps({"question": messages[0]["content"], "answer": str(seed + i)})
            writer.add("val" if i < 2 else "train", [(np.array(ids, writer.dtype).tobytes(), b"")], note=note)
    return folder


def write_folder(kind: str, folder: Path, seed: int) -> Path:
    if kind == "rl":
        return write_questions(folder, seed)
    documents = make_pairs(8 + seed) if kind == "dpo" else make_documents(kind, 12, seed)
    return write_data(folder, documents[4:], documents[:4], kind)


def read_prepared(folder: Path):
    """What a stage has of a folder."""
    seen = []
    for split in ("train", "val"):
        data = Prepared(folder, split)
        seen += [data.kind, data.group, data.fingerprint, data.token_bytes.tolist(), data.meta["vocab_size"]]
        seen += [[(ids.tolist(), mask.tolist()) for ids, mask in data.record(i)] for i in range(len(data))]
        if data.kind == "rl":
            seen.append(data.notes())
        else:
            rows = PackedDataset(folder, split, 64)
            seen.append(rows.batch(np.arange(len(rows))).input_ids.tolist())
    tokenizer = load_tokenizer(data.tokenizer_dir)
    return [*seen, encode(tokenizer, "春天来了，the cat <unk>。\n")]


@pytest.mark.parametrize("kind", ["pretrain", "sft", "dpo", "rl"])
def test_prepared_data(kind, tmp_path):
    folders = [write_folder(kind, tmp_path / name / kind, seed) for name, seed in (("a", 1), ("b", 2))]
    names = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert len(names) == {"pretrain": 10, "sft": 12, "dpo": 12, "rl": 12}[kind]
    for name in names:
        result = survey(*folders, name, read_prepared)
        assert len(result.refused) >= 5 + FLIPS, (name, result)  # the tokenizers of both are the same
        assert not result.harmless or (name.name, result.harmless) == ("meta.json", ["cut by a byte"]), (name, result)


def test_large_files_are_left_to_the_command_check(tmp_path, monkeypatch, capsys):
    """A start does not read a corpus of gigabytes twice."""
    monkeypatch.setattr(prepared, "CHECKED", 64)
    folders = [write_folder("sft", tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]
    tokens = folders[0] / "train.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert read_prepared(folders[0])
    with pytest.raises(UserError, match=r"train\.bin is damaged"):
        data_process.main(["check", str(folders[1]), str(folders[0])])
    assert capsys.readouterr().out == f"{folders[1]}: every file is as it was written\n"


# ---------------------------------------------------------------------------------------------------------- the command


def test_check_names_what_is_damaged_in_a_run(runs, run_here, tmp_path):
    shutil.copytree(runs[0], tmp_path / "out")
    result = run_here("data_process.py", "check", tmp_path)
    assert (result.status, result.out) == (0, f"{tmp_path}: every file is as it was written\n")
    for name in (*MODEL_FILES, STATE_FILE):
        path = tmp_path / "out" / name
        whole = path.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), None):
            path.write_bytes(damaged) if damaged else path.unlink()
            if damaged or name not in ("sums.json", STATE_FILE):  # these may be missing: a model needs neither
                assert path.name in run_here("data_process.py", "check", tmp_path).error_line(status=2)
        path.write_bytes(whole)
    assert "contains neither" in run_here("data_process.py", "check", ROOT / "docs").error_line(status=2)


def test_a_change_that_was_meant_is_taken_when_the_sums_are_gone(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "out")
    (tmp_path / "out/generation_config.json").write_text('{"eos_token_id": [2, 4], "temperature": 0.5}')
    with pytest.raises(UserError, match=r"generation_config\.json .* delete .*sums\.json"):
        load_model(tmp_path / "out")
    (tmp_path / "out/sums.json").unlink()
    assert load_model(tmp_path / "out").stop_token_ids == [2, 4]
