"""Files of many kinds -> a stream of records in batches; memory does not grow with the size of the files.

This module alone decides what a file is: compression, signature of another format, text encoding, then structure (JSON
lines, array, {"data": [...]}, CSV, Parquet, running text, document, chat export).
"""

import bz2
import codecs
import csv
import gzip
import importlib.util
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

from base.cli import UserError, one_line, printable
from corpus.documents import DOCUMENTS, REQUIREMENTS, read_document
from corpus.errors import BadRecord, WrongFile
from corpus.exports import chats_of, read_telegram, read_text_export, read_wechat_table

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")  # each may be followed by one of COMPRESSED
COMPRESSED = {".gz": (b"\x1f\x8b", gzip.open), ".bz2": (b"BZh", bz2.BZ2File), ".xz": (b"\xfd7zXZ", lzma.LZMAFile)}
BATCH_RECORDS, BATCH_BYTES = 256, 2**20  # a batch is full when it reaches either
MAX_RECORD = 2**26  # 64 MiB: a longer line is not a record, and would be held in memory whole
HEAD = 2**16  # bytes at the beginning of a file that decide what it is

RENAME = "rename it to end in {}"
SIGNATURES = (  # how the bytes of a format begin, its name, what to do
    (b"version https://git-lfs", "a Git LFS pointer instead of the file", "download the file with: git lfs pull"),
    (b"%PDF-", "a PDF document", RENAME.format(".pdf")),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as .docx, or as text"),
    (b"{\\rtf", "an RTF document", "save it as .docx, or as text"),
    (b"PAR1", "Parquet", RENAME.format(".parquet")),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it with: zstd -d"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"SQLite format 3", "an SQLite database", "export its table as CSV"),
    (b"\x80\x04", "a Python pickle", "export it as JSON lines"),
    (b"<!doctype html", "an HTML page, which a failed download may leave", RENAME.format(".html")),
    (b"<html", "an HTML page, which a failed download may leave", RENAME.format(".html")),
)
ZIPPED = (  # what the first entries of a zip archive are called
    (b"word/", "a Word document", RENAME.format(".docx")),
    (b"application/epub+zip", "an EPUB book", RENAME.format(".epub")),
    (b"xl/", "an Excel workbook", "save its sheet as CSV"),
    (b"", "a zip archive or an Office document", "unpack it, or give it the name of what it is"),
)
BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"))
BOMS += ((codecs.BOM_UTF16_BE, "utf-16"),)


