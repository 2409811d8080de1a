"""Decoding speed on a CPU, in float32: one text, a long prompt, and batches, beside transformers and llama.cpp.

    python -m bench.decode_speed --preset small base
    python -m bench.decode_speed --model out/sft

All have the same weights, write greedily with a KV cache, and take turns, call by call, each in a process of its own;
medians are printed, and "x transformers" is the median over the turns. A rate in GB/s is the bytes of weights that a
token reads, times tokens a second. Shares are of a limit measured in the same run: for one text and for batches torch's
product of as many vectors with an 8192 x 8192 matrix, the median; for a prompt the best plain matrix product.
llama.cpp takes part where its wheel is: pip install -r requirements/export.txt -c constraints.txt
"""

import argparse
import functools
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from base.cli import HelpFormatter, positive, run
from bench.contest import Contest, Turns, measure_each, ratio
from engine.decoding import pack_for_decoding
from engine.generation import generate
from model.checkpoint import load_model
from model.device import keep_freed_memory
from model.gguf import write_gguf
from model.llama_cpp import LlamaCpp
from model.LMConfig import PRESETS
from training.cost import step_flops

Writer = Callable[[list[list[int]], int], list[list[int]] | None]  # (prompts, tokens) -> what it wrote to each


def jiezi(directory: Path, weight_dtype: str = "float32") -> Writer:
    keep_freed_memory()  # as eval.py does
    model = load_model(directory, torch.device("cpu")).eval()
    model = pack_for_decoding(model, weight_dtype)

    def write(prompts, n):
        return [list(tokens) for tokens in zip(*generate(model, prompts, n, temperature=0))]

    return write


def transformers(directory: Path) -> Writer:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # writes on

    def write(prompts, n):
        ids = torch.tensor(prompts)
        options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0)
        return model.generate(ids, **options)[:, ids.shape[1] :].tolist()

    return write


def llama_cpp(directory: Path) -> Writer:
    """For one prompt. Its texts are not returned: those of random weights are not text."""
    model = load_model(directory, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, model, directory)
        opened = LlamaCpp(path, model.config.max_position_embeddings, torch.get_num_threads())

    def write(prompts, n):
        answer = opened.generate(prompts[0], n, ignore_eos=True, cache_prompt=False)
        if answer["tokens_predicted"] != n or answer["tokens_evaluated"] != len(prompts[0]):
            raise RuntimeError(f"llama.cpp read or wrote another number of tokens than asked: {answer}")

    return write


def report(name: str, turns: Turns, writer: str, tokens: int, used: float, limit: float, unit: str):
    """One line; used is what the call took of the limit, in units of 1e9."""
    median = statistics.median(turns.seconds[writer])
    print(
        f"{name:18}{writer:24}{tokens / median:9,.1f} tok/s {used / median / 1e9:7.1f} {unit}"
        f"{used / median / limit:8.1%} of {limit / 1e9:.1f}"
        f"{ratio(turns.seconds, 'transformers', writer):7.2f} x transformers",
        flush=True,
    )


def measure(name: str, directory: Path, new_tokens: int, prompt_tokens: int, batch_sizes: list[int], rounds: int):
    model = load_model(directory, torch.device("cpu"))
    config = model.config
    weights = model.num_parameters() - model.num_idle_parameters()
    weights -= 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    contestants = {"jiezi": (jiezi, directory), "transformers": (transformers, directory)}
    if "fbgemm" in torch.backends.quantized.supported_engines:
        contestants |= {f"jiezi, {dtype}": (jiezi, directory, dtype) for dtype in ("float16", "int8")}
    if importlib.util.find_spec("xllamacpp"):
        contestants["llama.cpp"] = (llama_cpp, directory)
    matrix = torch.randn(8192, 8192)

    def product_rate(rows: int) -> float:
        """Operations a second of a plain product of `rows` vectors with the matrix: 2 for each of its numbers."""
        vectors = torch.randn(rows, 8192)
        start = time.perf_counter()
        if rows == 1:
            torch.mv(matrix, vectors[0])
        else:
            torch.mm(vectors, matrix)
        return 2 * rows * matrix.numel() / (time.perf_counter() - start)

    def flops(length: int) -> float:
        head = 2 * config.vocab_size * config.hidden_size
        return step_flops(model, length, length * (length + 1) // 2) / 3 - head * (length - 1)  # asked of the last

    with Contest(contestants) as contest:

        def take_turns(rows: int, length: int, n: int, **options) -> Turns:
            generator = torch.Generator().manual_seed(rows)
            prompts = torch.randint(16, config.vocab_size, (rows, length), generator=generator).tolist()
            turns = contest.take_turns(rounds, prompts, n, **options)
            if turns.answers["jiezi"] != turns.answers["transformers"]:
                print(
                    "  (jiezi and transformers wrote unlike texts: two tokens were equally probable but for rounding)"
                )
            return turns

        n = new_tokens
        turns = take_turns(1, 8, n, limit=lambda: 2 * product_rate(1))  # in bytes: 4 for each number
        for writer in contestants:
            size = 1 if "int8" in writer else 2 if "float16" in writer else 4
            report(name, turns, writer, n, weights * size * n, statistics.median(turns.limits), "GB/s")
        length = min(prompt_tokens, config.max_position_embeddings - 1)
        turns = take_turns(1, length, 1)
        for writer in contestants:
            report(f"{name} prompt", turns, writer, length, flops(length), max(turns.limits), "GFLOP/s")
        for rows in batch_sizes:
            limit = functools.partial(product_rate, rows)
            turns = take_turns(rows, 8, n, names=("jiezi", "transformers"), limit=limit)
            for writer in turns.seconds:
                used = 2 * weights * rows * n
                report(f"{name} x {rows}", turns, writer, rows * n, used, statistics.median(turns.limits), "GFLOP/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["small", "base"], help="sizes")
    parser.add_argument("--model", type=Path, help="folder of a model, in place of a preset's random weights")
    parser.add_argument("--new_tokens", type=positive, default=64, help="tokens to write")
    parser.add_argument("--prompt_tokens", type=positive, default=512, help="tokens of the long prompt")
    parser.add_argument("--batch_sizes", type=positive, nargs="*", default=[1, 4, 16, 64], help="prompts at once")
    parser.add_argument("--rounds", type=positive, default=5, help="measured calls of each")
    args = parser.parse_args()
    if not importlib.util.find_spec("xllamacpp"):
        print("llama.cpp does not take part: pip install -r requirements/export.txt -c constraints.txt")
    names = ("new_tokens", "prompt_tokens", "batch_sizes", "rounds")
    measure_each(args.model, args.preset, functools.partial(measure, **{name: getattr(args, name) for name in names}))


if __name__ == "__main__":
    run(main)
