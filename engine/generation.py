"""Generation: an engine with continuous batching, sampling, and streamed text."""

import codecs
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from base.cli import UserError
from engine.cache import KVCache, PromptCache
from engine.grammar import Constraint, allowed_tokens
from model.chat import ChatTokenizer
from model.device import to_device
from model.model import CausalLM
from model.operators import document_mask

MAX_PREFILL_TOKENS = 4096  # prompt tokens in one forward pass: limits the memory that a long queue takes
LOG_PROB_ROWS = 256  # rows of logits (V floats each) at a time, for the log-probabilities of a prompt


class Sampling(NamedTuple):
    """How a token is chosen (see sample); the defaults sample from the model's own distribution."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(eq=False)
class Sequence:
    """A prompt, how to continue it, and the tokens generated so far."""

    prompt: list[int]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = Sampling()
    seed: int | str | None = None  # the same seed gives the same text, whatever else is in the batch
    suppress_tokens: frozenset[int] = frozenset()  # tokens that are never chosen
    min_new_tokens: int = 0  # stop_ids are not chosen before
    on_token: Callable[["Sequence"], Iterable[int]] | None = None  # called after each token; returns forced tokens
    forced: deque[int] = field(default_factory=deque)  # the next tokens, whatever the model predicts
    tokens: list[int] = field(default_factory=list)  # a stop token is the last of them
    chosen: list[bool] = field(default_factory=list)  # for each token: False if it was forced, or the only one allowed
    n_top: int | None = None  # not None: keep log_probs, and those of the n_top most probable tokens
    log_probs: list[float] = field(default_factory=list)  # ln p of each token at temperature 1, if kept
    top_log_probs: list[list[tuple[int, float]]] = field(default_factory=list)  # for each position: (token, ln p)
    constraint: Constraint | None = None  # which tokens may follow (grammar.py)
    echo: bool = False  # keep these of the prompt's tokens too, except for the first, which nothing predicts
    prompt_log_probs: list[float] = field(default_factory=list)
    prompt_top_log_probs: list[list[tuple[int, float]]] = field(default_factory=list)
    seen: Tensor | None = None  # which tokens occurred, (V,) boolean; only for repetition_penalty
    finish_reason: str | None = None  # "stop", or "length": it was cut at max_new_tokens or at the context's end

    def __post_init__(self):
        self.random = random.Random(self.seed)

    def take(self, token: int) -> int:
        """The next token, which is `token` unless it is forced or the constraint replaces it."""
        is_forced = bool(self.forced)
        token = self.forced.popleft() if is_forced else token
        is_free = True
        if self.constraint:
            token = self.constraint.accept(token, self.max_new_tokens - len(self.tokens) - 1, is_forced)
            is_free = self.constraint.free
        self.chosen.append(not is_forced and is_free)
        return token

    def suppressed(self) -> frozenset[int]:
        """Tokens that cannot be chosen now. Where a constraint is, it says when an answer may end."""
        is_early = len(self.tokens) < self.min_new_tokens and self.constraint is None
        return self.suppress_tokens | self.stop_ids if is_early else self.suppress_tokens


class Engine:
    """Generates many sequences at a time. A step adds one token to each row; when a row ends, a waiting one enters.

    A prompt that consecutive sequences of the queue share is prefilled once. A sequence does not depend on the others
    in the batch: it has its own length, stop tokens and random numbers.

        engine = Engine(model, max_rows=64)
        engine.submit(Sequence(prompt, max_new_tokens=100))
        while engine.busy:
            for sequence in engine.step():
                print(sequence.tokens[-1])
    """

    def __init__(self, model: CausalLM, max_rows: int, keep_log_probs: bool = False):
        self.model, self.max_rows, self.keep_log_probs = model, max_rows, keep_log_probs
        self.device = model.model.embed_tokens.weight.device
        self.context = model.config.max_position_embeddings
        self.waiting: deque[Sequence] = deque()
        self.rows: list[Sequence] = []  # those being generated, in the order of the cache's rows
        self.cache: KVCache | None = None

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    def submit(self, sequence: Sequence):
        """Appends it to the queue. UserError if its prompt fills the context."""
        length = len(sequence.prompt)
        if length == 0:
            raise ValueError("a prompt has no tokens")
        if length >= self.context:
            raise UserError(f"the prompt has {length} tokens; the model's context is {self.context}: shorten it")
        sequence.max_new_tokens = min(sequence.max_new_tokens, self.context - length)
        if sequence.constraint:
            sequence.constraint.check_room(sequence.max_new_tokens)
        self.waiting.append(sequence)

    @torch.inference_mode()
    def remove(self, sequence: Sequence):
        """Stops generating it."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.rows:
            row = self.rows.index(sequence)
            self.cache.remove(row)
            last = self.rows.pop()
            if last is not sequence:
                self.rows[row] = last

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Adds one token to every row, including the rows that enter now; returns them. Some of them have ended."""
        hidden = []  # of each row's last token, (·, H)
        if self.rows:
            hidden.append(self._decode())
        while entering := self._take_from_queue():
            hidden.append(self._prefill(entering))
        if not hidden:
            return []
        logits = self.model.lm_head(torch.cat(hidden))  # (B, V)
        generated = list(self.rows)
        for sequence, token in zip(generated, self._choose(logits)):
            sequence.tokens.append(token)
            if sequence.on_token:
                sequence.forced.extend(sequence.on_token(sequence))
            if token in sequence.stop_ids and not sequence.forced:
                sequence.finish_reason = "length" if sequence.constraint and sequence.constraint.cut else "stop"
            elif len(sequence.tokens) >= sequence.max_new_tokens:
                sequence.finish_reason = "length"
        for sequence in generated:
            if sequence.finish_reason:
                self.remove(sequence)
        return generated

    def _decode(self) -> Tensor:
        """One forward pass for the last token of every row, (B, H)."""
        input_ids = to_device(torch.tensor([[sequence.tokens[-1]] for sequence in self.rows]), self.device)  # (B, 1)
        position_ids = self.cache.ends[1][:, None]
        return self.model.model(input_ids, position_ids, self.cache.mask(), self.cache)[:, 0]  # (B, H)

    def _take_from_queue(self) -> list[Sequence]:
        """The first sequences that fit into the free rows and into one prefill."""
        entering = []
        tokens = 0
        while self.waiting and len(self.rows) + len(entering) < self.max_rows:
            tokens += len(self.waiting[0].prompt)
            if entering and tokens > MAX_PREFILL_TOKENS:
                break
            entering.append(self.waiting.popleft())
        return entering

    def _prefill(self, entering: list[Sequence]) -> Tensor:
        """Computes the prompts of new rows; returns the hidden states of their last tokens, (·, H)."""
        room = max(len(sequence.prompt) + sequence.max_new_tokens for sequence in entering)
        rows = len(self.rows) + len(entering)
        if self.cache is None:
            self.cache = KVCache(self.model, rows, room)
            self.cache.set_lengths([])
        elif rows > len(self.cache.keys[0]) or room > self.cache.max_length:
            self.cache = self.cache.grow(self.model, rows, room)
        # Packed into one row, as documents are in training: no padding, and no prompt attends to another.
        groups = [list(group) for _, group in groupby(entering, lambda sequence: sequence.prompt)]
        shared = [(group[0].prompt, len(group)) for group in groups]
        input_ids = torch.tensor([[token for prompt, _ in shared for token in prompt]], device=self.device)  # (1, T)
        position_ids = torch.cat([torch.arange(len(prompt)) for prompt, _ in shared]).to(self.device)[None]
        cache = PromptCache(self.cache, [(len(prompt), copies) for prompt, copies in shared])
        mask = None if len(shared) == 1 else document_mask(position_ids, self.model.model.attention_kind())
        hidden = self.model.model(input_ids, position_ids, mask, cache)[0]  # (T, H)
        ends = accumulate(len(prompt) for prompt, _ in shared)
        last = [end - 1 for end, (_, copies) in zip(ends, shared) for _ in range(copies)]
        self.rows += entering
        for group, states in zip(groups, hidden.split([len(prompt) for prompt, _ in shared])):
            if echoed := [sequence for sequence in group if sequence.echo]:
                self._keep_prompt_log_probs(states, echoed)
        return hidden[to_device(torch.tensor(last), self.device)]

    def _choose(self, logits: Tensor) -> list[int]:
        """The next token of every row, from logits (B, V)."""
        chosen, order, parts = [0] * len(self.rows), [], []
        for sampling, rows in self._rows_by_sampling().items():
            part = logits if len(rows) == len(self.rows) else logits[rows]  # (·, V)
            if sampling.repetition_penalty != 1:
                part = penalize_repetition(part, self._seen(rows), sampling.repetition_penalty)
            if sampling.presence_penalty or sampling.frequency_penalty:
                counts = self._counts(rows)
                part = part - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
            for i, row in enumerate(rows):
                if suppressed := self.rows[row].suppressed():
                    part = part.clone() if part is logits else part
                    part[i, list(suppressed)] = -torch.inf
            part = self._constrain(part, rows, logits)
            uniforms = [self.rows[row].random.random() for row in rows]
            parts.append(sample(part, uniforms, *sampling[:4]))  # without the penalties
            order += rows
        *drawn, finite = torch.cat([*parts, logits.isfinite().all()[None]]).tolist()  # here a GPU is waited for
        if not finite:
            raise UserError("the logits are NaN: the model's weights are not finite")
        for row, token in zip(order, drawn):
            chosen[row] = self.rows[row].take(token)
        kept = [row for row, sequence in enumerate(self.rows) if self.keep_log_probs or sequence.n_top is not None]
        if kept:
            part = logits if len(kept) == len(self.rows) else logits[kept]
            self._keep_log_probs(part.float(), [self.rows[row] for row in kept], [chosen[row] for row in kept])
        return chosen

    def _constrain(self, part: Tensor, rows: list[int], logits: Tensor) -> Tensor:
        """Excludes, in `part` (·, V) of the logits, the tokens that the constraints of these rows do not allow."""
        found = [(i, self.rows[row].constraint) for i, row in enumerate(rows)]
        found = [(i, constraint) for i, constraint in found if constraint and constraint.active]
        if found:
            part = part.clone() if part is logits else part  # _keep_log_probs needs them unchanged
            index, constraints = zip(*found)
            allowed = allowed_tokens(constraints, part.shape[1]).to(self.device)
            part[list(index)] = part[list(index)].masked_fill(~allowed, -torch.inf)
        return part

    def _keep_log_probs(self, logits: Tensor, sequences: list[Sequence], chosen: list[int]):
        """Stores ln p of each sequence's token, and of the most probable ones, from logits (B, V)."""
        n = max(sequence.n_top or 0 for sequence in sequences)
        for sequence, log_prob, top in zip(sequences, *log_probs_of(logits, chosen, n)):
            sequence.log_probs.append(log_prob)
            if sequence.n_top:
                sequence.top_log_probs.append(top[: sequence.n_top])

    def _keep_prompt_log_probs(self, hidden: Tensor, sequences: list[Sequence]):
        """The same for the tokens of a prompt that the sequences share, from its hidden states (T, H)."""
        prompt, n = sequences[0].prompt, max(sequence.n_top or 0 for sequence in sequences)
        log_probs, top_log_probs = [], []
        for start in range(0, len(prompt) - 1, LOG_PROB_ROWS):
            predicted = prompt[start + 1 : start + 1 + LOG_PROB_ROWS]
            logits = self.model.lm_head(hidden[start : start + len(predicted)]).float()  # (·, V)
            part, top = log_probs_of(logits, predicted, n)
            log_probs += part
            top_log_probs += top
        for sequence in sequences:
            sequence.prompt_log_probs = log_probs
            sequence.prompt_top_log_probs = [top[: sequence.n_top] for top in top_log_probs]

    def _rows_by_sampling(self) -> dict[Sampling, list[int]]:
        rows = {}
        for row, sequence in enumerate(self.rows):
            rows.setdefault(sequence.sampling, []).append(row)
        return rows

    def _seen(self, rows: list[int]) -> Tensor:
        """Which tokens occur in the prompt or the generated tokens of each row, (·, V) boolean."""
        for sequence in (self.rows[row] for row in rows):
            if sequence.seen is None:
                sequence.seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.device)
                sequence.seen[sequence.prompt] = True
            for token in sequence.tokens[-1:]:
                sequence.seen[token].fill_(True)
        return torch.stack([self.rows[row].seen for row in rows])

    def _counts(self, rows: list[int]) -> Tensor:
        """How often each token occurs in the generated tokens of each row, (·, V)."""
        tokens = (torch.tensor(self.rows[row].tokens, dtype=torch.long, device=self.device) for row in rows)
        return torch.stack([each.bincount(minlength=self.model.config.vocab_size) for each in tokens])


