"""What is on the disk: whole after a kill, untouched by a full disk, and refused with a name when it does not fit."""

import dataclasses
import errno
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOKENIZER, Processes
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.checkpoint import is_chat_model, load_config, load_model, load_state, save_model, save_state
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM

TINY = LMConfig(**PRESETS["tiny"])
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save_model(directory, CausalLM(TINY), TOKENIZER, is_chat=False)
    return directory


@pytest.fixture
def saved(saved_once, tmp_path):
    """A folder of a tiny model, to be damaged."""
    for path in saved_once.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_tensors(directory: Path, **tensors):
    path = directory / "model.safetensors"
    kept = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path, {"format": "pt"})


def change_config(directory: Path, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def snapshot(directory: Path) -> dict:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------- what does not fit


def test_a_missing_tensor_is_named(saved):
    change_tensors(saved, **{NAME: None})
    with pytest.raises(ValueError, match=rf"{re.escape(NAME)} is missing"):
        load_model(saved)


def test_a_tensor_that_is_left_over_is_named(saved):
    change_tensors(saved, extra__bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"extra\.bias"):
        load_model(saved)


def test_a_tensor_of_another_size_is_named_with_both_sizes(saved):
    change_tensors(saved, **{NAME: torch.zeros(5, 96)})
    with pytest.raises(ValueError, match=rf"{re.escape(NAME)} is \(5, 96\).*\(256, 96\)"):
        load_model(saved)


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_hidden_layers=3),  # a model of another depth must not load without a word
        dict(num_hidden_layers=5),
        dict(hidden_size=192),
        dict(intermediate_size=128),
        dict(vocab_size=6401),
        dict(model_type="llama"),  # the norms of query and key would be left over
        dict(tie_word_embeddings=False),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused(changes, saved):
    change_config(saved, **changes)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit its config\.json"):
        load_model(saved)


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"])
def test_resuming_another_size_names_the_field_and_both_values(field, saved):
    value = {"num_hidden_layers": 3, "num_key_value_heads": 3, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}[
        field
    ]
    wanted = dataclasses.replace(TINY, **{field: value})
    with pytest.raises(ValueError) as error:
        checkpoint.check_same_config(load_config(saved), wanted, saved)
    assert re.search(rf"\({field} {getattr(TINY, field)} there, {value} here\)", str(error.value))


