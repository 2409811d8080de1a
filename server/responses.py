"""OpenAI's /v1/responses: a request becomes one of the chat endpoint; its answer becomes output items and events.

A response is stored, so that another request can continue it (previous_response_id), until newer ones need its memory.
"""

import json
import secrets
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from server.answer import Answer
from server.guard import Refusal
from server.models import Served
from server.schema import (
    IGNORED_FIELDS,
    MAX_TOOLS,
    MAX_TOP,
    TEXT_PARTS,
    Body,
    ChatRequest,
    NotSupported,
    NullsLeftOut,
    TokenLimit,
)
from server.service import usage

MAX_STORED = 64 * 2**20  # bytes of all stored responses
MAX_ITEMS = 4096  # of an input
LOG_PROBS = "message.output_text.logprobs"  # of `include`
# Fields of a response with the names of the chat endpoint: to say which field of the request is wrong.
CHAT_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
CHAT_NAMES |= {"reasoning_effort": "reasoning.effort"}
TEXTS = {"message": ("output_text", {"annotations": [], "logprobs": []}), "reasoning": ("reasoning_text", {})}


def is_function(tool: dict) -> dict:
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise ValueError('this server has no tools of its own here; a tool is {"type": "function", "name": …}')
    return tool


class Reasoning(NullsLeftOut):
    effort: str | None = None


class TextOptions(NullsLeftOut):
    format: dict[str, Any] = {"type": "text"}


class ResponsesRequest(Body):
    """The fields that the chat endpoint does not have, or has in another form; all others are passed to it."""

    model_config = ConfigDict(allow_inf_nan=False, extra="allow")
    ignored = IGNORED_FIELDS - {"store", "metadata"}

    input: str | Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS, fail_fast=True)]
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=256)
    max_output_tokens: TokenLimit | None = None
    reasoning: Reasoning = Reasoning()
    text: TextOptions = TextOptions()
    tools: list[Annotated[dict[str, Any], AfterValidator(is_function)]] = Field([], max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] = "auto"
    include: list[str] = Field([], max_length=16)
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP)
    n: int = Field(1, ge=1, le=1)
    store: bool = True
    metadata: dict[str, Any] = {}
    messages: NotSupported = None
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    stream: bool = False
    stream_options: dict[str, Any] = {}  # whether events are padded, against eavesdroppers: never

    def chat_request(self, history: list[dict]) -> ChatRequest:
        """history: the items of the previous response. RequestValidationError if the chat endpoint refuses a field."""
        try:
            messages = messages_of([*history, *self.items()])
            system = [{"role": "system", "content": self.instructions}] if self.instructions else []
            body = self.model_extra | {"messages": system + messages, "stream": self.stream}
            return ChatRequest.model_validate(body | self.chat_fields())
        except ValidationError as error:
            errors = [dict(each, loc=("body", *in_request(each["loc"]))) for each in error.errors()]
            raise RequestValidationError(errors) from None

    def items(self) -> list[dict]:
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input

    def chat_fields(self) -> dict:
        tools = [
            {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}
            for tool in self.tools
        ]
        choice, form = self.tool_choice, self.text.format
        if isinstance(choice, dict) and choice.get("type") == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        if form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
        fields = {"tools": tools, "tool_choice": choice, "response_format": form}
        has_log_probs = LOG_PROBS in self.include or self.top_logprobs > 0
        fields |= {"logprobs": has_log_probs, "top_logprobs": self.top_logprobs}
        fields |= {"max_tokens": self.max_output_tokens, "reasoning_effort": self.reasoning.effort}
        return {name: value for name, value in fields.items() if value is not None}


def in_request(place: tuple) -> tuple:
    """Where a fault of the chat request is in ours."""
    return (CHAT_NAMES.get(place[0], place[0]), *place[1:]) if place else place


def messages_of(items: list[dict]) -> list[dict]:
    """The chat endpoint's messages. Reasoning, text and calls that follow each other are one of the assistant.

    ValueError for an item that this server does not know.
    """
    messages = []

    def assistant(*later: str) -> dict:
        """The last message, if it is the assistant's and has none of the fields `later`; otherwise a new one."""
        if not messages or messages[-1]["role"] != "assistant" or messages[-1].keys() & {*later}:
            messages.append({"role": "assistant"})
        return messages[-1]

    for number, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") == "assistant":
            assistant("content", "tool_calls")["content"] = item.get("content")
        elif kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary")
            assistant("reasoning_content", "content", "tool_calls")["reasoning_content"] = text_of(parts)
        elif kind == "function_call":
            call = {"id": item.get("call_id"), "type": "function"}
            call["function"] = {"name": item.get("name"), "arguments": item.get("arguments")}
            assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "mcp_call":  # a call of the server's own tools: the answer has used its result
            raise Refusal(400, f"input.{number}: this server knows no items of type {str(kind)[:40]!r}", param="input")
    return messages


def text_of(parts: Any) -> str:
    texts = [part.get("text") for part in parts or [] if isinstance(part, dict) and part.get("type") in TEXT_PARTS]
    return "\n".join(text for text in texts if isinstance(text, str))


class StoredResponses:
    """Responses with the items of their conversations, by an id that cannot be guessed; those unused longest go."""

    def __init__(self, limit: int = MAX_STORED):
        self.limit, self.size = limit, 0
        self.entries: OrderedDict[str, bytes] = OrderedDict()

    def put(self, response: dict, items: list[dict]):
        entry = json.dumps({"response": response, "items": items}).encode()
        self.entries[response["id"]] = entry
        self.size += len(entry)
        while self.size > self.limit:
            self.size -= len(self.entries.popitem(last=False)[1])

    def get(self, name: str) -> dict:
        """{"response", "items"}. Refusal if there is none."""
        if name not in self.entries:
            message = "there is no response of this id, or its memory was needed: send the whole conversation as input"
            raise Refusal(404, message, "previous_response_not_found", "previous_response_id")
        self.entries.move_to_end(name)
        return json.loads(self.entries[name])

    def delete(self, name: str):
        self.get(name)
        self.size -= len(self.entries.pop(name))


