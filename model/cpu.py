"""Manual forward and backward passes for training on a CPU: fewer passes over memory than torch's.

Each computes the same as a function of operators.py, which GPUs and torch.compile use (tests/model/test_model.py).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 96  # queries; longer blocks compute more masked pairs, shorter ones give too small matrix products
FUTURE = torch.full((BLOCK, BLOCK), -math.inf).triu(1)  # added to the scores of a block with itself

# Also under autocast: without hardware for bfloat16, a CPU's products take a hundred times as long.
float32_forward = torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
float32_backward = torch.amp.custom_bwd(device_type="cpu")


class Norm(torch.autograd.Function):
    """apply(x, weight, eps) = F.rms_norm over the last dimension, of size H: y = x weight r, r = 1 / rms(x)."""

    @staticmethod
    @float32_forward
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        r = mean_square.add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @float32_backward
    def backward(ctx, dy: Tensor):
        """dx = r (dy weight - x r^2 mean(dy weight x)), since dr / dx = -r^3 x / H."""
        x, weight, r = ctx.saved_tensors
        product = dy * x
        mean = (product @ weight).unsqueeze(-1).div_(x.shape[-1])  # sums over H are matrix-vector products
        dx = (dy * weight).addcmul_(x, mean.mul_(r).mul_(r), value=-1).mul_(r)
        return dx, r.flatten() @ product.flatten(0, -2), None


class Rotation(torch.autograd.Function):
    """apply(x, cos, sin) = operators.apply_rope: rotates pairs of x (..., D). The gradient is rotated back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = torch.empty_like(x)
    (a, b), (c, d) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    torch.mul(a, cos, out=c).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=d).addcmul_(a, sin)
    return y


class DocumentAttention(torch.autograd.Function):
    """apply(q, k, v, lengths) = softmax(q k^T) v, where a query attends to the tokens of its document up to itself.

    q (K, T, G, D), contiguous and divided by sqrt(D), k and v (K, T, D) -> (K, T, G, D): K key-value heads, T tokens of
    all packed documents, whose `lengths` add up to T, and G query heads per key-value head.

    As in FlashAttention-2 (arXiv 2307.08691) the scores (T, T) never exist as a whole: a block of queries is multiplied
    with the keys up to its own end, and the backward pass recomputes the block's probabilities.
    """

    @staticmethod
    @float32_forward
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        parts = []
        for begin, start, end in _blocks(lengths):
            p = _probabilities(q[:, start:end], k[:, begin:end])
            parts.append(p @ v[:, begin:end])
        out = torch.cat(parts, dim=1).view_as(q)
        ctx.save_for_backward(q, k, v, out)
        ctx.lengths = lengths
        return out

    @staticmethod
    @float32_backward
    def backward(ctx, d_out: Tensor):
        q, k, v, out = ctx.saved_tensors
        d_out = d_out.contiguous()
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        # The softmax's gradient is p (dp - mean), with mean = sum_j p_ij dp_ij = d_out_i . out_i.
        mean = (d_out * out).sum(-1, keepdim=True)  # (K, T, G, 1)
        for begin, start, end in _blocks(ctx.lengths):
            queries, d_rows = _rows(q[:, start:end]), _rows(d_out[:, start:end])
            p = _probabilities(q[:, start:end], k[:, begin:end])
            dv[:, begin:end].baddbmm_(p.mT, d_rows)
            dp = d_rows @ v[:, begin:end].mT
            d_scores = dp.sub_(_rows(mean[:, start:end])).mul_(p)
            dq.append(d_scores @ k[:, begin:end])
            dk[:, begin:end].baddbmm_(d_scores.mT, queries)
        return torch.cat(dq, dim=1).view_as(q), dk, dv, None


def _blocks(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """For each block of queries: where its document begins, and where the block starts and ends."""
    begin = 0
    for length in lengths:
        for start in range(begin, begin + length, BLOCK):
            yield begin, start, min(start + BLOCK, begin + length)
        begin += length


def _rows(x: Tensor) -> Tensor:
    """(K, t, G, D) -> (K, t * G, D): in a product, heads that share keys are further queries of one head."""
    return x.view(len(x), -1, x.shape[-1])


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Attention of queries q (K, t, G, D) to keys k (K, s, D), the last t of which are the queries': (K, t * G, s)."""
    scores = _rows(q) @ k.mT
    t = q.shape[1]
    scores.view(len(q), t, -1, k.shape[1])[..., -t:] += FUTURE[:t, None, :t]
    return scores.softmax(-1)