@pytest.mark.parametrize("size", [0, 7, 1000, -10])
def test_a_damaged_weight_file_is_one_line(size, saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors is damaged") as error:
        load_model(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_damaged_config_is_one_line(content, saved):
    (saved / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json") as error:
        load_model(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(missing, saved):
    (saved / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing}|no model in") as error:
        load_model(saved)
    assert str(saved) in str(error.value)


def test_half_precision_weights_are_loaded_in_full(saved):
    """Training counts on it: gradients and moments are float32."""
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    assert {parameter.dtype for parameter in load_model(saved).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("eos_token_id", "expected"), [([2, 4], True), ([2], False), (2, False), (4, True), (None, False)]
)
def test_a_chat_model_is_known_by_its_stop_tokens(eos_token_id, expected, saved):
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    assert is_chat_model(saved) == expected


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_stop_tokens_are_saved(is_chat, tmp_path):
    save_model(tmp_path, CausalLM(TINY), TOKENIZER, is_chat=is_chat)
    assert is_chat_model(tmp_path) == is_chat


# ------------------------------------------------------------------------------------------------------ kill, full disk


def save_and_be_killed(folder: Path, kills: int):
    """Forks a child that saves without end, kills it at a random moment, and reads what it left; again and again.

    Every save writes one number into all weights, so that a file of two saves, or of half a one, shows.
    """
    model, rng = CausalLM(TINY), random.Random(0)

    def save(number: int):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        state = {f"weight.{name}": parameter.data for name, parameter in model.named_parameters()}
        save_state(folder, state, {"number": number})
        save_model(folder, model, TOKENIZER, is_chat=False)

    save(0)
    started = time.perf_counter()
    save(1)
    duration = time.perf_counter() - started
    last, last_model, torn = 1, 1, 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            number = last
            while True:
                number += 1
                save(number)
        time.sleep(rng.uniform(0, 2 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += any(folder.rglob("*.tmp"))
        state, info = load_state(folder)
        numbers = {value.item() for tensor in state.values() for value in (tensor.min(), tensor.max())}
        assert numbers == {info["number"]}, f"the state holds {numbers}"
        weights = {value.item() for p in load_model(folder).parameters() for value in (p.min(), p.max())}
        assert len(weights) == 1, f"the model holds {weights}"
        assert last_model <= (last_model := weights.pop()) <= info["number"], "an older model came back"
        assert last <= (last := info["number"]), "an older state came back"
    print(json.dumps({"torn": torn, "last": last}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child that it has forked")
@pytest.mark.parametrize("kills", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_while_saving_leaves_the_old_or_the_new_one_whole(kills, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (result,) = Processes(tmp_path / "logs", save_and_be_killed, tmp_path / "out", kills).wait()
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert report["torn"] > 0, "no kill came while a file was being written"
    assert report["last"] > 1, "no save came to its end"
    AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len({value.item() for p in model.parameters() for value in (p.min(), p.max())}) == 1


@pytest.fixture
def trained(data, run_here, tmp_path):
    """The flags of a run of one step that has ended, without --resume; it is in tmp_path / "out"."""
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", "--max_seq_len", "32"]
    flags += ["--batch_size", "2", "--eval_rows", "1"]
    assert run_here("1-pretrain.py", *flags, "--max_steps", "1").status == 0
    return flags


@pytest.mark.parametrize("fails", ["state.safetensors", "model.safetensors"])
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(fails, trained, run_here, tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata=None):
        save_file(tensors, path, metadata)
        if Path(path).name.startswith(fails):
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    before = snapshot(tmp_path / "out")
    error = run_here("1-pretrain.py", *trained, "--max_steps", "2", "--resume").error_line(status=1)
    assert fails in error
    assert "No space left" in error
    after = snapshot(tmp_path / "out")
    assert before.keys() == after.keys(), "something was left lying about"
    assert after[Path("model.safetensors")] == before[Path("model.safetensors")]
    if fails == "state.safetensors":
        assert after == before
    monkeypatch.undo()
    assert run_here("1-pretrain.py", *trained, "--max_steps", "2", "--resume").status == 0, "it cannot go on"


def test_a_kill_between_the_two_renames_is_mended_by_whoever_comes_next(trained, run_here, tmp_path, monkeypatch):
    rename = Path.rename

    def killed_at_the_second(path, target):
        if path.name == "out.new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_second)
    assert run_here("1-pretrain.py", *trained, "--max_steps", "2").status == 130
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.new", "out.old"]
    assert run_here("1-pretrain.py", *trained, "--max_steps", "3", "--resume").status == 0
    assert checkpoint.load_state(tmp_path / "out")[1]["progress"]["step"] == 3
    (tmp_path / "out").rename(tmp_path / "out.new")
    checkpoint.load_model(tmp_path / "out")


def limit_file_size():
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit for the size of a file")
def test_a_file_that_the_system_refuses_leaves_the_earlier_checkpoint(trained, start, tmp_path):
    before = snapshot(tmp_path / "out")
    (result,) = start("1-pretrain.py", *trained, "--max_steps", "1", patch=limit_file_size).wait()
    assert "cannot write" in result.error_line(status=1)
    assert snapshot(tmp_path / "out") == before


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(OSError, match=r"cannot write .*a\.json"):
        checkpoint.write_file(tmp_path / "a.json", lambda path: path.write_text("ne") and (path / "b").open())
    assert snapshot(tmp_path) == {Path("a.json"): b"old"}


def test_files_can_be_read_by_those_who_may_read_other_files(saved_once):
    (saved_once / "plain").touch()
    expected = (saved_once / "plain").stat().st_mode
    (saved_once / "plain").unlink()
    assert {path.name: path.stat().st_mode for path in saved_once.iterdir() if path.stat().st_mode != expected} == {}


# -------------------------------------------------------------------------------------------------------- no unpickling


def test_nothing_in_the_project_unpickles():
    sources = [*ROOT.glob("*.py"), *(ROOT / "model").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert ROOT / "model" / "checkpoint.py" in sources
    forbidden = re.compile(
        r"\btorch\.load\b|allow_pickle\s*=\s*True|\bread_pickle\b|weights_only\s*=\s*False|"
        r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)\b",
        re.MULTILINE,
    )
    found = {path.name: match[0] for path in sources if (match := forbidden.search(path.read_text("utf-8")))}
    assert not found
