"""Raw text -> tokenizer, and data for pretraining, SFT, DPO and rewards; one subcommand each.

    python data_process.py list                                # data sets that are known by name
    python data_process.py fetch minimind-sft-mini             # one of them -> data/; from ModelScope with --hub ms
    python data_process.py look data/minimind-sft-mini         # what is in a file, and the next command
    python data_process.py pretrain corpus/ more.jsonl.gz      # cleans and tokenizes -> dataset/pretrain
    python data_process.py sft chats.jsonl                     # -> dataset/sft
    python data_process.py dpo pairs.jsonl                     # -> dataset/dpo
    python data_process.py rl questions.jsonl                  # {"prompt", "answer"} -> dataset/rl
    python data_process.py show dataset/sft --index 0          # a sample, with the trained tokens marked
    python data_process.py check dataset/sft out/sft           # whether all is as it was written, by SHA-256 sums
    python data_process.py clean corpus/ --output clean.jsonl
    python data_process.py tokenizer corpus/ --output my_tokenizer --vocab_size 6400
    python data_process.py demo --output demo                  # made-up questions and answers for every stage

The code is in corpus/: files.py reads, records.py knows record formats, cleaning.py has the rules, kinds.py says what
each command makes of a record, pipeline.py distributes the work over processes, prepared.py writes. docs/data_en.md
describes the files.
"""

import argparse
import codecs
import gzip
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from itertools import groupby
from pathlib import Path

from base.cli import (
    HelpFormatter,
    UserError,
    above_zero,
    available_cores,
    fraction,
    natural,
    next_step,
    not_negative,
    positive,
    printable,
    run,
)
from base.files import sha256, write_file, write_json
from corpus.cleaning import known_languages
from corpus.enough import is_it_enough
from corpus.exams import load_exams
from corpus.exports import speakers_of
from corpus.fetch import HUBS, choose_files, fetch_files, fetch_part, find_entry, open_hub, read_catalogue
from corpus.figures import draw
from corpus.files import SUFFIXES, ReadOptions, find_files, suffix_of
from corpus.hub import model_folder
from corpus.kinds import KINDS, DocumentSettings
from corpus.look import READINGS, SHOWN, describe, examine, first_look, show_tokens, some
from corpus.pipeline import Report, read_documents
from corpus.prepared import META, SPLITS, Prepared, check_prepared, writing_prepared
from corpus.records import each_record, map_fields, parse, text_of
from corpus.tokenizer import sample_texts, tokenizer_files, train_pieces
from model import chat


def prepare(args: argparse.Namespace):
    """The commands pretrain, sft and dpo: write the folder that the stages read."""
    kind, settings = KINDS[args.command], document_settings(args)
    tokenizer = settings.encoder().tokenizer  # here first: a mistake is found before the workers start
    if kind.masked or kind.noted:
        tokenizer.check_chats(args.tokenizer)
        if tokenizer.template and tokenizer.template.uses_date:
            settings = replace(settings, date=f"{datetime.now():%Y-%m-%d}")
            print(f"the chat template writes the date: all of these data get {settings.date}")
    report, tokenizer_dir = Report(settings), Path(args.tokenizer)
    layout = dict(masked=kind.masked, group=len(kind.titles), noted=kind.noted)
    layout |= dict(chat_template=settings.chat_template, date=settings.date)
    with writing_prepared(args.output, args.command, tokenizer_dir, **layout) as writer:
        if args.val:  # first, so that its documents are dropped from the training documents
            for document in read_documents(args.val, report):
                writer.add("val", document.parts, document.size, document.note)
        val_fraction = 0 if args.val else args.val_fraction
        for i, document in enumerate(read_documents(args.inputs, report)):
            # By the hash; but the first two go to a split each, so that neither stays empty.
            in_val = document.key < val_fraction * 2**64 if i > 1 else i == 1 and val_fraction
            writer.add("val" if in_val else "train", document.parts, document.size, document.note)
        sources = []
        for path, records in report.records.items():
            sizes = {"bytes": path.stat().st_size, "records": records}
            sources.append({"path": str(path), "sha256": sha256(path), **sizes})
        writer.meta |= {"sources": sources, "report": report.as_dict()}
    print(report)
    for name, counts in writer.counts.items():
        print(f"{args.output / name}: " + ", ".join(f"{count:,} {unit}" for unit, count in counts.items()))
    print(is_it_enough(args.command, writer.counts, len(kind.titles), writer.meta["vocab_size"]))
    script, model = TRAINED_BY[args.command]
    if model is None or Path(model).exists():
        print(next_step(script, "--data", args.output))
    else:
        print(next_step("data_process.py", "show", args.output, "--index", 0))


