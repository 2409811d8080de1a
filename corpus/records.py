"""The shapes of records that people have -> a text, a chat, or a pair of chats."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from base.cli import UserError
from corpus.files import find_files, read_batches

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user",  # ShareGPT's names
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
Messages = list[dict]  # as model.chat.encode_chat takes them


class BadRecord(ValueError):
    """A record of no known shape, or with a field of the wrong type; the message says what is wrong."""


class Chat(NamedTuple):
    messages: Messages
    tools: list | None  # JSON schemas


class Task(NamedTuple):
    messages: Messages  # up to the answer
    answer: str  # that can be checked
    tools: list | None


class Pair(NamedTuple):
    chosen: Messages
    rejected: Messages
    shared: int  # so many messages at the beginning of both are the same
    tools: list | None


def parse(record: bytes | object) -> dict:
    """A line of JSON, or what another reader made of a record, as a dict."""
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:  # of the JSON or of its UTF-8
            raise BadRecord(f"broken JSON: {error}") from None
    return _expect(record, dict, "a JSON object")


def _expect(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind):
        raise BadRecord(f"expected {what}, found: {type(value).__name__}")
    return value


def text_of(record: dict, field: str) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        if field in record:
            raise BadRecord(f'the field "{field}" holds no text but {json.dumps(text, default=str)[:40]}')
        raise BadRecord(f'no text in the field "{field}" (see --text_field); there is {_fields(record)}')
    return text


def _fields(record: dict) -> str:
    return ", ".join(map(str, record))


def each_record(file: str, text_field: str, take: Callable[[dict], Any]) -> Iterator[Any]:
    """take(record) for every record of a file or folder; UserError names the file and line of a bad one."""
    for batch in read_batches(find_files([file]), text_field):
        for place, record in batch.records:
            try:
                value = take(parse(record))
            except BadRecord as error:
                raise UserError(f"{batch.path}:{place}: {error}") from None
            yield value


def unpack(value: Any) -> Any:
    """A list or object that may be kept as a string: of JSON, or, in old CSV files, of Python."""
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise BadRecord(f"neither JSON nor a Python literal: {value[:40]}") from None


def message_of(turn: Any) -> dict:
    """A message as encode_chat takes it, of {"role", "content"} or ShareGPT's {"from", "value"}."""
    _expect(turn, dict, "a message that is an object")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    content = "" if content is None else content
    calls = unpack(turn.get("tool_calls")) or []
    reasoning = turn.get("reasoning_content") or ""
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord(f'a message has the role "{role}"; known are {", ".join(ROLES)}')
    if role == "function_call":
        content, calls = "", unpack(content)
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise BadRecord("the content of a message is not a text")
    if ROLES[role] == "assistant" and (thought := re.match("<think>(.*?)</think>", content, re.S)):
        reasoning = thought[1].strip("\n")
        content = content[thought.end() :].lstrip("\n")  # as DeepSeek-R1 writes it
    message = {
        "role": ROLES[role],
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": _calls_of(calls),
    }
    return {key: value for key, value in message.items() if value or key == "content"}


def _calls_of(calls: Any) -> list[dict]:
    """Tool calls as {"name", "arguments"}, of one or several, each maybe inside OpenAI's {"function"}."""
    calls = [calls] if isinstance(calls, dict) else _expect(calls, list, "a list of tool calls")
    found = []
    for call in calls:
        call = _expect(call, dict, "a tool call that is an object")
        call = _expect(call.get("function", call), dict, "a function that is an object")
        if not isinstance(call.get("name"), str) or "arguments" not in call:
            raise BadRecord("a tool call has no name or no arguments")
        found.append(call)
    return found


def answer_of(value: Any) -> Messages:
    """The messages of an answer that is a text, a message, or a list of messages."""
    if isinstance(value, str):
        value = {"role": "assistant", "content": value}
    turns = [value] if isinstance(value, dict) else _expect(value, list, "an answer that is a text, or messages")
    return [message_of(turn) for turn in turns]


def prompt_of(record: dict) -> Chat:
    """All of a record but what answer fields hold. No messages where the shape is not known."""
    turns = unpack(record.get("conversations") or record.get("messages")) or record.get("prompt") or record.get("q")
    tools = unpack(record.get("tools"))
    messages = []
    if isinstance(turns, list):
        messages = [message_of(turn) for turn in turns]
        tools = tools or unpack(turns[0].get("tools"))  # MiniMind keeps them in the system message
    else:
        for exchange in _expect(unpack(record.get("history")) or [], list, "a history that is a list"):
            if not isinstance(exchange, list | tuple) or len(exchange) != 2:
                raise BadRecord("an entry of the history is not a question and its answer")
            question, answer = exchange
            messages += [message_of({"role": "user", "content": question}), *answer_of(answer)]
        messages += _question_of(record, turns)
    if not isinstance(tools or [], list):
        raise BadRecord("the tools are not a list")
    if record.get("system") and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, message_of({"role": "system", "content": record["system"]}))
    return Chat(messages, tools)


def _question_of(record: dict, question: Any) -> Messages:
    """The user's turn, of a question or of Alpaca's instruction and input; none where there is neither."""
    if not question:
        parts = [part for part in (record.get("instruction"), record.get("input")) if part]
        question = "\n".join(_expect(part, str, "an instruction that is a text") for part in parts)
    return [message_of({"role": "user", "content": question})] if question else []


def chat_of(record: dict) -> Chat:
    messages, tools = prompt_of(record)
    for field in ("output", "a", "completion"):  # of Alpaca, q/a/history and TRL
        messages += answer_of(record.get(field) or [])
    if not messages:
        raise BadRecord(f"no chat of a known shape; there is {_fields(record)}")
    return Chat(messages, tools)


def task_of(record: dict) -> Task:
    """A question with an answer that can be checked."""
    messages, tools = prompt_of(record)
    answer = record.get("answer")
    if not messages or not isinstance(answer, str | int | float):
        raise BadRecord(f"no question with its answer; there is {_fields(record)}")
    return Task(messages, str(answer), tools)


def pair_of(record: dict) -> Pair:
    prompt, tools = prompt_of(record)
    answers = [record.get("chosen"), record.get("rejected")]
    if answers == [None, None]:
        answers = unpack(record.get("output"))  # LLaMA-Factory's older way: [chosen, rejected]
    if not isinstance(answers, list) or len(answers) != 2 or not all(answers):
        raise BadRecord(f"no pair of chosen and rejected; there is {_fields(record)}")
    chosen, rejected = (_whole_chat(prompt, answer_of(answer)) for answer in answers)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise BadRecord("chosen and rejected share no prompt")
    if chosen != rejected:
        for chat in (chosen, rejected):
            if len(chat) == shared or chat[shared]["role"] != "assistant":
                raise BadRecord(f"chosen and rejected differ in message {shared + 1}, which is not an answer in both")
    return Pair(chosen, rejected, shared, tools)


def _whole_chat(prompt: Messages, answer: Messages) -> Messages:
    """The prompt may be in the answer already; but a system text that stands beside it still belongs in front."""
    if answer[0]["role"] == "assistant":
        return prompt + answer
    if answer[0]["role"] != "system" and prompt and prompt[0]["role"] == "system":
        return [prompt[0], *answer]
    return answer
