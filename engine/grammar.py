"""Structured output: which tokens may come next, so that an answer is JSON of a schema, or fits a regex or a grammar.

A grammar is a text in the Lark dialect of llguidance (MIT, https://github.com/guidance-ai/llguidance), which parses the
bytes of what was generated and says which tokens continue it. Grammars come from strangers: a process with limits on
time and memory tries each one first, and llguidance limits the work of a token.
"""

import functools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base.cli import UserError, import_extra, one_line
from model.chat import ChatTokenizer, encode

MAX_LENGTH = 2**17  # of a grammar, in characters
MAX_SECONDS, MAX_BYTES = 5, 2**30  # to compile it
MAX_CALLS = 16  # of tools in one answer
MAX_WORDS, MAX_LOOP = 64, 8  # words of a grammar that are tried as ways out of a loop, and tokens of a loop
MAX_SKIP = 8  # tokens of an earlier plan that may be skipped
MAX_PLAN, MAX_WORK = 2048, 20_000  # steps of a search for a completion, and of all searches of an answer
LIMITS = dict(step_lexer_fuel=20_000, step_max_items=10_000, max_lexer_states=20_000, verbose_errors=False)
OPTIONS = '%llguidance {"no_forcing": true}\n'  # forced texts, which nobody asks for here, may be very long
BLANKS = r" |\n {0,16}"  # between JSON's tokens; without a limit, a weak model writes nothing else
ESCAPES = 'nrbtf\\"'  # without \u, which could write half a surrogate pair: not every parser accepts it
CHILD = f"""
import sys
try:
    import os, resource
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, ({MAX_BYTES}, {MAX_BYTES}))
    resource.setrlimit(resource.RLIMIT_CPU, ({MAX_SECONDS}, {MAX_SECONDS}))
except ImportError:  # Windows
    pass
from llguidance import LLMatcher, LLParserLimits
text = sys.stdin.buffer.read().decode()
print(LLMatcher.validate_grammar(text, None, limits=LLParserLimits(**{LIMITS})).splitlines()[:1])
"""

# ------------------------------------------------------------------------------------------------------------ grammars


def json_rule(schema: dict | bool, lenient: bool = False) -> str:
    """The right side of a rule: JSON of this schema. lenient: keywords that llguidance does not know are ignored."""
    schema = schema if isinstance(schema, dict) else {}
    has_controls = "\\u00" in json.dumps(schema, ensure_ascii=False)  # characters that can only be escaped so
    escapes = ESCAPES + "u" * has_controls
    options = {"whitespace_pattern": BLANKS, "json_allowed_escapes": escapes, "lenient": lenient}
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def choice_rule(texts: list[str]) -> str:
    return " | ".join(map(json.dumps, texts))


def regex_rule(regex: str) -> str:
    return f"/{_library().regex_to_lark(regex, '')}/"


def calls_rule(tools: list[dict], tags: tuple[int, int], several: bool) -> str:
    """Calls of these tools (OpenAI's format) between the tokens `tags`, as Jiezi's and Qwen's chats have them."""
    calls = []
    for function in (tool["function"] for tool in tools):
        head = json.dumps(f'\n{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": ')
        parameters = function.get("parameters") or {"type": "object"}
        calls.append(f'<[{tags[0]}]> {head} ({json_rule(parameters, not function.get("strict"))}) "}}\\n"')
    call = f"({' | '.join(calls)}) <[{tags[1]}]>"
    return f'{call} ("\\n" {call}){{0,{MAX_CALLS - 1}}}' if several else call


def grammar_of(*alternatives: str) -> str:
    """A whole grammar from right sides of rules."""
    rules = "".join(f"rule_{i}: {rule}\n" for i, rule in enumerate(alternatives))
    return f"{OPTIONS}start: {' | '.join(f'rule_{i}' for i in range(len(alternatives)))}\n{rules}"


def lark_grammar(text: str) -> str:
    """A user's whole grammar, in Lark or in llama.cpp's GBNF."""
    try:
        return OPTIONS + import_extra("llguidance.gbnf_to_lark", "requirements/serve.txt").any_to_lark(text)
    except Exception as error:  # a parser in Python, which may raise anything
        raise UserError(f"the grammar is neither Lark nor GBNF: {one_line(error)}") from None