def clean_files(args: argparse.Namespace):
    """The command clean: the records again, as JSON lines, with the texts cleaned and without those that rules drop."""
    if args.output.name.removesuffix(".gz")[-6:] != ".jsonl" or args.output.is_dir():
        raise UserError(f"{args.output}: --output must be a file with a name that ends in .jsonl or .jsonl.gz")
    report = Report(document_settings(args))

    def write(path: Path):
        with gzip.open(path, "wb") if args.output.suffix == ".gz" else open(path, "wb") as file:
            for document in read_documents(args.inputs, report):
                line, _ = document.parts[0]
                file.write(line)

    write_file(args.output, write)
    if args.report:
        write_json(args.report, report.as_dict())
    print(report)
    print(next_step("data_process.py", "look", args.output))


def train_tokenizer(args: argparse.Namespace):
    """The command tokenizer: train SentencePiece BPE, and write it with its fast twin and the chat template."""
    report = Report(document_settings(args))
    texts = sample_texts(read_documents(args.inputs, report), args.max_mb * 1e6)
    files = tokenizer_files(train_pieces(texts, args.vocab_size, args.character_coverage, args.workers))
    for name, content in files.items():
        write_file(args.output / name, lambda path, content=content: path.write_bytes(content))
    tokenizer = chat.load_tokenizer(args.output)
    print(report)
    print(f"{args.output}: {tokenizer.get_vocab_size():,} pieces, from {sum(map(len, texts)):,} characters")
    text_field = report.settings.options.text_field
    for path in find_files(args.val):
        characters = tokens = 0
        for text in each_record(path, report.settings.options, lambda record: text_of(record, text_field)):
            characters += len(text)
            tokens += len(chat.encode(tokenizer, text))
        print(f"{path}: {characters / tokens:.3f} characters per token")
    fields = [] if text_field == "text" else ["--text_field", text_field]
    print(next_step("data_process.py", "pretrain", *args.inputs, *fields, "--tokenizer", args.output))


def show(folder: Path, split: str, index: int):
    """The command show: print one document, or the two of a pair, with the trained tokens marked."""
    data = Prepared(folder, split)
    if not 0 <= index < len(data):
        raise UserError(f"{folder}: {split} has {len(data)} documents: --index must be from 0 to {len(data) - 1}")
    tokenizer = chat.load_tokenizer(data.tokenizer_dir)
    for title, (ids, mask) in zip(KINDS[data.kind].titles, data.record(index), strict=True):
        print(f"--- {title} {index} of {split}: {len(ids)} tokens, {mask.sum()} trained")
        marked = None if data.mask is None else mask.tolist()
        print(show_tokens(ids.tolist(), marked, tokenizer, sys.stdout.isatty()))
    if KINDS[data.kind].noted:
        print(f"--- answer to check: {data.notes()[index]['answer']}")


def check(folders: list[Path]):
    """The command check: compare every file of prepared data, or of models and runs, with its SHA-256 sum."""
    from model.checkpoint import check_model  # torch takes long to import

    for folder in folders:
        check_prepared(folder) if (folder / META).exists() else check_model(folder)
        print(f"{folder}: every file is as it was written")


def list_sets(language: str):
    """The command list: the catalogue."""
    sets = sorted(read_catalogue().values(), key=lambda entry: STAGES.index(entry.stage))
    for stage, entries in groupby(sets, key=lambda entry: entry.stage):
        print(f"\n{stage}")
        for entry in entries:
            print(f"  {entry.name:24} {entry.facts}\n  {'':24} {getattr(entry, language)}")
    print("\nNames are for: python data_process.py fetch NAME")


