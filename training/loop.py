"""The training loop that the stages share, and the parts that it is made of, for a stage that writes its own."""

import argparse
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
from torch import Tensor

from base.cli import LESS_MEMORY, UserError, command_line
from model.chat import EOS, IM_END, tokenizer_fingerprint
from model.LMConfig import LMConfig
from model.model import CausalLM
from training.balance import expert_metrics, move_router_bias
from training.cost import fit_batch, memory_estimate, memory_of_machine, step_flops
from training.log import Log, Meter
from training.loss import LossFunction, evaluate
from training.machine import Machine, matmul_rate, warn_of_unused_gpu
from training.optimizer import GradientBuffer, build_optimizer, learning_rate, optimizer_step
from training.packing import Batch, Mixture, TrainingData
from training.shard import call, place
from training.state import Checkpointer, Progress

MAX_SKIPPED_STEPS = 10  # in a row: then a run with non-finite numbers is stopped


def train(
    args: argparse.Namespace,
    machine: Machine,
    model: CausalLM,
    train_set: Mixture,
    val_set: Mixture,
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

    def micro_batches(start: int) -> list[tuple[np.ndarray, bool]]:
        """This process's rows, pass by pass, of the step that begins at this place of the order; whether they count."""
        return machine.share(order[start : start + rows_per_step], args.batch_size)

    with StopRequest() as stop:
        while run.share_done() < 1:
            run.begin_step()

            # Forward and backward: the gradients of the micro-batches add up in the buffer.
            for rows, counts in micro_batches(progress.row):
                if stop.made and not args.shard:  # where no process can do without the others
                    break
                run.accumulate(loss_fn, run.batch(rows), counts)
            for rows, _ in micro_batches(progress.row + rows_per_step)[:1]:
                run.prepare(rows)  # while a card still computes
            sums = run.all_reduce(stop.made)
            if sums["stop"]:  # on some process the step is not whole: leave it out; --resume does it again
                run.forget_step()
                break

            # Clip, and update by the mean over all scored tokens of the global batch.
            grad_norm = run.update(sums)
            n_rows = min(rows_per_step, len(order) - progress.row)
            progress.advance(n_rows, len(train_set), sums)
            if progress.row == 0:
                order = train_set.order(args.seed, progress.epoch)
            if not math.isfinite(grad_norm):
                run.report_skipped()
                continue

            # Log, validate, save.
            run.end_step(sums, n_rows * args.max_seq_len, grad_norm, validate)
        run.finish(stop)


class Run:
    """The parts of a training run, without control flow: optimizer, gradient buffer, log, meter, progress, saving."""

    def __init__(
        self,
        args: argparse.Namespace,
        machine: Machine,
        model: CausalLM,
        train_set: TrainingData,
        metrics: tuple[str, ...] = (),
    ):
        self.args, self.machine, self.model, self.train_set = args, machine, model, train_set
        check_data(args, model.config, train_set)
        if train_set.masked:
            model.stop_token_ids = [EOS, IM_END]  # chats teach to stop at the end of a turn
        place(model, machine).train()
        model.model.gradient_checkpointing = args.grad_checkpointing
        if args.fit_batch:
            args.batch_size, args.accumulation_steps = fit_batch(args, machine, model)
        self.optimizer = build_optimizer(model, args)
        self.scaler = machine.scaler()
        self.checkpointer = Checkpointer(args, machine, model, self.optimizer, self.scaler, train_set)
        self.progress = self.checkpointer.resume() if self.checkpointer.resumed else Progress()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffer = GradientBuffer(trained, dict.fromkeys(metrics, ()) | expert_metrics(model))
        self.prepared: dict[bytes, Batch] = {}  # of the next step, by its rows
        self.scale = args.batch_size * args.max_seq_len  # divides the loss: sums over a batch would not fit float16
        self.log = Log(args, machine, self.checkpointer.directory, self.progress.step)
        peak = matmul_rate(machine)  # measured by all processes at once
        self.meter = Meter(peak * machine.world_size, self.share_done())
        self.log.say(describe(args, machine, model, train_set, peak))
        if machine.rank == 0:
            warn_of_unused_gpu(args.device, machine.device)
        if args.compile:
            model.model.compile()

    def share_done(self) -> float:
        return self.progress.share_done(self.args, len(self.train_set))

    def begin_step(self):
        """Sets the learning rate."""
        rate = learning_rate(self.args, self.progress.step, self.share_done())
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate_factor"] * rate
        self.random_state = self.machine.random_state()
        self.losses: list[tuple[Tensor, list[int]]] = []  # of this step's passes, with their documents
        self.meter.start_step()

    def batch(self, rows: np.ndarray) -> Batch:
        """These rows of the training data."""
        return self.prepared.pop(rows.tobytes(), None) or self.train_set.batch(rows)

    def prepare(self, rows: np.ndarray):
        """Has them ready for batch()."""
        self.prepared = {rows.tobytes(): self.train_set.batch(rows)}

    def accumulate(self, loss_fn: LossFunction, batch: Batch, counts: bool = True):
        """Forward and backward of one micro-batch; gradients and sums go to the buffer, unless it does not count."""
        batch = batch.to(self.machine.device)
        with self.machine.autocast():
            loss_sum, count, metrics = call(loss_fn, self.model, batch)
        self.scaler.scale(loss_sum / (self.scale if counts else math.inf)).backward()
        if not counts:
            return
        self.losses.append((loss_sum.detach(), batch.documents))
        flops = step_flops(self.model, batch.real_tokens, batch.attention_pairs)
        self.buffer.add(loss=loss_sum.detach(), count=count, real_tokens=batch.real_tokens, flops=flops, **metrics)

    def all_reduce(self, stop: bool = False) -> dict:
        """Adds up gradients and sums of all processes, once a step; "stop" counts those that were asked to end.

        Here, and nowhere else in a step, the device is waited for.
        """
        self.buffer.add(stop=stop, seconds=self.meter.seconds() if self.machine.rank == 0 else 0)
        return self.buffer.all_reduce(self.machine, self.scale, lambda: self.scaler.unscale_(self.optimizer))

    def forget_step(self):
        """As if it had not begun."""
        self.machine.set_random_state(self.random_state)

    def update(self, sums: dict) -> float:
        """Clips and steps; returns the gradient's norm, or NaN where the step was left out for a number not finite."""
        grad_norm = optimizer_step(self.optimizer, self.buffer, self.scaler, sums, self.args.grad_clip)
        self.finite_loss = math.isfinite(sums["loss"])
        if math.isfinite(grad_norm):
            self.progress.skipped = 0
            move_router_bias(self.model, sums.get("expert_load"))
        return grad_norm

    def skip_update(self) -> float:
        """For a step from which there is nothing to learn: momentum does not move the weights either."""
        self.buffer.flat.zero_()
        self.scaler.update()  # what all_reduce began
        return 0.0

    def report_skipped(self):
        """Says which samples made a loss or gradient that is not finite; FloatingPointError when it goes on and on.

        In float16 gradients overflow now and then, by design: the scaler tries larger scales until they do.
        """
        if self.finite_loss and self.scaler.is_enabled() and (scale := self.scaler.get_scale()) >= 1:
            step = self.progress.step
            self.log.say(f"step {step} left out: float16 overflowed, as it may; gradients are now scaled by {scale:g}")
            return
        self.progress.skipped += 1
        suspects = []
        for loss, documents in self.losses:
            if not loss.isfinite():
                suspects += documents
        samples = self.train_set.samples(sum(self.machine.gather(suspects), []))
        named = ", ".join(f"{numbers} of {folder}" for folder, numbers in samples.items())
        named = named or "all of the step (the gradient alone was not finite)"
        self.log.say(f"step {self.progress.step} skipped: loss or gradient not finite; samples: {named}")
        if self.progress.skipped >= MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"{self.progress.skipped} steps in a row were not finite; lower --learning_rate, or look at the "
                f"samples named above with: python data_process.py show {next(iter(samples), 'DIR')} --index N"
            )

    def end_step(
        self,
        sums: dict,
        row_tokens: int,
        grad_norm: float,
        validate: Callable[[int | None], dict],
        describe: Callable[[Counter], dict] | None = None,
    ) -> bool:
        """Logs, validates and saves, each at its intervals and at the end; returns whether it logged.

        sums: all_reduce's; row_tokens: places of its rows. validate(rows): figures over so many rows, or all (None).
        describe(sums since the last line): what the line says beside the loss; without it, the means of all metrics.
        """
        args, step, done = self.args, self.progress.step, self.share_done()
        self.meter.end_step(sums, row_tokens)
        evaluates = done >= 1 or step % args.eval_interval == 0
        logs = evaluates or step % args.log_interval == 0
        if logs:
            described = describe(self.meter.window) if describe else {}
            metrics = [] if describe else self.buffer.metrics
            rate = self.optimizer.param_groups[0]["lr"]
            record = self.meter.record(self.progress, done, rate, grad_norm, metrics) | described
            if evaluates:
                record |= validate(args.eval_rows if done < 1 else None)
            self.log.add(done, record)
        if step % args.save_interval == 0:
            self.save()
        return logs

    def save(self):
        self.checkpointer.save(self.progress, self.log)

    def finish(self, stop: "StopRequest"):
        """Saves what is not saved yet, and says how to go on. A run that was stopped ends with the signal's status, so
        that `stage one && stage two` ends there."""
        if 0 < self.progress.step == self.progress.skipped:
            self.checkpointer.discard()
            raise FloatingPointError("no step was finite: nothing is saved; lower --learning_rate, or look at the data")
        if self.progress.step != self.checkpointer.saved_step:
            self.save()
        self.machine.gather(None)  # a process that ends badly ends all of them: not while the first one saves
        self.checkpointer.discard()
        stopped = self.share_done() < 1
        self.log.say(farewell(self.args, self.progress, self.train_set, stopped))
        self.log.close()
        if stopped:
            sys.exit(128 + (stop.number or signal.SIGTERM))  # one that stops for another process has no number


