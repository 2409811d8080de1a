"""Writes made-up questions whose answers can be checked, for every stage: python -m demo --output DIR"""

import argparse
from pathlib import Path

from base.cli import join_words, python_command, run
from corpus.records import each_record, text_of
from demo.questions import write_demo
from demo.tasks import write_tasks


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--corpus", nargs="+", default=[], metavar="FILE", help="texts for pretraining; else made up")
    parser.add_argument("--tasks", action="store_true", help="instead, questions for 5-grpo.py and chats to start from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts = (text for file in args.corpus for text in each_record(file, "text", lambda record: text_of(record, "text")))
    counts = write_tasks(args.output, args.seed) if args.tasks else write_demo(args.output, texts, args.seed)
    for name, count in counts.items():
        print(f"{args.output / name}.jsonl: {count:,} records")
    look = ["data_process.py", "look", str(args.output / f"{next(iter(counts))}.jsonl")]
    print("next: " + join_words([python_command(), *look]))


if __name__ == "__main__":
    run(main)
