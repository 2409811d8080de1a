"""A trained model with its weights packed for decoding, where every new token reads every weight once.

Layers with the same input become one matrix product. On a CPU weights are contiguous in the order in which threads read
them. On a GPU, where a token's kernels are so small that launching them takes the time, there are fewer of them, and
weights and cache have 16 bits if the GPU has bfloat16. The layers below repeat the forward passes of model/model.py;
compare() checks that they still agree.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.cli import UserError
from engine.cache import KVCache
from model.cpu import rotate
from model.model import Attention, CausalLM, FeedForward, RMSNorm
from model.operators import Mask, attend, card_capability

PARTS = 8  # of a product's inner dimension: threads take them in turn, each reading contiguous memory
FEW_ROWS = 32  # up to this many rows, reading the weights takes most of the time
MANY_ROWS = 64  # from here on, a product in float32 is worth the conversion of int8 weights


class PackedLinear(nn.Module):
    """x W^T + b for linear layers with the same input, with their outputs concatenated.

    A few rows are multiplied in PARTS of the inner dimension, each of which is contiguous in memory. This is twice as
    fast as a single product, in which the threads interleave their reads of W^T.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        self.weight = torch.cat([linear.weight.detach() for linear in linears]).t().contiguous()  # (in, out)
        self.bias = joined_bias(linears)
        n_in, n_out = self.weight.shape
        self.parts = None if n_in % PARTS else self.weight.view(PARTS, n_in // PARTS, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) or (M, in) -> the same with out."""
        rows = x.shape[:-1].numel()
        if rows > FEW_ROWS or self.parts is None:
            y = x @ self.weight
        else:
            x_parts = x.view(rows, PARTS, self.parts.shape[1]).transpose(0, 1)  # (PARTS, rows, in / PARTS)
            y = torch.bmm(x_parts, self.parts).sum(0).view(*x.shape[:-1], self.weight.shape[1])
        return y if self.bias is None else y + self.bias


def joined_bias(linears: tuple[nn.Linear, ...]) -> Tensor | None:
    return None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])


class HalfLinear(nn.Module):
    """The same with float16 weights, which halves the bytes to read; activations and sums stay in float32."""

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight, joined_bias(linears))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.weight)


class Int8Linear(nn.Module):
    """The same with int8 weights and a scale for each output, a quarter of the bytes; activations are in bfloat16.

    torch has faster products (torch.ops.quantized.linear_dynamic) that round activations to 8 bits too. With them the
    perplexity of SmolLM2-135M rises by 2% to 52%, because a few of its activations are a thousand times the others;
    with these weights alone it rises by 0.3%.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])  # (out, in)
        self.scales = (weight.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()  # (out,)
        self.weight = (weight / self.scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.bias = joined_bias(linears)
        self.in_blocks = weight.shape[0] % 4 == 0 and weight.shape[1] % 32 == 0  # torch's kernel reads whole blocks

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()  # (M, in)
        if not self.in_blocks or not 0 < len(rows) <= MANY_ROWS:
            y = (rows.float() @ (self.weight.t() * self.scales.float())).bfloat16()
        else:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales)
        y = y.float().view(*x.shape[:-1], len(self.weight))
        return y if self.bias is None else y + self.bias


class FusedLinear(nn.Module):
    """The same on a GPU, in its precision."""

    def __init__(self, *linears: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.cat([linear.weight.detach() for linear in linears]).to(dtype)  # (out, in)
        bias = joined_bias(linears)
        self.bias = None if bias is None else bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class FusedNorm(nn.Module):
    """RMSNorm on a GPU: torch's kernel, which takes one dtype and sums in float32; weight (H,), or (heads, D)."""

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight, self.eps = weight.detach().to(dtype), eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape[-1:], None, self.eps) * self.weight


class DecodingNorm(nn.Module):
    """RMSNorm in half as many kernels: with one token, starting a kernel takes longer than its arithmetic."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        size = weight.shape[-1]
        self.weight, self.root = weight.detach() * size**0.5, torch.tensor(eps * size).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(self.root) * self.weight


class DecodingAttention(nn.Module):
    """Attention, with queries and keys in one tensor until they are used differently."""

    def __init__(self, attention: Attention, linear: Callable[..., nn.Module], norm: Callable[..., nn.Module]):
        super().__init__()
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        self.n_queries = attention.q_proj.out_features // self.head_dim
        self.n_keys = attention.k_proj.out_features // self.head_dim
        self.qkv_proj = linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = linear(attention.o_proj)
        self.qk_norm = None
        if attention.qk_norm:
            weights = [attention.q_norm.weight] * self.n_queries + [attention.k_norm.weight] * self.n_keys
            self.qk_norm = norm(torch.stack(weights), attention.q_norm.eps)  # (N + K, D)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache=None) -> Tensor:
        heads = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim)  # (B, T, N + 2 K, D)
        qk, v = heads.split((self.n_queries + self.n_keys, self.n_keys), dim=2)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        q, k = rotate(qk, *rope).transpose(1, 2).split((self.n_queries, self.n_keys), dim=1)
        v = v.transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # (B, K, S, D)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class DecodingFeedForward(nn.Module):
    """FeedForward in two matrix products."""

    def __init__(self, feed_forward: FeedForward, linear: Callable[..., nn.Module]):
        super().__init__()
        self.act_fn = feed_forward.act_fn
        self.gate_up_proj = linear(feed_forward.gate_proj, feed_forward.up_proj)
        self.down_proj = linear(feed_forward.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def shared_copy(model: CausalLM) -> CausalLM:
    """Separate modules that share the weights: one may be packed, or in eval mode, and the other not."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


