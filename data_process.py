"""Raw text -> tokenizer, pretraining, SFT and DPO data; one subcommand each.

    python data_process.py pretrain corpus/ more.jsonl.gz      # cleans and tokenizes -> dataset/pretrain
    python data_process.py sft chats.jsonl                     # -> dataset/sft
    python data_process.py dpo pairs.jsonl                     # -> dataset/dpo
    python data_process.py show dataset/sft --index 0          # a sample, with the trained tokens marked
    python data_process.py clean corpus/ --output clean.jsonl
    python data_process.py tokenizer corpus/ --output my_tokenizer --vocab_size 6400
    python data_process.py demo --output demo                  # made-up questions and answers for every stage

This process reads the files as a stream of batches; worker processes parse, clean and tokenize them; this process takes
the results in the order of the input, drops duplicates and writes. So the output does not depend on the number of
workers, and memory does not grow with the corpus, but for the index of duplicates. docs/data_en.md describes the files.
"""

import argparse
import ast
import codecs
import csv
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
import zlib
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from model import chat, demo

FORMAT_VERSION = 1
KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")  # each may be followed by .gz
BATCH_RECORDS, BATCH_BYTES = 256, 2**20  # a batch is full when it reaches either
MAX_RECORD = 2**26  # 64 MiB: a longer line is no record, and would have to be held in memory whole


class UserError(ValueError):
    """Something that the user can mend; the message is one line that says what, where, and what to do."""


class Dropped(Exception):
    """A record that a rule drops; the arguments are the rule's name and the beginning of the text."""


# ---- Reading: files -> records -> batches ---------------------------------------------------------------------------


def kind_of(path):
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in KINDS else None


def find_files(inputs):
    """The files named in `inputs`, and those of a known kind in the folders named there, sorted by name."""
    files, names = [], f"{', '.join(KINDS)}, or these with .gz"
    for path in map(Path, inputs):
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.is_file() and kind_of(p) and not p.name.startswith(".")]
            if not found:
                raise UserError(f"{path}: no file in this folder has a name that ends in {names}")
            files += found
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif not kind_of(path):
            raise UserError(f"{path}: cannot tell what it is: the name must end in {names}")
        else:
            files.append(path)
    return files


def read_json_array(file):
    """Yield (number, element) of one long JSON array, without ever holding the whole array."""
    decoder, separators = json.JSONDecoder(), re.compile(r"[\s,]*")
    text, position, number = file.read(2**20).lstrip()[1:], 0, 1
    while True:
        position = separators.match(text, position).end()
        if text.startswith("]", position):
            return
        try:
            element, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            more = file.read(max(2**20, len(text) - position))  # as much again, so that the work stays linear
            if not more or len(text) > MAX_RECORD:
                raise ValueError(f"element {number} of the JSON array: {error}") from None
            text, position = text[position:] + more, 0
        else:
            yield number, element
            number += 1


def read_text(file, text_field):
    """Documents out of running text: 4,000 to 16,000 characters each, cut at a blank line or else at a line end."""
    lines, size, number, start = [], 0, 0, 1
    while line := file.readline(8192):  # a longer line is cut, so that a file without line ends takes no more memory
        lines.append(line)
        size += len(line)
        number += line.endswith("\n")
        if size >= 8192 or (size >= 4096 and line.isspace()):
            yield start, {text_field: "".join(lines)}
            lines, size, start = [], 0, number + 1
    if lines:
        yield start, {text_field: "".join(lines)}


def read_records(path, stream, text_field):
    """Yield (place, record): the number of the line, in a JSON array or parquet file of the record, and a dict.

    A line of JSON comes as bytes, for a worker to parse.
    """

    def as_text(**kwargs):  # bytes that are not UTF-8 become lone surrogates, which a worker reports with their place
        return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", **kwargs)

    kind = kind_of(path)
    if kind == ".json" and stream.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from read_json_array(as_text())
    elif kind in (".jsonl", ".json"):
        number = 0
        while line := stream.readline(MAX_RECORD):
            number += 1
            if len(line) == MAX_RECORD:
                raise ValueError(f"line {number} is longer than {MAX_RECORD >> 20} MiB")
            if not line.isspace():
                yield number, line
    elif kind == ".csv":
        csv.field_size_limit(MAX_RECORD)
        reader = csv.DictReader(line.replace("\0", "") for line in as_text(newline=""))  # Python 3.10 refuses NUL
        for row in reader:
            yield reader.line_num, row
    elif kind == ".parquet":
        import pyarrow.parquet  # here, for it takes long to import, and few files need it

        number = 0
        for rows in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=BATCH_RECORDS):
            for row in rows.to_pylist():
                number += 1
                yield number, row
    else:
        yield from read_text(as_text(), text_field)


class Batch(NamedTuple):
    path: Path
    records: list  # of (place, record)
    position: int  # how many bytes of all input files, as they lie on disk, have been read: for the progress bar


