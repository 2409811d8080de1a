"""Speed of the mixture of experts: beside the dense model with as many weights at work, and beside the usual loop.

    python -m bench.moe_speed --preset mini small
    python -m bench.moe_speed --preset mini --experts 8 16 64       time and memory as experts are added

The usual loop copies every token once for each of its experts, and then each expert picks its copies by a boolean mask
over all of them. The three take turns, step by step, on the same rows; medians are printed.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from base.cli import HelpFormatter, positive, run
from bench.contest import Contest, ratio
from bench.train_speed import jiezi, made_up_batch, measuring_flags
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM, MoEFeedForward
from training.packing import Batch


def masked_loop(layer: MoEFeedForward, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Computes what MoEFeedForward.visit_experts does, with a mask over all visits for each expert."""
    copies = tokens.repeat_interleave(chosen.shape[1], dim=0)  # (M * k, H)
    outputs = torch.empty_like(copies)
    for number, expert in enumerate(layer.experts):
        mask = chosen.flatten() == number
        outputs[mask] = expert(copies[mask])
    return (outputs.view(*chosen.shape, -1) * weights[:, :, None]).sum(1)


def looped(config: LMConfig, batch: Batch) -> Callable[[], None]:
    """A training step of the model with masked_loop in its layers."""
    MoEFeedForward.visit_experts = masked_loop
    return jiezi(config, batch)


def measure(preset: str, rows: int, max_seq_len: int, steps: int):
    dense, moe = LMConfig(**PRESETS[preset]), LMConfig(**PRESETS[f"{preset}-moe"])
    batch = made_up_batch(rows, max_seq_len, moe.vocab_size)
    contestants = {"dense": (jiezi, dense, batch), "experts": (jiezi, moe, batch), "masked loop": (looped, moe, batch)}
    with Contest(contestants) as contest:
        seconds = contest.take_turns(steps).seconds
    for name, (_, config, _) in contestants.items():
        model, typical = CausalLM(config), median(seconds[name])
        active = model.num_parameters() - model.num_idle_parameters()
        sizes = f"{model.num_parameters() / 1e6:6.1f} M, {active / 1e6:5.1f} M active"
        print(f"{preset:8}{name:14}{sizes}  {typical:7.3f} s/step {batch.real_tokens / typical:7,.0f} tok/s")
    over_dense, over_loop = ratio(seconds, "dense", "experts"), ratio(seconds, "masked loop", "experts")
    print(f"{preset:8}experts: {over_dense:.2f} x the dense model's speed, {over_loop:.2f} x the masked loop's")


def grow(preset: str, experts: list[int], rows: int, max_seq_len: int, steps: int):
    """More and more routed experts, of which a token visits as many as before."""
    for n_experts in experts:
        config = LMConfig(**PRESETS[f"{preset}-moe"] | dict(n_routed_experts=n_experts))
        batch = made_up_batch(rows, max_seq_len, config.vocab_size)
        contestants = {"experts": (jiezi, config, batch), "masked loop": (looped, config, batch)}
        with Contest(contestants) as contest:
            seconds, memory, *_ = contest.take_turns(steps)
        print(
            f"{preset:8}{n_experts:4} experts {CausalLM(config).num_parameters() / 1e6:7.1f} M "
            f"{median(seconds['experts']):7.3f} s/step {memory['experts']:6.2f} GiB, "
            f"{ratio(seconds, 'masked loop', 'experts'):.2f} x the masked loop's speed",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    sizes = [name for name in PRESETS if f"{name}-moe" in PRESETS]
    parser.add_argument("--preset", nargs="+", choices=sizes, default=["mini", "small"], help="sizes")
    parser.add_argument("--experts", nargs="+", type=positive, help="routed experts: shows the growth, and leaves")
    args = measuring_flags(parser)
    sizes = args.batch_size, args.max_seq_len, args.steps
    for preset in args.preset:
        grow(preset, args.experts, *sizes) if args.experts else measure(preset, *sizes)


if __name__ == "__main__":
    run(main)
