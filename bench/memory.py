"""Peak memory of a training step on a CPU, beside what training/cost.py estimates.

    python -m bench.memory                                    presets up to base, both optimizers, with checkpoints
    python -m bench.memory --preset small --batch_size 1 8 32
    python -m bench.memory --preset small --plain_loss        cross-entropy of all logits at once

Each line is a process of its own, which first trains a very small model, so that libraries have taken what they keep.
Measured is its peak resident memory (VmHWM) after a few steps less the resident memory (VmRSS) before the model was
built: weights, gradients, optimizer, what the forward pass keeps, and what the allocator loses between them.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product

import torch

from base.cli import HelpFormatter, positive, run
from bench.contest import cpu_machine
from bench.train_speed import made_up_batch, training_step
from model.LMConfig import CARD_PRESETS, PRESETS, LMConfig
from model.model import CausalLM
from training.balance import expert_balance
from training.cost import StepSettings, memory_estimate
from training.loss import LossFunction, apply_head, next_token_loss, plain_cross_entropy_sum
from training.packing import IGNORE


def plain_loss(model: CausalLM, batch):
    """next_token_loss with all logits at once."""
    routing = []
    loss_sum = apply_head(model, batch, plain_cross_entropy_sum, routing)
    return loss_sum + expert_balance(model, batch, routing)[0], int((batch.labels != IGNORE).sum()), {}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def train(config: LMConfig, settings: StepSettings, steps: int, loss_fn: LossFunction) -> CausalLM:
    """A few steps as training/loop.py takes them."""
    torch.manual_seed(0)
    model = CausalLM(config)
    model.model.gradient_checkpointing = settings.grad_checkpointing
    batch = made_up_batch(settings.batch_size, settings.max_seq_len, config.vocab_size)
    step = training_step(model, cpu_machine(), settings.optimizer, batch, loss_fn)
    for _ in range(steps):
        step()
    return model


def peak(preset: str, settings: StepSettings, steps: int, loss_fn: LossFunction) -> tuple[int, int, int]:
    """Bytes measured and estimated; parameters."""
    cpu_machine()
    small = LMConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
    train(small, replace(settings, batch_size=1, max_seq_len=32), steps, loss_fn)
    before = resident("VmRSS")
    model = train(LMConfig(**PRESETS[preset]), settings, steps, loss_fn)
    return resident("VmHWM") - before, memory_estimate(model, settings), model.num_parameters()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    sizes = [name for name in PRESETS if name not in CARD_PRESETS]
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=sizes, help="sizes")
    parser.add_argument("--batch_size", nargs="+", type=positive, default=[8], help="rows")
    parser.add_argument("--max_seq_len", type=positive, default=512, help="tokens in a row")
    parser.add_argument("--optimizer", nargs="+", choices=["adamw", "muon"], default=["adamw", "muon"], help="which")
    parser.add_argument("--steps", type=positive, default=3, help="after which the peak is read")
    parser.add_argument("--plain_loss", action="store_true", help="all logits at once, not in chunks")
    args = parser.parse_args()
    loss_fn = plain_loss if args.plain_loss else next_token_loss
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.steps} steps, float32")
    print("preset      parameters  rows  optimizer  checkpoints   measured  estimated", flush=True)
    choices = product(args.preset, args.batch_size, args.optimizer, (False, True))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for preset, rows, optimizer, checkpoints in choices:
            settings = StepSettings(rows, 1, args.max_seq_len, checkpoints, optimizer)
            measured, estimated, parameters = pool.submit(peak, preset, settings, args.steps, loss_fn).result()
            print(
                f"{preset:10}{parameters / 1e6:10.1f} M{rows:6}  {optimizer:9}"
                f"{'yes' if checkpoints else 'no':>13}{measured / 2**20:8,.0f} MiB"
                f"{estimated / 2**20:7,.0f} MiB {estimated / measured - 1:+.0%}",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
