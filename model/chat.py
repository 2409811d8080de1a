r"""The tokenizer and the chat format of a model: messages to token ids and loss mask.

Jiezi's own format is written here; open models bring a template (template.py). In Jiezi's
format a chat is encoded segment by segment: control tokens are inserted by their ids, and the text between them is
encoded as plain text, so that nothing that a user types becomes a control token. The loss mask is built in the same
pass, so that the answers need not be searched for afterwards. It is ChatML as in Qwen, after a bos:

    <|im_start|>system\n{content}\n<tools>\n{tool as JSON}\n…</tools><|im_end|>\n
    <|im_start|>user\n{content}<|im_end|>\n
    <|im_start|>assistant\n<think>\n{reasoning}\n</think>\n\n{content}<|im_end|>\n
    <|im_start|>assistant\n{content}\n<tool_call>\n{call as JSON}\n</tool_call><|im_end|>\n
    <|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n

`tokenizer/chat_template.jinja` is the same for transformers; a test checks that they agree.
"""

import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders

from base.cli import UserError, lacks_memory
from base.files import read_json, sha256
from model.template import OTHER_TEMPLATE, Document, Template, TemplateError, control_tokens

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", CONFIG_FILE, TEMPLATE_FILE, "tokenizer.model")
TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")  # of other programs
SPECIAL_TOKENS = (  # a token's id is its index here; byte pieces follow
    "<unk>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<tools>",
    "</tools>",
    "<|reserved_0|>",
    "<|reserved_1|>",
    "<|reserved_2|>",
)
BOS, EOS, IM_START, IM_END = 1, 2, 3, 4
THINK, TOOL_CALL, TOOL_RESPONSE, TOOLS = 5, 7, 9, 11  # the closing token's id is one more


TAGS = {"reasoning": "think", "tool_call": "tool_call", "tool_response": "tool_response"}  # part of an answer: its tag
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")  # of chat models, whose eos_token ends a turn


