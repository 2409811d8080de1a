"""The record formats of data sets -> a text, a chat, a pair of chats, or a task with an answer that can be checked."""

import json
import re
import string
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from base.cli import UserError
from corpus.cleaning import Dropped, is_placeholder
from corpus.errors import BadRecord
from corpus.files import DECODER, ReadOptions, find_files, read_batches
from corpus.messages import (
    REASONING,
    Messages,
    as_text,
    check_json,
    expect,
    is_filled,
    is_missing,
    messages_of,
    or_number,
    take_tools,
    unpack,
)

# A part of a record -> the names that its field has in data sets. The first that is filled counts. Of what is asked,
# messages come before a question, and a question before an instruction with its input.
Fields = dict[str, tuple[str, ...]]
ASKED: Fields = {
    "messages": ("conversations", "messages", "conversation"),
    "question": ("prompt", "q", "question_zh", "question", "query", "问题", "提问", "Question", "Prompt"),
    "instruction": ("instruction", "指令", "Instruction"),
    "input": ("input", "输入", "Input"),
}
ASKED["input"] += ("context", "Context", "passage", "上下文")  # what a question is about
PROMPT_FIELDS = ASKED | {
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions", "available_tools"),
}
ANSWERS = ("output", "a", "completion", "answer_zh", "answer", "response", "target", "content")
ANSWERS += ("回答", "答案", "输出", "Answer", "Response", "Output")
CHAT_FIELDS = PROMPT_FIELDS | {"answer": ANSWERS, "reasoning": (*REASONING, "Complex_CoT", "思考")}
PAIR_FIELDS = PROMPT_FIELDS | {
    "chosen": ("chosen", "response_j", "chosen_response", "response"),
    "rejected": ("rejected", "response_k", "rejected_response", "rejected_messages"),
    "both": ("output",),  # LLaMA-Factory's older way: [chosen, rejected]
}
TASK_FIELDS = PROMPT_FIELDS | {"answer": ("gt", "answer_only", "answer", "答案", "Answer")}
# Fields that say whether the answer is a good one (KTO data), and the values that say that it is not.
LABELS = {"label", "kto_tag", "kto_label", "correct", "is_correct", "good", "is_good", "accepted", "acceptable"}
LABELS |= {"is_chosen", "desirable", "is_desirable", "preferred", "is_preferred", "preference", "liked", "feedback"}
LABELS |= {"thumbs", "quality"}
BAD_LABELS = {"false", "0", "0.0", "-1", "-1.0", "no", "n", "f", "bad", "rejected", "undesirable", "undesired"}
BAD_LABELS |= {"incorrect", "wrong", "negative", "neg", "-", "dislike", "disliked", "down", "thumbs_down"}
BAD_LABELS |= {"否", "错", "错误", "差"}
LETTERS = string.ascii_uppercase  # of options
NO_INPUTS = {"<noinput>", "<no input>", "noinput", "no input", "无输入", "（无）", "(无)"}


Changes = Callable[[str], bool]


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
    """A line of JSON, or what another reader made of a record, as a dict. A list of messages is a chat."""
    if isinstance(record, bytes):
        try:
            record = DECODER.decode(record.decode())
        except (ValueError, RecursionError) as error:  # of the JSON or of its UTF-8
            raise BadRecord(f"broken JSON: {error}") from None
    if isinstance(record, BadRecord):
        raise record
    if isinstance(record, list) and record and all(isinstance(turn, dict) and "role" in turn for turn in record):
        return {"messages": record}
    return expect(record, dict, "a JSON object")


def map_fields(known: Fields, mapping: dict[str, str]) -> Fields:
    """The table of fields with a user's mapping of parts; a mapped question excludes the other question fields."""
    silent = ASKED.keys() - mapping.keys() if ASKED.keys() & mapping.keys() else set()
    return {part: (mapping[part],) if part in mapping else names for part, names in known.items() if part not in silent}


def pick_fields(record: dict, fields: Fields) -> dict[str, str]:
    """Part -> the field of this record that contains it, for the parts that it has."""
    picked = {}
    for part, names in fields.items():
        if not record.keys().isdisjoint(names):
            there = [name for name in names if name in record]
            picked[part] = next((name for name in there if is_filled(record[name])), there[0])
    asked = [part for part in ASKED if part in picked and is_filled(record[picked[part]])]
    used = list(ASKED)  # where all are blank
    if asked:
        used = {"messages": asked[:1], "question": asked}.get(asked[0], ["instruction", "input"])
    return {part: name for part, name in picked.items() if part in used or part not in ASKED}


def format_of(record: dict, fields: Fields) -> str:
    """What the report calls the record format: the fields that are used, and which parts they are."""
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
            raise BadRecord(f'the field "{field}" is not a text but {json.dumps(text, default=str)[:40]}')
        raise BadRecord(f'no text in the field "{field}" (see --text_field); there is {_fields(record)}')
    return text


def _fields(record: dict) -> str:
    names = list(map(str, record))
    return ", ".join(names[:12] + ["…"] * (len(names) > 12))


