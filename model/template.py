"""The chat format of an open model: the template in its folder, and what of a rendered chat is trained.

An answer is what the template writes from its prompt, rendered as at inference, to the end of its turn. Both are
encoded apart, so that a prompt in training is the prompt at inference, token by token; otherwise the ids are those of
transformers' apply_chat_template. Where a template changes an earlier turn once others follow (Qwen3 leaves out its
thoughts), each answer becomes a document of its own, after the prompt that the model would get.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from base.cli import UserError

MAX_SECONDS = 5  # of a request to the process that renders

# Of the chats that a template is tried with.
ANSWER, TOOL = "jiezi answer", "jiezi_tool"
CHAT = [{"role": "user", "content": "jiezi question"}, {"role": "assistant", "content": ANSWER}]
CALL = {"type": "function", "function": {"name": TOOL, "arguments": {}}}
CALLING = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
SCHEMA = {"name": TOOL, "description": "", "parameters": {"type": "object", "properties": {}}}

OTHER_TEMPLATE = "prepare the data with --chat_template FILE, or put another chat_template.jinja into the folder"
OTHER_MODEL = "take a model with a byte-level tokenizer, as Llama 3, Qwen and SmolLM have"

Document = tuple[list[int], list[int]]  # ids and mask


class TemplateError(UserError):
    """A template cannot render a chat, or its chats cannot be trained."""


class Renderer:
    """A process that renders one template (model/render.py). It ends with this object, or with the program."""

    def __init__(self, source: str, variables: dict[str, str]):
        self.source, self.variables = source, variables
        self.lock = threading.Lock()
        self.owner, self.process = 0, None  # the process that started it: a fork has its parent's pipes

    def render(self, request: dict) -> list[str]:
        """The text of each view. TemplateError with the template's reason, or where it takes too long."""
        with self.lock:
            if self.owner != os.getpid():
                self._start()
            return self._ask(request)["texts"]

    def _start(self):
        command = [sys.executable, "-c", "from model.render import main; main()"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, encoding="ascii", **pipes)
        self.owner = os.getpid()
        weakref.finalize(self, _end, self.process, self.owner)
        self._ask({"source": self.source, "variables": self.variables, "seconds": MAX_SECONDS})

    def _ask(self, request: dict) -> dict:
        self.owner = 0  # if this is interrupted, the next request starts another process
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:  # it has ended itself
            raise TemplateError(f"it takes more than {MAX_SECONDS:g} seconds, or too much memory")
        answer = json.loads(line)
        self.owner = os.getpid() if answer["compiled"] else 0
        if "error" in answer:
            raise TemplateError(" ".join(answer["error"].split())[:200])
        return answer


def _end(process: subprocess.Popen, owner: int):
    if owner == os.getpid():
        process.kill()
        process.communicate()


def control_tokens(backend: Tokenizer) -> dict[int, AddedToken]:
    """The tokens that only a chat format writes: special ones, and tags such as Qwen's <think>. Other added tokens
    stand for text."""
    added = backend.get_added_tokens_decoder().items()
    return {i: token for i, token in added if token.special or re.fullmatch(r"[<\[]\S+[>\]]", token.content)}