def suffix_of(path: Path) -> str | None:
    """Which of SUFFIXES or DOCUMENTS the name ends in, ignoring the suffix of a compression."""
    name = path.name.lower()
    for compressed in COMPRESSED:
        name = name.removesuffix(compressed)
    suffix = Path(name).suffix
    return suffix if suffix in (*SUFFIXES, *DOCUMENTS) else None


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files named in `inputs`, and the readable ones in the folders named there, sorted by name.

    Files of a folder that are passed over are listed on stderr.
    """
    files, passed_over = [], []
    names = f"{', '.join((*SUFFIXES, *DOCUMENTS))}, or one of these with {', '.join(COMPRESSED)}"
    for path in map(Path, inputs):
        if path.is_dir():
            inside = [other for other in sorted(path.rglob("*")) if other.is_file() and not _is_hidden(other, path)]
            found = _readable(inside)
            passed_over += [other for other in inside if other not in found]
            if not found:
                raise UserError(f"{path}: no file in this folder has a name that ends in {names}")
            files += found
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif not (path.is_file() or path.is_fifo()):  # a device has no end
            raise UserError(f"{path}: neither a file nor a folder")
        elif not suffix_of(path):
            known = "" if path.is_fifo() else _signature_of(path)
            raise UserError(f"{path}: {known or f'cannot tell what it is: the name must end in {names}'}")
        else:
            files.append(path)
    if passed_over:
        _tell_passed_over(passed_over)
    return files


def _signature_of(path: Path) -> str:
    """What the bytes of a file with an unknown name are, such as a zip archive, and what to do; "" for others."""
    try:
        with open(path, "rb") as file:
            check_signature(file.read(HEAD))
    except WrongFile as error:
        return str(error)
    return ""


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _readable(paths: list[Path]) -> dict[Path, None]:
    """Those with a known suffix; documents only with their package; a README only where no data set is beside it."""
    documents = importlib.util.find_spec("markitdown") is not None
    found = [path for path in paths if suffix_of(path) and (documents or suffix_of(path) not in DOCUMENTS)]
    if any(suffix_of(path) in (".jsonl", ".json", ".csv", ".parquet") for path in found):
        found = [path for path in found if not re.match("readme|license", path.name, re.IGNORECASE)]
    return dict.fromkeys(found)


def _tell_passed_over(paths: list[Path]):
    kinds = Counter("".join(path.suffixes[-1:]).lower() or path.name for path in paths)
    words = " ".join(kinds if len(kinds) < 12 else [*kinds][:12] + ["…"])
    needed = kinds.keys() & set(DOCUMENTS)
    hint = f"; for {' '.join(sorted(needed))}: {REQUIREMENTS}" if needed else ""
    count = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    print(printable(f"not read: {count} ({words}), such as {paths[0]}{hint}"), file=sys.stderr)


# ----------------------------------------------------------------------------------------------- what the bytes are


def check_signature(head: bytes):
    """WrongFile if a file that should contain text begins like another format."""
    known = SIGNATURES
    if head.startswith(b"PK\x03\x04"):
        known = [(b"PK", what, advice) for mark, what, advice in ZIPPED if mark in head]
    for mark, what, advice in known:
        if head.removeprefix(codecs.BOM_UTF8).lstrip()[: len(mark)].lower() == mark.lower():
            raise WrongFile(f"it is {what}: {advice}")


def encoding_of(head: bytes) -> str:
    """The text encoding of a file that begins with `head`. WrongFile if it is neither UTF-8, UTF-16 nor UTF-32."""
    for mark, encoding in BOMS:
        if head.startswith(mark):
            return encoding
    even, odd = head[:4:2], head[1:4:2]  # the first two characters of JSON and of tables are ASCII: a byte and a 0
    if odd and not any(odd) and all(even):
        return "utf-16-le"
    if odd and not any(even) and all(odd):
        return "utf-16-be"
    text = head.decode("utf-8", "surrogateescape")
    wrong = sum("\udc80" <= letter <= "\udcff" for letter in text)
    right = sum(letter > "\x7f" for letter in text) - wrong
    if len(re.findall("[\0-\x08\x0e-\x1a\x1c-\x1f]", text)) > len(text) // 10 + 8:
        raise WrongFile("it is not text: its bytes are of a format that is not known here")
    if wrong > right + 8:  # a single wrong byte is for the record in which it is
        guess = " or ".join(name.upper() for name in ("gb18030", "big5", "euc-kr", "shift_jis") if _decodes(head, name))
        seems = f" but {guess}, as it seems" if guess else ""
        raise WrongFile(f"its text is not UTF-8{seems}: save it as UTF-8, or name its encoding with --encoding")
    return "utf-8-sig"


def _decodes(head: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _is_unicode(head: bytes) -> bool:
    """Whether it has a mark of UTF-8, 16 or 32, or 8 and more characters beyond ASCII that all are UTF-8.

    Of such a file no other encoding is true.
    """
    if head.startswith((codecs.BOM_UTF8, *(mark for mark, _ in BOMS))):
        return True
    return _decodes(head, "utf-8") and sum(byte >= 0xC0 for byte in head) >= 8


class _FullReads(io.RawIOBase):
    """A stream whose reads are short only at its end, so that peek() of a BufferedReader sees a whole buffer."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        total = 0
        while total < len(buffer) and (count := self.stream.readinto(memoryview(buffer)[total:])):
            total += count
        return total


# --------------------------------------------------------------------------------------------------------------- JSON

DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN, which pandas writes where a value is missing
# {"version": 1, "data": [{ … : a list of records that an object wraps, with plain values before it.
SCALAR = r'"(?:[^"\\]|\\.)*"|[-+.\w]+|\{[^{}]*\}|\[[^][{}]*\]'
WRAPPED = re.compile(rf'\s*\{{(?:\s*"[^"\\]*"\s*:\s*(?:{SCALAR})\s*,)*\s*"([^"\\]*)"\s*:\s*\[\s*(?=\{{)', re.DOTALL)
TURN = re.compile(r'\s*\[?\s*\{\s*"(?:role|from|content|value)"')
LISTS = {"messages", "conversations", "history", "chosen", "rejected", "prompt", "completion", "tools"}  # of one record


