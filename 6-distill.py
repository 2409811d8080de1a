"""Distillation: a small model learns to say what a larger one would, and how sure it would be.

A text has one next token; a teacher has a probability for every token of the vocabulary, and so says with each how
likely the others were (arXiv 1503.02531). Three ways to learn from it, by --mode:

    text       the teacher answers prompts once, and the student trains on its answers by the loss of 2-sft.py
    logits     on given texts or chats the student's distribution is drawn to the teacher's, token by token
    on_policy  the student writes, and the teacher judges each of its tokens, so that it learns to go on from what it
               writes itself and not from what others wrote (arXiv 2306.13649, algorithm 1)

The student is the model of --init_from, some layers of it (--keep_layers), or a new one (--preset).

    python 6-distill.py --teacher out/large                              out/sft and dataset/sft -> out/distill
    python 6-distill.py --teacher out/large --mode on_policy --data dataset/rl
    python 6-distill.py --teacher out/large --preset tiny --data dataset/pretrain        pretraining with a teacher
    torchrun --nproc_per_node 2 6-distill.py --teacher out/large         the same in two processes
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from base.cli import UserError, fraction, not_negative, positive, run
from model.checkpoint import load_model
from model.LMConfig import PRESETS, LMConfig
from model.lora import apply_lora
from model.model import CausalLM
from model.shrink import ffn_importance, keep_layers, keep_neurons
from training import rollouts
from training.distillation import METRICS, Divergence, Teacher, distillation_loss, load_teacher, write_answers
from training.flags import LORA_FLAGS, parse_flags
from training.loop import Run, train
from training.loss import next_token_loss
from training.machine import Machine, start_machine
from training.packing import Batch, Mixture, open_data

STUDENT = Path("out/sft")
DISTILL_FLAGS = {
    "--teacher": dict(type=Path, default=Path("out/teacher"), help="folder of a model or of an adapter"),
    "--mode": dict(choices=["text", "logits", "on_policy"], default="logits", help="what is learnt from it, see above"),
    "--divergence": dict(
        choices=["forward", "reverse", "jsd"], help="see training/distillation.py; else forward, on_policy reverse"
    ),
    "--jsd_beta": dict(type=fraction, default=0.5, help="of jsd, between forward (0) and reverse (1)"),
    "--temperature": dict(type=not_negative, default=1.0, help="divides the logits of both; of text, the teacher's"),
    "--ce_weight": dict(type=not_negative, default=0.0, help="of the loss of the labels, beside the divergence"),
    "--teacher_dtype": dict(
        choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of its weights; auto: as --dtype"
    ),
    "--prompts": dict(type=positive, help="text: only so many of each split; without it, all"),
    "--only_right": dict(action="store_true", help="text: leave out answers that --reward does not give 1"),
    "--keep_layers": dict(nargs="+", type=int, metavar="N", help="start from these layers of --init_from, from 0"),
    "--keep_ffn": dict(type=positive, metavar="N", help="and from the N busiest neurons of each feed-forward layer"),
}


def make_student(args: argparse.Namespace, train_set: Mixture | rollouts.Tasks) -> CausalLM:
    """The model to train, as the flags say."""
    if args.preset:
        return CausalLM(LMConfig(**PRESETS[args.preset]))
    model = load_model(args.init_from)
    if args.keep_layers:
        model = keep_layers(model, args.keep_layers)
    if args.keep_ffn:
        if not isinstance(train_set, Mixture):
            raise UserError(
                "--keep_ffn looks at texts or chats to see which neurons are busy; use it with --mode text or logits"
            )
        batches = (train_set.batch(train_set.order(0, 0)[i : i + 1]) for i in range(min(64, len(train_set))))
        model = keep_neurons(
            model, ffn_importance(model, ((b.input_ids, b.position_ids) for b in batches)), args.keep_ffn
        )
    if args.lora_rank:
        if args.keep_layers or args.keep_ffn:
            raise UserError(
                "an adapter belongs to a model on disk: shrink and distill first, then give that to --lora_rank"
            )
        apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    return model


def learn_on_policy(
    args: argparse.Namespace,
    machine: Machine,
    model: CausalLM,
    teacher: Teacher,
    how: Divergence,
    train_set: rollouts.Tasks,
    val_set: rollouts.Tasks,
):
    run = Run(args, machine, model, train_set, (*rollouts.METRICS, *METRICS))
    writer = rollouts.RolloutWriter(model, args, machine, train_set.tokenizer_dir)

    def on_policy_loss(model: CausalLM, batch: rollouts.RolloutBatch) -> tuple[Tensor, float, dict[str, Tensor]]:
        loss_sum, _, metrics, log_probs = distillation_loss(model, batch, teacher, how)
        old = batch.old_log_probs.flatten()[batch.scored_places()]
        gap = (log_probs - old).abs().sum()  # between the one who wrote and the one who learns
        return loss_sum, 0.0, metrics | {"gap": gap, "scored": batch.scored, "places": batch.labels.numel()}

    def choose(groups: list[list[rollouts.Rollout]]) -> tuple[list[rollouts.Rollout], int]:
        answers = [one for group in groups for one in group]
        return answers, sum(sum(one.sequence.chosen) for one in answers)

    @torch.no_grad()
    def validate(rows: int | None) -> dict[str, float]:
        """The divergence where the student's own answers to questions of val lead; and how many are right."""
        sums = Counter()
        groups = writer.write(val_set, val_set.kept[:rows], 1, "validation")
        for batch in rollouts.learning_batches(choose(groups)[0], args.max_seq_len, args.batch_size):
            batch = batch.to(machine.device)
            with machine.autocast():
                loss_sum, count, metrics, _ = distillation_loss(model.eval(), batch, teacher, how)
            sums.update({name: float(metrics[name]) for name in METRICS} | {"loss": float(loss_sum), "count": count})
        model.train()
        total = machine.add_up(sums)
        figures = {f"val_{name}": total[name] / max(total["count"], 1) for name in ("loss", *METRICS)}
        return figures | (writer.validate(val_set, rows) if val_set.checked else {})

    def describe(window: Counter) -> dict[str, float]:
        shown = ("length", "ended", "gap", "sampling_seconds", *(["reward"] if train_set.checked else []))
        described = rollouts.describe_rollouts(window)
        means = {name: window[name] / max(window["count"], 1) for name in METRICS}
        return means | {name: described[name] for name in shown}

    rollouts.learn_from_rollouts(run, writer, train_set, on_policy_loss, choose, validate, describe)


