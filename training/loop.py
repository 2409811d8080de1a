"""A training run: what happens around the loop that each stage script contains.

    with training:                                       # saves at the end, also where a signal ends it
        for rows in training.steps(rows_per_step):       # sets the learning rate
            training.forward_backward(loss_fn, training.batches(rows))
            training.update()                            # all-reduce, clip, optimizer step
            training.log_step(validate)                  # counts the step; logs, validates and saves at intervals

`training` is a Run.
"""

import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from model.chat import load_tokenizer
from model.device import print_notes
from model.lora import narrow_frozen
from model.model import CausalLM
from training.balance import expert_metrics, move_router_bias
from training.compiling import compile_model, pays_to_compile
from training.cost import busiest_batch, decide_checkpointing, fit_batch, step_flops
from training.flags import RunSettings
from training.log import Log, Meter
from training.loss import LossFunction
from training.machine import Machine, matmul_rate
from training.optimizer import GradientBuffer, build_optimizer, optimizer_step
from training.packing import Batch, PackedDataset
from training.report import check_compatible, check_first_loss, closing_message, expected_minutes, run_report
from training.schedule import TrainState
from training.shard import shard_model
from training.state import Checkpointer

EARLY_VALIDATIONS = (20, 50)  # steps: the loss falls fastest at the start, where plots compare it with training's
MAX_SKIPPED_STEPS = 10  # in a row: then a run with non-finite numbers is stopped


class Stopped(Exception):
    """A signal has asked this process or another one to stop, before the weights of the step had moved."""