def fetch(args: argparse.Namespace):
    """The command fetch: files of the hubs -> a folder for each set, and the command that prepares it."""
    for entry in [find_entry(name) for name in args.names]:  # a wrong name is found before anything is fetched
        print(f"{entry.name}: {entry.facts}\n{getattr(entry, args.language)}")
        hub = open_hub(entry, args.hub)
        files = choose_files(entry, hub)
        known = [file.size for file in files if file.size]
        print(f"{hub.page}: {len(files)} files, {sum(known) / 1e6:,.1f} MB", flush=True)
        folder = args.output / entry.name
        if args.max_mb or args.max_records:
            paths = fetch_part(hub, files, folder, args.max_mb, args.max_records)
        else:
            paths = fetch_files(hub, files, folder)
        few = len(paths) < 4 and all(map(suffix_of, paths))  # an archive's files are beside it
        command = [entry.stage, *map(str, paths if few else [folder]), *entry.flags]
        if entry.stage == "exam":
            print(f"keep it out of a training text: data_process.py with --exclude {folder}")
            print(next_step("eval.py", "--choice", folder))
        elif args.prepare:
            main(command)
        else:
            print(next_step("data_process.py", *command))


def look(args: argparse.Namespace):
    """The command look: what files contain, and the command to continue with."""
    check_parts(args.fields, {part: None for reading in READINGS for part in reading.fields})
    options = ReadOptions("text", args.encoding or "", args.speaker, args.redact)
    seen = first_look(args.inputs, args.records, args.fields, options)
    about = f" of about {seen.records / seen.fraction:,.0f}" if seen.fraction < 1 else ""
    names = printable(", ".join(seen.names))
    print(f"{', '.join(args.inputs)}: the first {seen.records:,}{about} records, with the fields {names}")
    if seen.reading is None:
        raise UserError(
            f"{args.inputs[0]}: the records are of no known format: say which field is which with --fields, such as "
            "question=NAME,answer=NAME or text=NAME"
        )
    print(f"record format: {seen.reading.what}")
    first = seen.batches[0].records[0][1]
    if isinstance(first, dict) and (speakers := speakers_of(str(first.get("text")))):
        print(printable(f"it seems a chat export: sft with --speaker {' or '.join(speakers)} makes chats of it"))
    flags = ["--fields", ",".join(map("=".join, args.fields.items()))] if args.fields else []
    for name in ("encoding", "speaker"):
        flags += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    flags += ["--redact"] if args.redact else []
    if args.tokenizer != DEFAULT_TOKENIZER:
        flags += ["--tokenizer", args.tokenizer]
    command = [seen.reading.command, *args.inputs, *flags]
    if seen.reading.command in KINDS:
        settings = replace(document_settings(parse_arguments(command)), max_bad_fraction=1)
        report, documents, changed = examine(seen, settings)
        print("\n".join(describe(report, documents, changed, args.tokenizer, sys.stdout.isatty())))
        draw(report.figures.as_dict(), args.picture)
        print(f"picture: {args.picture}")
    else:
        for place, record in some(seen.batches[0].records):
            text = json.dumps(parse(record), ensure_ascii=False, default=str)
            print(f"--- record {place}\n{printable(text[:SHOWN])}")
    is_exam = seen.reading.command == "exam"
    print(next_step("eval.py", "--choice", *args.inputs) if is_exam else next_step("data_process.py", *command))


COMMANDS = {  # name -> function, description
    "clean": (clean_files, "clean texts, to JSON lines"),
    "tokenizer": (train_tokenizer, "train a tokenizer"),
    "pretrain": (prepare, "clean and tokenize texts, for 1-pretrain.py"),
    "sft": (prepare, "tokenize chats, for 2-sft.py and 3-lora.py"),
    "dpo": (prepare, "tokenize preference pairs, for 4-dpo.py"),
    "rl": (prepare, "tokenize questions with answers that can be checked, for 5-grpo.py"),
}


TRAINED_BY = {  # kind of data -> script, and the model that it starts from
    "pretrain": ("1-pretrain.py", None),
    "sft": ("2-sft.py", "out/pretrain"),
    "dpo": ("4-dpo.py", "out/sft"),
    "rl": ("5-grpo.py", "out/sft"),
}
DEFAULT_TOKENIZER = "model/tokenizer"
if not Path(DEFAULT_TOKENIZER).exists():  # started from another folder
    DEFAULT_TOKENIZER = str(Path(chat.__file__).parent / "tokenizer")
STAGES = ("pretrain", "sft", "dpo", "rl", "exam")  # of the catalogue


