"""What a model writes to learn from: groups of answers to each question, their rewards, and rows to train on."""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jsonlines
import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from base.cli import UserError, one_line, positive
from corpus.prepared import Prepared
from engine.decoding import pack_for_decoding, shared_copy
from engine.generation import Engine, Sampling, Sequence
from engine.session import Reply, Session
from engine.tools import load_tools
from model.chat import THINK, TOOL_CALL, load_tokenizer, tokenizer_fingerprint, translate
from model.lora import has_lora, merge_lora
from model.model import CausalLM
from training.loop import Run, StopRequest
from training.loss import LossFunction
from training.machine import Machine
from training.packing import IGNORE, Batch, Piece, TrainingData, named_folders, pack
from training.rewards import check_tasks, load_reward, read_reply

ROLLOUT_FLAGS = {  # for stages whose model writes: name -> options of argparse's add_argument
    "--questions": dict(type=positive, default=32, help="in a step, over all processes"),
    "--generations": dict(type=positive, default=8, help="answers to each question"),
    "--max_new_tokens": dict(type=positive, default=128, help="of an answer"),
    "--rollout_rows": dict(type=positive, default=256, help="answers that a process writes at a time"),
    "--reward": dict(default="exact", help="exact, number, pattern, or FILE.py:FUNCTION"),
    "--tools": dict(nargs="+", default=[], metavar="NAME", help="what may be called: calculator, or FILE.py"),
}


