"""A chat with a model: messages to tokens and back, reasoning, and tools that are called during generation."""

import json
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Tokenizer

from base.cli import UserError
from engine.generation import Sampling, Sequence, TextStream
from engine.grammar import Constraint, Grammar
from engine.tools import Tool, run_calls
from model.chat import BOS, EOS, IM_END, IM_START, THINK, TOOL_CALL, TOOL_RESPONSE, encode, encode_chat
from model.model import CausalLM

PARTS = {THINK: "reasoning", TOOL_CALL: "tool_call", TOOL_RESPONSE: "tool_response"}  # by the opening control token


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are generated. The names and their meaning are Hugging Face's; the defaults are those of eval.py and
    serve.py."""

    max_new_tokens: int = 256
    temperature: float = 0.7  # 0: greedy
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.1
    think: str = "show"  # "off": the model may not reason; eval.py also has "hide"
    max_think_tokens: int = 0  # the reasoning is ended after so many tokens; 0: no limit

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


class Reply(NamedTuple):
    """The parts of an assistant's answer."""

    content: str
    reasoning: str = ""
    tool_calls: list[dict] = []  # {"name", "arguments"}; arguments that are not valid JSON stay a string
    tool_responses: list[str] = []


class ReplyStream:
    """Streams tokens as text, each piece with its part: one of PARTS, or "content".

    An answer that calls tools has several turns; the end of a turn and the next header give no text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.stream = TextStream(tokenizer)
        self.part = "content"
        self.pieces: list[tuple[str, str]] = []  # (part, text), one for each run of tokens of one part

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
    """The tokens from the last header on; all of them if no tool was called."""
    return tokens[-1 - tokens[::-1].index(IM_START) :] if IM_START in tokens else tokens


def read_tokens(tokens: list[int], tokenizer: Tokenizer) -> Reply:
    stream = ReplyStream(tokenizer)
    for token in tokens:
        stream.put(token)
    stream.end()
    return stream.reply()


def call_of(text: str) -> dict:
    """A call {"name", "arguments"} from the text between its tags; the name is None if it is not a JSON object."""
    try:
        call = json.loads(text, parse_constant=int)  # int("NaN") raises ValueError: NaN is not JSON
    except (ValueError, RecursionError):
        call = None
    return call if isinstance(call, dict) else {"name": None, "arguments": text.strip()}


class Session:
    """A model, its tokenizer, and how answers are generated."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        tools: dict[str, Tool] | None = None,
        grammar: Grammar | None = None,
    ):
        """grammar: what the answers have to fit, after their thoughts."""
        if tokenizer.get_vocab_size() != model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {model.config.vocab_size}: "
                "put the tokenizer that the model was trained with into its folder"
            )
        self.model, self.tokenizer, self.config, self.tools = model, tokenizer, config, tools or {}
        self.grammar = grammar
        self.end_of_thought = [*encode(tokenizer, "\n"), THINK + 1, *encode(tokenizer, "\n\n")]

    def prompt_ids(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """The prompt's tokens. A chat that fills the context loses its oldest turns, except for the system prompt."""
        if not self.model.is_chat:
            return [BOS, *encode(self.tokenizer, messages[-1]["content"])]
        context = self.model.config.max_position_embeddings
        room = max(context - self.config.max_new_tokens, context // 2)
        schemas = tools or [tool.schema for tool in self.tools.values()]
        while True:
            ids, _ = encode_chat(self.tokenizer, messages, schemas, add_generation_prompt=True)
            oldest = next((i for i, message in enumerate(messages[:-1]) if message["role"] != "system"), None)
            if len(ids) <= room or oldest is None:
                return ids
            messages = messages[:oldest] + messages[oldest + 1 :]

    def sequence(self, prompt: list[int], seed: int | str | None = None) -> Sequence:
        """The answer to a prompt, to be submitted to an Engine."""
        config = self.config
        suppress_tokens = frozenset([THINK] if config.think == "off" else [])
        stop_ids = frozenset([EOS, IM_END])
        sequence = Sequence(
            prompt, config.max_new_tokens, stop_ids, config.sampling, seed, suppress_tokens, self._forced_tokens
        )
        if self.grammar:
            think = THINK if self.model.is_chat and config.think != "off" else None
            sequence.constraint = Constraint(self.grammar, stop_ids, think, len(self.end_of_thought))
        return sequence

    def _forced_tokens(self, sequence: Sequence) -> list[int]:
        """Tokens that the model does not choose: the end of reasoning that is too long, the responses of tools."""
        tokens = sequence.tokens
        if sequence.forced:
            return []
        if constraint := sequence.constraint:
            if constraint.must_answer(sequence.max_new_tokens - len(tokens)):
                return self.end_of_thought
            if constraint.active and tokens[-1] == THINK + 1:
                return encode(self.tokenizer, "\n\n")
        limit = self.config.max_think_tokens
        thinks = limit and THINK in tokens and THINK + 1 not in tokens
        if thinks and len(tokens) - tokens.index(THINK) > limit:
            return self.end_of_thought
        if self.tools and tokens[-1] == IM_END:
            calls = read_tokens(last_turn(tokens), self.tokenizer).tool_calls
            return self.tool_response_ids(run_calls(self.tools, calls)) if calls else []
        return []

    def tool_response_ids(self, answers: list[str]) -> list[int]:
        """The tokens between a turn that ended with calls and the next turn of the model, as encode_chat has them."""
        ids = [*encode(self.tokenizer, "\n"), IM_START, *encode(self.tokenizer, "user")]
        for answer in answers:
            ids += encode(self.tokenizer, "\n")
            ids += [TOOL_RESPONSE, *encode(self.tokenizer, f"\n{answer}\n"), TOOL_RESPONSE + 1]
        return [*ids, IM_END, *encode(self.tokenizer, "\n"), IM_START, *encode(self.tokenizer, "assistant\n")]
