"""What each command of data_process.py makes of a record: one table, so that a new kind of data is a new entry."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base.cli import UserError
from corpus.cleaning import CHAT_RULES, TEXT_RULES, Dropped, clean, has_tags, has_turns, is_placeholder
from corpus.duplicates import hash64
from corpus.errors import BadRecord
from corpus.files import ReadOptions
from corpus.messages import Messages, check_turns, is_trained_record
from corpus.records import (
    CHAT_FIELDS,
    PAIR_FIELDS,
    PROMPT_FIELDS,
    TASK_FIELDS,
    Fields,
    chat_of,
    has_bad_label,
    pair_of,
    task_of,
    text_field_of,
    text_of,
)
from model import chat


class Document(NamedTuple):
    place: int  # of its record in the file
    key: int  # 64-bit hash of the content
    parts: list[tuple[bytes, bytes]]  # token ids and loss mask of each sequence; (text, b"") where there are no tokens
    size: int  # UTF-8 bytes of text
    text: str  # of a chat its questions and answers; only the beginning leaves the worker, for the report
    note: str = ""  # a line of JSON that is kept beside the tokens


@dataclass(frozen=True)
class DocumentSettings:
    """How a command makes documents of files; it is sent to the worker processes."""

    options: ReadOptions
    names: Fields  # that the parts of a record go by
    rules: frozenset[str]  # the active ones
    exclude: tuple[str, ...]  # files of exams
    command: str  # the fields from here on are the flags of the same names
    skip_rules: list[str]
    languages: Sequence[str]
    tokenizer: str  # folder; "" where there are no tokens
    chat_template: str  # a file in place of the folder's; ""
    max_tokens: int  # 0: any number
    max_bad_fraction: float
    workers: int
    date: str = ""  # that a chat template writes; "": today

    def encoder(self) -> "Encoder":
        return load_encoder(self.tokenizer, self.chat_template, self.date)


class Kind(NamedTuple):
    """How a record becomes a document, and what the prepared folder of such documents is like."""

    read: Callable[[int, dict, DocumentSettings, Counter], Document]  # Dropped or BadRecord where it cannot
    rules: tuple[str, ...]  # that may drop or change it, in the report's order
    fields: Fields  # names that the parts of a record go by
    tokenize: Callable[[list[Document], DocumentSettings], list[Document]] | None = None  # of a whole batch
    titles: tuple[str, ...] = ()  # of the sequences that a record becomes, which stay together; none: not prepared
    masked: bool = False  # whether only some tokens are trained
    noted: bool = False  # whether each record has a note
    optional: tuple[str, ...] = ()  # rules that are off unless --add_rules names them


class Encoder(NamedTuple):
    tokenizer: chat.ChatTokenizer
    encode: Callable[[str], list[int]]  # fast, for a lot of text
    sizes: np.ndarray  # UTF-8 bytes of each id, (V,)
    dtype: np.dtype  # of ids on disk


@cache
def load_encoder(directory: str, chat_template: str = "", date: str = "") -> Encoder:
    """The tokenizer in a folder, as load_tokenizer loads it; UserError where there is none.

    SentencePiece gives the same ids as tokenizers in half the time or less, so it is used if the folder has its file.
    """
    tokenizer = chat.load_tokenizer(directory, chat_template, date or None)
    size = tokenizer.get_vocab_size()
    dtype = np.dtype("<u2" if size <= 2**16 else "<u4")
    sizes = chat.token_bytes(tokenizer)
    model_file = Path(directory) / "tokenizer.model"
    if not tokenizer.is_own or not model_file.is_file():
        return Encoder(tokenizer, partial(chat.encode, tokenizer), sizes, dtype)
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=model_file.read_bytes())
    except RuntimeError as error:
        raise UserError(f"{model_file} is broken: restore or delete it ({error})") from None
    pieces = [model.id_to_piece(token_id) for token_id in range(len(model))]
    if pieces != [tokenizer.id_to_token(token_id) for token_id in range(size)]:
        raise UserError(f"{model_file} and tokenizer.json differ: delete the former, or restore both")
    return Encoder(tokenizer, model.encode, sizes, dtype)


def read_text_record(place: int, record: dict, settings: DocumentSettings, changed: Counter) -> Document:
    """The document of a record with a text, not tokenized yet."""
    text = text_of(record, settings.options.text_field)
    text.encode()  # raises UnicodeEncodeError, before the rules meet a lone surrogate
    text = clean(text, TEXT_RULES, settings.rules, changed)
    data = text.encode()
    return Document(place, hash64(data), [(data, b"")], len(data), text)


def read_json_record(place: int, record: dict, settings: DocumentSettings, changed: Counter) -> Document:
    """The same, but the content is the whole record as a line of JSON, with the text cleaned."""
    document = read_text_record(place, record, settings, changed)
    field = text_field_of(record, settings.options.text_field)
    line = json.dumps({**record, field: document.text}, ensure_ascii=False, default=str) + "\n"
    return document._replace(parts=[(line.encode(), b"")])


def tokenize_texts(documents: list[Document], settings: DocumentSettings) -> list[Document]:
    encoder = settings.encoder()
    tokenized = []
    for document in documents:
        ids = []
        for piece in cut(document.text, 2**16):  # encoding takes some 100 bytes a character
            ids += encoder.encode(piece)
        ids = encoder.tokenizer.text(ids)
        tokenized.append(document._replace(parts=[(np.array(ids, encoder.dtype).tobytes(), b"")]))
    return tokenized


def cut(text: str, size: int) -> Iterator[str]:
    """Pieces of at most `size` characters, cut at a line end where possible, because no token spans one."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _changes(settings: DocumentSettings, changed: Counter, rule: str) -> bool:
    """Whether a rule is switched on; counts that it changes a record."""
    if rule not in settings.rules:
        return False
    changed[rule] += 1
    return True


