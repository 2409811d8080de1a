"""The only file that knows the disk format: a Hugging Face model, and beside it what resuming needs.

    out/<stage>/
        config.json  model.safetensors  generation_config.json      the model; transformers loads it as it is
        tokenizer.json  tokenizer_config.json  chat_template.jinja  a copy of the tokenizer in use
        training_state/state.safetensors                            weights, optimizer, position, random states
        run.json  metrics.jsonl  loss.png                           how it was made

Everything is JSON or safetensors: nothing is ever unpickled. Each file is written beside its place and renamed into it,
so a kill leaves the old or the new one, whole; the training state has its own copy of the weights, so that what a run
resumes from always belongs together.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.chat import IM_END
from model.LMConfig import LMConfig
from model.lora import from_peft, has_lora, to_peft
from model.model import CausalLM

UMASK = os.umask(0o077)
os.umask(UMASK)  # the only way to read it is to set it
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model")
MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
STATE_FILE = "training_state/state.safetensors"


def write_file(path: Path, write):
    """Calls write(temporary_path) and renames the result to `path`. OSError, and the old file stays, if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the content must reach the disk before the name does
        temporary.chmod(0o666 & ~UMASK)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}); what was saved before is untouched") from None


def write_json(path: Path, value):
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, "utf-8"))


def replace_directory(directory: Path, written: Path):
    """Puts `written` in the place of `directory`; what stood there is kept as `<directory>.old`, one generation."""
    old, new = (directory.with_name(directory.name + suffix) for suffix in (".old", ".new"))
    shutil.rmtree(new, ignore_errors=True)
    written.rename(new)  # this name says that it is whole
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    finish_replacing(directory)


def finish_replacing(directory: Path):
    """The last step of replace_directory; whoever reads `directory` takes it too, in case of a kill before it."""
    with contextlib.suppress(FileNotFoundError):  # another process may be as quick
        if not directory.exists():
            directory.with_name(directory.name + ".new").rename(directory)


