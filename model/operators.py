"""The decoder's operators that have more than one implementation, and the choice between them.

On a CPU in float32, norm, rotation and attention have manual forward and backward passes (model/cpu.py), which pass
over memory less often than torch's. Elsewhere, and under torch.compile, torch's are used, except for the rotation.
tests/model checks that they agree. Shapes as in model.py.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import cpu


@dataclass
class DocumentLengths:
    """A mask for packed rows: each token attends to its own document, up to itself. The form that a CPU uses."""

    lengths: list[int]  # they add up to B * T


@dataclass
class CuSeqlens:
    """The same for FlashAttention, on the GPU, which does not have to wait for the CPU."""

    cu_seqlens: Tensor  # int32, (documents + 1 or more,): where each starts; then B * T, repeated
    max_seqlen: int  # no document has more tokens


# A tensor is boolean, (B, 1, T, S), True where a query attends to a key; None: causal.
Mask = DocumentLengths | CuSeqlens | Tensor | None


def card_capability(device: torch.device) -> tuple[int, int]:
    """NVIDIA's compute capability; (0, 0) for other devices. A constant for torch.compile."""
    if device.type != "cuda":
        return (0, 0)
    card = torch.cuda.get_device_properties(device)
    return card.major, card.minor


def use_manual(x: Tensor) -> bool:
    """Whether to use the manual passes of model/cpu.py: on a CPU, but not in 16 bits, where their sums lose digits."""
    return x.device.type == "cpu" and x.dtype.itemsize > 2 and not torch.compiler.is_compiling()


# Looked up once: before torch 2.13, torch.compile cannot trace is_autocast_available.
KINDS = ("cpu", "cuda", "mps", "xpu", torch._C._get_privateuse1_backend_name())  # the last: such as "npu"
HAS_AUTOCAST = {kind: torch.amp.is_autocast_available(kind) for kind in KINDS}


def product_dtype(device_type: str, otherwise: torch.dtype | None = torch.float32) -> torch.dtype | None:
    """The dtype of matrix products: autocast's if it is on."""
    known = HAS_AUTOCAST.get(device_type, False)
    return torch.get_autocast_dtype(device_type) if known and torch.is_autocast_enabled(device_type) else otherwise


def without_autocast(device_type: str):
    """A context that disables autocast, on devices that have it ("meta" has not)."""
    known = HAS_AUTOCAST.get(device_type, False)
    return torch.autocast(device_type, enabled=False) if known else contextlib.nullcontext()


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in float32 at least, even if other float32 products use TF32 (except under torch.compile)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return F.linear(x, weight)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return F.linear(x, weight)
    finally:
        torch.set_float32_matmul_precision(precision)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467, eq. 4), computed in float32 at least.

    The result has the dtype of the products that read it: several of them need not cast it one by one.
    """
    if use_manual(x):
        return cpu.Norm.apply(x, weight, eps)
    kind = x.device.type
    dtype = product_dtype(kind, None)
    if dtype is None:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    if torch.compiler.is_compiling():  # one kernel, whatever the dtypes
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype)
    # The fused kernel computes in float32 and takes one dtype. Autocast would first make a float32 copy of x; it is
    # switched off in the fast way, because torch.autocast takes longer than two kernels.
    torch.set_autocast_enabled(kind, False)
    try:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(dtype)
    finally:
        torch.set_autocast_enabled(kind, True)


def linear_layers(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """The outputs of linear layers that read the same x. Under autocast they are parts of one product: x is read once,
    and a GPU starts fewer and larger kernels."""
    dtype = product_dtype(x.device.type, None)
    if dtype is None or any(type(layer) is not nn.Linear or layer.bias is not None for layer in layers):
        return [layer(x) for layer in layers]
    weights = [layer.weight for layer in layers]
    merged = torch.cat(weights).to(dtype) if torch.compiler.is_compiling() else MergedWeight.apply(dtype, *weights)
    return F.linear(x, merged).split([len(weight) for weight in weights], dim=-1)


class MergedWeight(torch.autograd.Function):
    """apply(dtype, *weights) = torch.cat(weights).to(dtype) in one kernel, and one in the backward pass."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        ctx.sizes, ctx.dtype = [len(weight) for weight in weights], weights[0].dtype
        merged = torch.empty(sum(ctx.sizes), *weights[0].shape[1:], dtype=dtype, device=weights[0].device)
        torch._foreach_copy_(merged.split(ctx.sizes), weights)
        return merged

    @staticmethod
    def backward(ctx, d_merged: Tensor):
        return None, *d_merged.to(ctx.dtype).split(ctx.sizes)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, arXiv 2109.08668)."""
    return x.relu().square()


# By LMConfig.hidden_act: the function, and the gradient of x from that of the result (as model/experts.py needs it).
ACTIVATIONS = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "relu2": (relu2, lambda dy, x: 2 * dy * x.relu()),
    "gelu_pytorch_tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + D/2]) by its angle. x: (B, T, heads, D)."""
    if not torch.compiler.is_compiling():
        return cpu.Rotation.apply(x, cos, sin)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attention_kind(device: torch.device, dtype: torch.dtype, head_dim: int, capability=(0, 0)) -> str:
    """How packed rows attend: "manual", "flash" or "masked". dtype: of products; capability: of the card."""
    if device.type == "cpu" and not torch.compiler.is_compiling():
        return "manual"
    if device.type == "cuda" and capability >= (8, 0) and dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256:
        return "flash"
    return "masked"