class Structure(NamedTuple):
    """How the JSON values of a file are laid out."""

    lines: bool  # one value a line
    start: int = 0  # else the values begin at this character
    closing: str = ""  # and end with this: "" the file, "]" an array, "]}" an array inside an object


LINES, VALUES = Structure(True), Structure(False)


def structure_of(text: str, complete: bool, suffix: str) -> Structure | None:
    """The structure of a file that begins with `text`; None if that is running text.

    complete: whether `text` is the whole file.
    """
    running = suffix in (".txt", ".md")
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] not in ("[", "{"):
        return None if running else LINES
    array = Structure(False, start + 1, "]")
    value, end = None, len(text)
    try:
        value, end = DECODER.raw_decode(text, start)
    except RecursionError:
        return None if running else LINES
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text) - 8 or error.msg.startswith("Unterminated string")
        if complete or not cut:  # broken, or not JSON at all
            first_line = text[start:].partition("\n")[0].rstrip()
            opened = first_line.endswith(("[", "{", ",")) or suffix == ".json"
            return None if running else array if text[start] == "[" and opened else LINES
    if running and value is not None and not (value and (isinstance(value, dict) or _is_object(value[0]))):
        return None
    one_line = "\n" not in text[start:end]
    rest_of_line = text[end:].partition("\n")[0].strip()
    if one_line and value is not None and not rest_of_line and (text[end:].strip() or not complete):
        return LINES  # the first line is a value, and others follow
    if text[start] == "[":
        if TURN.match(text, start) and (one_line if value is None else all(map(_is_turn, value))):
            return LINES if one_line else VALUES  # a chat, not a list of records
        return array if not text[end:].strip() else VALUES
    wrapped = WRAPPED.match(text)
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        wrapped = None  # a record of its own
    if wrapped and wrapped[1] not in LISTS and not TURN.match(text, wrapped.end()) and not text[end:].strip():
        return Structure(False, wrapped.end(), "]}")
    return LINES if one_line and not rest_of_line.startswith((",", "{")) else VALUES


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and bool(value.keys() & {"role", "from"})


def read_json_values(file: TextIO, structure: Structure) -> Iterator[tuple[int, object]]:
    """Yield (number, value) of values that are not one a line, without ever holding them all."""
    separators, follows = re.compile(r"[\s,]*"), re.compile(r"\s*[,\]]")
    text = file.read(2**20)
    position, number = structure.start, 1
    while True:
        position = separators.match(text, position).end()
        if structure.closing and text.startswith("]", position):
            _check_end(text[position + 1 :], file, structure)
            return
        try:
            value, end = DECODER.raw_decode(text, position)
            if structure.closing and not follows.match(text, end):  # a number may continue
                raise ValueError("a comma, or the end of the array, must follow")
        except (ValueError, RecursionError) as error:
            more = file.read(max(2**20, len(text) - position))  # as much again, so that the work stays linear
            if not more and not structure.closing and not text[position:].strip():
                return
            if not more or len(text) > MAX_RECORD:
                what = "element {} of the JSON array" if structure.closing else "value {} of the JSON file"
                raise ValueError(f"{what.format(number)}: {error}") from None
            text = text[position:] + more
            position = 0
        else:
            yield number, value
            position, number = end, number + 1


def _check_end(rest: str, file: TextIO, structure: Structure):
    """ValueError unless what follows the array ends the file, or the object around the array without another list."""
    rest += file.read(2**20)
    if structure.closing == "]":
        if any(part.strip() for part in (rest, *iter(lambda: file.read(2**20), ""))):
            raise ValueError("more follows the end of the JSON array")
        return
    try:
        others = DECODER.decode('{"": 0' + rest)
    except ValueError:
        raise ValueError("the object around the list of records is broken") from None
    if lists := [name for name, value in others.items() if isinstance(value, list) and any(map(_is_object, value))]:
        raise ValueError(f"the object has more than one list of records ({lists[0]}): write each to its own file")