# On a CPU, by --weight_dtype: the products of the layers and of the output head, and the tolerance of compare(). The
# head stays in float16, because bfloat16 logits would often be equal.
FORMATS = {
    "float32": (PackedLinear, PackedLinear, 1e-3),
    "float16": (HalfLinear, HalfLinear, 0.05),
    "int8": (Int8Linear, HalfLinear, 1.0),
}


class Layers(NamedTuple):
    """What takes the place of layers for decoding."""

    linear: Callable[..., nn.Module]
    head: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dtype: torch.dtype  # of activations and cache
    tolerance: float  # of compare()


def decoding_layers(device: torch.device, weight_dtype: str) -> Layers:
    if device.type == "cpu":
        linear, head, tolerance = FORMATS[weight_dtype]
        return Layers(linear, head, DecodingNorm, torch.float32, tolerance)
    return gpu_layers(torch.bfloat16 if card_capability(device) >= (8, 0) else torch.float32)


def gpu_layers(dtype: torch.dtype) -> Layers:
    narrow = dtype == torch.bfloat16
    head = partial(FusedLinear, dtype=torch.float16 if narrow else dtype)
    return Layers(
        partial(FusedLinear, dtype=dtype), head, partial(FusedNorm, dtype=dtype), dtype, 0.3 if narrow else 1e-3
    )


def pack_for_decoding(model: CausalLM, weight_dtype: str = "float32") -> CausalLM:
    """A copy of the model with faster layers, for generation only; it cannot be trained or saved.

    The model is in float32 and without adapters. weight_dtype: of the matrices on a CPU, one of FORMATS; UserError if
    this build of torch cannot multiply them.
    """
    if weight_dtype != "float32" and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UserError("this build of torch has no matrix product with float16 weights (FBGEMM)")
    embedding = model.model.embed_tokens.weight
    linear, head, norm, dtype, tolerance = decoding_layers(embedding.device, weight_dtype)
    packed = shared_copy(model)
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            packed.set_submodule(name, DecodingAttention(module, linear, norm))
        elif isinstance(module, FeedForward):
            packed.set_submodule(name, DecodingFeedForward(module, linear))
        elif isinstance(module, RMSNorm) and not name.endswith(("q_norm", "k_norm")):
            packed.set_submodule(name, norm(module.weight, module.eps))
    packed.lm_head = head(model.lm_head)
    if dtype != embedding.dtype:
        packed.model.embed_tokens = nn.Embedding.from_pretrained(embedding.detach().to(dtype))
    key = (repr(model.config), weight_dtype, embedding.device.type)
    if key not in _COMPARED and embedding.device.type != "meta":
        _COMPARED.add(key)
        compare(model, packed, tolerance)
    return packed


_COMPARED = set()  # configurations whose packed model was compared in this process


@torch.inference_mode()
def compare(model: CausalLM, packed: CausalLM, tolerance: float):
    """RuntimeError if prefill and decoding with `packed` give other logits than `model` for a few random tokens.

    tolerance: the largest difference, in standard deviations of the logits.
    """
    n = min(8, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, n), generator=generator).to(model.lm_head.weight.device)
    cache = KVCache(packed, rows=1, max_length=n)
    prefill_then_decode = ids.split([n - n // 2] + [1] * (n // 2), dim=1)
    logits = torch.cat([packed(part, cache=cache) for part in prefill_then_decode], dim=1)
    expected = model(ids)  # (1, n, V)
    differences = (logits - expected).abs().amax(-1).flatten().sort().values / expected.std()  # (n,)
    difference = differences[n // 2].item()  # not the largest: rounding may route a single token to another expert
    if difference > tolerance:  # False for NaN: weights that are not finite are reported when they generate
        raise RuntimeError(
            f"engine/decoding.py does not compute what model/model.py does: logits differ by {difference:.2g} standard "
            f"deviations, where {tolerance:g} is allowed"
        )
