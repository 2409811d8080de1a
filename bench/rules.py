"""What each cleaning rule is worth: bits per byte after training on text cleaned by all rules, none, or all but one.

    python -m bench.rules raw/ --val clean.jsonl  # there is none at hand: bench/dirt.py makes some
    python -m bench.rules raw/ --val clean.jsonl --seeds 0 1 2 3 4

Every run has the same steps, so the same number of tokens, and is measured on the same texts. A difference to all rules
is that of runs with one seed; its interval of 95 % is Student's, and where 0 lies inside, there is no difference to
see. A rule without which the training tokens are the same has nothing to measure. What is measured is kept in
--out_dir, so that a bench that was stopped goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from base import cli
from base.cli import HelpFormatter, UserError, join_words, natural, positive
from base.files import sha256
from corpus.kinds import KINDS
from corpus.prepared import read_meta

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # by the number of seeds
RULES = [*KINDS["pretrain"].rules]
SKIPPED = {"all rules": [], "no rule": RULES} | {f"without {rule}": [rule] for rule in RULES}
SKIPPED["without duplicates' rules"] = ["exact_duplicate", "near_duplicate"]  # either finds the copies


def run(*words) -> str:
    """Runs a script of the project; what it printed."""
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if ended.returncode:  # it has said why
        raise UserError(f"stopped: {join_words(command[1:])}")
    return ended.stdout


def prepare(out_dir: Path, name: str, inputs: list[str], val: list[str]) -> Path:
    folder = out_dir / name.replace(" ", "_")
    if not (folder / "meta.json").exists():
        skipped = ["--skip_rules", ",".join(SKIPPED[name])] if SKIPPED[name] else []
        run("data_process.py", "pretrain", *inputs, "--val", *val, "--output", folder, *skipped)
    return folder


def bits_per_byte(folder: Path, preset: str, steps: int, seed: int, validation: Path) -> float:
    """Of a model trained on the texts of `folder` with this seed, on the validation texts of `validation`."""
    kept = folder.with_name(f"{folder.name}-{preset}-{steps}-{seed}.json")
    if not kept.exists():
        model = folder.with_name("model")
        flags = ["--preset", preset, "--max_seq_len", "256", "--batch_size", "8", "--device", "cpu"]
        flags += ["--epochs", "1000", "--max_steps", steps, "--seed", seed, "--eval_rows", "1"]
        run("1-pretrain.py", "--data", folder, "--out_dir", model, *flags)
        figures = run("eval.py", "--model", model, "--data", validation, "--max_seq_len", "256", "--json")
        kept.write_text(figures.splitlines()[-1])
    return json.loads(kept.read_text())["val_bits_per_byte"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text that was not cleaned")
    parser.add_argument("--val", nargs="+", required=True, metavar="FILE", help="texts to measure on")
    parser.add_argument("--preset", default="tiny", help="size of the model")
    parser.add_argument("--steps", type=positive, default=300, help="of 8 rows of 256 tokens")
    parser.add_argument("--seeds", nargs="+", type=natural, default=[0, 1, 2], help="2 to 8 of them")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="words: those that hold one of them; the rest is counted"
    )
    parser.add_argument("--out_dir", type=Path, default=Path("out/rules"), help="where all of it goes")
    args = parser.parse_args()
    texts, size = (args.inputs, args.val), (args.preset, args.steps)
    all_rules = prepare(args.out_dir, "all rules", *texts)
    reference = np.array([bits_per_byte(all_rules, *size, seed, all_rules) for seed in args.seeds])
    print(f"{'':26}{'texts':>9}{'tokens':>13}  bits/byte  difference to all rules")
    for name in SKIPPED:
        folder = prepare(args.out_dir, name, *texts)
        counts = read_meta(folder)["splits"]["train"]
        line = f"{name:26}{counts['documents']:9,}{counts['tokens']:13,}"
        if name != "all rules" and sha256(folder / "train.bin") == sha256(all_rules / "train.bin"):
            print(f"{line}  the same tokens", flush=True)
            continue
        if not any(word in name for word in args.only):
            print(line, flush=True)
            continue
        bits = np.array([bits_per_byte(folder, *size, seed, all_rules) for seed in args.seeds])
        line += f"  {bits.mean():9.3f}"
        if name != "all rules":
            difference = bits - reference
            half = STUDENT[len(bits)] * difference.std(ddof=1) / len(bits) ** 0.5
            word = "none to see" if abs(difference.mean()) < half else "worse" if difference.mean() > 0 else "better"
            line += f"  {difference.mean():+.3f} ± {half:.3f}  {word}"
        print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
