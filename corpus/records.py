"""The shapes of records that people have -> a text, a chat, a pair of chats, or a task with an answer to check."""

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

# A part of a record -> the names that its field has in the data sets people have. The first that is filled counts; and
# of what is asked, messages come before a question, and a question before an instruction with its input.
Fields = dict[str, tuple[str, ...]]
ASKED: Fields = {
    "messages": ("conversations", "messages"),
    "question": ("prompt", "q", "question_zh", "question", "query"),
    "instruction": ("instruction",),
    "input": ("input",),
}
PROMPT_FIELDS = ASKED | {"history": ("history",), "system": ("system", "system_prompt"), "tools": ("tools",)}
CHAT_FIELDS = PROMPT_FIELDS | {
    "answer": ("output", "a", "completion", "answer_zh", "answer", "response", "target", "content"),
    "reasoning": ("reasoning_content",),
}
PAIR_FIELDS = PROMPT_FIELDS | {
    "chosen": ("chosen", "response_j"),
    "rejected": ("rejected", "response_k"),
    "both": ("output",),  # LLaMA-Factory's older way: [chosen, rejected]
}
TASK_FIELDS = PROMPT_FIELDS | {"answer": ("gt", "answer_only", "answer")}


class BadRecord(ValueError):
    """A record of no known shape, or with a field of the wrong type; the message says what is wrong."""


class Chat(NamedTuple):
    messages: Messages
    tools: list | None  # JSON schemas


class Pair(NamedTuple):
    chosen: Messages
    rejected: Messages
    shared: int  # so many messages at the beginning of both are the same
    tools: list | None


class Task(NamedTuple):
    messages: Messages  # the last is the user's
    answer: str  # to check the model's against
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


def map_fields(known: Fields, mapping: dict[str, str]) -> Fields:
    """The table of fields with a user's mapping of parts; who says where the question is means no other field."""
    silent = ASKED.keys() - mapping.keys() if ASKED.keys() & mapping.keys() else set()
    return {part: (mapping[part],) if part in mapping else names for part, names in known.items() if part not in silent}


def pick_fields(record: dict, fields: Fields) -> dict[str, str]:
    """Part -> the field of this record that holds it, for the parts that it has."""
    picked = {}
    for part, names in fields.items():
        there = [name for name in names if name in record]
        if there:
            picked[part] = next((name for name in there if record[name]), there[0])
    asked = [part for part in ASKED if part in picked and record[picked[part]]]
    used = list(ASKED)  # where all are blank
    if asked:
        used = asked[:1] if asked[0] in ("messages", "question") else ["instruction", "input"]
    return {part: name for part, name in picked.items() if part in used or part not in ASKED}


def shape_of(record: dict, fields: Fields) -> str:
    """What the report calls the record's shape: its fields that are used, and which parts they are."""
    picked = pick_fields(record, fields).items()
    return ", ".join(name if name == part else f"{part}={name}" for part, name in picked)


def _take(record: dict, fields: Fields) -> dict[str, Any]:
    """Part -> its value."""
    return {part: record[name] for part, name in pick_fields(record, fields).items()}


def text_field_of(record: dict, field: str) -> str:
    """`field`, or, where the record has none, the completion of one that has no prompt."""
    if field == "text" and field not in record and "completion" in record and not pick_fields(record, ASKED):
        return "completion"
    return field


def text_of(record: dict, field: str) -> str:
    field = text_field_of(record, field)
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
                record = parse(record)
                json.dumps(record, ensure_ascii=False, default=str).encode()
                value = take(record)
            except UnicodeEncodeError:
                raise UserError(f"{batch.path}:{place}: not UTF-8 (GBK, maybe?), or half a surrogate pair") from None
            except RecursionError:
                raise UserError(f"{batch.path}:{place}: lists or objects in each other, too deep to be read") from None
            except (BadRecord, UserError) as error:
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
        return json.loads(json.dumps(ast.literal_eval(value)))  # of a set, or bytes, a TypeError
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise BadRecord(f"neither JSON nor a Python literal: {value[:40]}") from None


def _sayable(value: Any) -> Any:
    """BadRecord for what JSON, in which a chat has its tools, cannot say: parquet files hold dates and bytes."""
    try:
        json.dumps(value)
    except TypeError as error:
        raise BadRecord(f"in the tools: {error}") from None
    return value


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
        found.append(_sayable(call))
    return found


def answer_of(value: Any, reasoning: Any = None) -> Messages:
    """The messages of an answer that is a text, a message, or a list of messages."""
    if isinstance(value, str):
        value = {"role": "assistant", "content": value, "reasoning_content": reasoning}
    turns = [value] if isinstance(value, dict) else _expect(value, list, "an answer that is a text, or messages")
    return [message_of(turn) for turn in turns]


