"""What a model generates to learn from: groups of answers to each question, their rewards, and rows to train on."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jsonlines
import numpy as np
from torch import Tensor

from base.cli import UserError, one_line, positive
from base.files import ROLLOUTS_FILE
from corpus.prepared import Prepared
from engine.decoding import pack_for_decoding, shared_copy
from engine.generation import Engine, Sequence
from engine.grammar import compile_grammar, read_schema
from engine.session import GenerationConfig, Reply, Session
from engine.tools import load_tools
from model.chat import ChatTokenizer, decode_chat, load_tokenizer, tokenizer_fingerprint, translate
from model.lora import has_lora, merge_lora
from model.model import CausalLM
from training.machine import Machine
from training.packing import IGNORE, Batch, PackedDataset, Piece, Pieces, named_folders, pack, read_mix
from training.rewards import check_tasks, load_reward, read_reply

ROLLOUT_FLAGS = {  # for stages whose model generates: name -> options of argparse's add_argument
    "--questions": dict(type=positive, default=32, help="in a step, over all processes"),
    "--generations": dict(type=positive, default=8, help="answers to each question"),
    "--max_new_tokens": dict(type=positive, default=128, help="of an answer"),
    "--rollout_rows": dict(type=positive, default=256, help="answers that a process generates at a time"),
    "--reward": dict(default="exact", help="exact, number, pattern, or FILE.py:FUNCTION"),
    "--tools": dict(nargs="+", default=[], metavar="NAME", help="what may be called: calculator, or FILE.py"),
    "--json_schema": dict(type=Path, metavar="FILE", help="answers are JSON of this schema"),
}


@dataclass(frozen=True)
class RolloutSettings:
    generations: int  # answers to each question
    max_new_tokens: int
    rollout_rows: int  # answers that a process generates at a time
    reward: str
    tools: list[str]
    json_schema: Path | None = None


class PromptDataset(PackedDataset):
    """One split of folders of questions: prompts, and the notes that a reward function needs. A question is known by
    the number of its document.

    A chat is a question too, up to its last answer; no reward function knows whether another answer to it is right.
    """

    def __init__(
        self,
        data: Path | list[str],
        split: str,
        max_seq_len: int,
        max_new_tokens: int,
        weights: dict[str, float] | None = None,
        kinds: tuple[str, ...] = ("rl", "sft"),
    ):
        """Prompts that leave no room for max_new_tokens in max_seq_len are dropped. UserError where none is left."""
        self.room = max(max_seq_len - max_new_tokens, 0)
        super().__init__(data, split, max_seq_len, weights, kinds)
        if not len(self.piece_document):
            raise UserError(f"{self.paths}: no question of {split} has room in {max_seq_len} tokens beside its answer")
        self.checked = all(one.kind == "rl" for one in self.folders.values())  # whether rewards say what is right

    def pieces_of(self, prepared: Prepared) -> Pieces:
        starts = prepared.offsets[:-1]
        lengths = (prepared.offsets[1:] if prepared.kind == "rl" else last_answers(prepared)) - starts
        kept = np.flatnonzero((lengths > 0) & (lengths <= self.room))
        return Pieces(kept, starts[kept], lengths[kept], dropped=len(lengths) - len(kept))

    def rows_of(self, lengths: np.ndarray) -> np.ndarray:
        """Each prompt is a row of its own: its answers are packed when they are there."""
        return np.arange(len(lengths))

    def first_questions(self, limit: int | None) -> np.ndarray:
        """The first `limit` questions of each folder, or all."""
        rows = [first + np.arange(n)[:limit] for first, n in zip(self.first_row, self.n_rows)]
        return self.piece_document[np.concatenate(rows)]

    @property
    def real_fraction(self) -> float:
        return 1.0

    @cached_property
    def notes(self) -> list[dict]:
        """By document."""
        folders = self.folders.values()
        return [note for one in folders for note in (one.notes() if one.kind == "rl" else [{}] * len(one))]

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        return load_tokenizer(self.tokenizer_dir)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The questions in the order of this epoch."""
        return self.piece_document[super().order(seed, epoch)]

    def prompt(self, question: int) -> list[int]:
        return self.pieces_in(np.searchsorted(self.piece_document, question))[0].input_ids.tolist()


def open_prompts(
    data: Path | list[str],
    mix: list[str] | None,
    max_seq_len: int,
    max_new_tokens: int,
    *kinds: str,
    reward: str | None = None,
) -> tuple[PromptDataset, PromptDataset]:
    """The two splits, train and val, of folders of these kinds, as open_data opens them for the other stages.

    UserError for a question that `reward`, if given, cannot judge an answer to.
    """
    weights = read_mix(mix, list(named_folders(data)))
    train_set, val_set = (
        PromptDataset(data, split, max_seq_len, max_new_tokens, weights, kinds) for split in ("train", "val")
    )
    if reward:
        for dataset in (train_set, val_set):
            check_tasks(reward, dataset.notes, dataset.paths)
    return train_set, val_set