def read_chat_record(place: int, record: dict, settings: DocumentSettings, changed: Counter) -> Document:
    changes = partial(_changes, settings, changed)
    messages, tools = chat_of(record, settings.names, changes)
    messages = check_turns(messages, changes)
    answer = messages[-1]["content"] if messages else ""
    _drop_bad_label(record, answer, settings)
    if not is_trained_record(record):
        raise Dropped("no_answer", answer[:80])
    return _chat_document(place, [messages], 0, tools, settings, changed)


def read_pair_record(place: int, record: dict, settings: DocumentSettings, changed: Counter) -> Document:
    """The document of a preference pair: two chats, of which only the answers that differ are trained."""
    chosen, rejected, shared, tools = pair_of(record, settings.names)
    if not is_trained_record(record):
        raise Dropped("no_answer", chosen[-1]["content"][:80])
    return _chat_document(place, [chosen, rejected], shared, tools, settings, changed)


def _drop_bad_label(record: dict, answer: str, settings: DocumentSettings):
    if "bad_label" in settings.rules and has_bad_label(record, answer):
        raise Dropped("bad_label", answer[:80])


def _chat_document(
    place: int, chats: list[Messages], shared: int, tools: list | None, settings: DocumentSettings, changed: Counter
) -> Document:
    encoder = settings.encoder()
    for messages in chats:
        for message in messages:
            for field in {"content", "reasoning_content"} & message.keys():
                message[field] = clean(message[field], CHAT_RULES, settings.rules, changed)
    questions = [message["content"] for message in chats[0] if message["role"] == "user"]
    answers = [message for messages in chats for message in messages if message["role"] == "assistant"]
    text = "\n".join([*questions, *(message["content"] for message in answers)])
    sample = text[:80]
    asked = chats[0][: shared or None]  # by both of a pair
    turns = any(has_turns(message["content"]) for message in asked if message["role"] != "assistant")
    if "tags" in settings.rules and (turns or any(map(_has_inner_tags, answers))):
        raise Dropped("tags", sample)
    asks = any(message["role"] == "user" and message["content"].strip() for message in asked)
    if not asks and "no_question" in settings.rules:
        raise Dropped("no_question", sample)
    if len(chats) == 2 and _stripped(chats[0]) == _stripped(chats[1]):
        raise Dropped("same_answer", sample)
    # Of the content, not of its tokens: the split into train and val does not change with the tokenizer.
    key = hash64(json.dumps([chats, tools], ensure_ascii=False).encode())
    parts = []
    size, end_of_turn = 0, encoder.tokenizer.end_of_turn
    for ids, mask in _encode_chats(encoder.tokenizer, chats, shared, tools):
        if not any(trained and token != end_of_turn for token, trained in zip(ids, mask, strict=True)):
            raise Dropped("no_answer", sample)
        if settings.max_tokens and len(ids) > settings.max_tokens:
            raise Dropped("too_long", sample)
        tokens = np.array(ids, encoder.dtype)
        parts.append((tokens.tobytes(), bytes(mask)))
        size += int(encoder.sizes[tokens].sum())
    nothing = any(map(_is_blank, answers)) or any(map(_says_nothing, chats[0]))  # "None" may be the rejected one
    if "empty_answer" in settings.rules and nothing:
        raise Dropped("empty_answer", sample)
    return Document(place, key, parts, size, text)


def _encode_chats(
    tokenizer: chat.ChatTokenizer, chats: list[Messages], shared: int, tools: list | None
) -> list[chat.Document]:
    """Ids and mask of each document. Of a pair, which shares so many messages, only what follows them is trained."""
    try:
        if not shared:
            return [document for messages in chats for document in tokenizer.documents(messages, tools)]
        asked = [{**message, "weight": 0} for message in chats[0][:shared]]
        return [tokenizer.documents([*asked, *messages[shared:]], tools)[-1] for messages in chats]
    except chat.TemplateError as error:
        raise BadRecord(str(error)) from None