class Template:
    """A chat template, with the control tokens of its tokenizer.

    end_of_turn: the token that ends an answer; None where its chats cannot be trained, and `problem` says why.
    """

    def __init__(self, source: str, variables: dict[str, str], backend: Tokenizer, date: str | None = None):
        """date: "YYYY-MM-DD", for templates that write it; without it, today."""
        self.source, self.backend, self.date = source, backend, date
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()
        self.renderer = Renderer(source, variables)
        controls = sorted(control_tokens(backend).items(), key=lambda item: -len(item[1].content))
        self.ids = {token.content: token_id for token_id, token in controls}
        self.first_letters = {content[0] for content in self.ids}
        self.controls = re.compile("|".join(_pattern(token) for _, token in controls) or "(?!)")  # the longest wins
        self.end_of_turn: int | None = None
        self.problem = ""
        self.uses_date = self.shows_tools = False
        self.calling = ""  # how it writes a call of a tool
        if backend.encode("a", add_special_tokens=False).tokens[0][0] in "\u2581\u0120":  # both stand for a space
            self.problem = (
                f"its tokenizer adds a space to each text, so a prompt cannot be encoded apart; {OTHER_MODEL}"
            )
            return
        try:
            self._try_out()
        except TemplateError as error:
            self.problem = f"its chat template cannot be used: {error}; {OTHER_TEMPLATE}"

    def _try_out(self):
        prompt, chat = self._render(CHAT, None, [(1, True), (2, False)])
        end = self.controls.search(chat.rpartition(ANSWER)[2])
        if not chat.startswith(prompt):
            raise TemplateError("it changes the prompt when the answer follows")
        if end is None:
            raise TemplateError(
                "it ends an answer with no token of its own, so that a model would not learn to stop (some models stop "
                "at the token of the next role)"
            )
        self.end_text = end[0].strip()
        self.end_of_turn = self.ids[self.end_text]
        self.uses_date = len({self._render(CHAT, None, [(1, True)], date=f"2001-0{n}-0{n}")[0] for n in (1, 2)}) == 2
        self.shows_tools = bool(self._with_tool(CHAT, [{"type": "function", "function": SCHEMA}]))
        self.calling = self._with_tool(CALLING, None)

    def _with_tool(self, messages: list[dict], tools: list | None) -> str:
        """The rendered chat, or "" where it lacks the tool."""
        try:
            (text,) = self._render(messages, tools, [(2, False)])
        except TemplateError:
            return ""
        return text if TOOL in text else ""

    def _render(self, messages: list, tools: list | None, views: list, date: str | None = None, **options) -> list[str]:
        """For each (n, with_prompt) of views the text of the first n messages, maybe with the prompt of an answer."""
        request = {"messages": messages, "tools": tools, "views": views, "options": options}
        return self.renderer.render(request | {"date": date or self.date})

    def _texts(self, messages: list, tools: list | None, views: list, **options) -> list[str]:
        """As _render, for a user's chat: the reason is a sentence."""
        try:
            return self._render(messages, tools, views, **options)
        except TemplateError as error:
            raise TemplateError(f"the chat template cannot render this chat: {error}") from None

    def prompt(self, messages: list[dict], tools: list | None = None, **options: bool) -> list[int]:
        """The ids that the model continues. options: further variables of the template, such as enable_thinking."""
        messages, tools, mark = self._protect(messages, tools)
        (text,) = self._texts(messages, tools, [(len(messages), True)], **options)
        return self._encode(text, [], mark)[0]

    def documents(self, messages: list[dict], tools: list | None = None) -> list[Document]:
        """The chat as ids and mask: one document, or more where the template changes earlier turns.

        The mask is 1 for an answer and the token that ends its turn. TemplateError where an answer does not begin with
        its prompt, or does not end with that token.
        """
        if self.end_of_turn is None:
            raise TemplateError(self.problem)
        answers = [i for i, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight") != 0]
        messages, tools, mark = self._protect(messages, tools)
        views = dict.fromkeys([(len(messages), False), *((i + n, n == 0) for i in answers for n in (0, 1))])
        texts = dict(zip(views, self._texts(messages, tools, list(views))))
        found, text, spans = [], "", []  # documents; of the last one the text and what of it is trained
        for i in answers:
            before, after = texts[i, True], texts[i + 1, False]
            end = after.rfind(self.end_text) + len(self.end_text)
            if not after.startswith(before) or end <= len(before):
                raise TemplateError(
                    f"the chat template changes the prompt of message {i}, or does not end it with {self.end_text}"
                )
            if text and not before.startswith(text):
                found.append(self._encode(text, spans, mark))
                spans = []
            text = after[:end]
            spans = [*spans, (len(before), end)]
        whole = texts[len(messages), False]
        found.append(self._encode(whole if whole.startswith(text) else text, spans, mark))
        return found

    def tool_responses(self, messages: list[dict]) -> list[int]:
        """The ids between the end of a turn that calls tools and the model's next turn."""
        messages, _, mark = self._protect([*CALLING, *messages], None)
        (text,) = self._texts(messages, None, [(len(messages), True)])
        end = text.index(self.end_text, text.index(TOOL)) + len(self.end_text)
        return self._encode(text[end:], [], mark)[0]

    def _protect(self, messages: list[dict], tools: list | None) -> tuple[list[dict], list | None, str]:
        """The messages and tools as templates expect them, without anything that could become a control token.

        Where a control token could begin, a mark interrupts it: a private character that occurs nowhere else.
        _encode removes it.
        """
        messages = [_as_expected(message) for message in messages]
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools or []] or None
        text = json.dumps([messages, tools], ensure_ascii=False)
        letters = [letter for letter in self.first_letters if letter in text]
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text and f"\\u{code:x}" not in text)

        def protect(value: Any) -> Any:
            if isinstance(value, str):
                for letter in letters:
                    value = value.replace(letter, letter + mark)
                return value
            if isinstance(value, dict):
                return {protect(key): protect(each) for key, each in value.items()}
            return [protect(each) for each in value] if isinstance(value, list) else value

        return (protect(messages), protect(tools), mark) if letters else (messages, tools, mark)

    def _encode(self, text: str, spans: list[tuple[int, int]], mark: str) -> Document:
        """Ids and mask of a rendered text, of which spans of characters are trained."""
        ids, mask = [], []
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for n, (start, end) in enumerate(zip(edges, edges[1:])):
            for part in self._split(text[start:end], mark):
                new = part if isinstance(part, list) else self.backend.encode(part, add_special_tokens=False).ids
                ids += new
                mask += [n % 2] * len(new)
        return ids, mask

    def _split(self, text: str, mark: str) -> list[str | list[int]]:
        """Texts, and the ids of the control tokens between them."""
        parts, start = [], 0
        for found in self.controls.finditer(text):
            parts += [text[start : found.start()], [self.ids[found[0].strip()]]]
            start = found.end()
        parts.append(text[start:])
        escaped = json.dumps(mark)[1:-1]  # as a template that escapes JSON writes it
        return [part.replace(mark, "").replace(escaped, "") if isinstance(part, str) else part for part in parts]


def _pattern(token: AddedToken) -> str:
    """Of a control token in a rendered text, with the blanks that tokenizers take from around it."""
    return r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip


def _as_expected(message: dict) -> dict:
    """With the calls of tools in OpenAI's form, their arguments as objects; without what is only ours."""
    message = {name: value for name, value in message.items() if value and name != "weight"} | {
        "content": message.get("content") or ""
    }
    if calls := message.get("tool_calls"):
        functions = [call.get("function", call) for call in calls]
        functions = [each | {"arguments": _as_object(each["arguments"])} for each in functions]
        message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return message


def _as_object(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
