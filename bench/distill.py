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

All of it stands below --out_dir: a line a result in results.jsonl. What stands there is not done again, and a run that
was stopped goes on, so that the same command finishes the bench. One that fails is named at the end, and the others
are run all the same.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonlines
import pandas as pd
import torch

from base.cli import HelpFormatter, above_zero, available_cores, join_words, natural, positive, python_command
from base.cli import run as run_main
from bench.contest import TOKENIZER, cpu_machine
from corpus.prepared import read_meta
from engine.exams import wilson_interval
from model.checkpoint import load_model, save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from model.shrink import keep_layers
from training.log import read_metrics
from training.rollouts import RolloutWriter, Tasks

MUON = "--optimizer muon --min_learning_rate 1e-4 --warmup_steps 10 --epochs 10000"
ROWS = "--max_seq_len 256"
CHATS = f"{ROWS} {MUON} --learning_rate 1e-2"
ON_POLICY = f"{ROWS} {MUON} --max_new_tokens 64 --learning_rate 3e-3 --questions 128"
LAYERS = [0, 2, 4]  # of five


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder = args.out_dir / f"{args.trial}-{args.seed}"
        self.file = args.out_dir / "results.jsonl"
        self.processes = args.processes
        self.left: list[str] = []  # what failed

    def results(self) -> list[dict]:
        """Those of this trial, of all seeds."""
        if not self.file.exists():
            return []
        with jsonlines.open(self.file) as lines:
            return [record for record in lines if record["trial"] == self.args.trial]

    def start(self, *command, output: bool = False) -> str:
        """Prints and runs `python COMMAND`; what it printed, if that is wanted. CalledProcessError where it fails."""
        words = [sys.executable, *map(str, command)]
        print(f"\n$ {join_words([python_command(), *words[1:]])}", flush=True)
        return subprocess.run(words, check=True, stdout=subprocess.PIPE if output else None, encoding="utf-8").stdout

    def train(self, script: str, name: str, minutes: float, *flags, rows: int = 8):
        """Runs a stage for so many minutes, into a folder of this name; goes on where it was stopped."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", self.processes]
        command = [*(torchrun if self.processes > 1 else []), script, "--out_dir", self.folder / name]
        command += ["--max_minutes", f"{minutes:.4g}", "--batch_size", max(1, rows // self.processes)]
        self.start(*command, *flags, "--seed", self.args.seed, "--resume", "auto")

    def once(self, name: str, make: Callable[[], dict | None]):
        """make(), whose figures become a result, unless there is one already."""
        if any((record["run"], record["seed"]) == (name, self.args.seed) for record in self.results()):
            return
        if self.args.only and not any(word in name for word in self.args.only):
            return
        try:
            figures = make()
        except subprocess.CalledProcessError as error:
            print(f"{name} failed with status {error.returncode}", file=sys.stderr, flush=True)
            self.left.append(name)
            return
        record = dict(trial=self.args.trial, run=name, seed=self.args.seed, minutes=self.args.minutes) | figures
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with jsonlines.open(self.file, "a") as lines:
            lines.write(record)

    def prepared(self, name: str, *command) -> Path:
        """A folder that is made by this command, unless it stands."""
        folder = self.folder / name
        if not folder.exists():
            self.start(*command, "--output", folder)
        return folder

    def trained(self, script: str, name: str, minutes: float, *flags) -> Path:
        """A model that others start from: trained once."""
        marker = self.folder / f"{name}.done"
        if not marker.exists():
            self.train(script, name, minutes, *flags)
            marker.write_text("")
        return self.folder / name


# -------------------------------------------------------------------------------------------------------------- answers


def answers(bench: Bench):
    minutes = bench.args.minutes
    tasks = bench.folder / "tasks"
    if not tasks.exists():
        bench.start("data_process.py", "demo", "--tasks", "--seed", bench.args.seed, "--output", tasks)
    few = tasks / "few.jsonl"
    few.write_text(
        "".join((tasks / "sums_traces.jsonl").read_text("utf-8").splitlines(True)[: bench.args.chats]), "utf-8"
    )
    many = bench.prepared("many", "data_process.py", "sft", tasks / "sums_traces.jsonl")
    own = bench.prepared("few", "data_process.py", "sft", few)
    val = ["--val", tasks / "sums_rl_val.jsonl"]
    questions = bench.prepared("questions", "data_process.py", "rl", tasks / "sums_rl.jsonl", *val)

    writing = argparse.Namespace(max_new_tokens=64, max_seq_len=256, mix=None, generations=1, rollout_rows=256)
    vars(writing).update(reward="exact", tools=[])
    tests = Tasks(questions, "val", writing)

    # Of chats alone, from random weights: 1-pretrain.py scores what the data say, here the answers.
    teacher_minutes = bench.args.teacher_minutes
    teacher = bench.trained(
        "1-pretrain.py", "teacher", teacher_minutes, "--preset", "mini", "--data", many, *CHATS.split()
    )
    start = bench.trained("1-pretrain.py", "start", minutes / 2, "--preset", "tiny", "--data", own, *CHATS.split())
    taught = ["--teacher", teacher, "--init_from", start, "--min_learning_rate", "1e-4"]
    text = [
        "--mode",
        "text",
        "--prompts",
        bench.args.prompts,
        "--data",
        questions,
        *CHATS.split(),
        "--max_new_tokens",
        64,
    ]

    def probe(model: Path, more: dict | None = None) -> dict:
        """Right answers, greedy and sampled, to questions that no one has learnt from."""
        writer = RolloutWriter(load_model(model), writing, cpu_machine(), tests.tokenizer_dir)
        figures = writer.validate(tests, bench.args.tests)
        low, high = wilson_interval(figures["val_accuracy"], min(len(tests), bench.args.tests))
        names = dict(right="val_accuracy", sampled="val_sampled", length="val_length")
        return {name: figures[key] for name, key in names.items()} | {"low": low, "high": high} | (more or {})

    def written() -> tuple[Path, float]:
        """The teacher's answers, and the minutes that it took to write them."""
        texts = bench.folder / "distill-text"
        if not texts.exists() or not [*texts.glob("*/meta.json")]:
            bench.start("6-distill.py", *taught, *text, "--max_steps", 1, "--out_dir", bench.folder / "writing")
        folder = max(texts.iterdir(), key=lambda path: path.stat().st_mtime)
        return folder, read_meta(folder)["minutes_of_writing"]

    def learn(name: str, script: str, share: float, *flags, wrote: float = 0.0) -> dict:
        left = max(share * minutes - wrote, 0.1 * minutes)
        bench.train(script, name, left, *flags)
        return probe(bench.folder / name, {"minutes_of_training": left, "minutes_of_writing": wrote})

    def on_texts(mode: str) -> dict:
        folder, wrote = written()
        if mode == "text":  # its data: what 6-distill.py --mode text would train on is this folder
            return learn(mode, "2-sft.py", 1, "--init_from", start, "--data", folder, *CHATS.split(), wrote=wrote)
        flags = ["--mode", "logits", "--data", folder, *taught, *CHATS.split()]
        return learn(mode, "6-distill.py", 1, *flags, wrote=wrote)

    def on_policy(name: str, share: float, student: Path) -> dict:
        flags = ["--mode", "on_policy", "--data", questions, "--teacher", teacher, "--init_from", student]
        return learn(name, "6-distill.py", share, *flags, *ON_POLICY.split(), "--eval_interval", 1000)

    bench.once("teacher", lambda: probe(teacher))
    bench.once("start", lambda: probe(start))
    bench.once("own", lambda: learn("own", "2-sft.py", 1, "--init_from", start, "--data", own, *CHATS.split()))
    bench.once("text", lambda: on_texts("text"))
    bench.once("logits", lambda: on_texts("logits"))
    bench.once("on_policy", lambda: on_policy("on_policy", 1, start))

    def both() -> dict:
        folder, wrote = written()
        half = max(minutes / 2 - wrote, 0.1 * minutes)
        flags = ["--mode", "logits", "--data", folder, *taught, *CHATS.split()]
        warm = bench.trained("6-distill.py", "warm", half, *flags)
        return on_policy("logits_then_on_policy", 0.5, warm)

    bench.once("logits, then on_policy", both)


