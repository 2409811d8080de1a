"""What a GPU makes of this code, in six minutes: the most telling parts first, each in a process of its own.

    python -m bench.card                       writes out/card.txt, a report to send
    python -m bench.card --seconds 120         what can be found out in two minutes
    python -m bench.card --parts compile decode
    python -m bench.card --device mps          a Mac's GPU
    python -m bench.card --device cpu          tries the program itself, with everything shrunk

A part that fails is a line of the report, and one that takes too long is cut off. Each line is in the report as soon as
it is printed, so that the report of a machine that is taken away is complete up to there.

    machine  what there is; products of random numbers in three precisions, copies, the time that a launch takes
    right    loss and gradients of small models in every precision, beside those of a CPU in float32
    run      1-pretrain.py on made-up data, stopped and resumed
    speed    training steps without torch.compile: tokens/s, memory beside the estimate, what the GPU spends its time on
    compile  the same with it: equal loss, the first step, batches with other numbers of documents
    decode   generation: tokens/s, synchronizations per token, and as an experiment the replay of a CUDA graph
    experts  the grouped kernel beside the loop, and the gradient of an expert without tokens
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from base.cli import HelpFormatter, UserError, above_zero, one_line, run
from bench.contest import TOKENIZER
from bench.train_speed import cpu_name, made_up_batch, training_step
from engine.decoding import pack_for_decoding
from engine.generation import generate
from model import experts
from model.device import choose_device, keep_freed_memory
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training.compiling import compile_model, has_triton
from training.cost import StepSettings, memory_estimate, step_flops
from training.loss import next_token_loss
from training.machine import Machine, device_dtype, matmul_rate
from training.packing import Batch

ROOT = Path(__file__).parents[1]
# How far gradients may be from those of a CPU in float32, relative to their norm. TF32 has 10 bits, as float16.
LIMITS = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 6e-2}
PRECISIONS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Sizes:
    """Of what is tried."""

    right: tuple[str, ...] = ("tiny", "tiny-moe")
    right_rows: int = 4
    speed: tuple[tuple[str, int], ...] = (("small", 8), ("small", 64), ("base", 64), ("large", 32), ("small", 256))
    compiled: tuple[str, int] = ("small", 64)
    decoded: tuple[str, ...] = ("small", "large")
    decoding_rows: tuple[int, ...] = (1, 32)
    new_tokens: int = 48
    run: str = "small"
    max_seq_len: int = 512
    product: int | None = None  # matmul_rate's own
    copied: int = 2**30  # bytes
    visitors: int = 8192  # tokens that visit experts
    steps: int = 8


SHRUNK = Sizes(
    right_rows=1,
    speed=(("tiny", 2),),
    compiled=("tiny", 1),
    decoded=("tiny",),
    decoding_rows=(1, 2),
    new_tokens=8,
    run="tiny",
    max_seq_len=64,
    product=256,
    copied=2**24,
    visitors=64,
    steps=2,
)


class Report:
    """A file that has each line as soon as it is printed."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", "utf-8")

    def line(self, text: str):
        print(text, flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def run_part(command: list[str], limit: float, report: Report):
    """A part's lines; one more where it takes longer than `limit` seconds, or ends badly."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", errors="replace", cwd=ROOT
        ) as process,
    ):
        late = threading.Event()

        def cut_off():
            late.set()
            process.kill()

        timer = threading.Timer(limit, cut_off)
        timer.start()
        for line in process.stdout:
            report.line("  " + line.rstrip("\n"))
        status = process.wait()
        timer.cancel()
        if late.is_set():
            report.line(f"  CUT OFF after {limit:.0f} s")
        elif status:
            errors.seek(0)
            said = errors.read().split("\n")
            report.line(f"  FAILED with exit status {status}")
            for line in [line for line in said if line.strip()][-8:]:
                report.line(f"    {line[:200]}")


def attempt(name: str, find_out: Callable[[], str]) -> str:
    """A line: what was found out, or how it failed."""
    try:
        return f"{name}: {find_out()}"
    except Exception as error:
        return f"{name}: FAILED, {type(error).__name__}: {one_line(error)[:300]}"


def synchronize(device: torch.device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(step: Callable, device: torch.device, times: int) -> float:
    """Of a call, after three to warm up."""
    for _ in range(3):
        step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / times


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine_of(device: torch.device, dtype: torch.dtype | None = None) -> Machine:
    return Machine(0, 1, device, dtype or device_dtype(device))


def new_model(preset: str, device: torch.device, **changes) -> CausalLM:
    torch.manual_seed(0)
    with device:
        return CausalLM(LMConfig(**PRESETS[preset] | changes)).train()


# ---------------------------------------------------------------------------------------------------------------- parts


def machine(device: torch.device, sizes: Sizes) -> Iterator[str]:
    on_cuda = device.type == "cuda"
    yield f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}, {cpu_name()}"
    if on_cuda:
        card = torch.cuda.get_device_properties(device)
        flash = torch.backends.cuda.is_flash_attention_available()
        yield f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 1e9:.1f} GB"
        yield f"CUDA {torch.version.cuda}, HIP {torch.version.hip}, flash attention {'built' if flash else 'NOT BUILT'}"
    compiler = next((name for name in ("cc", "gcc", "clang", "cl") if shutil.which(name)), "none")
    yield attempt("torch.compile", lambda: f"Triton {'found' if has_triton() else 'not found'}, C compiler {compiler}")
    yield f"--dtype auto is {short(machine_of(device).dtype)}"
    for dtype in PRECISIONS if on_cuda else (torch.float32,):
        rate = functools.partial(matmul_rate, machine_of(device, dtype), sizes.product)
        yield attempt(f"product of random {short(dtype)}", lambda rate=rate: f"{rate() / 1e12:.3g} TFLOP/s")
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, 10)
    yield f"copies: {2 * sizes.copied / seconds / 1e9:,.0f} GB/s read and written"
    number = torch.zeros(1, device=device)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(2000):
        number.add_(1)
    host = time.perf_counter() - start
    synchronize(device)
    in_all = time.perf_counter() - start
    yield f"a launch: {host / 2000 * 1e6:.1f} us of the host, {in_all / 2000 * 1e6:.1f} us in all"


def gradients_of(config: LMConfig, machine: Machine, batch: Batch, checkpoints: bool) -> tuple[float, Tensor]:
    """Loss per token, and all gradients in one, on the CPU; weights are the same on every machine."""
    torch.manual_seed(0)
    model = CausalLM(config).to(machine.device).train()
    model.model.gradient_checkpointing = checkpoints
    with machine.autocast():
        loss_sum, tokens, _ = next_token_loss(model, batch.to(machine.device))
    (loss_sum / tokens).backward()
    return loss_sum.item() / tokens, torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def right(device: torch.device, sizes: Sizes) -> Iterator[str]:
    for preset in sizes.right:
        config = LMConfig(**PRESETS[preset])
        batch = made_up_batch(sizes.right_rows, min(256, sizes.max_seq_len), config.vocab_size)
        exact = gradients_of(config, machine_of(torch.device("cpu"), torch.float32), batch, checkpoints=False)
        for dtype in PRECISIONS if device.type == "cuda" else (torch.float32,):
            for checkpoints in (False, True):
                compared = functools.partial(
                    compare, config, machine_of(device, dtype), batch, checkpoints, *exact, LIMITS[dtype]
                )
                yield attempt(f"{preset}, {short(dtype)}{', checkpoints' if checkpoints else ''}", compared)


def compare(config, machine: Machine, batch: Batch, checkpoints: bool, loss: float, exact: Tensor, limit: float) -> str:
    found_loss, found = gradients_of(config, machine, batch, checkpoints)
    error = ((found - exact).norm() / exact.norm()).item()
    verdict = "right" if error < limit and abs(found_loss - loss) < 0.05 else "WRONG"
    return f"loss off by {abs(found_loss - loss):.5f}, gradients by {error:.1e}: {verdict}"


def real_run(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """1-pretrain.py itself, which prints its own lines."""
    if not importlib.util.find_spec("jsonlines"):
        sys.modules["jsonlines"] = stand_in_for_jsonlines()
    from training import log

    log.plot = lambda records, path: path.touch()  # matplotlib may be missing, and is not in question
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder) / "data")
        flags = ["--device", device.type, "--data", f"{folder}/data", "--out_dir", f"{folder}/out", "--batch_size", "8"]
        flags += ["--preset", sizes.run, "--max_seq_len", str(sizes.max_seq_len), "--eval_rows", "4"]
        flags += ["--log_interval", "5", "--save_interval", "10", "--sample_prompt", ""]
        for more in (["--max_steps", "10"], ["--max_steps", "20", "--resume"]):
            yield attempt(" ".join(["1-pretrain.py", *more]), functools.partial(run_script, flags + more))


def run_script(flags: list[str]) -> str:
    sys.argv = ["1-pretrain.py", *flags]
    start = time.perf_counter()
    with contextlib.suppress(SystemExit):
        runpy.run_path("1-pretrain.py", run_name="__main__")
    return f"{time.perf_counter() - start:.0f} s"


def write_texts(folder: Path):
    """Prepared data: 3,000 texts of random tokens, which a model can learn the frequencies of."""
    import numpy as np

    from corpus.prepared import writing_prepared

    generator = np.random.default_rng(0)
    with writing_prepared(folder, "pretrain", TOKENIZER) as writer:
        for i in range(3000):
            length = int(np.clip(generator.lognormal(5.4, 0.5), 16, 1000))
            tokens = (16 + generator.geometric(0.01, length) % 6000).astype(writer.dtype)
            writer.add("val" if i < 40 else "train", [(tokens.tobytes(), b"")])


def stand_in_for_jsonlines() -> types.ModuleType:
    """As much of it as a run needs, for a machine that has torch but not all of requirements.txt."""

    @contextlib.contextmanager
    def open_lines(path, mode="r", dumps=json.dumps):
        with open(path, mode, encoding="utf-8") as file:

            def write(record):
                file.write(dumps(record) + "\n")

            yield types.SimpleNamespace(write=write, write_all=lambda records: [write(record) for record in records])

    module = types.ModuleType("jsonlines")
    module.open = open_lines
    return module


def speed(device: torch.device, sizes: Sizes) -> Iterator[str]:
    here = machine_of(device)
    peak = matmul_rate(here, sizes.product)
    for preset, rows in sizes.speed:
        tables: list[str] = []
        yield attempt(f"{preset}, {rows} rows", functools.partial(step_speed, preset, rows, here, sizes, peak, tables))
        yield from tables
        if device.type == "cuda":
            torch.cuda.empty_cache()


def step_speed(preset: str, rows: int, here: Machine, sizes: Sizes, peak: float, tables: list[str]) -> str:
    """Speed and memory of a step; appends a table of its kernels to `tables`."""
    device, settings = here.device, StepSettings(rows, 1, sizes.max_seq_len, False, "muon")
    model = new_model(preset, device)
    batch = made_up_batch(rows, sizes.max_seq_len, model.config.vocab_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = training_step(model, here, settings.optimizer, batch)
    seconds = seconds_of(step, device, sizes.steps)
    mfu = step_flops(model, batch.real_tokens, batch.attention_pairs) / seconds / peak
    with here.autocast():
        estimate = memory_estimate(model, settings, here.dtype.itemsize, model.model.attention_kind())
    result = f"{1e3 * seconds:.1f} ms, {batch.real_tokens / seconds / 1e3:,.1f} k tok/s, {mfu:.1%} of products, "
    if device.type == "cuda":
        result += f"{torch.cuda.max_memory_reserved(device) / 1e9:.2f} GB, "
        tables += kernel_table(step, seconds) if rows == 64 else []
    return result + f"estimate {estimate / 1e9:.2f} GB{count_waits(step, device)}"


def kernel_table(step: Callable[[], None], seconds: float) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / 1e3
    table = profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=60)
    return [f"{len(kernels)} kernels, {busy:.1f} ms busy of {1e3 * seconds:.1f}", *table.splitlines()]


def count_waits(step: Callable[[], object], device: torch.device) -> str:
    """How often a step waits for a GPU, by torch's own count."""
    if device.type != "cuda":
        return ""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f", {sum('synchroniz' in str(one.message) for one in seen)} waits"


def compiled(device: torch.device, sizes: Sizes) -> Iterator[str]:
    preset, rows = sizes.compiled
    here, model = machine_of(device), new_model(preset, device)
    batch = made_up_batch(rows, sizes.max_seq_len, model.config.vocab_size)

    def loss() -> float:
        with here.autocast():
            return next_token_loss(model, batch.to(device))[0].item() / batch.scored

    eager, start = loss(), time.perf_counter()
    step = training_step(model, here, "muon", batch)
    before = seconds_of(step, device, sizes.steps)
    yield f"{preset}, {rows} rows, eager: {1e3 * before:.1f} ms"
    model.load_state_dict(new_model(preset, device).state_dict())
    start = time.perf_counter()
    options = {"backend": "aot_eager"} if device.type == "cpu" else {}  # a CPU's compiler takes minutes
    failure = compile_model(model, here, batch.to(device), **options)
    yield f"compiling, with a forward and backward pass: {time.perf_counter() - start:.1f} s {failure}"
    model.zero_grad(set_to_none=False)
    yield attempt("loss", lambda: f"{eager:.4f} eager, {loss():.4f} compiled")
    yield attempt("first step", lambda: f"{seconds_of_one(step, device):.2f} s")
    after = seconds_of(step, device, sizes.steps)
    yield f"compiled: {1e3 * after:.1f} ms, {before / after:.2f} x"
    times = []
    for n in (2, 3, 5, 9, 17, 33):  # documents in a row
        T = sizes.max_seq_len
        positions = (torch.arange(T) % (T // n + 1)).expand(rows, -1).contiguous()
        times.append(seconds_of_one(training_step(model, here, "muon", replace(batch, position_ids=positions)), device))
    yield f"steps of other numbers of documents, s: {', '.join(f'{one:.2f}' for one in times)}"
    yield f"dynamo: {dict(torch._dynamo.utils.counters['stats'])}"


def seconds_of_one(step: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def decode(device: torch.device, sizes: Sizes) -> Iterator[str]:
    for preset in sizes.decoded:
        model = new_model(preset, device).eval()
        packed = attempt(f"{preset}, packing", lambda model=model: pack_for_decoding(model) and "done")
        yield packed
        forms = {"as trained": model} | ({} if "FAILED" in packed else {"packed": pack_for_decoding(model)})
        for name, form in forms.items():
            for rows in sizes.decoding_rows:
                written = functools.partial(decoding_speed, form, rows, sizes.new_tokens)
                yield attempt(f"{preset} {name}, {rows} rows", written)
        if device.type == "cuda":
            yield attempt(f"{preset}, CUDA graph", functools.partial(replay_speed, [*forms.values()][-1]))


def decoding_speed(model: CausalLM, rows: int, new_tokens: int) -> str:
    prompts, device = [list(range(16, 48))] * rows, model.model.embed_tokens.weight.device
    list(generate(model, prompts, 4, temperature=0))
    seconds = seconds_of_one(lambda: list(generate(model, prompts, new_tokens, temperature=0)), device)
    steps = generate(model, prompts, 4, temperature=0)
    next(steps)  # the prompts
    return f"{rows * new_tokens / seconds:,.0f} tok/s{count_waits(lambda: next(steps), device)}"


@torch.inference_mode()
def replay_speed(model: CausalLM) -> str:
    """An experiment: the kernels of one token, launched as one graph (without a growing cache)."""
    device = model.model.embed_tokens.weight.device
    ids, positions = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.full((1, 1), 40, device=device)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(ids, positions, mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(ids, positions, mask)
    eager, replayed = (seconds_of(call, device, 50) for call in (lambda: model(ids, positions, mask), graph.replay))
    return f"{1e3 * replayed:.3f} ms replayed, {1e3 * eager:.3f} ms launched one by one"


def all_experts(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """Of a `small-moe` layer; nobody visits the last expert."""
    torch.manual_seed(0)
    E, H, m, k, dtype = 16, 512, 352, 3, machine_of(device).dtype
    inputs = [torch.randn(shape) for shape in ((sizes.visitors, H), (sizes.visitors, k), (E, 2 * m, H), (E, H, m))]
    scales = (1.0, 0.3, 0.05, 0.05)
    tokens, weights, gate_up, down = (
        (scale * x).to(device, torch.float32 if x.shape[-1] == k else dtype) for scale, x in zip(scales, inputs)
    )
    chosen = torch.randint(0, E - 1, (sizes.visitors, k)).to(device)
    leaves = [x.detach().requires_grad_(True) for x in (tokens, weights, gate_up, down)]

    def once():
        torch.full((E * 2 * m * H,), torch.nan, dtype=dtype, device=device)  # freed: the kernels get such memory
        out = experts.visit_experts(leaves[0], leaves[1], chosen, leaves[2], leaves[3], "silu")[0]
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)

    results, chooses = {}, experts.groups_at_once
    for name, choice in (("loop", lambda *_: False), ("at once", chooses)):
        experts.groups_at_once = choice
        results[name] = once()
        yield f"{name}: {1e3 * seconds_of(once, device, sizes.steps):.2f} ms"
    errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(results["at once"], results["loop"])]
    names = ("output", "tokens", "weights", "gate_up", "down")
    yield "at once beside the loop: " + ", ".join(f"{name} {error:.0e}" for name, error in zip(names, errors))
    idle = results["at once"][3][-1].abs().max().item()
    yield f"gradient of the expert without tokens: {idle:g} ({'right' if idle == 0 else 'WRONG'})"


PARTS = {  # in the order of what they tell: the function, and seconds
    "machine": (machine, 25),
    "right": (right, 60),
    "run": (real_run, 60),
    "speed": (speed, 70),
    "compile": (compiled, 90),
    "decode": (decode, 35),
    "experts": (all_experts, 30),
}


def print_part(name: str, device_name: str, sizes: Sizes):
    """Of this process: the lines of a part, as they are found."""
    device = choose_device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    for line in PARTS[name][0](device, sizes):
        print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps, ...; cpu: to try this program")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="without it, all")
    parser.add_argument("--seconds", type=above_zero, default=360.0, help="for all parts together")
    parser.add_argument("--output", type=Path, default=Path("out/card.txt"), help="the report")
    parser.add_argument("--in_this_process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = choose_device(args.device)
    if device.type == "cpu" and args.device != "cpu":
        raise UserError("there is no GPU that torch can use, and nothing to measure; --device cpu tries the program")
    if args.in_this_process:
        print_part(args.parts[0], args.device, SHRUNK if device.type == "cpu" else Sizes())
        return
    report, end = Report(args.output), time.monotonic() + args.seconds
    for name in args.parts:
        limit, start = min(PARTS[name][1], end - time.monotonic()), time.monotonic()
        if limit < 5:
            report.line(f"== {name}: left out, no time was left")
            continue
        report.line(f"== {name} (at most {limit:.0f} s)")
        command = [sys.executable, "-m", "bench.card", "--in_this_process", "--device", args.device, "--parts", name]
        run_part(command, limit, report)
        report.line(f"  {time.monotonic() - start:.0f} s")
    print(f"-> {args.output}")


if __name__ == "__main__":
    run(main)
