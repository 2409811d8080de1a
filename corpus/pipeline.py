"""Files -> documents: this process reads batches, workers make documents of them, this process takes out duplicates.

The results come in the order of the input, so the output does not depend on the number of workers; and memory does not
grow with the corpus, but for the index of duplicates.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from base.cli import UserError
from corpus.cleaning import Dropped, is_other_language
from corpus.duplicates import Duplicates, band_hashes
from corpus.errors import BadRecord
from corpus.exams import load_exams
from corpus.figures import Figures, measure
from corpus.files import RecordBatch, find_files, read_batches
from corpus.kinds import KINDS, Document, DocumentSettings
from corpus.records import format_of, parse

tqdm.monitor_interval = 0  # no thread beside the bar, which is moved often enough
SAMPLE = 80  # characters of a text that leave the worker, for the report


class Result(NamedTuple):
    batch: RecordBatch  # without its records
    count: int  # of its records
    documents: list[Document]
    keys: np.ndarray  # of the documents, uint64 (N,)
    bands: np.ndarray  # near duplicates share one; uint64 (N, BANDS), or (N, 0) where they may stay
    figures: np.ndarray  # rows of figures.measure(), (N, ...)
    bad: list[tuple[int, str]]  # place, reason
    dropped: list[tuple[str, int, str]]  # rule, place, sample
    changed: Counter  # rule -> how many texts it changed
    formats: Counter  # record format -> how many have it


def work(
    settings: DocumentSettings, batch: RecordBatch, sample: int = SAMPLE, examples: dict[str, str] | None = None
) -> Result:
    """Makes documents of the records of a batch, in a worker process.

    examples: for each rule that changes a record, receives the first of them.
    """
    kind = KINDS[settings.command]
    exams = load_exams(settings.exclude) if settings.exclude and "exam_question" in settings.rules else None
    languages = settings.languages if "other_language" in settings.rules else ()
    documents, bad, dropped = [], [], []
    changed, formats = Counter(), Counter()
    for place, record in batch.records:
        try:
            record = parse(record)
            document = kind.read(place, record, settings, changed)
            if examples is not None:
                line = f"{batch.path}:{place}: {json.dumps(record, ensure_ascii=False, default=str)}"
                examples.update({rule: line for rule in +changed if rule not in examples})
            if languages and is_other_language(document.text, languages):
                raise Dropped("other_language", document.text[:sample])
            if exams and exams.occur_in(document.text):
                raise Dropped("exam_question", document.text[:sample])
            documents.append(document)
        except Dropped as drop:
            rule, text = drop.args
            dropped.append((rule, place, text))
        except UnicodeEncodeError as error:  # a lone surrogate: as JSON's \ud800, or from the reader
            bad.append((place, f"character {error.start + 1} is not UTF-8 (GBK, maybe?), or half a surrogate pair"))
            continue
        except BadRecord as error:
            bad.append((place, str(error)))
            continue
        except RecursionError:
            bad.append((place, "lists or objects in each other, too deep to be read"))
            continue
        formats[format_of(record, settings.names)] += 1
    # The steps below process the whole batch one after the other: a fifth faster than text by text, because of caches.
    if kind.tokenize:
        documents = kind.tokenize(documents, settings)
    keys = np.array([document.key for document in documents], np.uint64)
    bands = np.zeros((len(documents), 0), np.uint64)
    if documents and "near_duplicate" in settings.rules:
        bands = band_hashes([document.text for document in documents])
    figures = measure(documents, settings.encoder().dtype.itemsize if kind.titles else 0)
    documents = [document._replace(text=document.text[:sample]) for document in documents]
    count = len(batch.records)
    return Result(batch._replace(records=[]), count, documents, keys, bands, figures, bad, dropped, changed, formats)


def _prepare_worker():
    """Ctrl-C is answered by the process that started this one, without which there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_order(function: Callable, tasks: Iterable, workers: int) -> Iterator:
    """map(function, tasks) on `workers` processes, with few tasks under way at a time, so that memory stays flat.

    OSError if one of the processes dies.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # the method that Windows, macOS and Linux share
    pool = ProcessPoolExecutor(workers, context, _prepare_worker)
    pending = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise OSError("a worker process died, maybe because of too little memory: try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Report:
    """Counts of what happened to the records, and figures of the documents that were kept."""

    def __init__(self, settings: DocumentSettings):
        self.settings = settings
        self.records = Counter()  # by file
        self.kept = 0
        self.bad = 0
        self.bad_examples: list[str] = []
        self.rules = {name: {"changed": 0, "dropped": 0, "example": None} for name in KINDS[settings.command].rules}
        self.formats = Counter()
        self.figures = Figures()
        self.duplicates = Duplicates(exact="exact_duplicate" in settings.rules)

    def without_duplicates(self, result: Result) -> Iterator[Document]:
        """Counts what a worker found, and yields the documents that are not duplicates."""
        path = result.batch.path
        dropped = list(result.dropped)
        self.records[path] += result.count
        self.bad += len(result.bad)
        self.bad_examples += [f"{path}:{place}: {reason}" for place, reason in result.bad]
        del self.bad_examples[5:]
        if self.records.total() >= 1000:
            self.check_bad()
        self.formats += result.formats
        rules = self.duplicates.rules(result.keys, result.bands)
        self.figures.add(result.figures[[rule is None for rule in rules]])
        for document, rule in zip(result.documents, rules):
            if rule:
                dropped.append((rule, document.place, document.text))
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
        allowed = self.settings.max_bad_fraction
        if self.bad > allowed * self.records.total():
            raise UserError(
                f"{self.bad_examples[0]} (this and more, {self.bad} of {self.records.total()} records, are bad: "
                f"repair them, or allow for them with --max_bad_fraction, now {allowed})"
            )

    def as_dict(self) -> dict:
        counts = {"records": self.records.total(), "kept": self.kept, "bad": self.bad}
        counts |= {"bad_examples": self.bad_examples, "skipped_rules": self.settings.skip_rules, "rules": self.rules}
        return counts | {"record_formats": self.formats, "figures": self.figures.as_dict()}

    def __str__(self) -> str:
        lines = [f"{self.records.total():,} records, {self.kept:,} kept, {self.bad:,} bad", *self.bad_examples]
        lines.append(f"{'rule':16} {'changed':>9} {'dropped':>9}  an example of what was dropped")
        for name, rule in self.rules.items():
            example = json.dumps(rule["example"], ensure_ascii=False) if rule["example"] else ""
            lines.append(f"{name:16} {rule['changed']:9,} {rule['dropped']:9,}  {example}".rstrip())
        for name, count in self.formats.most_common():
            lines.append(f"{count / self.formats.total():6.1%} of the records: {name}")
        lines.append(f"index of duplicates: {len(self.duplicates) / 1e6:.1f} MB")
        return "\n".join(lines)


def read_documents(inputs: list[str], report: Report) -> Iterator[Document]:
    """Yields the documents of all inputs that no rule drops, in order; shows the progress, and fills the report."""
    settings, kept_before = report.settings, report.kept
    files = find_files(inputs)
    shown = time.monotonic()
    total = sum(path.stat().st_size for path in files)
    results = in_order(partial(work, settings), read_batches(files, settings.options), settings.workers)
    with tqdm(total=total, desc=settings.command, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for result in results:
            yield from report.without_duplicates(result)
            bar.update(result.batch.position - bar.n)
            if bar.disable and time.monotonic() > shown + 10:  # no terminal: a line at times
                print(f"{settings.command}: read {result.batch.position >> 20} of {total >> 20} MiB", file=sys.stderr)
                shown = time.monotonic()
    report.check_bad()
    if report.kept == kept_before:
        print(report, file=sys.stderr)
        raise UserError(f"{', '.join(inputs)}: no document is left; the report above says why")