# ---------------------------------------------------------------------------------------------------------------- texts


def bits(bench: Bench, name: str, script: str, *flags) -> dict:
    """Trains for the minutes, and measures."""
    bench.train(script, name, bench.args.minutes, "--data", bench.args.data, *ROWS.split(), *MUON.split(), *flags)
    command = ["eval.py", "--model", bench.folder / name, "--data", bench.args.data, *ROWS.split(), "--json"]
    figures = json.loads(bench.start(*command, output=True).splitlines()[-1])
    return {"bits_per_byte": figures["val_bits_per_byte"], "tokens": read_metrics(bench.folder / name)[-1]["tokens"]}


def teacher_of_texts(bench: Bench) -> Path:
    flags = ["--preset", "mini", "--data", bench.args.data, *ROWS.split(), *MUON.split(), "--learning_rate", "6e-3"]
    return bench.trained("1-pretrain.py", "teacher", bench.args.teacher_minutes, *flags)


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
        bench.once(f"{name}, alone", lambda n=name, f=flags: bits(bench, f"{n}-alone", "1-pretrain.py", *f))
        bench.once(f"{name}, teacher", lambda n=name, f=taught: bits(bench, f"{n}-taught", "6-distill.py", *f))


TRIALS = {function.__name__: function for function in (answers, pretraining, shrinking)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("trial", choices=TRIALS, help="what is tried")
    parser.add_argument("--data", type=Path, help="a prepared folder of texts, for pretraining and shrinking")
    parser.add_argument("--minutes", type=above_zero, default=3.0, help="of each student")
    parser.add_argument("--teacher_minutes", type=above_zero, default=10.0, help="of the teacher")
    parser.add_argument("--seed", type=natural, default=0, help="of the data that are drawn, and of the training")
    parser.add_argument("--chats", type=positive, default=500, help="answers: that the student begins with")
    parser.add_argument("--prompts", type=positive, default=3000, help="answers: questions that the teacher answers")
    parser.add_argument("--tests", type=positive, default=500, help="answers: questions that are counted")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="runs whose names hold one of these words")
    parser.add_argument("--processes", type=positive, default=min(available_cores(), 2), help="that train together")
    parser.add_argument("--out_dir", type=Path, default=Path("out/bench-distill"), help="where all of it goes")
    args = parser.parse_args()
    if args.trial != "answers" and not args.data:
        parser.error(f"{args.trial} needs --data DIR, a folder made by data_process.py pretrain")
    bench = Bench(args)
    bench.folder.mkdir(parents=True, exist_ok=True)
    try:
        TRIALS[args.trial](bench)
    except subprocess.CalledProcessError as error:  # of what all runs begin with
        print(f"stopped: {join_words(error.cmd[1:])} failed; the same command goes on", file=sys.stderr)
        sys.exit(1)
    finally:
        if results := bench.results():
            print("\n" + pd.DataFrame(results).drop(columns="trial").round(4).to_string(index=False))
    if bench.left:
        print(f"failed, and to be run again: {', '.join(bench.left)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
