"""A demonstration of 5-grpo.py: by reinforcement learning, a model that thinks half of the time
finds out that thinking pays.

`python quickstart.py rewards` starts this, after the demonstration of the other stages, whose pretrained model it
takes. Beside the rewards, for as many minutes, more of the chats that the model began with; both are asked the same 500
sums, of operands that no training file holds. All files go below out/quickstart/rewards.
"""

import argparse
import functools
from pathlib import Path

import pandas as pd

from base.cli import UserError, above_zero, run
from demo.tour import OUT as QUICKSTART
from demo.tour import Tour
from engine.exams import wilson_interval
from training.log import read_metrics

OUT = QUICKSTART / "rewards"
KIND = "sums"
SFT = "--max_seq_len 256 --optimizer muon --learning_rate 1e-2 --min_learning_rate 1e-4 --warmup_steps 10 --epochs 50"
GRPO = "--max_seq_len 256 --max_new_tokens 64 --max_steps 100000 --eval_interval 20"
RUNS = {  # name -> script, model that it starts from, data, share of the minutes, rows a step, flags
    "start": ("2-sft.py", QUICKSTART / "pretrain", "sft", 0.5, 8, SFT),
    "more of the same": ("2-sft.py", OUT / "start", "sft", 1.0, 8, SFT),
    "rewards": ("5-grpo.py", OUT / "start", "rl", 1.0, 8, GRPO),
}


def prepare_data(tour: Tour):
    tasks = OUT / "tasks"
    tour.run("data_process.py", "demo", "--tasks", "--output", tasks)
    tour.run("data_process.py", "sft", tasks / f"{KIND}_sft.jsonl", "--output", OUT / "dataset/sft")
    val = ["--val", tasks / f"{KIND}_rl_val.jsonl"]
    tour.run("data_process.py", "rl", tasks / f"{KIND}_rl.jsonl", *val, "--output", OUT / "dataset/rl")


def train(tour: Tour, name: str):
    script, init_from, data, share, rows, flags = RUNS[name]
    command = [script, "--init_from", init_from, "--data", OUT / "dataset" / data, "--out_dir", folder(name)]
    command += ["--max_minutes", f"{tour.minutes * share:.3g}", "--batch_size", max(1, rows // tour.processes)]
    tour.run(*command, *flags.split(), "--log_interval", 10, "--resume", "auto", *tour.processes_flag())


def probe(tour: Tour, name: str) -> dict:
    """Accuracy on the held-out sums, greedy and sampled: what 5-grpo.py says of a model before its first step."""
    out_dir = OUT / "probe"
    command = ["5-grpo.py", "--init_from", folder(name), "--data", OUT / "dataset/rl", "--out_dir", out_dir]
    tour.run(*command, *GRPO.split(), "--max_steps", 1, "--eval_rows", 500)
    return read_metrics(out_dir)[0]


def folder(name: str) -> Path:
    return OUT / name.replace(" ", "_")


def main():
    parser = argparse.ArgumentParser()  # quickstart.py, which starts this, has looked at the flags already
    parser.add_argument("--minutes", type=above_zero, required=True)
    args = parser.parse_args()
    if not (QUICKSTART / "pretrain" / "model.safetensors").exists():
        raise UserError("this begins with the model that `python quickstart.py` pretrains: run that first")
    tour = Tour(args.minutes, file=OUT / "tour.json")
    tour.once("data", functools.partial(prepare_data, tour))
    for name in RUNS:
        tour.once(name, functools.partial(train, tour, name))
    rows = {}
    for name in RUNS:
        figures = tour.once(f"probe {name}", functools.partial(probe, tour, name))
        low, high = wilson_interval(figures["val_accuracy"], 500)
        rows[name] = {
            "minutes": f"{tour.done[name]['seconds'] / 60:.1f}",
            "right, greedy": f"{figures['val_accuracy']:.1%} ({low:.1%} to {high:.1%})",
            "right, sampled": f"{figures['val_sampled']:.1%}",
            "tokens an answer": f"{figures['val_length']:.1f}",
        }
    print("\n" + pd.DataFrame(rows).to_string())
    print(f"\nread what it wrote on the way: {folder('rewards') / 'rollouts.jsonl'}")


if __name__ == "__main__":
    run(main)