class ChatTokenizer:
    """A tokenizer and the chat format that belongs to it. load_tokenizer makes it.

    backend: the tokenizer; it encodes control tokens in a text as plain text.
    is_own: whether chats have Jiezi's format; else `template` writes them, if there is one.
    brings_template: False where its folder has none, and Jiezi's takes its place.
    control_ids: the tokens that no text contains.
    bos: the ids before a text; eos: the id after it, or None.
    start_of_turn, end_of_turn: of ChatML's header, and after an answer; or None.
    tags: the ids of the opening and closing tag of "reasoning", "tool_call" and "tool_response", where it has them.
    """

    def __init__(self, backend: Tokenizer, config: dict, template: str | None = None, date: str | None = None):
        """config: of tokenizer_config.json. template, date: see load_tokenizer."""
        self.backend = backend
        self.decode, self.get_vocab, self.get_vocab_size = backend.decode, backend.get_vocab, backend.get_vocab_size
        self.id_to_token, self.token_to_id = backend.id_to_token, backend.token_to_id
        self.is_own = all(backend.token_to_id(token) == i for i, token in enumerate(SPECIAL_TOKENS))
        self.template: Template | None = None
        self.brings_template = True
        if self.is_own:
            self.control_ids = frozenset(range(len(SPECIAL_TOKENS)))
            self.bos, self.eos, self.end_of_turn = [BOS], EOS, IM_END
        else:
            controls = control_tokens(backend)
            self.control_ids = frozenset(controls)
            # Until now only those that are called special would be plain text.
            backend.add_special_tokens([token.content for token in controls.values()])
            self.bos = backend.encode("").ids
            special = _special_tokens(config)
            names = [*END_OF_TEXT, special.get("eos_token")]
            self.eos = next((token for token in map(self._control, names) if token is not None), None)
            source = template or _template_of(config)
            self.brings_template = bool(source)
            if source := source or self._own_template():
                self.template = Template(source, special, backend, date)
            self.end_of_turn = self.template and self.template.end_of_turn
        self.start_of_turn = self._control(SPECIAL_TOKENS[IM_START])
        pairs = {part: (self._control(f"<{tag}>"), self._control(f"</{tag}>")) for part, tag in TAGS.items()}
        self.tags: dict[str, tuple[int, int]] = {part: pair for part, pair in pairs.items() if None not in pair}
        self._opened = {pair[0]: part for part, pair in self.tags.items()}
        self.closing_ids = frozenset(pair[1] for pair in self.tags.values())

    def _control(self, token: str | None) -> int | None:
        token_id = token and self.backend.token_to_id(token)
        return token_id if token_id in self.control_ids else None

    def _own_template(self) -> str | None:
        """Jiezi's, for a tokenizer that has no template but ChatML's tokens."""
        if None in map(self._control, (SPECIAL_TOKENS[IM_START], SPECIAL_TOKENS[IM_END])):
            return None
        source = (Path(__file__).with_name("tokenizer") / TEMPLATE_FILE).read_text("utf-8")
        return source if self.bos else source.replace("{{- bos_token }}\n", "")

    def text_prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued."""
        return [*self.bos, *encode(self, text)]

    def text(self, ids: list[int]) -> list[int]:
        """The ids of a whole document, from those of its text. UserError if the tokenizer has no token to end it."""
        if self.eos is None:
            raise UserError(f"the tokenizer has no token that ends a text: name its eos_token in {CONFIG_FILE}")
        return [*self.bos, *ids, self.eos]

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The UTF-8 bytes of each token: a list of V bytes objects, empty for control tokens.

        Concatenated over an encoded text they are the text; a single piece may be a part of a character.
        """
        pieces = [b""] * self.get_vocab_size()
        added = self.backend.get_added_tokens_decoder()
        bytes_of = _byte_level if isinstance(self.backend.decoder, decoders.ByteLevel) else _sentencepiece
        for piece, token_id in self.get_vocab().items():
            if token_id not in self.control_ids:
                pieces[token_id] = piece.encode() if token_id in added else bytes_of(piece)
        return pieces

    @property
    def problem(self) -> str:
        """Why no chat can be trained or answered, and what to do; "" where they can."""
        if self.is_own or self.template:
            return "" if self.is_own else self.template.problem
        return f"its tokenizer has neither a chat template nor the tokens of Jiezi's; {OTHER_TEMPLATE}"

    def opened_part(self, token_id: int) -> str | None:
        """The part of an answer that a token opens, if it is an opening tag."""
        return self._opened.get(token_id)

    def open_part(self, ids: list[int]) -> str | None:
        """The part in which a prompt ends: some templates write the tag that opens the reasoning."""
        last = next((token_id for token_id in reversed(ids) if token_id in self.control_ids), None)
        return self._opened.get(last)

    def prompt(self, messages: list[dict], tools: list | None = None, think: bool = True) -> list[int]:
        """The ids that a model continues with its answer. think: False tells a template that knows it, as Qwen3's."""
        self._check_format(messages, tools)
        if self.template:
            return self.template.prompt(messages, tools, **({} if think else {"enable_thinking": False}))
        return encode_chat(self, messages, tools, add_generation_prompt=True)[0]

    def documents(self, messages: list[dict], tools: list | None = None) -> list[Document]:
        """Ids and mask to train on: a document for the chat, or several (Template.documents)."""
        self._check_format(messages, tools)
        return self.template.documents(messages, tools) if self.template else [encode_chat(self, messages, tools)]

    def _check_format(self, messages: list[dict], tools: list | None):
        """TemplateError for what chats of this format cannot contain."""
        if self.end_of_turn is None:
            raise TemplateError(self.problem)
        if self.template and tools and not self.template.shows_tools:
            raise TemplateError("the chat template does not list tools")
        if self.template and not self.template.calling and any(each.get("tool_calls") for each in messages):
            raise TemplateError("the chat template does not write calls of tools")

    def tool_responses(self, responses: list[str]) -> list[int]:
        """The ids between a turn that ended with calls and the model's next turn."""
        messages = [{"role": "tool", "content": response} for response in responses]
        if self.template:
            return self.template.tool_responses(messages)
        return [*encode(self, "\n"), *self.prompt(messages)[1:]]

    def check_vocabulary(self, rows: int):
        """UserError if a model with so many embeddings cannot belong to it; open models have spare ones."""
        size = self.get_vocab_size()
        if size != rows if self.is_own else size > rows:
            raise UserError(
                f"the tokenizer has {size} tokens, the model {rows}: "
                "put the tokenizer that the model was trained with into its folder"
            )

    def check_tools(self, where: str | Path = "this model"):
        """UserError if its chats have no calls that could be found in an answer."""
        tokens = (SPECIAL_TOKENS[IM_START], SPECIAL_TOKENS[TOOL_CALL])
        shown = self.template and self.template.shows_tools and all(token in self.template.calling for token in tokens)
        if not self.is_own and (not shown or "tool_call" not in self.tags):
            raise UserError(f"{where} has a chat format without tokens for calls of tools: omit --tools")

    def check_chats(self, where: str | Path):
        """UserError where no chat can be trained or answered."""
        if self.problem:
            raise UserError(f"{where}: {self.problem}")


