"""The operators of the decoder that have more than one implementation, and which of them is taken.

On a CPU, in float32, norm, rotation and attention are written by hand (model/cpu.py): they pass over memory less often
than torch's. Elsewhere, and under torch.compile, they are torch's. Each pair computes the same (tests/model).
Shapes as in model.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import cpu


@dataclass
class DocumentLengths:
    """A mask for rows laid end to end: each token sees those of its own document, up to itself."""

    lengths: list[int]  # they add up to B * T


Mask = DocumentLengths | Tensor | None  # a tensor is boolean, (B, 1, T, S), True where a query may look; None: causal


def by_hand(x: Tensor) -> bool:
    """Whether the passes of model/cpu.py are the fast ones, and exact: not where sums would be kept in 16 bits."""
    return x.device.type == "cpu" and x.dtype.itemsize > 2 and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467, eq. 4)."""
    if by_hand(x):
        return cpu.Norm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)  # of one type: the fused kernel


def rope_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles (RoFormer, arXiv 2104.09864, eq. 15), each (B, T, 1, D/2) in fp32."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim  # (D/2,)
    angles = position_ids[..., None, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) by its angle. x: (B, T, heads, D)."""
    if by_hand(x):
        return cpu.Rotation.apply(x, cos, sin)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def document_mask(position_ids: Tensor) -> DocumentLengths | Tensor:
    """What keeps attention inside each document of packed rows; a document begins wherever position_ids (B, T) is 0.

    By hand, the documents' lengths: then no masked pair is multiplied at all, which makes attention twice as fast.
    """
    B, T = position_ids.shape
    begins = position_ids == 0
    if by_hand(position_ids):
        begins[:, 0] = True
        starts = begins.flatten().nonzero().flatten().tolist()
        ends = [*starts[1:], B * T]
        return DocumentLengths([end - start for start, end in zip(starts, ends)])
    document = begins.cumsum(-1)
    causal = torch.ones(T, T, dtype=torch.bool, device=position_ids.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B, N, T, D) and k, v (B, K, S, D), where N / K query heads share a key head."""
    B, N, T, D = q.shape
    K = k.shape[1]
    if isinstance(mask, DocumentLengths):
        q = q.view(B, K, -1, T, D).permute(1, 0, 3, 2, 4)  # (K, B, T, N / K, D)
        q = q.flatten(1, 2).contiguous()  # (K, B * T, N / K, D)
        k = (k * D**-0.5).transpose(0, 1).flatten(1, 2)  # (K, B * T, D)
        v = v.transpose(0, 1).flatten(1, 2)
        out = cpu.DocumentAttention.apply(q, k, v, mask.lengths).view(K, B, T, -1, D)
        return out.permute(1, 0, 3, 2, 4).flatten(1, 2)  # (B, N, T, D)
    if T == 1:  # heads that share keys are then as many queries of one head: no key is copied
        grouped = q.reshape(B, K, -1, D)  # (B, K, N / K, D)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(B, N, 1, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