class Tasks(TrainingData):
    """One split of a folder of questions: prompts and notes, in an order that depends on the seed alone.

    A chat, too, is a question, up to its last answer; whether another answer is right no one knows then.
    """

    def __init__(self, data: Path | list[str], split: str, args: argparse.Namespace, kinds: tuple[str, ...] = ("rl",)):
        (name, folder), *more = named_folders(data).items()
        if more or args.mix:
            raise UserError("this stage reads one folder of questions: give --data DIR alone, and no --mix")
        self.prepared = Prepared(folder, split)
        super().__init__({name: self.prepared}, {name: 1.0})
        if self.kind not in kinds:
            raise UserError(
                f"{folder} was made with `data_process.py {self.kind}`; this stage needs {' or '.join(kinds)} data"
            )
        self.checked = self.kind == "rl"
        self.notes = self.prepared.notes() if self.checked else [{}] * len(self.prepared)
        starts = self.prepared.offsets[:-1]
        self.ends = self.prepared.offsets[1:] if self.checked else last_answers(self.prepared)  # of each prompt
        lengths = self.ends - starts
        room = max(args.max_seq_len - args.max_new_tokens, 0)  # beside an answer
        self.kept = np.flatnonzero((lengths > 0) & (lengths <= room))
        self.truncated, self.dropped = 0, len(lengths) - len(self.kept)
        self.n_tokens, self.real_share = int(lengths[self.kept].sum()), 1.0
        if not len(self.kept):
            raise UserError(f"{folder}: no question of {split} has room in {args.max_seq_len} tokens beside its answer")

    def __len__(self) -> int:
        return len(self.kept)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The numbers of the questions in the order of this epoch."""
        return np.random.default_rng([seed, epoch]).permutation(self.kept)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_dir)

    def prompt(self, question: int) -> list[int]:
        return self.prepared.tokens[self.prepared.offsets[question] : self.ends[question]].tolist()


def open_tasks(args: argparse.Namespace, kinds: tuple[str, ...] = ("rl",)) -> tuple[Tasks, Tasks]:
    """Questions to learn from, and to validate with. UserError under --shard: who writes needs the whole model."""
    if args.shard:
        raise UserError("the one who writes answers needs the whole model: this runs without --shard")
    tasks = Tasks(args.data, "train", args, kinds), Tasks(args.data, "val", args, kinds)
    for split in tasks:
        if split.checked and getattr(args, "reward", None):
            check_tasks(args.reward, split.notes, f"{split.prepared.folder}/{split.prepared.split}.jsonl")
    return tasks


def last_answers(chats: Prepared) -> np.ndarray:
    """Where the last answer of each chat begins, (chats,): the last run of its trained tokens. A chat without one has
    nothing before it either."""
    begins = np.append(0, np.flatnonzero(np.diff(chats.mask, prepend=np.uint8(0)) == 1))
    return np.maximum(begins[np.searchsorted(begins, chats.offsets[1:]) - 1], chats.offsets[:-1])


@dataclass(eq=False)
class Rollout:
    """An answer to a question."""

    question: int
    sequence: Sequence
    reply: Reply | None  # None: it is no answer
    reward: float
    advantage: float = 0.0


@dataclass
class RolloutBatch(Batch):
    """Rows of prompts with answers; only tokens that the model chose have a label."""

    advantages: Tensor  # (B, T)
    old_log_probs: Tensor  # (B, T): when they were written

    MORE = 2


class RolloutWriter:
    """Writes answers with the model as it is now, and rewards them; each process takes its share of the questions."""

    def __init__(self, model: CausalLM, args: argparse.Namespace, machine: Machine, tokenizer_dir: Path):
        self.model, self.args, self.machine = model, args, machine
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self.tokenizer_sha256 = tokenizer_fingerprint(tokenizer_dir)
        self.reward = load_reward(args.reward)
        self.tools = load_tools(args.tools)

    def write(
        self, tasks: Tasks, questions: np.ndarray, answers: int, seed: str, temperature: float = 1.0
    ) -> list[list[Rollout]]:
        """So many answers to each question: from the model's own distribution, of which nothing is left out.

        The random numbers of an answer depend on `seed`, its question and its place alone, not on the process.
        """
        args, sampling = self.args, Sampling(temperature)
        flags = argparse.Namespace(max_new_tokens=args.max_new_tokens, think="show", max_think_tokens=0)
        vars(flags).update(sampling._asdict())
        model = decoding_copy(self.model)
        session = Session(model, self.tokenizer, flags, self.tools)
        engine = Engine(model, args.rollout_rows, keep_log_probs=True)
        groups = []
        for question in questions[self.machine.rank :: self.machine.world_size]:
            prompt = tasks.prompt(question)
            if tasks.tokenizer_sha256 != self.tokenizer_sha256:  # a teacher may have its own
                prompt = translate(prompt, tasks.tokenizer, self.tokenizer)
            sequences = [session.sequence(prompt, f"{seed}/{question}/{i}") for i in range(answers)]
            groups.append((int(question), sequences))
            for sequence in sequences:
                engine.submit(sequence)
        while engine.busy:
            engine.step()
        return [[self._rewarded(question, tasks, one) for one in sequences] for question, sequences in groups]

    def _rewarded(self, question: int, tasks: Tasks, sequence: Sequence) -> Rollout:
        reply = read_reply(sequence, self.tokenizer)
        if reply is None or not tasks.checked:
            return Rollout(question, sequence, reply, 0.0)
        note = tasks.notes[question]
        try:
            reward = float(self.reward(reply, note))
            if not math.isfinite(reward):
                raise ValueError(f"it gives {reward}")
        except Exception as error:  # of a function of the user's, or of an answer that is none for it
            what = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"--reward {self.args.reward} cannot judge an answer to {note!r:.200} ({what})") from None
        return Rollout(question, sequence, reply, reward)

    def validate(self, tasks: Tasks, limit: int | None) -> dict[str, float]:
        """Mean rewards over the first `limit` questions, or all: of the likeliest answer, sampled ones, the best."""
        questions = tasks.kept[:limit]
        sums = Counter()
        for (greedy,) in self.write(tasks, questions, 1, "greedy", temperature=0.0):
            sums.update(accuracy=greedy.reward, length=len(greedy.sequence.tokens), questions=1)
        for group in self.write(tasks, questions, self.args.generations, "sampled"):
            rewards = [one.reward for one in group]
            sums.update(sampled=sum(rewards) / len(rewards), best=max(rewards))
        total = self.machine.add_up(sums)
        names = ("accuracy", "sampled", "best", "length")
        return {f"val_{name}": total[name] / total["questions"] for name in names}

    def write_samples(self, directory: Path, step: int, groups: list[list[Rollout]], tasks: Tasks):
        """Appends the best and the worst answer of the first groups to rollouts.jsonl, to be read."""
        if self.machine.rank:
            return
        with jsonlines.open(directory / "rollouts.jsonl", "a", dumps=partial(json.dumps, ensure_ascii=False)) as lines:
            for group in groups[:4]:
                for one in (max(group, key=lambda one: one.reward), min(group, key=lambda one: one.reward)):
                    text = self.tokenizer.decode(one.sequence.tokens, skip_special_tokens=False)
                    lines.write({"step": step, **tasks.notes[one.question], "written": text, "reward": one.reward})


def decoding_copy(model: CausalLM) -> CausalLM:
    """The model as it is now, for an Engine: with its adapters merged, and on a CPU with layers laid out for it."""
    writer = shared_copy(model).eval()
    if has_lora(writer):
        merge_lora(writer)  # its layers get matrices of their own
    return pack_for_decoding(writer) if model.lm_head.weight.device.type == "cpu" else writer


# The sums of a step over its answers, which describe() makes means of.
METRICS = (
    *("answers", "reward", "tokens", "ended", "thinks", "surprise", "groups", "solved", "all_right", "all_wrong"),
    *("calls", "steps", "sampling_seconds", "gap", "scored", "places"),
)


def sums_of(groups: list[list[Rollout]]) -> dict[str, float]:
    """What is counted of a step's answers: METRICS, but for those that learning adds."""
    sums = Counter(steps=1)  # one in each process
    for group in groups:
        rewards = [one.reward for one in group]
        sums.update(groups=1, solved=max(rewards) > 0, all_right=min(rewards) == 1, all_wrong=max(rewards) == 0)
        for one in group:
            sequence = one.sequence
            chosen = [log_prob for log_prob, own in zip(sequence.log_probs, sequence.chosen) if own]
            sums.update(answers=1, reward=one.reward, tokens=len(chosen), surprise=-sum(chosen))
            sums.update(ended=sequence.finish_reason == "stop", thinks=THINK in sequence.tokens)
            sums.update(calls=sequence.tokens.count(TOOL_CALL))
    return dict(sums)