def split_turns(text: str) -> Messages:
    r"""The turns of a chat that is one string, "Human: …\nAssistant: …"; none where it is not. (BELLE, hh-rlhf)"""
    before, *parts = re.split(r"(?:^|\n)\s*(Human|Assistant)[:：]", text)
    names, contents = parts[::2], parts[1::2]
    if before.strip() or names[:2] != ["Human", "Assistant"]:
        return []
    return [message_of({"role": name.lower(), "content": content.strip()}) for name, content in zip(names, contents)]


def prompt_of(record: dict, fields: Fields = PROMPT_FIELDS) -> Chat:
    """All of a record but what answer fields hold. No messages where the shape is not known."""
    values = _take(record, fields)
    turns = unpack(values.get("messages")) or values.get("question")
    tools = unpack(values.get("tools"))
    messages = []
    if isinstance(turns, list):
        messages = [message_of(turn) for turn in turns]
        tools = tools or (turns and unpack(turns[0].get("tools")))  # MiniMind keeps them in the system message
    else:
        for exchange in _expect(unpack(values.get("history")) or [], list, "a history that is a list"):
            if not isinstance(exchange, list | tuple) or len(exchange) != 2:
                raise BadRecord("an entry of the history is not a question and its answer")
            question, answer = exchange
            messages += [message_of({"role": "user", "content": question}), *answer_of(answer)]
        messages += _question_of(values, turns)
    if not isinstance(tools or [], list):
        raise BadRecord("the tools are not a list")
    if values.get("system") and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, message_of({"role": "system", "content": values["system"]}))
    return Chat(messages, _sayable(tools))


def _question_of(values: dict, question: Any) -> Messages:
    """The user's turn, of a question or of Alpaca's instruction and input; none where there is neither."""
    if not question:
        parts = [part for part in (values.get("instruction"), values.get("input")) if part]
        question = "\n".join(_expect(part, str, "an instruction that is a text") for part in parts)
    if isinstance(question, str) and (turns := split_turns(question)):
        return turns if turns[-1]["content"] else turns[:-1]  # "Assistant:" at the end asks for the answer
    return [message_of({"role": "user", "content": question})] if question else []


def chat_of(record: dict, fields: Fields = CHAT_FIELDS) -> Chat:
    messages, tools = prompt_of(record, fields)
    values = _take(record, fields)
    if values.get("answer") and not (messages and messages[-1]["role"] == "assistant"):
        messages += answer_of(values["answer"], values.get("reasoning"))
    _expect_parts(record, fields, messages, "answer")
    return Chat(messages, tools)


def _expect_parts(record: dict, fields: Fields, messages: Messages, answer: str):
    """BadRecord where no one asks, or answers, because no field is known for it; blank ones are for rules to drop."""
    roles = {message["role"] for message in messages}
    picked = pick_fields(record, fields).keys()
    asked = "user" in roles or picked & ASKED.keys()
    answered = "assistant" in roles or picked & {answer, "messages"}
    if not asked or not answered:
        raise BadRecord(
            f"no chat of a known shape; there is {_fields(record)} (see --fields question=NAME,{answer}=NAME)"
        )


def pair_of(record: dict, fields: Fields = PAIR_FIELDS) -> Pair:
    prompt, tools = prompt_of(record, fields)
    values = _take(record, fields)
    answers = [values.get("chosen"), values.get("rejected")]
    if answers == [None, None]:
        answers = unpack(values.get("both"))
    if not isinstance(answers, list) or len(answers) != 2 or not all(answers):
        flag = "--fields chosen=NAME,rejected=NAME"
        raise BadRecord(f"no pair of chosen and rejected; there is {_fields(record)} (see {flag})")
    chosen, rejected = (_whole_chat(prompt, answer) for answer in answers)
    _expect_parts(record, fields, chosen, "chosen")
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


def _whole_chat(prompt: Messages, answer: Any) -> Messages:
    """The prompt may be in the answer already; but a system text that stands beside it still belongs in front."""
    answer = (isinstance(answer, str) and not prompt and split_turns(answer)) or answer_of(answer)
    if answer[0]["role"] == "assistant":
        return prompt + answer
    if answer[0]["role"] != "system" and prompt and prompt[0]["role"] == "system":
        return [prompt[0], *answer]
    return answer


def task_of(record: dict, fields: Fields = TASK_FIELDS) -> Task:
    """A question whose answer can be checked. A chat's last answer is left out: it is blank, or given away."""
    messages, tools = prompt_of(record, fields)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise BadRecord(f"no question of a known shape; there is {_fields(record)} (see --fields question=NAME)")
    answer = _answer_to_check(_take(record, fields).get("answer"))
    if not answer:
        raise BadRecord(f"no answer to check; there is {_fields(record)} (see --fields answer=NAME)")
    return Task(messages, answer, tools)


def _answer_to_check(value: Any) -> str:
    """The answer alone: a text or number, or the one in a list; of GSM8K what follows "####". Blank where none is."""
    if isinstance(value, list):
        if len(value) != 1:
            raise BadRecord(f"{len(value)} answers, where one is to be checked")
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    text = str(value)
    if "####" in text:
        text = text.rpartition("####")[2].replace(",", "")  # 1,200 is 1200
    return text.strip()
