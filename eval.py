"""Talk to a model, and measure it.

    python eval.py                                            the newest model under out/: chats, or continues texts
    python eval.py --model out/sft --lora out/lora            a model with an adapter
    python eval.py --prompt 你好 --temperature 0              one answer
    python eval.py --web                                      chats in the browser (serve.py)
    python eval.py --batch prompts.jsonl > answers.jsonl      an answer to each {"prompt"} or {"messages"}
    python eval.py --perplexity FILE                          loss a token and bits per byte on texts
    python eval.py --data dataset/sft                         validation loss on prepared data
    python eval.py --choice FILE.csv                          multiple choice, C-Eval's and CMMLU's layout
    python eval.py --choice ceval-exam.zip --shots 5          a whole exam, by subject and category

--json adds the figures as one JSON object on the last line.
"""

# First, for it hears Ctrl-C while torch is loaded.
from base.cli import HelpFormatter, UserError, above_zero, fraction, natural, not_negative, positive, run

# isort: split
import argparse
import functools
import json
import math
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import jsonlines
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from base.files import finish_replacing
from corpus.files import ReadOptions
from corpus.records import each_record, request_of, text_of
from engine.decoding import pack_for_decoding
from engine.generation import Engine
from engine.session import ReplyStream, Session, read_tokens
from engine.tools import load_tools
from model.chat import BOS, EOS, encode, load_tokenizer, tokenizer_fingerprint
from model.checkpoint import load_model
from model.device import choose_device, keep_freed_memory
from model.model import CausalLM
from training.loss import evaluate, next_token_loss
from training.machine import Machine
from training.packing import PackedDataset

STAGES = ("pretrain", "sft", "dpo", "grpo", "distill")
THINK_CHOICES = ("show", "hide", "off")
HELP = """/clear           forget the conversation
/system TEXT     begin anew under this system prompt (nothing: none)
/temperature X   0 takes always the most probable token
/think WORD      show or hide what it thinks, or keep it from thinking: show, hide, off
/save FILE       write the conversation to a file that data_process.py sft reads
/help            this
/exit            leave (or Ctrl-D); Ctrl-C stops an answer"""


class ChatPrinter:
    """Writes answers of one session as they come, with reasoning dimmed or hidden, and what tools say marked."""

    def __init__(self, session: Session, args: argparse.Namespace):
        self.session, self.args = session, args

    def print_answer(self, messages: list[dict]) -> str:
        """Prints the answer as it comes, and its speed; returns it. Ctrl-C ends it early."""
        stream = ReplyStream(self.session.tokenizer)
        sequence = self.session.sequence(self.session.prompt_ids(messages), self.args.seed)
        engine = Engine(self.session.model, max_rows=1)
        engine.submit(sequence)
        start = time.perf_counter()
        try:
            while engine.busy:
                engine.step()
                self.show(*stream.put(sequence.tokens[-1]))
        except KeyboardInterrupt:
            print(" …", end="")
        self.show(*stream.end())
        print(flush=True)
        count = len(sequence.tokens)
        print(f"[{count} tokens, {count / (time.perf_counter() - start):.0f} tokens/s]", file=sys.stderr, flush=True)
        return stream.reply().content

    def show(self, part: str, text: str):
        if text and (part != "reasoning" or self.args.think == "show"):
            dim = part != "content" and sys.stdout.isatty()
            print(f"\033[2m{text}\033[0m" if dim else text, end="", flush=True)


def converse(printer: ChatPrinter, messages: list[dict]):
    """Reads lines and answers until /exit or Ctrl-D; a base model continues each line instead."""
    is_chat = printer.session.model.is_chat
    print("Type, or /help." if is_chat else "A base model continues texts: type the beginning of one, or /help.")
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
                printer.args.temperature = not_negative(rest)
            elif command == "/think" and rest in THINK_CHOICES:
                printer.args.think = rest
            elif command == "/save":
                text = json.dumps({"messages": messages}, ensure_ascii=False)
                Path(rest or "chat.jsonl").write_text(text + "\n", "utf-8")  # as data_process.py sft reads it
                print(f"saved to {rest or 'chat.jsonl'}")
            elif command.startswith("/"):
                print(HELP)
            elif line:
                if not is_chat:
                    print(line, end="")
                question = [*messages, {"role": "user", "content": line}]
                messages = [*question, {"role": "assistant", "content": printer.print_answer(question)}]
        except (ValueError, OSError, argparse.ArgumentTypeError) as error:
            print(f"error: {error}")