class StopRequest:
    """Inside `with`, these signals ask the loop to save and leave; a second one ends the process at once."""

    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __enter__(self):
        self.made = False
        self.number = 0
        self.before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def _ask(self, number: int, frame):
        self.made = True
        self.number = number
        signal.signal(number, self.before[number])

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def check_data(args: argparse.Namespace, config: LMConfig, data: TrainingData):
    """UserError where the data, the model and the flags do not go together."""
    if config.vocab_size != data.vocab_size:
        raise UserError(
            f"{data.paths} was made with a vocabulary of {data.vocab_size}, the model has vocab_size "
            f"{config.vocab_size}; make the data anew, or set vocab_size in model/LMConfig.py"
        )
    if args.max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {args.max_seq_len} is above the model's max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    if args.preset and args.init_from:
        raise UserError(f"--preset is the size of a new model; this one has that of {args.init_from}")
    if args.init_from and tokenizer_fingerprint(args.init_from) != data.tokenizer_sha256:
        first = next(iter(data.folders.values()))
        raise UserError(
            f"{data.paths} was made with another tokenizer than the one in {args.init_from}; make the data anew "
            f"with: python data_process.py {first.kind} YOUR_FILES --tokenizer {args.init_from} "
            f"--output {first.folder}"
        )


def check_first_loss(log: Log, vocab_size: int):
    """A model that knows nothing gives every token the same probability: its loss is ln(vocab_size)."""
    loss = log.records[-1].get("val_cross_entropy", log.records[-1]["val_loss"])
    expected = math.log(vocab_size)
    log.say(f"first validation loss {loss:.3f}; a model that knows nothing has ln({vocab_size}) = {expected:.3f}")
    if not abs(loss - expected) < 0.5:
        log.say("warning: they should be close; look for wrong labels, a wrong vocabulary, or large initial weights")


