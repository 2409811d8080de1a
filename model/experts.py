"""The routed experts of a layer as one operator, used by GPUs in training and by torch.compile; a CPU uses a loop.

The experts' weights are stacked and the tokens sorted by expert, so that each product is a grouped matrix product: one
kernel for all experts where the GPU has it, otherwise one product per expert, which needs the groups' sizes on the CPU.
Shapes as in model.py; M tokens, M k visits (pairs of token and expert), m width of an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.operators import ACTIVATIONS, card_capability


def groups_at_once(x: Tensor, *sizes: int) -> bool:
    """Whether grouped_mm, which torch has since 2.10, has a fast kernel: bfloat16, rows of a multiple of 16 bytes, and
    NVIDIA's compute capability 9. Newer GPUs and AMD's give errors or wrong numbers (pytorch issues 172439, 174314)."""
    aligned = all(size % 8 == 0 for size in sizes)
    known = hasattr(F, "grouped_mm") and not torch.version.hip and card_capability(x.device)[0] == 9
    return known and x.dtype == torch.bfloat16 and aligned


def _groups(ends: Tensor) -> list[slice]:
    """The rows of each group; `ends` is on the CPU."""
    ends = ends.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiplies the rows of each group by its matrix: x (R, in), weight (E, in, out) -> (R, out). ends: (E,)."""
    if ends.device == x.device and groups_at_once(x, *weight.shape[1:]):
        return F.grouped_mm(x, weight, offs=ends)
    out = x.new_empty(len(x), weight.shape[2])
    for matrix, rows in zip(weight, _groups(ends)):
        torch.mm(x[rows], matrix, out=out[rows])
    return out


def weight_gradient(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy^T x of each group: dy (R, out), x (R, in) -> (E, out, in); 0 for an expert without visitors."""
    if ends.device == x.device and groups_at_once(x, dy.shape[1], x.shape[1]):
        return F.grouped_mm(dy.mT, x, offs=ends)
    out = x.new_empty(len(ends), dy.shape[1], x.shape[1])
    for gradient, rows in zip(out, _groups(ends)):
        torch.mm(dy[rows].mT, x[rows], out=gradient)
    return out


@torch.library.custom_op("jiezi::visit_experts", mutates_args=())
def visit_experts(
    tokens: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, hidden_act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_i weights[:, i] * expert[chosen[:, i]](tokens), (M, H), and what the backward pass needs.

    tokens (M, H), gate_up (E, 2 m, H), down (E, H, m) in the dtype of products; weights (M, k) and the sum in float32.
    Further outputs: visits (M k,), sorted by expert; ends (E,), of each expert's; gate and up, (M k, 2 m).
    """
    k, n_experts = chosen.shape[1], len(down)
    visits = chosen.flatten().argsort(stable=True)
    sizes = torch.zeros(n_experts, dtype=torch.int64, device=chosen.device)
    sizes.index_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
    ends = sizes.cumsum(0).int()
    if not groups_at_once(tokens, *gate_up.shape[1:], down.shape[2]):
        ends = ends.cpu()  # the only synchronization
    gate_and_up = product(tokens.index_select(0, visits // k), gate_up.mT, ends)
    outputs = product(_activate(gate_and_up, hidden_act), down.mT, ends)  # (M k, H)
    result = (_by_token(outputs, visits, k) * weights[:, :, None]).sum(1)
    return result, visits, ends, gate_and_up


def _activate(gate_and_up: Tensor, hidden_act: str) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return ACTIVATIONS[hidden_act][0](gate) * up


def _by_token(rows: Tensor, visits: Tensor, k: int) -> Tensor:
    """Reorders rows sorted by expert (M k, n) by token, (M, k, n)."""
    position = torch.empty_like(visits).scatter_(0, visits, torch.arange(len(visits), device=visits.device))
    return rows.index_select(0, position).unflatten(0, (-1, k))


@visit_experts.register_fake
def _(tokens, weights, chosen, gate_up, down, hidden_act):
    R, device = chosen.numel(), tokens.device
    at_once = groups_at_once(tokens, *gate_up.shape[1:], down.shape[2])
    ends = torch.empty(len(down), dtype=torch.int32, device=device if at_once else "cpu")
    return weights.new_empty(tokens.shape), chosen.new_empty(R), ends, tokens.new_empty(R, gate_up.shape[1])


@torch.library.custom_op("jiezi::visit_experts_backward", mutates_args=())
def visit_experts_backward(
    d_out: Tensor,
    tokens: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    visits: Tensor,
    ends: Tensor,
    gate_and_up: Tensor,
    hidden_act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of tokens, weights, gate_up and down."""
    k = weights.shape[1]
    visitors = visits // k
    weight = weights.flatten().index_select(0, visits)[:, None]  # (M k, 1)
    d_unweighted = d_out.index_select(0, visitors)  # (M k, H)
    d_outputs = (d_unweighted * weight).to(tokens.dtype)
    activated = _activate(gate_and_up, hidden_act)  # (M k, m)
    d_down = weight_gradient(d_outputs, activated, ends)
    d_hidden = product(d_unweighted.to(tokens.dtype), down, ends)
    # The weight's gradient is d_out . (down hidden) = (down^T d_out) . hidden.
    d_weights = _by_token((d_hidden * activated).sum(-1, keepdim=True, dtype=weights.dtype), visits, k)[:, :, 0]
    d_activated = (d_hidden * weight).to(tokens.dtype)
    gate, up = gate_and_up.chunk(2, dim=-1)
    act, act_backward = ACTIVATIONS[hidden_act]
    d_gate_and_up = torch.cat((act_backward(d_activated * up, gate), d_activated * act(gate)), -1)
    d_gate_up = weight_gradient(d_gate_and_up, tokens.index_select(0, visitors), ends)
    d_tokens = _by_token(product(d_gate_and_up, gate_up, ends), visits, k).sum(1)
    return d_tokens, d_weights, d_gate_up, d_down


@visit_experts_backward.register_fake
def _(d_out, tokens, weights, gate_up, down, visits, ends, gate_and_up, hidden_act):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (tokens, weights, gate_up, down))


def _keep(ctx, inputs, output):
    tokens, weights, _, gate_up, down, ctx.hidden_act = inputs
    ctx.save_for_backward(tokens, weights, gate_up, down, *output[1:])


def _backward(ctx, d_out, *_):
    d_tokens, d_weights, d_gate_up, d_down = visit_experts_backward(
        d_out.contiguous(), *ctx.saved_tensors, ctx.hidden_act
    )
    return d_tokens, d_weights, None, d_gate_up, d_down, None


visit_experts.register_autograd(_backward, setup_context=_keep)