def main():
    args = parse_flags(
        __doc__,
        LORA_FLAGS | rollouts.ROLLOUT_FLAGS | DISTILL_FLAGS,
        data=Path("dataset/sft"),
        init_from=STUDENT,
        out_dir=Path("out/distill"),
        epochs=2,
        batch_size=4,  # rows
        max_seq_len=1024,
        learning_rate=5e-4,
        min_learning_rate=5e-5,
        warmup_steps=20,
        weight_decay=0.01,
        lora_rank=0,
        questions=128,  # on_policy: in a step
        generations=1,  # answers to each
    )
    if args.preset and args.init_from == STUDENT:
        args.init_from = None
    if args.preset and (args.keep_layers or args.keep_ffn or args.lora_rank):
        raise UserError("--preset is a new student: there is nothing to keep or to adapt")
    if not args.temperature and args.mode != "text":
        raise UserError("--temperature 0 is for --mode text, where the teacher then writes its most probable tokens")
    if args.jsd_beta in (0, 1):
        raise UserError("--jsd_beta 0 and 1 make every divergence 0: give --divergence forward or reverse")
    machine = start_machine(args)
    if args.mode == "text":
        args.data = write_answers(args, machine)
        train_set, val_set = open_data(args, "sft")
        train(args, machine, make_student(args, train_set), train_set, val_set, next_token_loss)
        return
    if args.mode == "on_policy":
        train_set, val_set = (rollouts.Tasks(args.data, split, args, ("rl", "sft")) for split in ("train", "val"))
    else:
        train_set, val_set = open_data(args, "pretrain", "sft")
    teacher = load_teacher(args, machine, train_set)
    kind = args.divergence or ("reverse" if args.mode == "on_policy" else "forward")
    how = Divergence(kind, args.temperature, args.jsd_beta, args.ce_weight)
    model = make_student(args, train_set)
    if args.mode == "on_policy":
        learn_on_policy(args, machine, model, teacher, how, train_set, val_set)
        return

    def loss(model: CausalLM, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        loss_sum, count, metrics, _ = distillation_loss(model, batch, teacher, how)
        return loss_sum, count, metrics

    train(args, machine, model, train_set, val_set, loss, METRICS)


if __name__ == "__main__":
    run(main)
