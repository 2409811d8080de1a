"""What a graphics card makes of this code, in five minutes: is all of it right, how fast is it, how much memory.

    python -m bench.card                       every preset that fits; writes out/card.txt, a report to send
    python -m bench.card --preset small base
    python -m bench.card --device cpu          tries the program itself with `tiny`, where there is no card

Right: loss and gradients of small models in each number format, with and without checkpoints and experts, beside those
of a CPU in float32. Fast: training steps as training/loop.py takes them, of as many rows as fit (up to --batch_size),
and decoding; memory beside the estimate that a run prints. Waits: how often a step asks the card for a number.
"""

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from base.cli import HelpFormatter, UserError, positive, run
from bench.train_speed import made_up_batch, training_step
from engine.generation import generate
from model.device import choose_device, keep_freed_memory
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from model.operators import card_capability
from training.cost import ROOM, StepSettings, fits_by_estimate, fits_card, largest_divisor, memory_estimate, step_flops
from training.loss import next_token_loss
from training.machine import Machine, auto_dtype, matmul_rate
from training.packing import Batch

# How far gradients may be from those of a CPU in float32, in units of their length. TF32 has 10 bits, as float16.
LIMITS = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 6e-2}


def gradients_of(config: LMConfig, machine: Machine, batch: Batch, checkpoints: bool) -> tuple[float, torch.Tensor]:
    """Loss a token, and all gradients in one, on the CPU; weights are the same on every machine."""
    torch.manual_seed(0)
    model = CausalLM(config).to(machine.device).train()
    model.model.gradient_checkpointing = checkpoints
    with machine.autocast():
        loss_sum, tokens, _ = next_token_loss(model, batch.to(machine.device))
    (loss_sum / tokens).backward()
    return loss_sum.item() / tokens, torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def check(device: torch.device, formats: list[torch.dtype]) -> Iterator[str]:
    """A line for each path: how far it is from a CPU in float32."""
    exact = Machine(0, 1, torch.device("cpu"), torch.float32)
    for preset in ("tiny", "tiny-moe"):
        config = LMConfig(**PRESETS[preset])
        batch = made_up_batch(4, 256, config.vocab_size)
        expected_loss, expected = gradients_of(config, exact, batch, checkpoints=False)
        for dtype in formats:
            machine = Machine(0, 1, device, dtype)
            for checkpoints in (False, True):
                loss, found = gradients_of(config, machine, batch, checkpoints)
                error = ((found - expected).norm() / expected.norm()).item()
                verdict = "right" if error < LIMITS[dtype] and abs(loss - expected_loss) < 0.05 else "WRONG"
                what = f"{preset}, {str(dtype).removeprefix('torch.')}{', checkpoints' if checkpoints else ''}"
                yield f"  {what:36}loss off by {abs(loss - expected_loss):.5f}, gradients by {error:.1e}   {verdict}"


def count_waits(step: Callable[[], None], device: torch.device) -> str:
    """How often a step waits for a card, by torch's own count."""
    if device.type != "cuda":
        return ""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f", {sum('synchroniz' in str(one.message) for one in seen)} waits a step"