def read_schema(path: Path) -> str:
    """The grammar of a file with a JSON schema."""
    try:
        return grammar_of(json_rule(json.loads(path.read_text("utf-8"))))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON schema: {one_line(error)}") from None


# ----------------------------------------------------------------------------------------------------------- compiling


def _library():
    return import_extra("llguidance", "requirements/serve.txt")


class Vocabulary:
    """A tokenizer as llguidance sees it; also the object that it asks for bytes and ids."""

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer, self.pieces = tokenizer, tokenizer.pieces
        self.end = self.eos_token_id = tokenizer.eos if tokenizer.eos is not None else min(tokenizer.control_ids)
        self.special_token_ids = [i for i, piece in enumerate(self.pieces) if not piece]
        self.tokens = [piece or b"\xff" + tokenizer.id_to_token(i).encode() for i, piece in enumerate(self.pieces)]
        self.bytes = {piece: i for i, piece in enumerate(self.pieces) if len(piece) == 1}
        self.longest_first = np.argsort([-len(piece.strip()) for piece in self.pieces], kind="stable")
        self.library = _library().LLTokenizer(self, n_vocab=len(self.pieces))

    def __call__(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def matcher(self, text: str):
        library = _library()
        return library.LLMatcher(self.library, text, log_level=0, limits=library.LLParserLimits(**LIMITS))

    def completion(
        self, matcher, limit: int, words: tuple[bytes, ...], old: list[int] | None = None
    ) -> tuple[list[int] | None, int]:
        """A short way to the end of the document, as tokens, and the steps of the search.

        None in place of a way of more than `limit` tokens. words: texts that may lead out of a loop of any text.
        old: a way from an earlier place, the end of which is taken as soon as it fits.
        """
        matcher, tokens, seen, work = matcher.deep_copy(), [], Counter(), 0
        while not matcher.is_accepting():
            for start in range(min(len(old), MAX_SKIP) if old else 0):
                rest = old[start:]
                if matcher.validate_tokens([*rest, self.end]) > len(rest):
                    return tokens + rest, work
            mask = matcher.compute_bitmask()
            seen[mask] += 1
            # The same tokens may follow again and again: maybe in a loop, such as the letters of [a-z]+;
            new, steps = self._way_out(matcher, mask, words) if seen[mask] in (4, 16, 64, 256) else ([], 0)
            work += steps + 1
            new = new or self._closing_token(matcher, mask)
            if not new or len(tokens) >= limit or not matcher.consume_tokens(new):
                return None, work
            tokens += new
        text = b"".join(self.tokens[token] for token in tokens)
        return tokens if b"\xff" in text else min(tokens, self.library.tokenize_bytes(text), key=len), work

    def _closing_token(self, matcher, mask: bytes) -> list[int]:
        """A token that shortens JSON: a bracket if it is not text, a quote, a comma, a digit; else a long one."""
        in_text = [self.bytes[byte] for byte in (b'"', b"a")]  # what may follow a bracket that is text
        for byte in b"}]":
            token = self._allowed(byte, mask)
            if token is not None and all(matcher.validate_tokens([token, each]) < 2 for each in in_text):
                return [token]
        found = (self._allowed(byte, mask) for byte in b'",:0123456789')
        token = next((token for token in found if token is not None), None)
        if token is None:
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[self.longest_first]
            token = int(self.longest_first[bits.argmax()]) if bits.any() else None
        return [] if token is None else [token]

    def _allowed(self, byte: int, mask: bytes) -> int | None:
        token = self.bytes.get(bytes([byte]))
        return token if token is not None and mask[token >> 3] >> (token & 7) & 1 else None

    def _way_out(self, matcher, mask: bytes, words: tuple[bytes, ...]) -> tuple[list[int], int]:
        """A byte or word after which closing tokens do not lead back to this mask, or [], and the steps tried."""
        found = [[self._allowed(byte, mask)] for byte in range(256)] + [self.library.tokenize_bytes(w) for w in words]
        steps = 0
        for tokens in found:
            ahead = None if None in tokens else matcher.deep_copy()
            if ahead is None or not ahead.consume_tokens(tokens):
                continue
            for _ in range(MAX_LOOP):
                steps += 1
                if ahead.is_accepting():
                    return tokens, steps
                mask_ahead = ahead.compute_bitmask()
                new = [] if mask_ahead == mask else self._closing_token(ahead, mask_ahead)
                if not new or not ahead.consume_tokens(new):
                    break
            else:
                return tokens, steps
        return [], steps


def try_in_process(text: str):
    """UserError if the grammar takes too much time or memory."""
    text = re.sub(r"<\[\d+\]>", '"x"', text)  # control tokens, which a grammar without a vocabulary cannot name
    command = [sys.executable, "-c", CHILD]
    try:
        failed = subprocess.run(command, input=text.encode(), capture_output=True, timeout=2 * MAX_SECONDS).returncode
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        raise UserError(f"the schema or grammar takes more than {MAX_SECONDS} seconds or 1 GiB to compile: simplify it")


class Grammar:
    """A compiled grammar: a matcher to copy, and the tokens of a short document (`plan`).

    trigger: the token at which the grammar begins, each time; None: it holds from the answer's start.
    """

    def __init__(self, vocabulary: Vocabulary, matcher, plan: list[int], words: tuple[bytes, ...], trigger: int | None):
        self.vocabulary, self.matcher, self.plan, self.words, self.trigger = vocabulary, matcher, plan, words, trigger


vocabulary_of = functools.lru_cache(maxsize=8)(Vocabulary)


@functools.lru_cache(maxsize=32)
def compile_grammar(tokenizer: ChatTokenizer, text: str, trigger: int | None = None) -> Grammar:
    """Compiles it within MAX_SECONDS and MAX_BYTES. UserError, in one line, if that is not possible."""
    _library()
    if len(text) > MAX_LENGTH:
        raise UserError(f"the schema or grammar is longer than {MAX_LENGTH:,} characters")
    try_in_process(text)
    vocabulary = vocabulary_of(tokenizer)
    matcher = vocabulary.matcher(text)
    if matcher.is_error():
        reason = matcher.get_error().splitlines()[0].removeprefix("at 3(9): ")[:300]
        raise UserError(f"the schema or grammar cannot be used: {reason}")
    words = tuple({word.encode() for word in re.findall(r"\w+", text)})[:MAX_WORDS]
    plan, _ = vocabulary.completion(matcher, MAX_PLAN, words)
    if plan is None:
        raise UserError(f"the schema or grammar is too complex, or has no document of {MAX_PLAN} tokens: simplify it")
    return Grammar(vocabulary, matcher, plan, words, trigger)


# ---------------------------------------------------------------------------------------------------------- generation


class Constraint:
    """Holds one answer to a grammar, after a thought if it begins with one, and ends the document before its tokens do.

    `plan` always contains the rest of some valid document that fits. A sampled token after which none would fit is
    replaced by the next token of the plan.
    """

    def __init__(
        self, grammar: Grammar, stop_ids: frozenset[int], tags: tuple[int, int] | None = None, end_of_thought: int = 0
    ):
        """tags: of a thought that may come first; end_of_thought: how many tokens end it."""
        self.grammar, self.stop_ids, self.tags, self.end_of_thought = grammar, stop_ids, tags, end_of_thought
        self.trigger = grammar.trigger
        self.thinks, self.began, self.failed = False, False, False
        self.cut = False  # whether the plan was needed
        self.free = True  # whether more than one token could follow
        self.work = 0
        self.matcher, self.plan = None, []
        if self.trigger is None:
            self._start()

    def _start(self):
        self.matcher, self.plan = self.grammar.matcher.deep_copy(), self.grammar.plan

    def check_room(self, max_new_tokens: int):
        """UserError if no document fits into so many tokens."""
        shortest = len(self.plan) + (self.end_of_thought if self.thinks else 0)
        if self.trigger is None and max_new_tokens < shortest:
            raise UserError(
                f"the shortest document of the schema or grammar that was found has {shortest} tokens, and the "
                f"answer may have {max_new_tokens}: raise the limit of tokens"
            )

    @property
    def active(self) -> bool:
        return self.matcher is not None and not self.thinks

    def must_answer(self, room: int) -> bool:
        """Whether a thought has to end now, with so many tokens left."""
        return self.thinks and room <= len(self.plan) + self.end_of_thought

    def mask(self) -> bytes:
        """The tokens that may follow, one bit each."""
        mask = b"" if self.failed else self.matcher.compute_bitmask()
        if self.failed or self.matcher.is_error() or not any(mask):  # too much work for llguidance's limits
            self.failed = True
            token = self.plan[0] if self.plan else self.grammar.vocabulary.end
            mask = (1 << token).to_bytes(4 * (-(-len(self.grammar.vocabulary.pieces) // 32)), "little")
        return mask

    def ends(self, can_end: bool) -> list[int]:
        """The tokens that the mask lacks: those that end an answer, and the one that begins a thought."""
        begins = self.tags and not self.began and self.trigger is None
        return [*(self.stop_ids if can_end else ()), *(self.tags[:1] if begins else ())]

    def accept(self, token: int, room: int, forced: bool) -> int:
        """Moves on by a token that was sampled or forced; returns it, or another one. room: tokens left."""
        if token == self.trigger and self.matcher is None:
            if room < len(self.grammar.plan):
                self.cut = True
                return next(iter(self.stop_ids))
            self._start()
            forced = False  # it is consumed however it came
        elif self.thinks or (forced and self.tags):
            self.thinks &= token != self.tags[1]
            self.began |= token == self.tags[0]
            return token
        if forced or self.matcher is None or token in self.stop_ids:
            return token
        if self.tags and token == self.tags[0] and not self.began and room > len(self.plan) + self.end_of_thought:
            self.thinks = self.began = True
            return token
        self.began = True
        plan = None if self.failed else self._plan_after(token, room)
        if plan is None or len(plan) > room:
            self.cut, self.free = True, False
            token = self.plan[0] if self.plan else next(iter(self.stop_ids))
            plan = self.plan[1:]
            self.failed |= not self.failed and not self.matcher.consume_token(token)
        self.plan = plan
        if self.trigger is not None and not plan and (self.failed or self.matcher.is_stopped()):
            self.matcher = None
        return token

    def _plan_after(self, token: int, room: int) -> list[int] | None:
        """Consumes the token; the plan from there on. None, and nothing consumed, if there is none within `room`."""
        matcher, vocabulary = self.matcher, self.grammar.vocabulary
        if not matcher.consume_token(token):
            self.failed = True
            return None
        plan, piece = self.plan, vocabulary.pieces[token]
        if plan and plan[0] == token:
            return plan[1:]
        if matcher.validate_tokens([*plan, vocabulary.end]) <= len(plan):  # it does not end the document from here
            first = vocabulary.tokens[plan[0]] if plan else b""
            if piece and first.startswith(piece) and vocabulary.pieces[plan[0]]:
                plan = vocabulary.library.tokenize_bytes(first[len(piece) :]) + plan[1:]
            elif self.work > MAX_WORK:
                plan = None
            else:
                limit = min(MAX_PLAN, room + 8)
                plan, steps = vocabulary.completion(matcher, limit, self.grammar.words, plan)
                self.work += steps
        self.failed = matcher.is_error()
        if self.failed or plan is None or len(plan) > room:
            self.failed |= not matcher.rollback(1)
            return None
        return plan


def allowed_tokens(constraints: list[Constraint], vocab_size: int) -> Tensor:
    """Which tokens may follow in each answer, (B, V) boolean."""
    packed = np.frombuffer(b"".join(constraint.mask() for constraint in constraints), np.uint8)
    bits = np.unpackbits(packed.reshape(len(constraints), -1), axis=1, count=-1, bitorder="little")
    allowed = np.zeros((len(constraints), vocab_size), bool)
    width = min(vocab_size, bits.shape[1])
    allowed[:, :width] = bits[:, :width]
    for row, constraint in zip(allowed, constraints):
        end = constraint.grammar.vocabulary.end
        row[end], can_end = False, row[end]
        row[constraint.ends(can_end)] = True
        constraint.free = np.count_nonzero(row) > 1
    return torch.from_numpy(allowed)