def read_batches(files, text_field):
    """All files as a stream of batches; UserError for a file that cannot be read to its end."""
    before = 0
    for path in files:
        place, records, size = 0, [], 0
        try:
            with open(path, "rb") as raw:
                gzipped = path.name.lower().endswith(".gz")
                stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**16) if gzipped else raw
                for place, record in read_records(path, stream, text_field):
                    records.append((place, record))
                    size += len(record) if isinstance(record, bytes) else len(str(record))
                    if len(records) == BATCH_RECORDS or size > BATCH_BYTES:
                        yield Batch(path, records, before + raw.tell())
                        records, size = [], 0
        except (EOFError, OSError, ValueError, zlib.error, csv.Error) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: broken after record {place} ({reason}): mend it, or fetch it again") from None
        before += path.stat().st_size
        yield Batch(path, records, before)


# ---- Cleaning: a rule takes a text and returns it, changed or not, or None to drop it -------------------------------

# Control characters but for tab and what str.splitlines cuts at; soft hyphens, invisible marks, byte order marks.
CONTROL = re.compile("[\0-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def nfc(text):
    """Unicode's canonical composition: one way to write é, not two."""
    return unicodedata.normalize("NFC", text)


def control(text):
    """Takes out control characters, soft hyphens, invisible direction marks and byte order marks."""
    return CONTROL.sub("", text)


def whitespace(text):
    r"""Every kind of line end becomes \n; blanks at line ends, ideographic indents and repeated blank lines go."""
    text = "\n".join([line.rstrip().lstrip("\u3000") for line in text.splitlines()])
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip("\n")


def length(text):
    """Drops texts of less than 10 characters."""
    return text if len(text) >= 10 else None


def readable(text):
    """Drops texts of which, blanks aside, more than half is neither letter nor digit nor Han character."""
    return text if len(re.findall(r"[^\w\s]", text)) <= 0.5 * sum(map(len, text.split())) else None


def repetition(text):
    """Drops texts that zlib shrinks to less than a fifth; prose shrinks to about a half."""
    probes = (text[i : i + 8] for i in range(0, len(text), len(text) // 8 + 1))
    if all(text.count(probe) < 4 for probe in probes):  # so nothing is repeated that often: spare the slow way
        return text
    data = text.encode()
    return text if len(zlib.compress(data, 1)) >= 0.2 * len(data) else None


TEXT_RULES = {rule.__name__: rule for rule in (nfc, control, whitespace, length, readable, repetition)}  # in this order
CHAT_RULES = {rule.__name__: rule for rule in (nfc, control)}  # no more, for blanks have a meaning in code
RULES = {
    **dict.fromkeys(("clean", "tokenizer", "pretrain"), (*TEXT_RULES, "exact_duplicate", "near_duplicate")),
    "sft": (*CHAT_RULES, "no_answer", "too_long", "exact_duplicate"),
    "dpo": (*CHAT_RULES, "same_answer", "no_answer", "too_long", "exact_duplicate"),
}

# Near duplicates, by MinHash (Broder 1997) over the set of a text's 5-character windows: two texts with a Jaccard
# similarity of s have a minimum in common with probability s. Five bands of ten minima each are hashed, and texts that
# share a band are taken for duplicates, with probability 1 - (1 - s^10)^5: 0.99 for s = 0.95, 0.88 for 0.9, 0.43 for
# 0.8, 0.03 for 0.6.
WINDOW, BANDS, ROWS = 5, 5, 10


def band_hashes(texts):
    """The bands of each text as BANDS 64-bit hashes, a list a text. Only a text's first 65,536 characters count."""
    import rensa

    codes = [np.frombuffer(text[: 2**16].encode("utf-32-le"), "<u4") for text in texts]
    offsets = np.cumsum([0] + [len(code) for code in codes]).astype(np.uint64)
    padding = np.full(WINDOW - 1, 0x110000, "<u4")  # no character: fills the windows that run over a text's end
    flat = np.concatenate([part for code in codes for part in (code, padding)])
    count = len(flat) - WINDOW + 1
    windows = np.zeros(count, np.uint64)
    for i in range(WINDOW):
        windows = windows * np.uint64(0x9E3779B97F4A7C15) + flat[i : i + count]  # modulo 2**64
    windows = windows[flat[:count] < 0x110000]  # those that begin with a character
    minima = rensa.RMinHash.digest_matrix_from_flat_token_hashes(windows, offsets, BANDS * ROWS, 0).to_rows()
    minima = np.array(minima, "<u4").reshape(len(texts), BANDS, ROWS)
    return [[hash64(bytes([band]) + rows.tobytes()) for band, rows in enumerate(text)] for text in minima]


# ---- Record shapes: a dict -> a text, a chat, or a pair of chats ----------------------------------------------------

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user",  # ShareGPT's names
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


def parse(record):
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except ValueError as error:  # of the JSON or of its UTF-8
            raise ValueError(f"broken JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found: {type(record).__name__}")
    return record


def text_of(record, field):
    text = record.get(field)
    if not isinstance(text, str):
        if field in record:
            raise ValueError(f'the field "{field}" holds no text but {json.dumps(text, default=str)[:40]}')
        raise ValueError(f'no text in the field "{field}" (see --text_field); there is {", ".join(map(str, record))}')
    return text


def each_record(file, text_field, take):
    """take(record) for every record of a file or folder; UserError names the file and line of a bad one."""
    for batch in read_batches(find_files([file]), text_field):
        for place, record in batch.records:
            try:
                value = take(parse(record))
            except ValueError as error:
                raise UserError(f"{batch.path}:{place}: {error}") from None
            yield value


def unpack(value):
    """A list or object that may be kept as a string: of JSON, or, in old CSV files, of Python."""
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except ValueError:
        return ast.literal_eval(value)


def message_of(turn):
    """A message as encode_chat takes it, of {"role", "content"} or ShareGPT's {"from", "value"}."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value")) or ""
    calls, reasoning = unpack(turn.get("tool_calls")) or [], turn.get("reasoning_content") or ""
    if role not in ROLES:
        raise ValueError(f'a message has the role "{role}"; known are {", ".join(ROLES)}')
    if role == "function_call":
        content, calls = "", unpack(content)
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise ValueError("the content of a message is not a text")
    if ROLES[role] == "assistant" and (thought := re.match("<think>(.*?)</think>", content, re.S)):
        reasoning, content = thought[1].strip("\n"), content[thought.end() :].lstrip("\n")  # as DeepSeek-R1 writes it
    calls = [call.get("function", call) for call in ([calls] if isinstance(calls, dict) else calls)]
    if not all(isinstance(call.get("name"), str) and "arguments" in call for call in calls):
        raise ValueError("a tool call has no name or no arguments")
    message = {"role": ROLES[role], "content": content, "reasoning_content": reasoning, "tool_calls": calls}
    return {key: value for key, value in message.items() if value or key == "content"}


def answer_of(value):
    """The messages of an answer that is a text, a message, or a list of messages."""
    if isinstance(value, str):
        value = {"role": "assistant", "content": value}
    return [message_of(turn) for turn in ([value] if isinstance(value, dict) else value)]


def prompt_of(record):
    """(messages, tools) of a record: all but what answer fields hold. No messages where the shape is not known."""
    turns = unpack(record.get("conversations") or record.get("messages")) or record.get("prompt") or record.get("q")
    tools, messages = unpack(record.get("tools")), []
    if isinstance(turns, list):
        messages = [message_of(turn) for turn in turns]
        tools = tools or unpack(turns[0].get("tools"))  # MiniMind keeps them in the system message
    else:
        for question, answer in unpack(record.get("history")) or []:
            messages += [message_of({"role": "user", "content": question}), *answer_of(answer)]
        question = turns or "\n".join(filter(None, (record.get("instruction"), record.get("input"))))
        messages += [message_of({"role": "user", "content": question})] if question else []
    if not isinstance(tools or [], list):
        raise ValueError("the tools are not a list")
    if record.get("system") and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, message_of({"role": "system", "content": record["system"]}))
    return messages, tools


def chat_of(record):
    """(messages, tools) of a chat."""
    messages, tools = prompt_of(record)
    for field in ("output", "a", "completion"):  # of Alpaca, q/a/history and TRL
        messages += answer_of(record.get(field) or [])
    if not messages:
        raise ValueError(f"no chat of a known shape; there is {', '.join(map(str, record))}")
    return messages, tools


def pair_of(record):
    """(chosen messages, rejected messages, how many they share, tools) of a preference pair."""
    prompt, tools = prompt_of(record)
    answers = [record.get("chosen"), record.get("rejected")]
    if answers == [None, None]:
        answers = unpack(record.get("output"))  # LLaMA-Factory's older way: [chosen, rejected]
    if not isinstance(answers, list) or len(answers) != 2 or not all(answers):
        raise ValueError(f"no pair of chosen and rejected; there is {', '.join(map(str, record))}")
    chats = [answer_of(answer) for answer in answers]
    chats = [prompt + chat if chat[0]["role"] == "assistant" else chat for chat in chats]  # the prompt may be in it
    shared = 0
    while shared < min(map(len, chats)) and chats[0][shared] == chats[1][shared]:
        shared += 1
    if not shared:
        raise ValueError("chosen and rejected share no prompt")
    if chats[0] != chats[1] and not all(chat[shared:] and chat[shared]["role"] == "assistant" for chat in chats):
        raise ValueError(f"chosen and rejected differ in message {shared + 1}, which is not an answer in both")
    return *chats, shared, tools


# ---- In the worker processes: records -> documents ------------------------------------------------------------------


class Document(NamedTuple):
    place: int
    key: int  # 64-bit hash of the content
    parts: list  # of (token ids, loss mask) as bytes: one, or chosen and rejected; (text, b"") if there are no tokens
    size: int  # UTF-8 bytes of text
    sample: str  # the text, or for a chat a question; only its beginning leaves the worker, for the report
    bands: list  # hashes, of which near duplicates share one


class Result(NamedTuple):
    batch: Batch  # without its records
    count: int  # of its records
    documents: list
    bad: list  # of (place, reason)
    dropped: list  # of (rule, place, sample)
    changed: Counter  # rule -> how many texts it changed


def hash64(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1  # HashSet needs 0 for itself


def cut(text, size):
    """Pieces of at most `size` characters, cut at a line end where there is one, for no token spans one."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


class Encoder(NamedTuple):
    tokenizer: object
    encode: object  # text -> ids, for much text
    sizes: np.ndarray  # UTF-8 bytes of each id, (V,)
    dtype: np.dtype  # of ids on disk


@cache
def load_encoder(directory):
    """The tokenizer in a folder; UserError where there is none.

    SentencePiece gives the same ids as tokenizers in half the time or less, so it is used if the folder has its file.
    """
    try:
        tokenizer, model_file = chat.load_tokenizer(directory), Path(directory) / "tokenizer.model"
        size, encode = tokenizer.get_vocab_size(), partial(chat.encode, tokenizer)
        if model_file.is_file():
            import sentencepiece

            model = sentencepiece.SentencePieceProcessor(model_proto=model_file.read_bytes())
            encode = model.encode
            if list(map(model.id_to_piece, range(len(model)))) != list(map(tokenizer.id_to_token, range(size))):
                raise ValueError(f"{model_file} and tokenizer.json differ: delete the former, or restore both")
    except (FileNotFoundError, ValueError) as error:
        raise UserError(error) from None
    except RuntimeError as error:
        raise UserError(f"{model_file} is broken: restore or delete it ({error})") from None
    return Encoder(tokenizer, encode, chat.token_bytes(tokenizer), np.dtype("<u2" if size <= 2**16 else "<u4"))


def clean(text, rules, args, changed):
    """The text after all rules; Dropped if one of them drops it."""
    for name, rule in rules.items():
        if name not in args.skip_rules:
            before, text = text, rule(text)
            if text is None:
                raise Dropped(name, before[:80])
            changed[name] += text != before
    return text


def text_document(place, record, args, changed):
    """The document of a record with a text, not tokenized, for the commands clean, tokenizer and pretrain."""
    text = text_of(record, args.text_field)
    text.encode()  # raises UnicodeEncodeError, before the rules meet a lone surrogate
    text = clean(text, TEXT_RULES, args, changed)
    data = content = text.encode()
    if args.command == "clean":
        content = json.dumps({**record, args.text_field: text}, ensure_ascii=False, default=str).encode() + b"\n"
    return Document(place, hash64(data), [(content, b"")], len(data), text, [])


def tokenize(text, encoder):
    """A pretraining document's ids, as bytes."""
    ids = [chat.BOS]
    for piece in cut(text, 2**16):  # encoding takes some 100 bytes a character
        ids += encoder.encode(piece)
    return np.array([*ids, chat.EOS], encoder.dtype).tobytes()


def chat_document(place, record, args, changed):
    """The document of a record with a chat or a pair, for the commands sft and dpo."""
    encoder = load_encoder(args.tokenizer)
    if args.command == "dpo":
        *chats, shared, tools = pair_of(record)
    else:
        messages, tools = chat_of(record)
        chats, shared = [messages], 0
    for message in (message for messages in chats for message in messages):
        for field in {"content", "reasoning_content"} & message.keys():
            message[field] = clean(message[field], CHAT_RULES, args, changed)
    sample = next((message["content"] for message in chats[0] if message["role"] == "user"), "")[:80]
    if len(chats) == 2 and chats[0] == chats[1]:
        raise Dropped("same_answer", sample)
    prompt, parts, size = [], [], 0
    if args.command == "dpo":
        prompt, _ = chat.encode_chat(encoder.tokenizer, chats[0][:shared], tools, add_generation_prompt=True)
    for messages in chats:
        ids, mask = chat.encode_chat(encoder.tokenizer, messages, tools)
        mask[: len(prompt)] = [0] * len(prompt)  # of a pair, only the answers that differ are scored
        if not any(trained and token != chat.IM_END for token, trained in zip(ids, mask, strict=True)):
            raise Dropped("no_answer", sample)
        if args.max_tokens and len(ids) > args.max_tokens:
            raise Dropped("too_long", sample)
        ids = np.array(ids, encoder.dtype)
        parts.append((ids.tobytes(), bytes(mask)))
        size += int(encoder.sizes[ids].sum())
    return Document(place, hash64(b"".join(ids for ids, _ in parts)), parts, size, sample, [])


def work(args, batch):
    """Turn the records of a batch into documents."""
    make = chat_document if args.command in ("sft", "dpo") else text_document
    documents, bad, dropped, changed = [], [], [], Counter()
    for place, record in batch.records:
        try:
            documents.append(make(place, parse(record), args, changed))
        except Dropped as drop:
            rule, sample = drop.args
            dropped.append((rule, place, sample))
        except UnicodeEncodeError as error:  # a lone surrogate: as JSON's \ud800, or from the reader
            bad.append((place, f"character {error.start + 1} is not UTF-8 (GBK, maybe?), or half a surrogate pair"))
        except ValueError as error:
            bad.append((place, str(error)))
        except (AttributeError, IndexError, KeyError, RecursionError, SyntaxError, TypeError) as error:
            bad.append((place, f"of no known shape ({error})"))
    # What follows goes over the whole batch step by step: a fifth faster than text by text, for the processor's caches.
    if args.command == "pretrain":
        encoder = load_encoder(args.tokenizer)
        documents = [d._replace(parts=[(tokenize(d.sample, encoder), b"")]) for d in documents]
    if documents and "near_duplicate" in set(RULES[args.command]) - set(args.skip_rules):
        bands = band_hashes([d.sample for d in documents])
        documents = [d._replace(bands=hashes) for d, hashes in zip(documents, bands, strict=True)]
    documents = [d._replace(sample=d.sample[:80]) for d in documents]
    return Result(batch._replace(records=[]), len(batch.records), documents, bad, dropped, changed)


# ---- Back in this process: results in order -> documents without duplicates, and a report ---------------------------


def in_order(function, tasks, workers):
    """map(function, tasks) on `workers` processes, with few tasks under way at a time, so that memory stays flat."""
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # the method that Windows, macOS and Linux share
    ignore_ctrl_c = (signal.SIGINT, signal.SIG_IGN)  # this process answers it for all
    pool, pending = ProcessPoolExecutor(workers, context, signal.signal, ignore_ctrl_c), deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class HashSet:
    """64-bit hashes in an open-addressing table: 11 to 16 bytes each, where Python's set takes about 75."""

    def __init__(self):
        self.table, self.count = array("Q", [0]) * 1024, 0

    def slot(self, key):
        """Where `key` is, or the empty slot where it belongs."""
        table, size = self.table, len(self.table)
        slot = key * size >> 64
        while table[slot] and table[slot] != key:
            slot = (slot + 1) % size
        return slot

    def __contains__(self, key):
        return self.table[self.slot(key)] == key

    def add(self, key):
        slot = self.slot(key)
        self.count += not self.table[slot]
        self.table[slot] = key
        if self.count > 0.75 * len(self.table):
            old, self.table = self.table, array("Q", [0]) * (len(self.table) * 3 // 2)
            for key in filter(None, old):
                self.table[self.slot(key)] = key


class Report:
    """What became of the records, and the hashes of the documents that were kept."""

    def __init__(self, args):
        self.skipped, self.max_bad_fraction = args.skip_rules, args.max_bad_fraction
        self.records, self.kept, self.bad, self.bad_examples = Counter(), 0, 0, []  # records: by file
        self.rules = {name: {"changed": 0, "dropped": 0, "example": None} for name in RULES[args.command]}
        self.exact, self.near = HashSet(), HashSet()

    def add(self, result):
        """Count what a worker found, and yield the documents that are not like an earlier one."""
        path, dropped = result.batch.path, list(result.dropped)
        self.records[path] += result.count
        self.bad += len(result.bad)
        self.bad_examples += [f"{path}:{place}: {reason}" for place, reason in result.bad]
        del self.bad_examples[5:]
        if self.records.total() >= 1000:
            self.check_bad()
        for document in result.documents:
            if rule := self.duplicate_rule(document):
                dropped.append((rule, document.place, document.sample))
            else:
                self.kept += 1
                yield document
        for rule, place, sample in dropped:
            self.rules[rule]["dropped"] += 1
            self.rules[rule]["example"] = self.rules[rule]["example"] or f"{path}:{place}: {sample}"
        for rule, count in result.changed.items():
            self.rules[rule]["changed"] += count

    def check_bad(self):
        """UserError if too many records are bad."""
        if self.bad > self.max_bad_fraction * self.records.total():
            raise UserError(
                f"{self.bad_examples[0]} (this and more, {self.bad} of {self.records.total()} records, are bad: "
                f"mend them, or allow for them with --max_bad_fraction, now {self.max_bad_fraction})"
            )

    def duplicate_rule(self, document):
        """The rule that drops a document as like an earlier one; or None, and then it is remembered."""
        if "exact_duplicate" not in self.skipped:
            if document.key in self.exact:
                return "exact_duplicate"
            self.exact.add(document.key)
        if any(band in self.near for band in document.bands):
            return "near_duplicate"
        for band in document.bands:
            self.near.add(band)
        return None

    def as_dict(self):
        counts = {"records": self.records.total(), "kept": self.kept, "bad": self.bad}
        return {**counts, "bad_examples": self.bad_examples, "skipped_rules": self.skipped, "rules": self.rules}

    def __str__(self):
        lines = [f"{self.records.total():,} records, {self.kept:,} kept, {self.bad:,} bad", *self.bad_examples]
        lines.append(f"{'rule':16} {'changed':>9} {'dropped':>9}  an example of what was dropped")
        for name, rule in self.rules.items():
            example = json.dumps(rule["example"], ensure_ascii=False) if rule["example"] else ""
            lines.append(f"{name:16} {rule['changed']:9,} {rule['dropped']:9,}  {example}".rstrip())
        index = 8 * (len(self.exact.table) + len(self.near.table))
        lines.append(f"index of duplicates: {index / 1e6:.1f} MB")
        return "\n".join(lines)


def read_documents(args, inputs, report):
    """Yield the documents of all inputs that no rule drops, in order; shows the progress, and fills the report."""
    files, kept, shown = find_files(inputs), report.kept, time.monotonic()
    total = sum(path.stat().st_size for path in files)
    results = in_order(partial(work, args), read_batches(files, args.text_field), args.workers)
    with tqdm(total=total, desc=args.command, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for result in results:
            yield from report.add(result)
            bar.update(result.batch.position - bar.n)
            if bar.disable and time.monotonic() > shown + 10:  # no terminal: a line at times
                print(f"{args.command}: read {result.batch.position >> 20} of {total >> 20} MiB", file=sys.stderr)
                shown = time.monotonic()
    report.check_bad()
    if report.kept == kept:
        print(report, file=sys.stderr)
        raise UserError(f"{', '.join(inputs)}: no document is left; the report above says what became of the records")


# ---- Writing: the commands ------------------------------------------------------------------------------------------


@contextmanager
def replacing(output, make):
    """A new neighbour of `output`, file or folder, that takes its place if the block ends well, else goes away."""
    output = output.absolute()  # so that "." has a name
    new, old = (output.with_name(f".{output.name}.{os.getpid()}.{suffix}") for suffix in ("new", "old"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        make(new)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}): choose another --output") from None
    try:
        yield new
        if output.is_dir():
            output.rename(old)  # for a folder cannot be renamed over another
        new.replace(output)
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def check_replaceable(output):
    """UserError if `output` is there and is anything but an empty folder or prepared data: it may be someone's work."""
    ours = {f"{split}.{kind}" for split in ("train", "val") for kind in ("bin", "idx", "mask")} | {"meta.json"}
    names = {path.name for path in output.iterdir()} if output.is_dir() else {output.name} if output.exists() else set()
    if names and not ("meta.json" in names and names <= ours):
        raise UserError(f"{output} holds something else than prepared data: choose another --output, or move it away")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path, value):
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # lone surrogates, from records that are bad


class Split:
    """One split while it is written: NAME.bin, NAME.idx and, for chats, NAME.mask."""

    def __init__(self, files, dtype):
        self.files, self.dtype = files, dtype
        self.files["idx"].write(bytes(8))  # the first document begins at 0
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0, **({"trained_tokens": 0} if "mask" in files else {})}

    def add(self, document):
        for ids, mask in document.parts:
            self.counts["documents"] += 1
            self.counts["tokens"] += len(ids) // self.dtype.itemsize
            self.files["bin"].write(ids)
            self.files["idx"].write(self.counts["tokens"].to_bytes(8, "little"))
            if "mask" in self.files:
                self.counts["trained_tokens"] += mask.count(1)
                self.files["mask"].write(mask)
        self.counts["bytes"] += document.size


def prepare(args):
    """The commands pretrain, sft and dpo: write the folder that model/dataset.py reads."""
    output, encoder, report = Path(args.output), load_encoder(args.tokenizer), Report(args)
    check_replaceable(output)
    with replacing(output, Path.mkdir) as folder:
        with ExitStack() as stack:
            splits, kinds = {}, ("bin", "idx") if args.command == "pretrain" else ("bin", "idx", "mask")
            for name in ("train", "val"):
                files = {kind: stack.enter_context(open(folder / f"{name}.{kind}", "wb")) for kind in kinds}
                splits[name] = Split(files, encoder.dtype)
            if args.val:  # first, so that what it holds is dropped from the training documents
                for document in read_documents(args, args.val, report):
                    splits["val"].add(document)
            val_fraction = 0 if args.val else args.val_fraction
            for i, document in enumerate(read_documents(args, args.inputs, report)):
                # By the hash; but the first two go to a split each, so that neither stays empty.
                in_val = document.key < val_fraction * 2**64 if i > 1 else i == 1 and val_fraction
                splits["val" if in_val else "train"].add(document)
        meta = {
            "format_version": FORMAT_VERSION,
            "kind": args.command,
            "dtype": encoder.dtype.name,
            "vocab_size": len(encoder.sizes),
            "tokenizer": args.tokenizer,
            "tokenizer_sha256": chat.tokenizer_fingerprint(args.tokenizer),
            "splits": {name: split.counts for name, split in splits.items()},
            "sources": [
                {"path": str(path), "sha256": sha256(path), "bytes": path.stat().st_size, "records": records}
                for path, records in report.records.items()
            ],
            "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
            "report": report.as_dict(),
        }
        write_json(folder / "meta.json", meta)
    print(report)
    for name, counts in meta["splits"].items():
        print(f"{output / name}: " + ", ".join(f"{count:,} {unit}" for unit, count in counts.items()))


def clean_files(args):
    """The command clean: the records again, as JSON lines, with the texts cleaned and without those that rules drop."""
    output, report = Path(args.output), Report(args)
    if kind_of(output) != ".jsonl" or output.is_dir():
        raise UserError(f"{output}: --output must be a file with a name that ends in .jsonl or .jsonl.gz")
    with replacing(output, Path.touch) as new:
        with gzip.open(new, "wb") if output.suffix == ".gz" else open(new, "wb") as file:
            for document in read_documents(args, args.inputs, report):
                file.write(document.parts[0][0])
        if args.report:
            write_json(Path(args.report), report.as_dict())
    print(report)


def sample_texts(documents, max_bytes):
    """The texts of the documents; of more than `max_bytes` UTF-8 bytes, a random sample, the same at each run."""
    sample, size, limit = [], 0, 2**64
    for document in documents:
        if document.key < limit:
            sample.append(document)
            size += document.size
        while size > max_bytes:
            limit //= 2
            sample = [document for document in sample if document.key < limit]
            size = sum(document.size for document in sample)
    return [document.parts[0][0].decode() for document in sample]


def fast_twin(pieces):
    """A `tokenizers.Tokenizer` that gives the same ids as the SentencePiece BPE model with these pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    ordinary = set(pieces[len(chat.SPECIAL_TOKENS) + 256 :])  # the first are the control tokens and the 256 bytes
    merges = [  # in the order in which they were learned, which is that of the pieces they make
        (piece[:i], piece[i:])
        for piece in pieces
        if piece in ordinary
        for i in range(1, len(piece))
        if piece[:i] in ordinary and piece[i:] in ordinary
    ]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=pieces[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in chat.SPECIAL_TOKENS])
    bos = chat.SPECIAL_TOKENS[chat.BOS]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", [(bos, chat.BOS)])
    return tokenizer


def train_tokenizer(args):
    """The command tokenizer: train SentencePiece BPE, and write it with its fast twin and the chat template."""
    import sentencepiece

    output, report, special = Path(args.output), Report(args), chat.SPECIAL_TOKENS
    texts = sample_texts(read_documents(args, args.inputs, report), args.max_mb * 1e6)
    model_file = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for text in texts for line in text.split("\n") for piece in cut(line, 4096)),
            model_writer=model_file,
            model_type="bpe",
            vocab_size=args.vocab_size,
            character_coverage=args.character_coverage,
            byte_fallback=True,  # a character outside the vocabulary becomes its UTF-8 bytes
            normalization_rule_name="identity",  # text comes back as it went in
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indents
            split_digits=True,  # a number is its digits, each a token
            max_sentence_length=2**16,
            unk_id=0,
            unk_piece=special[0],
            bos_id=chat.BOS,
            bos_piece=special[chat.BOS],
            eos_id=chat.EOS,
            eos_piece=special[chat.EOS],
            pad_id=-1,
            control_symbols=list(special[3:]),  # plain text never encodes to them, as it would to user-defined symbols
            num_threads=args.workers,
            minloglevel=2,
        )
    except RuntimeError as error:
        if most := re.search(r"value <= (\d+)", str(error)):
            raise UserError(f"there is text for {most[1]} tokens only: give more, or --vocab_size {most[1]}") from None
        if least := re.search(r"\d+ vs (\d+)", str(error)):
            raise UserError(
                f"the characters of the text take {least[1]} tokens: give --vocab_size above that, or "
                f"--character_coverage below {args.character_coverage}, which leaves more rare ones to bytes"
            ) from None
        raise
    model = sentencepiece.SentencePieceProcessor(model_proto=model_file.getvalue())
    tokenizer = fast_twin([model.id_to_piece(i) for i in range(len(model))])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # with another, transformers 5 rebuilds the pipeline, and wrongly
        "bos_token": special[chat.BOS],
        "eos_token": special[chat.EOS],
        "pad_token": special[chat.EOS],
        "unk_token": special[0],
        "model_max_length": 2048,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    template = Path(__file__).parent / "model/tokenizer/chat_template.jinja"
    files = {
        "tokenizer.model": model_file.getvalue(),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "chat_template.jinja": template.read_bytes(),
    }
    for name, content in files.items():
        with replacing(output / name, Path.touch) as new:
            new.write_bytes(content)
    print(report)
    print(f"{output}: {len(model):,} pieces, from {sum(map(len, texts)):,} characters")
    for path in find_files(args.val):
        records = (record for batch in read_batches([path], args.text_field) for _, record in batch.records)
        texts = [text_of(parse(record), args.text_field) for record in records]
        tokens = sum(len(chat.encode(tokenizer, text)) for text in texts)
        print(f"{path}: {sum(map(len, texts)) / tokens:.3f} characters a token")


def show(args):
    """The command show: print one document, or the two of a pair, with the trained tokens marked."""
    folder = Path(args.folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        directory = args.tokenizer or meta["tokenizer"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: no prepared data there: make it with pretrain, sft or dpo") from None
    tokenizer = load_encoder(directory).tokenizer
    if chat.tokenizer_fingerprint(directory) != meta["tokenizer_sha256"]:
        raise UserError(f"{folder} was not made with the tokenizer in {directory}: name the right one with --tokenizer")
    offsets = np.fromfile(folder / f"{args.split}.idx", "<i8")
    titles = {"pretrain": ["document"], "sft": ["chat"], "dpo": ["chosen", "rejected"]}[meta["kind"]]
    count, dtype = (len(offsets) - 1) // len(titles), np.dtype(meta["dtype"]).newbyteorder("<")
    if not 0 <= args.index < count:
        raise UserError(f"{folder}: {args.split} has {count} documents: --index must be from 0 to {count - 1}")
    before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    for i, title in enumerate(titles, args.index * len(titles)):
        start, end = map(int, offsets[i : i + 2])
        ids = np.fromfile(folder / f"{args.split}.bin", dtype, end - start, offset=start * dtype.itemsize).tolist()
        mask = [0] * len(ids)
        if meta["kind"] != "pretrain":
            mask = np.fromfile(folder / f"{args.split}.mask", np.uint8, end - start, offset=start).tolist()
        print(f"--- {title} {args.index} of {args.split}: {len(ids)} tokens, {sum(mask) or len(ids)} trained")
        for trained, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
            text = tokenizer.decode([token_id for token_id, _ in run], skip_special_tokens=False)
            print(f"{before}{text}{after}" if trained else text, end="")
        print()


def write_demo(args):
    """The command demo: the files of model/demo.py, with the texts of a corpus mixed into the one for pretraining."""
    texts = (text for file in args.corpus for text in each_record(file, "text", lambda record: text_of(record, "text")))
    for name, count in demo.write_demo(Path(args.output), texts, args.seed).items():
        print(f"{Path(args.output) / name}.jsonl: {count:,} records")


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    descriptions = {
        "clean": "clean texts, to JSON lines",
        "tokenizer": "train a tokenizer",
        "pretrain": "clean and tokenize texts, for 1-pretrain.py",
        "sft": "tokenize chats, for 2-sft.py and 3-lora.py",
        "dpo": "tokenize preference pairs, for 4-dpo.py",
    }
    for name, description in descriptions.items():
        command = commands.add_parser(name, help=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add = command.add_argument
        add("inputs", nargs="+", metavar="INPUT", help=f"files, or folders of files: {', '.join(KINDS)}, each also .gz")
        add("--skip_rules", type=lambda names: names.split(","), default=[], help=f"some of {','.join(RULES[name])}")
        add("--text_field", default="text", help="where a record keeps its text")
        add("--max_bad_fraction", type=float, default=0.1, help="stop if more of the records cannot be read")
        add("--workers", type=int, default=cores, help="processes")
        if name in ("pretrain", "sft", "dpo"):
            add("--output", default=f"dataset/{name}", help="folder")
            add("--tokenizer", default="model/tokenizer", help="folder")
            add("--val_fraction", type=float, default=0.01, help="share of the documents for validation")
            add("--val", nargs="+", default=[], metavar="FILE", help="validate on these instead")
        if name in ("sft", "dpo"):
            add("--max_tokens", type=int, default=0, help="drop chats that are longer; 0: keep all")
        if name in ("clean", "tokenizer"):
            add("--output", required=True, help="file" if name == "clean" else "folder")
        if name == "clean":
            add("--report", help="write the report here too, as JSON")
        if name == "tokenizer":
            add("--vocab_size", type=int, default=6400, help="with the 16 control tokens and 256 bytes")
            add("--character_coverage", type=float, default=0.995, help="the characters beyond it are kept as bytes")
            add("--max_mb", type=float, default=100, help="of more text, take a random sample of this size")
            add("--val", nargs="+", default=[], metavar="FILE", help="print the characters a token on these")
    command = commands.add_parser("show", help="print a document with the trained tokens marked")
    command.add_argument("folder", metavar="DIR", help="such as dataset/sft")
    command.add_argument("--index", type=int, required=True, help="which document, or pair, from 0")
    command.add_argument("--split", choices=("train", "val"), default="train")
    command.add_argument("--tokenizer", help="folder; by default the one that the data was made with")
    command = commands.add_parser("demo", help="questions and answers that can be checked, for every stage")
    command.add_argument("--output", required=True, help="folder")
    command.add_argument("--corpus", nargs="+", default=[], metavar="FILE", help="texts for pretraining; else made up")
    command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.command not in ("show", "demo"):
        if unknown := set(args.skip_rules) - set(RULES[args.command]):
            parser.error(f"--skip_rules: no rule is called {unknown.pop()}: it is {', '.join(RULES[args.command])}")
        if args.workers < 1:
            parser.error("--workers must be at least 1")
        if not 0 <= getattr(args, "val_fraction", 0) < 1:
            parser.error("--val_fraction must be at least 0 and below 1")
    return args


def main(arguments=None):
    """Run one command; returns the exit status: 0, 2 for bad input, 1 for a failure, 130 if interrupted."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")  # the worker processes fill the cores
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for terminals that cannot show Chinese, and lone surrogates
    args = parse_arguments(arguments)
    command = {"clean": clean_files, "tokenizer": train_tokenizer, "show": show, "demo": write_demo}.get(
        args.command, prepare
    )
    try:
        command(args)
    except UserError as error:
        print(f"data_process.py: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("data_process.py: a worker process died, maybe for want of memory: try --workers 1", file=sys.stderr)
        return 1
    except BrokenPipeError:  # what reads our words, such as `head`, has enough; we print only when all is written
        return 0
    except OSError as error:
        where = error.filename or args.output
        print(f"data_process.py: {where}: {error.strerror or error}; the output is as it was", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("data_process.py: stopped; the output is as it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    sys.exit(main())