def each_record(file: str, options: ReadOptions | str, take: Callable[[dict], Any]) -> Iterator[Any]:
    """take(record) for every record of a file or folder; UserError names the file and line of a bad one.

    options: how to read it; a name is the text field.
    """
    for batch in read_batches(find_files([file]), options):
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


def has_bad_label(record: dict, answer: str) -> bool:
    """Whether a field of the record or of its last turn says that the answer is a bad one, as in data for KTO.

    A field that is the answer itself is a class, such as "negative", and no label of it.
    """
    turns = next((record[name] for name in ASKED["messages"] if isinstance(record.get(name), list)), [])
    last = turns[-1] if turns and isinstance(turns[-1], dict) else {}
    for field, value in [*record.items(), *last.items()]:
        field = str(field).lower()
        if field in LABELS or field == "is_rejected":
            label = str(value).strip().lower()
            bad = BAD_LABELS - {answer.strip().lower()} if field in LABELS else {"true", "1"}
            if label in bad:
                return True
    return False


def answer_of(value: Any, reasoning: Any = None) -> Messages:
    """The messages of an answer that is a text, a number, a message, or a list of messages or of parts of a text."""
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        if isinstance(value, dict) or any(turn.keys() & {"role", "from"} for turn in turns):
            return [message for turn in turns for message in messages_of(turn)]
    elif isinstance(value, list) and value:
        raise BadRecord(f"expected an answer that is a text, or messages, found a list of {len(value)}")
    return messages_of({"role": "assistant", "content": or_number(value), "reasoning_content": reasoning})


def split_turns(text: str) -> Messages:
    r"""The turns of a chat that is one string, "Human: …\nAssistant: …"; none where it is not. (BELLE, hh-rlhf)"""
    before, *parts = re.split(r"(?:^|\n)\s*(Human|Assistant)[:：]", text)
    names, contents = parts[::2], parts[1::2]
    if before.strip() or names[:2] != ["Human", "Assistant"]:
        return []
    turns = [{"role": name, "content": content.strip()} for name, content in zip(names, contents)]
    return [message for turn in turns for message in messages_of(turn)]


def prompt_of(record: dict, fields: Fields = PROMPT_FIELDS, changes: Changes = lambda rule: True) -> Chat:
    """All of a record but what answer fields hold. No messages where the record format is not known.

    changes(rule) says whether a rule is switched on, and counts that it changes the record.
    """
    values = _take(record, fields)
    turns = unpack(values["messages"]) if is_filled(values.get("messages")) else None
    turns = turns or values.get("question")
    tools = unpack(values.get("tools")) if is_filled(values.get("tools")) else None
    if isinstance(turns, list):
        messages = [message for turn in turns for message in messages_of(turn)]
        tools = tools or (turns and unpack(turns[0].get("tools")))  # MiniMind keeps them in the system message
    else:
        messages = [*_history_of(values), *_question_of(values, turns, changes)]
    if system := as_text(values.get("system"), "the system text"):
        if not (messages and messages[0]["role"] == "system"):
            messages.insert(0, {"role": "system", "content": system})
        elif messages[0]["content"] != system:
            changes("second_system")
    if messages and messages[-1]["role"] == "user" and (options := _options_of(record)):
        messages[-1]["content"] = _with_options(messages[-1]["content"], options)
    if messages and messages[0]["role"] == "system" and "<tools>" in messages[0]["content"]:
        messages[0]["content"], written = take_tools(messages[0]["content"])
        tools = tools or written
    return Chat(messages, check_json(expect(tools or None, (list, type(None)), "tools that are a list")))


def _options_of(record: dict) -> list[str]:
    """What is to be chosen from, where it is in fields of its own: without it the question has no answer."""
    options = next((record[name] for name in ("options", "choices", "选项") if is_filled(record.get(name))), [])
    if isinstance(options, str):
        lettered = re.split(r"(?<!\w)\(?[A-Ja-j] ?[).:．、]", options) if options.lstrip(" (")[:1] in ("A", "a") else []
        options = (
            unpack(options) if options.lstrip()[:1] in ("[", "{") else [text.strip(" ,;\n") for text in lettered[1:]]
        )
    if isinstance(options, dict):  # {"A": …, "B": …}, or ARC's {"text": […], "label": […]}
        lettered = [options[name] for name in LETTERS if name in options]
        options = options.get("text", lettered)
    if not options and "A" in record:
        options = [record[name] for name in LETTERS if is_filled(record.get(name))]
    texts = [or_number(option) for option in options] if isinstance(options, list) else []
    return texts if 1 < len(texts) <= len(LETTERS) and all(isinstance(text, str) for text in texts) else []


def _with_options(question: str, options: list[str]) -> str:
    """The question and a line for each option, unless it has them."""
    lettered = [rf"\b{letter}\W{{1,4}}{re.escape(option)}" for letter, option in zip(LETTERS, options)]
    named = max(map(len, options)) > 3 and all(option in question for option in options)
    if named or all(re.search(pattern, question) for pattern in lettered):
        return question
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options))])


