"""The flags that all stages share, and the settings that the parts of a run get from them."""

import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from base.cli import HelpFormatter, above_zero, fraction, natural, not_negative, positive, positive_or_auto
from model.LMConfig import PRESETS
from training.cost import StepSettings
from training.log import LogSettings
from training.machine import launch
from training.optimizer import OptimizerSettings
from training.schedule import Schedule
from training.state import SavingSettings

T = TypeVar("T")

# Flags that were measured to pretrain a size better than the defaults of 1-pretrain.py; docs/loss.md has the runs.
# Those of CARD_PRESETS were not: they are below the line on which the measured rates fall with the width.
TRAINING_FLAGS = {
    preset: dict(optimizer="muon", learning_rate=rate, min_learning_rate=rate / 100, warmup_steps=20)
    for preset, rate in {
        **dict(tiny=1e-2, mini=6e-3, small=4e-3, base=3e-3),  # measured
        **dict(large=2e-3, xl=1e-3),
    }.items()
}
TRAINING_FLAGS |= {f"{preset}-moe": flags for preset, flags in TRAINING_FLAGS.items()}

LORA_FLAGS = {  # for the stages that can train an adapter: name -> options of argparse's add_argument
    "--lora_rank": dict(type=natural, help="rank r of the adapters"),
    "--lora_alpha": dict(type=above_zero, help="weight of the adapters, divided by the rank; without it, 2 r"),
    "--lora_dropout": dict(type=fraction, default=0.0, help="fraction of an adapter's inputs set to 0 in training"),
    "--lora_targets": dict(
        nargs="+", metavar="NAME", help="layers that get an adapter; without it, all (with experts, those of attention)"
    ),
}


def parse_flags(description: str, stage_flags: dict[str, dict] | None = None, **stage_defaults) -> argparse.Namespace:
    """The flags of every stage and those of one: name -> options of argparse's add_argument.

    Values measured for a preset replace the stage's defaults; the command line replaces both.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    group = parser.add_argument_group("what")
    group.add_argument(
        "--data",
        nargs="+",
        metavar="[NAME=]DIR",
        help="folders made by data_process.py; without NAME=, each has its own",
    )
    group.add_argument(
        "--mix",
        nargs="+",
        metavar="NAME=WEIGHT",
        help="weights of the folders, or a file with {NAME: WEIGHT}; without it, each is read once per epoch",
    )
    group.add_argument("--init_from", type=Path, help="model to start from; without it, random weights")
    group.add_argument("--out_dir", type=Path, help="where the model goes")
    group.add_argument(
        "--resume",
        nargs="?",
        const="must",
        choices=["must", "auto"],
        help="go on exactly where the run in --out_dir stopped; auto: if there is one, else begin",
    )
    group.add_argument("--preset", choices=PRESETS, help="a size from model/LMConfig.py; without it, its defaults")
    group.add_argument("--seed", type=natural, default=0, help="of the first weights and of the order of the samples")
    group = parser.add_argument_group("how long: what comes first ends the run, and the cosine with it")
    group.add_argument("--epochs", type=positive, default=1, help="passes over the data")
    group.add_argument("--max_steps", type=positive, help="optimizer steps")
    group.add_argument("--max_minutes", type=above_zero, help="minutes of training")
    group = parser.add_argument_group("a step")
    group.add_argument(
        "--batch_size",
        type=positive_or_auto,
        default=8,
        help="rows per process in a forward and backward pass; auto: of a step's rows as many as fit",
    )
    group.add_argument("--accumulation_steps", type=positive, default=1, help="such passes in an optimizer step")
    group.add_argument("--max_seq_len", type=positive, default=512, help="tokens in a row")
    group.add_argument("--learning_rate", type=above_zero, default=1e-4, help="after the warm-up")
    group.add_argument("--min_learning_rate", type=not_negative, default=1e-5, help="at the end of the cosine")
    group.add_argument(
        "--embedding_factor", type=above_zero, default=1.0, help="how much faster an embedding learns, unless tied"
    )
    group.add_argument("--warmup_steps", type=natural, default=100, help="steps of linear rise")
    group.add_argument("--weight_decay", type=not_negative, default=0.1, help="of the matrices")
    group.add_argument("--grad_clip", type=above_zero, default=1.0, help="largest norm of the gradient")
    group.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="update rule")
    group = parser.add_argument_group("the machine")
    group.add_argument("--nproc_per_node", type=positive, default=1, help="processes to start, as torchrun does")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    group.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of matrix products"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile: starts slower, runs faster on a GPU")
    group.add_argument("--grad_checkpointing", action="store_true", help="much less memory for a third more work")
    group.add_argument(
        "--shard", action="store_true", help="spread weights, gradients and optimizer over the processes: less memory"
    )
    group = parser.add_argument_group("what is shown and kept")
    group.add_argument("--log_interval", type=positive, default=10, help="steps between two lines of the log")
    group.add_argument("--eval_interval", type=positive, default=200, help="steps between two validations")
    group.add_argument(
        "--eval_rows", type=positive, default=64, help="rows of a validation, of each folder; the last one takes all"
    )
    group.add_argument("--save_interval", type=positive, default=200, help="steps between two checkpoints")
    group.add_argument("--wandb", choices=["disabled", "offline", "online"], default="disabled", help="tracking")
    group.add_argument("--tensorboard", action="store_true", help="scalars for TensorBoard, beside --out_dir")
    group = parser.add_argument_group("this stage")
    for name, options in (stage_flags or {}).items():
        group.add_argument(name, **options)
    parser.set_defaults(**stage_defaults)
    parser.set_defaults(**TRAINING_FLAGS.get(parser.parse_known_args()[0].preset, {}))
    args = parser.parse_args()
    if args.min_learning_rate > args.learning_rate:
        parser.error(f"--min_learning_rate {args.min_learning_rate} is above --learning_rate {args.learning_rate}")
    if args.nproc_per_node > 1 and "RANK" not in os.environ:
        launch(args.nproc_per_node)
    args.fit_batch = args.batch_size == "auto"
    if args.fit_batch and args.shard:
        parser.error("--batch_size auto tries what one process can hold; with --shard give a number")
    if args.fit_batch:  # of a step of the usual size
        args.batch_size = parser.get_default("batch_size")
    return args


@dataclass(frozen=True)
class RunSettings:
    """What training/loop.py needs to know, by the part that uses it."""

    schedule: Schedule
    optimizer: OptimizerSettings
    step: StepSettings
    saving: SavingSettings
    log: LogSettings
    seed: int
    preset: str | None
    compile: bool
    fit_batch: bool
    log_interval: int
    eval_interval: int
    eval_rows: int
    flags: dict  # all of them, for run.json


def run_settings(args: argparse.Namespace) -> RunSettings:
    return fill(RunSettings, args, flags=dict(vars(args)))


def fill(settings: type[T], args: argparse.Namespace, **more) -> T:
    """A dataclass of settings, and those in it, from `more` or else from the flags of the same names."""
    for field in fields(settings):
        if field.name not in more:
            nested = hasattr(field.type, "__dataclass_fields__")
            more[field.name] = fill(field.type, args) if nested else getattr(args, field.name)
    return settings(**more)