def fraction_below_one(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return float(text)


def encoding(name: str) -> str:
    try:
        return codecs.lookup(name).name
    except LookupError:
        raise argparse.ArgumentTypeError(f"no encoding is called {name}") from None


def mapping(text: str) -> dict[str, str]:
    pairs = dict(pair.partition("=")[::2] for pair in text.split(","))
    if not all(pairs.keys()) or not all(pairs.values()):
        raise argparse.ArgumentTypeError(f'must be like question=Q,answer=A, not "{text}"')
    return pairs


def add_flags(name: str, command: argparse.ArgumentParser):
    """The flags of a command that reads records."""
    kind, add = KINDS[name], command.add_argument
    missing = dict(add_rules=[], tokenizer="", chat_template="", max_tokens=0, speaker="", redact=False)
    command.set_defaults(**missing)  # where there is no flag
    add("inputs", nargs="+", metavar="INPUT", help=f"files, or folders of files: {', '.join(SUFFIXES)}, each also .gz")
    add("--skip_rules", type=lambda names: names.split(","), default=[], help=f"some of {','.join(kind.rules)}")
    if kind.optional:
        add("--add_rules", choices=kind.optional, nargs="+", help="rules that are off by default")
    add("--exclude", nargs="+", default=(), metavar="FILE", help="drop what contains a question of these exams")
    add("--languages", nargs="+", default=(), metavar="CODE", help="drop what is in none of these, such as zh en")
    add("--fields", type=mapping, default={}, metavar="PART=NAME,…", help=f"parts are {', '.join(kind.fields)}")
    add("--text_field", default="text", help="the field with the text of a record; the same as --fields text=NAME")
    add("--encoding", type=encoding, help="of text, such as gb18030; UTF-8 and UTF-16 are recognized")
    add("--max_bad_fraction", type=fraction, default=0.1, help="stop if more of the records cannot be read")
    add("--workers", type=positive, default=available_cores(), help="processes")
    if kind.titles:
        add("--output", type=Path, default=Path("dataset") / name, help="folder")
        add("--tokenizer", default=DEFAULT_TOKENIZER, help="folder, or a model's name like Qwen/Qwen3-0.6B")
        add("--val_fraction", type=fraction_below_one, default=0.01, help="fraction of the documents for validation")
        add("--val", nargs="+", default=[], metavar="FILE", help="validate on these instead")
    if name == "sft":
        add("--speaker", default="", metavar="NAME", help="of a chat export: whose messages are the answers")
        add("--redact", action="store_true", help="of a chat export: replace names, numbers and addresses")
    if kind.masked or kind.noted:
        add("--max_tokens", type=natural, default=0, help="drop chats that are longer; 0: keep all")
        add("--chat_template", default="", metavar="FILE", help="in place of an open model's own")
    if name == "clean":
        add("--output", type=Path, required=True, help="file")
        add("--report", type=Path, help="write the report here too, as JSON")
    if name == "tokenizer":
        add("--output", type=Path, required=True, help="folder")
        add("--vocab_size", type=positive, default=6400, help="with the 16 control tokens and 256 bytes")
        add("--character_coverage", type=fraction, default=0.995, help="the characters beyond it are kept as bytes")
        add("--max_mb", type=above_zero, default=100, help="of more text, take a random sample of this size")
        add("--val", nargs="+", default=[], metavar="FILE", help="print the characters per token on these")


FETCH = """Licence and size are printed first. An interrupted download resumes when the command is run again.

HF_ENDPOINT names a mirror of Hugging Face, HF_TOKEN a token, HF_HOME where its cache is; MODELSCOPE_ENDPOINT and
MODELSCOPE_API_TOKEN are the same for ModelScope."""


def check_parts(fields: dict[str, str], known: Iterable[str]):
    if unknown := fields.keys() - set(known):
        raise UserError(f"--fields: no part is called {', '.join(sorted(unknown))}: it is {', '.join(known)}")


def document_settings(args: argparse.Namespace) -> DocumentSettings:
    """What the pipeline needs, from the flags of a command that reads records."""
    kind, text_field, exclude = KINDS[args.command], args.text_field, tuple(args.exclude)
    known = kind.fields
    check_parts(args.fields, known)
    if "text" in known:
        text_field = args.fields.get("text", text_field)
        known = {"text": (text_field, *known["text"])}
    names = map_fields(known, args.fields)
    if args.redact and not args.speaker:
        raise UserError("--redact is for a chat export: name the assistant of it with --speaker")
    options = ReadOptions(text_field, args.encoding or "", args.speaker, args.redact)
    if args.languages and (unknown := set(args.languages) - (languages := known_languages())):
        raise UserError(f"--languages: {', '.join(sorted(unknown))} is none of {', '.join(sorted(languages))}")
    if exclude:
        exams = load_exams(exclude)
        print(f"--exclude: {len(exams.sizes):,} questions to look for; {exams.too_short:,} are too short for that")
    rules = frozenset(kind.rules) - set(args.skip_rules) - (set(kind.optional) - set(args.add_rules))
    flags = ("command", "skip_rules", "languages", "tokenizer", "chat_template", "max_tokens")
    flags += ("max_bad_fraction", "workers")
    return DocumentSettings(options, names, rules, exclude, **{flag: getattr(args, flag) for flag in flags})


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, description) in COMMANDS.items():
        command = commands.add_parser(name, help=description, formatter_class=HelpFormatter)
        command.set_defaults(function=function)
        add_flags(name, command)
    command = commands.add_parser("show", help="print a document with the trained tokens marked")
    command.set_defaults(function=lambda args: show(args.folder, args.split, args.index))
    command.add_argument("folder", type=Path, metavar="DIR", help="such as dataset/sft")
    command.add_argument("--index", type=int, required=True, help="which document, or pair, from 0")
    command.add_argument("--split", choices=SPLITS, default="train")
    command = commands.add_parser("check", help="whether prepared data, models and runs are as they were written")
    command.set_defaults(function=lambda args: check(args.folders))
    command.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="such as dataset/sft, or out")
    languages = dict(choices=("en", "zh"), default="zh" if os.environ.get("LANG", "").startswith("zh") else "en")
    command = commands.add_parser("list", help="the data sets that fetch knows by name")
    command.set_defaults(function=lambda args: list_sets(args.language))
    command.add_argument("--language", **languages)
    command = commands.add_parser(
        "fetch", help="download data sets by name", formatter_class=HelpFormatter, description=FETCH
    )
    command.set_defaults(function=fetch)
    add = command.add_argument
    add("names", nargs="+", metavar="NAME", help="as data_process.py list shows them")
    add("--hub", choices=HUBS, default="hf", help="Hugging Face, or ModelScope")
    add("--output", type=Path, default=Path("data"), help="folder; each set gets one in it")
    add("--max_mb", type=not_negative, default=0, help="only the first records, up to this size; 0: all")
    add("--max_records", type=natural, default=0, help="only so many of the first records; 0: all")
    add("--prepare", action="store_true", help="run the command that prepares it, too")
    add("--language", **languages)
    command = commands.add_parser("look", help="what is in files, and the next command", formatter_class=HelpFormatter)
    command.set_defaults(function=look)
    add = command.add_argument
    add("inputs", nargs="+", metavar="FILE", help="files, or folders of files")
    add("--records", type=positive, default=5000, help="look at so many of the first")
    add("--fields", type=mapping, default={}, metavar="PART=NAME,…", help="which field is which")
    add("--encoding", type=encoding, help="of text files, such as gb18030")
    add("--speaker", default="", metavar="NAME", help="of a chat export: whose messages are the answers")
    add("--redact", action="store_true", help="of a chat export: replace names, numbers and addresses")
    add("--tokenizer", default=DEFAULT_TOKENIZER, help="folder, or a model's name like Qwen/Qwen3-0.6B")
    add("--picture", type=Path, default=Path("out/look.png"), help="file for the histograms")
    commands.add_parser("demo", help="made-up questions and answers for every stage; the same as python -m demo")
    args = parser.parse_args(arguments)
    if args.command in KINDS:
        rules = KINDS[args.command].rules
        for name in set(args.skip_rules) - set(rules):
            parser.error(f"--skip_rules: no rule is called {name}: it is {', '.join(rules)}")
    if getattr(args, "tokenizer", ""):
        args.tokenizer = str(model_folder(Path(args.tokenizer), weights=False))
    return args


def main(arguments: list[str] | None = None):
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")  # the worker processes fill the cores
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for terminals that cannot show Chinese, and lone surrogates
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["demo"]:  # a program of its own, which imports this project and not the other way round
        sys.argv = [sys.argv[0], *words[1:]]
        runpy.run_module("demo", run_name="__main__")
        return
    args = parse_arguments(words)
    args.function(args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    run(
        main, aftermath="the output is as it was", less_memory="--workers 1 takes less, of a tokenizer a lower --max_mb"
    )
