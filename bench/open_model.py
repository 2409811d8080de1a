"""An open model through the stages: minutes, and its answers before and after, greedy and unedited.

    python tests/interop/fetch_open_models.py open_models
    python bench/open_model.py open_models/smollm2 lora           one stage; without a name, all of them

The task is made up: spoken commands for a home, to be answered with a JSON call. The questions below are not among the
phrases that are trained. Everything is written to --out (out/open_model).
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

ROOMS = ["kitchen", "bedroom", "bathroom", "garden", "garage", "office", "hall", "attic"]
THINGS = {"light": ["light", "lamp"], "heater": ["heater", "radiator"], "blinds": ["blinds", "shutters"]}
PHRASES = [
    "Turn {state} the {thing} in the {room}.",
    "Please switch {state} the {room} {thing}.",
    "{room} {thing} {state}",
]
HELD_OUT = [  # phrased otherwise
    "Could you turn the lamp in the attic on?",
    "I want the garage radiator off now",
    "Switch the shutters of the office on, please.",
]
GENERAL = ["What is the capital of France?", "Write one sentence about the sea."]
SUMS = [f"What is {a} + {b}? Answer with the number only." for a in range(2, 10) for b in range(2, 10)]
STAGES = ("pretrain", "sft", "lora", "dpo", "grpo", "distill")


def make_records(rng: random.Random) -> dict[str, list[dict]]:
    """Records of each command of data_process.py."""
    commands = []
    for room in ROOMS:
        for name, words in THINGS.items():
            for state in ("on", "off"):
                for phrase in PHRASES:
                    text = phrase.format(state=state, thing=rng.choice(words), room=room)
                    call = json.dumps({"name": f"set_{name}", "room": room, "state": state})
                    commands.append((text, call))
    rng.shuffle(commands)
    chats = [{"messages": [turn("user", text), turn("assistant", call)]} for text, call in commands]
    pairs = []
    for text, call in commands:
        rude = f"Do it yourself. {call}"
        pairs.append({"chosen": [turn("user", text), turn("assistant", call)]})
        pairs[-1]["rejected"] = [turn("user", text), turn("assistant", rude)]
    sums = [{"prompt": text, "answer": str(sum(map(int, re.findall(r"\d+", text))))} for text in SUMS]
    texts = [{"text": " ".join(f"{text} {call}" for text, call in rng.sample(commands, 8))} for _ in range(60)]
    return {"sft": chats, "dpo": pairs, "rl": sums, "pretrain": texts}


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def run(*command) -> str:
    """The output of a script. Prints it where it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def prepare(model: Path, out: Path):
    for kind, records in make_records(random.Random(0)).items():
        path = out / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        flags = ["--workers", 1, "--val_fraction", 0.05, *(["--skip_rules", "near_duplicate"] * (kind == "pretrain"))]
        run("data_process.py", kind, path, "--tokenizer", model, "--output", out / "data" / kind, *flags)


def answers(model: Path, out: Path, questions: list[str]) -> list[str]:
    path = out / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions), "utf-8")
    flags = ["--temperature", 0, "--repetition_penalty", 1, "--max_new_tokens", 40]
    lines = run("eval.py", "--model", model, "--batch", path, *flags).splitlines()
    return [json.loads(line)["answer"] for line in lines]


def commands_of(model: Path, out: Path, steps: int) -> dict[str, tuple[Path, list]]:
    """By stage: the folder that it writes, and its command."""
    short = ["--max_seq_len", 256, "--batch_size", 1, "--max_steps", steps, "--warmup_steps", 3, "--eval_rows", 2]

    def command(script: str, name: str, kind: str, rate: float, *flags) -> tuple[Path, list]:
        rates = ["--learning_rate", rate, "--min_learning_rate", rate / 10]
        paths = ["--init_from", model, "--data", out / "data" / kind, "--out_dir", out / name]
        return out / name, [script, *paths, *short, *rates, *flags]

    lora = ["--lora_rank", 8]
    grpo = ["--reward", "number", "--questions", 4, "--generations", 4, "--max_new_tokens", 16, *lora]
    grpo += ["--max_steps", max(steps // 4, 1), "--eval_interval", 1000]
    distill = ["--teacher", out / "sft", "--mode", "logits", *lora]
    return {
        "pretrain": command("1-pretrain.py", "pretrain", "pretrain", 1e-4),
        "sft": command("2-sft.py", "sft", "sft", 5e-5),
        "lora": command("3-lora.py", "lora", "sft", 5e-4),
        "dpo": command("4-dpo.py", "dpo", "dpo", 5e-5, *lora),
        "grpo": command("5-grpo.py", "grpo", "rl", 2e-4, *grpo),
        "distill": command("6-distill.py", "distill", "sft", 5e-4, *distill),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="all, without any")
    parser.add_argument("--out", type=Path, default=Path("out/open_model"))
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "data" / "pretrain" / "meta.json").exists():
        prepare(args.model, args.out)
    stages = commands_of(args.model, args.out, args.steps)
    for name in args.stages or STAGES:
        folder, command = stages[name]
        questions = [*HELD_OUT, *GENERAL] + (SUMS[:3] if name == "grpo" else [])
        start = time.perf_counter()
        output = run(*command)
        minutes = (time.perf_counter() - start) / 60
        print(f"\n{name}: {minutes:.1f} minutes\n{output}", flush=True)
        before = answers(args.model, args.out, questions)
        for question, old, new in zip(questions, before, answers(folder, args.out, questions)):
            print(f"> {question}\n  before: {old!r}\n  after:  {new!r}", flush=True)


if __name__ == "__main__":
    main()
