"""A trained model laid out for decoding on a CPU, where every new token reads every weight once.

Layers with the same input become one product, and the weights stand in memory in the order in which threads read them.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.cli import UserError
from model.model import Attention, CausalLM, FeedForward, RMSNorm
from model.operators import Mask, apply_rope, attend

PARTS = 4  # of a product's inner dimension: one a thread, and four threads keep the memory of most machines busy
FEW_ROWS = 32  # up to here it is the reading of the weights that takes the time


class Product(nn.Module):
    """x W^T for linear layers with the same input, their outputs side by side.

    A few rows are multiplied in PARTS of the inner dimension, each of which is one piece of memory: twice as fast as
    the same product in one, in which threads and rows of W^T take turns.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        self.weight = torch.cat([linear.weight.detach() for linear in linears]).t().contiguous()  # (in, out)
        n_in, n_out = self.weight.shape
        self.parts = None if n_in % PARTS else self.weight.view(PARTS, n_in // PARTS, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) or (M, in) -> the same with out."""
        rows = x.shape[:-1].numel()
        if rows > FEW_ROWS or self.parts is None:
            return x @ self.weight
        x_parts = x.view(rows, PARTS, self.parts.shape[1]).transpose(0, 1)  # (PARTS, rows, in / PARTS)
        return torch.bmm(x_parts, self.parts).sum(0).view(*x.shape[:-1], self.weight.shape[1])


class HalfProduct(nn.Module):
    """The same with weights in float16, half as much to read; what they multiply, and the sums, stay in float32.

    int8 would be little faster, and every third or fourth greedy text would change (bench/weight_formats.py).
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.weight)


class DecodingNorm(nn.Module):
    """Computes what RMSNorm does, in half as many kernels: a token has too few numbers to keep one busy."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        size = weight.shape[-1]
        self.weight, self.root = weight.detach() * size**0.5, torch.tensor(eps * size).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(self.root) * self.weight


class DecodingAttention(nn.Module):
    """Computes what Attention does, with queries and keys in one tensor for as long as they are treated alike."""

    def __init__(self, attention: Attention, product: type[nn.Module]):
        super().__init__()
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        self.n_queries = attention.q_proj.out_features // self.head_dim
        self.n_keys = attention.k_proj.out_features // self.head_dim
        self.qkv_proj = product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = product(attention.o_proj)
        self.qk_norm = None
        if attention.qk_norm:
            weights = [attention.q_norm.weight] * self.n_queries + [attention.k_norm.weight] * self.n_keys
            self.qk_norm = DecodingNorm(torch.stack(weights), attention.q_norm.eps)  # (N + K, D)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache=None) -> Tensor:
        heads = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim)  # (B, T, N + 2 K, D)
        qk, v = heads.split((self.n_queries + self.n_keys, self.n_keys), dim=2)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        q, k = apply_rope(qk, *rope).transpose(1, 2).split((self.n_queries, self.n_keys), dim=1)
        v = v.transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # (B, K, S, D)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class DecodingFeedForward(nn.Module):
    """Computes what FeedForward does, in two products."""

    def __init__(self, feed_forward: FeedForward, product: type[nn.Module]):
        super().__init__()
        self.gate_up_proj = product(feed_forward.gate_proj, feed_forward.up_proj)
        self.down_proj = product(feed_forward.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def shared_copy(model: CausalLM) -> CausalLM:
    """Modules of their own over the same weights: one may be laid out or put to eval() and the other not."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def pack_for_decoding(model: CausalLM, half_weights: bool = False) -> CausalLM:
    """The same model with faster layers, for generate(); it cannot be trained or saved. `model` stays as it is.

    For a float32 model on a CPU, without adapters. half_weights keeps matrices in float16; UserError where torch has
    no such product.
    """
    if half_weights and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UserError("this build of torch has no product with float16 weights (FBGEMM)")
    product = HalfProduct if half_weights else Product
    packed = shared_copy(model)
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            packed.set_submodule(name, DecodingAttention(module, product))
        elif isinstance(module, FeedForward):
            packed.set_submodule(name, DecodingFeedForward(module, product))
        elif isinstance(module, RMSNorm) and not name.endswith(("q_norm", "k_norm")):
            packed.set_submodule(name, DecodingNorm(module.weight, module.eps))
    packed.lm_head = product(model.lm_head)
    return packed
