"""The flags that all stages share, and the settings that the parts of a run get from them."""

import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from base.cli import HelpFormatter, above_zero, fraction, natural, not_negative, positive, positive_or_auto
from corpus.hub import model_folder
from model.chat import load_tokenizer
from model.checkpoint import load_outline
from model.LMConfig import PRESETS, parse_scaling
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
    "--lora_alpha": dict(type=above_zero, help="alpha: the adapters are scaled by alpha / r; default: 2 r"),
    "--lora_dropout": dict(type=fraction, default=0.0, help="fraction of an adapter's inputs set to 0 in training"),
    "--lora_targets": dict(
        nargs="+", metavar="NAME", help="matrices that get an adapter; default: all (with experts: those of attention)"
    ),
}

SMALL = 26e6  # parameters of the preset

ROPE_FLAGS = {  # for the stages that train all weights on texts or chats, and for eval.py
    "--rope_scaling": dict(
        type=parse_scaling,
        metavar="TYPE:FACTOR",
        help="scale RoPE to a context of FACTOR times the trained length: yarn:4, or yarn:4:512 with that length; "
        "TYPE: yarn, linear or llama3",
    ),
}


def parse_flags(description: str, stage_flags: dict[str, dict] | None = None, **stage_defaults) -> argparse.Namespace:
    """The flags of every stage and those of one: name -> options of argparse's add_argument.

    Values measured for a preset replace the stage's defaults; the command line replaces both.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = parser.add_argument_group("what").add_argument
    flag("--data", nargs="+", metavar="[NAME=]DIR", help="folders of data_process.py; NAME: by default, the folder's")
    flag(
        "--mix",
        nargs="+",
        metavar="NAME=WEIGHT",
        help="weights of the folders, or a JSON file; default: each is read once per epoch",
    )
    flag("--init_from", type=Path, help="model to start from: a folder, or a hub's name; default: random weights")
    flag("--out_dir", type=Path, help="where the model is saved")
    flag(
        "--resume",
        nargs="?",
        const="must",
        choices=["must", "auto"],
        help="continue the run in --out_dir exactly where it stopped; auto: if there is one, else start",
    )
    flag("--preset", choices=PRESETS, help="a size from model/LMConfig.py; default: the values there")
    flag("--seed", type=natural, default=0, help="of the initial weights and of the order of the samples")
    flag = parser.add_argument_group("how long: the first limit ends the run, and the cosine with it").add_argument
    flag("--epochs", type=positive, default=1, help="passes over the data")
    flag("--max_steps", type=positive, help="optimizer steps")
    flag("--max_minutes", type=above_zero, help="minutes of training")
    flag = parser.add_argument_group("a step").add_argument
    flag(
        "--batch_size",
        type=positive_or_auto,
        default=8,
        help="rows per process in a forward and backward pass; auto: as many of a step's rows as fit in memory",
    )
    flag("--accumulation_steps", type=positive, default=1, help="gradient accumulation: such passes per optimizer step")
    flag("--max_seq_len", type=positive, default=512, help="tokens per row")
    flag("--learning_rate", type=above_zero, default=1e-4, help="after the warm-up")
    flag("--min_learning_rate", type=not_negative, default=1e-5, help="at the end of the cosine")
    flag("--embedding_factor", type=above_zero, default=1.0, help="how much faster an untied embedding learns")
    flag("--warmup_steps", type=natural, default=100, help="steps of the linear warm-up")
    flag("--weight_decay", type=not_negative, default=0.1, help="of the matrices")
    flag("--grad_clip", type=above_zero, default=1.0, help="largest norm of the gradient")
    flag("--optimizer", choices=["adamw", "muon"], default="adamw", help="update rule")
    flag = parser.add_argument_group("the machine").add_argument
    flag("--nproc_per_node", type=positive, default=1, help="processes to start on this machine, as torchrun does")
    flag("--device", default="auto", help="auto, cpu, cuda, mps, or another that torch has")
    flag("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of matrix products")
    flag(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile: a slower start, faster steps on a GPU; default: in longer runs on a GPU that has Triton",
    )
    flag(
        "--grad_checkpointing",
        action=argparse.BooleanOptionalAction,
        help="gradient checkpointing: much less memory, a third more work; default: where a step needs it to fit",
    )
    flag("--shard", action="store_true", help="FSDP: shard weights, gradients and optimizer over the processes")
    flag = parser.add_argument_group("logging and saving").add_argument
    flag("--log_interval", type=positive, default=10, help="steps between log lines")
    flag("--eval_interval", type=positive, default=200, help="steps between validations; two more at 20 and 50")
    flag("--eval_rows", type=positive, default=64, help="rows of each folder in a validation; the last takes all")
    flag("--save_interval", type=positive, default=200, help="steps between checkpoints")
    flag("--wandb", choices=["disabled", "offline", "online"], default="disabled", help="tracking")
    flag("--tensorboard", action="store_true", help="write scalars for TensorBoard, in a folder beside --out_dir")
    flag = parser.add_argument_group("this stage").add_argument
    for name, options in (stage_flags or {}).items():
        flag(name, **options)
    parser.set_defaults(rope_scaling=None, **stage_defaults)
    known = parser.parse_known_args()[0]
    init_from = model_folder(known.init_from)
    parser.set_defaults(**TRAINING_FLAGS.get(known.preset, {}))
    parser.set_defaults(**open_model_rates(init_from, stage_defaults))
    args = parser.parse_args()
    if args.min_learning_rate > args.learning_rate:
        parser.error(f"--min_learning_rate {args.min_learning_rate} is above --learning_rate {args.learning_rate}")
    args.fit_batch = args.batch_size == "auto"
    if args.fit_batch and args.shard:
        parser.error("--batch_size auto tries what one process can hold; with --shard give a number")
    args.init_from = init_from
    if "teacher" in args:
        args.teacher = model_folder(args.teacher)
    if args.nproc_per_node > 1 and "RANK" not in os.environ:
        launch(args.nproc_per_node)
    if args.fit_batch:  # of a step of the usual size
        args.batch_size = parser.get_default("batch_size")
    return args


def open_model_rates(folder: Path | None, stage_defaults: dict) -> dict[str, float]:
    """Default learning rates for an open model: the stage's, which were measured with Jiezi's `small`, multiplied by
    (26 million / parameters)^(2/3); docs/open_models_en.md has the measurements. {} for Jiezi's own models."""
    if folder is None or not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return {}
    if load_tokenizer(folder).is_own:
        return {}
    factor = min(1.0, (SMALL / load_outline(folder).num_parameters()) ** (2 / 3))
    rates = {name: stage_defaults[name] for name in ("learning_rate", "min_learning_rate") if name in stage_defaults}
    return {name: float(f"{factor * rate:.2g}") for name, rate in rates.items()}


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
    rope_scaling: dict | None
    compile: bool | None
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