def describe_rollouts(window: Counter) -> dict[str, float]:
    """A line of the log from sums over steps. The mean surprise of sampled tokens, -ln p, estimates the entropy."""
    answers, groups = max(window["answers"], 1), max(window["groups"], 1)
    return {
        "reward": window["reward"] / answers,
        "length": window["tokens"] / answers,
        "ended": window["ended"] / answers,
        "thinks": window["thinks"] / answers,
        "calls": window["calls"] / answers,
        "entropy": window["surprise"] / max(window["tokens"], 1),
        "groups_solved": window["solved"] / groups,
        "groups_all_right": window["all_right"] / groups,
        "groups_all_wrong": window["all_wrong"] / groups,
        "gap": window["gap"] / max(window["scored"], 1),
        "sampling_seconds": window["sampling_seconds"] / max(window["steps"], 1),
    }


def learn_from_rollouts(
    run: Run,
    writer: RolloutWriter,
    train_set: Tasks,
    loss_fn: LossFunction,
    choose: Callable[[list[list[Rollout]]], tuple[list[Rollout], int]],
    validate: Callable[[int | None], dict],
    describe: Callable[[Counter], dict],
    updates: int = 1,
):
    """The loop of a stage whose model writes what it learns from: write, choose, learn, log, validate, save.

    choose(groups of answers) -> those to learn from, and what the sum of their loss is divided by, so that loss_fn
    itself counts 0. `updates` steps of the optimizer are made with the same answers. validate, describe: as in
    Run.end_step.
    """
    args, progress = run.args, run.progress
    if progress.step == 0:
        run.log.add(0.0, {"step": 0, "tokens": 0, **validate(args.eval_rows)})
    order = train_set.order(args.seed, progress.epoch)
    with StopRequest() as stop:
        while run.share_done() < 1:
            run.begin_step()

            # Write answers to the next questions.
            start = time.perf_counter()
            questions = order[progress.row : progress.row + args.questions]
            if stop.made:  # the other processes hear of it when the gradients are added up
                questions = questions[:0]
            groups = writer.write(train_set, questions, args.generations, f"{args.seed}/{progress.step}")
            run.buffer.add(**sums_of(groups), sampling_seconds=time.perf_counter() - start)

            # Learn.
            chosen, count = choose(groups)
            step_sums = Counter()
            for update in range(updates):
                run.buffer.add(count=count)
                for batch in learning_batches(chosen, args.max_seq_len, args.batch_size):
                    run.accumulate(loss_fn, batch)
                sums = run.all_reduce(stop.made and update == 0)  # once the weights have moved, the step is finished
                if sums["stop"]:
                    break
                grad_norm = run.update(sums) if sums["scored"] else run.skip_update()
                step_sums.update(sums)
            if sums["stop"]:  # leave the step out; --resume does it again
                run.forget_step()
                break
            progress.advance(len(questions), len(train_set), step_sums)
            if progress.row == 0:
                order = train_set.order(args.seed, progress.epoch)
            if not math.isfinite(grad_norm):
                run.report_skipped()
                continue

            # Log, validate, save.
            if run.end_step(step_sums, step_sums["places"], grad_norm, validate, describe):
                writer.write_samples(run.log.directory, progress.step, groups, train_set)
        run.finish(stop)


def learning_batches(rollouts: list[Rollout], max_seq_len: int, batch_size: int) -> Iterator[RolloutBatch]:
    """The rollouts, packed into rows, batch_size rows at a time."""
    lengths = np.array([len(one.sequence.prompt) + len(one.sequence.tokens) - 1 for one in rollouts], np.int64)
    row_of = pack(lengths, max_seq_len)
    for first in range(0, int(row_of.max(initial=-1)) + 1, batch_size):
        rows = range(first, min(first + batch_size, row_of.max() + 1))
        pieces = [[_piece(rollouts[i]) for i in np.flatnonzero(row_of == row)] for row in rows]
        yield RolloutBatch.of(pieces, max_seq_len, "train")


def _piece(one: Rollout) -> Piece:
    """An answer after its prompt; what stands before the answer has no label."""
    sequence = one.sequence
    ids = np.array(sequence.prompt + sequence.tokens)
    before = np.full(len(sequence.prompt) - 1, IGNORE)
    labels = np.concatenate((before, np.where(sequence.chosen, sequence.tokens, IGNORE)))
    log_probs = np.concatenate((np.zeros(len(before)), sequence.log_probs))
    return Piece(one.question, ids[:-1], labels, (np.full(len(labels), one.advantage), log_probs))
