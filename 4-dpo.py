"""DPO: of two answers to the same question, make the better one more probable, measured against where we started.

The data are pairs, chosen and rejected. The reward of an answer is beta ln(p(answer) / p_ref(answer)), with the model
of the last stage as the frozen reference; the loss is small when the chosen one's reward is above the rejected one's.
At step 0 model and reference are the same, all rewards are 0, and the loss is ln 2 (arXiv 2305.18290, eq. 7). The
reference never changes, so its log-probabilities are computed once and kept in a file: training holds one model.

    python data_process.py dpo YOUR_PAIRS.jsonl      pairs -> dataset/dpo
    python 4-dpo.py                                  out/sft and dataset/dpo -> out/dpo
    python 4-dpo.py --nproc_per_node 2               the same in two processes
    python 4-dpo.py --lora_rank 8                    trains an adapter in place of the whole model
"""

from base.cli import above_zero, fraction, not_negative, run  # first: handles Ctrl-C while torch loads

# isort: split
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.checkpoint import load_config, load_model
from model.lora import apply_lora
from model.model import CausalLM
from training.balance import expert_balance
from training.flags import LORA_FLAGS, parse_flags, run_settings
from training.loop import Run
from training.loss import evaluate, token_log_probs
from training.machine import start_machine
from training.packing import Batch, open_data, to_device
from training.reference import reference_log_probs
from training.report import check_data

TIE = 1e-4  # nats: at step 0 model and reference differ by rounding alone
METRICS = ("accuracy", "reward_margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")


def answer_log_probs(model: CausalLM, batch: Batch, routing: list | None = None) -> tuple[Tensor, Tensor]:
    """ln p(answer | prompt) of every chat and the answer's number of tokens, (C,) each; chosen and rejected in turn."""
    scored = batch.scored_positions()  # (M,): of the answers' tokens
    log_probs = token_log_probs(model, batch, routing)  # (M,)
    chat = batch.document_index.flatten()[scored]  # (M,)
    sums = log_probs.new_zeros(2, len(batch.documents))
    return sums[0].index_add(0, chat, log_probs), sums[1].index_add(0, chat, torch.ones_like(log_probs))


def preference_loss(chosen: Tensor, rejected: Tensor, beta: float, kind: str, label_smoothing: float) -> Tensor:
    """The loss of each pair, (P,), from the log-ratios ln(p / p_ref) of both answers.

    sigmoid  -ln sigmoid(beta * margin): DPO, arXiv 2305.18290, eq. 7; with label_smoothing, the probability that a pair
             is the wrong way round, conservative DPO, arXiv 2305.18290 and Mitchell 2023, eq. 3.
    ipo      (margin - 1 / (2 beta))^2: arXiv 2310.12036, eq. 17. It has a finite optimum where DPO keeps pushing.
    """
    margin = chosen - rejected
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    keep, flip = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * keep - label_smoothing * flip


def main():
    args = parse_flags(
        __doc__,
        LORA_FLAGS
        | {
            "--beta": dict(type=above_zero, default=0.1, help="weight of the log-ratio to the reference"),
            "--loss": dict(choices=["sigmoid", "ipo"], default="sigmoid", help="see preference_loss"),
            "--label_smoothing": dict(type=fraction, default=0.0, help="fraction of pairs whose order is wrong"),
            "--length_normalized": dict(action="store_true", help="divide log-ratios by the answer's length"),
            "--sft_weight": dict(
                type=not_negative, default=0.0, help="of the chosen answer's own loss per token (2404.19733)"
            ),
        },
        data=Path("dataset/dpo"),
        init_from=Path("out/sft"),
        out_dir=Path("out/dpo"),
        epochs=2,
        batch_size=4,  # rows; a row contains several pairs
        max_seq_len=1024,  # each answer, with its prompt, may fill half of it
        learning_rate=5e-5,
        min_learning_rate=5e-6,
        warmup_steps=10,
        weight_decay=0.0,
        lora_rank=0,
    )
    machine = start_machine(args.device, args.dtype, args.seed, args.shard, args.compile)
    train_set, val_set = open_data(args.data, args.mix, args.max_seq_len, "dpo")
    check_data(args.init_from, load_config(args.init_from), train_set)  # before the reference computes
    # ln p_ref of every answer, (documents,), by split. It never changes, and needs the reference only now.
    references = reference_log_probs(
        args.init_from,
        (train_set, val_set),
        lambda model, batch: answer_log_probs(model, batch)[0],
        machine,
        args.batch_size,
        cache=args.out_dir.parent / "dpo-reference",
    )
    model = load_model(args.init_from)
    if args.lora_rank:
        apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)

    def dpo_loss(model: CausalLM, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        routing = []
        log_probs, lengths = answer_log_probs(model, batch, routing)  # (C,)
        reference = to_device(references[batch.split][batch.documents], log_probs.device)  # (C,)
        ratios = log_probs - reference  # (C,): ln(p / p_ref)
        if args.length_normalized or args.loss == "ipo":
            ratios = ratios / lengths
        chosen = ratios[0::2]  # (P,)
        rejected = ratios[1::2]
        margin = chosen - rejected
        losses = preference_loss(chosen, rejected, args.beta, args.loss, args.label_smoothing)
        losses = losses - args.sft_weight * log_probs[0::2] / lengths[0::2]
        balance, metrics = expert_balance(model, batch, routing, torch.full_like(lengths, 0.5))  # two chats a pair
        metrics |= {  # sums over the pairs; the log divides by their number
            "accuracy": ((margin > TIE) + 0.5 * (margin.abs() <= TIE)).sum(),  # a tie is half right
            "reward_margin": args.beta * margin.sum(),
            "reward_chosen": args.beta * chosen.sum(),
            "reward_rejected": args.beta * rejected.sum(),
            "logp_chosen": log_probs[0::2].sum(),
            "logp_rejected": log_probs[1::2].sum(),
        }
        return losses.sum() + balance, len(losses), {name: value.detach() for name, value in metrics.items()}

    training = Run(run_settings(args), machine, model, train_set, METRICS, reference=args.init_from)
    validate = partial(evaluate, model, dpo_loss, val_set, machine, training.batch_size)
    training.log_start(validate)  # the model is the reference: ln 2
    with training:
        for rows in training.steps(args.batch_size * args.accumulation_steps * machine.world_size):
            training.forward_backward(dpo_loss, training.batches(rows))
            training.update()  # by the mean over all pairs
            training.log_step(validate)


if __name__ == "__main__":
    run(main)
