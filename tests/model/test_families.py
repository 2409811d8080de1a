"""Models of others: each family against transformers, and what their files contain beside what ours do."""

import argparse
import json
import sys

import pytest
import torch
from helpers import TOKENIZER, greedy, random_ids, random_model
from open_models import write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from base.cli import UserError
from engine.decoding import FORMATS, pack_for_decoding
from model.checkpoint import (
    TOKENIZER_FILES,
    check_model,
    load_config,
    load_model,
    load_outline,
    save_model,
    weights_fingerprint,
)
from model.LMConfig import PRESETS, LMConfig, parse_scaling
from model.lora import apply_lora, merge_lora
from model.shrink import keep_layers
from training import flags
from training.flags import parse_flags

SIZES = dict(vocab_size=6400, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=64, rope_theta=500000.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10000.0)
FAMILIES = {
    "llama": dict(model_type="llama", tie_word_embeddings=True),
    "llama-untied": dict(model_type="llama", head_dim=24),
    "llama-llama3": dict(model_type="llama", rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-linear": dict(model_type="llama", rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4)),
    "llama-yarn": dict(model_type="llama", rope_parameters=YARN),
    "llama-yarn-odd": dict(model_type="llama", rope_parameters=YARN | dict(beta_fast=24, attention_factor=1.3)),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=32),
    "mistral": dict(model_type="mistral", sliding_window=None),
}


def make_folder(directory, name: str, **saving):
    """A random model of transformers, with our tokenizer; returns it."""
    torch.manual_seed(len(name))
    family = dict(FAMILIES[name])
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.pop("model_type"), **SIZES | family)).eval()
    for parameter in theirs.parameters():  # biases would be zero, norms one, and angles hardly matter
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    theirs.save_pretrained(directory, **saving)
    for file in TOKENIZER_FILES:
        if (TOKENIZER / file).exists():
            (directory / file).write_bytes((TOKENIZER / file).read_bytes())
    return theirs


def change(path, **changes):
    content = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}), "utf-8")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_texts_are_those_of_transformers(name, tmp_path):
    theirs, ids = make_folder(tmp_path, name), random_ids(2, 200)
    ours = load_model(tmp_path).eval()
    assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
    prompts = [ids[0, :90].tolist(), ids[1, :7].tolist()]
    expected = []
    for prompt in prompts:
        text = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=-1)
        expected.append(text[0, len(prompt) :].tolist())
    assert greedy(ours, prompts, 20) == greedy(pack_for_decoding(ours), prompts, 20) == expected


@pytest.mark.parametrize("weight_dtype", FORMATS)
@torch.no_grad()
def test_biases_are_added_in_every_format_of_the_weights(weight_dtype, tmp_path):
    make_folder(tmp_path, "qwen2")
    model, ids = load_model(tmp_path).eval(), random_ids(1, 20)
    for name, parameter in model.named_parameters():
        if "bias" not in name and parameter.dim() > 1:
            parameter.mul_(0.3)  # so that biases matter and rounding does not
    logits = model(ids)
    packed = pack_for_decoding(model, weight_dtype)
    assert (packed(ids) - logits).abs().mean() < 0.05 * logits.std()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.zero_()
    assert (model(ids) - logits).abs().mean() > 0.1 * logits.std()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_saved_model_keeps_its_configuration(name, tmp_path):
    theirs, ids = make_folder(tmp_path / "from", name), random_ids(2, 150)
    change(tmp_path / "from" / "config.json", comment="kept", dtype="bfloat16")
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [7, 4], "pad_token_id": 9}
    (tmp_path / "from" / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    model = load_model(tmp_path / "from")
    assert model.stop_token_ids == [7, 4]
    save_model(tmp_path / "to", model, tmp_path / "from")
    before, after = (json.loads((tmp_path / part / "config.json").read_text("utf-8")) for part in ("from", "to"))
    assert after == before | {"dtype": "float32"}  # what the weights are saved in
    saved = json.loads((tmp_path / "to" / "generation_config.json").read_text("utf-8"))
    assert saved == {"bos_token_id": 1} | generation
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "to").eval()
    assert type(again) is type(theirs)
    assert torch.allclose(again(ids).logits, theirs(ids).logits, atol=1e-4)