def describe(args: argparse.Namespace, machine: Machine, model: CausalLM, data: TrainingData, peak: float) -> str:
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
    with machine.autocast():
        attention = model.model.attention_kind()
    shards = machine.world_size if args.shard else 1
    gigabytes = memory_estimate(model, args, machine.dtype.itemsize, attention, shards) / 2**30
    at_a_time = f" ({args.batch_size} at a time in each process)" if args.fit_batch else ""
    processes, memory = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), memory_of_machine() / 2**30
    too_much = ""
    if machine.device.type == "cpu" and processes * gigabytes > memory:  # who is killed for it cannot say so then
        too_much = f", and there are {memory:.1f} in all: {LESS_MEMORY}"
    return "\n".join(
        [
            f"model    {total:,} parameters{at_work}, {trained / total:.1%} of them trained",
            f"data     {data.paths}: {data.n_tokens:,} tokens in {len(data):,} rows of {args.max_seq_len}, "
            f"{data.real_share:.1%} of them real{cut}",
            *describe_mixture(args, data),
            f"machine  {machine.world_size} x {machine.device.type}, {str(machine.dtype).removeprefix('torch.')}, "
            f"matrix products at {peak / 1e9:,.0f} GFLOP/s each, attention {attention}",
            f"step     {rows} rows{at_a_time}, {rows * args.max_seq_len:,} tokens; "
            f"about {gigabytes:.1f} GiB in each process{too_much}",
            f"time     about {minutes:,.{0 if minutes > 10 else 1}f} minutes",
        ]
    )


def describe_mixture(args: argparse.Namespace, data: TrainingData) -> list[str]:
    """A line for each of several sources: its share, its size, and how often an epoch of the mixture reads it."""
    if len(data.shares) == 1:
        return []
    times = data.times_seen(args.seed, epoch=1, row=0)
    return [
        f"         {name}: {share:.1%} of the tokens; its own {data.sources[name].n_tokens:,} are read "
        f"{times[name]:.2f} times an epoch"
        for name, share in data.shares.items()
    ]


def farewell(args: argparse.Namespace, progress: Progress, data: TrainingData, stopped: bool) -> str:
    if stopped and progress.step == 0:
        return "stopped before the first step: nothing to save"
    if stopped:
        command = command_line() + ("" if args.resume else " --resume")
        return f"stopped at step {progress.step:,}, and saved; go on with:\n  {command}"
    minutes = progress.seconds / 60
    seen = ""
    if len(data.shares) > 1:
        times = data.times_seen(args.seed, progress.epoch, progress.row)
        seen = f" ({', '.join(f'{name} {n:.2f} times' for name, n in times.items())})"
    return f"done: {progress.step:,} steps, {progress.tokens:,} tokens{seen}, {minutes:.1f} minutes -> {args.out_dir}"
