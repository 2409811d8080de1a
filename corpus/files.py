"""Files of the kinds that people have -> a stream of records in batches; memory does not grow with the files."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

from base.cli import UserError, one_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")  # each may be followed by .gz
BATCH_RECORDS, BATCH_BYTES = 256, 2**20  # a batch is full when it reaches either
MAX_RECORD = 2**26  # 64 MiB: a longer line is no record, and would have to be held in memory whole


def suffix_of(path: Path) -> str | None:
    """Which of SUFFIXES the name ends in, a .gz aside."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else None


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files named in `inputs`, and those of a known kind in the folders named there, sorted by name."""
    files = []
    names = f"{', '.join(SUFFIXES)}, or these with .gz"
    for path in map(Path, inputs):
        if path.is_dir():
            inside = [other for other in sorted(path.rglob("*")) if other.is_file() and suffix_of(other)]
            found = [other for other in inside if not other.name.startswith(".")]
            if not found:
                raise UserError(f"{path}: no file in this folder has a name that ends in {names}")
            files += found
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif not (path.is_file() or path.is_fifo()):  # a device has no end
            raise UserError(f"{path}: neither a file nor a folder")
        elif not suffix_of(path):
            raise UserError(f"{path}: cannot tell what it is: the name must end in {names}")
        else:
            files.append(path)
    return files


def read_json_array(file: TextIO) -> Iterator[tuple[int, object]]:
    """Yield (number, element) of one long JSON array, without ever holding the whole array."""
    decoder = json.JSONDecoder()
    separators, goes_on = re.compile(r"[\s,]*"), re.compile(r"\s*[,\]]")
    text = file.read(2**20).lstrip()[1:]
    position = 0
    number = 1
    while True:
        position = separators.match(text, position).end()
        if text.startswith("]", position):
            if any(rest.strip() for rest in chain([text[position + 1 :]], iter(lambda: file.read(2**20), ""))):
                raise ValueError("more follows the end of the JSON array")
            return
        try:
            element, end = decoder.raw_decode(text, position)
            if not goes_on.match(text, end):  # of a number there may be more
                raise ValueError("a comma, or the end of the array, must follow")
        except (ValueError, RecursionError) as error:
            more = file.read(max(2**20, len(text) - position))  # as much again, so that the work stays linear
            if not more or len(text) > MAX_RECORD:
                raise ValueError(f"element {number} of the JSON array: {error}") from None
            text = text[position:] + more
            position = 0
        else:
            yield number, element
            position, number = end, number + 1


def read_text(file: TextIO, text_field: str) -> Iterator[tuple[int, dict]]:
    """Documents out of running text: 4,000 to 16,000 characters each, cut at a blank line or else at a line end."""
    lines, size = [], 0
    number, start = 0, 1
    while line := file.readline(8192):  # a longer line is cut, so that a file without line ends takes no more memory
        lines.append(line)
        size += len(line)
        number += line.endswith("\n")
        if size >= 8192 or (size >= 4096 and line.isspace()):
            yield start, {text_field: "".join(lines)}
            lines, size = [], 0
            start = number + 1
    if lines:
        yield start, {text_field: "".join(lines)}


def read_csv(file: TextIO) -> Iterator[tuple[int, dict]]:
    """Yield (line, row). ValueError for a line without end, and for a quote that is never closed: it would take in the
    rest of the file as one field."""
    end = "\ud800"  # which no file can hold; a last line that is not itself only where a quote is still open

    def lines() -> Iterator[str]:
        while line := file.readline(MAX_RECORD):
            if len(line) == MAX_RECORD:
                raise ValueError(f"a line is longer than {MAX_RECORD >> 20} Mi characters")
            yield line.replace("\0", "")  # Python 3.10 refuses NUL
        yield end

    csv.field_size_limit(MAX_RECORD)
    reader = csv.DictReader(lines())
    if not reader.fieldnames:
        raise ValueError("the first line, where the columns have their names, is blank")
    first = reader.fieldnames[0]
    for row in reader:
        if row[first] == end:
            return
        if any(end in value for value in row.values() if isinstance(value, str)):
            break
        yield reader.line_num, row
    if reader.fieldnames != [end]:
        raise ValueError("a quote is opened and not closed before the end of the file")


def read_records(path: Path, stream: BinaryIO, text_field: str) -> Iterator[tuple[int, bytes | dict]]:
    """Yield (place, record): the number of the line, in a JSON array or parquet file of the record, and a dict.

    A line of JSON comes as bytes, for a worker to parse. In other files bytes that are not UTF-8 become lone
    surrogates, which a worker reports with their place.
    """

    def as_text(
        **kwargs,
    ) -> TextIO:
        return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", **kwargs)

    suffix = suffix_of(path)
    if suffix == ".json" and stream.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from read_json_array(as_text())
    elif suffix in (".jsonl", ".json"):
        number = 0
        while line := stream.readline(MAX_RECORD):
            number += 1
            if len(line) == MAX_RECORD:
                raise ValueError(f"line {number} is longer than {MAX_RECORD >> 20} MiB")
            if not line.isspace():
                yield number, line
    elif suffix == ".csv":
        yield from read_csv(as_text(newline=""))
    elif suffix == ".parquet":
        import pyarrow.parquet  # here, for it takes long to import, and few files need it

        number = 0
        for rows in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=BATCH_RECORDS):
            for row in rows.to_pylist():
                number += 1
                yield number, row
    else:
        yield from read_text(as_text(), text_field)


class RecordBatch(NamedTuple):
    path: Path
    records: list[tuple[int, bytes | dict]]  # with their places
    position: int  # how many bytes of all input files, as they lie on disk, have been read: for the progress bar


def read_batches(files: list[Path], text_field: str) -> Iterator[RecordBatch]:
    """All files as a stream of batches; UserError for a file that cannot be read to its end."""
    before = 0
    for path in files:
        place = 0
        records, size = [], 0
        try:
            with open(path, "rb") as raw:
                gzipped = path.name.lower().endswith(".gz")
                stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**16) if gzipped else raw
                for place, record in read_records(path, stream, text_field):
                    records.append((place, record))
                    size += len(record) if isinstance(record, bytes) else len(str(record))
                    if len(records) == BATCH_RECORDS or size > BATCH_BYTES:
                        yield RecordBatch(path, records, before + raw.tell())
                        records, size = [], 0
        except (EOFError, OSError, ValueError, OverflowError, RecursionError, zlib.error, csv.Error) as error:
            raise UserError(
                f"{path}: broken after record {place} ({one_line(error)}): mend it, or fetch it again"
            ) from None
        before += path.stat().st_size
        yield RecordBatch(path, records, before)
