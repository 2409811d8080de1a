"""Saving and resuming: what a run leaves in its folder, and how another run continues from there, bit for bit.

    out/<stage>/
        config.json  model.safetensors  tokenizer.json  …   the model, for its users (model/checkpoint.py)
        training_state/state.safetensors                    weights, optimizer, position, random states
        run.json  metrics.jsonl  loss.png                   how it was made

Each file is written under another name and renamed, so that a kill leaves the old or the new file, never a part of one.
The training state has its own copy of the weights, so that what a run resumes from always belongs together.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import filelock
import torch
from torch import Tensor

from base.cli import UserError, command_line
from base.files import RUN_FILE, STATE_FILE, finish_replacing, replace_directory, write_json
from model.chat import load_tokenizer
from model.checkpoint import (
    full_tensor,
    load_config,
    load_tensors,
    save_model,
    save_tensors,
    tensors_on_disk,
    weights_fingerprint,
)
from model.LMConfig import LMConfig
from model.lora import has_lora, to_peft
from model.model import CausalLM
from training.log import Log
from training.machine import Machine
from training.packing import PackedDataset
from training.schedule import TrainState
from training.shard import distribute_tensor, local_shard

OWN_FLAGS = ("data", "mix", "init_from", "out_dir", "device", "wandb", "tensorboard")  # may differ by machine


@dataclass(frozen=True)
class SavingSettings:
    out_dir: Path
    init_from: Path | None
    resume: str | None  # "must", "auto" or None
    save_interval: int


def state_file(out_dir: Path) -> Path:
    """UserError when there is nothing to resume."""
    finish_replacing(out_dir)
    path = out_dir / STATE_FILE
    if not path.exists():
        raise UserError(f"nothing to resume in {out_dir}: {STATE_FILE} is missing; start without --resume")
    return path


def should_resume(resume: str | None, out_dir: Path) -> bool:
    """Whether this run continues the one in out_dir; UserError where it should and cannot.

    torchrun --max-restarts starts the same command again: without --resume that would start over, and move away what
    the run before it had saved.
    """
    if resume == "must":
        state_file(out_dir)
    if resume is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise UserError("this is a restart by torchrun, and would start over; give --resume auto")
    finish_replacing(out_dir)
    return resume is not None and (out_dir / STATE_FILE).exists()


def resolve_out_dir(out_dir: Path) -> Path:
    """out_dir with links and "." resolved, since it is renamed when another run takes its place. UserError where that
    is impossible."""
    if out_dir.is_symlink() or not out_dir.name:
        out_dir = Path(os.path.realpath(out_dir))  # resolve() raises in a circle, but not from Python 3.13 on
    if out_dir.is_symlink():
        raise UserError(f"--out_dir {out_dir} leads nowhere: its links form a circle")
    if os.path.ismount(out_dir):
        raise UserError(f"--out_dir {out_dir} is where a disk is mounted, and cannot be replaced; give a folder in it")
    return out_dir


def lock_run(out_dir: Path) -> filelock.BaseFileLock:
    """A lock until the process ends, also by a kill. UserError while another run has it: their files would mix."""
    path = out_dir.with_name(f".{out_dir.name}.lock")
    lock = filelock.FileLock(path)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)  # server/runs.py takes it for a moment, to see whether it is free
    except filelock.Timeout:
        if not path.exists():  # such as in /proc
            raise UserError(f"--out_dir {out_dir} cannot be written (no file can be made beside it)") from None
        raise UserError(f"another run is writing to {out_dir}; wait for it, or choose another --out_dir") from None
    except OSError as error:
        raise UserError(f"--out_dir {out_dir} cannot be written ({error.strerror or error})") from None
    return lock


def check_out_dir(out_dir: Path, flags: dict):
    """UserError where a new run would replace a folder that it reads, or something that no run has made."""
    old = out_dir.with_name(f"{out_dir.name}.old")  # deleted when out_dir takes its name
    for directory in (out_dir, old):
        for flag, value in flags.items():
            if isinstance(value, Path) and flag != "out_dir" and directory.resolve() == value.resolve():
                raise UserError(f"--out_dir {out_dir} would replace the folder of --{flag}; choose another")
        if not directory.exists() or (directory / RUN_FILE).exists():
            continue
        if not directory.is_dir() or any(directory.iterdir()):
            raise UserError(
                f"{directory} contains something else than a run; choose another --out_dir, or move it away"
            )


class Checkpointer:
    """Writes out_dir: the model for its users, the state for --resume, and how the run was made.

    Until the first save everything is in a hidden neighbour, `directory`. That save renames the neighbour to out_dir,
    and moves an earlier run that was there to out_dir.old: from then on this run has something to show for itself.
    """

    def __init__(
        self,
        settings: SavingSettings,
        flags: dict,
        machine: Machine,
        model: CausalLM,
        optimizer,
        scaler,
        data: PackedDataset,
        reference: Path | None = None,
    ):
        """flags: of the command line, by name. reference: the folder of a model that the loss reads."""
        self.settings, self.flags, self.machine, self.model = settings, flags, machine, model
        self.optimizer, self.scaler = optimizer, scaler
        self.out_dir = resolve_out_dir(settings.out_dir)
        self.tokenizer_dir = settings.init_from or data.tokenizer_dir
        if data.chat_template_sha256 and not load_tokenizer(self.tokenizer_dir).brings_template:
            self.tokenizer_dir = data.tokenizer_dir  # it has the template that the model learns
        self.resumed = should_resume(settings.resume, self.out_dir)
        self.directory = self.out_dir if self.resumed else self.out_dir.with_name(f".{self.out_dir.name}.writing")
        self.saved_step = 0
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.must_agree = {
            "data": data.fingerprint,
            "mix": data.weights if len(data.weights) > 1 else None,
            "tokenizer": data.tokenizer_sha256,
            "seed": flags["seed"],
            "max_seq_len": flags["max_seq_len"],
            "base": weights_fingerprint(settings.init_from) if has_lora(model) else None,  # of the adapter
            "adapter": adapter_summary(model) if has_lora(model) else None,
            "reference": reference and weights_fingerprint(reference),
            "optimizer": flags["optimizer"],
        }
        self.check_others()
        if machine.rank == 0:
            self.lock = lock_run(self.out_dir)
        if not self.resumed:
            check_out_dir(self.out_dir, flags)
            if machine.rank == 0:
                shutil.rmtree(self.directory, ignore_errors=True)
                self.directory.mkdir(parents=True)  # a folder that cannot be written is found before the first step

    def check_others(self):
        """UserError where another process, perhaps on another machine, was started with other flags or data."""
        flags = {name: value for name, value in self.flags.items() if name not in OWN_FLAGS}
        here = self.must_agree | flags
        for rank, there in enumerate(self.machine.gather(here)):
            for name, value in here.items():
                if there.get(name) != value:
                    both = f"process {rank} has {there.get(name)}, process {self.machine.rank} {value}"
                    raise UserError(f"all processes must be started alike; of {name} {both}")

    def save(self, state: TrainState, log: Log):
        tensors = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                tensors[f"weight.{name}"] = parameter.data
        for name, buffer in self.model.named_buffers():
            tensors[f"buffer.{name}"] = buffer
        for parameter, moments in self.optimizer.state.items():
            for entry, value in moments.items():
                tensors[f"optimizer.{self.names[parameter]}/{entry}"] = value
        for rank, random_state in enumerate(self.machine.gather(self.machine.random_state())):
            tensors[f"random.{rank}"] = random_state
        if self.machine.rank == 0:
            info = {"progress": asdict(state), "must_agree": self.must_agree, "scaler": self.scaler.state_dict()}
            save_tensors(self.directory / STATE_FILE, tensors, info=json.dumps(info))
        elif self.machine.shards:  # every process must take part in a gather
            for tensor in tensors.values():
                full_tensor(tensor)
        self.export_model()
        if self.machine.rank == 0:
            write_json(self.directory / RUN_FILE, self.run_record())
            if self.directory != self.out_dir:
                replace_directory(self.out_dir, self.directory, keep_old=True)
        self.directory = log.directory = self.out_dir
        if self.machine.rank == 0 and not self.machine.stop.made:  # torchrun kills 30 seconds after SIGTERM
            log.draw()
        self.saved_step = state.step

    def export_model(self):
        """The model for its users."""
        if self.machine.rank == 0:
            save_model(self.directory, self.model, self.tokenizer_dir, self.settings.init_from)
        elif self.machine.shards:
            for tensor in tensors_on_disk(self.model).values():
                full_tensor(tensor)

    def discard(self):
        """Deletes the hidden neighbour of a run that ends before its first save."""
        if self.directory != self.out_dir and self.machine.rank == 0:
            shutil.rmtree(self.directory, ignore_errors=True)

    def resume(self) -> TrainState:
        """Restores weights, optimizer, position and random states from out_dir. UserError names what does not agree."""
        if not has_lora(self.model):
            check_same_config(load_config(self.out_dir), self.model.config, self.out_dir)
        device = "cpu" if self.machine.shards else self.machine.device  # there a file is read lazily
        path = state_file(self.out_dir)
        tensors, texts = load_tensors(path, device)
        try:
            info = json.loads(texts["info"])
            agreed, state = dict(info["must_agree"]), TrainState(**info["progress"])
            math.fsum(vars(state).values())
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path} is not the state of a run: its info is missing or damaged") from None
        for name, here in self.must_agree.items():
            there = agreed.get(name, here)  # older runs have no "mix"
            if there != here:
                raise UserError(f"cannot resume {self.out_dir}: its {name} was {there}, and is {here} now")
        try:
            self.restore(tensors)
        except (KeyError, AttributeError, RuntimeError, TypeError) as error:
            raise UserError(f"{path} is not the state of this model and optimizer: {error}") from None
        if self.scaler.is_enabled() and info.get("scaler"):  # a run in another dtype has none
            self.scaler.load_state_dict(info["scaler"])
        self.export_model()  # a kill may have come after the state was saved and before the model was
        self.saved_step = state.step
        return state

    def restore(self, tensors: dict[str, Tensor]):
        """Puts the tensors that save() wrote back into model, optimizer and random states."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "weight":
                parameter = parameters[name].data
                local_shard(parameter).copy_(local_shard(distribute_tensor(tensor, parameter)))
            elif kind == "buffer":
                self.model.get_buffer(name).copy_(tensor)
            elif kind == "optimizer":
                name, _, entry = name.rpartition("/")
                entry = {"mean": "exp_avg", "square": "exp_avg_sq"}.get(entry, entry)  # as older runs named them
                tensor = distribute_tensor(tensor, parameters[name])
                # A copy: a tensor of the mapped file would keep Windows from replacing it. On the device, also fused
                # AdamW's step.
                self.optimizer.state[parameters[name]][entry] = tensor.to(self.machine.device, copy=True)
            elif kind == "random" and int(name) == self.machine.rank:
                self.machine.set_random_state(tensor.cpu())
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if missing := sorted(trained - {key.removeprefix("weight.") for key in tensors}):
            raise KeyError(f"weight.{missing[0]} is missing")

    def run_record(self) -> dict:
        arguments = {name: str(v) if isinstance(v, Path) else v for name, v in self.flags.items()}
        return {
            "command": command_line(),
            "arguments": arguments,
            "processes": self.machine.world_size,
            "git_commit": git_commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **self.must_agree,
        }


def adapter_summary(model: CausalLM) -> str:
    """Rank, alpha and matrices: what its weights mean."""
    _, config = to_peft(model)
    return f"rank {config['r']}, alpha {config['lora_alpha']:g}, on {' '.join(config['target_modules'])}"


def git_commit() -> str | None:
    """Of this code; None outside a git checkout, or without git."""
    with contextlib.suppress(OSError):
        command = ["git", "rev-parse", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        if result.returncode == 0:
            return result.stdout.strip()
    return None


def check_same_config(found: LMConfig, wanted: LMConfig, directory: Path):
    """UserError that names every field that differs."""
    names = [field.name for field in fields(wanted) if field.compare]
    differing = [name for name in names if getattr(found, name) != getattr(wanted, name)]
    if differing:
        details = ", ".join(f"{name} {getattr(found, name)} there, {getattr(wanted, name)} here" for name in differing)
        raise UserError(f"{directory} contains another model ({details}); use its --preset, or another --out_dir")