def test_a_change_is_the_only_change_of_a_saved_configuration(tmp_path):
    make_folder(tmp_path, "llama-llama3")
    config = load_config(tmp_path)
    assert config.to_hf() == config.hf
    config.tie_word_embeddings = False
    assert config.to_hf() == config.hf | {"tie_word_embeddings": False}
    config.rope_scaling = {"rope_type": "linear", "factor": 2.0}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}
    assert config.to_hf()["rope_parameters"] == rope
    assert LMConfig.from_hf(config.to_hf()).rope_scaling == config.rope_scaling


@torch.no_grad()
def test_a_pruned_model_is_one_of_its_family(tmp_path):
    make_folder(tmp_path / "from", "qwen3")
    assert "layer_types" in json.loads((tmp_path / "from" / "config.json").read_text("utf-8"))
    pruned, ids = keep_layers(load_model(tmp_path / "from"), [0, 2]), random_ids(1, 20)
    save_model(tmp_path / "to", pruned, tmp_path / "from")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    assert torch.allclose(pruned(ids), theirs(ids).logits, atol=1e-4)


def test_the_older_fields_of_a_scaling_are_read(tmp_path):
    make_folder(tmp_path, "llama-yarn")
    change(tmp_path / "config.json", rope_parameters="gone", rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 4})
    config = load_config(tmp_path)
    expected = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512}
    assert (config.rope_theta, config.rope_scaling) == (1e6, expected)


