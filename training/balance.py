"""Load balancing of the experts: by an auxiliary loss, or by a bias that follows the loads."""

import numpy as np
import torch
from torch import Tensor

from model.model import CausalLM
from training.packing import IGNORE, Batch, to_device


def count_each(numbers: Tensor, n: int) -> Tensor:
    """How often each of 0 to n - 1 occurs, (n,), as bincount, which would wait for the device to know its size."""
    return numbers.new_zeros(n).index_add_(0, numbers, torch.ones_like(numbers))


def balance_loss(scores: Tensor, chosen: Tensor, sequences: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """How unevenly one router loads its experts, and the load: tokens by expert, (E,).

    E/k sum_e f_e p_e for each sequence, with f_e the fraction of its tokens that chose e and p_e its mean normalised
    score (arXiv 2412.19437, eq. 17 to 20), weighted by `weights` (S,) and added up. Even loads give 1 for every k.
    scores (M, E), chosen (M, k); sequences (M,): the number of each token's sequence, or -1 for padding, which is not
    counted.
    """
    n_experts, k, S = scores.shape[1], chosen.shape[1], len(weights)
    sequences = torch.where(sequences < 0, S, sequences)  # padding is summed in a row of its own, S
    visits = torch.zeros_like(scores).scatter_(1, chosen, 1)  # (M, E)
    probabilities = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
    visits, probabilities = (
        scores.new_zeros(S + 1, n_experts).index_add(0, sequences, x)[:S] for x in (visits, probabilities)
    )
    lengths = count_each(sequences, S + 1)[:S, None].clamp(min=1)
    uneven = n_experts / k * (visits / lengths * probabilities / lengths).sum(-1)  # (S,)
    return (uneven * weights).sum(), visits.sum(0)


def expert_balance(
    model: CausalLM, batch: Batch, routing: list[tuple[Tensor, Tensor]], weights: Tensor | None = None
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The auxiliary loss of a mixture of experts in training, and its metrics; 0 and none for a dense model.

    weights: of each document; by default, its number of scored tokens. The value of the loss is 0 and only its gradient
    counts, so that the loss compares with a dense model's. "expert_load" is (layers with experts, E).
    """
    if not routing or not model.training:
        return 0.0, {}
    if weights is None:
        n_documents = len(batch.documents)
        scored = torch.where(batch.labels == IGNORE, n_documents, batch.document_index)  # the rest: one more
        weights = count_each(scored.flatten(), n_documents + 1)[:n_documents]
    config, sequences = model.config, batch.document_index.flatten()
    if not config.seq_aux:  # all documents are one
        sequences, weights = sequences.clamp(max=0), weights.sum()[None]
    losses, loads = zip(*(balance_loss(scores, chosen, sequences, weights) for scores, chosen in routing))
    total = sum(losses)
    metrics = {"balance_loss": total.detach() / len(losses), "expert_load": torch.stack(loads)}
    return config.router_aux_loss_coef * (total - total.detach()), metrics


def expert_metrics(model: CausalLM) -> dict[str, tuple[int, ...]]:
    """The names and shapes of expert_balance's metrics; none for a dense model."""
    n_layers = sum(layer.has_experts for layer in model.model.layers)
    return {"expert_load": (n_layers, model.config.n_routed_experts), "balance_loss": ()} if n_layers else {}


@torch.no_grad()
def move_router_bias(model: CausalLM, load: np.ndarray | None):
    """Makes overloaded experts of sigmoid routers a little less likely to be chosen and the others more, from the loads
    (layers, E) of the whole step (arXiv 2408.15664, algorithm 1). Frozen routers keep their bias."""
    if load is None or model.config.scoring_func != "sigmoid":
        return
    routers = [layer.mlp.gate for layer in model.model.layers if layer.has_experts]
    for router, load_of_layer in zip(routers, to_device(torch.from_numpy(load), model.lm_head.weight.device)):
        if router.weight.requires_grad:
            wanted = (load_of_layer.mean() - load_of_layer).sign()
            router.e_score_correction_bias += model.config.router_bias_update_speed * wanted
