"""What rewards are worth, beside as many minutes of other training from the same start.

    python -m bench.rewards choosing               thinking pays: sums of three digits
    python -m bench.rewards thinking               thinking better: a start whose own thoughts seldom lead to the sum
    python -m bench.rewards calling                a tool pays: products and a calculator
    python -m bench.rewards thinking --seed 1      another run from the same start

choosing   the start, `tiny`, has learnt the demonstration's chats, and sums, one half answered at once and one half
           worked out column by column. Counted is also what it answers to the demonstration's other questions.
thinking   the start has learnt 500 sums (--chats), all worked out.
calling    the start has learnt products, one half answered at once and one half by a call of the calculator, and sums
           worked out, from which it learns to copy numbers. Counted is also how many of the sums it can do.

From there, for --minutes each: more of the chats that the start has learnt; its own right answers to questions, the
minutes in which it wrote them counted; what a teacher who knows would show (20,000 chats, all of them slow); and
rewards. Counted are right answers to 500 questions whose operands stand in no other file. bench/trials.py says how to
go on with a bench that was stopped.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from base.cli import positive, run
from bench.trials import CHATS, ROOM, Bench, run_trials
from demo.tour import grade

GRPO = [*ROOM, *"--max_steps 100000 --eval_interval 1000".split()]
# A weak start is seldom right: of many questions a step still learns from some fifty different right answers.
MANY = (
    *"--questions 256 --generations 4 --worse_weight 0".split(),
    *"--optimizer muon --learning_rate 5e-3 --min_learning_rate 1e-4".split(),
)


def compare(
    bench: Bench,
    kind: str,
    own: list,
    figures: Callable[[Path], dict] = lambda model: {},
    tools: tuple[str, ...] = (),
    grpo: tuple[str, ...] = (),
):
    """All runs from one start, which learns from its own chats alone: --data, and what goes with it."""
    minutes, questions = bench.args.minutes, bench.questions(kind)
    shown = bench.prepared("shown", "data_process.py", "sft", bench.tasks() / f"{kind}_traces.jsonl")
    offered = ["--tools", *tools] if tools else []
    sft = [*CHATS, *(ROOM[:2] if tools else [])]  # a tool's description is long
    limit = ["--max_steps", bench.args.start_steps]
    start = bench.trained("1-pretrain.py", "start", "--preset", "tiny", *own, *sft, *limit)

    def probe(model: Path) -> dict:
        return bench.probe(model, questions, tools) | figures(model)

    def learn(name: str, script: str, left: float, *flags) -> dict:
        return probe(bench.learn(script, name, left, "--init_from", start, *flags)) | {"minutes_of_training": left}

    def own_right() -> dict:
        data, wrote = bench.answers_of(start, start, questions, "--only_right", *offered)
        return learn("own_right", "2-sft.py", bench.left_of(minutes, wrote), "--data", data, *sft)

    bench.once("start", lambda: probe(start))
    bench.once("more of the same", lambda: learn("more", "2-sft.py", minutes, *own, *sft))
    bench.once("own right answers", own_right)
    bench.once("shown how", lambda: learn("shown_how", "2-sft.py", minutes, "--data", shown, *sft))
    bench.once("rewards", lambda: learn("rewards", "5-grpo.py", minutes, "--data", questions, *GRPO, *grpo, *offered))


def choosing(bench: Bench):
    demo = bench.prepared("demo", "data_process.py", "demo")
    sums = bench.prepared("sums", "data_process.py", "sft", bench.tasks() / "sums_sft.jsonl")
    chats = bench.prepared("chats", "data_process.py", "sft", demo / "sft.jsonl", "--val", demo / "sft_val.jsonl")
    own = ["--data", f"sums={sums}", f"chats={chats}", "--mix", "sums=0.5", "chats=0.5"]

    def others(model: Path) -> dict:
        greedy = ["--temperature", 0, "--repetition_penalty", 1, "--max_new_tokens", 64, "--batch_size", 48]
        lines = bench.start("eval.py", "--model", model, "--batch", demo / "questions.jsonl", *greedy, output=True)
        return {"others_right": grade([json.loads(line) for line in lines.splitlines()])["right"]}

    compare(bench, "sums", own, others)


def thinking(bench: Bench):
    few = bench.first(bench.args.chats, bench.tasks() / "sums_traces.jsonl")
    compare(bench, "sums", ["--data", bench.prepared("few", "data_process.py", "sft", few)], grpo=MANY)


def calling(bench: Bench):
    products = bench.prepared("own", "data_process.py", "sft", bench.tasks() / "products_sft.jsonl")
    sums = bench.prepared("sums", "data_process.py", "sft", bench.tasks() / "sums_traces.jsonl")
    own = ["--data", f"products={products}", f"sums={sums}", "--mix", "products=0.5", "sums=0.5"]
    others = bench.questions("sums")

    def sums_right(model: Path) -> dict:
        return {"others_right": bench.probe(model, others)["right"]}

    compare(bench, "products", own, sums_right, ("calculator",), MANY)


TRIALS = {function.__name__: function for function in (choosing, thinking, calling)}
FLAGS = {
    "--start_steps": dict(type=positive, default=400, help="in which the start learns"),
    "--chats": dict(type=positive, default=500, help="thinking: that the start has learnt"),
}
main = partial(run_trials, __doc__, TRIALS, FLAGS, minutes=2.0, out_dir=Path("out/bench-rewards"))


if __name__ == "__main__":
    run(main)
