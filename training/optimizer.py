"""The update: Muon and AdamW, and one buffer for all gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.checkpoint import full_tensor
from model.device import to_device
from model.model import CausalLM
from training.machine import Machine, all_gather, device_dtype
from training.shard import as_dtensor, distribute_tensor, is_dtensor, local_shard, local_shards

MUON_BATCH = 2**23  # numbers whose update is computed at a time: several copies of them exist meanwhile


@dataclass(frozen=True)
class OptimizerSettings:
    optimizer: str = "adamw"  # or "muon"
    learning_rate: float = 1e-4
    embedding_factor: float = 1.0  # how much faster an untied embedding learns
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # largest norm of the gradient


@torch.no_grad()
def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Makes all singular values of each matrix (n, rows, columns) roughly 1, by Newton-Schulz iteration.

    The polynomial's coefficients are Keller Jordan's (Muon, 2024): they lift small singular values in few steps and
    leave all between about 0.7 and 1.2. In the 16 bits that a GPU is fast in, of which it returns the result; all
    numbers are below 3, so that float16 has room for them, and is nearer to the exact result than bfloat16.
    """
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices  # so that the products below are small
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(device_dtype(x.device))
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def _orthogonalize_together(matrices: Tensor) -> Tensor:
    """orthogonalize() by all processes, each a part of the matrices: all of them take a quarter of a `mini` step."""
    if not dist.is_initialized():
        return orthogonalize(matrices).to(matrices.dtype)
    rank, processes = dist.get_rank(), dist.get_world_size()
    each = math.ceil(len(matrices) / processes)
    mine = orthogonalize(matrices[rank * each : (rank + 1) * each])
    mine = F.pad(mine, (0, 0, 0, 0, 0, each - len(mine)))  # the last processes may have fewer
    result = all_gather(mine)  # in the precision that they are computed in: on GPUs 16 bits
    return result[: len(matrices)].to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for the matrices of the layers; AdamW for embedding, head and norms.

    Scaled as in arXiv 2502.16982, eq. 4, so that an update is as large as Adam's and both share a learning rate.
    Matrices of one shape are updated in batches.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, betas=(0.9, 0.95)):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=0.0, matrices=False))
        others = [group for group in self.param_groups if not group["matrices"]]  # the same dicts, so the same rates
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=True) if others else None
        if self.adamw:
            self.adamw.state = self.state  # saved and restored with the momenta

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["matrices"]:
                torch._foreach_mul_(local_shards(group["params"]), 1 - group["lr"] * group["weight_decay"])
                self._muon(group)
        if self.adamw:
            self.adamw.step()

    def _muon(self, group: dict):
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            n = max(1, MUON_BATCH // shape.numel())
            for start in range(0, len(parameters), n):
                self._update(parameters[start : start + n], group)

    def _update(self, parameters: list[Tensor], group: dict):
        """Of matrices of one shape."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = local_shards(parameter.grad for parameter in parameters)
        momenta = local_shards(self.state[parameter]["momentum"] for parameter in parameters)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
        size = -group["lr"] * 0.2 * max(parameters[0].shape) ** 0.5
        # An expert that no token was routed to is not updated: any rest of its momentum would give a full update.
        visited = torch.stack([gradient.any() for gradient in gradients]).to(updates[0].dtype)
        if is_dtensor(parameters[0]):
            dist.all_reduce(visited, dist.ReduceOp.MAX)
            updates = [full_tensor(as_dtensor(update, parameter)) for update, parameter in zip(updates, parameters)]
        updates = _orthogonalize_together(torch.stack(updates))
        for parameter, update, factor in zip(parameters, updates, visited):
            local_shard(parameter).addcmul_(local_shard(distribute_tensor(update, parameter)), factor, value=size)


def _kind(name: str, parameter: Tensor, tied: bool) -> str:
    """Which of build_optimizer's groups a parameter belongs to."""
    if parameter.dim() < 2:
        return "vectors"
    if ".layers." in name and not name.endswith(".mlp.gate.weight"):
        return "matrices"
    # Each row belongs to a token or an expert, and has a norm of its own.
    return "embedding" if "embed_tokens" in name and not tied else "tables"


def build_optimizer(model: CausalLM, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) or Muon. Vectors have no weight decay: to shrink a norm's weight regularizes nothing.

    An embedding that is not tied to the head may learn faster: its rows get gradients only where their tokens occur.
    """
    parameters = {"matrices": [], "embedding": [], "tables": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameters[_kind(name, parameter, model.config.tie_word_embeddings)].append(parameter)
    groups = [
        {
            "params": members,
            "matrices": kind == "matrices",
            "weight_decay": 0.0 if kind == "vectors" else settings.weight_decay,
            "lr_factor": settings.embedding_factor if kind == "embedding" else 1.0,
        }
        for kind, members in parameters.items()
        if members
    ]
    if settings.optimizer == "muon":
        return Muon(groups, lr=settings.learning_rate)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


class GradientBuffer:
    """All gradients as views of one flat tensor, with the step's sums at its end: one all-reduce carries everything.

    A parameter that no token reached has a zero gradient there, which no process waits for. The sums are SUMS and the
    stage's metrics, declared with their shapes, so that each has the same position in every process.
    """

    # count: tokens or pairs in the loss; positions: with padding; stop: processes that a signal asked to stop
    SUMS = ("loss", "count", "real_tokens", "positions", "flops", "stop", "seconds")

    def __init__(self, parameters: list[Tensor], metrics: dict[str, tuple[int, ...]]):
        self.metrics = list(metrics)
        self.shapes = dict.fromkeys(self.SUMS, ()) | metrics
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.spread = is_dtensor(parameters[0])  # then each process has a shard of the summed gradients
        total = sum(rows.numel() for rows in local_shards(parameters))
        self.flat = torch.zeros(total + sum(sizes.values()), device=parameters[0].device)
        self.gradients, self.sums = self.flat[:total], self.flat[total:]
        self.slices = {}
        self.host_sums = np.zeros(len(self.sums), np.float32)
        at = 0
        for name, size in sizes.items():
            self.slices[name] = slice(at, at + size)
            at += size
        at = 0
        for parameter, rows in zip(parameters, local_shards(parameters)):
            parameter.grad = as_dtensor(self.gradients[at : at + rows.numel()].view_as(rows), parameter)
            at += rows.numel()

    def add_sums(self, **sums: float | Tensor):
        """Adds to the sums of these names. KeyError for one that was not declared.

        Python numbers stay on the host until the all-reduce: each copy to the GPU would take its time.
        """
        for name, value in sums.items():
            where = self.slices[name]
            if isinstance(value, Tensor):
                self.sums[where] += value.flatten()
            else:
                self.host_sums[where] += value

    def all_reduce(self, machine: Machine, scale: float, unscale: Callable[[], None]) -> dict[str, float | np.ndarray]:
        """Sums gradients and sums over all processes, and divides the gradients by the count: multiplies them by
        scale / count, and calls unscale(). Returns the sums, and "grad_norm"; for these numbers, once per step, the
        host waits for the device.
        """
        self.sums += to_device(torch.from_numpy(self.host_sums.copy()), self.flat.device)
        self.host_sums[:] = 0
        machine.all_reduce(self.sums if self.spread else self.flat)
        count = self.sums[self.slices["count"]][0]
        if count.device.type in ("cpu", "cuda"):  # others, such as Macs, have no float64
            count = count.double()
        self.gradients.mul_((scale / count.clamp(min=1)).float())
        unscale()
        # In pieces: on a CPU the squares of 100 million numbers, summed one by one in float32, are 2% too small.
        squares = torch.stack(torch._foreach_norm(self.gradients.split(2**16))).square().sum()
        norm = (machine.all_reduce(squares) if self.spread else squares).sqrt()
        numbers = torch.cat((self.sums, norm[None])).cpu().numpy()
        result = {"grad_norm": numbers[-1].item()}
        for name, shape in self.shapes.items():
            value = numbers[self.slices[name]].reshape(shape)
            result[name] = value if shape else value.item()
        return result


def optimizer_step(optimizer, buffer: GradientBuffer, scaler, sums: dict, grad_clip: float) -> float:
    """Clips the gradients' norm and updates the weights; returns the norm before clipping. sums: all_reduce's.

    The weights stay as they are, in all processes, where the norm or a sum is not finite in any of them (NaN is
    returned), and where none of them had a token to learn from, so that momentum alone moves nothing.
    """
    norm = sums["grad_norm"]
    if not all(np.isfinite(value).all() for value in sums.values()):
        norm = math.nan
    elif sums["real_tokens"]:
        if norm > grad_clip:
            buffer.gradients.mul_(grad_clip / norm)
        optimizer.step()  # not scaler.step(), which asks the device for what the norm has already told
    scaler.update()
    buffer.flat.zero_()
    return norm
