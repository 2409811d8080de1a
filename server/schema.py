"""The fields of a request: OpenAI's with limits, and some of vLLM's and of our own. Unknown fields are refused."""

import difflib
import json
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, ConfigDict, Field, model_validator

from engine.session import GenerationConfig
from server.structured import NullsLeftOut, StructuredRequest, ToolChoice, structure_of

MAX_MESSAGES, MAX_PROMPTS, MAX_CHOICES, MAX_TOOLS, MAX_TOP = 1024, 64, 64, 64, 20
MAX_STOPS, MAX_FIELDS = 64, 128
MAX_DEPTH = 32  # of a request
ALL = 2**31  # as many tokens as the context and the server allow
TEXT_PARTS = ("text", "input_text", "output_text", "reasoning_text", "summary_text")
Think = Literal["show", "off"]
# The part of an answer's tokens that reasoning may take, as OpenRouter translates it; "none" disables reasoning.
EFFORTS = {"none": 0.0, "minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.95}
# Fields that clients send and that change no answer.
IGNORED_FIELDS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction request_id "
    "priority cache_salt cache_prompt id_slot slot_id timings_per_token keep_alive chat_id session_id".split()
)


def not_supported(value: Any) -> Any:
    if value and value != ["text"]:  # of modalities
        raise ValueError("is not supported by this server")
    return value


def plain_text(content: Any) -> Any:
    """OpenAI's list of parts as one text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"this model accepts text only, not {str(kind)[:40]!r}")
    return "".join(part["text"] for part in content)


def deeper_than(levels: int, value: Any) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(deeper_than(levels - 1, child) for child in children)


def tool_schema(tool: dict) -> dict:
    """Checks a tool's schema, which goes into the prompt unchanged."""
    function = tool.get("function")
    is_right = tool.get("type") == "function" and isinstance(function, dict) and isinstance(function.get("name"), str)
    if not is_right or not isinstance(function.get("parameters") or {}, dict):
        raise ValueError('a tool is {"type": "function", "function": {"name": …, "parameters": …}}')
    return tool


def several(value: Any) -> Any:
    """Wraps a single text, or a single list of token ids, in a list."""
    is_tokens = isinstance(value, list) and value and all(isinstance(item, int) for item in value)
    return [value] if is_tokens or isinstance(value, str) else value


def not_empty(stops: list[str]) -> list[str]:
    return [stop for stop in stops if stop]


def or_all(number: int) -> int:
    """-1 means all, as in vLLM and llama.cpp."""
    return ALL if number == -1 else number


def as_json_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def or_greedy(temperature: float) -> float:
    """0 for temperatures so small that dividing by them overflows."""
    return temperature if temperature >= 1e-3 else 0.0