def log_probs_of(logits: Tensor, tokens: list[int], n_top: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """ln p of a token for each row of logits (B, V), and the n_top most probable tokens with theirs."""
    normalizers = logits.logsumexp(-1)  # (B,)
    log_probs = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0] - normalizers
    values, ids = logits.topk(n_top)  # (B, n_top)
    pairs = zip(ids.tolist(), (values - normalizers[:, None]).tolist())
    return log_probs.tolist(), [list(zip(*row)) for row in pairs]


def generate(
    model: CausalLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: set[int] | frozenset[int] = frozenset(),
    seed: int | None = None,
    **sampling: float,
) -> Iterator[list[int | None]]:
    """Yields, at each step, the next token of every prompt; None for one that has ended (its stop token is yielded).

    A prompt ends with a token of stop_ids, after max_new_tokens, or when the context (max_position_embeddings) is full.
    `sampling`: fields of Sampling. UserError if a prompt alone fills the context.
    """
    engine = Engine(model, max_rows=len(prompts))
    sequences = []
    for i, prompt in enumerate(prompts):
        own_seed = None if seed is None else f"{seed}/{i}"
        sequences.append(Sequence(prompt, max_new_tokens, frozenset(stop_ids), Sampling(**sampling), own_seed))
        engine.submit(sequences[-1])
    while engine.busy and max_new_tokens:
        generated = set(map(id, engine.step()))
        yield [sequence.tokens[-1] if id(sequence) in generated else None for sequence in sequences]


