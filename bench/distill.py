"""What a teacher is worth: students with and without one, for as many minutes.

    python -m bench.distill answers                                sums of three digits: right answers
    python -m bench.distill pretraining --data dataset/zh          bits per byte
    python -m bench.distill shrinking --data dataset/zh            bits per byte
    python -m bench.distill answers --seed 1                       another draw; seeds stand beside each other

answers      the teacher, `mini`, learns from 20,000 sums worked out column by column; the student, `tiny`, from 500
             of them for half the minutes, and then, with --minutes each: more of its 500; the teacher's answers
             to questions; its distributions over these; its judgement of what the student writes. The minutes in which
             the teacher wrote count. Counted are right answers to 500 sums whose operands no one has seen.
pretraining  a new `tiny` with --minutes each: alone; with the teacher's distributions; with these and the labels. The
             teacher is a `mini` that had --teacher_minutes on the same texts.
shrinking    three layers of that teacher, or three new ones, each alone and with the teacher.

bench/trials.py says how to go on with a bench that was stopped.
"""

import json
from functools import partial
from pathlib import Path

import torch

from base.cli import UserError, above_zero, positive, run
from bench.contest import TOKENIZER
from bench.trials import CHATS, MUON, ROWS, Bench, run_trials
from model.checkpoint import load_model, save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from model.shrink import keep_layers
from training.log import read_metrics

ON_POLICY = f"{ROWS} {MUON} --max_new_tokens 64 --learning_rate 3e-3 --questions 128"
LAYERS = [0, 2, 4]  # of five


# -------------------------------------------------------------------------------------------------------------- answers


def answers(bench: Bench):
    args, minutes, tasks = bench.args, bench.args.minutes, bench.tasks()
    many = bench.prepared("many", "data_process.py", "sft", tasks / "sums_traces.jsonl")
    own = bench.prepared("own", "data_process.py", "sft", bench.first(args.chats, tasks / "sums_traces.jsonl"))
    questions = bench.questions("sums")

    # Of chats alone, from random weights: 1-pretrain.py scores what the data say, here the answers.
    lasts = ["--max_minutes", args.teacher_minutes]
    teacher = bench.trained("1-pretrain.py", "teacher", "--preset", "mini", "--data", many, *CHATS, *lasts)
    lasts = ["--max_minutes", minutes / 2]
    start = bench.trained("1-pretrain.py", "start", "--preset", "tiny", "--data", own, *CHATS, *lasts)
    taught = ["--teacher", teacher, "--min_learning_rate", "1e-4"]

    def learn(name: str, script: str, left: float, student: Path, data: Path, *flags) -> dict:
        model = bench.learn(script, name, left, "--init_from", student, "--data", data, *flags)
        return bench.probe(model, questions) | {"minutes_of_training": left}

    def on_answers(name: str, script: str, *flags) -> dict:
        data, wrote = bench.answers_of(teacher, start, questions)
        return learn(name, script, bench.left_of(minutes, wrote), start, data, *CHATS, *flags)

    def on_policy(name: str, left: float, student: Path) -> dict:
        flags = ["--mode", "on_policy", *taught, *ON_POLICY.split(), "--eval_interval", 1000]
        return learn(name, "6-distill.py", left, student, questions, *flags)

    def both() -> dict:
        data, wrote = bench.answers_of(teacher, start, questions)
        flags = ["--mode", "logits", "--init_from", start, "--data", data, *CHATS, *taught]
        warm = bench.learn("6-distill.py", "warm", bench.left_of(minutes / 2, wrote), *flags)
        return on_policy("both", minutes / 2, warm)

    bench.once("teacher", lambda: bench.probe(teacher, questions))
    bench.once("start", lambda: bench.probe(start, questions))
    bench.once("own", lambda: learn("own", "2-sft.py", minutes, start, own, *CHATS))
    bench.once("text", lambda: on_answers("text", "2-sft.py"))  # what 6-distill.py --mode text trains on is this folder
    bench.once("logits", lambda: on_answers("logits", "6-distill.py", "--mode", "logits", *taught))
    bench.once("on_policy", lambda: on_policy("on_policy", minutes, start))
    bench.once("logits, then on_policy", both)


# ---------------------------------------------------------------------------------------------------------------- texts


def bits(bench: Bench, name: str, script: str, *flags) -> dict:
    """Trains for the minutes, and measures."""
    data = ["--data", bench.args.data, *ROWS.split()]
    model = bench.learn(script, name, bench.args.minutes, *data, *MUON.split(), *flags)
    figures = json.loads(bench.start("eval.py", "--model", model, *data, "--json", output=True).splitlines()[-1])
    return {"bits_per_byte": figures["val_bits_per_byte"], "tokens": read_metrics(model)[-1]["tokens"]}


def teacher_of_texts(bench: Bench) -> Path:
    if not bench.args.data:
        raise UserError("this trial needs --data DIR, a folder made by data_process.py pretrain")
    flags = ["--preset", "mini", "--data", bench.args.data, *ROWS.split(), *MUON.split(), "--learning_rate", "6e-3"]
    return bench.trained("1-pretrain.py", "teacher", *flags, "--max_minutes", bench.args.teacher_minutes)


def pretraining(bench: Bench):
    teacher = teacher_of_texts(bench)
    student = ["--preset", "tiny", "--learning_rate", "1e-2"]
    taught = ["--teacher", teacher, *student]
    bench.once("alone", lambda: bits(bench, "alone", "1-pretrain.py", *student))
    bench.once("teacher", lambda: bits(bench, "taught", "6-distill.py", *taught))
    bench.once("teacher and labels", lambda: bits(bench, "both", "6-distill.py", *taught, "--ce_weight", 1))


def shrinking(bench: Bench):
    teacher = teacher_of_texts(bench)
    torch.manual_seed(bench.args.seed)
    new = CausalLM(LMConfig(**PRESETS["mini"] | dict(num_hidden_layers=len(LAYERS))))
    models = {"new": new, "shrunk": keep_layers(load_model(teacher), LAYERS)}
    for name, model in models.items():
        begin = bench.folder / f"{name}-begin"
        save_model(begin, model, TOKENIZER)
        flags = ["--init_from", begin, "--learning_rate", "6e-3"]
        taught = [*flags, "--teacher", teacher]
        bench.once(f"{name}, alone", partial(bits, bench, f"{name}-alone", "1-pretrain.py", *flags))
        bench.once(f"{name}, teacher", partial(bits, bench, f"{name}-taught", "6-distill.py", *taught))


TRIALS = {function.__name__: function for function in (answers, pretraining, shrinking)}


FLAGS = {
    "--data": dict(type=Path, help="a prepared folder of texts, for pretraining and shrinking"),
    "--teacher_minutes": dict(type=above_zero, default=10.0, help="of the teacher"),
    "--chats": dict(type=positive, default=500, help="answers: that the student begins with"),
}


def main():
    run_trials(__doc__, TRIALS, FLAGS, minutes=3.0, out_dir=Path("out/bench-distill"))


if __name__ == "__main__":
    run(main)