def answer_batch(session: Session, args: argparse.Namespace, system: list[dict]):
    """Answers every {"prompt"} or {"messages"} of a jsonl file; prints one {…, "answer"} a line, in the same order.

    args.batch_size are written at a time: one that has ended makes room for the next.
    """

    def enqueue(record: dict):
        messages, tools = request_of(record)
        if messages[0]["role"] != "system":
            messages = [*system, *messages]
        seed = None if args.seed is None else f"{args.seed}/{len(unprinted)}"
        sequence = session.sequence(session.prompt_ids(messages, tools), seed)
        engine.submit(sequence)
        unprinted.append((record, sequence))

    engine = Engine(session.model, args.batch_size)
    unprinted = deque()  # record, its sequence
    deque(each_record(args.batch, ReadOptions("prompt", args.encoding), enqueue), maxlen=0)
    output = jsonlines.Writer(sys.stdout, flush=True, dumps=functools.partial(json.dumps, ensure_ascii=False))
    while unprinted:
        engine.step()
        while unprinted and unprinted[0][1].finish_reason:
            record, sequence = unprinted.popleft()
            reply = read_tokens(sequence.tokens, session.tokenizer)
            parts = {"reasoning": reply.reasoning, "tool_calls": reply.tool_calls}
            parts = {name: part for name, part in parts.items() if part} | {"answer": reply.content}
            output.write({f"reference_{name}" if name in parts else name: record[name] for name in record} | parts)


@torch.inference_mode()
def perplexity(model: CausalLM, tokenizer: Tokenizer, file: str, options: ReadOptions) -> dict:
    """Mean loss a token in nats, its exponential, and bits per UTF-8 byte, over every text of the file.

    A text longer than the context is read in pieces; the first tokens of a piece are told without those before it.
    """
    device, context = model.model.embed_tokens.weight.device, model.config.max_position_embeddings
    loss = 0.0
    tokens = texts = size = 0
    for text in each_record(file, options, lambda record: text_of(record, options.text_field)):
        ids = torch.tensor([BOS, *encode(tokenizer, text), EOS], device=device)
        for start in range(0, len(ids) - 1, context):
            piece = ids[start : start + context + 1]
            logits = model(piece[None, :-1])[0]  # (T, V)
            loss += F.cross_entropy(logits.float(), piece[1:], reduction="sum").item()
        texts += 1
        tokens += len(ids) - 1
        size += len(text.encode())
    if not size:
        raise UserError(f"{file} holds no text")
    bits = loss / math.log(2) / size
    figures = {"loss": loss / tokens, "perplexity": math.exp(loss / tokens), "bits_per_byte": bits}
    return figures | {"texts": texts, "tokens": tokens, "bytes": size}


def validation(model: CausalLM, directory: Path, folders: list[str], max_seq_len: int) -> dict:
    """What 1-pretrain.py and 2-sft.py report as their validation loss, of any model on any prepared folders."""
    data = PackedDataset(folders, "val", max_seq_len)
    if data.group == 2:
        raise UserError(f"{data.paths} holds preference pairs; 4-dpo.py reports their loss")
    if data.tokenizer_sha256 != tokenizer_fingerprint(directory):
        raise UserError(f"{data.paths} was made with another tokenizer than the one in {directory}; make the data anew")
    machine = Machine(0, 1, model.lm_head.weight.device, torch.float32)
    return evaluate(model, next_token_loss, data, machine, batch_size=8)


def choice(model: CausalLM, tokenizer: Tokenizer, args: argparse.Namespace) -> dict:
    """Accuracy on four-choice questions, with Wilson's interval of 95 %; of an exam also by subject and category."""
    from corpus.exams import read_exam
    from engine.exams import accuracy, answer_exam, wilson_interval  # pandas: a chat need not wait for it

    questions, examples = read_exam(args.choice, args.encoding)
    results = answer_exam(model, tokenizer, questions, examples, args.shots, args.choice_by, args.batch_size)
    right, n = float(results["right"].mean()), len(results)
    low, high = wilson_interval(right, n)
    figures = {"questions": n, "accuracy": right, "low": low, "high": high, "chance": 0.25}
    if results["cut"].any():
        figures["cut"] = int(results["cut"].sum())  # questions that did not fit the context with all their examples
    for by in ("subject", "category"):
        table = accuracy(results, by)
        if len(table) > 1 and table["questions"].sum() == n:  # each question has one
            print(table.to_string(float_format="{:.3f}".format), end="\n\n")
            figures[f"mean_by_{by}"] = float(table["accuracy"].mean())
            figures[f"by_{by}"] = table.to_dict("index")
    return figures


def as_utf8(text: str) -> str:
    """Bytes of another encoding, typed into a UTF-8 terminal, become question marks."""
    return text.encode("utf-8", "replace").decode()


def newest_model(out: Path) -> Path:
    for stage in STAGES:
        finish_replacing(out / stage)
    models = [out / stage for stage in STAGES if (out / stage / "model.safetensors").exists()]
    if not models:
        raise UserError(f"no model under {out}/; train one with: python 1-pretrain.py, or give --model DIR")
    return max(models, key=lambda directory: (directory / "model.safetensors").stat().st_mtime)


