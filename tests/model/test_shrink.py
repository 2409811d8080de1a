"""A smaller model out of a trained one: what is kept is as it was, and what cannot be is refused."""

import pytest
import torch
from helpers import TOKENIZER, random_ids, random_model
from transformers import AutoModelForCausalLM

from base.cli import UserError
from model.checkpoint import load_model, save_model
from model.LMConfig import PRESETS, LMConfig
from model.shrink import ffn_importance, keep_layers, keep_neurons


@torch.no_grad()
@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_kept_layers_are_as_they_were_and_the_rest_is_gone(preset, tmp_path):
    model = random_model(LMConfig(**PRESETS[preset]))
    small = keep_layers(model, [0, 2, 3]).eval()
    assert small.config.num_hidden_layers == 3
    for new, old in enumerate([0, 2, 3]):
        theirs = model.model.layers[old].state_dict()
        assert all(tensor.equal(theirs[name]) for name, tensor in small.model.layers[new].state_dict().items())
    ids = random_ids(2, 30)
    x = model.model.layers  # the same computation with a layer that does nothing
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(x) if i != 1)
    torch.testing.assert_close(small(ids), model(ids))
    save_model(tmp_path, small, TOKENIZER)
    assert load_model(tmp_path)(ids).equal(small(ids))
    logits = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    torch.testing.assert_close(logits, small(ids), atol=1e-3, rtol=0)


def test_dense_layers_of_a_model_with_experts_are_counted():
    config = LMConfig(**PRESETS["tiny-moe"] | dict(first_k_dense_replace=2))
    assert keep_layers(random_model(config), [1, 3]).config.first_k_dense_replace == 1
    assert keep_layers(random_model(config), [2, 3]).config.first_k_dense_replace == 0
    with pytest.raises(UserError, match="no layer would have experts"):
        keep_layers(random_model(config), [0, 1])


@pytest.mark.parametrize("layers", [[], [0, 0], [1, 0], [-1, 2], [0, 4]])
def test_layers_that_are_none_are_refused(layers):
    with pytest.raises(UserError, match="increasing numbers from 0 to 3"):
        keep_layers(random_model(LMConfig(**PRESETS["tiny"])), layers)


@torch.no_grad()
def test_the_busiest_neurons_are_kept(tmp_path):
    model = random_model(LMConfig(**PRESETS["tiny"]))
    ids, positions = random_ids(2, 30), torch.arange(15).repeat(2)[None].expand(2, -1)
    idle = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:156]  # they never say anything
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[idle] = 0
    importance = ffn_importance(model, [(ids[:1], positions[:1]), (ids[1:], positions[1:])])
    assert all(scores[idle].max() == 0 for scores in importance)
    small = keep_neurons(model, importance, 100).eval()
    torch.testing.assert_close(small(ids), model(ids), atol=1e-4, rtol=1e-4)
    save_model(tmp_path, small, TOKENIZER)
    assert load_model(tmp_path).config.intermediate_size == 100
    # The mean over all tokens, by hand, in the first layer.
    layer, inside = model.model.layers[0], []
    hook = layer.mlp.register_forward_pre_hook(lambda module, inputs: inside.append(inputs[0]))
    model.model(ids, positions)
    hook.remove()
    by_hand = (torch.nn.functional.silu(layer.mlp.gate_proj(inside[0])) * layer.mlp.up_proj(inside[0])).abs()
    torch.testing.assert_close(importance[0], by_hand.mean((0, 1)))


def test_neurons_that_are_none_are_refused():
    model = random_model(LMConfig(**PRESETS["tiny"]))
    with pytest.raises(UserError, match="must be below intermediate_size"):
        keep_neurons(model, [], 256)
    with pytest.raises(UserError, match="with experts"):
        keep_neurons(random_model(LMConfig(**PRESETS["tiny-moe"])), [], 100)