def _special_tokens(config: dict) -> dict[str, str]:
    """The names that templates know special tokens by."""
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    tokens = {name: config.get(name) for name in names}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _template_of(config: dict) -> str | None:
    """The template in tokenizer_config.json, where older models have it: a text, or a list with names."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}.get("default")
    return found if isinstance(found, str) else None


def _sentencepiece(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()  # U+2581 stands for a space in the vocabulary


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letter for each byte: its own where that can be printed, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level(piece: str) -> bytes:
    table = _byte_of_letter()
    return bytes([table[letter] for letter in piece]) if table.keys() >= set(piece) else piece.encode()


def load_tokenizer(
    directory: str | Path, chat_template: str | Path | None = None, date: str | None = None
) -> ChatTokenizer:
    """The tokenizer in `directory`, with its chat format.

    chat_template: a file that replaces the template of an open model. date: "YYYY-MM-DD", which a template may write;
    without it, today. UserError if the tokenizer is missing or damaged.
    """
    paths = [Path(directory) / name for name in ("tokenizer.json", CONFIG_FILE, TEMPLATE_FILE)]
    if not paths[0].is_file():
        raise UserError(
            f"{paths[0]} is missing: give a folder with a tokenizer, such as model/tokenizer, "
            "or train one with `python data_process.py tokenizer INPUT --output DIR`"
        )
    if chat_template:
        paths[2] = Path(chat_template)
        if not paths[2].is_file():
            raise UserError(f"--chat_template {chat_template} is missing")
    stats = [path.stat() if path.is_file() else None for path in paths]
    stamps = tuple(each and (each.st_mtime_ns, each.st_size) for each in stats)
    tokenizer = _load_tokenizer(*paths, stamps, date)
    if chat_template and tokenizer.is_own:
        raise UserError(f"{directory} has Jiezi's tokenizer, whose chats have Jiezi's format: omit --chat_template")
    return tokenizer


@functools.lru_cache(maxsize=8)
def _load_tokenizer(path: Path, config: Path, template: Path, stamps: tuple, date: str | None) -> ChatTokenizer:
    """stamps: when the files were changed, None where there is none."""
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        if lacks_memory(error):
            raise MemoryError(str(error)) from None
        raise UserError(f"{path} cannot be read ({error}): restore it, or train the tokenizer again") from None
    if max(backend.get_vocab().values()) >= backend.get_vocab_size():
        raise UserError(f"{path}: its ids do not count from 0: restore it, or train the tokenizer again")
    backend.no_padding()  # the file may enable both
    backend.no_truncation()
    backend.encode_special_tokens = True  # not saved in the file, so it must be set at each load
    try:
        source = template.read_text("utf-8") if stamps[2] else None
    except UnicodeDecodeError as error:
        raise UserError(f"{template} is not UTF-8 ({error})") from None
    tokenizer = ChatTokenizer(backend, read_json(config) if stamps[1] else {}, source, date)
    for token_id in tokenizer.control_ids:
        if tokenizer.control_ids.intersection(encode(tokenizer, backend.id_to_token(token_id))):
            raise UserError(f"{path}: a text can contain the control token {backend.id_to_token(token_id)}")
    return tokenizer


def encode(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Token ids of a text, without bos or eos, and never a control token."""
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


def translate(ids: list[int], source: ChatTokenizer, target: ChatTokenizer) -> list[int]:
    """Converts token ids to another tokenizer's: the same control tokens with the same texts between them."""
    result = []
    for is_text, run in itertools.groupby(ids, lambda token_id: token_id >= len(SPECIAL_TOKENS)):
        tokens = list(run)
        result += encode(target, source.decode(tokens)) if is_text else tokens
    return result


def token_bytes(tokenizer: ChatTokenizer) -> np.ndarray:
    """The number of UTF-8 bytes of each token, int64 (V,): the denominator of bits per byte."""
    return np.array([len(piece) for piece in tokenizer.pieces])


def tokenizer_fingerprint(directory: str | Path) -> str:
    """SHA-256 of the folder's tokenizer.json, in hexadecimal: equal fingerprints mean equal ids."""
    return sha256(Path(directory) / "tokenizer.json")


