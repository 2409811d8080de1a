"""A smaller model out of a trained one: fewer layers, narrower feed-forward layers (Minitron, arXiv 2407.14679).

What is left is worse than before, and better than a new one: distillation (6-distill.py) makes good what is lost.
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from base.cli import UserError
from model.LMConfig import LMConfig
from model.model import CausalLM


def keep_layers(model: CausalLM, layers: list[int]) -> CausalLM:
    """A new model of these layers, by their numbers from 0, in their order; all else is as it was. UserError for
    numbers that do not rise, or that the model does not have."""
    n_layers = model.config.num_hidden_layers
    if not layers or any(a >= b for a, b in zip(layers, layers[1:])) or layers[0] < 0 or layers[-1] >= n_layers:
        named = " ".join(map(str, layers)) or "none"
        raise UserError(f"layers to keep are rising numbers from 0 to {n_layers - 1}, not {named}")
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
    """How busy each neuron of each dense feed-forward layer is, (I,) by layer: the mean of |silu(gate x) * up x| over
    the tokens of packed rows, (input_ids, position_ids) each (arXiv 2407.14679, 2.2)."""
    sums = [torch.zeros(model.config.intermediate_size) for _ in model.model.layers]

    def adds_to(total: Tensor):
        def add(module, inputs: tuple[Tensor]):
            total.add_(inputs[0].abs().flatten(0, -2).sum(0).cpu())

        return add

    layers = [(layer, total) for layer, total in zip(model.model.layers, sums) if not layer.has_experts]
    hooks = [layer.mlp.down_proj.register_forward_pre_hook(adds_to(total)) for layer, total in layers]
    tokens = 0
    for input_ids, position_ids in rows:
        model.model(input_ids, position_ids)
        tokens += input_ids.numel()
    for hook in hooks:
        hook.remove()
    return [total / max(tokens, 1) for total in sums]


def keep_neurons(model: CausalLM, importance: list[Tensor], size: int) -> CausalLM:
    """A new model whose feed-forward layers have only their `size` most important neurons, in their order. UserError
    for a model with experts, or where there are no more than that."""
    if model.config.use_moe:
        raise UserError("feed-forward layers with experts cannot be made narrower: keep fewer layers instead")
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
    """A model of other sizes with copies of these tensors."""
    new = CausalLM(LMConfig(**dataclasses.asdict(model.config) | sizes))
    new.load_state_dict(tensors)
    new.stop_token_ids = model.stop_token_ids
    return new