def attention_here(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """attention_kind of this machine."""
    return attention_kind(device, dtype, head_dim, card_capability(device) if FLASH_WORKS else (0, 0))


def document_mask(position_ids: Tensor, kind: str, documents: CuSeqlens | None = None) -> Mask:
    """What keeps attention inside each document of packed rows; a document begins wherever position_ids (B, T) is 0.

    kind: of attention_kind. "manual" takes the documents' lengths: then no masked pair is multiplied at all, which
    makes attention twice as fast. `documents` are the same for a GPU: without them, making them waits for it once.
    """
    B, T = position_ids.shape
    begins = position_ids == 0
    if kind == "masked":
        document = begins.cumsum(-1)
        causal = torch.ones(T, T, dtype=torch.bool, device=position_ids.device).tril()
        return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]
    if kind == "flash" and documents is not None:
        return documents
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten().tolist()
    if kind == "flash":
        return CuSeqlens(torch.tensor([*starts, B * T], dtype=torch.int32, device=position_ids.device), T)
    ends = [*starts[1:], B * T]
    return DocumentLengths([end - start for start, end in zip(starts, ends)])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B, N, T, D) and k, v (B, K, S, D), where N / K query heads share a key head.

    The type of the mask says which implementation; all have this signature.
    """
    return ATTENTION_OF_MASK.get(type(mask), attend_masked)(q, k, v, mask)


def attend_manual(q: Tensor, k: Tensor, v: Tensor, mask: DocumentLengths) -> Tensor:
    """On a CPU, document by document."""
    B, N, T, D = q.shape
    K = k.shape[1]
    q = q.view(B, K, -1, T, D).permute(1, 0, 3, 2, 4)  # (K, B, T, N / K, D)
    q = q.flatten(1, 2).contiguous()  # (K, B * T, N / K, D)
    k = (k * D**-0.5).transpose(0, 1).flatten(1, 2)  # (K, B * T, D)
    v = v.transpose(0, 1).flatten(1, 2)
    out = cpu.DocumentAttention.apply(q, k, v, mask.lengths).view(K, B, T, -1, D)
    return out.permute(1, 0, 3, 2, 4).flatten(1, 2)  # (B, N, T, D)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, mask: CuSeqlens) -> Tensor:
    """FlashAttention-2 (arXiv 2307.08691), which skips pairs of different documents block by block.

    It knows no autocast, and its kernel checks nothing: q and k, which come from their norms in float32, take v's type.
    """
    assert (v.dtype.itemsize, mask.cu_seqlens.dtype) == (2, torch.int32)
    B, N, T, D = q.shape
    # The heads of a token lie beside each other already: (B, T, heads, D) before attention's transpose.
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(v.dtype) for x in (q, k, v))  # (B * T, N or K, D)
    return flash_attention(q, k, v, mask.cu_seqlens, mask.max_seqlen).view(B, T, N, D).transpose(1, 2)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The kernel behind torch.nn.attention.varlen, which exists since torch 2.10, and takes fewer key heads than query
    heads since 2.12. The kernel itself is the same in 2.6."""
    lengths, dropout, causal = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), 0.0, True
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, dropout, causal, False)[0]


FLASH_WORKS = torch.backends.cuda.is_flash_attention_available()  # whether this torch was built with it


def try_flash(device: torch.device):
    """Forward and backward once: a build may lack the kernel for this GPU, as AMD's do for some, or change its
    arguments. Where it fails, attention is masked."""
    global FLASH_WORKS
    if not FLASH_WORKS or card_capability(device) < (8, 0):
        return
    q, k, v = (
        torch.ones(16, heads, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for heads in (2, 1, 1)
    )
    try:
        out = flash_attention(q, k, v, torch.tensor([0, 7, 16], dtype=torch.int32, device=device), 16)
        FLASH_WORKS = bool(torch.autograd.grad(out.sum(), v)[0].isfinite().all())
    except (RuntimeError, TypeError):
        FLASH_WORKS = False


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's. On a GPU, key heads are repeated: no fast kernel takes a mask and fewer key than query heads at once,
    and torch would fall back to one that keeps all scores (T, S), in float32."""
    B, N, T, D = q.shape
    K = k.shape[1]
    if T == 1:  # heads that share keys are then as many queries of one head: no key is copied
        grouped = q.reshape(B, K, -1, D)  # (B, K, N / K, D)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(B, N, 1, D)
    if q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    k, v = (x.repeat_interleave(N // K, dim=1) for x in (k, v))  # (B, N, S, D)
    q, k = q.to(v.dtype), k.to(v.dtype)  # of one type, as the kernels want
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


ATTENTION_OF_MASK = {DocumentLengths: attend_manual, CuSeqlens: attend_flash}
