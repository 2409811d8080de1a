"""Tokens per second and time to first token with 1, 8 and 64 clients: serve.py, the engine alone, llama.cpp's server.

    python -m bench.serve_speed --preset mini small
    python -m bench.serve_speed --model out/sft

"The engine alone" is driven as eval.py --batch does. Each client sends a prompt and reads a stream of as many tokens;
all send at once, and the time is that until the last has ended. The time to first token is from the request to the
first event with text: the median over the clients, in the last round. All have the same weights in float32 and the same
prompts, generate greedily, and take turns, each in a process of its own; medians are printed. llama.cpp takes part
where its wheel is: pip install -r requirements/export.txt -c constraints.txt
"""

import argparse
import asyncio
import atexit
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import torch

from base.cli import HelpFormatter, positive, run
from bench.contest import Contest, measure_each, ratio
from engine.decoding import pack_for_decoding
from engine.generation import Engine, Sampling, Sequence
from model.checkpoint import load_model
from model.device import keep_freed_memory
from model.gguf import write_gguf
from model.llama_cpp import LlamaCpp
from model.LMConfig import PRESETS

# (prompts, tokens): a client for each prompt reads so many. Returns the median time to first token, in seconds.
Writer = Callable[[list[list[int]], int], float]


def ask(address: str, prompts: list[list[int]], n: int) -> float:
    """A client for each prompt. RuntimeError when a stream ends before it has n tokens."""
    host, port = urlsplit(address).hostname, urlsplit(address).port

    async def read(prompt: list[int]) -> float:
        start = time.perf_counter()
        fields = dict(prompt=prompt, max_tokens=n, temperature=0, repetition_penalty=1, ignore_eos=True, stream=True)
        body = json.dumps(fields).encode()
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await reader.readuntil(b"data: ")
        first = time.perf_counter() - start
        said = await reader.read()
        writer.close()
        if b'"length"' not in said:
            raise RuntimeError(f"a stream ended early: {said[-300:]}")
        return first

    async def read_all() -> list[float]:
        return await asyncio.gather(*map(read, prompts))

    return statistics.median(asyncio.run(read_all()))


def serve(directory: Path, rows: int) -> Writer:
    words = [sys.executable, "serve.py", directory, "--port", "0", "--device", "cpu", "--max_rows", rows]
    server = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, text=True)
    atexit.register(server.terminate)
    address = server.stdout.readline().split()[0]
    return lambda prompts, n: ask(address, prompts, n)


def engine(directory: Path, rows: int) -> Writer:
    keep_freed_memory()
    engine = Engine(pack_for_decoding(load_model(directory).eval()), rows)

    def write(prompts, n):
        start = time.perf_counter()
        for prompt in prompts:
            engine.submit(Sequence(prompt, n, sampling=Sampling(temperature=0)))
        engine.step()
        first = time.perf_counter() - start
        while engine.busy:
            engine.step()
        return first

    return write


def llama_cpp(directory: Path, rows: int) -> Writer:
    model = load_model(directory)
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(folder) / "model.gguf", model, directory)
        context = model.config.max_position_embeddings
        opened = LlamaCpp(Path(folder) / "model.gguf", context, torch.get_num_threads(), parallel=rows)
    return lambda prompts, n: ask(opened.server.listening_address, prompts, n)


def measure(name: str, directory: Path, clients_at_a_time: list[int], new_tokens: int, rounds: int):
    vocab_size, rows = load_model(directory).config.vocab_size, max(clients_at_a_time)
    contestants = {"serve.py": (serve, directory, rows), "engine alone": (engine, directory, rows)}
    if importlib.util.find_spec("xllamacpp"):
        contestants["llama.cpp"] = (llama_cpp, directory, rows)
    with Contest(contestants) as contest:
        for clients in clients_at_a_time:
            generator = torch.Generator().manual_seed(clients)
            prompts = torch.randint(16, vocab_size, (clients, 16), generator=generator).tolist()
            turns = contest.take_turns(rounds, prompts, new_tokens)
            for writer, seconds in turns.seconds.items():
                rate = clients * new_tokens / statistics.median(seconds)
                share = ratio(turns.seconds, "engine alone", writer)
                print(
                    f"{name:10}{clients:4} clients  {writer:14}{rate:10,.0f} tok/s{share:7.2f} x the engine alone"
                    f"{1000 * turns.answers[writer]:9,.1f} ms to first token",
                    flush=True,
                )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["mini", "small"], help="sizes")
    parser.add_argument("--model", type=Path, help="folder of a model, in place of a preset's random weights")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 8, 64], help="at a time")
    parser.add_argument("--new_tokens", type=positive, default=64, help="tokens for each client")
    parser.add_argument("--rounds", type=positive, default=5, help="measured calls of each")
    args = parser.parse_args()
    options = dict(clients_at_a_time=args.clients, new_tokens=args.new_tokens, rounds=args.rounds)
    measure_each(args.model, args.preset, partial(measure, **options))


if __name__ == "__main__":
    run(main)
