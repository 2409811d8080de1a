"""Chat with a model, and evaluate it.

    python eval.py                                            chat with the newest model under out/
    python eval.py --model out/lora                           an adapter, with the base model that it names
    python eval.py --model out/sft --lora out/lora            the same, with the base model given
    python eval.py --prompt 你好 --temperature 0              one answer
    python eval.py --web                                      chat in the browser: python serve.py --open
    python eval.py --batch prompts.jsonl > answers.jsonl      an answer to each {"prompt"} or {"messages"}
    python eval.py --perplexity FILE                          loss per token and bits per byte on texts
    python eval.py --data dataset/sft                         validation loss on prepared data
    python eval.py --choice FILE.csv                          multiple choice, in C-Eval's and CMMLU's layout
    python eval.py --choice ceval-exam.zip --shots 5          a whole exam, by subject and category

--json adds the figures as one JSON object on the last line.
"""

# Imported first: it handles Ctrl-C while torch is loaded.
from base.cli import HelpFormatter, UserError, above_zero, fraction, natural, not_negative, positive, run

# isort: split
import argparse
import functools
import json
import math
import runpy
import sys
import time
from collections import deque
from dataclasses import fields, replace
from pathlib import Path

import jsonlines
import torch
import torch.nn.functional as F

from corpus.files import ReadOptions
from corpus.hub import model_folder
from corpus.records import each_record, request_of, text_of
from engine.decoding import FORMATS, pack_for_decoding
from engine.generation import Engine
from engine.grammar import compile_grammar, read_schema
from engine.session import GenerationConfig, ReplyStream, Session, read_tokens, sampling_defaults
from engine.tools import load_tools
from model.chat import ChatTokenizer, encode, load_tokenizer, tokenizer_fingerprint
from model.checkpoint import find_checkpoints, find_tokenizer, load_model
from model.device import choose_device, keep_freed_memory, print_notes
from model.model import CausalLM
from training.flags import ROPE_FLAGS
from training.loss import evaluate, next_token_loss
from training.machine import Machine
from training.packing import PackedDataset

THINK_CHOICES = ("show", "hide", "off")
HELP = """/clear           forget the conversation
/system TEXT     start over with this system prompt (without TEXT: with none)
/temperature X   0: greedy
/think WORD      reasoning: show, hide, or off (the model may not reason)
/save FILE       save the conversation in a file that data_process.py sft reads
/help            show this
/exit            leave (or Ctrl-D); Ctrl-C stops an answer"""


def print_answer(session: Session, messages: list[dict], seed: int | None) -> str:
    """Streams the answer to the terminal, then its speed; returns it. Ctrl-C ends it early."""

    def show(part: str, text: str):
        if text and (part != "reasoning" or session.config.think == "show"):
            dim = part != "content" and sys.stdout.isatty()
            print(f"\033[2m{text}\033[0m" if dim else text, end="", flush=True)

    sequence = session.sequence(session.prompt_ids(messages), seed)
    stream = ReplyStream(session.tokenizer, sequence.prompt)
    engine = Engine(session.model, max_rows=1)
    engine.submit(sequence)
    start = time.perf_counter()
    try:
        while engine.busy:
            engine.step()
            show(*stream.put(sequence.tokens[-1]))
    except KeyboardInterrupt:
        print(" …", end="")
    show(*stream.end())
    print(flush=True)
    count = len(sequence.tokens)
    print(f"[{count} tokens, {count / (time.perf_counter() - start):.0f} tokens/s]", file=sys.stderr, flush=True)
    return stream.reply().content


