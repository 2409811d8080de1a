"""--shard: parameters, gradients and optimizer state spread over the processes, for a model that no card holds whole.

PyTorch's fully_shard (FSDP2; ZeRO's third stage, arXiv 1910.02054): of every tensor each process keeps some rows. A
layer's weights are gathered for its forward pass, and once more for its backward pass, and dropped after each; its
gradients are added up, and each process takes its rows, as soon as they are made. Without --shard a tensor is its own
part, and all of this does nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor

from model.model import CausalLM
from training.machine import Machine


@torch.no_grad()
def place(model: CausalLM, machine: Machine) -> CausalLM:
    """Puts the model on the device, spread over the processes if this run shards; returns it.

    The weights are the first process's: it sends one tensor after the other, of which each keeps its part.
    """
    if not machine.shards:
        return model.to(machine.device)
    from torch.distributed.device_mesh import init_device_mesh  # seconds, which other runs need not wait
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    wholes = {name: tensor.detach() for name, tensor in _tensors(model)}
    mesh = init_device_mesh(machine.device.type, (machine.world_size,))
    for module in (*model.model.layers, model):  # what no layer has, the embedding and the head, goes with the model
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # the sum of the processes' gradients, not their mean
        module.set_force_sum_reduction_for_comms(True)  # which gloo can do, too
    if machine.rank > 0:
        model.to_empty(device=machine.device)
    for name, tensor in _tensors(model):
        whole = wholes[name] if machine.rank == 0 else torch.empty(tensor.shape)
        dist.broadcast(whole, 0)
        part(tensor).copy_(part(cut(whole, tensor)))
    model.apply_function = MethodType(lambda model, function, *args: function(model, *args), model)
    register_fsdp_forward_method(model, "apply_function")
    return model


def _tensors(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def call(function: Callable, model: CausalLM, *args):
    """function(model, *args), which computes with the model and may read the head's weight past its forward."""
    if not hasattr(model, "apply_function"):
        return function(model, *args)
    result = model.apply_function(function, *args)
    if not torch.is_grad_enabled():
        model.reshard()  # which else the backward pass does
    return result


def is_spread(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def part(tensor: Tensor) -> Tensor:
    """The rows of a tensor that are here; they share its memory."""
    return tensor.to_local() if is_spread(tensor) else tensor


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [part(tensor) for tensor in tensors]


def join(rows: Tensor, like: Tensor) -> Tensor:
    """The tensor of which these are the rows that are here, spread as `like` is."""
    if not is_spread(like):
        return rows
    from torch.distributed.tensor import DTensor

    layout = (like.device_mesh, like.placements)
    return DTensor.from_local(rows, *layout, run_check=False, shape=like.shape, stride=like.stride())


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, spread as `like` is, if it has its shape: a copy of the rows that belong here."""
    if not is_spread(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach(), like.device_mesh, like.placements, src_data_rank=None).clone()
