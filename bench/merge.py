"""What the process that hands out batches and merges results could carry, if there were workers enough.

    python -m bench.merge corpus.jsonl [--skip_rules near_duplicate]

It takes the steps of `data_process.py pretrain` that one process takes for all: read and send each batch, receive the
results, find duplicates, write. The workers' share is done before, and is not counted. In CPU seconds of this process,
and MB of the input.
"""

import argparse
import os
import tempfile
import time
from multiprocessing.reduction import ForkingPickler  # what a pool sends its batches by
from pathlib import Path

import data_process
from base.cli import run
from corpus.files import find_files, read_batches
from corpus.kinds import KINDS
from corpus.pipeline import Report, work
from corpus.prepared import writing_prepared


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--command", choices=("pretrain", "sft", "dpo"), default="pretrain")
    parser.add_argument("--skip_rules", default="", help="as of data_process.py")
    args = parser.parse_args()
    flags = ["--skip_rules", args.skip_rules] if args.skip_rules else []
    settings = data_process.document_settings(data_process.parse_arguments([args.command, args.file, *flags]))

    start = time.process_time()
    sent = [ForkingPickler.dumps(batch) for batch in read_batches(find_files([args.file]), "text")]
    times = {"read and send": time.process_time() - start}
    results = [ForkingPickler.dumps(work(settings, ForkingPickler.loads(batch))) for batch in sent]

    kind, report = KINDS[args.command], Report(settings)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "data"
        with writing_prepared(output, args.command, Path(settings.tokenizer), kind.masked, len(kind.titles)) as writer:
            start = time.process_time()
            for result in results:
                for document in report.without_duplicates(ForkingPickler.loads(result)):
                    writer.add("train", document.parts, document.size)
            times["receive, compare, write"] = time.process_time() - start

    megabytes, seconds = os.stat(args.file).st_size / 1e6, sum(times.values())
    for name, value in times.items():
        print(f"{name}: {value:.2f} s")
    print(f"{report.records.total() / seconds:,.0f} records/s, {megabytes / seconds:,.0f} MB/s of {megabytes:,.1f} MB")


if __name__ == "__main__":
    run(main)
