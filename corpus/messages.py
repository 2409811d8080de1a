"""Turns of a chat in the notations that data sets use -> messages as model.chat.encode_chat takes them."""

import ast
import json
import math
import re
from collections.abc import Callable
from typing import Any

from corpus.cleaning import Dropped
from corpus.errors import BadRecord

ROLES = {
    "system": ("system", "developer", "系统"),
    "user": ("user", "human", "prompter", "用户"),
    "assistant": ("assistant", "gpt", "bot", "model", "ai", "chatgpt", "助手", "function_call", "tool_call"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
CALLERS = ("function_call", "tool_call")  # ShareGPT's turns whose whole content is a call
REASONING = ("reasoning_content", "reasoning", "thinking", "think", "thought", "thoughts", "thinking_content")
REASONING += ("reasoning_text", "cot", "chain_of_thought", "rationale")
# Fields of a turn that say whether it is trained (OpenAI, axolotl, LLaMA-Factory, ms-swift).
TRAINED = ("weight", "weights", "loss", "loss_mask", "loss_weight", "loss_scale", "compute_loss", "learn", "train")
TRAINED += ("trained", "trainable", "training", "do_train", "is_train", "train_mask", "train_on_turn", "train_detail")
NOT_TRAINED = ("masked", "ignore", "ignored", "skip", "no_train", "no_loss")  # the other way round
UNCLEAR = ("mask",)  # true may mean either
MARKS = {*TRAINED, *NOT_TRAINED, *UNCLEAR}
NO = {"false", "no", "off", "n", "f"}
YES = {"true", "yes", "on", "y", "t"}
# The tags of thoughts, as letters, in the templates of many models.
THOUGHT_TAG = re.compile(
    r"(?:<|&lt;|◁|\[(?=/?THINK\])|<\|(?=(?:begin|start|end)_))(?P<end>/|end_(?:of_)?)?(?:(?:begin|start)_(?:of_)?)?"
    r"(?P<name>(?:\w{1,20}[:_])?think(?:ing)?|thoughts?|reasoning|reflection|scratchpad|analysis|思考|推理)"
    r"\s{0,9}(?:\|?>|&gt;|▷|\])",
    re.IGNORECASE,
)
# A call in a form that is not known: its tags would be taken out, or learned as letters.
OTHER_CALL = re.compile(
    r"\A\s*(?:<\|?(?:function_?calls?|tool_calls|tool_use|tool_code|TOOL_CALL|tool_call(?=\|)|python_tag|action_start)\b"
    r"|<function=|<invoke name=|\[TOOL_CALLS\]|<[|｜]tool[▁_ ]calls?[▁_ ]|✿FUNCTION✿)"
    r"|(?<!`)<(?:function_?calls?|tool_calls|function=\w+)>"
)
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
CALLS = re.compile(r"(?:\s*<tool_call>(?:(?!<tool_call>).)*?</tool_call>)+\s*\Z", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
RESPONSES = re.compile(r"(?:\s*<tool_response>(?:(?!<tool_response>).)*?</tool_response>)+\s*", re.DOTALL)
TOOL_LIST = re.compile(r"\n*<tools>(.*?)</tools>\n*", re.DOTALL)
Messages = list[dict]


def expect(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind):
        raise BadRecord(f"expected {what}, found: {type(value).__name__}")
    return value


def is_missing(value: Any) -> bool:
    """None, or the NaN that pandas writes in the place of a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_filled(value: Any) -> bool:
    """Whether a field has content; the number 0 is content."""
    return not is_missing(value) and (bool(value) or (isinstance(value, int | float) and not isinstance(value, bool)))


def as_text(value: Any, what: str) -> str:
    """A text, or the texts of OpenAI's list of parts; "" where it is missing."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, list):
        return "".join(_part_text(part, what) for part in value)
    raise BadRecord(f"{what} is not a text but {type(value).__name__}")


def or_number(value: Any) -> Any:
    """A number as it is written; anything else as it is."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and not is_missing(value)
    return str(value) if number else value


def _part_text(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    raise BadRecord(f"{what} has a part that is not a text but {kind}")


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


def check_json(value: Any) -> Any:
    """BadRecord for what JSON cannot express, and so no tool of a chat: NaN, and the dates and bytes of Parquet."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRecord(f"in the tools: {error}") from None
    return value


# ------------------------------------------------------------------------------------------------------------ messages


def messages_of(turn: Any) -> Messages:
    """The message of {"role", "content"} or ShareGPT's {"from", "value"}; of several tool responses one each."""
    expect(turn, dict, "a message that is an object")
    name = turn.get("role") if "role" in turn else turn.get("from")
    role = ROLE_OF.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        hint = "; give --speaker NAME for a chat export" if "from_id" in turn else ""
        raise BadRecord(f'a message has the role "{name}"; known are {", ".join(ROLE_OF)}{hint}')
    fields = ("content", "value", "text", "output", "result") if role == "tool" else ("content", "value", "text")
    content = next((turn[field] for field in fields if is_filled(turn.get(field))), "")
    if name.strip().lower() in CALLERS:
        turn, content = {**turn, "tool_calls": unpack(content)}, ""
    content = as_text(content, "the content of a message")
    if role == "assistant":
        return [_assistant_message(turn, content)]
    if "<tool_response>" in content and role in ("user", "tool") and RESPONSES.fullmatch(content):
        return [{"role": "tool", "content": response} for response in RESPONSE.findall(content)]
    if role == "tool":
        content = re.sub(r"</?tool_response>\n?", "", content)  # the chat format writes them
        if all(is_missing(turn.get(field)) for field in fields) and turn.keys() - {"role", "from", "name", *fields}:
            raise BadRecord(f"a tool's turn has no content; there is {', '.join(turn)}")
    return [{"role": role, "content": content}]


def _assistant_message(turn: dict, content: str) -> dict:
    """With thoughts and calls of tools apart from the content, whether they are in fields or in tags."""
    reasoning = next((turn[field] for field in REASONING if is_filled(turn.get(field))), "")
    reasoning = as_text(reasoning, "the reasoning of a message")
    thought, rest = split_thought(content)
    if thought is None:
        content = rest
    elif reasoning.strip() in ("", thought.strip()):
        reasoning, content = thought, rest
    if reasoning:
        content = content.lstrip("\r\n")  # the newlines after a thought belong to the chat format
    if ("<" in content or "[" in content or "✿" in content) and OTHER_CALL.search(content):
        raise BadRecord(
            'a tool call in an unknown form: write it as <tool_call>{"name": …, "arguments": {…}}</tool_call>'
        )
    calls = unpack(turn.get("tool_calls")) or unpack(turn.get("function_call")) or []
    if "<tool_call>" in content and (found := CALLS.search(content)):
        written = [call for text in CALL.findall(found[0]) for call in _listed(unpack(text.strip()))]
        content, calls = content[: found.start()].rstrip("\n"), calls or written
    message = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [_call_of(call) for call in expect(_listed(calls), list, "a list of tool calls")],
    }
    message = {key: value for key, value in message.items() if value or key == "content"}
    return message | ({} if _is_trained(turn) else {"weight": 0})


def split_thought(content: str) -> tuple[str | None, str]:
    """The thought at the beginning of an answer and the rest; None where there is none.

    Where the chat format wrote the opening tag into the prompt, the answer has the closing one alone.
    """
    if "<" not in content and "[" not in content and "◁" not in content and "&" not in content:
        return None, content
    tags = list(THOUGHT_TAG.finditer(content))
    thinking = [tag for tag in tags if _is_thinking(tag)]
    if tags and not tags[0]["end"] and not content[: tags[0].start()].strip("\ufeff\u200b \t\r\n"):
        start = tags[0].end()
        end = next((tag for tag in tags if tag["end"] and _name(tag) == _name(tags[0])), None)
        if end is None:  # a rule drops what is not closed
            return None, f"<think>{content[start:]}" if _is_thinking(tags[0]) else content
    elif len(thinking) == 1 and thinking[0]["end"]:
        start, end = 0, thinking[0]
    else:
        return None, content
    thought, rest = content[start : end.start()].strip("\r\n"), content[end.end() :].lstrip("\r\n")
    if not rest.strip() and not _is_thinking(end):  # XML with one element, for example
        return None, content
    return thought, rest  # as DeepSeek-R1 writes it


def _name(tag: re.Match) -> str:
    return tag["name"].lower()


def _is_thinking(tag: re.Match) -> bool:
    return "th" in _name(tag)


def _is_trained(turn: dict) -> bool:
    """False if a field of an assistant's turn says that it is only context."""
    for field in [field for field in turn if field in MARKS and not is_missing(turn[field])]:
        number = _number_of(turn[field])
        if number is None:
            raise BadRecord(f'the field "{field}" of a message is neither true nor false nor a number')
        if field in UNCLEAR:
            raise BadRecord(f'the field "{field}" of a message may mean trained or not: call it "train", true or false')
        if (number <= 0) != (field in NOT_TRAINED):
            return False
    return True


def is_trained_record(record: dict) -> bool:
    """False if a field of a record says so; other values of these fields may mean anything."""
    marked = MARKS.intersection(record).difference(UNCLEAR)
    return all(_number_of(record[field]) != (field in NOT_TRAINED) for field in marked)


def _number_of(value: Any) -> float | None:
    """0 for false and its other words, 1 for true; None for what is neither that nor a number."""
    if isinstance(value, str):
        word = value.strip().lower()
        try:
            return 0 if word in NO else 1 if word in YES else float(word)
        except ValueError:
            return None
    return value if isinstance(value, int | float) else None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


def _call_of(call: Any) -> dict:
    """A call as {"name", "arguments"}, maybe inside OpenAI's {"function"}; its arguments are a JSON object."""
    call = expect(call, dict, "a tool call that is an object")
    call = expect(call.get("function", call), dict, "a function that is an object")
    if "arguments" not in call and "parameters" in call:
        call = {"name": call.get("name"), "arguments": call["parameters"]}
    if not isinstance(call.get("name"), str) or "arguments" not in call:
        raise BadRecord("a tool call has no name or no arguments")
    arguments = _arguments_of(call["arguments"])
    return check_json(call if arguments is call["arguments"] else {**call, "arguments": arguments})


def _arguments_of(value: Any) -> Any:
    """An object, or a string that is JSON of one, as it is written; {} for none; BadRecord for anything else."""
    if is_missing(value) or (isinstance(value, str) and value.strip() in ("", "null")):
        return {}
    if isinstance(value, str):
        try:
            found = json.loads(value, parse_constant=int)  # ValueError for NaN, which is not JSON
        except (ValueError, RecursionError):
            found = value = unpack(value)  # of Python
    else:
        found = value
    if not isinstance(found, dict):
        raise BadRecord(f"the arguments of a tool call are not a JSON object: {str(value)[:40]}")
    if isinstance(value, str) and "\r" in value:
        return found  # without its line ends
    return value


def take_tools(system: str) -> tuple[str, list | None]:
    """The text of a system message without its <tools>…</tools>, and the tools that were listed there."""
    tools = []
    for text in filter(None, map(str.strip, TOOL_LIST.findall(system))):
        try:
            tools += expect(_listed(unpack(text)), list, "a list of tools")
        except BadRecord:  # one tool a line
            tools += [expect(unpack(line), dict, "a tool that is an object") for line in text.split("\n")]
    return (TOOL_LIST.sub("\n\n", system).strip("\n"), tools) if tools else (system, None)


# ----------------------------------------------------------------------------------------------- turns of a whole chat


def check_turns(messages: Messages, changes: Callable[[str], bool]) -> Messages:
    """Without the turns after the last answer, and without an answer that is there twice.

    changes(rule) says whether a rule is switched on, and counts that it changes the chat. Dropped where two different
    answers follow each other.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is not None and last + 1 < len(messages) and changes("open_question"):
        messages = messages[: last + 1]
    doubled = [i for i in range(1, len(messages)) if _answers_again(*messages[i - 1 : i + 1])]
    if not doubled or not changes("double_answer"):
        return messages
    if any(messages[i] != messages[i - 1] for i in doubled):
        raise Dropped("double_answer", messages[doubled[0]]["content"][:80])
    return [message for i, message in enumerate(messages) if i not in doubled]


def _answers_again(before: dict, message: dict) -> bool:
    return message["role"] == before["role"] == "assistant" and "tool_calls" not in before
