"""A first look at files: record format, counts, lengths, scripts, duplicates, samples; and how tokens are shown."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base.cli import UserError, printable
from corpus.cleaning import Dropped
from corpus.duplicates import Duplicates, band_hashes
from corpus.errors import BadRecord
from corpus.figures import lines_of
from corpus.files import ReadOptions, RecordBatch, find_files, read_batches
from corpus.kinds import Document, DocumentSettings, load_encoder
from corpus.pipeline import Report, work
from corpus.records import (
    CHAT_FIELDS,
    PAIR_FIELDS,
    TASK_FIELDS,
    Fields,
    chat_of,
    map_fields,
    pair_of,
    parse,
    task_of,
    text_of,
)  # fmt: skip
from model.chat import ChatTokenizer, encode

# Characters per token of model/tokenizer on texts that it was not trained on, from its README.md.
REFERENCE = {"Han": ("Chinese", 1.22), "Latin": ("English", 2.84)}
KEPT = 4096  # characters of a text that are kept to be encoded
GREEN, REVERSED = ("\033[32m", "\033[39m"), ("\033[7m", "\033[27m")
SHOWN, EXAMPLE = 400, 160  # of a sample, its beginning and end as it is trained; of what a rule drops
PROBED = 64  # records of a batch that are tried in every record format


class Reading(NamedTuple):
    """A kind of data that a record may be."""

    what: str
    command: str  # of data_process.py; "exam" is for eval.py
    fields: Fields
    read: Callable[[dict, Fields], object]  # BadRecord where it is not


def _read_exam(record: dict, fields: Fields):
    if not {"question", "a", "b", "answer"} <= {str(name).lower() for name in record}:
        raise BadRecord("no question with options in C-Eval's or CMMLU's columns")


def _read_task(record: dict, fields: Fields):
    """Any question and answer could be a task; the place or the form of this answer says that it can be checked."""
    task_of(record, fields)
    if not {"gt", "answer_only"} & record.keys() and "####" not in str(record.get("answer")):
        raise BadRecord("the answer may be no more than a text")


READINGS = (  # in the order in which they are tried
    Reading("questions with options", "exam", {}, _read_exam),
    Reading("pairs", "dpo", PAIR_FIELDS, pair_of),
    Reading("questions with an answer to check", "rl", TASK_FIELDS, _read_task),
    Reading("chats", "sft", CHAT_FIELDS, chat_of),
    Reading("texts", "pretrain", {"text": ("text",)}, lambda record, fields: text_of(record, fields["text"][0])),
)


class Look(NamedTuple):
    reading: Reading | None  # what most records are; None: nothing that is known
    batches: list[RecordBatch]
    records: int
    fraction: float  # of the input's bytes on disk that was read
    names: list[str]  # of a record's fields


def first_look(
    inputs: list[str | Path], most: int, mapping: dict[str, str], options: ReadOptions | str = "text"
) -> Look:
    """Reads up to `most` records, and finds out what they are, with a mapping of fields where one is given.

    UserError where there is none that can be read.
    """
    files = find_files(inputs)
    batches, count = [], 0
    for batch in read_batches(files, options):
        batches.append(batch._replace(records=batch.records[: most - count]))
        count += len(batches[-1].records)
        if count == most:
            break
    if not count:
        raise UserError(f"{', '.join(map(str, inputs))}: no record in it")
    taken, names, faults = Counter(), [], []
    for path, place, raw in ((batch.path, *record) for batch in batches for record in batch.records[:PROBED]):
        try:
            record = parse(raw)
        except BadRecord as error:
            faults.append(f"{path}:{place}: {error}")
            continue
        names = names or [str(name) for name in record]
        taken[next((i for i, reading in enumerate(READINGS) if _takes(reading, record, mapping)), None)] += 1
    if not taken:
        raise UserError(faults[0])
    [(most_common, _)] = taken.most_common(1)
    total = sum(path.stat().st_size for path in files)
    fraction = min(batches[-1].position / total, 1.0) if total else 1.0
    return Look(None if most_common is None else READINGS[most_common], batches, count, fraction, names)


def _takes(reading: Reading, record: dict, mapping: dict[str, str]) -> bool:
    if mapping.keys() - reading.fields.keys():
        return False
    try:
        reading.read(record, map_fields(reading.fields, mapping))
    except (BadRecord, UnicodeEncodeError):
        return False
    except Dropped:  # it is one, which a rule takes out
        return True
    return True


def examine(look: Look, settings: DocumentSettings) -> tuple[Report, list[Document], dict[str, str]]:
    """What a command with these settings makes of the records: the report, the documents that it keeps, and by rule
    an example of what it changes."""
    report, documents, changed = Report(settings), [], {}
    for batch in look.batches:
        documents += report.without_duplicates(work(settings, batch, KEPT, changed))
    return report, documents, changed


def show_tokens(ids: list[int], mask: Sequence[int] | None, tokenizer: ChatTokenizer, color: bool) -> str:
    """The text of tokens. A control token is ⟦its name⟧, in color reversed; the same letters in a text look otherwise.

    mask: 1 on the tokens that are trained, which are green or in [[…]]; None: all are.
    """
    names = {i: tokenizer.id_to_token(i).strip("<|>") for i in tokenizer.control_ids}
    trained_marks, control_marks = (GREEN, REVERSED) if color else (("[[", "]]"), ("", ""))
    text = ""
    for trained, stretch in groupby(zip(ids, mask or [0] * len(ids)), key=lambda pair: pair[1]):
        part = ""
        for name, run in groupby((token for token, _ in stretch), key=names.get):
            if name is None:
                part += printable(tokenizer.decode(list(run))).replace("⟦", r"\u27e6").replace("⟧", r"\u27e7")
            else:
                part += "".join(f"{control_marks[0]}⟦{name}⟧{control_marks[1]}" for _ in run)
        text += f"{trained_marks[0]}{part}{trained_marks[1]}" if trained else part
    return text


def describe(
    report: Report, documents: list[Document], changed: dict[str, str], tokenizer_dir: str, color: bool = False
) -> list[str]:
    """For the terminal: what would be dropped or changed and why, figures, and three samples.

    changed: rule -> an example of what it changes.
    """
    lines = [f"{report.records.total():,} records: {report.kept:,} would be kept, {report.bad:,} are bad"]
    lines += [f"  {example}" for example in report.bad_examples]
    for name, rule in report.rules.items():
        if rule["dropped"]:
            lines.append(f"  {rule['dropped']:,} dropped by {name}, such as {rule['example'][:EXAMPLE]!r}")
    if documents and (near := count_near_duplicates(documents)):
        lines.append(f"  {near:,} of those kept are near duplicates: --add_rules near_duplicate would drop them")
    for name, example in changed.items():
        lines.append(f"  {report.rules[name]['changed']:,} changed by {name}, such as {example[:EXAMPLE]!r}")
    for name, count in report.formats.most_common():
        lines.append(f"  {count / report.formats.total():.1%} of the records have: {name}")
    lines += lines_of(report.figures.as_dict())
    for script, ratio in characters_per_token(documents, tokenizer_dir).items():
        language, reference = REFERENCE[script]
        lines.append(f"{ratio:.2f} characters per token in {script} texts (reference: {language}, {reference})")
    lines = [printable(line) for line in lines]
    encoder = load_encoder(tokenizer_dir)
    for document in some(documents):
        lines.append(f"--- record {document.place}")
        for ids, mask in document.parts:
            kept = np.frombuffer(ids, encoder.dtype)[: 4 * KEPT].tolist()  # a character is 4 tokens at most
            text = show_tokens(kept, mask or None, encoder.tokenizer, color).rstrip("\n")
            lines.append(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} […] {text[-SHOWN // 2 :]}")
        if document.note:
            lines.append(printable(f"--- answer to check: {json.loads(document.note)['answer']}"))
    return lines


def some(items: list) -> list:
    """The first, the middle and the last."""
    return [items[i] for i in sorted({0, len(items) // 2, len(items) - 1})] if items else []


def count_near_duplicates(documents: list[Document]) -> int:
    """How many of the documents are near duplicates of an earlier one."""
    bands = band_hashes([document.text for document in documents])
    keys = np.arange(1, len(bands) + 1, dtype=np.uint64)  # all different, because equal documents are gone already
    return sum(rule is not None for rule in Duplicates(exact=False).rules(keys, bands))


def characters_per_token(documents: list[Document], tokenizer_dir: str) -> dict[str, float]:
    """Of up to 500 texts, by the script that has most of a text's letters, where there is a reference for it."""
    tokenizer = load_encoder(tokenizer_dir).tokenizer
    characters, tokens = Counter(), Counter()
    for document in documents[:: max(len(documents) // 500, 1)]:
        script = main_script(document.text)
        characters[script] += len(document.text)
        tokens[script] += len(encode(tokenizer, document.text))
    return {script: characters[script] / tokens[script] for script in REFERENCE if tokens[script]}


def main_script(text: str) -> str | None:
    head = text[:500]
    han = sum("\u3400" <= letter <= "\u9fff" for letter in head)
    latin = sum(letter.isascii() and letter.isalpha() for letter in head)
    return None if not han + latin else "Han" if 3 * han >= latin else "Latin"  # a word has several letters