def converse(session: Session, messages: list[dict], seed: int | None):
    """Reads lines and answers until /exit or Ctrl-D; a base model continues each line instead."""
    is_chat = session.model.is_chat
    print("Type a message, or /help." if is_chat else "A base model continues texts: type a beginning, or /help.")
    while True:
        try:
            line = as_utf8(input("\n> ")).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if command == "/exit":
                return
            if command == "/clear":
                messages = [message for message in messages if message["role"] == "system"]
            elif command == "/system":
                messages = [{"role": "system", "content": rest}] if rest else []
            elif command == "/temperature":
                session.config = replace(session.config, temperature=not_negative(rest))
            elif command == "/think" and rest in THINK_CHOICES:
                session.config = replace(session.config, think=rest)
            elif command == "/save":
                text = json.dumps({"messages": messages}, ensure_ascii=False)
                Path(rest or "chat.jsonl").write_text(text + "\n", "utf-8")
                print(f"saved to {rest or 'chat.jsonl'}")
            elif command.startswith("/"):
                print(HELP)
            elif line:
                if not is_chat:
                    print(line, end="")
                question = [*messages, {"role": "user", "content": line}]
                messages = [*question, {"role": "assistant", "content": print_answer(session, question, seed)}]
        except (ValueError, OSError, argparse.ArgumentTypeError) as error:
            print(f"error: {error}")


def answer_batch(
    session: Session, file: str, options: ReadOptions, batch_size: int, seed: int | None, system: list[dict]
):
    """Answers every {"prompt"} or {"messages"} of a jsonl file; prints one {…, "answer"} per line, in the same order.

    batch_size answers are generated at a time; when one ends, the next starts.
    """

    def enqueue(record: dict):
        messages, tools = request_of(record)
        if messages[0]["role"] != "system":
            messages = [*system, *messages]
        own_seed = None if seed is None else f"{seed}/{len(unprinted)}"
        sequence = session.sequence(session.prompt_ids(messages, tools), own_seed)
        engine.submit(sequence)
        unprinted.append((record, sequence))

    engine = Engine(session.model, batch_size)
    unprinted = deque()  # record, its sequence
    deque(each_record(file, options, enqueue), maxlen=0)
    output = jsonlines.Writer(sys.stdout, flush=True, dumps=functools.partial(json.dumps, ensure_ascii=False))
    while unprinted:
        engine.step()
        while unprinted and unprinted[0][1].finish_reason:
            record, sequence = unprinted.popleft()
            reply = read_tokens(sequence.tokens, session.tokenizer, sequence.prompt)
            parts = {"reasoning": reply.reasoning, "tool_calls": reply.tool_calls}
            parts = {name: part for name, part in parts.items() if part} | {"answer": reply.content}
            names = {
                name: f"reference_{name}" for name in record if name in parts and f"reference_{name}" not in record
            }
            output.write({names.get(name, name): record[name] for name in record} | parts)


@torch.inference_mode()
def perplexity(
    model: CausalLM, tokenizer: ChatTokenizer, file: str, options: ReadOptions, max_seq_len: int | None = None
) -> dict:
    """Mean loss per token in nats, its exponential, and bits per UTF-8 byte, over every text of the file.

    A text longer than max_seq_len tokens (default: the context) is split; the first tokens of a part are predicted
    without those before them.
    """
    device, context = model.model.embed_tokens.weight.device, max_seq_len or model.config.max_position_embeddings
    loss = 0.0
    tokens = texts = size = 0
    for text in each_record(file, options, lambda record: text_of(record, options.text_field)):
        ids = torch.tensor(tokenizer.text(encode(tokenizer, text)), device=device)
        for start in range(0, len(ids) - 1, context):
            piece = ids[start : start + context + 1]
            logits = model(piece[None, :-1])[0]  # (T, V)
            loss += F.cross_entropy(logits.float(), piece[1:], reduction="sum").item()
        texts += 1
        tokens += len(ids) - 1
        size += len(text.encode())
    if not size:
        raise UserError(f"{file} contains no text")
    bits = loss / math.log(2) / size
    figures = {"loss": loss / tokens, "perplexity": math.exp(loss / tokens), "bits_per_byte": bits}
    return figures | {"texts": texts, "tokens": tokens, "bytes": size}


