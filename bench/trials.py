"""Trials that train models for as many minutes each and compare them: what bench/distill.py and bench/rewards.py share.

All of a trial stands below --out_dir: a line a result in results.jsonl. What stands there is not done again, and a run
that was stopped goes on, so that the same command finishes the bench. One that fails is named at the end, and the
others are run all the same.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonlines
import pandas as pd

from base.cli import HelpFormatter, above_zero, available_cores, join_words, natural, positive, python_command
from bench.contest import cpu_machine
from corpus.prepared import read_meta
from engine.exams import wilson_interval
from model.checkpoint import load_model
from training.rollouts import PromptDataset, RolloutGenerator, RolloutSettings

MUON = "--optimizer muon --min_learning_rate 1e-4 --warmup_steps 10 --epochs 10000"
ROWS = "--max_seq_len 256"
ROOM = "--max_seq_len 512 --max_new_tokens 128".split()  # for a question and an answer that calls a tool
CHATS = f"{ROWS} {MUON} --learning_rate 1e-2".split()  # for models of a million weights


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.shared = args.out_dir / args.trial  # what all runs begin with
        self.folder = self.shared / str(args.seed)
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

    def train(self, script: str, out_dir: Path, seed: int, *flags, rows: int = 8):
        """Runs a stage; goes on where it was stopped."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", self.processes]
        command = [*(torchrun if self.processes > 1 else []), script, "--out_dir", out_dir, "--seed", seed]
        self.start(*command, "--batch_size", max(1, rows // self.processes), *flags, "--resume", "auto")

    def learn(self, script: str, name: str, minutes: float, *flags) -> Path:
        """A model that is compared: trained for so many minutes with this run's seed."""
        self.train(script, self.folder / name, self.args.seed, "--max_minutes", f"{minutes:.4g}", *flags)
        return self.folder / name

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
        folder = self.shared / name
        if not folder.exists():
            self.start(*command, "--output", folder)
        return folder

    def trained(self, script: str, name: str, *flags) -> Path:
        """A model that others start from: trained once, for as long as the flags say."""
        marker = self.shared / f"{name}.done"
        if not marker.exists():
            self.train(script, self.shared / name, 0, *flags)
            marker.write_text("")
        return self.shared / name

    def tasks(self) -> Path:
        """The demonstration's questions and chats."""
        return self.prepared("tasks", "data_process.py", "demo", "--tasks")

    def questions(self, kind: str) -> Path:
        """Of this kind, prepared; val has operands that stand in no other file."""
        tasks = self.tasks()
        val = ["--val", tasks / f"{kind}_rl_val.jsonl"]
        return self.prepared(f"{kind}_questions", "data_process.py", "rl", tasks / f"{kind}_rl.jsonl", *val)

    def first(self, n: int, path: Path) -> Path:
        """Another file, of the first n lines of this one."""
        few = self.shared / "few.jsonl"
        few.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:n]), "utf-8")
        return few

    def probe(self, model: Path, questions: Path, tools: tuple[str, ...] = ()) -> dict:
        """Right answers, greedy and sampled, to the questions of val, and the interval of the former."""
        settings = RolloutSettings(generations=4, max_new_tokens=128, rollout_rows=256, reward="exact", tools=tools)
        tests = PromptDataset(questions, "val", max_seq_len=512, max_new_tokens=settings.max_new_tokens)
        generator = RolloutGenerator(load_model(model), settings, cpu_machine(), tests.tokenizer_dir)
        figures = generator.validate(tests, self.args.tests)
        low, high = wilson_interval(figures["val_accuracy"], min(len(tests), self.args.tests))
        names = dict(right="val_accuracy", sampled="val_sampled", best="val_best", length="val_length")
        return {name: figures[key] for name, key in names.items()} | {"low": low, "high": high}

    def answers_of(self, teacher: Path, student: Path, questions: Path, *flags) -> tuple[Path, float]:
        """Prepared chats of what the teacher answers, and the minutes that it took to write them."""
        texts = self.shared / "distill-text"  # beside the folder of the run, where 6-distill.py keeps them
        if not [*texts.glob("*/meta.json")]:
            command = ["6-distill.py", "--mode", "text", "--teacher", teacher, "--init_from", student, *flags]
            command += ["--data", questions, "--prompts", self.args.prompts, *CHATS, *ROOM]
            self.start(*command, "--max_steps", 1, "--out_dir", self.shared / "writing")
        (folder,) = (path.parent for path in texts.glob("*/meta.json"))
        return folder, read_meta(folder)["minutes_of_generation"]

    def left_of(self, minutes: float, wrote: float) -> float:
        """Of the minutes, those that are left to train in when so many went to writing."""
        return max(minutes - wrote, 0.1 * minutes)


def run_trials(description: str, trials: dict[str, Callable[[Bench], None]], flags: dict[str, dict], **defaults):
    """What `main` of a bench does."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("trial", choices=trials, help="what is tried")
    parser.add_argument("--minutes", type=above_zero, help="of each model that is compared")
    parser.add_argument("--seed", type=natural, default=0, help="of the runs that are compared")
    parser.add_argument("--prompts", type=positive, default=3000, help="questions whose answers are learnt from")
    parser.add_argument("--tests", type=positive, default=500, help="questions that are counted")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="runs whose names hold one of these words")
    parser.add_argument("--processes", type=positive, default=min(available_cores(), 2), help="that train together")
    parser.add_argument("--out_dir", type=Path, help="where all of it goes")
    for name, options in flags.items():
        parser.add_argument(name, **options)
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    bench = Bench(args)
    bench.folder.mkdir(parents=True, exist_ok=True)
    try:
        trials[args.trial](bench)
    except subprocess.CalledProcessError as error:  # of what all runs begin with
        print(f"stopped: {join_words(error.cmd[1:])} failed; the same command goes on", file=sys.stderr)
        sys.exit(1)
    finally:
        if results := bench.results():
            print("\n" + pd.DataFrame(results).drop(columns="trial").round(4).to_string(index=False))
    if bench.left:
        print(f"failed, and to be run again: {', '.join(bench.left)}", file=sys.stderr)
        sys.exit(1)
