"""The training loop that the stages share, and the parts that it is made of, for a stage that writes its own."""

import argparse
import math
import signal
from collections.abc import Sequence

import torch
from torch import Tensor

from base.cli import UserError, command_line
from model.chat import EOS, IM_END, tokenizer_fingerprint
from model.LMConfig import LMConfig
from model.model import CausalLM
from training.balance import expert_metrics, move_router_bias
from training.cost import memory_estimate, step_flops
from training.log import Log, Meter
from training.loss import LossFunction, evaluate
from training.machine import Machine, matmul_rate
from training.optimizer import GradientBuffer, build_optimizer, learning_rate, optimizer_step
from training.packing import Batch, PackedDataset
from training.state import Checkpointer, Progress

MAX_SKIPPED_STEPS = 10  # in a row: then a run with non-finite numbers is stopped


def train(
    args: argparse.Namespace,
    machine: Machine,
    model: CausalLM,
    train_set: PackedDataset,
    val_set: PackedDataset,
    loss_fn: LossFunction,
    metrics: tuple[str, ...] = (),
):
    """Trains `model` with loss_fn(model, batch) -> (sum of the loss, how many tokens or pairs it sums, metrics).

    metrics: the names of what loss_fn returns beside the loss.
    """
    run = Run(args, machine, model, train_set, metrics)
    progress = run.progress

    def validate(rows: int | None) -> dict:
        return evaluate(model, loss_fn, val_set, machine, args.batch_size, rows)

    if progress.step == 0:
        # Of a model that knows nothing one batch says enough: a run should not begin with a long validation.
        rows = args.eval_rows if args.init_from else min(args.eval_rows, args.batch_size)
        run.log.add(0.0, {"step": 0, "tokens": 0, **validate(rows)})
        if args.init_from is None:
            check_first_loss(run.log, model.config.vocab_size)
    rows_per_step = args.batch_size * args.accumulation_steps * machine.world_size
    order = train_set.order(args.seed, progress.epoch)
    with StopRequest() as stop:
        while run.share_done() < 1:
            run.begin_step()

            # Forward and backward: the gradients of the micro-batches add up in the buffer.
            rows = order[progress.row : progress.row + rows_per_step]
            micro_batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
            for micro_batch in micro_batches[machine.rank :: machine.world_size]:
                if stop.made:
                    break
                run.accumulate(loss_fn, train_set.batch(micro_batch))
            sums = run.all_reduce(stop.made)
            if sums["stop"]:  # on some process the step is not whole: leave it out; --resume does it again
                run.forget_step()
                break

            # Clip, and update by the mean over all scored tokens of the global batch.
            grad_norm = run.update(sums)
            progress.advance(len(rows), len(train_set), sums)
            if progress.row == 0:
                order = train_set.order(args.seed, progress.epoch)
            if not math.isfinite(grad_norm):
                run.report_skipped()
                continue

            # Log, validate, save.
            run.meter.end_step(sums, len(rows) * args.max_seq_len)
            done = run.share_done()
            evaluates = done >= 1 or progress.step % args.eval_interval == 0
            if evaluates or progress.step % args.log_interval == 0:
                record = run.record(grad_norm)
                if evaluates:
                    record |= validate(args.eval_rows if done < 1 else None)
                run.log.add(done, record)
            if progress.step % args.save_interval == 0:
                run.save()
    run.finish()