def _read_lines(file: BinaryIO | TextIO) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) for the lines that are not blank, in UTF-8."""
    number = 0
    while line := file.readline(MAX_RECORD):
        number += 1
        if len(line) == MAX_RECORD:
            raise ValueError(f"line {number} is longer than {MAX_RECORD >> 20} MiB")
        if not line.isspace():
            yield number, line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------------- text and tables

END_TAGS = {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>"}


def read_text(file: TextIO, text_field: str) -> Iterator[tuple[int, dict]]:
    """Documents from running text: 4,000 to 16,000 characters each, cut at a blank line or else at a line end, and at
    a line with nothing but the tag with which other formats end a document."""
    lines, size = [], 0
    number, start = 0, 1
    while line := file.readline(8192):  # a longer line is cut, so that a file without line ends takes no more memory
        lines.append(line)
        size += len(line)
        number += line.endswith("\n")
        if size >= 8192 or (size >= 4096 and line.isspace()) or line.strip() in END_TAGS:
            yield start, {text_field: "".join(lines)}
            lines, size = [], 0
            start = number + 1
    if lines:
        yield start, {text_field: "".join(lines)}


class _CsvLines:
    """The lines of a CSV file, which can be read again after a row that cannot be parsed."""

    def __init__(self, file: TextIO):
        self.file = file
        self.taken: list[str] = []  # by the row that is being read
        self.pending: deque[str] = deque()  # to be read again

    def __iter__(self) -> Iterator[str]:
        while line := self.pending.popleft() if self.pending else self.file.readline(MAX_RECORD):
            if len(line) == MAX_RECORD:
                raise ValueError(f"a line is longer than {MAX_RECORD >> 20} Mi characters")
            self.taken.append(line)
            yield line.replace("\0", "")  # Python 3.10 refuses NUL

    def again(self):
        """All lines of the row but the first will be read again."""
        self.pending.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def read_csv(file: TextIO) -> Iterator[tuple[int, dict | BadRecord]]:
    """Yield (line, row). A row with more or fewer fields than the header, or with a stray quote, is a BadRecord.

    ValueError for a line without end, and for a header that is blank or has a name twice.
    """
    csv.field_size_limit(MAX_RECORD)
    lines = _CsvLines(file)
    rows = csv.reader(lines, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise ValueError(f"the first line, where the columns have their names: {_csv_fault(error)}") from None
    if not any(header) and (lines.taken or header):
        raise ValueError("the first line, where the columns have their names, is blank")
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise ValueError(f'the first line has the column "{twice[0]}" twice')
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), "")):
        raise WrongFile(f"its columns are separated by {other!r}: write it with commas, and quotes around what has one")
    place, before = 1, len(header)  # fields of the row before
    while True:
        place += len(lines.taken)
        lines.taken.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            lines.again()
            rows = csv.reader(lines, strict=True)
            yield place, BadRecord(_csv_fault(error))
            continue
        if not row:
            continue
        continues, before = before < len(header) == before + len(row) - 1, len(row)
        if continues:
            yield place, BadRecord("it continues the row before, which a line end cuts: put quotes around that field")
        elif len(row) != len(header):
            yield (
                place,
                BadRecord(
                    f"{len(row)} fields, and the first line has {len(header)}: put quotes around a field with a comma"
                ),
            )
        elif _swallows(lines.taken, row):
            if row[0].isdigit():
                lines.again()
            yield place, BadRecord("a stray quote takes in the lines that follow as one field, and each may be a row")
        else:
            yield place, dict(zip(header, row))


def _csv_fault(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quote is opened and not closed before the end of the file"
    return f"a stray quote ({one_line(error)}): write a quote inside a field twice, and quotes around the field"


def _swallows(taken: list[str], row: list[str]) -> bool:
    """Whether every line of a row is a row by itself: it begins with a number, as the first does, or looks like one."""
    if len(taken) < 2 or len(row) < 2:
        return False
    number = row[0].isdigit()
    # Prose has a blank after its commas, code is indented, and a poem has as many commas on its first line.
    if not number and any(", " in line or line[0].isspace() for line in taken[1:]):
        return False
    [first] = csv.reader(taken[:1])
    if not number and len(first) + first[-1].count(",") != len(row):
        return False
    own = csv.reader(line for line in taken[1:] if line.strip())
    return all(len(fields) == len(row) and (fields[0].isdigit() or not number) for fields in own)


# ------------------------------------------------------------------------------------------------------------- reading


class ReadOptions(NamedTuple):
    """How files are to be read, beside what they are."""

    text_field: str = "text"  # for running text
    encoding: str = ""  # of text; "": by the bytes
    speaker: str = ""  # of a chat export: who is the assistant
    redact: bool = False  # of a chat export: without names and numbers


def read_records(path: Path, stream: BinaryIO, options: ReadOptions) -> Iterator[tuple[int, bytes | object]]:
    """Yield (place, record): the number of the line or, where records are not lines, of the record; and the record.

    A line of JSON is bytes, which a worker parses; a BadRecord is a record that cannot be read. Elsewhere bytes that
    are not UTF-8 become lone surrogates, which a worker reports with their place.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        if (head := stream.peek(64)) and not head.startswith(b"PAR1"):
            check_signature(head)
        yield from _read_parquet(stream)
        return
    stream = io.BufferedReader(_FullReads(stream), HEAD)
    head = stream.peek(HEAD)
    check_signature(head)
    encoding = options.encoding if options.encoding and not _is_unicode(head) else encoding_of(head)
    wide = encoding.lower().startswith(("utf-16", "utf-32"))  # whose broken bytes cannot become surrogates
    text, complete = head.decode(encoding, "replace" if wide else "surrogateescape"), len(head) < HEAD

    def as_text(**kwargs) -> TextIO:
        return io.TextIOWrapper(stream, encoding, "strict" if wide else "surrogateescape", **kwargs)

    if options.speaker:
        if suffix == ".csv":
            messages = read_wechat_table(read_csv(as_text(newline="")))
        elif wrapped := WRAPPED.match(text):
            messages = read_telegram(read_json_values(as_text(), Structure(False, wrapped.end(), "]}")))
        else:
            messages = read_text_export(as_text().read())
        yield from enumerate(chats_of(messages, options.speaker, options.redact), 1)
    elif suffix == ".csv":
        yield from read_csv(as_text(newline=""))
    elif (structure := structure_of(text, complete, suffix)) is None:
        yield from read_text(as_text(), options.text_field)
    elif not structure.lines:
        yield from read_json_values(as_text(), structure)
    else:
        stream.read(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        yield from _read_lines(stream if encoding == "utf-8-sig" else as_text(newline="\n"))


def _read_parquet(stream: BinaryIO) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet  # here, because it takes long to import, and few files need it

    number = 0
    for rows in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=BATCH_RECORDS):
        for row in rows.to_pylist():
            number += 1
            yield number, row


