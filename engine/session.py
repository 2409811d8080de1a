"""A conversation with a model: messages to tokens and back, thinking, and tools that are called while it writes."""

import argparse
import json
from typing import NamedTuple

from tokenizers import Tokenizer

from base.cli import UserError
from engine.generation import Sampling, Sequence, TextStream
from engine.tools import Tool, run_calls
from model.chat import BOS, EOS, IM_END, IM_START, THINK, TOOL_CALL, TOOL_RESPONSE, encode, encode_chat
from model.model import CausalLM

PARTS = {THINK: "reasoning", TOOL_CALL: "tool_call", TOOL_RESPONSE: "tool_response"}  # what a control token opens


class Reply(NamedTuple):
    """What the assistant wrote, taken apart."""

    content: str
    reasoning: str = ""
    tool_calls: list[dict] = []  # {"name", "arguments"}; arguments stay a text where they are no JSON
    tool_responses: list[str] = []


class ReplyStream:
    """Tokens to pieces of text as they come, each with the part that it belongs to: one of PARTS, or "content".

    What stands between the turns of an answer that calls tools, ends of turns and headers, is no text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.stream = TextStream(tokenizer)
        self.part = "content"
        self.pieces: list[tuple[str, str]] = []  # part, text; a new entry where a part begins

    def put(self, token_id: int) -> tuple[str, str]:
        if token_id in PARTS:
            self._open(PARTS[token_id])
        elif token_id - 1 in PARTS:
            self._open("content")
        elif token_id in (IM_END, IM_START):
            self.part = "between" if token_id == IM_END else "header"
        text = self.stream.put(token_id)
        if self.part == "header" and "\n" in text:
            self._open("content")
            return "content", ""
        return self._append(text)

    def end(self) -> tuple[str, str]:
        return self._append(self.stream.end())

    def _open(self, part: str):
        self._append(self.stream.end())
        self.part = part
        self.pieces.append((part, ""))

    def _append(self, text: str) -> tuple[str, str]:
        if text and self.part not in ("between", "header"):
            if not self.pieces or self.pieces[-1][0] != self.part:
                self.pieces.append((self.part, ""))
            self.pieces[-1] = (self.part, self.pieces[-1][1] + text)
        else:
            text = ""
        return self.part, text

    def reply(self) -> Reply:
        texts = {part: [text for name, text in self.pieces if name == part] for part in ("content", *PARTS.values())}
        content = "".join(texts["content"])
        return Reply(
            content=content.lstrip("\n") if texts["reasoning"] else content,
            reasoning="\n".join(texts["reasoning"]).strip("\n"),
            tool_calls=[call_of(text) for text in texts["tool_call"]],
            tool_responses=[text.strip("\n") for text in texts["tool_response"]],
        )


def last_turn(tokens: list[int]) -> list[int]:
    """From the last header on; the whole answer where no tool was called."""
    return tokens[-1 - tokens[::-1].index(IM_START) :] if IM_START in tokens else tokens


def read_tokens(tokens: list[int], tokenizer: Tokenizer) -> Reply:
    stream = ReplyStream(tokenizer)
    for token in tokens:
        stream.put(token)
    stream.end()
    return stream.reply()


def call_of(text: str) -> dict:
    """A call {"name", "arguments"} from what stands between its tags; the name is None where that is no JSON object."""
    try:
        call = json.loads(text, parse_constant=int)  # which raises ValueError: NaN and its like are no JSON
    except (ValueError, RecursionError):
        call = None
    return call if isinstance(call, dict) else {"name": None, "arguments": text.strip()}


class Session:
    """A model, its tokenizer, and how answers are to be written: args has eval.py's flags of how it writes."""

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, args: argparse.Namespace, tools: dict[str, Tool] | None = None
    ):
        if tokenizer.get_vocab_size() != model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {model.config.vocab_size}: "
                "put the tokenizer that it was trained with in its folder"
            )
        self.model, self.tokenizer, self.args, self.tools = model, tokenizer, args, tools or {}
        self.end_of_thought = [*encode(tokenizer, "\n"), THINK + 1, *encode(tokenizer, "\n\n")]

    def prompt_ids(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """The tokens to go on from. A chat that fills the context loses its oldest turns, but for the system prompt."""
        if not self.model.is_chat:
            return [BOS, *encode(self.tokenizer, messages[-1]["content"])]
        context = self.model.config.max_position_embeddings
        room = max(context - self.args.max_new_tokens, context // 2)
        schemas = tools or [tool.schema for tool in self.tools.values()]
        while True:
            ids, _ = encode_chat(self.tokenizer, messages, schemas, add_generation_prompt=True)
            oldest = next((i for i, message in enumerate(messages[:-1]) if message["role"] != "system"), None)
            if len(ids) <= room or oldest is None:
                return ids
            messages = messages[:oldest] + messages[oldest + 1 :]

    def sequence(self, prompt: list[int], seed: int | str | None = None) -> Sequence:
        """The answer to a prompt, for an Engine."""
        args = self.args
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
        suppress_tokens = frozenset([THINK] if args.think == "off" else [])
        stop_ids = frozenset([EOS, IM_END])
        return Sequence(prompt, args.max_new_tokens, stop_ids, sampling, seed, suppress_tokens, self._what_follows)

    def _what_follows(self, sequence: Sequence) -> list[int]:
        """Tokens that the model does not choose: the end of a thought that is too long, the answers of tools."""
        tokens = sequence.tokens
        if sequence.forced:
            return []
        thinks = self.args.max_think_tokens and THINK in tokens and THINK + 1 not in tokens
        if thinks and len(tokens) - tokens.index(THINK) > self.args.max_think_tokens:
            return self.end_of_thought
        if self.tools and tokens[-1] == IM_END:
            return self._answers_of_tools(sequence)
        return []

    def _answers_of_tools(self, sequence: Sequence) -> list[int]:
        """What encode_chat writes after the calls of the turn that has just ended, up to the next header."""
        calls = read_tokens(last_turn(sequence.tokens), self.tokenizer).tool_calls
        return self.answer_ids(run_calls(self.tools, calls)) if calls else []

    def answer_ids(self, answers: list[str]) -> list[int]:
        """What stands between a turn that ended with calls and the next that the model writes."""
        ids = [*encode(self.tokenizer, "\n"), IM_START, *encode(self.tokenizer, "user")]
        for answer in answers:
            ids += encode(self.tokenizer, "\n")
            ids += [TOOL_RESPONSE, *encode(self.tokenizer, f"\n{answer}\n"), TOOL_RESPONSE + 1]
        return [*ids, IM_END, *encode(self.tokenizer, "\n"), IM_START, *encode(self.tokenizer, "assistant\n")]
