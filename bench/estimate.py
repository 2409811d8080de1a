"""Hours, cost and memory of training a preset on a GPU, by the arithmetic that a run prints: no GPU is needed.

    python -m bench.estimate                                            all dense presets and GPUs, on one screen
    python -m bench.estimate --preset small base --tokens 2000 --price 0.5 --utilisation 0.3

Floating-point operations are those of step_flops for full rows of one text each; memory is memory_estimate's, with the
precision and the attention that a run on this GPU takes. `rows` is how many of --max_seq_len tokens fit at once. Hours
are those of one GPU. With --preset or --card: also cost, and the rows that fit with --grad_checkpointing.
"""

import argparse

import torch

from base.cli import HelpFormatter, above_zero, positive, run
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from model.operators import attention_kind
from training.cost import ROOM, StepSettings, memory_estimate, step_flops
from training.machine import auto_dtype

# Dense matrix products a second in the format that auto_dtype chooses, with sums in 32 bits, in 10^12; GB of memory;
# compute capability. NVIDIA's data sheets, and for the RTX cards its white papers of GA102 and AD102: twice the rate of
# float32 outside the tensor cores. The GTX 1650 computes in float32: 896 cores x 1.665 GHz x 2. The RTX 3050 is that of
# laptops: 2,048 cores x 1.5 GHz x 2 x 2.
CARDS = {
    "GTX 1650": (2.98, 4, (7, 5)),
    "RTX 3050": (12.3, 4, (8, 6)),
    "RTX 4060": (30.2, 8, (8, 9)),
    "RTX 3070": (40.6, 8, (8, 6)),
    "RTX 3060": (25.5, 12, (8, 6)),
    "T4": (65, 16, (7, 5)),
    "L4": (121, 24, (8, 9)),
    "RTX 3090": (71, 24, (8, 6)),
    "RTX 4090": (165.2, 24, (8, 9)),
    "A100": (312, 40, (8, 0)),
    "H100": (989, 80, (9, 0)),
}


def rows_that_fit(model: CausalLM, card: str, max_seq_len: int, grad_checkpointing: bool, optimizer: str) -> int:
    """The largest power of two, up to 1,024, of rows in a forward and backward pass; 0 if none fits."""
    _, gigabytes, capability = CARDS[card]
    dtype = auto_dtype(card, capability)
    attention = attention_kind(torch.device("cuda"), dtype, model.config.head_dim, capability)
    rows = [2**n for n in range(11)]
    settings = [StepSettings(n, 1, max_seq_len, grad_checkpointing, optimizer) for n in rows]
    memory = [memory_estimate(model, one, dtype.itemsize, attention) for one in settings]
    return max((n for n, needed in zip(rows, memory) if needed <= ROOM * gigabytes * 1e9), default=0)


class Estimate:
    """Of a preset. million_tokens: None for 20 per active parameter."""

    def __init__(self, preset: str, million_tokens: float | None, max_seq_len: int, optimizer: str, utilisation: float):
        with torch.device("meta"):  # the sizes alone, no memory
            self.model = CausalLM(LMConfig(**PRESETS[preset]))
        self.preset, self.max_seq_len, self.optimizer, self.utilisation = preset, max_seq_len, optimizer, utilisation
        active = self.model.num_parameters() - self.model.num_idle_parameters()
        self.tokens = million_tokens * 1e6 if million_tokens else 20 * active
        self.flops = step_flops(self.model, self.tokens, self.tokens * (max_seq_len + 1) / 2)

    def hours(self, card: str) -> float:
        return self.flops / (self.utilisation * CARDS[card][0] * 1e12) / 3600

    def rows(self, card: str, grad_checkpointing: bool) -> int:
        return rows_that_fit(self.model, card, self.max_seq_len, grad_checkpointing, self.optimizer)

    def cell(self, card: str) -> str:
        """Hours and rows, 11 characters."""
        if rows := self.rows(card, False):
            return f"{significant(self.hours(card)):>6} {rows:<4}"
        rows = self.rows(card, True)
        return f"{significant(self.hours(card)):>6} {f'{rows}c':<4}" if rows else f"{'-':>6}     "


def significant(hours: float) -> str:
    return f"{hours:,.2f}" if hours < 1 else f"{hours:,.1f}" if hours < 10 else f"{hours:,.0f}"


def print_overview(estimates: list[Estimate], price: str):
    print(f"cost: {price} times the hours (--price, --currency)")
    print("hours, rows at a time; c: only with --grad_checkpointing; -: does not fit")
    print("GPU        GB" + "".join(f"{one.preset:>8}   " for one in estimates).rstrip())
    for card, (_, gigabytes, _) in CARDS.items():
        print(f"{card:10}{gigabytes:3}{''.join(one.cell(card) for one in estimates)}".rstrip())


def print_details(estimate: Estimate, cards: list[str], price: float, currency: str):
    model = estimate.model
    print(
        f"\n{estimate.preset}: {model.num_parameters() / 1e6:.1f} M, {estimate.tokens / 1e6:,.0f} M tokens, "
        f"{estimate.flops:.2e} operations"
    )
    print(f"  GPU       memory      hours{currency:>10}   rows       | with --grad_checkpointing")
    for card in cards:
        hours, rows = estimate.hours(card), [estimate.rows(card, on) for on in (False, True)]
        time = f"{hours:11.2f}{hours * price:10.2f}" if rows[1] else f"{'does not fit':>21}"
        print(f"  {card:10}{CARDS[card][1]:3} GB{time}{rows[0]:7,}       |{rows[1]:6,}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, help="sizes; default: an overview of the dense ones")
    parser.add_argument("--card", nargs="+", choices=CARDS, help="which GPUs; default: all")
    parser.add_argument(
        "--tokens", type=above_zero, help="million; without it, 20 per active parameter (arXiv 2203.15556)"
    )
    parser.add_argument("--max_seq_len", type=positive, default=512, help="tokens in a row")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="update rule")
    parser.add_argument("--utilisation", type=above_zero, default=0.35, help="an assumption: share of the peak reached")
    parser.add_argument("--price", type=above_zero, default=1.0, help="an example: of a GPU's hour, in --currency")
    parser.add_argument("--currency", default="USD", help="of --price")
    args = parser.parse_args()
    tokens = f"{args.tokens:g} M tokens" if args.tokens else "20 tokens a parameter"
    print(f"assumed: {args.utilisation:.0%} of the peak, {ROOM:.0%} of the memory, {tokens}, {args.optimizer}")
    overview = not (args.preset or args.card)
    presets = args.preset or [preset for preset in PRESETS if not (overview and preset.endswith("-moe"))]
    settings = (args.tokens, args.max_seq_len, args.optimizer, args.utilisation)
    estimates = [Estimate(preset, *settings) for preset in presets]
    if overview:
        print_overview(estimates, f"{args.price:g} {args.currency}")
        return
    for one in estimates:
        print_details(one, args.card or list(CARDS), args.price, args.currency)


if __name__ == "__main__":
    run(main)