def decode_chat(tokenizer: ChatTokenizer, ids: list[int]) -> tuple[list[dict], list | None]:
    """The messages and tools of a chat in Jiezi's format, from its ids; a last turn that has not ended is left out.

    UserError for another model's format, which cannot be read back.
    """
    if not tokenizer.is_own:
        raise UserError("prompts in the chat format of an open model cannot be given to a model with another one")
    messages, tools, turn = [], None, []
    for is_text, run in itertools.groupby(ids, lambda token_id: token_id >= len(SPECIAL_TOKENS)):
        tokens = list(run)
        turn += [tokenizer.decode(tokens)] if is_text else tokens
        if IM_END in tokens:
            end = turn.index(IM_END)
            new, listed = _decode_turn(turn[turn.index(IM_START) + 1 : end])
            messages, tools, turn = messages + new, listed or tools, turn[end + 1 :]
    return messages, tools


def _decode_turn(turn: list[int | str]) -> tuple[list[dict], list | None]:
    """The messages of a turn, from its texts and the control tokens between them; and the tools that it lists."""
    role, _, content = turn[0].partition("\n")
    inside = {}  # opening control token: the texts up to its closing one
    for tag, text in zip(turn, turn[1:]):
        if tag in (THINK, TOOL_CALL, TOOL_RESPONSE, TOOLS):
            inside.setdefault(tag, []).append(text[1:-1])
        elif tag == THINK + 1:
            content = text[2:]
    if TOOL_RESPONSE in inside:
        return [{"role": "tool", "content": text} for text in inside[TOOL_RESPONSE]], None
    if TOOLS in inside:
        return [{"role": role, "content": content[:-1]}], [json.loads(tool) for tool in inside[TOOLS][0].split("\n")]
    message = {"role": role, "content": content.removesuffix("\n") if TOOL_CALL in inside else content}
    if THINK in inside:
        message["reasoning_content"] = inside[THINK][0]
    if TOOL_CALL in inside:
        message["tool_calls"] = [json.loads(call) for call in inside[TOOL_CALL]]
    return [message], None


def to_json(value: object) -> str:
    """JSON as in the chat template. A string is returned unchanged: tool arguments are often JSON already."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def encode_chat(
    tokenizer: ChatTokenizer, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Encode a chat in Jiezi's format; returns (ids, mask), two lists of one length.

    messages: dicts with "role" (system, user, assistant, tool) and "content" (text or None); an assistant's may have
        "reasoning_content" and "tool_calls"; with "weight" 0 it is not trained. A system message comes first.
    tools: a list of JSON schemas.
    mask: 1 for the assistant's tokens, including its <|im_end|>, and 0 elsewhere.
    add_generation_prompt: end with the assistant's header, for the model to continue.
    UserError for an unknown role.
    """
    ids = [BOS]
    mask = [0]

    def add(*segments: int | str, trained: int = 0):  # a segment is a control token's id, or text
        for segment in segments:
            new = [segment] if isinstance(segment, int) else encode(tokenizer, segment)
            ids.extend(new)
            mask.extend([trained] * len(new))

    if tools and not (messages and messages[0]["role"] == "system"):
        messages = [{"role": "system", "content": ""}, *messages]
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "system" and i == 0 and tools:
            listing = "".join(f"{to_json(tool)}\n" for tool in tools)
            add(IM_START, f"system\n{content}\n" if content else "system\n", TOOLS, f"\n{listing}", TOOLS + 1)
            add(IM_END, "\n")
        elif role in ("system", "user"):
            add(IM_START, f"{role}\n{content}", IM_END, "\n")
        elif role == "assistant":
            learned = int(message.get("weight") != 0)
            add(IM_START, "assistant\n")  # no token spans a newline, so the header can be encoded alone
            if reasoning := message.get("reasoning_content"):
                add(THINK, f"\n{reasoning}\n", THINK + 1, f"\n\n{content}", trained=learned)
            else:
                add(content, trained=learned)
            for n, call in enumerate(message.get("tool_calls") or []):
                call = call.get("function", call)
                name, arguments = to_json([call["name"]])[1:-1], to_json(call["arguments"])
                if n or content:
                    add("\n", trained=learned)
                add(TOOL_CALL, f'\n{{"name": {name}, "arguments": {arguments}}}\n', TOOL_CALL + 1, trained=learned)
            add(IM_END, trained=learned)
            add("\n")
        elif role == "tool":  # consecutive responses share one user turn
            if i == 0 or messages[i - 1]["role"] != "tool":
                add(IM_START, "user")
            add("\n", TOOL_RESPONSE, f"\n{content}\n", TOOL_RESPONSE + 1)
            if i + 1 == len(messages) or messages[i + 1]["role"] != "tool":
                add(IM_END, "\n")
        else:
            raise UserError(f'message {i}: role must be system, user, assistant or tool, not "{role}"')
    if add_generation_prompt:
        add(IM_START, "assistant\n")
    return ids, mask
