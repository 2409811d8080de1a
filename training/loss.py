"""The loss of the next token, and its mean over validation data."""

import math
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from base.cli import UserError
from model.model import CausalLM
from training.balance import expert_balance
from training.machine import Machine
from training.packing import IGNORE, Batch, PackedDataset

LOSS_CHUNK = 512  # tokens whose logits exist at a time
# (model, batch) -> sum of the loss, how many tokens or pairs it sums, sums of metrics over them ("expert_load": loads).
LossFunction = Callable[[CausalLM, Batch], tuple[Tensor, int, dict[str, float | Tensor]]]


def next_token_loss(model: CausalLM, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """The sum over all scored tokens of -ln p(token | the tokens before it in its document), and their number."""
    routing = []
    hidden = model.model(batch.input_ids, batch.position_ids, routing=routing)  # (B, T, H)
    loss_sum = cross_entropy_sum(hidden, model.lm_head.weight, batch.labels)
    balance, metrics = expert_balance(model, batch, routing)
    return loss_sum + balance, int((batch.labels != IGNORE).sum()), metrics


def plain_cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum of -ln softmax(hidden weight^T)[label] over all labels but IGNORE: what next_token_loss means.

    hidden (B, T, H), weight (V, H), labels (B, T).
    """
    logits = F.linear(hidden, weight)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same, as it is trained. The logits (B * T, V) are the largest tensor of a small model: here they are made,
    reduced and turned into gradients a chunk of tokens at a time, which also keeps them in the processor's cache."""
    return F.linear_cross_entropy(
        hidden.flatten(0, 1),
        weight.to(hidden.dtype),
        labels.flatten(),
        reduction="sum",
        ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK),
    )


@torch.no_grad()
def evaluate(
    model: CausalLM,
    loss_fn: LossFunction,
    data: PackedDataset,
    machine: Machine,
    batch_size: int,
    rows: int | None = None,
) -> dict[str, float]:
    """Over `rows` rows, or all: mean loss a token (or pair) in nats; bits per byte, to compare between tokenizers."""
    model.eval()
    bytes_of_token = torch.from_numpy(data.token_bytes).to(machine.device)  # (V,)
    chosen = data.order(seed=0, epoch=0)[:rows]
    sums = Counter()
    for start in range(machine.rank * batch_size, len(chosen), machine.world_size * batch_size):
        batch = data.batch(chosen[start : start + batch_size]).to(machine.device)
        with machine.autocast():
            loss_sum, count, metrics = loss_fn(model, batch)
        scored = batch.labels[batch.labels != IGNORE]
        metrics |= {"loss": loss_sum, "count": count, "bytes": bytes_of_token[scored].sum()}
        sums.update({name: float(value) for name, value in metrics.items()})
    model.train()
    total = Counter()
    for part in machine.gather(sums):
        total.update(part)
    loss_sum, count, n_bytes = (total.pop(name, 0) for name in ("loss", "count", "bytes"))
    if not count:
        raise UserError("the validation data hold no scored token; give data_process.py more, or --val FILE")
    result = {"val_loss": loss_sum / count}
    if data.group == 1:  # the loss of a pair is not one of its text
        result["val_bits_per_byte"] = loss_sum / math.log(2) / n_bytes
    return result | {f"val_{name}": value / count for name, value in total.items()}