def serve(args: argparse.Namespace) -> int:
    """Runs serve.py, which opens the browser, until Ctrl-C; its exit status."""
    command = [sys.executable, Path(__file__).with_name("serve.py"), "--open", "--device", args.device]
    command += ["--half_weights"] if args.half_weights else []
    command += ["--tools", *args.tools] if args.tools else []
    models = [directory for directory in (args.model, args.lora) if directory]
    with subprocess.Popen([*command, "--", *models]) as server:
        while True:
            try:
                return server.wait()
            except KeyboardInterrupt:
                continue  # it hears it too, and leaves


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", type=Path, help="folder of a model; without it, the newest under out/")
    parser.add_argument("--lora", type=Path, help="folder of an adapter for that model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--half_weights",
        action="store_true",
        help="on a CPU, weights in float16: nearly twice as fast; about 1 greedy text in 100 comes out otherwise",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="answer (a base model: continue) this, and leave")
    what.add_argument("--web", action="store_true", help="chat in the browser; without --model, with all under out/")
    what.add_argument("--batch", metavar="FILE", help="answer every record of a jsonl file")
    what.add_argument("--perplexity", metavar="FILE", help="measure on texts, in any file that data_process.py reads")
    what.add_argument("--data", nargs="+", metavar="[NAME=]DIR", help="measure on the validation part of prepared data")
    what.add_argument(
        "--choice", metavar="PATH", help="answer multiple-choice questions: a file, a folder or a zip file"
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--text_field", default="text", help="where the text stands in a record of --perplexity")
    parser.add_argument("--encoding", default="", help="of text, such as gb18030; UTF-8 and UTF-16 are recognized")
    parser.add_argument("--max_seq_len", type=positive, default=512, help="tokens in a row of --data")
    parser.add_argument("--shots", type=natural, default=0, help="examples from the dev part before each question")
    parser.add_argument(
        "--choice_by", choices=["text", "letter"], default="text", help="which are compared: the options, or A, B, C, D"
    )
    parser.add_argument("--batch_size", type=positive, default=16, help="prompts of --batch or --choice at a time")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    group = parser.add_argument_group("how it writes")
    group.add_argument("--max_new_tokens", type=positive, default=256, help="tokens at most")
    group.add_argument("--temperature", type=not_negative, default=0.7, help="0: always the most probable token")
    group.add_argument("--top_k", type=natural, default=0, help="only the k most probable tokens; 0: all")
    group.add_argument("--top_p", type=fraction, default=0.9, help="only the most probable that make up this share")
    group.add_argument(
        "--min_p", type=fraction, default=0.0, help="only tokens at least this share of the most probable"
    )
    group.add_argument("--repetition_penalty", type=above_zero, default=1.1, help="1: none")
    group.add_argument("--think", choices=THINK_CHOICES, default="show", help="what it thinks; off: it may not think")
    group.add_argument("--max_think_tokens", type=natural, default=0, help="then a thought is ended; 0: no limit")
    group.add_argument(
        "--tools",
        nargs="+",
        default=[],
        metavar="NAME",
        help="what it may call: calculator, or a Python file's functions",
    )
    group.add_argument("--seed", type=natural, help="the same seed writes the same text")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that cannot show Chinese
    if args.web:
        sys.exit(serve(args))
    directory = args.model or newest_model(Path("out"))
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if args.half_weights and (device.type != "cpu" or args.data):
        raise UserError("--half_weights is for writing on a CPU: give --device cpu, and not --data")
    model = load_model(directory, device, args.lora)
    model.eval()
    n_parameters = model.num_parameters()
    if device.type == "cpu" and not args.data:  # whose loss needs the layers as they were trained
        model = pack_for_decoding(model, args.half_weights)
    tokenizer = load_tokenizer(directory)
    session = Session(model, tokenizer, args, load_tools(args.tools))
    printer = ChatPrinter(session, args)
    system = [{"role": "system", "content": as_utf8(args.system)}] if args.system else []
    figures = None
    if args.perplexity:
        options = ReadOptions(args.text_field, args.encoding)
        figures = perplexity(model, tokenizer, args.perplexity, options)
    elif args.data:
        figures = validation(model, directory, args.data, args.max_seq_len)
    elif args.choice:
        figures = choice(model, tokenizer, args)
    elif args.batch:
        answer_batch(session, args, system)
    elif args.prompt is not None:
        if not model.is_chat:
            print(args.prompt, end="")
        printer.print_answer([*system, {"role": "user", "content": as_utf8(args.prompt)}])
    else:
        print(f"{directory}: {n_parameters:,} parameters")
        converse(printer, system)
    if figures:
        for name, value in figures.items():
            if isinstance(value, dict):
                continue  # was printed as a table
            print(f"{name:20}{value:,.4f}" if isinstance(value, float) else f"{name:20}{value:,}")
        if args.json:
            print(json.dumps(figures))


if __name__ == "__main__":
    run(main, less_memory="a lower --batch_size or --max_new_tokens takes less")
