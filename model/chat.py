r"""The chat template: messages to token ids and loss mask; and the tokenizer.

A chat is encoded segment by segment: control tokens are inserted by their ids, and the text between them is encoded as
plain text, so that nothing that a user types becomes a control token. The loss mask is built in the same pass, so that
the answers need not be searched for afterwards. The format is ChatML as in Qwen, after a bos:

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
from tokenizers import Tokenizer

from base.cli import UserError, lacks_memory
from base.files import sha256

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model")
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


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in `directory`, which encodes control tokens in a text as plain text.

    UserError if it is missing or damaged, or was not trained by data_process.py.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: give a folder with a tokenizer, such as model/tokenizer, "
            "or train one with `python data_process.py tokenizer INPUT --output DIR`"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        if lacks_memory(error):
            raise MemoryError(str(error)) from None
        raise UserError(f"{path} cannot be read ({error}): restore it, or train the tokenizer again") from None
    for token_id, token in enumerate(SPECIAL_TOKENS):
        if tokenizer.token_to_id(token) != token_id:
            raise UserError(
                f"{path}: {token} should have the id {token_id}, not {tokenizer.token_to_id(token)}: "
                "train the tokenizer with `python data_process.py tokenizer INPUT --output DIR`"
            )
    if max(tokenizer.get_vocab().values()) >= tokenizer.get_vocab_size():
        raise UserError(f"{path}: its ids do not count from 0: restore it, or train the tokenizer again")
    tokenizer.no_padding()  # the file may enable both
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # not saved in the file, so it must be set at each load
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, without bos or eos, and never a control token."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def translate(ids: list[int], source: Tokenizer, target: Tokenizer) -> list[int]:
    """Converts token ids to another tokenizer's: the same control tokens with the same texts between them."""
    result = []
    for is_text, run in itertools.groupby(ids, lambda token_id: token_id >= len(SPECIAL_TOKENS)):
        tokens = list(run)
        result += encode(target, source.decode(tokens)) if is_text else tokens
    return result


@functools.lru_cache(maxsize=8)
def token_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The UTF-8 bytes of each token: a list of V bytes objects, empty for control tokens.

    Concatenated over an encoded text they are the text; a single piece may be a part of a character.
    """
    pieces = [b""] * tokenizer.get_vocab_size()
    for piece, token_id in tokenizer.get_vocab().items():
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            pieces[token_id] = bytes([int(piece[3:5], 16)])
        elif token_id >= len(SPECIAL_TOKENS):
            pieces[token_id] = piece.replace("\u2581", " ").encode()  # U+2581 stands for a space in the vocabulary
    return pieces


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """The number of UTF-8 bytes of each token, int64 (V,): the denominator of bits per byte."""
    return np.array([len(piece) for piece in token_pieces(tokenizer)])


def tokenizer_fingerprint(directory: str | Path) -> str:
    """SHA-256 of the folder's tokenizer.json, in hexadecimal: equal fingerprints mean equal ids."""
    return sha256(Path(directory) / "tokenizer.json")


def to_json(value: object) -> str:
    """JSON as in the chat template. A string is returned unchanged: tool arguments are often JSON already."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def encode_chat(
    tokenizer: Tokenizer, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Encode a chat; returns (ids, mask), two lists of one length.

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
