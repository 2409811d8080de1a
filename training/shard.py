"""--shard: fully sharded data parallelism (FSDP), for a model that does not fit in one device's memory.

PyTorch's fully_shard (FSDP2; ZeRO's third stage, arXiv 1910.02054): parameters, gradients and optimizer state are
DTensors, of which each process stores some rows, its local shard. A layer's weights are gathered for its forward pass
and again for its backward pass, and freed after each; its gradients are reduce-scattered as soon as they are computed.
Without --shard a tensor is its own local shard, and all of this does nothing.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.model import CausalLM
from training.machine import Machine


@torch.no_grad()
def shard_model(model: CausalLM, machine: Machine) -> CausalLM:
    """Moves the model to the device, sharded over the processes if this run shards; returns it.

    The weights are those of rank 0, which broadcasts one tensor after the other; each process keeps its local shard.
    """
    if not machine.shards:
        return model.to(machine.device)
    from torch.distributed.device_mesh import init_device_mesh  # takes seconds, only needed here
    from torch.distributed.fsdp import fully_shard

    full = {name: tensor.detach() for name, tensor in _tensors(model)}
    mesh = init_device_mesh(machine.device.type, (machine.world_size,))
    for module in (*model.model.layers, model):  # the model's own group: embedding, final norm and head
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # the sum of the processes' gradients, not their mean
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    if machine.rank > 0:
        model.to_empty(device=machine.device)
    for name, tensor in _tensors(model):
        source = full[name] if machine.rank == 0 else torch.empty(tensor.shape)
        dist.broadcast(source, 0)
        local_shard(tensor).copy_(local_shard(distribute_tensor(source, tensor)))
    return model


def modules_to_compile(model: CausalLM, machine: Machine) -> list[nn.Module]:
    """The decoder, or, of a sharded model, each layer: the hooks that gather its weights interrupt the decoder's graph,
    and torch then leaves layers with gradient checkpointing uncompiled. All layers share one graph."""
    return [*model.model.layers] if machine.shards else [model.model]


def _tensors(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local_shard(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor; they share its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local_shard(tensor) for tensor in tensors]


def as_dtensor(shard: Tensor, like: Tensor) -> Tensor:
    """The DTensor whose local shard this is, sharded as `like` is."""
    if not is_dtensor(like):
        return shard
    from torch.distributed.tensor import DTensor

    layout = (like.device_mesh, like.placements)
    return DTensor.from_local(shard, *layout, run_check=False, shape=like.shape, stride=like.stride())


def distribute_tensor(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a full tensor, sharded as `like` is if it has that shape."""
    if not is_dtensor(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach(), like.device_mesh, like.placements, src_data_rank=None).clone()