def validation(model: CausalLM, directory: Path, folders: list[str], max_seq_len: int) -> dict:
    """The validation loss that 1-pretrain.py and 2-sft.py report, for any model and prepared folders."""
    data = PackedDataset(folders, "val", max_seq_len)
    if data.group == 2:
        raise UserError(f"{data.paths} holds preference pairs; 4-dpo.py reports their loss")
    if data.tokenizer_sha256 != tokenizer_fingerprint(directory):
        raise UserError(
            f"{data.paths} was prepared with another tokenizer than the one in {directory}; prepare it again"
        )
    machine = Machine(0, 1, model.lm_head.weight.device, torch.float32)
    return evaluate(model, next_token_loss, data, machine, batch_size=8)


def choice(
    model: CausalLM, tokenizer: ChatTokenizer, exam: str, encoding: str, shots: int, by: str, batch_size: int
) -> dict:
    """Accuracy on four-choice questions with its 95% Wilson interval; for an exam also by subject and category."""
    from corpus.exams import read_exam
    from engine.exams import accuracy, answer_exam, wilson_interval  # imports pandas, which takes a second

    questions, examples = read_exam(exam, encoding)
    results = answer_exam(model, tokenizer, questions, examples, shots, by, batch_size)
    right, n = float(results["right"].mean()), len(results)
    low, high = wilson_interval(right, n)
    figures = {"questions": n, "accuracy": right, "low": low, "high": high, "chance": 0.25}
    if results["cut"].any():
        figures["cut"] = int(results["cut"].sum())  # questions that were truncated to the context
    for by in ("subject", "category"):
        table = accuracy(results, by)
        if len(table) > 1 and table["questions"].sum() == n:  # each question has one
            print(table.to_string(float_format="{:.3f}".format), end="\n\n")
            figures[f"mean_by_{by}"] = float(table["accuracy"].mean())
            figures[f"by_{by}"] = table.to_dict("index")
    return figures


def as_utf8(text: str) -> str:
    """Replaces bytes that are not UTF-8, typed in a terminal of another encoding, by question marks."""
    return text.encode("utf-8", "replace").decode()