class Run:
    """The parts of a training run, without control flow: optimizer, gradient buffer, log, meter, progress, saving."""

    def __init__(
        self,
        args: argparse.Namespace,
        machine: Machine,
        model: CausalLM,
        train_set: PackedDataset,
        metrics: tuple[str, ...] = (),
    ):
        self.args, self.machine, self.model, self.train_set = args, machine, model, train_set
        check_data(args, model.config, train_set)
        if train_set.prepared.meta["masked"]:
            model.stop_token_ids = [EOS, IM_END]  # chats teach to stop at the end of a turn
        model.to(machine.device).train()
        model.model.gradient_checkpointing = args.grad_checkpointing
        self.optimizer = build_optimizer(model, args)
        self.checkpointer = Checkpointer(args, machine, model, self.optimizer, train_set)
        self.progress = self.checkpointer.resume() if self.checkpointer.resumed else Progress()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffer = GradientBuffer(trained, dict.fromkeys(metrics, ()) | expert_metrics(model))
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.scale = args.batch_size * args.max_seq_len  # divides the loss: sums over a batch would not fit float16
        self.log = Log(args, machine, self.checkpointer.directory, self.progress.step)
        peak = matmul_rate(machine)  # measured by all processes at once
        self.meter = Meter(peak * machine.world_size, self.share_done())
        self.log.say(describe(args, machine, model, train_set, peak))
        if args.compile:
            model.model.compile()

    def share_done(self) -> float:
        return self.progress.share_done(self.args, len(self.train_set))

    def begin_step(self):
        """Sets the learning rate."""
        rate = learning_rate(self.args, self.progress.step, self.share_done())
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate_factor"] * rate
        self.random_state = torch.get_rng_state()
        self.losses: list[tuple[Tensor, list[int]]] = []  # of this step's passes, with their documents
        self.meter.start_step()

    def accumulate(self, loss_fn: LossFunction, batch: Batch):
        """Forward and backward of one micro-batch; gradients and sums go to the buffer."""
        batch = batch.to(self.machine.device)
        with self.machine.autocast():
            loss_sum, count, metrics = loss_fn(self.model, batch)
        self.scaler.scale(loss_sum / self.scale).backward()
        self.losses.append((loss_sum.detach(), batch.documents))
        flops = step_flops(self.model, batch.real_tokens, batch.attention_pairs)
        self.buffer.add(loss=loss_sum.detach(), count=count, real_tokens=batch.real_tokens, flops=flops, **metrics)

    def all_reduce(self, stop: bool = False) -> dict:
        """Adds up gradients and sums of all processes, once a step; "stop" counts those that were asked to end."""
        self.buffer.add(stop=stop, seconds=self.meter.seconds() if self.machine.rank == 0 else 0)
        return self.buffer.all_reduce(self.machine)

    def forget_step(self):
        """As if it had not begun."""
        torch.set_rng_state(self.random_state)

    def update(self, sums: dict) -> float:
        """Clips and steps; returns the gradient's norm, or NaN where the step was left out for a number not finite."""
        scale = self.scale / max(sums["count"], 1)
        grad_norm = optimizer_step(self.optimizer, self.buffer, self.scaler, scale, self.args.grad_clip)
        if math.isfinite(grad_norm):
            self.progress.skipped = 0
            move_router_bias(self.model, sums.get("expert_load"))
        return grad_norm

    def skip_update(self) -> float:
        """For a step from which there is nothing to learn: momentum does not move the weights either."""
        self.buffer.flat.zero_()
        return 0.0

    def report_skipped(self):
        """Says which samples made a loss or gradient that is not finite; FloatingPointError when it goes on and on."""
        self.progress.skipped += 1
        suspects = []
        for loss, documents in self.losses:
            if not loss.isfinite():
                suspects += documents
        everywhere = sum(self.machine.gather(suspects), [])
        samples = sorted({document // self.train_set.group for document in everywhere})  # as `show --index` counts
        named = samples or "all of the step (the gradient alone was not finite)"
        self.log.say(f"step {self.progress.step} skipped: loss or gradient not finite; samples: {named}")
        if self.progress.skipped >= MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"{self.progress.skipped} steps in a row were not finite; lower --learning_rate, or look at the "
                f"samples named above with: python data_process.py show {self.args.data} --index N"
            )

    def record(self, grad_norm: float, metrics: Sequence[str] | None = None) -> dict:
        """A line of the log, with the means of these metrics over the loss's terms; without names, of all."""
        rate = self.optimizer.param_groups[0]["lr"]
        shown = self.buffer.metrics if metrics is None else metrics
        return self.meter.record(self.progress, self.share_done(), rate, grad_norm, shown)

    def save(self):
        self.checkpointer.save(self.progress, self.log)

    def finish(self):
        """Saves what is not saved yet, and says how to go on."""
        if self.progress.step != self.checkpointer.saved_step:
            self.save()
        self.checkpointer.discard()
        self.log.say(farewell(self.args, self.progress, stopped=self.share_done() < 1))
        self.log.close()


class StopRequest:
    """Inside `with`, SIGINT and SIGTERM ask the loop to save and leave; a second one ends the process at once."""

    def __enter__(self):
        self.made = False
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame):
        self.made = True
        signal.signal(number, self.before[number])

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def check_data(args: argparse.Namespace, config: LMConfig, data: PackedDataset):
    """UserError where the data, the model and the flags do not go together."""
    vocab_size = data.prepared.meta["vocab_size"]
    if config.vocab_size != vocab_size:
        raise UserError(
            f"{args.data} was made with a vocabulary of {vocab_size}, the model has vocab_size {config.vocab_size}; "
            "make the data anew, or set vocab_size in model/LMConfig.py"
        )
    if args.max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {args.max_seq_len} is above the model's max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    if args.preset and args.init_from:
        raise UserError(f"--preset is the size of a new model; this one has that of {args.init_from}")
    if args.init_from and tokenizer_fingerprint(args.init_from) != data.prepared.meta["tokenizer_sha256"]:
        kind = data.prepared.kind
        raise UserError(
            f"{args.data} was made with another tokenizer than the one in {args.init_from}; make the data anew with: "
            f"python data_process.py {kind} YOUR_FILES --tokenizer {args.init_from} --output {args.data}"
        )