NotSupported = Annotated[Any, AfterValidator(not_supported)]
Text = Annotated[str, BeforeValidator(plain_text)]
Stop = Annotated[str, Field(max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(several), AfterValidator(not_empty)]
TokenLimit = Annotated[int, AfterValidator(or_all), Field(ge=-1, le=ALL)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
Tokens = Annotated[list[TokenId], Field(fail_fast=True)]  # stop at the first error


class Function(NullsLeftOut):
    name: str = Field(max_length=256)
    arguments: Annotated[str, BeforeValidator(as_json_text)] = "{}"


class ToolCall(NullsLeftOut):
    id: str = Field("", max_length=256)
    function: Function


class Message(NullsLeftOut):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text = ""
    reasoning_content: str = Field("", validation_alias=AliasChoices("reasoning_content", "reasoning"))
    tool_calls: list[ToolCall] = Field([], max_length=MAX_TOOLS, fail_fast=True)
    tool_call_id: str = Field("", max_length=256)

    @model_validator(mode="after")
    def says_something(self):
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError(f"a message of role {self.role} has content")
        return self


class StreamOptions(NullsLeftOut):
    include_usage: bool = False


class Body(NullsLeftOut):
    """A request's body: a JSON object that is not too large."""

    ignored: ClassVar[frozenset[str]] = IGNORED_FIELDS

    @model_validator(mode="before")
    @classmethod
    def is_plain_json(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("a request is a JSON object, sent with the header Content-Type: application/json")
        if len(data) > MAX_FIELDS:  # each unknown one would be an error
            raise ValueError(f"a request has at most {MAX_FIELDS} fields")
        if deeper_than(MAX_DEPTH, data):
            raise ValueError(f"the request is nested deeper than {MAX_DEPTH}")
        try:
            json.dumps(data, allow_nan=False, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("the request contains half a surrogate pair, which is not text") from None
        return {name: value for name, value in data.items() if name not in cls.ignored}


class Request(Body, StructuredRequest):
    """The fields of all endpoints. The defaults of generation are those of eval.py."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    model: str = Field("", max_length=256)
    max_new_tokens: TokenLimit = Field(ALL, alias="max_tokens")
    min_new_tokens: TokenLimit = Field(0, alias="min_tokens")
    ignore_eos: bool = False
    temperature: Annotated[float, AfterValidator(or_greedy)] = Field(0.7, ge=0, le=2)
    top_p: float = Field(0.9, ge=0, le=1)
    top_k: TokenLimit = 0
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.1, ge=0.1, le=10)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    think: Think = "show"
    max_think_tokens: int = Field(0, ge=0, le=ALL)
    reasoning_effort: Literal[tuple(EFFORTS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: NotSupported = None

    def generation_config(self, limit: int, defaults: dict | None = None) -> GenerationConfig:
        """limit: of max_new_tokens. defaults: the model's, for what the request leaves open."""
        names, defaults = {field.name for field in fields(GenerationConfig)}, defaults or {}
        given = {name: getattr(self, name) for name in names if name in self.model_fields_set or name not in defaults}
        given = defaults | given
        given["max_new_tokens"] = most = max(min(self.max_new_tokens, limit), 1)  # 0: the token will not be shown
        if self.ignore_eos:
            given["min_new_tokens"] = ALL
        if self.reasoning_effort == "none":
            given["think"] = "off"
        elif self.reasoning_effort and not self.max_think_tokens:
            given["max_think_tokens"] = max(int(EFFORTS[self.reasoning_effort] * most), 1)
        return GenerationConfig(**given)

    @model_validator(mode="after")
    def options_of_a_stream(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self


class TemplateOptions(NullsLeftOut):
    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool = True


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP)
    tools: list[Annotated[dict[str, Any], AfterValidator(tool_schema)]] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    functions: NotSupported = None
    function_call: NotSupported = None
    audio: NotSupported = None
    modalities: NotSupported = None

    @model_validator(mode="after")
    def can_be_done(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs: true")
        if self.max_completion_tokens is not None:
            self.max_new_tokens = self.max_completion_tokens
        if not self.max_new_tokens:
            raise ValueError("max_tokens must be at least 1")
        if self.add_generation_prompt not in (None, not self.continue_final_message):
            raise ValueError("add_generation_prompt must be the opposite of continue_final_message")
        last = self.messages[-1]
        if self.continue_final_message and (last.role != "assistant" or last.tool_calls):
            raise ValueError("continue_final_message needs a last message of the assistant, without tool_calls")
        if not self.chat_template_kwargs.enable_thinking:
            self.think = "off"
        return self

    @property
    def n_top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict]:
        return self.tools if self.tool_choice != "none" else []

    def structure(self, tags: tuple[int, int] | None) -> tuple[str, bool] | None:
        return structure_of(self, self.offered_tools, self.tool_choice, self.parallel_tool_calls, tags)

    def chat(self) -> list[dict]:
        """The messages for encode_chat; responses of tools in the order of their calls."""
        messages, positions, caller = [], {}, 0
        for i, message in enumerate(self.messages):
            key = (i, 0)
            if message.role != "tool":
                positions, caller = {call.id: number for number, call in enumerate(message.tool_calls)}, i
            elif message.tool_call_id in positions:
                key = (caller, 1 + positions[message.tool_call_id])
            else:
                raise ValueError(f"messages.{i}: tool_call_id names no call of the assistant's message before it")
            parts = message.model_dump(include={"content", "reasoning_content"})
            parts["role"] = "system" if message.role == "developer" else message.role
            parts["tool_calls"] = [call.function.model_dump() for call in message.tool_calls]
            messages.append((key, parts))
        return [parts for _, parts in sorted(messages, key=lambda pair: pair[0])]


class CompletionRequest(Request):
    prompt: Annotated[list[str | Tokens], BeforeValidator(several)] = Field(min_length=1, max_length=MAX_PROMPTS)
    max_new_tokens: TokenLimit = Field(16, alias="max_tokens")
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Annotated[int, Field(ge=1, le=1)] = 1
    echo: bool = False
    suffix: NotSupported = None

    @property
    def n_top(self) -> int | None:
        return self.logprobs

    def structure(self, tags: tuple[int, int] | None) -> tuple[str, bool] | None:
        return self.document_structure()


FIELDS = {info.alias or name for kind in (ChatRequest, CompletionRequest) for name, info in kind.model_fields.items()}


def unknown_field(name: str) -> str:
    """The reason for refusing it."""
    near = difflib.get_close_matches(name, FIELDS, n=1)
    return "this server does not know this field" + (f"; did you mean {near[0]}?" if near else "")
