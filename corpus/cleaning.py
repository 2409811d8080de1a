"""The cleaning rules: each takes a text and returns it, changed or not, or None to drop it."""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Container

from base.cli import UserError


class Dropped(Exception):
    """A record that a rule drops; the arguments are the rule's name and the beginning of the text."""


# Control characters but for tab and what str.splitlines cuts at; soft hyphens, invisible marks, byte order marks.
CONTROL = re.compile("[\0-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


MARKS = ("Mn", "Mc", "Me", "Cf")  # categories of Unicode: what is written on or between letters


def control(text: str) -> str:
    """Takes out control characters, soft hyphens, invisible direction marks and byte order marks."""
    return CONTROL.sub("", text)


def nfc(text: str) -> str:
    """Unicode's canonical composition: one way to write é, not two. After the rules that take out what separates it."""
    return unicodedata.normalize("NFC", text)


def whitespace(text: str) -> str:
    r"""Every kind of line end becomes \n; blanks at line ends, ideographic indents and repeated blank lines go."""
    text = "\n".join([line.rstrip().lstrip("\u3000") for line in text.splitlines()])
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip("\n")


# Control tags of chat formats and tokenizers: ChatML, Llama 2 and 3, Gemma, Mistral, DeepSeek; OWN: Jiezi's.
# As letters they would be learned in the place of control tokens. <s> and </s> also strike out text in HTML: inside a
# line they stay.
NEWLINES = r"\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029"  # what str.splitlines cuts at
OTHERS = (  # all but their first character, "<" or "["
    r"\|im_start\|>(?:(?:system|user|assistant|tool)\r?\n)?|\|[A-Za-z0-9_]{1,40}\|>|｜[^<>｜\n]{1,40}｜>"
    r"|start_of_turn>(?:(?:user|model)\r?\n)?|end_of_turn>|(?:bos|eos|pad|unk|sep|eod|eop|sop|eo[ahrt])>"
    r"|(?:reserved|extra_id)_\d+>|/?INST\]|</?SYS>>|(?:CLS|SEP|PAD|UNK|g?MASK|EOS|BOS)\]"
    r"|/?(?:TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS)\]|s>(?=\s*\[INST\])"
    rf"|/s>(?=\s*(?:<s>|[{NEWLINES}]|\Z))"
)
# Several turns in one text, whose outer tags are gone: another begins where one ends.
TURNS = re.compile(
    r"<\|im_end\|>\s*<\|im_start\|>|<\|eot_id\|>\s*<\|start_header|<end_of_turn>\s*<start_of_turn>"
    r"|\[/INST\][^[]*\[INST\]|</s>\s*(?:<s>)?\s*\[INST\]|<</SYS>>|<｜User｜>"
)
OWN = r"/?(?:think|tool_call|tool_response|tools)>"
STRUCK = rf"(s>(?!\s*\[INST\])[^<{NEWLINES}]*</s>)"
TAGS = re.compile(rf"\A\s*<s>|[<[](?:{STRUCK}|{OTHERS}|{OWN})")
# Where a text or a turn ends in the middle of a line.
ENDS = re.compile(
    r"<(?:\|(?:endoftext|end_of_text|im_end|eot_id|eod|eos|end|user|assistant|system|User|Assistant)\|"
    r"|｜[^<>｜\n]{1,40}｜|eos|eod|eop|end_of_turn)>(?=[^\S\n]*\S)|<s>\s*(?=\[INST\])"
)
EDGES = re.compile(rf"\A(?:\s*<s>)?(?:\s*[<[](?:{OTHERS}))+\n?|\A\s*<s>|(?:\s*[<[](?:{OTHERS}))+\s*\Z")


def has_tags(text: str) -> bool:
    if "<" not in text and "[" not in text:  # by far the most, and quickly found
        return False
    return any(found[1] is None for found in TAGS.finditer(text))


def has_turns(text: str) -> bool:
    return ("<" in text or "[" in text) and TURNS.search(text) is not None


def tags(text: str) -> str:
    """Takes out control tags that are written as letters; between two texts on one line a blank line is left."""
    if "<" in text:
        text = ENDS.sub("\n\n", text)
    return _without(TAGS, text)


def outer_tags(text: str) -> str:
    """Takes out other formats' control tags at the beginning and the end of a message."""
    return _without(EDGES, text)


def _without(pattern: re.Pattern, text: str) -> str:
    if "<" not in text and "[" not in text:
        return text
    for _ in range(10):  # what is left on both sides may be another tag; no honest text nests them
        before, text = text, pattern.sub(lambda found: found[0] if found.re is TAGS and found[1] else "", text)
        if text == before:
            break
    return text


def line_ends(text: str) -> str:
    r"""Every line end becomes \n, as the chat format has it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def length(text: str) -> str | None:
    """Drops texts of less than 10 characters."""
    return text if len(text) >= 10 else None


RULER = re.compile(r"^[ \t]*\|[-:| ]+\|[ \t]*$", re.MULTILINE)  # of a Markdown table


def readable(text: str) -> str | None:
    """Drops texts of which, blanks aside, more than half is neither letter nor digit nor Han character.

    Vowel signs and joiners, a third of the characters in some scripts, count as letters. Code stays: up to three
    quarters, if less than a fifth is in runs of six and more, of which rulers and ornaments consist. The ruler of a
    Markdown table does not count, and Braille counts as letters.
    """
    size = sum(map(len, text.split()))
    others = re.findall(r"[^\w\s]", text)
    if len(others) <= 0.5 * size:  # nearly always: spare the slow way
        return text
    rest = RULER.sub("", text)
    size = sum(map(len, rest.split()))
    others = re.findall(r"[^\w\s\u2801-\u28ff]", rest)
    count = sum(unicodedata.category(letter) not in MARKS for letter in others)
    in_runs = sum(map(len, re.findall(r"[^\w\s]{6,}", rest)))
    return text if size and (count <= 0.5 * size or (count <= 0.75 * size and in_runs < 0.2 * size)) else None


def repetition(text: str) -> str | None:
    """Drops texts that zlib shrinks to less than a fifth; prose shrinks to about a half."""
    probes = (text[i : i + 8] for i in range(0, len(text), len(text) // 8 + 1))
    if all(text.count(probe) < 4 for probe in probes):  # so nothing is repeated that often: spare the slow way
        return text
    data = text.encode()
    return text if len(zlib.compress(data, 1)) >= 0.2 * len(data) else None


PLACEHOLDERS = {"", "无", "none", "null", "nan", "n/a"}


def is_placeholder(answer: str) -> bool:
    """Whether a text is only a placeholder for a missing answer, which would be learned as one."""
    return answer.strip().strip(" \n.。").lower() in PLACEHOLDERS


def known_languages() -> set[str]:
    """The codes that --languages accepts; "zh" covers both ways to write Chinese. UserError without pycld2."""
    try:
        import pycld2
    except ImportError:
        raise UserError(
            "--languages needs the package pycld2: pip install -r requirements/languages.txt -c constraints.txt"
        ) from None
    return {code.partition("-")[0] for name, code in pycld2.LANGUAGES if name in pycld2.DETECTED_LANGUAGES}


def is_other_language(text: str, languages: tuple[str, ...]) -> bool:
    """Whether CLD2 is sure that most of the text is in none of these languages; a text that it cannot tell is not."""
    import pycld2

    try:
        reliable, _, found = pycld2.detect(text.encode())
    except pycld2.error:  # it refuses control characters, which are here if their rule is skipped
        return False
    language = found[0][1].partition("-")[0]  # zh-Hant is zh
    return reliable and language != "un" and language not in languages


Rules = dict[str, Callable[[str], str | None]]
TEXT_RULES: Rules = {rule.__name__: rule for rule in (control, tags, nfc, whitespace, length, readable, repetition)}
# Of chats no more, because blanks have a meaning in code.
CHAT_RULES: Rules = {"control": control, "line_ends": line_ends, "tags": outer_tags, "nfc": nfc}


def clean(text: str, rules: Rules, active: Container[str], changed: Counter) -> str:
    """The text after those rules that are active, in their order; Dropped if one of them drops it."""
    for name, rule in rules.items():
        if name in active:
            before, text = text, rule(text)
            if text is None:
                raise Dropped(name, before[:80])
            changed[name] += text != before
    return text
