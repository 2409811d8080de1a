"""The loss of the next token, and its mean over validation data."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from base.cli import UserError
from model.model import CausalLM
from model.operators import product_dtype
from training.balance import expert_balance
from training.machine import Machine
from training.packing import IGNORE, Batch, PackedDataset

LOSS_CHUNK = 512  # tokens whose logits exist at a time: in a processor's cache
CARD_CHUNK = 2048  # the same for a GPU, which is fast at large products
CARD_LOGITS = 2**24  # so many at a time at most: 0.2 GB of logits, probabilities and gradients


def loss_chunk(device: torch.device, vocab_size: int) -> int:
    return LOSS_CHUNK if device.type == "cpu" else max(1, min(CARD_CHUNK, CARD_LOGITS // vocab_size))


# (model, batch) -> sum of the loss, how many tokens or pairs it sums, sums of metrics over them ("expert_load": loads).
LossFunction = Callable[[CausalLM, Batch], tuple[Tensor, int, dict[str, float | Tensor]]]


def next_token_loss(model: CausalLM, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """The sum over all scored tokens of -ln p(token | the tokens before it in its document), and their number."""
    routing = []
    loss_sum = apply_head(model, batch, cross_entropy_sum, routing)
    balance, metrics = expert_balance(model, batch, routing)
    return loss_sum + balance, batch.scored, metrics


def apply_head(model: CausalLM, batch: Batch, head: Callable, routing: list | None = None):
    """head(hidden (M, H), weight (V, H), labels (M,)) of the M scored tokens of a batch.

    Only they get logits: in chats about two tokens of three are not scored, and in a small model the head is the
    largest product. routing: as in Decoder.forward.
    """
    positions, labels = batch.scored_positions(), batch.labels.flatten()  # (M,), (B * T,)

    def head_of_scored(hidden: Tensor, weight: Tensor):
        return head(hidden.flatten(0, 1).index_select(0, positions), weight, labels[positions])

    return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, routing=routing, head=head_of_scored)


def plain_cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum of -ln softmax(hidden weight^T)[label] over all labels but IGNORE: what next_token_loss means.

    hidden (M, H), weight (V, H), labels (M,).
    """
    return F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORE, reduction="sum")


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same, computed in chunks. The logits (M, V) are the largest tensor of a small model: here they are computed,
    reduced and turned into gradients for a chunk of tokens at a time, which also keeps them in the processor's cache.
    """
    if product_dtype(hidden.device.type, hidden.dtype).itemsize == 2:  # torch's would keep the sum in 16 bits
        return token_losses(hidden, weight, labels).sum()
    if not hasattr(F, "linear_cross_entropy"):  # before torch 2.13
        return TokenLosses.apply(hidden, weight, labels, hidden.dtype).sum()
    return F.linear_cross_entropy(
        hidden,
        weight.to(hidden.dtype),
        labels,
        reduction="sum",
        ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK),
    )


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """-ln softmax(hidden weight^T)[label] of each token, (M,), in float32, and 0 where the label is IGNORE.

    hidden (M, H), weight (V, H), labels (M,). Products are in autocast's format, if it is on.
    """
    dtype = product_dtype(hidden.device.type, hidden.dtype)
    small = len(hidden) * len(weight) <= 2**24  # then there is room for logits, and no product is computed twice
    if hidden.device.type == "cpu" and dtype.itemsize > 2 and small:
        return F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORE, reduction="none")
    return TokenLosses.apply(hidden, weight, labels, dtype)


def token_log_probs(model: CausalLM, batch: Batch, routing: list | None = None) -> Tensor:
    """ln p of the scored tokens, (M,), in the order of batch.scored_positions()."""
    return -apply_head(model, batch, token_losses, routing)


def chunk_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """token_losses of a chunk of tokens, whose logits exist at once."""
    return F.cross_entropy(_logits(hidden, weight), labels, ignore_index=IGNORE, reduction="none")


def chunk_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, d_losses: Tensor) -> Tensor:
    """d loss / d logits (M, V), in the weight's dtype: softmax - 1 at the label, times d_losses."""
    d_logits, labels = _logits(hidden, weight).softmax(-1), labels.clamp(min=0)[:, None]
    if torch.compiler.is_compiling():  # a part of the kernel, which a scatter is not
        d_logits = d_logits - (torch.arange(len(weight), device=labels.device) == labels).to(d_logits.dtype)
    else:
        d_logits.scatter_add_(1, labels, d_logits.new_full((len(hidden), 1), -1))
    return (d_logits * d_losses[:, None]).to(weight.dtype)