def read_task_record(place: int, record: dict, settings: DocumentSettings, changed: Counter) -> Document:
    """The document of a question for 5-grpo.py: the prompt, and as its note what an answer is checked against."""
    encoder = settings.encoder()
    messages, answer, tools = task_of(record, settings.names, partial(_changes, settings, changed))
    is_class = type(record.get("label")) in (int, float)  # of data for classification
    _drop_bad_label(record | {"label": None} if is_class else record, answer, settings)
    for message in messages:
        message["content"] = clean(message["content"], CHAT_RULES, settings.rules, changed)
    sample = messages[-1]["content"][:80]
    if not messages[-1]["content"].strip():
        raise Dropped("no_question", sample)
    if "tags" in settings.rules and any(has_turns(message["content"]) for message in messages):
        raise Dropped("tags", sample)
    answer = clean(answer, CHAT_RULES, settings.rules, changed).strip()
    if "empty_answer" in settings.rules and is_placeholder(answer):
        raise Dropped("empty_answer", sample)
    key = hash64(json.dumps([messages, tools, answer], ensure_ascii=False).encode())
    try:
        ids = encoder.tokenizer.prompt(messages, tools)
    except chat.TemplateError as error:
        raise BadRecord(str(error)) from None
    if settings.max_tokens and len(ids) > settings.max_tokens:
        raise Dropped("too_long", sample)
    tokens = np.array(ids, encoder.dtype)
    prompt_fields = sum(PROMPT_FIELDS.values(), ())
    extra = {field: value for field, value in record.items() if field not in prompt_fields}
    fields = {"question": messages[-1]["content"], **extra, "answer": answer}
    note = json.dumps(fields, ensure_ascii=False, default=str)
    note.encode()  # raises UnicodeEncodeError here, and not where it is written
    size = int(encoder.sizes[tokens].sum())
    return Document(place, key, [(tokens.tobytes(), b"")], size, messages[-1]["content"], note)


def _has_inner_tags(message: dict) -> bool:
    """Whether an answer has control tags as letters: turns, thoughts or calls in a form that is not known."""
    return message.get("weight") != 0 and has_tags(message["content"] + message.get("reasoning_content", ""))


def _stripped(messages: Messages) -> Messages:
    return [{**message, "content": message["content"].strip()} for message in messages]


def _is_blank(message: dict) -> bool:
    """Whether an answer is only blanks; one that thinks or calls a tool says something."""
    return not message["content"].strip() and message.keys() == {"role", "content"}


def _says_nothing(message: dict) -> bool:
    """Whether it is a placeholder for an answer; one that thinks or calls a tool is not."""
    return message["role"] == "assistant" and len(message) == 2 and is_placeholder(message["content"])


TEXT_FIELDS: Fields = {"text": ("text", "completion")}  # unless --text_field names another
OF_ALL = ("other_language", "exam_question", "exact_duplicate", "near_duplicate")  # rules for every kind
TEXT_NAMES = (*TEXT_RULES, *OF_ALL)
OF_TURNS = ("empty_input", "second_system", "open_question", "double_answer", "bad_label")
CHAT_NAMES = (*CHAT_RULES, *OF_TURNS, "no_question", "no_answer", "too_long", "empty_answer", *OF_ALL)
PAIR_NAMES = (*CHAT_RULES, "no_question", "same_answer", "no_answer", "too_long", "empty_answer", *OF_ALL)
OF_TASKS = ("empty_input", "second_system", "bad_label", "no_question", "empty_answer", "too_long")
TASK_NAMES = (*CHAT_RULES, *OF_TASKS, *OF_ALL)
IF_ASKED = ("near_duplicate",)  # chats that differ in one number are near duplicates, and may both be worth learning
KINDS = {
    "clean": Kind(read_json_record, TEXT_NAMES, TEXT_FIELDS),
    "tokenizer": Kind(read_text_record, TEXT_NAMES, TEXT_FIELDS),
    "pretrain": Kind(read_text_record, TEXT_NAMES, TEXT_FIELDS, tokenize_texts, titles=("document",)),
    "sft": Kind(read_chat_record, CHAT_NAMES, CHAT_FIELDS, titles=("chat",), masked=True, optional=IF_ASKED),
    "dpo": Kind(
        read_pair_record, PAIR_NAMES, PAIR_FIELDS, titles=("chosen", "rejected"), masked=True, optional=IF_ASKED
    ),
    "rl": Kind(read_task_record, TASK_NAMES, TASK_FIELDS, titles=("prompt",), noted=True, optional=IF_ASKED),
}