def last_answers(chats: Prepared) -> np.ndarray:
    """Where the last answer of each chat begins, (chats,): the last run of its trained tokens. A chat without one has
    nothing before it either."""
    begins = np.append(0, np.flatnonzero(np.diff(chats.mask, prepend=np.uint8(0)) == 1))
    return np.maximum(begins[np.searchsorted(begins, chats.offsets[1:]) - 1], chats.offsets[:-1])


@dataclass(eq=False)
class Rollout:
    """An answer to a question."""

    question: int  # the number of its document
    sequence: Sequence
    reply: Reply | None  # None: it is no answer
    reward: float = 0.0
    advantage: float = 0.0


@dataclass
class RolloutBatch(Batch):
    """Rows of prompts with answers; only tokens that the model chose have a label."""

    advantages: Tensor  # (B, T)
    old_log_probs: Tensor  # (B, T): at generation

    EXTRA = 2


# The sums of a step over its answers, which rollout_metrics() turns into means.
METRICS = (
    *("answers", "reward", "tokens", "ended", "thinks", "surprise", "groups", "solved", "all_right", "all_wrong"),
    *("calls", "steps", "sampling_seconds", "gap", "scored"),
)


class RolloutGenerator:
    """Generates answers with the model as it is now; each process answers its part of the questions."""

    def __init__(self, model: CausalLM, settings: RolloutSettings, machine: Machine, tokenizer_dir: Path):
        if machine.shards:
            raise UserError("generation needs the whole model in each process: this runs without --shard")
        self.model, self.settings, self.machine = model, settings, machine
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self.tokenizer_sha256 = tokenizer_fingerprint(tokenizer_dir)
        self.reward = load_reward(settings.reward)
        self.tools = load_tools(settings.tools)
        schema = settings.json_schema
        self.grammar = compile_grammar(self.tokenizer, read_schema(schema)) if schema else None

    def generate(
        self, data: PromptDataset, questions: np.ndarray, answers: int, seed: str, temperature: float = 1.0
    ) -> list[list[Rollout]]:
        """So many answers to each question, sampled from the model's own distribution without truncating it.

        The random numbers of an answer depend on `seed`, its question and its place alone, not on the process.
        With a JSON schema, a token is sampled from those that it allows, and one without alternative is not learned
        from; the log-probabilities are the model's own, over all tokens, in generation and in training.
        """
        sampling = dict(temperature=temperature, top_p=1.0, repetition_penalty=1.0)
        config = GenerationConfig(max_new_tokens=self.settings.max_new_tokens, **sampling)
        model = decoding_copy(self.model)
        session = Session(model, self.tokenizer, config, self.tools, self.grammar)
        engine = Engine(model, self.settings.rollout_rows, keep_log_probs=True)
        groups = []
        for question in questions[self.machine.rank :: self.machine.world_size].tolist():
            prompt = data.prompt(question)
            if data.tokenizer_sha256 != self.tokenizer_sha256:  # a teacher may have its own
                prompt = translate_prompt(prompt, data.tokenizer, self.tokenizer)
            sequences = [session.sequence(prompt, f"{seed}/{question}/{i}") for i in range(answers)]
            groups.append([Rollout(question, sequence, None) for sequence in sequences])
            for sequence in sequences:
                engine.submit(sequence)
        while engine.busy:
            if self.machine.leaves_early():  # the step will be left out
                return []
            engine.step()
        for group in groups:
            for one in group:
                one.reply = read_reply(one.sequence, self.tokenizer)
        return groups

    def score(self, data: PromptDataset, groups: list[list[Rollout]]):
        """Gives each answer its reward; 0 where it is none, or where its question has no known answer."""
        for one in (one for group in groups for one in group):
            if one.reply is None or not data.checked:
                continue
            note = data.notes[one.question]
            try:
                one.reward = float(self.reward(one.reply, note))
                if not math.isfinite(one.reward):
                    raise ValueError(f"it gives {one.reward}")
            except Exception as error:  # a user's function can raise anything
                what = f"{type(error).__name__}: {one_line(error)}"
                raise UserError(
                    f"--reward {self.settings.reward} cannot judge an answer to {note!r:.200} ({what})"
                ) from None

    def sums_of(self, groups: list[list[Rollout]]) -> dict[str, float]:
        """METRICS of a step's answers, without those that the loss function adds."""
        sums = Counter(steps=1)  # one in each process
        think, call = (self.tokenizer.tags.get(part, (None,))[0] for part in ("reasoning", "tool_call"))
        for group in groups:
            rewards = [one.reward for one in group]
            sums.update(groups=1, solved=max(rewards) > 0, all_right=min(rewards) == 1, all_wrong=max(rewards) == 0)
            for one in group:
                sequence = one.sequence
                chosen = [log_prob for log_prob, own in zip(sequence.log_probs, sequence.chosen) if own]
                sums.update(answers=1, reward=one.reward, tokens=len(chosen), surprise=-sum(chosen))
                sums.update(ended=sequence.finish_reason == "stop", thinks=think in sequence.tokens)
                sums.update(calls=sequence.tokens.count(call))
        return dict(sums)

    def validate(self, data: PromptDataset, limit: int | None) -> dict[str, float]:
        """Mean rewards over the first `limit` questions of each folder, or all.

        Of the greedy answer, of sampled ones, and of the best of those.
        """
        questions, sums = data.first_questions(limit), Counter()
        greedy = self.generate(data, questions, 1, "greedy", temperature=0.0)
        sampled = self.generate(data, questions, self.settings.generations, "sampled")
        self.score(data, greedy + sampled)
        for (one,) in greedy:
            sums.update(accuracy=one.reward, length=len(one.sequence.tokens), questions=1)
        for group in sampled:
            rewards = [one.reward for one in group]
            sums.update(sampled=sum(rewards) / len(rewards), best=max(rewards))
        sums.update(stopped=self.machine.leaves_early())
        total = self.machine.sum_counters(sums)
        if total["stopped"]:
            return {}
        names = ("accuracy", "sampled", "best", "length")
        return {f"val_{name}": total[name] / total["questions"] for name in names}

    def save_samples(self, directory: Path, step: int, groups: list[list[Rollout]], data: PromptDataset):
        """Appends the best and the worst answer of the first groups to rollouts.jsonl, to be read."""
        if self.machine.rank:
            return
        with jsonlines.open(directory / ROLLOUTS_FILE, "a", dumps=partial(json.dumps, ensure_ascii=False)) as lines:
            for group in groups[:4]:
                for one in (max(group, key=lambda one: one.reward), min(group, key=lambda one: one.reward)):
                    text = self.tokenizer.decode(one.sequence.tokens, skip_special_tokens=False)
                    lines.write({"step": step, **data.notes[one.question], "written": text, "reward": one.reward})


