"""DPO: of two answers to the same question, make the better one more probable, measured against where we started.

The data are pairs, chosen and rejected. The reward of an answer is beta ln(p(answer) / p_ref(answer)), with the model
of the last stage as the frozen reference; the loss is small when the chosen one's reward is above the rejected one's.
At step 0 model and reference are the same, all rewards are 0, and the loss is ln 2 (arXiv 2305.18290, eq. 7). The
reference never changes, so its log-probabilities are computed once and kept in a file: training holds one model.

    python data_process.py dpo YOUR_PAIRS.jsonl      pairs -> dataset/dpo
    python 4-dpo.py                                  out/sft and dataset/dpo -> out/dpo
    torchrun --nproc_per_node 2 4-dpo.py             the same in two processes
    python 4-dpo.py --lora_rank 8                    trains an adapter in place of the whole model
"""

from base.cli import above_zero, fraction, not_negative, run  # first: it hears Ctrl-C while torch is loaded

# isort: split
import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.checkpoint import load_model
from model.lora import apply_lora
from model.model import CausalLM
from training.balance import expert_balance
from training.flags import LORA_FLAGS, parse_flags
from training.loop import train
from training.loss import token_log_probs
from training.machine import Machine, start_machine
from training.packing import Batch, PackedDataset, open_data, send
from training.reference import computed_once
from training.shard import shard_model

METRICS = ("accuracy", "reward_margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")


def answer_log_probs(model: CausalLM, batch: Batch, routing: list | None = None) -> tuple[Tensor, Tensor]:
    """ln p(answer | prompt) of every chat and the answer's number of tokens, (C,) each; chosen and rejected in turn."""
    scored = batch.scored_places()  # (M,): of the answers' tokens
    log_probs = token_log_probs(model, batch, routing)  # (M,)
    chat = batch.document_index.flatten()[scored]  # (M,)
    sums = log_probs.new_zeros(2, len(batch.documents))
    return sums[0].index_add(0, chat, log_probs), sums[1].index_add(0, chat, torch.ones_like(log_probs))


def preference_loss(chosen: Tensor, rejected: Tensor, beta: float, kind: str, label_smoothing: float) -> Tensor:
    """The loss of each pair, (P,), from the log-ratios ln(p / p_ref) of both answers.

    sigmoid  -ln sigmoid(beta * margin): DPO, arXiv 2305.18290, eq. 7; with label_smoothing, the probability that a pair
             is the wrong way round, conservative DPO, arXiv 2305.18290 and Mitchell 2023, eq. 3.
    ipo      (margin - 1 / (2 beta))^2: arXiv 2310.12036, eq. 17. It has a finite optimum where DPO goes on pushing.
    """
    margin = chosen - rejected
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    keep, flip = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * keep - label_smoothing * flip


@torch.no_grad()
def reference_log_probs(
    model: CausalLM, data: PackedDataset, machine: Machine, args: argparse.Namespace, rows: np.ndarray
) -> Tensor:
    """ln p_ref of every answer in these rows of the split, and 0 of the others, (documents,)."""
    log_probs = torch.zeros(len(data.prepared.offsets) - 1, device=machine.device)
    for share, counts in machine.share(rows, args.batch_size):
        batch = data.batch(share).to(machine.device)
        with machine.autocast():
            answers, _ = answer_log_probs(model, batch)
        if counts:
            log_probs[batch.documents] = answers
    return machine.sum(log_probs).cpu()


def main():
    args = parse_flags(
        __doc__,
        LORA_FLAGS
        | {
            "--beta": dict(type=above_zero, default=0.1, help="how much a step away from the reference counts"),
            "--loss": dict(choices=["sigmoid", "ipo"], default="sigmoid", help="see preference_loss"),
            "--label_smoothing": dict(type=fraction, default=0.0, help="share of pairs that are the wrong way round"),
            "--length_normalized": dict(action="store_true", help="divide log-ratios by the answer's length"),
            "--sft_weight": dict(
                type=not_negative, default=0.0, help="of the chosen answer's own loss a token (2404.19733)"
            ),
        },
        data=Path("dataset/dpo"),
        init_from=Path("out/sft"),
        out_dir=Path("out/dpo"),
        epochs=2,
        batch_size=4,  # rows; a row holds several pairs
        max_seq_len=1024,  # each answer, with its prompt, may fill half of it
        learning_rate=5e-5,
        min_learning_rate=5e-6,
        warmup_steps=10,
        weight_decay=0.0,
        lora_rank=0,
    )
    machine = start_machine(args)
    train_set, val_set = open_data(args, "dpo")
    model = shard_model(load_model(args.init_from), machine)
    references = {}  # by split: ln p_ref of all its documents, those of the first source, then those of the second, …
    for data in (train_set, val_set):
        parts = [
            computed_once(args, machine, source, partial(reference_log_probs, model, source, machine, args))
            for source in data.sources.values()
        ]
        references[data.split] = torch.cat(parts)
    if args.shard:
        model = load_model(args.init_from)  # whole again: what is spread takes no adapter
    if args.lora_rank:
        apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)

    def dpo_loss(model: CausalLM, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        routing = []
        log_probs, lengths = answer_log_probs(model, batch, routing)  # (C,)
        ratios = log_probs - send(references[batch.split][batch.documents], log_probs.device)  # (C,): ln(p / p_ref)
        if args.length_normalized or args.loss == "ipo":
            ratios = ratios / lengths
        chosen = ratios[0::2]  # (P,)
        rejected = ratios[1::2]
        losses = preference_loss(chosen, rejected, args.beta, args.loss, args.label_smoothing)
        losses = losses - args.sft_weight * log_probs[0::2] / lengths[0::2]
        balance, metrics = expert_balance(model, batch, routing, torch.full_like(lengths, 0.5))  # two chats a pair
        metrics |= {  # sums over the pairs; the log divides by their number
            "accuracy": ((chosen > rejected) + 0.5 * (chosen == rejected)).sum(),  # a tie is half right
            "reward_margin": args.beta * (chosen - rejected).sum(),
            "reward_chosen": args.beta * chosen.sum(),
            "reward_rejected": args.beta * rejected.sum(),
            "logp_chosen": log_probs[0::2].sum(),
            "logp_rejected": log_probs[1::2].sum(),
        }
        return losses.sum() + balance, len(losses), {name: value.detach() for name, value in metrics.items()}

    train(args, machine, model, train_set, val_set, dpo_loss, METRICS)


if __name__ == "__main__":
    run(main)