def open_decompressed(raw: BinaryIO) -> BinaryIO:
    """The stream itself, or what it decompresses to: its first bytes decide, not its name."""
    head = raw.peek(8)
    for mark, decompressor in COMPRESSED.values():
        if head.startswith(mark):
            return io.BufferedReader(decompressor(raw), HEAD)
    return raw


class RecordBatch(NamedTuple):
    path: Path
    records: list[tuple[int, bytes | object]]  # with their places
    position: int  # bytes of all input files, as they are on disk, that have been read: for the progress bar


BROKEN = (EOFError, OSError, ValueError, OverflowError, RecursionError, zlib.error, lzma.LZMAError, csv.Error)


def read_batches(files: list[Path], options: ReadOptions | str) -> Iterator[RecordBatch]:
    """All files as a stream of batches; UserError for a file that cannot be read to its end.

    options: how to read them; a name is the text field.
    """
    options = ReadOptions(options) if isinstance(options, str) else options
    before = 0
    for path in files:
        place = 0
        records, size = [], 0
        try:
            with open(path, "rb") as raw:
                for place, record in _records_of(path, raw, options):
                    records.append((place, record))
                    size += len(record) if isinstance(record, bytes) else len(str(record))
                    if len(records) == BATCH_RECORDS or size > BATCH_BYTES:
                        yield RecordBatch(path, records, before + raw.tell() if raw.seekable() else 0)
                        records, size = [], 0
        except UserError:
            raise
        except WrongFile as error:
            raise UserError(f"{path}: {error}") from None
        except BROKEN as error:
            raise UserError(
                f"{path}: broken after record {place} ({one_line(error)}): repair it, or fetch it again"
            ) from None
        before += path.stat().st_size
        yield RecordBatch(path, records, before)


def _records_of(path: Path, raw: BinaryIO, options: ReadOptions) -> Iterator[tuple[int, bytes | object]]:
    if (suffix := suffix_of(path)) in DOCUMENTS:
        if not (head := raw.peek(64)).startswith(DOCUMENTS[suffix]):
            check_signature(head)
            raise WrongFile(f"it is not a {suffix} document: give it the name of what it is, or download it again")
        yield 1, read_document(path, options.text_field)
    else:
        yield from read_records(path, open_decompressed(raw), options)
