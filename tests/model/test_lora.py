"""LoRA: equal to the base at step 0, to PEFT, and to itself when merged; and saved as an adapter alone."""

import json
import math

import peft
import pytest
import torch
import transformers
from helpers import TOKENIZER, snapshot
from safetensors.torch import load_file

from base.cli import UserError
from model.checkpoint import load_adapter, load_model, save_model
from model.LMConfig import PRESETS, LMConfig
from model.lora import TARGETS, apply_lora, has_lora, lora_layers, merge_lora
from model.model import CausalLM

IDS = torch.randint(0, 6400, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adapted(base_dir):
    model = load_model(base_dir).eval()
    apply_lora(model, r=8, alpha=16.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    return model


@torch.no_grad()
def test_step_zero_is_the_base_model_and_only_adapters_are_trained(base_dir):
    model = load_model(base_dir)
    before = model(IDS)
    apply_lora(model, r=4, alpha=8.0)
    assert torch.equal(model(IDS), before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_key_and_value_projections_are_adapted_though_they_are_not_square(base_dir):
    model = load_model(base_dir)
    apply_lora(model, r=4, alpha=8.0)
    assert len(lora_layers(model)) == len(TARGETS) * model.config.num_hidden_layers


@torch.no_grad()
def test_merged_equals_unmerged_and_a_second_merge_is_refused(adapted):
    before = adapted(IDS)
    assert (before - adapted(IDS + 1)).abs().max() > 0.1
    merge_lora(adapted)
    assert not has_lora(adapted)
    assert (adapted(IDS) - before).abs().max() < 1e-4
    with pytest.raises(UserError, match="no adapters to merge"):
        merge_lora(adapted)


@torch.no_grad()
def test_peft_gives_the_same_logits_and_merges_to_the_same_weights(adapted, base_dir, tmp_path):
    save_model(tmp_path, adapted, base_dir, base_dir=base_dir)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert (theirs(IDS).logits - adapted(IDS)).abs().max() < 1e-4
    merged = theirs.merge_and_unload().state_dict()
    merge_lora(adapted)
    for name, weight in adapted.state_dict().items():
        assert torch.allclose(weight, merged[name], atol=1e-6), name


@torch.no_grad()
def test_only_the_adapter_is_saved_and_it_loads_again(adapted, base_dir, tmp_path):
    save_model(tmp_path, adapted, base_dir, base_dir=base_dir)
    assert not (tmp_path / "model.safetensors").exists()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    again = load_model(base_dir).eval()
    load_adapter(again, tmp_path, base_dir)
    assert torch.equal(again(IDS), adapted(IDS))


def test_an_adapter_of_other_weights_is_refused(adapted, base_dir, tmp_path):
    save_model(tmp_path / "adapter", adapted, base_dir, base_dir=base_dir)
    torch.manual_seed(1)
    save_model(tmp_path / "other", CausalLM(LMConfig(**PRESETS["tiny"])), TOKENIZER)
    with pytest.raises(UserError, match="other weights"):
        load_adapter(load_model(tmp_path / "other"), tmp_path / "adapter", tmp_path / "other")


def test_an_adapter_that_needs_more_than_lora_is_refused(adapted, base_dir, tmp_path):
    save_model(tmp_path, adapted, base_dir, base_dir=base_dir)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        load_adapter(load_model(base_dir), tmp_path, base_dir)


def test_a_target_that_no_layer_has_is_named(base_dir):
    with pytest.raises(UserError, match=r"query.*q_proj"):
        apply_lora(load_model(base_dir), r=4, alpha=8.0, targets=("q_proj", "query"))


def test_the_head_is_refused_since_the_losses_would_pass_its_adapter_by(base_dir):
    with pytest.raises(UserError, match="lm_head"):
        apply_lora(load_model(base_dir), r=4, targets=("q_proj", "lm_head"))


def test_a_rank_below_one_is_refused(base_dir, chat_data, run_here, tmp_path):
    flags = ["--init_from", base_dir, "--data", chat_data, "--out_dir", tmp_path / "out", "--lora_rank", 0]
    assert "the rank of an adapter must be at least 1" in run_here("3-lora.py", *flags).error_line(status=2)


@pytest.mark.slow
def test_the_stage_trains_resumes_and_merges(base_dir, chat_data, run_here, tmp_path):
    out, flags = tmp_path / "lora", ["--init_from", base_dir, "--data", chat_data, "--max_seq_len", 128]
    result = run_here("3-lora.py", *flags, "--out_dir", out, "--max_steps", 4, "--eval_interval", 2)
    assert result.status == 0, result.err
    assert "of them trained" in result.out
    merged = run_here("export.py", out, "--to", "merged")
    assert merged.status == 0, merged.err
    whole, apart = load_model(tmp_path / "lora-merged"), load_model(base_dir)
    load_adapter(apart, out, base_dir)
    with torch.no_grad():
        assert (whole(IDS) - apart(IDS)).abs().max() < 1e-4
        assert (whole(IDS) - load_model(base_dir)(IDS)).abs().max() > 1e-4


def test_a_merged_model_replaces_no_model_that_it_is_made_of_and_no_work(adapted, base_dir, run_here, tmp_path):
    save_model(tmp_path / "adapter", adapted, base_dir, base_dir=base_dir)
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "thesis.md"):
        (tmp_path / "mine" / name).write_text("{}")
    before = snapshot(tmp_path) | snapshot(base_dir)
    for output in (base_dir, tmp_path / "adapter", tmp_path / "mine", tmp_path / "mine" / "thesis.md"):
        for flags in ([tmp_path / "adapter"], [base_dir, "--lora", tmp_path / "adapter"]):
            result = run_here("export.py", *flags, "--to", "merged", "--output", output)
            assert "--output" in result.error_line(status=2)
    assert snapshot(tmp_path) | snapshot(base_dir) == before


@pytest.mark.parametrize(
    "changes",
    [
        *({"r": "x"}, {"r": 2.5}, {"r": 0}, {"r": 10**9}, {"r": True}, {"lora_alpha": "x"}, {"lora_alpha": math.nan}),
        *({"lora_alpha": -1}, {"lora_dropout": 2}, {"target_modules": "q_proj"}, {"target_modules": [["q_proj"]]}),
        *({"target_modules": 5}, {"target_modules": []}),
    ],
    ids=str,
)
def test_an_adapter_with_fields_that_cannot_be_is_refused_by_name(changes, adapted, base_dir, tmp_path):
    save_model(tmp_path, adapted, base_dir, base_dir=base_dir)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=f"adapter_config.json .*{next(iter(changes))}"):
        load_adapter(load_model(base_dir), tmp_path, base_dir)


@torch.no_grad()
def test_load_model_follows_an_adapter_to_its_base(adapted, base_dir, tmp_path):
    save_model(tmp_path / "adapter", adapted, base_dir, base_dir=base_dir)
    expected = adapted(IDS)
    for merged in (load_model(tmp_path / "adapter"), load_model(base_dir, adapter=tmp_path / "adapter")):
        torch.testing.assert_close(merged.eval()(IDS), expected, atol=1e-4, rtol=0)


def test_an_adapter_is_not_merged_twice(adapted, base_dir, tmp_path):
    save_model(tmp_path / "adapter", adapted, base_dir, base_dir=base_dir)
    with pytest.raises(UserError, match="give the base model"):
        load_model(tmp_path / "adapter", adapter=tmp_path / "adapter")


def test_the_base_of_an_adapter_is_a_model_and_no_adapter(adapted, base_dir, tmp_path):
    save_model(tmp_path, adapted, base_dir, base_dir=base_dir)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(UserError, match="adapter, not a model"):
        load_model(tmp_path)