def newest_model(out: Path) -> Path:
    found = find_checkpoints(out)
    if not found:
        raise UserError(f"no model under {out}/; train one with: python 1-pretrain.py, or give --model DIR")
    return found[0]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of a model or adapter, or a hub's name; default: the newest under out/",
    )
    parser.add_argument("--lora", type=Path, help="folder of an adapter to merge into --model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, or another that torch has")
    parser.add_argument(
        "--weight_dtype",
        choices=[*FORMATS],
        default="float32",
        help="of the matrices, on a CPU: fewer bits are faster; float16 changes 1 greedy text in 100, int8 1 in 3",
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--prompt", help="answer this (a base model: continue it) and exit")
    task.add_argument("--web", action="store_true", help="chat in the browser: the same as python serve.py --open")
    task.add_argument("--batch", metavar="FILE", help="answer every record of a jsonl file")
    task.add_argument("--perplexity", metavar="FILE", help="loss on texts, in any format that data_process.py reads")
    task.add_argument("--data", nargs="+", metavar="[NAME=]DIR", help="loss on the validation split of prepared data")
    task.add_argument("--choice", metavar="PATH", help="multiple-choice questions: a file, a folder or a zip file")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--text_field", default="text", help="the field of a record that --perplexity reads")
    parser.add_argument("--encoding", default="", help="of text, such as gb18030; UTF-8 and UTF-16 are recognized")
    parser.add_argument(
        "--max_seq_len", type=positive, help="tokens in a row of --data (default: 512), or in a part of --perplexity"
    )
    parser.add_argument("--rope_scaling", **ROPE_FLAGS["--rope_scaling"])
    parser.add_argument("--shots", type=natural, default=0, help="examples from the dev part before each question")
    parser.add_argument(
        "--choice_by", choices=["text", "letter"], default="text", help="compare the options' texts, or A, B, C, D"
    )
    parser.add_argument("--batch_size", type=positive, default=16, help="rows of --batch or --choice at a time")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object on the last line")
    group = parser.add_argument_group("generation")
    group.add_argument("--max_new_tokens", type=positive, default=256, help="at most so many tokens per answer")
    usual = GenerationConfig()
    for name, kind, what in (
        ("temperature", not_negative, "0: greedy"),
        ("top_k", natural, "sample from the k most probable tokens; 0: from all"),
        ("top_p", fraction, "sample from the most probable tokens up to this sum"),
        ("min_p", fraction, "least probability, relative to the highest"),
        ("repetition_penalty", above_zero, "1: none"),
    ):
        default = f"default: the one in the model's generation_config.json, or {getattr(usual, name)}"
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{what} ({default})")
    group.add_argument(
        "--think", choices=THINK_CHOICES, default="show", help="reasoning; off: the model may not reason"
    )
    group.add_argument("--max_think_tokens", type=natural, default=0, help="end the reasoning after these; 0: no limit")
    group.add_argument(
        "--tools", nargs="+", default=[], metavar="NAME", help="calculator, or a Python file with functions to call"
    )
    group.add_argument(
        "--json_schema", type=Path, metavar="FILE", help="answers are JSON of this schema; needs requirements/serve.txt"
    )
    group.add_argument("--seed", type=natural, help="the same seed gives the same text")
    return parser.parse_args()


def main():
    if "--web" in sys.argv:
        script = Path(__file__).with_name("serve.py")
        sys.argv = [str(script), "--open", *(word for word in sys.argv[1:] if word != "--web")]
        runpy.run_path(str(script), run_name="__main__")
        return
    args = parse_arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that cannot show Chinese
    chosen = model_folder(args.model) or newest_model(Path("out"))
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if args.weight_dtype != "float32" and (device.type != "cpu" or args.data):
        raise UserError("--weight_dtype is for generation on a CPU: give --device cpu, and not --data")
    model = load_model(chosen, device, args.lora).eval()
    if args.rope_scaling:
        model.config.extend(args.rope_scaling)
    n_parameters = model.num_parameters()
    if not args.data:  # --data computes the loss with the layers of training
        model = pack_for_decoding(model, args.weight_dtype)
    directory = find_tokenizer(chosen, args.lora)
    tokenizer = load_tokenizer(directory)
    if tokenizer.problem:
        print(f"{directory}: {tokenizer.problem}; until then it continues texts", file=sys.stderr)
    names = {field.name for field in fields(GenerationConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    config = GenerationConfig(**sampling_defaults(model.generation_config) | given)
    if args.json_schema and args.tools:
        raise UserError("an answer that is JSON of --json_schema calls no --tools: omit one of them")
    grammar = compile_grammar(tokenizer, read_schema(args.json_schema)) if args.json_schema else None
    session = Session(model, tokenizer, config, load_tools(args.tools), grammar)
    system = [{"role": "system", "content": as_utf8(args.system)}] if args.system else []
    figures = {}
    if args.perplexity:
        options = ReadOptions(args.text_field, args.encoding)
        figures = perplexity(model, tokenizer, args.perplexity, options, args.max_seq_len)
    elif args.data:
        figures = validation(model, directory, args.data, args.max_seq_len or 512)
    elif args.choice:
        figures = choice(model, tokenizer, args.choice, args.encoding, args.shots, args.choice_by, args.batch_size)
    elif args.batch:
        options = ReadOptions("prompt", args.encoding)
        answer_batch(session, args.batch, options, args.batch_size, args.seed, system)
    elif args.prompt is not None:
        if not model.is_chat:
            print(args.prompt, end="")
        print_answer(session, [*system, {"role": "user", "content": as_utf8(args.prompt)}], args.seed)
    else:
        print(f"{chosen}: {n_parameters:,} parameters")
        print_notes()
        converse(session, system, args.seed)
    for name, value in figures.items():
        if not isinstance(value, dict):  # dicts were printed as tables
            print(f"{name:20}{value:,.4f}" if isinstance(value, float) else f"{name:20}{value:,}")
    if figures and args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    run(main, less_memory="lower --batch_size or --max_new_tokens")
