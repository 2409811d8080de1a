"""A chat with a model: messages to tokens and back, reasoning, and tools that are called during generation."""

import json
import math
from dataclasses import dataclass
from typing import NamedTuple

from engine.generation import Sampling, Sequence, TextStream
from engine.grammar import Constraint, Grammar
from engine.tools import Tool, run_calls
from model.chat import ChatTokenizer, encode
from model.model import CausalLM

PARTS = ("reasoning", "tool_call", "tool_response")  # of an answer, beside its content


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How answers are generated. The names and their meaning are Hugging Face's; the defaults are those of eval.py and
    serve.py."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0  # no stop token is chosen before
    temperature: float = 0.7  # 0: greedy
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    think: str = "show"  # "off": the model may not reason; eval.py also has "hide"
    max_think_tokens: int = 0  # the reasoning is ended after so many tokens; 0: no limit

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in Sampling._fields})


def sampling_defaults(generation: dict) -> dict:
    """What a generation_config.json says about sampling, as fields of GenerationConfig; {} if it says nothing.

    What it leaves out is then as in Hugging Face's library: the model's own distribution; "do_sample": false is greedy.
    """
    least = {"temperature": 0, "top_k": 0, "top_p": 0, "min_p": 0, "repetition_penalty": 1e-3}
    said = {}
    for name, limit in least.items():
        value = generation.get(name)
        if type(value) in (int, float) and limit <= value < math.inf:
            said[name] = value
    if generation.get("do_sample") is False:
        said["temperature"] = 0.0
    return dict(temperature=1.0, top_p=1.0, repetition_penalty=1.0) | said if said else {}


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

    def __init__(self, tokenizer: ChatTokenizer, prompt: list[int] | None = None):
        """prompt: what the tokens follow; it may have opened a part."""
        self.stream, self.tokenizer = TextStream(tokenizer), tokenizer
        self.part = tokenizer.open_part(prompt or []) or "content"
        self.pieces: list[tuple[str, str]] = []  # (part, text), one for each run of tokens of one part

    def put(self, token_id: int) -> tuple[str, str]:
        tokenizer = self.tokenizer
        if part := tokenizer.opened_part(token_id):
            self._open(part)
        elif token_id in tokenizer.closing_ids:
            self._open("content")
        elif token_id in (tokenizer.end_of_turn, tokenizer.start_of_turn):
            self.part = "between" if token_id == tokenizer.end_of_turn else "header"
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
        texts = {part: [text for name, text in self.pieces if name == part] for part in ("content", *PARTS)}
        content = "".join(texts["content"])
        return Reply(
            content=content.lstrip("\n") if texts["reasoning"] else content,
            reasoning="\n".join(texts["reasoning"]).strip("\n"),
            tool_calls=[call_of(text) for text in texts["tool_call"]],
            tool_responses=[text.strip("\n") for text in texts["tool_response"]],
        )


def last_turn(tokens: list[int], tokenizer: ChatTokenizer) -> list[int]:
    """The tokens from the last header on; all of them if no tool was called."""
    start = tokenizer.start_of_turn
    return tokens[-1 - tokens[::-1].index(start) :] if start in tokens else tokens


def read_tokens(tokens: list[int], tokenizer: ChatTokenizer, prompt: list[int] | None = None) -> Reply:
    stream = ReplyStream(tokenizer, prompt)
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
        tokenizer: ChatTokenizer,
        config: GenerationConfig,
        tools: dict[str, Tool] | None = None,
        grammar: Grammar | None = None,
    ):
        """grammar: what the answers have to fit, after their thoughts."""
        self.model, self.tokenizer, self.config, self.tools = model, tokenizer, config, tools or {}
        self.grammar = grammar
        rows = model.config.vocab_size
        tokenizer.check_vocabulary(rows)
        if tools:
            tokenizer.check_tools()
        self.think, self.end_think = tokenizer.tags.get("reasoning", (None, None))
        # An open model may have more rows of the embedding than tokens.
        self.suppress_tokens = frozenset(range(tokenizer.get_vocab_size(), rows))
        if config.think == "off" and self.think:
            self.suppress_tokens |= {self.think}
        self.stop_ids = frozenset({tokenizer.eos, tokenizer.end_of_turn, *model.stop_token_ids} - {None})

    def end_of_thought(self) -> list[int]:
        return [*encode(self.tokenizer, "\n"), self.end_think, *encode(self.tokenizer, "\n\n")]

    def prompt_ids(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """The prompt's tokens. A chat that fills the context loses its oldest turns, except for the system prompt."""
        if not self.model.is_chat:
            return self.tokenizer.text_prompt(messages[-1]["content"])
        context = self.model.config.max_position_embeddings
        room = max(context - self.config.max_new_tokens, context // 2)
        schemas = tools or [tool.schema for tool in self.tools.values()]
        while True:
            ids = self.tokenizer.prompt(messages, schemas, think=self.config.think != "off")
            oldest = next((i for i, message in enumerate(messages[:-1]) if message["role"] != "system"), None)
            if len(ids) <= room or oldest is None:
                return ids
            messages = messages[:oldest] + messages[oldest + 1 :]

    def sequence(self, prompt: list[int], seed: int | str | None = None) -> Sequence:
        """The answer to a prompt, to be submitted to an Engine."""
        config = self.config
        sequence = Sequence(
            prompt,
            config.max_new_tokens,
            stop_ids=self.stop_ids,
            sampling=config.sampling,
            seed=seed,
            suppress_tokens=self.suppress_tokens,
            min_new_tokens=config.min_new_tokens,
            on_token=self._forced_tokens,
        )
        if self.grammar:
            tags = (self.think, self.end_think) if self.think and self.model.is_chat and config.think != "off" else None
            end_of_thought = len(self.end_of_thought()) if tags else 0
            sequence.constraint = Constraint(self.grammar, self.stop_ids, tags, end_of_thought)
            sequence.min_new_tokens = 0  # a document ends where it ends
            if tags and self.tokenizer.open_part(prompt) == "reasoning":
                sequence.constraint.thinks = sequence.constraint.began = True
        return sequence

    def last_reply(self, tokens: list[int]) -> Reply:
        """The last turn of an answer."""
        return read_tokens(last_turn(tokens, self.tokenizer), self.tokenizer)

    def _forced_tokens(self, sequence: Sequence) -> list[int]:
        """Tokens that the model does not choose: the end of reasoning that is too long, the responses of tools."""
        tokens = sequence.tokens
        if sequence.forced:
            return []
        if constraint := sequence.constraint:
            if constraint.must_answer(sequence.max_new_tokens - len(tokens)):
                return self.end_of_thought()
            if constraint.active and tokens[-1] == self.end_think:
                return encode(self.tokenizer, "\n\n")
        limit = self.config.max_think_tokens
        thinks = limit and self.think in tokens and self.end_think not in tokens
        if thinks and len(tokens) - tokens.index(self.think) > limit:
            return self.end_of_thought()
        if self.tools and tokens[-1] == self.tokenizer.end_of_turn:
            calls = self.last_reply(tokens).tool_calls
            return self.tokenizer.tool_responses(run_calls(self.tools, calls)) if calls else []
        return []
