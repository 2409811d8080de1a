"""Distillation: a small student model learns to predict what a larger teacher model would, and how sure it would be.

A text has one next token; a teacher has a probability for every token of the vocabulary, and so says with each how
likely the others were (arXiv 1503.02531). Three ways to learn from it, by --mode:

    text       the teacher answers prompts once, and the student trains on its answers with the loss of 2-sft.py
    logits     on given texts or chats the student's distribution is drawn to the teacher's, token by token
    on_policy  the student generates, and the teacher judges each of its tokens: the student learns to continue its own
               texts, mistakes included, and not only those of others (arXiv 2306.13649, algorithm 1)

The student is the model of --init_from, some layers of it (--keep_layers), or a new one (--preset).

    python 6-distill.py --teacher out/large                              out/sft and dataset/sft -> out/distill
    python 6-distill.py --teacher out/large --mode on_policy --data dataset/rl
    python 6-distill.py --teacher out/large --preset tiny --data dataset/pretrain        pretraining with a teacher
    python 6-distill.py --nproc_per_node 2 --teacher out/large           the same in two processes
"""

import time
from functools import partial
from pathlib import Path

from base.cli import run
from model.checkpoint import load_model
from model.LMConfig import PRESETS, LMConfig
from model.lora import apply_lora
from model.model import CausalLM
from model.shrink import ffn_importance, keep_layers, keep_neurons
from training import rollouts
from training.distillation import (
    DISTILL_FLAGS,
    METRICS,
    AnswerSettings,
    Divergence,
    check_flags,
    distillation_loss,
    distillation_metrics,
    generate_answers,
    load_teacher,
    validate_answers,
)
from training.flags import LORA_FLAGS, fill, parse_flags, run_settings
from training.loop import Run
from training.loss import LossFunction, evaluate, next_token_loss
from training.machine import start_machine
from training.packing import PackedDataset, open_data
from training.report import check_data

STUDENT = Path("out/sft")


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
    machine = start_machine(args.device, args.dtype, args.seed, args.shard, args.compile)
    own_texts = args.mode == "on_policy"
    if args.mode == "logits":
        train_set, val_set = open_data(args.data, args.mix, args.max_seq_len, "pretrain", "sft")
    else:
        limits = args.max_seq_len, args.max_new_tokens
        train_set, val_set = rollouts.open_prompts(args.data, args.mix, *limits, "rl", "sft")
    model = CausalLM(LMConfig(**PRESETS[args.preset], **train_set.vocab)) if args.preset else load_model(args.init_from)
    if args.keep_layers:
        model = keep_layers(model, args.keep_layers)
    check_data(args.init_from, model.config, train_set)  # before the teacher computes
    if args.mode == "text":  # the data are the teacher's answers
        settings, cache = fill(AnswerSettings, args), args.out_dir.parent / "distill-text"
        args.data, args.mix = generate_answers(args.teacher, train_set, val_set, settings, machine, cache), None
        train_set, val_set = open_data(args.data, None, args.max_seq_len, "sft")
    loss_fn, metrics = next_token_loss, ()
    if args.mode != "text":  # the divergence between student and teacher, summed over the scored tokens
        teacher = load_teacher(args.teacher, args.teacher_dtype, machine, train_set)
        kind = args.divergence or ("reverse" if own_texts else "forward")
        how = Divergence(kind, args.temperature, args.jsd_beta, args.ce_weight)
        loss_fn = partial(distillation_loss, teacher=teacher, how=how)
        metrics = (*rollouts.METRICS, *METRICS) if own_texts else METRICS

    if args.keep_ffn:
        batches = map(train_set.batch, train_set.order(0, 0)[:64, None])
        importance = ffn_importance(model, ((batch.input_ids, batch.position_ids) for batch in batches))
        model = keep_neurons(model, importance, args.keep_ffn)
    if args.lora_rank:
        apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    training = Run(run_settings(args), machine, model, train_set, metrics)
    if own_texts:
        learn_from_own_texts(training, loss_fn, val_set, fill(rollouts.RolloutSettings, args), args.questions)
    else:
        rows_per_step = args.batch_size * args.accumulation_steps * machine.world_size
        learn_from_given_texts(training, loss_fn, val_set, rows_per_step)


def learn_from_given_texts(training: Run, loss_fn: LossFunction, val_set: PackedDataset, rows_per_step: int):
    """--mode text and logits."""
    validate = partial(evaluate, training.model, loss_fn, val_set, training.machine, training.batch_size)
    training.log_start(validate)
    with training:
        for rows in training.steps(rows_per_step):
            training.forward_backward(loss_fn, training.batches(rows))
            training.update()
            training.log_step(validate)


def learn_from_own_texts(
    training: Run,
    loss_fn: LossFunction,
    val_set: rollouts.PromptDataset,
    settings: rollouts.RolloutSettings,
    questions_per_step: int,
):
    """--mode on_policy."""
    train_set = training.train_set
    generator = rollouts.RolloutGenerator(training.model, settings, training.machine, train_set.tokenizer_dir)
    validate = partial(validate_answers, generator, val_set, loss_fn, training.batch_size)
    training.log_start(validate)
    with training:
        for questions in training.steps(questions_per_step):
            # Generate: the student's own answers. Their rewards, where there are any, are only logged.
            start, seed = time.perf_counter(), f"{training.settings.seed}/{training.state.step}"
            groups = generator.generate(train_set, questions, settings.generations, seed)
            generator.score(train_set, groups)
            training.add_sums(**generator.sums_of(groups), sampling_seconds=time.perf_counter() - start)
            # Learn: the teacher's distribution after each of their tokens.
            answers = [one for group in groups for one in group]
            batches = rollouts.learning_batches(answers, train_set.max_seq_len, training.batch_size)
            training.forward_backward(loss_fn, batches)
            training.update()
            if training.log_step(validate, partial(distillation_metrics, checked=train_set.checked)):
                generator.save_samples(training.log.directory, training.state.step, groups, train_set)


if __name__ == "__main__":
    run(main)