def sample(
    logits: Tensor,
    uniforms: list[float],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Samples a token from each row of logits (B, V) with a uniform number in [0, 1) for each; returns (B,).

    temperature 0 is greedy. top_k keeps the k most probable tokens (0, or more than V: all); top_p the smallest set
    with this total probability (nucleus sampling, arXiv 1904.09751); min_p those with at least this fraction of the
    highest probability (arXiv 2407.01082).
    """
    if temperature < 1e-6:  # dividing by it would overflow
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(-1)
    if min_p > 0:
        probabilities.masked_fill_(probabilities < min_p * probabilities.max(-1, keepdim=True).values, 0)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # total probability of the more probable tokens
        before[:, 0] = -1  # the most probable always stays
        ordered.masked_fill_(before >= top_p * ordered.sum(-1, keepdim=True), 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    # Inverse transform sampling: the token at which the cumulative probability passes the row's number.
    running = probabilities.cumsum(-1)
    below = to_device(torch.tensor(uniforms), logits.device).clamp(max=1 - 1e-6)[:, None] * running[:, -1:]
    return torch.searchsorted(running, below, right=True)[:, 0]


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that occurred less probable (CTRL, arXiv 1909.05858, 4.1). logits and boolean seen: (B, V)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class TextStream:
    """Streams tokens as text in whole characters: the bytes of an incomplete one wait for the rest."""

    def __init__(self, tokenizer: ChatTokenizer):
        self.pieces = tokenizer.pieces
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token_id: int) -> str:
        return self.decoder.decode(self.pieces[token_id])

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)
