"""Manual forward and backward passes for training on a CPU: fewer passes over memory than torch's.

Each computes the same as a function of operators.py, which GPUs and torch.compile use (tests/model/test_model.py).
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 96  # queries; longer blocks compute more masked pairs, shorter ones give too small matrix products
GROUP_SCORES = 2**15  # query-key pairs of blocks that are multiplied together: their scores stay in the cache
PADDING = 1.25  # how much longer than the shortest of them the longest is
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
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, sin, direction=-1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int = 1) -> Tensor:
    if x.dtype == cos.dtype:
        y = torch.empty_like(x)
        (a, b), (c, d) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
        torch.mul(a, cos, out=c).addcmul_(b, sin, value=-direction)
        torch.mul(b, cos, out=d).addcmul_(a, sin, value=direction)
        return y
    halves = x.view(*x.shape[:-1], 2, -1)  # in 16 bits; the sums are in float32, and a GPU launches four kernels
    y = halves * cos.unsqueeze(-2)  # (..., 2, D/2)
    (a, b), (c, d) = halves.unbind(-2), y.unbind(-2)
    c.addcmul_(b, sin, value=-direction)
    d.addcmul_(a, sin, value=direction)
    return y.flatten(-2).to(x.dtype)


class DocumentAttention(torch.autograd.Function):
    """apply(q, k, v, lengths) = softmax(q k^T) v, where a query sees the tokens of its document up to itself.

    q (K, T, G, D) contiguous and already divided by sqrt(D), k and v (K, T, D) -> (K, T, G, D), with K key-value heads,
    T tokens of all documents end to end, whose `lengths` add up to T, and G query heads that share a key-value head.

    The idea of FlashAttention-2 (arXiv 2307.08691): the scores (T, T) never exist as a whole. A block of queries meets
    the keys up to its own end, and the backward pass computes the block's probabilities again.
    """

    @staticmethod
    @float32_forward
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        out = torch.zeros_like(q)
        for group in _groups(tuple(lengths)):
            p = _probabilities(q, k, group)
            _add_product(out, group.queries, p, _blocks(v, group.keys, group.n))
        ctx.save_for_backward(q, k, v, out)
        ctx.lengths = lengths
        return out

    @staticmethod
    @float32_backward
    def backward(ctx, d_out: Tensor):
        q, k, v, out = ctx.saved_tensors
        d_out = d_out.contiguous()
        dq, dk, dv = map(torch.zeros_like, (q, k, v))
        # The softmax's gradient is p (dp - mean), with mean = sum_j p_ij dp_ij = d_out_i . out_i.
        mean = (d_out * out).sum(-1, keepdim=True)  # (K, T, G, 1)
        for group in _groups(tuple(ctx.lengths)):
            n, queries, keys, _ = group
            p = _probabilities(q, k, group)
            d_rows = _blocks(d_out, queries, n)
            _add_product(dv, keys, p.mT, d_rows)
            dp = d_rows @ _blocks(v, keys, n).mT
            d_scores = dp.sub_(_blocks(mean, queries, n)).mul_(p)
            _add_product(dq, queries, d_scores, _blocks(k, keys, n))
            _add_product(dk, keys, d_scores.mT, _blocks(q, queries, n))
        return dq, dk, dv, None


class Group(NamedTuple):
    """n blocks of t queries and s keys, in one batched product. Padding repeats other tokens, and has probability 0."""

    n: int
    queries: Tensor | slice  # positions, (n * t,)
    keys: Tensor | slice  # (n * s,): the last t of a block are its queries' own
    padding: Tensor | None  # which of the n * t queries belong to no document


@functools.lru_cache(maxsize=4)  # every layer has the same
def _groups(lengths: tuple[int, ...]) -> list[Group]:
    """Each document is cut into blocks of BLOCK queries. Short blocks of about one size are multiplied together, so
    that rows full of short chats do not need a product for each chat."""
    blocks, begin = [], 0  # (tokens of the document before the block, queries, where the document begins)
    for length in lengths:
        blocks += [(past, min(BLOCK, length - past), begin) for past in range(0, length, BLOCK)]
        begin += length
    groups = [[]]
    for past, t, begin in sorted(blocks, reverse=True):
        first, longest, _ = groups[-1][0] if groups[-1] else (past, 0, 0)
        scores = (len(groups[-1]) + 1) * longest * (past + longest)
        if past != first or t * PADDING < longest or scores > GROUP_SCORES:
            groups.append([])
        groups[-1].append((past, t, begin))
    return [_positions(group, last=sum(lengths) - 1) for group in groups]


def _positions(blocks: list[tuple[int, int, int]], last: int) -> Group:
    past, t, begin = blocks[0]  # the longest
    if len(blocks) == 1:
        return Group(1, slice(begin + past, begin + past + t), slice(begin, begin + past + t), None)
    sizes, begins = (torch.tensor(column)[:, None] for column in list(zip(*blocks))[1:])  # (n, 1)
    keys = (begins + torch.arange(past + t)).clamp(max=last)  # (n, s)
    padding = (torch.arange(t) >= sizes).flatten().nonzero().flatten()
    return Group(len(blocks), keys[:, past:].flatten(), keys.flatten(), padding)


def _blocks(x: Tensor, positions: Tensor | slice, n: int) -> Tensor:
    """(K, T, D) or (K, T, G, D) as (K * n, s, D) or (K * n, t * G, D): heads that share keys are more queries."""
    x = x[:, positions] if isinstance(positions, slice) else x.index_select(1, positions)
    return x.reshape(len(x) * n, -1, x.shape[-1])


def _add_product(x: Tensor, positions: Tensor | slice, a: Tensor, b: Tensor):
    """Adds a b, which is of the shape of _blocks(…), to x at these positions."""
    if isinstance(positions, slice):
        x[:, positions].view(len(x), -1, x.shape[-1]).baddbmm_(a, b)
    else:
        x.index_add_(1, positions, (a @ b).view(len(x), -1, *x.shape[2:]))


def _probabilities(q: Tensor, k: Tensor, group: Group) -> Tensor:
    """(K * n, t * G, s): of the group's queries for its keys, 0 for padding."""
    K, _, G, _ = q.shape
    scores = _blocks(q, group.queries, group.n) @ _blocks(k, group.keys, group.n).mT
    t = scores.shape[1] // G
    scores.view(len(scores), t, G, -1)[..., -t:] += FUTURE[:t, None, :t]
    p = scores.softmax(-1)
    if group.padding is not None:
        p.view(K, group.n * t, -1).index_fill_(1, group.padding, 0)
    return p
