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

from base.cli import run  # first: it hears Ctrl-C while torch is loaded

# isort: split
import argparse
from functools import partial
from pathlib import Path

from torch import Tensor

from model.checkpoint import load_model
from model.LMConfig import PRESETS, LMConfig
from model.lora import apply_lora
from model.model import CausalLM
from model.shrink import ffn_importance, keep_layers, keep_neurons
from training import rollouts
from training.distillation import (
    DISTILL_FLAGS,
    METRICS,
    Divergence,
    check_flags,
    distillation_loss,
    distillation_metrics,
    every_answer,
    generate_answers,
    load_teacher,
    validate_answers,
)
from training.flags import LORA_FLAGS, parse_flags
from training.loop import Run, train
from training.loss import next_token_loss
from training.machine import start_machine
from training.packing import Batch, Mixture, open_data

STUDENT = Path("out/sft")


def make_student(args: argparse.Namespace, train_set: Mixture | rollouts.Tasks) -> CausalLM:
    """The model to train, as the flags say."""
    if args.preset:
        return CausalLM(LMConfig(**PRESETS[args.preset]))
    model = load_model(args.init_from)
    if args.keep_layers:
        model = keep_layers(model, args.keep_layers)
    if args.keep_ffn:
        batches = map(train_set.batch, train_set.order(0, 0)[:64, None])
        importance = ffn_importance(model, ((batch.input_ids, batch.position_ids) for batch in batches))
        model = keep_neurons(model, importance, args.keep_ffn)
    if args.lora_rank:
        apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    return model


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
    check_flags(args)
    machine = start_machine(args)
    if args.mode == "text":
        args.data = generate_answers(args, machine)
        train_set, val_set = open_data(args, "sft")
        train(args, machine, make_student(args, train_set), train_set, val_set, next_token_loss)
        return
    own_texts = args.mode == "on_policy"
    kinds = ("rl", "sft")
    train_set, val_set = rollouts.open_tasks(args, kinds) if own_texts else open_data(args, "pretrain", "sft")
    teacher = load_teacher(args, machine, train_set)
    kind = args.divergence or ("reverse" if own_texts else "forward")
    how = Divergence(kind, args.temperature, args.jsd_beta, args.ce_weight)
    model = make_student(args, train_set)

    def loss(model: CausalLM, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        loss_sum, count, metrics, _ = distillation_loss(model, batch, teacher, how)
        return loss_sum, count, metrics

    if not own_texts:
        train(args, machine, model, train_set, val_set, loss, METRICS)
        return

    def on_policy_loss(model: CausalLM, batch: rollouts.RolloutBatch) -> tuple[Tensor, float, dict[str, Tensor]]:
        loss_sum, _, metrics, log_probs = distillation_loss(model, batch, teacher, how)
        old = batch.old_log_probs.flatten()[batch.scored_positions()]
        gap = (log_probs - old).abs().sum()  # between the one who wrote and the one who learns
        return loss_sum, 0.0, metrics | {"gap": gap, "scored": batch.scored, "positions": batch.labels.numel()}

    learning = Run(args, machine, model, train_set, (*rollouts.METRICS, *METRICS))
    generator = rollouts.RolloutGenerator(model, args, machine, train_set.tokenizer_dir)
    validate = partial(validate_answers, generator, val_set, on_policy_loss)
    describe = partial(distillation_metrics, checked=train_set.checked)
    rollouts.learn_from_rollouts(learning, generator, train_set, on_policy_loss, every_answer, validate, describe)


if __name__ == "__main__":
    run(main)