def _history_of(values: dict) -> Messages:
    messages = []
    history = unpack(values["history"]) if is_filled(values.get("history")) else []
    for exchange in expect(history, list, "a history that is a list"):
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise BadRecord("an entry of the history is not a question and its answer")
        messages += [*messages_of({"role": "user", "content": exchange[0]}), *answer_of(exchange[1])]
    return messages


def _question_of(values: dict, question: Any, changes: Changes) -> Messages:
    """The user's turn, of a question or of Alpaca's instruction and input; none where there is neither."""
    if not isinstance(question, list):
        question = as_text(question if is_filled(question) else "", "the question")
        parts = [as_text(or_number(values.get(part)), f"the {part}") for part in ("instruction", "input")]
        instruction, text = parts
        if instruction.strip() and question.strip() and instruction.strip() not in question:
            if question.strip() not in instruction:
                flag = "--fields question=NAME or instruction=NAME,input=NAME"
                raise BadRecord(f"an instruction and a question: say which one asks, with {flag}")
            question = instruction
        parts = [question if question.strip() else instruction, text]
        if question.strip() and text.strip() in question:  # the question is made of them
            parts[1] = ""
        placeholder = parts[1].strip() and (is_placeholder(parts[1]) or parts[1].strip().lower() in NO_INPUTS)
        if parts[0].strip() and placeholder and changes("empty_input"):
            parts.pop()
        question = "\n".join(filter(None, parts))
    if isinstance(question, str) and (turns := split_turns(question)):
        return turns if turns[-1]["content"] else turns[:-1]  # "Assistant:" at the end asks for the answer
    return messages_of({"role": "user", "content": question}) if is_filled(question) else []


def request_of(record: dict) -> Chat:
    """The prompt of a record for a model to answer: without the answers at its end. BadRecord where no one asks."""
    messages, tools = prompt_of(record)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise BadRecord(f"neither prompt nor messages that ask; there is {_fields(record)}")
    return Chat(messages, tools)


def chat_of(record: dict, fields: Fields = CHAT_FIELDS, changes: Changes = lambda rule: True) -> Chat:
    messages, tools = prompt_of(record, fields, changes)
    values = _take(record, fields)
    if is_filled(values.get("answer")) and not (messages and messages[-1]["role"] == "assistant"):
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
        text = record.keys() == {"text"}  # of a file of running text
        hint = "--speaker NAME for a chat export" if text else f"--fields question=NAME,{answer}=NAME"
        raise BadRecord(f"no chat of a known record format; there is {_fields(record)} (see {hint})")


def pair_of(record: dict, fields: Fields = PAIR_FIELDS) -> Pair:
    prompt, tools = prompt_of(record, fields)
    values = _take(record, fields)
    if "rejected" in values and "chosen" not in values and prompt and prompt[-1]["role"] == "assistant":
        values["chosen"] = [prompt.pop()]  # ms-swift's messages end with the chosen answer
    answers = [values[part] for part in ("chosen", "rejected") if part in values]
    if len(answers) == 2 and not all(map(_says, answers)) and any(map(_says, answers)):
        raise Dropped("no_answer", json.dumps(answers, ensure_ascii=False, default=str)[:80])
    if not answers:
        answers = unpack(values.get("both"))
    if not isinstance(answers, list) or len(answers) != 2:
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


def _says(answer: Any) -> bool:
    return is_filled(answer) and not (isinstance(answer, str) and not answer.strip())


def _whole_chat(prompt: Messages, answer: Any) -> Messages:
    """The prompt may be in the answer already; but a separate system text still belongs in front."""
    answer = (isinstance(answer, str) and not prompt and split_turns(answer)) or answer_of(answer)
    if answer[0]["role"] == "assistant":
        return prompt + answer
    if answer[0]["role"] != "system" and prompt and prompt[0]["role"] == "system":
        return [prompt[0], *answer]
    return answer


def task_of(record: dict, fields: Fields = TASK_FIELDS, changes: Changes = lambda rule: True) -> Task:
    """A question whose answer can be checked. A chat's last answer is left out: it is blank, or given away."""
    messages, tools = prompt_of(record, fields, changes)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise BadRecord(
            f"no question of a known record format; there is {_fields(record)} (see --fields question=NAME)"
        )
    values = _take(record, fields)
    if "answer" in values and not _says(values["answer"]) and values["answer"] is not False:
        raise Dropped("empty_answer", messages[-1]["content"][:80])
    answer = _answer_to_check(values.get("answer"))
    if not answer:
        raise BadRecord(f"no answer to check; there is {_fields(record)} (see --fields answer=NAME)")
    return Task(messages, answer, tools)


def _answer_to_check(value: Any) -> str:
    """The answer alone: a text or number, or the only one of a list; of GSM8K what follows "####". "" for none."""
    if isinstance(value, list):
        if len(value) != 1:
            raise BadRecord(f"{len(value)} answers, where one is to be checked")
        value = value[0]
    if isinstance(value, bool) or is_missing(value) or not isinstance(value, str | int | float):
        return ""
    text = str(value)
    if "####" in text:
        text = text.rpartition("####")[2].replace(",", "")  # 1,200 is 1200
    return text.strip()
