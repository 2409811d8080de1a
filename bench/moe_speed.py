"""Speed of the mixture of experts: beside the dense model with as many weights at work, and beside the usual loop.

    python -m bench.moe_speed --preset mini small
    python -m bench.moe_speed --preset mini --experts 8 16 64       time and memory as experts are added

The usual loop copies every token once for each of its experts, and then each expert picks its copies by a boolean mask
over all of them. The three take turns, step by step, on the same rows; medians are printed.
"""

import argparse
import copy
import multiprocessing
import statistics
from functools import partial

import torch
from torch import Tensor

from bench.train_speed import cpu_machine, made_up_batch, measuring_flags, ratio, step_of, take_turns
from model.flags import HelpFormatter, positive
from model.LMConfig import PRESETS, LMConfig
from model.machine import Machine
from model.model import CausalLM, MoEFeedForward
from model.training import run


def masked_loop(layer: MoEFeedForward, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Computes what MoEFeedForward.visit_experts does, with a mask over all visits for each expert."""
    copies = tokens.repeat_interleave(chosen.shape[1], dim=0)  # (M * k, H)
    outputs = torch.empty_like(copies)
    for number, expert in enumerate(layer.experts):
        mask = chosen.flatten() == number
        outputs[mask] = expert(copies[mask])
    return (outputs.view(*chosen.shape, -1) * weights[:, :, None]).sum(1)


def measure(preset: str, args: argparse.Namespace, machine: Machine):
    batch = made_up_batch(args.batch_size, args.max_seq_len, LMConfig().vocab_size)
    torch.manual_seed(0)
    dense, moe = CausalLM(LMConfig(**PRESETS[preset])), CausalLM(LMConfig(**PRESETS[f"{preset}-moe"]))
    looped = copy.deepcopy(moe)
    for layer in looped.model.layers:
        if layer.has_experts:
            layer.mlp.visit_experts = partial(masked_loop, layer.mlp)
    models = {"dense": dense, "experts": moe, "masked loop": looped}
    contestants = {name: (model, step_of(model, batch)) for name, model in models.items()}
    seconds, _ = take_turns(contestants, args.steps, machine)
    for name, times in seconds.items():
        at_work = models[name].num_parameters() - models[name].num_idle_parameters()
        sizes = f"{models[name].num_parameters() / 1e6:6.1f} M, {at_work / 1e6:5.1f} M at work"
        median = statistics.median(times)
        print(f"{preset:8}{name:14}{sizes}  {median:7.3f} s/step {batch.real_tokens / median:7,.0f} tok/s")
    over_dense, over_loop = ratio(seconds, "dense", "experts"), ratio(seconds, "masked loop", "experts")
    print(f"{preset:8}experts: {over_dense:.2f} x the dense model's speed, {over_loop:.2f} x the masked loop's")


def grow(preset: str, n_experts: int, args: argparse.Namespace):
    """In a process of its own, whose peak memory is that of this model."""
    import resource

    machine = cpu_machine()
    torch.manual_seed(0)
    model = CausalLM(LMConfig(**PRESETS[f"{preset}-moe"] | dict(n_routed_experts=n_experts)))
    batch = made_up_batch(args.batch_size, args.max_seq_len, model.config.vocab_size)
    seconds, _ = take_turns({"experts": (model, step_of(model, batch))}, args.steps, machine)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{preset:8}{n_experts:4} experts {model.num_parameters() / 1e6:7.1f} M "
        f"{statistics.median(seconds['experts']):7.3f} s/step {memory:6.2f} GiB",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    sizes = [name for name in PRESETS if f"{name}-moe" in PRESETS]
    parser.add_argument("--preset", nargs="+", choices=sizes, default=["mini", "small"], help="sizes")
    parser.add_argument("--experts", nargs="+", type=positive, help="routed experts: shows the growth, and leaves")
    args = measuring_flags(parser)
    if args.experts:
        for preset in args.preset:
            for n_experts in args.experts:
                process = multiprocessing.get_context("spawn").Process(target=grow, args=(preset, n_experts, args))
                process.start()
                process.join()
        return
    machine = cpu_machine()
    for preset in args.preset:
        measure(preset, args, machine)


if __name__ == "__main__":
    run(main)