class TokenLosses(torch.autograd.Function):
    """apply(hidden, weight, labels, dtype) = token_losses, with products in `dtype` and the rest in float32 at least.

    The logits of a chunk of tokens exist at a time, and in the backward pass anew. So gradients are made after the
    loss was scaled for float16, and nothing but products is ever rounded to 16 bits.
    """

    of_chunk, gradient_of_chunk = staticmethod(chunk_losses), staticmethod(chunk_gradient)

    @classmethod
    def compile(cls, on: bool = True, **options):
        """A chunk's work as one kernel beside each product, in place of about six that read or write the logits."""
        for name, function in {"of_chunk": chunk_losses, "gradient_of_chunk": chunk_gradient}.items():
            setattr(cls, name, staticmethod(torch.compile(function, **options) if on else function))

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.dtype = dtype
        weight = weight.to(dtype)
        losses = [hidden.new_zeros(0, dtype=torch.promote_types(dtype, torch.float32))]
        chunk = loss_chunk(hidden.device, len(weight))
        for h, label in zip(hidden.split(chunk), labels.split(chunk)):
            losses.append(TokenLosses.of_chunk(h.to(dtype), weight, label))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, d_losses: Tensor):
        hidden, weight, labels = ctx.saved_tensors
        narrow, d_hidden = weight.to(ctx.dtype), torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # None: frozen
        d_losses = d_losses.masked_fill(labels == IGNORE, 0)
        parts = (x.split(loss_chunk(hidden.device, len(weight))) for x in (hidden, labels, d_losses, d_hidden))
        for h, label, d_loss, d_h in zip(*parts):
            h = h.to(ctx.dtype)
            d_logits = TokenLosses.gradient_of_chunk(h, narrow, label, d_loss)
            d_h.copy_(d_logits @ narrow)
            if d_weight is not None:
                d_weight += d_logits.mT @ h
        return d_hidden, d_weight, None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(M, V), in float32 at least."""
    logits = hidden @ weight.mT
    return logits.float() if logits.dtype.itemsize == 2 else logits


@torch.no_grad()
def evaluate(
    model: CausalLM,
    loss_fn: LossFunction,
    data: PackedDataset,
    machine: Machine,
    batch_size: int,
    rows: int | None = None,
) -> dict[str, float]:
    """Over `rows` rows of each source, or all: mean loss per token (or pair) in nats; bits per byte, to compare between
    tokenizers. Of several sources also the figures of each, and their mean counts each by its weight in the mixture.
    Nothing where a signal has asked a process to stop: the run has to be saved before it is killed."""
    model.eval()
    sums = {
        name: sum_up(model, loss_fn, data, chosen, machine, batch_size)
        for name, chosen in data.validation_rows(rows).items()
    }
    model.train()
    if any(part["stopped"] for part in sums.values()):
        return {}
    for name, part in sums.items():
        if not part["count"]:
            folder = data.folders[name].folder
            raise UserError(
                f"the validation data in {folder} contain no scored token; give data_process.py more, or --val FILE"
            )
    count = sum(part["count"] for part in sums.values())
    mixed = Counter()
    for name, part in sums.items():
        weight = data.weights[name] * count / part["count"]  # 1 where there is one source
        mixed.update({key: weight * value for key, value in part.items()})
    figures = means(mixed, data.group)
    if len(sums) > 1:
        for name, part in sums.items():
            figures |= {f"{key}_{name}": value for key, value in means(part, data.group).items()}
    return figures


def sum_up(
    model: CausalLM, loss_fn: LossFunction, data: PackedDataset, rows: np.ndarray, machine: Machine, batch_size: int
) -> Counter:
    """Loss, count, UTF-8 bytes of the scored tokens, and metrics, summed over the rows by all processes together."""

    def batches() -> Iterator[tuple[Batch, dict]]:
        for batch in map(data.batch, machine.rank_rows(rows, batch_size)):
            yield batch, {"bytes": data.token_bytes[batch.labels[batch.labels != IGNORE].numpy()].sum()}

    return sum_batches(model, loss_fn, batches(), machine)


def sum_batches(
    model: CausalLM, loss_fn: LossFunction, batches: Iterable[tuple[Batch, dict]], machine: Machine
) -> Counter:
    """Loss, count, metrics, and the numbers given with each batch, summed over all processes; "stopped" counts those
    that a signal asked to stop, which leave batches out."""
    found = []  # of each batch: numbers of the device, which are asked for at the end
    for batch, more in batches:
        if machine.leaves_early():
            break
        batch = batch.to(machine.device)
        with machine.autocast(), machine.eager():
            loss_sum, count, metrics = loss_fn(model, batch)
        found.append(metrics | {"loss": loss_sum, "count": count} | more)
    sums = Counter(stopped=machine.leaves_early())
    for metrics in found:
        sums.update({name: float(value) for name, value in metrics.items()})
    return machine.sum_counters(sums)


def means(sums: Counter, group: int) -> dict[str, float]:
    """What sum_up's result comes to; `group` sequences are one sample."""
    result = {"val_loss": sums["loss"] / sums["count"]}
    if group == 1:  # the loss of a pair is not one of its text, and of a divergence it is cross_entropy
        result["val_bits_per_byte"] = sums.get("cross_entropy", sums["loss"]) / math.log(2) / sums["bytes"]
    metrics = (name for name in sums if name not in ("loss", "count", "bytes", "stopped"))
    return result | {f"val_{name}": sums[name] / sums["count"] for name in metrics}
