"""What is on the disk: whole after a kill, untouched by a full disk, and refused with a name when it does not fit."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TOKENIZER
from safetensors.torch import load_file, save_file

from base.cli import UserError
from model.chat import EOS, IM_END
from model.checkpoint import load_config, load_model, save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training.state import check_same_config

TINY = LMConfig(**PRESETS["tiny"])
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save_model(directory, CausalLM(TINY), TOKENIZER)
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


# ---------------------------------------------------------------------------------------------------- what does not fit


def test_a_missing_tensor_is_named(saved):
    change_tensors(saved, **{NAME: None})
    with pytest.raises(UserError, match=rf"{re.escape(NAME)} is missing"):
        load_model(saved)


def test_a_tensor_that_is_left_over_is_named(saved):
    change_tensors(saved, extra__bias=torch.zeros(3))
    with pytest.raises(UserError, match=r"extra\.bias"):
        load_model(saved)


def test_a_tensor_of_another_size_is_named_with_both_sizes(saved):
    change_tensors(saved, **{NAME: torch.zeros(5, 96)})
    with pytest.raises(UserError, match=rf"{re.escape(NAME)} is \(5, 96\).*\(256, 96\)"):
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
    with pytest.raises(UserError, match=r"model\.safetensors does not fit its config\.json"):
        load_model(saved)


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"])
def test_resuming_another_size_names_the_field_and_both_values(field, saved):
    value = {"num_hidden_layers": 3, "num_key_value_heads": 3, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}[
        field
    ]
    wanted = dataclasses.replace(TINY, **{field: value})
    with pytest.raises(UserError) as error:
        check_same_config(load_config(saved), wanted, saved)
    assert re.search(rf"\({field} {getattr(TINY, field)} there, {value} here\)", str(error.value))


@pytest.mark.parametrize("size", [0, 7, 1000, -10])
def test_a_damaged_weight_file_is_one_line(size, saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="model.safetensors is damaged") as error:
        load_model(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_damaged_config_is_one_line(content, saved):
    (saved / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json") as error:
        load_model(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(missing, saved):
    (saved / missing).unlink()
    with pytest.raises(UserError, match=f"{missing}|no model in") as error:
        load_model(saved)
    assert str(saved) in str(error.value)


def test_half_precision_weights_are_loaded_in_full(saved):
    """Training counts on it: gradients and moments are float32."""
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    assert {parameter.dtype for parameter in load_model(saved).parameters()} == {torch.float32}


def test_quantized_weights_are_refused(saved):
    change_tensors(saved, **{NAME: torch.zeros(256, 96, dtype=torch.int8)})
    with pytest.raises(UserError, match="quantized"):
        load_model(saved)


@pytest.mark.parametrize(
    ("eos_token_id", "expected"), [([2, 4], True), ([2], False), (2, False), (4, True), (None, False)]
)
def test_a_chat_model_is_known_by_its_stop_tokens(eos_token_id, expected, saved):
    (saved / "sums.json").unlink()  # the change is meant
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    assert load_model(saved).is_chat == expected


def test_the_stop_tokens_are_saved(tmp_path):
    model = CausalLM(TINY)
    for stop_token_ids in ([EOS], [EOS, IM_END]):
        model.stop_token_ids = stop_token_ids
        save_model(tmp_path, model, TOKENIZER)
        assert load_model(tmp_path).stop_token_ids == stop_token_ids


def test_files_can_be_read_by_those_who_may_read_other_files(saved_once):
    (saved_once / "plain").touch()
    expected = (saved_once / "plain").stat().st_mode
    (saved_once / "plain").unlink()
    assert {path.name: path.stat().st_mode for path in saved_once.iterdir() if path.stat().st_mode != expected} == {}


# -------------------------------------------------------------------------------------------------------- no unpickling


def test_nothing_in_the_project_unpickles():
    sources = [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]
    assert ROOT / "model" / "checkpoint.py" in sources
    forbidden = re.compile(
        r"\btorch\.load\b|allow_pickle\s*=\s*True|\bread_pickle\b|weights_only\s*=\s*False|"
        r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)\b",
        re.MULTILINE,
    )
    found = {path.name: match[0] for path in sources if (match := forbidden.search(path.read_text("utf-8")))}
    assert not found
