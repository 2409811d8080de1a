"""What all stages share: flags, the machine, the optimizer, the schedule, saving, and one training loop."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.chat import load_tokenizer, token_bytes, tokenizer_fingerprint
from model.checkpoint import (
    check_same_config,
    load_config,
    load_state,
    replace_directory,
    save_model,
    save_state,
    write_file,
    write_json,
)
from model.dataset import IGNORE, Batch, PackedDataset
from model.LMConfig import PRESETS, TRAINING_FLAGS, LMConfig
from model.model import CausalLM

MAX_SKIPPED_STEPS = 10  # in a row: then a run with non-finite numbers is stopped
LossFunction = Callable[[CausalLM, Batch], tuple[Tensor, int, dict[str, float]]]

# ------------------------------------------------------------------------------------------------------------ the flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def parse_flags(description: str, stage_flags: dict[str, dict] | None = None, **stage_defaults) -> argparse.Namespace:
    """The flags of every stage and those of one: name -> options of argparse's add_argument.

    Values measured for a preset replace the stage's defaults; the command line replaces both.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    group = parser.add_argument_group("what")
    group.add_argument("--data", type=Path, help="folder made by data_process.py")
    group.add_argument("--init_from", type=Path, help="model to start from; without it, random weights")
    group.add_argument("--out_dir", type=Path, help="where the model goes")
    group.add_argument("--resume", action="store_true", help="continue the run in --out_dir exactly where it stopped")
    group.add_argument("--preset", choices=PRESETS, help="a size from model/LMConfig.py; without it, its defaults")
    group.add_argument("--seed", type=int, default=0, help="of the first weights and of the order of the samples")
    group = parser.add_argument_group("how long: what comes first ends the run, and the cosine with it")
    group.add_argument("--epochs", type=positive, default=1, help="passes over the data")
    group.add_argument("--max_steps", type=positive, help="optimizer steps")
    group.add_argument("--max_minutes", type=float, help="minutes of training")
    group = parser.add_argument_group("a step")
    group.add_argument("--batch_size", type=positive, default=8, help="rows per process in a forward and backward pass")
    group.add_argument("--accumulation_steps", type=positive, default=1, help="such passes in an optimizer step")
    group.add_argument("--max_seq_len", type=positive, default=512, help="tokens in a row")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="after the warm-up")
    group.add_argument("--min_learning_rate", type=float, default=1e-5, help="at the end of the cosine")
    group.add_argument("--warmup_steps", type=int, default=100, help="steps of linear rise")
    group.add_argument("--weight_decay", type=float, default=0.1, help="of the matrices")
    group.add_argument("--grad_clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="update rule")
    group = parser.add_argument_group("the machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    group.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of matrix products"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile: starts slower, runs faster on a GPU")
    group.add_argument("--grad_checkpointing", action="store_true", help="much less memory for a third more work")
    group = parser.add_argument_group("what is shown and kept")
    group.add_argument("--log_interval", type=positive, default=10, help="steps between two lines of the log")
    group.add_argument("--eval_interval", type=positive, default=200, help="steps between two validations")
    group.add_argument("--eval_rows", type=positive, default=64, help="rows of a validation; the last one takes all")
    group.add_argument("--save_interval", type=positive, default=200, help="steps between two checkpoints")
    group.add_argument("--wandb", choices=["disabled", "offline", "online"], default="disabled", help="tracking")
    group = parser.add_argument_group("this stage")
    for name, options in (stage_flags or {}).items():
        group.add_argument(name, **options)
    parser.set_defaults(**stage_defaults)
    parser.set_defaults(**TRAINING_FLAGS.get(parser.parse_known_args()[0].preset, {}))
    return parser.parse_args()


def run(main: Callable[[], None]):
    """Calls main(). A user's mistake ends in one line and exit status 2, a failure of the machine in one line and 1."""
    try:
        main()
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        _exit(error, 2)
    except (OSError, FloatingPointError) as error:
        _exit(error, 1)
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


# ---------------------------------------------------------------------------------------------------------- the machine


@dataclass
class Machine:
    """Which of the processes this one is, and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer are float32

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up the tensors of all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value) -> list:
        """The values of all processes, in the order of their ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """ValueError when torch does not know, or this machine does not have, the device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def start_machine(args: argparse.Namespace) -> Machine:
    """Joins the other processes when torchrun started this one, and chooses device and number format."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(args.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype = args.dtype
    if dtype == "auto":  # bfloat16 before compute capability 8.0 is emulated: "supported", and slow
        dtype = "float32"
        if device.type == "cuda":
            dtype = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    torch.manual_seed(args.seed)
    return Machine(int(os.environ.get("RANK", 0)), world_size, device, getattr(torch, dtype))


def matmul_rate(machine: Machine, size: int = 2048) -> float:
    """The machine's limit: floating-point operations a second of a plain square matrix product, best of ten."""
    a, b = (torch.randn(size, size, device=machine.device, dtype=machine.dtype) for _ in range(2))
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def step_flops(model: CausalLM, tokens: int, attention_pairs: int) -> float:
    """Floating-point operations of forward and backward: 6 a weight and token (arXiv 2001.08361, 2.1), and for each
    layer and query-key pair 12 a number of the query, for q k^T and its product with v. Padding is not counted."""
    config = model.config
    weights = model.num_parameters() - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    pair = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6 * weights * tokens + pair * attention_pairs


def memory_estimate(model: CausalLM, args: argparse.Namespace, bytes_per_number: int = 4) -> int:
    """Bytes at the peak of a training step: float32 weights, gradients and two Adam moments, and what each layer keeps
    for the backward pass."""
    config, tokens = model.config, args.batch_size * args.max_seq_len
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = 7 * config.hidden_size + 5 * heads + 4 * config.intermediate_size
    kept = (
        config.hidden_size * config.num_hidden_layers + layer
        if args.grad_checkpointing
        else (layer * config.num_hidden_layers)
    )
    return 16 * model.num_parameters() + bytes_per_number * tokens * kept


# --------------------------------------------------------------------------------- loss, optimizer, schedule, gradients


def next_token_loss(model: CausalLM, batch: Batch) -> tuple[Tensor, int, dict[str, float]]:
    """The sum over all scored tokens of -ln p(token | the tokens before it in its document), and their number.

    The logits (B * T, V) are the largest tensor of a small model. They are made, reduced and turned into gradients a
    chunk of tokens at a time, which also keeps them in the processor's cache.
    """
    hidden = model.model(batch.input_ids, batch.position_ids)  # (B, T, H)
    loss_sum = F.linear_cross_entropy(
        hidden.flatten(0, 1),
        model.lm_head.weight.to(hidden.dtype),
        batch.labels.flatten(),
        reduction="sum",
        ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return loss_sum, int((batch.labels != IGNORE).sum()), {}


@torch.no_grad()
def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Makes all singular values of each matrix (n, rows, columns) roughly 1, by Newton-Schulz iteration.

    The polynomial's coefficients are Keller Jordan's (Muon, 2024): they lift small singular values in few steps and
    leave all between about 0.7 and 1.2. In float32 on a CPU, where bfloat16 products can be a hundred times slower.
    """
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices  # the products below are of the short side
    if x.device.type == "cuda":
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for the matrices of the layers; Adam for embedding, head and norms.

    Scaled as in arXiv 2502.16982, eq. 4, so that an update is of the size of Adam's and both share a learning rate.
    Matrices of one shape are updated as one batch.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, betas=(0.9, 0.95), eps: float = 1e-8):
        super().__init__(groups, dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=0.0, matrices=False))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["matrices"]:
                self._muon(group)
            else:
                self._adam(group)

    def _muon(self, group: dict):
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                state, gradient = self.state[parameter], parameter.grad
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(gradient, 1 - group["momentum"])
                updates.append(gradient.lerp(momentum, group["momentum"]))  # Nesterov
            size = -group["lr"] * 0.2 * max(shape) ** 0.5
            for parameter, update in zip(parameters, orthogonalize(torch.stack(updates))):
                parameter.add_(update, alpha=size)

    def _adam(self, group: dict):
        for parameter in group["params"]:
            state, (beta1, beta2) = self.state[parameter], group["betas"]
            if not state:
                state |= {
                    "step": torch.zeros(()),
                    "mean": torch.zeros_like(parameter),
                    "square": torch.zeros_like(parameter),
                }
            state["step"] += 1
            n = state["step"].item()
            state["mean"].lerp_(parameter.grad, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            scale = (state["square"] / (1 - beta2**n)).sqrt_().add_(group["eps"])
            parameter.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - beta1**n))


def build_optimizer(model: CausalLM, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) or Muon. Only matrices decay: shrinking a norm's weight would regularise nothing."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [p for name, p in trainable.items() if p.dim() > 1 and ".layers." in name]
    tables = [p for name, p in trainable.items() if p.dim() > 1 and ".layers." not in name]  # embedding and head
    vectors = [p for p in trainable.values() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay, "matrices": True},
        {"params": tables, "weight_decay": args.weight_decay, "matrices": False},
        {"params": vectors, "weight_decay": 0.0, "matrices": False},
    ]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "muon":
        return Muon(groups, lr=args.learning_rate)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(args: argparse.Namespace, step: int, done: float) -> float:
    """Linear warm-up, then half a cosine from learning_rate to min_learning_rate while `done` goes from 0 to 1."""
    warm = min(1.0, (step + 1) / max(args.warmup_steps, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return warm * (args.min_learning_rate + (args.learning_rate - args.min_learning_rate) * cosine)


class GradientBuffer:
    """All gradients as views of one flat tensor, with the step's sums at its end: one all-reduce carries everything.

    A parameter that no token reached keeps a zero there, so nothing waits for its gradient.
    """

    SUMS = ("loss", "tokens", "real_tokens", "flops", "stop", "seconds", "step_seconds")  # then the stage's metrics

    def __init__(self, parameters: list[Tensor], room_for_metrics: int = 16):
        total = sum(parameter.numel() for parameter in parameters)
        self.names = list(self.SUMS)
        self.flat = torch.zeros(total + len(self.names) + room_for_metrics, device=parameters[0].device)
        self.gradients, self.sums = self.flat[:total], self.flat[total:]
        at = 0
        for parameter in parameters:
            parameter.grad = self.gradients[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()

    def add(self, **sums: float | Tensor):
        for name, value in sums.items():
            if name not in self.names:
                self.names.append(name)
            self.sums[self.names.index(name)] += value

    def all_reduce(self, machine: Machine) -> dict[str, float]:
        """Adds the gradients and sums of all processes; returns the sums."""
        machine.sum(self.flat)
        return dict(zip(self.names, self.sums.tolist()))


def optimizer_step(optimizer, buffer: GradientBuffer, scaler, scale: float, grad_clip: float) -> float:
    """Multiplies the gradients by `scale`, clips their norm, updates the weights; returns the norm before clipping.

    Where it is not finite, on any process and so after the all-reduce on all of them, the weights stay as they are.
    """
    buffer.gradients.mul_(scale)
    scaler.unscale_(optimizer)  # does nothing but for float16
    norm = buffer.gradients.norm().item()
    if math.isfinite(norm) and bool(buffer.sums.isfinite().all()):
        if norm > grad_clip:
            buffer.gradients.mul_(grad_clip / norm)
        scaler.step(optimizer)
    else:
        norm = math.nan
    scaler.update()
    buffer.flat.zero_()
    return norm


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
        self.out_dir, self.tokenizer_dir, self.in_place = args.out_dir, tokenizer_dir, args.resume
        self.is_chat = data.meta["kind"] != "pretrain"
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.must_agree = {
            "data": fingerprint(data),
            "tokenizer": tokenizer_fingerprint(tokenizer_dir),
            "seed": args.seed,
            "max_seq_len": args.max_seq_len,
        }

    def save(self, progress: Progress, log: "Log"):
        random_states = self.machine.gather(torch.get_rng_state())
        if self.machine.rank == 0:
            directory = self.out_dir if self.in_place else self.out_dir.with_name(self.out_dir.name + ".new")
            trained = {name: parameter for parameter, name in self.names.items() if parameter.requires_grad}
            tensors = {f"weight.{name}": parameter.data for name, parameter in trained.items()}
            for parameter, state in self.optimizer.state.items():
                tensors |= {f"optimizer.{self.names[parameter]}/{key}": value for key, value in state.items()}
            tensors |= {f"random.{rank}": state for rank, state in enumerate(random_states)}
            save_state(directory, tensors, {"progress": asdict(progress), "must_agree": self.must_agree})
            save_model(directory, self.model, self.tokenizer_dir, self.is_chat, self.args.init_from)
            write_json(directory / "run.json", self.run_record())
            log.write(directory)
            if not self.in_place:
                replace_directory(self.out_dir, directory)
        self.in_place = True

    def resume(self) -> Progress:
        """Takes weights, optimizer, position and random states from out_dir. ValueError names what does not agree."""
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
            elif kind == "optimizer":
                name, _, entry = name.rpartition("/")
                self.optimizer.state[parameters[name]][entry] = tensor
            elif kind == "random" and int(name) == self.machine.rank:
                torch.set_rng_state(tensor.cpu())
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


# -------------------------------------------------------------------------------------------------------------- the log


SHOWN = {  # how a value of a record is printed, where its name alone does not say
    "step": "step {:,}",
    "tokens": "{:,} tokens",
    "val_bits_per_byte": "{:.3f} bits/byte",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "norm {:.2f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "share_of_peak": "{:.0%} of peak",
    "real_share": "{:.0%} real",
    "minutes": "{:.1f} min",
    "minutes_left": "{:.1f} left",
}


class Log:
    """Records for metrics.jsonl, loss.png and wandb; on a terminal they move a bar, elsewhere each is a line."""

    def __init__(self, args: argparse.Namespace, machine: Machine, until_step: int):
        self.args, self.quiet, self.records, self.bar, self.wandb = args, machine.rank != 0, [], None, None
        path = args.out_dir / "metrics.jsonl"
        if args.resume and path.exists():
            records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            self.records = [record for record in records if record["step"] <= until_step]
        if self.quiet:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=100, unit="%", bar_format="{percentage:3.0f}% |{bar}| {postfix}", dynamic_ncols=True)
        if args.wandb != "disabled":
            import wandb

            self.wandb = wandb.init(project="jiezi", name=args.out_dir.name, mode=args.wandb, config=vars(args))

    def say(self, text: str):
        if not self.quiet:
            self.bar.write(text, file=sys.stdout) if self.bar else print(text, flush=True)

    def add(self, done: float, record: dict):
        self.records.append(record)
        if self.quiet:
            return
        shown = "  ".join(SHOWN.get(name, name + " {:.3f}").format(value) for name, value in record.items())
        if self.bar:
            self.bar.n = 100 * min(done, 1)
            self.bar.set_postfix_str(shown)
        if not self.bar or "val_loss" in record:
            self.say(shown)
        if self.wandb:
            self.wandb.log(record, step=record["step"])

    def write(self, directory: Path):
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write_file(directory / "metrics.jsonl", lambda temporary: temporary.write_text(lines, "utf-8"))
        write_file(directory / "loss.png", lambda temporary: plot(self.records, temporary))

    def close(self):
        if self.bar:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


def plot(records: list[dict], path: Path):
    """Loss and metrics, of training and validation, over the tokens seen."""
    from matplotlib.figure import Figure

    panels = {}  # the loss, and the stage's metrics: those whose names begin with the same word share a panel
    for name in records[-1]:
        if name not in SHOWN and not name.startswith("val_"):
            panels.setdefault(name.partition("_")[0], []).append(name)
    figure = Figure(figsize=(8, 1.5 + 3 * len(panels)), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items()):
        for name in names:
            for key, style in ((name, dict(lw=1, alpha=0.7)), (f"val_{name}", dict(lw=1.5, marker="o", ms=4))):
                points = [(record["tokens"] / 1e6, record[key]) for record in records if key in record]
                axes.plot(*zip(*points), label=key, **style)
        axes.set(xlabel="million tokens", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png", dpi=120)


class Meter:
    """Time, and what happened since the last line of the log."""

    def __init__(self, machine: Machine, done: float):
        self.peak = matmul_rate(machine)  # measured by all processes at once
        self.world_size, self.done_at_start = machine.world_size, done
        self.started = self.last_call = time.perf_counter()
        self.window = Counter()

    def start_step(self):
        self.step_started = time.perf_counter()

    def times(self) -> dict[str, float]:
        """Seconds since the last call, in which validation and saving are, and seconds of this step."""
        last, self.last_call = self.last_call, time.perf_counter()
        return {"seconds": self.last_call - last, "step_seconds": self.last_call - self.step_started}

    def add(self, sums: dict[str, float], row_tokens: int):
        self.window.update(sums)
        self.window["row_tokens"] += row_tokens

    def record(self, progress: Progress, done: float, learning_rate: float, grad_norm: float, metrics: list) -> dict:
        """A line of the log. Speed counts real tokens only; the peak is what plain matrix products reach."""
        window, self.window = self.window, Counter()
        seconds_left = (time.perf_counter() - self.started) * (1 - done) / max(done - self.done_at_start, 1e-9)
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": window["loss"] / window["tokens"],
            **{name: window[name] / window["tokens"] for name in metrics},
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_s": window["real_tokens"] / window["step_seconds"],
            "share_of_peak": window["flops"] / window["step_seconds"] / (self.peak * self.world_size),
            "real_share": window["real_tokens"] / window["row_tokens"],
            "minutes": progress.seconds / 60,
            "minutes_left": seconds_left / 60,
        }


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
    buffer = GradientBuffer([parameter for parameter in model.parameters() if parameter.requires_grad])
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    log = Log(args, machine, progress.step)
    meter = Meter(machine, progress.done(args, len(train_set)))
    log.say(describe(args, machine, model, train_set, meter.peak))
    if args.compile:
        model.model.compile()

    def validate(rows: int | None = None) -> dict:
        return evaluate(model, loss_fn, val_set, bytes_of_token, machine, args.batch_size, rows)

    if progress.step == 0:
        log.add(0.0, {"step": 0, "tokens": 0, **validate(args.eval_rows)})
        if args.init_from is None:
            check_first_loss(log, model.config.vocab_size)
    rows_per_step = args.batch_size * args.accumulation_steps * machine.world_size
    scale = args.batch_size * args.max_seq_len  # divides the loss: sums over a batch would not fit float16
    order = train_set.order(args.seed, progress.epoch)
    stopped = False
    with StopRequest() as stop:
        while not stopped and (done := progress.done(args, len(train_set))) < 1:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, progress.step, done)

            meter.start_step()

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
            buffer.add(stop=stop.made, **(meter.times() if machine.rank == 0 else {}))
            sums = buffer.all_reduce(machine)  # the only one of a step
            if sums["stop"]:  # on some process the step is not whole: leave it out; --resume does it again
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

            # Log, validate, save.
            meter.add(sums, len(rows) * args.max_seq_len)
            done = progress.done(args, len(train_set))
            evaluates = done >= 1 or progress.step % args.eval_interval == 0
            if evaluates or progress.step % args.log_interval == 0:
                lr = optimizer.param_groups[0]["lr"]
                record = meter.record(progress, done, lr, grad_norm, buffer.names[len(buffer.SUMS) :])
                log.add(done, record | (validate(args.eval_rows if done < 1 else None) if evaluates else {}))
            if done >= 1 or progress.step % args.save_interval == 0:
                checkpointer.save(progress, log)
    if stopped and progress.step > 0:
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
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lines = [
        f"model    {model.num_parameters():,} parameters, {trained:,} of them trained ({trained / model.num_parameters():.1%})",
        f"data     {args.data}: {data.n_tokens:,} tokens in {len(data):,} rows of {args.max_seq_len}, "
        f"{data.real_share:.1%} of them real",
        f"machine  {machine.world_size} x {machine.device.type}, {str(machine.dtype).removeprefix('torch.')}, "
        f"matrix products at {peak / 1e9:,.0f} GFLOP/s each",
        f"step     {rows} rows, {rows * args.max_seq_len:,} tokens; about "
        f"{memory_estimate(model, args) / 2**30:.1f} GiB in each process",
        f"time     about {min(minutes, args.max_minutes or math.inf):,.0f} minutes",
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
