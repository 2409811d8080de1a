"""Hours, cost and memory of training a preset on a card, by the arithmetic that a run prints: no card is needed.

    python -m bench.estimate
    python -m bench.estimate --preset small base --tokens 2000 --price 0.5 --utilisation 0.3

Floating-point operations are those of step_flops for full rows of one text each; memory is memory_estimate's, with the
number format and the attention that a run on this card takes. `rows` is how many of --max_seq_len tokens fit at once,
and, after the bar, with --grad_checkpointing; 0: not even one. Hours are those of one card, for rows that fit.
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
# compute capability. NVIDIA's data sheets, and for the RTX cards its white papers of GA102 and AD102. The GTX 1650
# computes in float32: 896 cores x 1.665 GHz x 2. The RTX 3050 is that of laptops: 2,048 cores x 1.5 GHz x 2 x 2.
CARDS = {
    "GTX 1650": (2.98, 4, (7, 5)),
    "RTX 3050": (12.3, 4, (8, 6)),
    "RTX 3090": (71, 24, (8, 6)),
    "RTX 4090": (165.2, 24, (8, 9)),
    "T4": (65, 16, (7, 5)),
    "L4": (121, 24, (8, 9)),
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS), help="sizes")
    parser.add_argument("--card", nargs="+", choices=CARDS, default=list(CARDS), help="which")
    parser.add_argument(
        "--tokens", type=above_zero, help="million; without it, 20 per active parameter (arXiv 2203.15556)"
    )
    parser.add_argument("--max_seq_len", type=positive, default=512, help="tokens in a row")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="update rule")
    parser.add_argument("--utilisation", type=above_zero, default=0.35, help="an assumption: share of the peak reached")
    parser.add_argument("--price", type=above_zero, default=1.0, help="an example: of a card's hour, in any currency")
    args = parser.parse_args()
    print(f"assumed: {args.utilisation:.0%} of the peak, {args.price:g} an hour, {ROOM:.0%} of a card's memory")
    for preset in args.preset:
        with torch.device("meta"):  # the sizes alone, no memory
            model = CausalLM(LMConfig(**PRESETS[preset]))
        active = model.num_parameters() - model.num_idle_parameters()
        tokens = args.tokens * 1e6 if args.tokens else 20 * active
        flops = step_flops(model, tokens, tokens * (args.max_seq_len + 1) / 2)
        print(f"\n{preset}: {model.num_parameters() / 1e6:.1f} M, {tokens / 1e6:,.0f} M tokens, {flops:.2e} operations")
        print("  card      memory      hours      cost   rows       | with --grad_checkpointing")
        for card in args.card:
            tera, gigabytes, _ = CARDS[card]
            hours = flops / (args.utilisation * tera * 1e12) / 3600
            rows = [rows_that_fit(model, card, args.max_seq_len, on, args.optimizer) for on in (False, True)]
            time = f"{hours:11.2f}{hours * args.price:10.2f}" if rows[1] else f"{'does not fit':>21}"
            print(f"  {card:10}{gigabytes:3} GB{time}{rows[0]:7,}       |{rows[1]:6,}")


if __name__ == "__main__":
    run(main)
