"""Pruning: fewer layers, narrower feed-forward layers (Minitron, arXiv 2407.14679).

A pruned model is worse than before but better than a new one; distillation (6-distill.py) recovers what is lost.
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from base.cli import UserError
from model.LMConfig import LMConfig
from model.model import CausalLM


def keep_layers(model: CausalLM, layers: list[int]) -> CausalLM:
    """A new model with only these layers, counted from 0; everything else is copied. UserError for numbers that do not
    increase or do not exist."""
    n_layers = model.config.num_hidden_layers
    if not layers or any(a >= b for a, b in zip(layers, layers[1:])) or layers[0] < 0 or layers[-1] >= n_layers:
        named = " ".join(map(str, layers)) or "none"
        raise UserError(f"layers to keep must be increasing numbers from 0 to {n_layers - 1}, not {named}")
    dense = sum(layer < model.config.first_k_dense_replace for layer in layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        prefix, found, rest = name.partition("model.layers.")
        if not found:
            tensors[name] = tensor
            continue
        number, _, rest = rest.partition(".")
        if int(number) in layers:
            tensors[f"{prefix}{found}{layers.index(int(number))}.{rest}"] = tensor
    return _rebuilt(model, tensors, num_hidden_layers=len(layers), first_k_dense_replace=dense)


@torch.no_grad()
def ffn_importance(model: CausalLM, rows: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The importance of each neuron of each dense feed-forward layer, (I,) per layer: the mean of |act(gate x) * up x|
    over the tokens of packed rows, each (input_ids, position_ids) (arXiv 2407.14679, 2.2)."""
    sums = [torch.zeros(model.config.intermediate_size) for _ in model.model.layers]

    def accumulate_in(total: Tensor):
        def hook(module, inputs: tuple[Tensor]):
            total.add_(inputs[0].abs().flatten(0, -2).sum(0).cpu())

        return hook

    layers = [(layer, total) for layer, total in zip(model.model.layers, sums) if not layer.has_experts]
    hooks = [layer.mlp.down_proj.register_forward_pre_hook(accumulate_in(total)) for layer, total in layers]
    tokens = 0
    for input_ids, position_ids in rows:
        model.model(input_ids, position_ids)
        tokens += input_ids.numel()
    for hook in hooks:
        hook.remove()
    return [total / max(tokens, 1) for total in sums]


def keep_neurons(model: CausalLM, importance: list[Tensor], size: int) -> CausalLM:
    """A new model whose feed-forward layers keep their `size` most important neurons, in their order. UserError for a
    model with experts, or a size that is not smaller."""
    if model.config.use_moe:
        raise UserError("feed-forward layers with experts cannot be narrowed: keep fewer layers instead")
    if not 0 < size < model.config.intermediate_size:
        raise UserError(
            f"neurons to keep must be below intermediate_size ({model.config.intermediate_size}), not {size}"
        )
    tensors = dict(model.state_dict())
    for number, scores in enumerate(importance):
        kept = scores.topk(size).indices.sort().values
        mlp = f"model.layers.{number}.mlp"
        for name in ("gate_proj", "up_proj"):
            tensors[f"{mlp}.{name}.weight"] = tensors[f"{mlp}.{name}.weight"][kept]
        tensors[f"{mlp}.down_proj.weight"] = tensors[f"{mlp}.down_proj.weight"][:, kept]
    return _rebuilt(model, tensors, intermediate_size=size)


def _rebuilt(model: CausalLM, tensors: dict[str, Tensor], **sizes: int) -> CausalLM:
    """A model with other sizes and copies of these tensors."""
    new = CausalLM(LMConfig(**dataclasses.asdict(model.config) | sizes))
    new.load_state_dict(tensors)
    new.stop_token_ids, new.end_of_turn = model.stop_token_ids, model.end_of_turn
    return new