@pytest.mark.parametrize("missing", ["rms_norm_eps", "tie_word_embeddings", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_missing_field_has_the_default_of_transformers(name, missing, tmp_path):
    make_folder(tmp_path, name)
    path = tmp_path / "config.json"
    change(path, **{missing: "gone"})
    if (name, missing) == ("qwen3", "num_key_value_heads"):  # theirs is 32: no model relies on it
        return
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert getattr(load_config(tmp_path), missing) == getattr(theirs, missing)


def test_biases_survive_an_adapter(tmp_path):
    make_folder(tmp_path, "qwen2")
    model, ids = load_model(tmp_path).eval(), random_ids(1, 30)
    before = model(ids)
    apply_lora(model, r=2)
    assert torch.equal(model(ids), before)
    merge_lora(model)
    assert torch.allclose(model(ids), before, atol=1e-5)


# ------------------------------------------------------------------------------------------------ a longer context


def test_a_flag_extends_the_context_of_a_model(tmp_path):
    model, ids = random_model(LMConfig(**PRESETS["tiny"] | dict(max_position_embeddings=32))), random_ids(1, 100)
    before = model(ids[:, :20])
    model.config.extend(parse_scaling("yarn:4"))
    assert (model.config.max_position_embeddings, model.config.rope_scaling["factor"]) == (128, 4)
    assert not torch.allclose(model(ids[:, :20]), before, atol=1e-3)
    save_model(tmp_path, model, TOKENIZER)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-4)
    assert load_config(tmp_path) == model.config
    again = load_config(tmp_path)
    again.extend(parse_scaling("linear:8"))  # of the trained length, not of the extended one
    assert again.max_position_embeddings == 256
    assert LMConfig.from_hf(again.to_hf()) == again


@pytest.mark.parametrize("text", ["yarn", "yarn:x", "yarn:0", "dynamic:2", "yarn:4:x", "linear:nan", ""])
def test_a_wrong_scaling_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_scaling(text)


def test_named_length_is_the_trained_one():
    config = LMConfig(**PRESETS["tiny"])
    config.extend(parse_scaling("llama3:4:256"))
    assert config.max_position_embeddings == 2048  # which is more than 4 x 256
    assert config.rope_scaling["original_max_position_embeddings"] == 256


# -------------------------------------------------------------------------------------------------- learning rates


def test_learning_rates_follow_the_size_of_an_open_model(tmp_path, monkeypatch):
    def rates(folder, *words):
        monkeypatch.setattr(sys, "argv", ["2-sft.py", "--init_from", str(folder), *words])
        args = parse_flags("", learning_rate=5e-4, min_learning_rate=5e-5)
        return args.learning_rate, args.min_learning_rate

    make_folder(tmp_path / "own", "llama")
    assert rates(tmp_path / "own") == (5e-4, 5e-5)
    make_folder(tmp_path / "open", "llama")
    write_tokenizer(tmp_path / "open")
    assert rates(tmp_path / "open") == (5e-4, 5e-5)  # smaller than `small`
    monkeypatch.setattr(flags, "SMALL", load_outline(tmp_path / "open").num_parameters() / 27)
    assert rates(tmp_path / "open") == (5.6e-5, 5.6e-6)  # 27^(2/3) = 9
    assert rates(tmp_path / "open", "--learning_rate", "3e-4")[0] == 3e-4
    assert rates(tmp_path / "own") == (5e-4, 5e-5)


# ------------------------------------------------------------------------------------------ files that others write


def test_shards_are_one_model(tmp_path):
    theirs = make_folder(tmp_path, "qwen2", max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert torch.allclose(load_model(tmp_path)(ids := random_ids(1, 20)), theirs(ids).logits, atol=1e-4)
    fingerprint = weights_fingerprint(tmp_path)
    check_model(tmp_path)
    shard = sorted(tmp_path.glob("model-*"))[1]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert weights_fingerprint(tmp_path) != fingerprint


@pytest.mark.parametrize("damage", ["missing", "elsewhere", "list"])
def test_a_missing_shard_is_named_in_one_line(damage, tmp_path):
    make_folder(tmp_path, "llama", max_shard_size="200KB")
    shard, index = sorted(tmp_path.glob("model-*"))[1], tmp_path / "model.safetensors.index.json"
    if damage == "missing":
        shard.unlink()
    else:
        change(index, weight_map=["a"] if damage == "list" else {"a": "../model.safetensors"})
    with pytest.raises(UserError, match=shard.name if damage == "missing" else "weight_map") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_what_older_files_repeat_is_left_out(tmp_path):
    theirs, ids = make_folder(tmp_path, "llama"), random_ids(1, 20)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        tensors[name] = torch.ones(8)
    save_file(tensors, path, {"format": "pt"})
    assert torch.allclose(load_model(tmp_path)(ids), theirs(ids).logits, atol=1e-4)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, path, {"format": "pt"})
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_model(tmp_path)


def test_weights_that_may_run_code_are_not_read(tmp_path):
    make_folder(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors files"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), '"dynamic"'),
        ("llama", dict(rope_parameters=dict(rope_type="llama3", factor=8.0)), "high_freq_factor"),
        ("llama", dict(rope_parameters=LLAMA3 | dict(low_freq_factor=4.0)), "below high_freq_factor"),
        ("llama", dict(rope_parameters=YARN | dict(factor="four")), "factor"),
        ("llama", dict(rope_parameters=YARN | dict(mscale=0.7)), "mscale"),
        ("llama", dict(attention_bias=True), "attention_bias"),
        ("llama", dict(model_type="gemma3_text"), "gemma3_text"),
        ("llama", dict(num_hidden_layers="gone"), "num_hidden_layers is missing"),
        ("mistral", dict(sliding_window=64), "sliding-window"),
        ("mistral", dict(sliding_window="gone", max_position_embeddings=32768), "sliding-window"),  # then it is 4096
        ("qwen2", dict(use_sliding_window=True), "use_sliding_window"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named_in_one_line(name, changes, named, tmp_path):
    make_folder(tmp_path, name)
    change(tmp_path / "config.json", **changes)
    with pytest.raises(UserError, match=named) as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_window_that_spans_the_context_is_none(tmp_path):
    make_folder(tmp_path, "mistral")
    change(tmp_path / "config.json", sliding_window=512)
    assert load_config(tmp_path)