def translate_prompt(prompt: list[int], source: ChatTokenizer, target: ChatTokenizer) -> list[int]:
    """The ids of a prompt for a model with another tokenizer, and maybe another chat format."""
    return translate(prompt, source, target) if target.is_own else target.prompt(*decode_chat(source, prompt))


def decoding_copy(model: CausalLM) -> CausalLM:
    """The model as it is now, for an Engine: with its adapters merged, and packed for decoding."""
    copy = shared_copy(model).eval()
    if has_lora(copy):
        merge_lora(copy)  # its layers get matrices of their own
    return pack_for_decoding(copy)


def rollout_metrics(window: Counter) -> dict[str, float]:
    """A line of the log, from sums over steps. The mean surprise of sampled tokens, -ln p, estimates the entropy."""
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


def learning_batches(rollouts: list[Rollout], max_seq_len: int, batch_size: int) -> Iterator[RolloutBatch]:
    """The rollouts, packed into rows, batch_size rows at a time."""
    lengths = np.array([len(one.sequence.prompt) + len(one.sequence.tokens) - 1 for one in rollouts], np.int64)
    row_of = pack(lengths, max_seq_len)
    for first in range(0, int(row_of.max(initial=-1)) + 1, batch_size):
        rows = range(first, min(first + batch_size, row_of.max() + 1))
        pieces = [[_piece(rollouts[i]) for i in np.flatnonzero(row_of == row)] for row in rows]
        yield RolloutBatch.of(pieces, max_seq_len, "train")


def _piece(one: Rollout) -> Piece:
    """An answer after its prompt; the prompt has no labels."""
    sequence = one.sequence
    ids = np.array(sequence.prompt + sequence.tokens)
    before = np.full(len(sequence.prompt) - 1, IGNORE)
    labels = np.concatenate((before, np.where(sequence.chosen, sequence.tokens, IGNORE)))
    log_probs = np.concatenate((np.zeros(len(before)), sequence.log_probs))
    return Piece(one.question, ids[:-1], labels, (np.full(len(labels), one.advantage), log_probs))
