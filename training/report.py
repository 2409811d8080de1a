"""What a run says of itself: before its first step, and at its end; and what does not fit together."""

import math
import os
from pathlib import Path

from base.cli import LESS_MEMORY, UserError, command_line, next_step
from corpus.prepared import META
from model.chat import load_tokenizer, tokenizer_fingerprint
from model.LMConfig import LMConfig
from model.model import CausalLM
from training.cost import StepSettings, memory_estimate, memory_of_machine, step_flops
from training.flags import RunSettings
from training.log import Log, duration
from training.machine import Machine
from training.packing import PackedDataset
from training.schedule import Schedule, TrainState

USUAL_MFU = 0.6  # of the rate of plain matrix products, for the estimate of the time


def check_compatible(settings: RunSettings, config: LMConfig, data: PackedDataset):
    """UserError where data, model and flags do not fit together."""
    if settings.preset and settings.saving.init_from:
        raise UserError(f"--preset is the size of a new model; this one has that of {settings.saving.init_from}")
    check_data(settings.saving.init_from, config, data)


def check_data(init_from: Path | None, config: LMConfig, data: PackedDataset):
    """UserError where a model, new or from a folder, cannot be trained on the data."""
    if init_from:
        check_tokenizer(init_from, data)
    spare = data.vocab and init_from and config.vocab_size > data.vocab_size  # an open model may have spare rows
    fits = config.vocab_size == data.vocab_size or spare
    if not fits:
        raise UserError(
            f"{data.paths} was made with a vocabulary of {data.vocab_size}, the model has vocab_size "
            f"{config.vocab_size}; prepare the data again, or set vocab_size in model/LMConfig.py"
        )
    if data.max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {data.max_seq_len} is above the model's max_position_embeddings "
            f"({config.max_position_embeddings})"
        )


def check_tokenizer(init_from: Path, data: PackedDataset):
    """UserError where the data have another tokenizer or chat template than the model."""
    first = next(iter(data.folders.values()))
    again = f"prepare the data again with: python data_process.py {first.kind} YOUR_FILES --tokenizer {init_from} "
    again += f"--output {first.folder}"
    if tokenizer_fingerprint(init_from) != data.tokenizer_sha256:
        raise UserError(f"{data.paths} was made with another tokenizer than the one in {init_from}; {again}")
    tokenizer = load_tokenizer(init_from)
    is_other = tokenizer.template and tokenizer.template.sha256 != data.chat_template_sha256
    if data.chat_template_sha256 and is_other and tokenizer.brings_template:
        raise UserError(f"{data.paths} was made with another chat template than the one in {init_from}; {again}")


def check_first_loss(log: Log, vocab_size: int):
    """Warns unless the first loss is near ln(vocab_size): random weights give every token the same probability."""
    loss = log.records[-1].get("val_cross_entropy", log.records[-1]["val_loss"])
    expected = math.log(vocab_size)
    log.info(f"first validation loss {loss:.3f}; a model that knows nothing has ln({vocab_size}) = {expected:.3f}")
    if not abs(loss - expected) < 0.5:
        log.info("warning: they should be close; look for wrong labels, a wrong vocabulary, or large initial weights")


def run_report(
    settings: RunSettings,
    step: StepSettings,
    machine: Machine,
    model: CausalLM,
    data: PackedDataset,
    peak: float,
    minutes: float,
) -> str:
    """What is trained, on what, in how much memory and time. peak: FLOP/s of one process."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = model.num_parameters()
    active = f", {total - model.num_idle_parameters():,} active per token" if model.config.use_moe else ""
    with machine.autocast():
        attention = model.model.attention_kind()
    return "\n".join(
        [
            f"model    {total:,} parameters{active}, {trained / total:.1%} of them trained",
            *data_lines(settings.seed, data),
            f"machine  {machine.world_size} x {machine.device.type}, {str(machine.dtype).removeprefix('torch.')}, "
            f"matrix products at {peak / 1e9:,.0f} GFLOP/s each, attention {attention}",
            step_line(step, settings.fit_batch, machine, model, attention),
            f"time     about {duration(minutes)}",
        ]
    )


def data_lines(seed: int, data: PackedDataset) -> list[str]:
    """A line for all, and one for each of several folders: its weight, its size, and how often an epoch reads it."""
    line = f"data     {data.paths}: {data.n_tokens:,} tokens in {len(data):,} rows of {data.max_seq_len}, "
    line += f"{data.real_fraction:.1%} of them real"
    if data.truncated or data.dropped:
        line += f"; {data.truncated:,} samples truncated to {data.max_seq_len} tokens, {data.dropped:,} left out"
    if len(data.weights) == 1:
        return [line]
    times = data.times_seen(seed, epoch=1, row=0)
    return [line] + [
        f"         {name}: {weight:.1%} of the tokens; its own {tokens:,} are read {times[name]:.2f} times an epoch"
        for (name, weight), tokens in zip(data.weights.items(), data.folder_tokens)
    ]


def step_line(step: StepSettings, fit_batch: bool, machine: Machine, model: CausalLM, attention: str) -> str:
    rows = step.batch_size * step.accumulation_steps * machine.world_size
    shards = machine.world_size if machine.shards else 1
    gigabytes = memory_estimate(model, step, machine.dtype.itemsize, attention, shards) / 2**30
    at_a_time = f" ({step.batch_size} at a time in each process)" if fit_batch else ""
    line = f"step     {rows} rows{at_a_time}, {rows * step.max_seq_len:,} tokens; "
    line += f"about {gigabytes:.1f} GiB in each process"
    line += ", with gradient checkpointing" if step.grad_checkpointing else ""
    processes, memory = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), memory_of_machine() / 2**30
    if machine.device.type == "cpu" and processes * gigabytes > memory:  # a process killed for it cannot say so
        line += f", and there are {memory:.1f} in all: {LESS_MEMORY}"
    return line


def expected_minutes(
    schedule: Schedule, step: StepSettings, machine: Machine, model: CausalLM, data: PackedDataset, peak: float
) -> float:
    """Of a run from its start, of which peak is the FLOP/s of a process."""
    rows = step.batch_size * step.accumulation_steps * machine.world_size
    tokens = data.n_tokens * schedule.epochs
    if schedule.max_steps:
        tokens = min(tokens, schedule.max_steps * rows * step.max_seq_len * data.real_fraction)
    minutes = step_flops(model, tokens, 0) / (USUAL_MFU * peak * machine.world_size) / 60
    return min(minutes, schedule.max_minutes or math.inf)


def closing_message(settings: RunSettings, state: TrainState, data: PackedDataset, stopped: bool) -> str:
    if stopped and state.step == 0:
        return "stopped before the first step: nothing to save"
    if stopped:
        command = command_line() + ("" if settings.saving.resume else " --resume")
        return f"stopped at step {state.step:,}, and saved\nnext: {command}"
    seen = ""
    if len(data.weights) > 1:
        times = data.times_seen(settings.seed, state.epoch, state.row)
        seen = f" ({', '.join(f'{name} {n:.2f} times' for name, n in times.items())})"
    out_dir, minutes = settings.saving.out_dir, duration(state.seconds / 60)
    chats = next(iter(data.folders.values())).folder.with_name("sft")
    if data.kind == "pretrain" and (chats / META).exists():
        then = next_step("2-sft.py", "--data", chats, "--init_from", out_dir)
    else:
        then = next_step("eval.py", "--model", out_dir)
    return f"done: {state.step:,} steps, {state.tokens:,} tokens{seen}, {minutes} -> {out_dir}\n{then}"