class Run:
    """Model, optimizer, gradients, log and checkpoints of a run, and the operations that a step consists of."""

    def __init__(
        self,
        settings: RunSettings,
        machine: Machine,
        model: CausalLM,
        train_set: PackedDataset,
        metrics: tuple[str, ...] = (),
        reference: Path | None = None,
    ):
        """metrics: names of what the loss function returns beside the loss. reference: the folder of a model that the
        loss reads, so that --resume needs the same one.
        """
        self.settings, self.machine, self.model, self.train_set = settings, machine, model, train_set
        if settings.rope_scaling:
            model.config.extend(settings.rope_scaling)
        check_compatible(settings, model.config, train_set)
        if train_set.masked:
            model.end_of_turn = load_tokenizer(train_set.tokenizer_dir).end_of_turn
            # Chats teach to stop at the end of a turn.
            model.stop_token_ids = [*dict.fromkeys([*model.stop_token_ids, model.end_of_turn])]
        if machine.device.type != "cpu" and machine.dtype.itemsize == 2 and not machine.shards:
            narrow_frozen(model, machine.dtype)
        shard_model(model, machine).train()
        step = decide_checkpointing(settings.step, settings.fit_batch, machine, model)
        model.model.gradient_checkpointing = step.grad_checkpointing
        self.step_settings = fit_batch(step, machine, model, train_set) if settings.fit_batch else step
        self.batch_size = self.step_settings.batch_size
        self.scale = self.batch_size * settings.step.max_seq_len  # divides the loss: float16 cannot hold its sum
        self.optimizer = build_optimizer(model, settings.optimizer)
        self.scaler = machine.scaler()
        flags = settings.flags | vars(self.step_settings)
        self.checkpointer = Checkpointer(
            settings.saving, flags, machine, model, self.optimizer, self.scaler, train_set, reference
        )
        self.state = self.checkpointer.resume() if self.checkpointer.resumed else TrainState()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffer = GradientBuffer(trained, dict.fromkeys(metrics, ()) | expert_metrics(model))
        checkpointer = self.checkpointer
        self.log = Log(settings.log, flags, machine.rank, checkpointer.out_dir, checkpointer.directory, self.state.step)
        peak = matmul_rate(machine)  # measured by all processes at once
        self.meter = Meter(peak * machine.world_size, self.progress())
        self.ahead: tuple[np.ndarray, Batch] | None = None  # the next step's first batch, and its rows
        # Of the current step:
        self.rows = self.next_rows = np.zeros(0, np.int64)  # this step's and the next one's
        self.random_state = machine.random_state()  # at its start
        self.losses: list[tuple[Tensor, list[int]]] = []  # of each pass, with its documents
        self.sums = Counter()  # of its updates, over all processes
        self.grad_norm = 0.0  # of its last update; NaN where a number was not finite
        minutes = expected_minutes(settings.schedule, self.step_settings, machine, model, train_set, peak)
        self.log.info(run_report(settings, self.step_settings, machine, model, train_set, peak, minutes))
        if machine.rank == 0:
            print_notes()
        if settings.compile or (settings.compile is None and pays_to_compile(machine, minutes)):
            self.compile()

    def compile(self):
        """The layers and the loss, tried on a batch; where that fails, the run goes on without, and says so."""
        batch = busiest_batch(self.train_set, self.batch_size).to(self.machine.device)
        failure = compile_model(self.model, self.machine, batch)
        self.buffer.flat.zero_()
        self.machine.compiles = not failure
        if failure:
            self.log.info(f"note     without torch.compile, which is slower on a GPU: {failure}")

    def progress(self) -> float:
        """From 0 to 1."""
        return self.settings.schedule.progress(self.state, len(self.train_set))

    def __enter__(self):
        self.machine.stop.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> bool:
        try:
            if kind is Stopped:  # the step is left out, and --resume repeats it
                self.machine.set_random_state(self.random_state)
            if kind in (None, Stopped):
                self.finish()
        finally:
            self.machine.stop.__exit__()
        return kind is Stopped

    def log_start(self, validate: Callable[[int | None], dict]):
        """Validates the model of a new run before its first step; one batch is enough for random weights.

        Of a run that has made its last step, makes up for a last validation that a signal ended.
        """
        if self.state.step:
            last = self.log.records[-1:]
            if self.progress() >= 1 and last and not any(name.startswith("val_") for name in last[0]):
                self.log.append(1.0, last[0] | validate(None))
            return
        rows, is_random = self.settings.eval_rows, self.settings.saving.init_from is None
        self.log.append(0.0, {"step": 0, "tokens": 0, **validate(min(rows, self.batch_size) if is_random else rows)})
        if is_random:
            check_first_loss(self.log, self.model.config.vocab_size)

    def steps(self, rows_per_step: int) -> Iterator[np.ndarray]:
        """The rows of each step, over all processes, until the run ends; sets the learning rate.

        A process that a signal has asked to stop gets no rows; update() tells the others.
        """
        while self.progress() < 1:
            order = self.train_set.order(self.settings.seed, self.state.epoch)
            epoch = self.state.epoch
            while self.progress() < 1 and self.state.epoch == epoch:
                rate = self.settings.schedule.rate(self.state.step, self.progress())
                for group in self.optimizer.param_groups:
                    group["lr"] = group["lr_factor"] * rate
                start, end = self.state.row, self.state.row + rows_per_step
                self.rows, self.next_rows = order[start:end], order[end : end + rows_per_step]
                self.random_state = self.machine.random_state()
                self.losses, self.sums = [], Counter()
                self.meter.start_step()
                yield self.rows[:0] if self.machine.leaves_early() else self.rows

    def batches(self, rows: np.ndarray) -> Iterator[Batch]:
        """This process's micro-batches of a step's rows. At the end it builds the next step's first one, while the
        device still computes."""
        for own in self.machine.rank_rows(rows, self.batch_size):
            if self.ahead and np.array_equal(self.ahead[0], own):
                yield self.ahead[1]
            else:
                yield self.train_set.batch(own)
        self.ahead = None
        for own in self.machine.rank_rows(self.next_rows, self.batch_size)[:1]:
            self.ahead = own, self.train_set.batch(own)

    def forward_backward(self, loss_fn: LossFunction, batches: Iterable[Batch], count: float | None = None):
        """Adds the gradients of the batches' loss to the buffer.

        count: what the sum of the loss is divided by; without it, what loss_fn counts.
        """
        if count is not None:
            self.buffer.add_sums(count=count)
        for batch in batches:
            if self.machine.leaves_early() and not self.sums:  # a step whose weights have moved is finished
                break
            batch = batch.to(self.machine.device)
            with self.machine.autocast():
                loss_sum, counted, metrics = loss_fn(self.model, batch)
            self.scaler.scale(loss_sum / self.scale).backward()
            self.losses.append((loss_sum.detach(), batch.documents))
            self.buffer.add_sums(
                loss=loss_sum.detach(),
                count=counted if count is None else 0,
                real_tokens=batch.real_tokens,
                positions=batch.labels.numel(),
                flops=step_flops(self.model, batch.real_tokens, batch.attention_pairs),
                **metrics,
            )

    def add_sums(self, **sums: float | Tensor):
        """Adds to the metrics of this step, by name; they are summed over all processes."""
        self.buffer.add_sums(**sums)

    def update(self):
        """All-reduces gradients and sums, clips, and updates the weights by the mean over what was counted.

        Raises Stopped, which ends `with run`, where a process was asked to stop and no weight of this step has moved.
        """
        stop = self.machine.stop.made and not self.sums
        self.buffer.add_sums(stop=stop, seconds=self.meter.seconds() if self.machine.rank == 0 else 0)
        # Here, and nowhere else in a step, the host waits for the device.
        sums = self.buffer.all_reduce(self.machine, self.scale, lambda: self.scaler.unscale_(self.optimizer))
        if sums["stop"]:
            raise Stopped
        grad_clip = self.settings.optimizer.grad_clip
        self.grad_norm = optimizer_step(self.optimizer, self.buffer, self.scaler, sums, grad_clip)
        self.sums.update(sums)
        if math.isfinite(self.grad_norm):
            move_router_bias(self.model, sums.get("expert_load"))

    def log_step(
        self, validate: Callable[[int | None], dict], summarize: Callable[[Counter], dict] | None = None
    ) -> bool:
        """Counts the step; logs, validates and saves, each at its intervals and at the end. Returns whether it logged.

        validate(rows): figures over so many rows, or all (None). summarize(sums since the last line): what the line
        shows beside the loss; without it, the means of all metrics.
        """
        self.state.advance(len(self.rows), len(self.train_set), self.sums)
        if not math.isfinite(self.grad_norm):
            self.report_skipped()
            return False
        self.state.skipped = 0
        settings, step, progress = self.settings, self.state.step, self.progress()
        self.meter.end_step(self.sums)
        evaluates = progress >= 1 or step % settings.eval_interval == 0 or (step in EARLY_VALIDATIONS and not summarize)
        logs = evaluates or step % settings.log_interval == 0
        if logs:
            summary = summarize(self.meter.window) if summarize else {}
            metrics = [] if summarize else self.buffer.metrics
            rate = self.optimizer.param_groups[0]["lr"]
            record = self.meter.record(self.state, progress, rate, self.grad_norm, metrics) | summary
            if evaluates:
                record |= validate(settings.eval_rows if progress < 1 else None)
            self.log.append(progress, record)
        if step % settings.saving.save_interval == 0:
            self.save()
        return logs

    def report_skipped(self):
        """Names the samples whose loss was not finite. FloatingPointError after MAX_SKIPPED_STEPS such steps in a row.

        In float16 gradients overflow now and then by design: the scaler tries larger scales until they do.
        """
        step, scale = self.state.step, self.scaler.get_scale()
        if math.isfinite(self.sums["loss"]) and self.scaler.is_enabled() and scale >= 1:
            self.log.info(f"step {step} left out: float16 overflowed, as it may; gradients are now scaled by {scale:g}")
            return
        self.state.skipped += 1
        suspects = [document for loss, documents in self.losses if not loss.isfinite() for document in documents]
        samples = self.train_set.samples(sum(self.machine.gather(suspects), []))
        named = ", ".join(f"{numbers} of {folder}" for folder, numbers in samples.items())
        named = named or "all of the step (the gradient alone was not finite)"
        self.log.info(f"step {step} skipped: loss or gradient not finite; samples: {named}")
        if self.state.skipped >= MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"{self.state.skipped} steps in a row were not finite; lower --learning_rate, or look at the "
                f"samples named above with: python data_process.py show {next(iter(samples), 'DIR')} --index N"
            )

    def save(self):
        self.checkpointer.save(self.state, self.log)

    def finish(self):
        """Saves what is not saved yet, and says how to continue. A run that was stopped exits with the signal's status,
        so that the shell stops at `stage one && stage two`.
        """
        if 0 < self.state.step == self.state.skipped:
            self.checkpointer.discard()
            raise FloatingPointError("no step was finite: nothing is saved; lower --learning_rate, or look at the data")
        if self.state.step != self.checkpointer.saved_step:
            self.save()
        self.machine.gather(None)  # a process that ends badly ends all of them: not while the first one saves
        self.checkpointer.discard()
        stopped = self.progress() < 1 or self.machine.stop.made  # a validation that was stopped is made up for
        if self.machine.stop.made and self.state.step and self.machine.rank == 0:
            self.log.draw()  # now that everything is saved
        self.log.close()
        self.log.info(closing_message(self.settings, self.state, self.train_set, stopped))
        if stopped:
            # A process that stops because another was asked to has no number.
            sys.exit(128 + (self.machine.stop.number or signal.SIGTERM))