def save_model(directory: Path, model: CausalLM, tokenizer_dir: Path, is_chat: bool, base_dir: Path | None = None):
    """Writes the model, in float32, and its tokenizer as a Hugging Face model.

    Of a model with LoRA adapters only those are written, in PEFT's format, with base_dir as the model they belong to.
    """
    for name in TOKENIZER_FILES:
        source = Path(tokenizer_dir) / name
        if source.exists() and source.resolve() != (directory / name).resolve():
            write_file(directory / name, lambda temporary, source=source: shutil.copyfile(source, temporary))
    if has_lora(model):
        tensors, adapter_config = to_peft(model)
        write_json(directory / "adapter_config.json", adapter_config | {"base_model_name_or_path": str(base_dir)})
        metadata = {"format": "pt", "base_sha256": weights_fingerprint(base_dir)}
        write_file(directory / ADAPTER_FILE, lambda path: save_file(tensors, path, metadata=metadata))
        return
    config = model.config
    write_json(directory / "config.json", config.to_hf())
    stop_ids = [config.eos_token_id, IM_END] if is_chat else [config.eos_token_id]
    write_json(directory / "generation_config.json", {"bos_token_id": config.bos_token_id, "eos_token_id": stop_ids})
    tensors = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    tensors = to_disk(config, tensors)
    write_file(directory / MODEL_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def to_disk(config: LMConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as transformers' mixtures of experts expect them; a dense model's are the same.

    Qwen2-MoE (softmax) multiplies its shared expert by sigmoid(gate x): the gate is written as zeros, which gives 1/2,
    and the expert's output matrix doubled. It knows no routed_scaling_factor: the experts' output matrices take it in.
    Both architectures always have a shared expert; where ours has none, it is zero or empty.
    """
    if not config.use_moe:
        return tensors
    softmax = config.scoring_func == "softmax"
    disk = {}
    for name, tensor in tensors.items():
        if softmax and ".mlp.experts." in name and name.endswith("down_proj.weight"):
            tensor = tensor * config.routed_scaling_factor
        elif softmax and ".mlp.shared_experts.down_proj" in name:
            tensor = tensor * 2
        disk[name.replace(".shared_experts.", ".shared_expert.") if softmax else name] = tensor
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        shared = f"model.layers.{layer}.mlp.shared_expert" + ("" if softmax else "s")
        if softmax:
            disk[f"{shared}_gate.weight"] = torch.zeros(1, config.hidden_size)
        if not config.n_shared_experts:
            size = config.moe_intermediate_size if softmax else 0
            for name in ("gate_proj", "up_proj"):
                disk[f"{shared}.{name}.weight"] = torch.zeros(size, config.hidden_size)
            disk[f"{shared}.down_proj.weight"] = torch.zeros(config.hidden_size, size)
    return disk


def from_disk(config: LMConfig, disk: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of to_disk. ValueError for a shared expert whose gate is not zero: model.py has none."""
    if not config.use_moe:
        return disk
    softmax = config.scoring_func == "softmax"
    tensors = {}
    for name, tensor in disk.items():
        if name.endswith(".shared_expert_gate.weight"):
            if tensor.any():
                raise ValueError(f"{name} is not zero: gated shared experts are not supported")
        elif config.n_shared_experts or ".shared_expert" not in name:
            if softmax and ".mlp.experts." in name and name.endswith("down_proj.weight"):
                tensor = tensor / config.routed_scaling_factor
            elif softmax and ".mlp.shared_expert.down_proj" in name:
                tensor = tensor / 2
            tensors[name.replace(".shared_expert.", ".shared_experts.")] = tensor
    return tensors


def weights_fingerprint(directory: Path) -> str:
    """SHA-256 of model.safetensors."""
    return hashlib.sha256((Path(directory) / MODEL_FILE).read_bytes()).hexdigest()


def is_chat_model(directory: Path) -> bool:
    """Whether the model was trained to stop at the end of a turn."""
    path = Path(directory) / "generation_config.json"
    stop_ids = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.exists() else None
    return IM_END in (stop_ids if isinstance(stop_ids, list) else [stop_ids])


def load_adapter(model: CausalLM, directory: Path, base_dir: Path):
    """Puts the adapters in `directory` on the model that was loaded from base_dir. ValueError if it is another one."""
    finish_replacing(Path(directory))
    path = Path(directory) / "adapter_config.json"
    if not path.exists():
        raise FileNotFoundError(f"no adapter in {directory}; train one with: python 3-lora.py")
    tensors = _load_tensors(Path(directory) / ADAPTER_FILE, model.lm_head.weight.device)
    with safe_open(Path(directory) / ADAPTER_FILE, framework="pt") as file:
        expected = (file.metadata() or {}).get("base_sha256")
    if expected and expected != weights_fingerprint(base_dir):
        raise ValueError(f"the adapter in {directory} was trained on other weights than those in {base_dir}")
    from_peft(model, tensors, json.loads(path.read_text("utf-8")))


def load_config(directory: Path) -> LMConfig:
    """FileNotFoundError or ValueError, with what to do, when `directory` does not hold a model of ours."""
    finish_replacing(Path(directory))
    path = Path(directory) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"no model in {directory}; train one with: python 1-pretrain.py")
    try:
        return LMConfig.from_hf(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_model(directory: Path, device: torch.device | str = "cpu") -> CausalLM:
    config = load_config(directory)
    with torch.device("meta"):  # no memory and no random numbers for weights that are read from the file
        model = CausalLM(config)
    path = Path(directory) / MODEL_FILE
    load_weights(model, from_disk(config, _load_tensors(path, device)), path)
    return model.to(device)


def load_weights(model: CausalLM, tensors: dict[str, Tensor], path: Path):
    """Puts the tensors into the model. ValueError names a tensor that is missing, left over, or of another size."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{path} does not fit its config.json: {name} is {found.get(name, 'missing')} in the file and "
                f"{expected.get(name, 'absent')} in the model"
            )
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def check_same_config(found: LMConfig, wanted: LMConfig, directory: Path):
    """ValueError that names every field that differs."""
    differing = [name for name in vars(wanted) if getattr(found, name) != getattr(wanted, name)]
    if differing:
        details = ", ".join(f"{name} {getattr(found, name)} there, {getattr(wanted, name)} here" for name in differing)
        raise ValueError(f"{directory} holds another model ({details}); use its --preset, or another --out_dir")


def _load_tensors(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def save_state(directory: Path, tensors: dict[str, Tensor], info: dict):
    """Everything that resuming needs, in one file. `info` is JSON."""
    metadata = {"format": "pt", "info": json.dumps(info)}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_file(directory / STATE_FILE, lambda path: save_file(tensors, path, metadata=metadata))


def state_file(directory: Path) -> Path:
    """FileNotFoundError when there is nothing to resume."""
    finish_replacing(directory)
    path = directory / STATE_FILE
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume in {directory}: {STATE_FILE} is missing; start without --resume")
    return path


def load_state(directory: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict]:
    path = state_file(directory)
    tensors = _load_tensors(path, device)
    with safe_open(path, framework="pt") as file:
        return tensors, json.loads(file.metadata()["info"])