class ResponseForm:
    """The response as it grows: its object, and the events that tell of each change."""

    def __init__(self, served: Served, request: ResponsesRequest, chat: ChatRequest, history: list[dict], stored):
        self.request, self.history, self.stored = request, history, stored
        self.number = 0  # of the next event
        self.item: dict | None = None  # the last of the output, while it grows
        self.output: list[dict] = []
        config = chat.generation_config(served.context, served.sampling)
        self.response = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata,
            "model": served.name,
            "output": self.output,
            "parallel_tool_calls": chat.parallel_tool_calls,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning.effort, "summary": None},
            "store": request.store,
            "temperature": config.temperature,
            "text": {"format": request.text.format},
            "tool_choice": request.tool_choice,
            "tools": request.tools,
            "top_logprobs": request.top_logprobs,
            "top_p": config.top_p,
            "truncation": request.truncation,
            "usage": None,
        }

    async def whole(self, answers: list[Answer], pieces: AsyncGenerator) -> dict:
        async for _ in self.changes(answers, pieces):
            pass
        return self.response

    async def events(self, answers: list[Answer], pieces: AsyncGenerator) -> AsyncGenerator[dict, None]:
        for kind in ("response.created", "response.in_progress"):
            yield self.event(kind, response=self.response)
        try:
            async for event in self.changes(answers, pieces):
                yield event
        except Refusal as refusal:
            error = {"code": "server_error", "message": str(refusal)}
            yield self.event("response.failed", response=self.response | {"status": "failed", "error": error})

    async def changes(self, answers: list[Answer], pieces: AsyncGenerator) -> AsyncGenerator[dict, None]:
        async for _, piece in pieces:
            for event in self.put(piece):
                yield event
        for event in self.end(answers[0]):
            yield event

    def event(self, kind: str, **fields) -> dict:
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1} | fields

    def put(self, piece: dict) -> Iterator[dict]:
        """Takes a piece of the answer (server/answer.py)."""
        if text := piece.get("reasoning_content"):
            yield from self.add_text("reasoning", text)
        if text := piece.get("content"):
            yield from self.add_text("message", text, piece.get("logprobs", []))
        for run in piece.get("tool_runs", []):
            arguments = json.dumps(run["arguments"], ensure_ascii=False)
            call = {"server_label": "jiezi", "name": run["name"], "arguments": arguments, "output": run["result"]}
            yield from self.open("mcp_call", **call)
        for call in piece.get("tool_calls", []):
            yield from self.add_call(call["id"], **call["function"])

    def open(self, kind: str, **fields) -> Iterator[dict]:
        yield from self.close()
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc", "mcp_call": "mcp"}[kind]
        self.item = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"} | fields
        self.output.append(self.item)
        yield self.event("response.output_item.added", output_index=self.index, item=self.item)

    def close(self, status: str = "completed") -> Iterator[dict]:
        if self.item is None:
            return
        self.item["status"] = status
        if self.item["type"] in TEXTS:
            (part,) = self.item["content"]
            yield self.of_text(
                part["type"], "done", **{name: part[name] for name in part.keys() & {"text", "logprobs"}}
            )
            yield self.of_text("content_part", "done", part=part)
        yield self.event("response.output_item.done", output_index=self.index, item=self.item)
        self.item = None

    @property
    def index(self) -> int:
        return len(self.output) - 1

    def of_text(self, kind: str, change: str, **fields) -> dict:
        place = {"item_id": self.item["id"], "output_index": self.index, "content_index": 0}
        return self.event(f"response.{kind}.{change}", **place, **fields)

    def add_text(self, kind: str, text: str, log_probs: list[dict] | tuple = ()) -> Iterator[dict]:
        part_type, extra = TEXTS[kind]
        if self.item is None or self.item["type"] != kind:
            yield from self.open(kind, content=[], **({"role": "assistant"} if kind == "message" else {"summary": []}))
            part = {"type": part_type, "text": ""} | {name: [] for name in extra}
            yield self.of_text("content_part", "added", part=dict(part))
            self.item["content"].append(part)
        (part,) = self.item["content"]
        part["text"] += text
        fields = {}
        if kind == "message":
            fields["logprobs"] = [{name: each[name] for name in each if name != "start"} for each in log_probs]
            part["logprobs"] += fields["logprobs"]
        yield self.of_text(part_type, "delta", delta=text, **fields)

    def add_call(self, call_id: str, name: str, arguments: str) -> Iterator[dict]:
        yield from self.open("function_call", call_id=call_id, name=name, arguments="")
        self.item["arguments"] = arguments
        place = {"item_id": self.item["id"], "output_index": self.index}
        yield self.event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self.event("response.function_call_arguments.done", **place, name=name, arguments=arguments)

    def end(self, answer: Answer) -> Iterator[dict]:
        if not self.output:
            yield from self.add_text("message", "")
        self.response["status"] = "completed"
        if answer.finish_reason == "length":
            self.response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        yield from self.close(self.response["status"])
        counts = usage([answer])
        self.response["usage"] = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": answer.n_reasoning},
            "total_tokens": counts["total_tokens"],
        }
        if self.request.store:
            self.stored.put(self.response, [*self.history, *self.request.items(), *self.output])
        yield self.event(f"response.{self.response['status']}", response=self.response)