def measure(preset: str, machine: Machine, settings: StepSettings, steps: int, peak: float) -> str:
    """A line: rows (up to settings.batch_size), tokens/s, MFU, memory measured and estimated, waits, decoding."""
    config, device = LMConfig(**PRESETS[preset]), machine.device
    on_card = device.type == "cuda"
    with torch.device("meta"):
        sizes = CausalLM(config)
    if on_card:  # before anything is made: is there room for a single row?
        needed = memory_estimate(sizes, replace(settings, batch_size=1), machine.dtype.itemsize, "flash")
        if needed > ROOM * torch.cuda.get_device_properties(device).total_memory:
            return f"  {preset:10} does not fit"
    torch.manual_seed(0)
    with device:
        model = CausalLM(config).train()
    fits = fits_card if on_card else fits_by_estimate
    rows = largest_divisor(settings.batch_size, lambda n: fits(replace(settings, batch_size=n), machine, model))
    settings = replace(settings, batch_size=rows)
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)
    batch = made_up_batch(rows, settings.max_seq_len, config.vocab_size)
    step, seconds = training_step(model, machine, settings.optimizer, batch), []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        if on_card:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    typical = statistics.median(seconds[2:])
    mfu = step_flops(model, batch.real_tokens, batch.attention_pairs) / typical / peak
    with machine.autocast():
        estimate = memory_estimate(model, settings, machine.dtype.itemsize, model.model.attention_kind())
    memory = f"estimate {estimate / 1e9:.2f} GB"
    if on_card:
        memory = f"{torch.cuda.max_memory_reserved(device) / 1e9:.2f} GB, {memory} with the driver's"
    waits = count_waits(step, device)
    return (
        f"  {preset:10}{rows:4} rows {batch.real_tokens / typical:10,.0f} tok/s {mfu:6.1%} of the peak, "
        f"{memory}{waits}; decodes {decoding_speed(model.eval(), machine):,.0f} tok/s"
    )


def decoding_speed(model: CausalLM, machine: Machine, tokens: int = 64) -> float:
    """Tokens a second of one text, weights as they are."""
    prompt = [list(range(16, 48))]
    with machine.autocast():
        list(generate(model, prompt, 4, temperature=0))
        start = time.perf_counter()
        list(generate(model, prompt, tokens, temperature=0))
    return tokens / (time.perf_counter() - start)


def report(device_name: str, presets: list[str], settings: StepSettings, steps: int) -> Iterator[str]:
    """Line by line, as it is measured."""
    device = choose_device(device_name)
    name, capability = platform.processor() or platform.machine(), card_capability(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        memory = torch.cuda.get_device_properties(device).total_memory
        name += f", compute capability {capability[0]}.{capability[1]}, {memory / 1e9:.1f} GB"
    else:
        keep_freed_memory()
    yield f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}, {platform.system()}"
    chosen = auto_dtype(name, capability)
    machine = Machine(0, 1, device, chosen)
    peak = matmul_rate(machine)
    yield f"--dtype auto is {str(chosen).removeprefix('torch.')}; plain products reach {peak / 1e12:.2f} TFLOP/s"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if device.type == "cuda" and dtype != chosen:
            yield f"  in {str(dtype).removeprefix('torch.')} {matmul_rate(Machine(0, 1, device, dtype)) / 1e12:.2f}"
    yield "right, beside a CPU in float32:"
    yield from check(device, sorted({torch.float32, chosen}, key=str))
    yield f"training, {settings.max_seq_len} tokens a row, {settings.optimizer}:"
    for preset in presets:
        try:
            yield measure(preset, machine, settings, steps, peak)
        except torch.OutOfMemoryError:
            yield f"  {preset:10} out of memory, though the estimate says that it fits"
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, help="sizes; without it, on a card all that fit")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this program")
    parser.add_argument("--batch_size", type=positive, default=32, help="the most rows at a time")
    parser.add_argument("--max_seq_len", type=positive, default=512, help="tokens in a row")
    parser.add_argument("--steps", type=positive, default=10, help="measured steps of each preset")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon", help="update rule")
    parser.add_argument("--output", type=Path, default=Path("out/card.txt"), help="the report")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no card that torch can use, and nothing to measure; --device cpu tries the program")
    args.preset = args.preset or (list(PRESETS) if args.device == "cuda" else ["tiny"])
    settings = StepSettings(args.batch_size, 1, args.max_seq_len, False, args.optimizer)
    lines = []
    for line in report(args.device, args.preset, settings, args.steps):
        print(line, flush=True)
        lines.append(line + "\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(lines), "utf-8")
    print(f"-> {args.output}")


if __name__ == "__main__":
    run(main)