def check_first_loss(log: Log, vocab_size: int):
    """A model that knows nothing gives every token the same probability: its loss is ln(vocab_size)."""
    loss = log.records[-1]["val_loss"]
    expected = math.log(vocab_size)
    log.say(f"first validation loss {loss:.3f}; a model that knows nothing has ln({vocab_size}) = {expected:.3f}")
    if not abs(loss - expected) < 0.5:
        log.say("warning: they should be close; look for wrong labels, a wrong vocabulary, or large initial weights")


def describe(args: argparse.Namespace, machine: Machine, model: CausalLM, data: PackedDataset, peak: float) -> str:
    """What is going to be trained, on what, in how much memory and time."""
    rows = args.batch_size * args.accumulation_steps * machine.world_size
    tokens = data.n_tokens * args.epochs
    if args.max_steps:
        tokens = min(tokens, args.max_steps * rows * args.max_seq_len * data.real_share)
    minutes = step_flops(model, tokens, 0) / (0.6 * peak * machine.world_size) / 60
    minutes = min(minutes, args.max_minutes or math.inf)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = model.num_parameters()
    at_work = f", {total - model.num_idle_parameters():,} at work on a token" if model.config.use_moe else ""
    cut = ""
    if data.truncated or data.dropped:
        cut = f"; {data.truncated:,} samples cut at {args.max_seq_len} tokens, {data.dropped:,} left out"
    gigabytes = memory_estimate(model, args, machine.dtype.itemsize) / 2**30
    return "\n".join(
        [
            f"model    {total:,} parameters{at_work}, {trained / total:.1%} of them trained",
            f"data     {args.data}: {data.n_tokens:,} tokens in {len(data):,} rows of {args.max_seq_len}, "
            f"{data.real_share:.1%} of them real{cut}",
            f"machine  {machine.world_size} x {machine.device.type}, {str(machine.dtype).removeprefix('torch.')}, "
            f"matrix products at {peak / 1e9:,.0f} GFLOP/s each",
            f"step     {rows} rows, {rows * args.max_seq_len:,} tokens; about {gigabytes:.1f} GiB in each process",
            f"time     about {minutes:,.{0 if minutes > 10 else 1}f} minutes",
        ]
    )


def farewell(args: argparse.Namespace, progress: Progress, stopped: bool) -> str:
    if stopped and progress.step == 0:
        return "stopped before the first step: nothing to save"
    if stopped:
        command = command_line() + ("" if args.resume else " --resume")
        return f"stopped at step {progress.step:,}, and saved; go on with:\n  {command}"
    minutes = progress.seconds / 60
    return f"done: {progress.step:,} steps, {progress.tokens:,} tokens, {minutes:.1f} minutes -> {args.out_dir}"
