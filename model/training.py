"""What all stages share: what a step costs, the loss, saving and resuming, and one training loop."""

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.balance import expert_balance, move_router_bias
from model.chat import load_tokenizer, token_bytes, tokenizer_fingerprint
from model.checkpoint import (
    check_same_config,
    load_config,
    load_state,
    replace_directory,
    save_model,
    save_state,
    state_file,
    weights_fingerprint,
    write_json,
)
from model.dataset import IGNORE, Batch, PackedDataset
from model.LMConfig import LMConfig
from model.log import Log, Meter
from model.lora import has_lora
from model.machine import Machine, matmul_rate
from model.model import CausalLM
from model.optimizer import MUON_BATCH, GradientBuffer, build_optimizer, learning_rate, optimizer_step

LOSS_CHUNK = 512  # tokens whose logits exist at a time
GAPS = 1.45  # memory that activations take over what they hold: a freed place seldom suits the next tensor exactly
MAX_SKIPPED_STEPS = 10  # in a row: then a run with non-finite numbers is stopped
# (model, batch) -> sum of the loss, scored tokens, sums of metrics: numbers, but for "expert_load" in training.
LossFunction = Callable[[CausalLM, Batch], tuple[Tensor, int, dict[str, float | Tensor]]]


def run(main: Callable[[], None]):
    """Calls main(). A user's mistake ends in one line and exit status 2, a failure of the machine in one line and 1."""
    try:
        main()
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        _exit(error, 2)
    except (OSError, FloatingPointError) as error:
        _exit(error, 1)
    except KeyboardInterrupt:  # before the first step or after the last; between them StopRequest takes it
        _exit("interrupted", 130)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        advice = "lower --batch_size and raise --accumulation_steps as much, or add --grad_checkpointing"
        _exit(f"out of memory: {advice} ({str(error).splitlines()[0]})", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _exit(error: Exception | str, status: int):
    if sys.flags.dev_mode:  # python -X dev shows the traceback
        raise
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(status)


# -------------------------------------------------------------------------------------------------------- what it costs


def step_flops(model: CausalLM, tokens: int, attention_pairs: int) -> float:
    """Floating-point operations of forward and backward: 6 a weight and token (arXiv 2001.08361, 2.1), 4 where it is
    frozen, and for each layer and query-key pair 12 a number of the query, for q k^T and its product with v. Padding
    is not counted, nor are experts that a token does not visit; where anything is frozen (LoRA), all experts are."""
    config = model.config
    idle = model.num_idle_parameters()
    weights = model.num_parameters() - idle
    weights -= 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    frozen -= idle if frozen else 0
    pair = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return (6 * weights - 2 * frozen) * tokens + pair * attention_pairs


def memory_estimate(model: CausalLM, args: argparse.Namespace, bytes_per_number: int = 4) -> int:
    """Bytes at the peak of a training step, from what it holds at once; bench/memory.py measures the same.

    bytes_per_number: of activations. Weights, gradients and optimizer are float32; autocast also keeps cast weights.
    """
    config, tokens = model.config, args.batch_size * args.max_seq_len
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = model.num_parameters()
    state = weights + 3 * sum(parameter.numel() for parameter in trained)  # weights, gradients, Adam's two moments
    if args.optimizer == "muon":  # one moment of a matrix; four copies of those that are updated at a time
        sizes = Counter()
        for parameter in model.model.layers.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                sizes[parameter.shape] += parameter.numel()
        state += 4 * min(max(sizes.values(), default=0), MUON_BATCH) - sizes.total()

    # What each layer keeps of a token: what the norms, each matrix product and each nonlinearity read; of the attention
    # also what it gave.
    attention = 3 * config.hidden_size + 4 * heads + 3 * kv_heads
    dense = config.hidden_size + 4 * config.intermediate_size
    layers = [attention + dense] * config.num_hidden_layers
    if config.use_moe:  # the copies of what goes into the experts, and twice what comes out; their insides
        visits, width = config.num_experts_per_tok, config.moe_intermediate_size
        experts = config.hidden_size * (1 + 3 * visits) + 4 * width * (visits + config.n_shared_experts)
        n_experts = config.num_hidden_layers - config.first_k_dense_replace
        layers[-n_experts:] = [attention + experts] * n_experts
    # With checkpoints its input, and twice as much lost around it: it stays where all else comes and goes.
    kept = 3 * config.hidden_size * len(layers) if args.grad_checkpointing else sum(layers)
    kept += 3 * config.hidden_size  # the last norm, and the gradient of what it gave

    # Beside it, at the end of the forward pass a chunk of logits and of its gradients, and the gradient of the head's
    # weight; or, in the backward pass, the gradients inside one layer, and what is computed anew.
    loss = 2 * min(tokens, LOSS_CHUNK) * config.vocab_size + config.vocab_size * config.hidden_size
    backward = 3 * config.intermediate_size + (max(layers) if args.grad_checkpointing else 0)
    activations = bytes_per_number * (tokens * round(GAPS * kept) + max(loss, tokens * round(GAPS * backward)))
    copy = bytes_per_number * weights if bytes_per_number < 4 else 0
    return 4 * state + copy + activations


# ------------------------------------------------------------------------------------------------------------- the loss


def next_token_loss(model: CausalLM, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """The sum over all scored tokens of -ln p(token | the tokens before it in its document), and their number.

    The logits (B * T, V) are the largest tensor of a small model. They are made, reduced and turned into gradients a
    chunk of tokens at a time, which also keeps them in the processor's cache.
    """
    routing = []
    hidden = model.model(batch.input_ids, batch.position_ids, routing=routing)  # (B, T, H)
    loss_sum = F.linear_cross_entropy(
        hidden.flatten(0, 1),
        model.lm_head.weight.to(hidden.dtype),
        batch.labels.flatten(),
        reduction="sum",
        ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK),
    )
    balance, metrics = expert_balance(model, batch, routing)
    return loss_sum + balance, int((batch.labels != IGNORE).sum()), metrics


@torch.no_grad()
def evaluate(
    model: CausalLM,
    loss_fn: LossFunction,
    data: PackedDataset,
    bytes_of_token: Tensor,
    machine: Machine,
    batch_size: int,
    rows: int | None = None,
) -> dict[str, float]:
    """Mean loss a token in nats, and bits per byte, which compare between tokenizers: over `rows` rows, or all."""
    model.eval()
    chosen = data.order(seed=0, epoch=0)[:rows]
    sums = Counter()
    for start in range(machine.rank * batch_size, len(chosen), machine.world_size * batch_size):
        batch = data.batch(chosen[start : start + batch_size]).to(machine.device)
        with machine.autocast():
            loss_sum, token_count, metrics = loss_fn(model, batch)
        scored = batch.labels[batch.labels != IGNORE]
        metrics |= {"loss": loss_sum, "tokens": token_count, "bytes": bytes_of_token[scored].sum()}
        sums.update({name: float(value) for name, value in metrics.items()})
    model.train()
    total = Counter()
    for part in machine.gather(sums):
        total.update(part)
    loss_sum, tokens, n_bytes = (total.pop(name, 0) for name in ("loss", "tokens", "bytes"))
    if not tokens:
        raise ValueError("the validation data hold no scored token; give data_process.py more, or --val FILE")
    result = {"val_loss": loss_sum / tokens}
    if data.group == 1:  # the loss of a pair is not one of its text
        result["val_bits_per_byte"] = loss_sum / math.log(2) / n_bytes
    return result | {f"val_{name}": value / tokens for name, value in total.items()}


# -------------------------------------------------------------------------------------------------- saving and resuming


@dataclass
class Progress:
    """Where a run stands. Rows, not steps, say where in the data: the number of processes may change on the way."""

    step: int = 0
    epoch: int = 0
    row: int = 0  # of this epoch's order
    tokens: int = 0  # real ones, in all
    seconds: float = 0.0
    skipped: int = 0  # steps in a row that were not finite

    def done(self, args: argparse.Namespace, n_rows: int) -> float:
        """From 0 to 1: the furthest of the limits that --epochs, --max_steps and --max_minutes set."""
        shares = [(self.epoch * n_rows + self.row) / (args.epochs * n_rows)]
        if args.max_steps:
            shares.append(self.step / args.max_steps)
        if args.max_minutes:
            shares.append(self.seconds / (60 * args.max_minutes))
        return max(shares)

    def advance(self, rows: int, n_rows: int, sums: dict[str, float]):
        self.step, self.row = self.step + 1, self.row + rows
        self.tokens, self.seconds = self.tokens + int(sums["real_tokens"]), self.seconds + sums["seconds"]
        if self.row >= n_rows:
            self.epoch, self.row = self.epoch + 1, 0


def fingerprint(data: PackedDataset) -> str:
    return hashlib.sha256(json.dumps(data.meta["files"], sort_keys=True).encode()).hexdigest()


class Checkpointer:
    """Writes out_dir: the model for its users, the state for --resume, and how the run was made.

    An earlier run in out_dir is moved to out_dir.old when this one has something to show for itself: at its first save.
    """

    def __init__(self, args, machine: Machine, model: CausalLM, optimizer, data: PackedDataset, tokenizer_dir: Path):
        self.args, self.machine, self.model, self.optimizer = args, machine, model, optimizer
        self.out_dir, self.tokenizer_dir, self.in_place, self.saved_step = args.out_dir, tokenizer_dir, args.resume, 0
        self.is_chat = data.meta["kind"] != "pretrain"
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.must_agree = {
            "data": fingerprint(data),
            "tokenizer": tokenizer_fingerprint(tokenizer_dir),
            "seed": args.seed,
            "max_seq_len": args.max_seq_len,
            "base": weights_fingerprint(args.init_from) if has_lora(model) else None,  # which an adapter belongs to
        }

    def save(self, progress: Progress, log: Log):
        random_states = self.machine.gather(torch.get_rng_state())
        if self.machine.rank == 0:
            directory = self.out_dir if self.in_place else self.out_dir.with_name(self.out_dir.name + ".writing")
            trained = {name: parameter for parameter, name in self.names.items() if parameter.requires_grad}
            tensors = {f"weight.{name}": parameter.data for name, parameter in trained.items()}
            tensors |= {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
            for parameter, state in self.optimizer.state.items():
                tensors |= {f"optimizer.{self.names[parameter]}/{key}": value for key, value in state.items()}
            tensors |= {f"random.{rank}": state for rank, state in enumerate(random_states)}
            save_state(directory, tensors, {"progress": asdict(progress), "must_agree": self.must_agree})
            save_model(directory, self.model, self.tokenizer_dir, self.is_chat, self.args.init_from)
            write_json(directory / "run.json", self.run_record())
            log.write(directory)
            if not self.in_place:
                replace_directory(self.out_dir, directory)
        self.in_place, self.saved_step = True, progress.step

    def resume(self) -> Progress:
        """Takes weights, optimizer, position and random states from out_dir. ValueError names what does not agree."""
        if not has_lora(self.model):
            check_same_config(load_config(self.out_dir), self.model.config, self.out_dir)
        tensors, info = load_state(self.out_dir, self.machine.device)
        for name, here in self.must_agree.items():
            there = info["must_agree"][name]
            if there != here:
                raise ValueError(f"cannot resume {self.out_dir}: its {name} was {there}, and is {here} now")
        parameters = {name: parameter for parameter, name in self.names.items()}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "weight":
                parameters[name].data.copy_(tensor)
            elif kind == "buffer":
                self.model.get_buffer(name).copy_(tensor)
            elif kind == "optimizer":
                name, _, entry = name.rpartition("/")
                self.optimizer.state[parameters[name]][entry] = tensor
            elif kind == "random" and int(name) == self.machine.rank:
                torch.set_rng_state(tensor.cpu())
        self.saved_step = info["progress"]["step"]
        return Progress(**info["progress"])

    def run_record(self) -> dict:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        return {
            "command": command_line(self.machine.world_size),
            "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.args).items()},
            "processes": self.machine.world_size,
            "git_commit": commit.stdout.strip() if commit.returncode == 0 else None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **self.must_agree,
        }


def command_line(world_size: int) -> str:
    start = "python"
    if world_size > 1:
        start = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
    return f"{start} {shlex.join(sys.argv)}"


class StopRequest:
    """Inside `with`, SIGINT and SIGTERM ask the loop to save and leave; a second one ends the process at once."""

    def __enter__(self):
        self.made = False
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.made = True
        signal.signal(number, self.before[number])

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------- the loop


def train(args: argparse.Namespace, machine: Machine, model: CausalLM, loss_fn: LossFunction):
    """Trains `model` on args.data with loss_fn(model, batch) -> (sum of the loss, number of scored tokens, metrics)."""
    train_set, val_set = (PackedDataset(args.data, split, args.max_seq_len) for split in ("train", "val"))
    tokenizer_dir = check_data(args, model.config, train_set)
    bytes_of_token = torch.from_numpy(token_bytes(load_tokenizer(tokenizer_dir))).to(machine.device)
    model.to(machine.device).train()
    model.model.gradient_checkpointing = args.grad_checkpointing
    optimizer = build_optimizer(model, args)
    checkpointer = Checkpointer(args, machine, model, optimizer, train_set, tokenizer_dir)
    progress = checkpointer.resume() if args.resume else Progress()
    loads = torch.zeros(sum(layer.has_experts for layer in model.model.layers), model.config.n_routed_experts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffer = GradientBuffer(trained, room_for_metrics=16 + loads.numel())
    if loads.numel():
        buffer.add(expert_load=loads)  # a place for it in every process, also where a step brings no row
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    log = Log(args, machine)
    peak = matmul_rate(machine)  # measured by all processes at once
    meter = Meter(peak * machine.world_size, progress.done(args, len(train_set)))
    log.say(describe(args, machine, model, train_set, peak))
    if args.compile:
        model.model.compile()

    def validate(rows: int | None = None) -> dict:
        return evaluate(model, loss_fn, val_set, bytes_of_token, machine, args.batch_size, rows)

    if progress.step == 0:
        # Of a model that knows nothing one batch says enough: a run should not begin with a long validation.
        rows = args.eval_rows if args.init_from else min(args.eval_rows, args.batch_size)
        log.add(0.0, {"step": 0, "tokens": 0, **validate(rows)})
        if args.init_from is None:
            check_first_loss(log, model.config.vocab_size)
    rows_per_step = args.batch_size * args.accumulation_steps * machine.world_size
    scale = args.batch_size * args.max_seq_len  # divides the loss: sums over a batch would not fit float16
    order = train_set.order(args.seed, progress.epoch)
    stopped = False
    with StopRequest() as stop:
        while (done := progress.done(args, len(train_set))) < 1:
            for group in optimizer.param_groups:
                group["lr"] = group["rate_factor"] * learning_rate(args, progress.step, done)

            meter.start_step()
            random_state = torch.get_rng_state()

            # Forward and backward: the gradients of the micro-batches add up in the buffer.
            rows = order[progress.row : progress.row + rows_per_step]
            micro_batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
            losses = []
            for micro_batch in micro_batches[machine.rank :: machine.world_size]:
                if stop.made:
                    break
                batch = train_set.batch(micro_batch).to(machine.device)
                with machine.autocast():
                    loss_sum, token_count, metrics = loss_fn(model, batch)
                scaler.scale(loss_sum / scale).backward()
                losses.append((loss_sum.detach(), batch.documents))
                buffer.add(loss=loss_sum.detach(), tokens=token_count, real_tokens=batch.real_tokens)
                buffer.add(flops=step_flops(model, batch.real_tokens, batch.attention_pairs), **metrics)
            buffer.add(stop=stop.made, seconds=meter.seconds() if machine.rank == 0 else 0)
            sums = buffer.all_reduce(machine)  # the only one of the gradients
            if sums["stop"]:  # on some process the step is not whole: leave it out; --resume does it again
                torch.set_rng_state(random_state)
                stopped = True
                break

            # Update by the mean over all scored tokens of the global batch; leave it out where it is not finite.
            grad_norm = optimizer_step(optimizer, buffer, scaler, scale / max(sums["tokens"], 1), args.grad_clip)
            progress.advance(len(rows), len(train_set), sums)
            if progress.row == 0:
                order = train_set.order(args.seed, progress.epoch)
            if not math.isfinite(grad_norm):
                skip_step(progress, losses, machine, log)
                continue
            progress.skipped = 0
            move_router_bias(model, sums.get("expert_load"))

            # Log, validate, save.
            meter.end_step(sums, len(rows) * args.max_seq_len)
            done = progress.done(args, len(train_set))
            evaluates = done >= 1 or progress.step % args.eval_interval == 0
            if evaluates or progress.step % args.log_interval == 0:
                lr = optimizer.param_groups[0]["lr"]
                record = meter.record(progress, done, lr, grad_norm, buffer.metrics)
                log.add(done, record | (validate(args.eval_rows if done < 1 else None) if evaluates else {}))
            if progress.step % args.save_interval == 0:
                checkpointer.save(progress, log)
    if progress.step != checkpointer.saved_step:
        checkpointer.save(progress, log)
    log.say(farewell(args, machine, progress, stopped))
    log.close()


def skip_step(progress: Progress, losses: list[tuple[Tensor, list[int]]], machine: Machine, log: Log):
    """Says which documents made a loss or gradient that is not finite; FloatingPointError when it goes on and on."""
    progress.skipped += 1
    suspects = [document for loss, documents in losses if not loss.isfinite() for document in documents]
    named = sorted(sum(machine.gather(suspects), [])) or "all of the step (the gradient alone was not finite)"
    log.say(f"step {progress.step} skipped: loss or gradient not finite; documents: {named}")
    if progress.skipped >= MAX_SKIPPED_STEPS:
        raise FloatingPointError(
            f"{progress.skipped} steps in a row were not finite; lower --learning_rate, or look at the documents "
            f"named above with: python data_process.py show {log.args.data} --index N"
        )


def check_data(args: argparse.Namespace, config: LMConfig, data: PackedDataset) -> Path:
    """The folder of the tokenizer that made the data, if it is still the same and fits the model; else ValueError."""
    if not len(data):
        raise ValueError(f"{args.data} holds no training rows; give data_process.py more text")
    if config.vocab_size != data.meta["vocab_size"]:
        raise ValueError(
            f"{args.data} was made with a vocabulary of {data.meta['vocab_size']}, the model has vocab_size "
            f"{config.vocab_size}; make the data anew, or set vocab_size in model/LMConfig.py"
        )
    if args.max_seq_len > config.max_position_embeddings:
        raise ValueError(
            f"--max_seq_len {args.max_seq_len} is above the model's max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    if args.resume:
        state_file(args.out_dir)
    if args.preset and args.init_from:
        raise ValueError(f"--preset is the size of a new model; this one has that of {args.init_from}")
    directory = args.init_from or (args.out_dir if args.resume else Path(data.meta["tokenizer"]))
    if tokenizer_fingerprint(directory) != data.meta["tokenizer_sha256"]:
        raise ValueError(
            f"{args.data} was made with another tokenizer than the one in {directory}; make the data anew with: "
            f"python data_process.py {data.meta['kind']} YOUR_FILES --tokenizer {directory} --output {args.data}"
        )
    return directory


def check_first_loss(log: Log, vocab_size: int):
    """A model that knows nothing gives every token the same probability: its loss is ln(vocab_size)."""
    loss, expected = log.records[-1]["val_loss"], math.log(vocab_size)
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
    lines = [
        f"model    {total:,} parameters{at_work}, {trained / total:.1%} of them trained",
        f"data     {args.data}: {data.n_tokens:,} tokens in {len(data):,} rows of {args.max_seq_len}, "
        f"{data.real_share:.1%} of them real",
        f"machine  {machine.world_size} x {machine.device.type}, {str(machine.dtype).removeprefix('torch.')}, "
        f"matrix products at {peak / 1e9:,.0f} GFLOP/s each",
        f"step     {rows} rows, {rows * args.max_seq_len:,} tokens; about "
        f"{memory_estimate(model, args, machine.dtype.itemsize) / 2**30:.1f} GiB in each process",
        f"time     about {minutes:,.{0 if minutes > 10 else 1}f} minutes",
    ]
    if data.truncated or data.dropped:
        lines[1] += f"; {data.truncated:,} samples cut at {args.max_seq_len} tokens, {data.dropped:,} left out"
    return "\n".join(lines)


def farewell(args: argparse.Namespace, machine: Machine, progress: Progress, stopped: bool) -> str:
    if stopped and progress.step == 0:
        return "stopped before the first step: nothing to save"
    if stopped:
        command = command_line(machine.world_size) + ("" if args.resume else " --resume")
        return f"stopped at step {progress.step:,}, and saved; go on with:\n  {command}"
    minutes = progress.seconds / 60
    return f"done: {progress.step:,} steps, {progress.tokens:,} tokens, {minutes:.1f} minutes -> {args.out_dir}"
