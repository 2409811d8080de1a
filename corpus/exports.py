"""Chat exports of WhatsApp, Telegram and WeChat, of two speakers -> chats in which one of them is the assistant."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from corpus.errors import BadRecord, WrongFile

DATE = r"\d{1,4}[./\-年]\d{1,2}[./\-月]\d{1,4}日?"
TIME = r"(?:[上下中]午|早上|晚上|凌晨)?\s?\d{1,2}:\d{2}(?::\d{2})?(?:\s?[APap]\.?\s?[Mm]\.?)?"
# [31.12.20, 21:15:03] Name: text      12/31/20, 9:15 PM - Name: text
INLINE = re.compile(rf"\[?({DATE}),?\s*{TIME}\]?(?:\s*[-–])?\s+([^:：\n]{{1,64}})[:：]\s?(.*)")
# 2026-01-31 21:15:03 Name             Name, [31.01.2026 21:15]           and the text on the lines below
HEADER = re.compile(
    rf"({DATE})\s+{TIME}\s+(\S[^\n]{{0,63}})|(\S[^\n]{{0,63}}?)(?:,\s*|\s+)[\[(（]?({DATE})\s+{TIME}[\])）]?"
)
STAMP = re.compile(rf"\[?{DATE},?\s*{TIME}\]?")  # of a line that the app wrote
INVISIBLE = dict.fromkeys(map(ord, "\u200e\u200f\u202a\u202b\u202c\u2068\u2069\ufeff")) | {0x202F: " ", 0xA0: " "}
# What stands in the place of a picture or a message that was deleted.
NOT_TEXT = re.compile(
    r"<[^<>]*>|\[[^][]{1,10}\]|null|.{0,30} omitted|.{0,20}message was deleted.?|.{0,20}deleted this message.?"
    r"|.{0,30}撤回了一条消息|(?:missed )?(?:voice|video) call(?:, (?:\d|no answer|tap ).{0,25})?",
    re.IGNORECASE,
)
# What an app adds to a message: that it was edited, and what is sent with it.
NOTES = re.compile(
    r"[ \t]*<(?:this message was edited|media omitted|attached: [^<>\n]*)>"
    r"|^\[(?:文件|链接|语音|视频|图片|位置)\].*$|^.{1,100}\.\w{2,4} \((?:file attached|Datei angehängt|文件附件)\)$",
    re.IGNORECASE | re.MULTILINE,
)
CHAT_SIZE = 600  # characters of a chat, after which the next question begins another: about 500 tokens of Chinese
ADDRESS = re.compile(r"https?://\S+|\S+@\S+\.\S+")
NUMBER = re.compile(r"[+(]?\d(?:[\d\s().\-/:]*\d)?")


class Said(NamedTuple):
    day: str
    name: str
    text: str


def read_text_export(text: str) -> list[Said]:
    """The messages of a text export. WrongFile if it is not one."""
    lines = [line.translate(INVISIBLE).rstrip() for line in text.splitlines()]
    first = [line for line in lines if line][:20]
    inline = sum(INLINE.fullmatch(line) is not None for line in first)
    headers = sum(HEADER.fullmatch(line) is not None for line in first)
    if not inline and not headers:
        raise WrongFile("no chat export that is known: --speaker needs one of WhatsApp, Telegram or WeChat")
    messages: list[Said] = []
    open_message = False  # whether lines belong to the last one
    for line in lines:
        if inline and (found := INLINE.fullmatch(line)):
            messages.append(Said(*found.groups()))
            open_message = True
        elif not inline and (found := HEADER.fullmatch(line)):
            messages.append(Said(found[1] or found[4], found[2] or found[3], ""))
            open_message = True
        elif STAMP.match(line):
            open_message = False
        elif open_message:
            last = messages[-1]
            messages[-1] = last._replace(text=f"{last.text}\n{line}".strip("\n"))
    return [message._replace(name=message.name.strip().rstrip(":：")) for message in messages]


def speakers_of(text: str) -> list[str]:
    """The two speakers of a text that is a chat export; [] for any other text."""
    try:
        names = Counter(message.name for message in read_text_export(text))
    except WrongFile:
        return []
    return list(names) if len(names) == 2 and names.total() > 2 else []


def read_telegram(values: Iterable[tuple[int, object]]) -> list[Said]:
    """The messages of Telegram's result.json."""
    messages = []
    for place, value in values:
        if not isinstance(value, dict):
            raise WrongFile(f"message {place} of the chat export is not an object")
        if value.get("type") == "message":
            parts = value.get("text") if isinstance(value.get("text"), list) else [value.get("text")]
            texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
            text = "".join(text for text in texts if isinstance(text, str))
            messages.append(Said(str(value.get("date"))[:10], str(value.get("from") or value.get("from_id")), text))
    return messages


def read_wechat_table(rows: Iterable[tuple[int, object]]) -> list[Said]:
    """The messages of the CSV that tools such as WeChatMsg write."""
    messages = []
    for place, row in rows:
        if isinstance(row, BadRecord):
            raise WrongFile(f"line {place}: {row}")
        if "StrContent" not in row:
            raise WrongFile("no chat export that is known: a CSV of WeChat has a column StrContent")
        if row.get("Type", "1") == "1":  # text
            name = row.get("NickName") or row.get("Remark") or row.get("Sender", "")
            messages.append(Said(row.get("StrTime", "")[:10], name, row["StrContent"]))
    return messages


def chats_of(messages: list[Said], speaker: str, redact: bool) -> Iterator[dict]:
    """Records {"messages"}: a chat a day, or shorter, that begins with the other one and ends with `speaker`.

    WrongFile if there are not two speakers, or none is called so.
    """
    names = Counter(message.name for message in messages)
    if len(messages) >= 20:  # a line of the app's own may look like a message of someone who says nothing else
        names = Counter({name: count for name, count in names.items() if count > 1})
    listing = ", ".join(name for name, _ in names.most_common(8))
    if speaker not in names:
        raise WrongFile(f"no one in it is called {speaker}; give --speaker one of: {listing}")
    if len(names) != 2:
        raise WrongFile(f"it has {len(names)} speakers ({listing}), and a chat has two")
    chat, day = [], None
    for message in messages:
        text = NOTES.sub("", message.text).strip()
        if message.name not in names or not text or NOT_TEXT.fullmatch(text):
            continue
        text = redacted(text, names) if redact else text
        role = "assistant" if message.name == speaker else "user"
        long = sum(len(turn["content"]) for turn in chat) > CHAT_SIZE and role == "user" and chat[-1]["role"] != role
        if message.day != day or long:
            yield from _finished(chat)
            chat, day = [], message.day
        if chat and chat[-1]["role"] == role:
            chat[-1]["content"] += f"\n{text}"
        elif chat or role == "user":
            chat.append({"role": role, "content": text})
    yield from _finished(chat)


def _finished(chat: list[dict]) -> Iterator[dict]:
    if chat and chat[-1]["role"] == "user":
        chat = chat[:-1]
    if chat:
        yield {"messages": chat}


def redacted(text: str, names: Iterable[str]) -> str:
    """The text without addresses, numbers and the names of the speakers, or parts of them."""
    parts = {part for name in names for part in (name, *name.split()) if len(part) > 1}
    text = ADDRESS.sub("[ADDRESS]", text)
    for part in sorted(parts, key=len, reverse=True):
        pattern = rf"(?<![a-z]){re.escape(part)}(?![a-z])" if part.isascii() else re.escape(part)
        text = re.sub(pattern, "[NAME]", text, flags=re.IGNORECASE)
    return NUMBER.sub("[NUMBER]", text)
