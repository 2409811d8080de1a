"""Checkpoints: folders that transformers and PEFT load, plus checksums.

    config.json  model.safetensors  generation_config.json      the model; transformers loads it as it is. The weights
                                                                of others may be shards, with an index
    tokenizer.json  tokenizer_config.json  chat_template.jinja  a copy of the tokenizer in use
    adapter_config.json  adapter_model.safetensors              or, instead of the model, an adapter in PEFT's format

    sums.json                                                   SHA-256 of these files, except those of tensors

Everything is JSON or safetensors: nothing is ever unpickled. A file of tensors changes at every save, so its checksum
is in its own header: a kill between two files never leaves a file with another one's checksum.
"""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from base.cli import UserError, lacks_memory
from base.files import (
    NO_SUM,
    RESTORE,
    check_seal,
    check_sums,
    finish_replacing,
    read_json,
    replacing_directory,
    seal,
    sha256,
    write_file,
    write_json,
)
from model.chat import TOKENIZER_FILES, load_tokenizer
from model.LMConfig import LMConfig
from model.lora import from_peft, has_lora, merge_lora, to_peft
from model.model import CausalLM

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
GENERATION_FILE = "generation_config.json"
CONFIG_FILE, ADAPTER_CONFIG_FILE = "config.json", "adapter_config.json"
STAGE_SCRIPTS = {
    "sft": "2-sft.py",
    "lora": "3-lora.py",
    "dpo": "4-dpo.py",
    "grpo": "5-grpo.py",
    "distill": "6-distill.py",
}
SUMS_FILE = "sums.json"
EXPORT_FIELD = "jiezi_export"  # of config.json


def save_model(
    directory: Path,
    model: CausalLM,
    tokenizer_dir: Path,
    base_dir: Path | None = None,
    dtype: torch.dtype = torch.float32,
    is_export: bool = False,
):
    """Writes the model and its tokenizer as a Hugging Face model; find_checkpoints leaves out an export.

    If the model has LoRA adapters, only these are written, in PEFT's format, with base_dir as their base model. dtype:
    of the weights on disk; the balancing bias of experts stays in float32, as transformers requires.
    """
    for name in TOKENIZER_FILES:
        source = Path(tokenizer_dir) / name
        if source.exists() and source.resolve() != (directory / name).resolve():
            write_file(directory / name, lambda temporary, source=source: shutil.copyfile(source, temporary))
    tensors = tensors_on_disk(model, dtype)
    generation = {"bos_token_id": model.config.bos_token_id} | model.generation_config
    if stop_ids(generation) != model.stop_token_ids:
        generation["eos_token_id"] = model.stop_token_ids
    write_json(directory / GENERATION_FILE, generation)
    if has_lora(model):
        _, adapter_config = to_peft(model)
        write_json(directory / ADAPTER_CONFIG_FILE, adapter_config | {"base_model_name_or_path": str(base_dir)})
        save_tensors(directory / ADAPTER_FILE, tensors, base_sha256=weights_fingerprint(base_dir))
        _write_sums(directory, ADAPTER_CONFIG_FILE)
        return
    config = model.config.to_hf()
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    write_json(directory / CONFIG_FILE, config | ({EXPORT_FIELD: True} if is_export else {}))
    save_tensors(directory / MODEL_FILE, tensors)
    _write_sums(directory, CONFIG_FILE)


def tensors_on_disk(model: CausalLM, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors that save_model writes: the adapters if there are any, otherwise the model."""
    if has_lora(model):
        return to_peft(model)[0]
    config = model.config
    tensors = {name: tensor.float() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    disk = to_disk(config, tensors)
    for name, tensor in disk.items():
        if not name.endswith("e_score_correction_bias"):
            disk[name] = tensor.to(dtype)
    return disk


@contextlib.contextmanager
def replacing_model(directory: Path, sources: Sequence[Path], flag: str) -> Iterator[Path]:
    """A new folder for save_model, which replaces `directory` if the block succeeds. UserError if that is one of
    `sources` or contains other files than save_model writes; flag: the one that named it."""
    directory = directory.resolve()  # a link is followed, not replaced
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    ours = {CONFIG_FILE, MODEL_FILE, GENERATION_FILE, SUMS_FILE, *TOKENIZER_FILES}
    if not names <= ours or directory.is_file() or directory in [source.resolve() for source in sources]:
        raise UserError(f"{directory} contains something else than an exported model: give another {flag}")
    with replacing_directory(directory) as new:
        yield new


def _write_sums(directory: Path, config_file: str):
    names = (config_file, GENERATION_FILE, *TOKENIZER_FILES)
    write_json(directory / SUMS_FILE, {name: sha256(directory / name) for name in names if (directory / name).exists()})


def _check_sums(directory: Path):
    """UserError names a file in sums.json that has changed."""
    path = Path(directory) / SUMS_FILE
    if path.exists():  # other programs write none
        check_sums(
            path.parent, read_json(path), f"restore it from a copy, or, if the change was intended, delete {path}"
        )


def check_model(directory: Path):
    """UserError names a damaged or changed file of the models, adapters and training states in a folder."""
    directory = Path(directory)
    finish_replacing(directory)
    paths = set(directory.rglob("*.safetensors"))
    for path in directory.rglob(CONFIG_FILE):
        paths |= {*weight_files(path.parent)}
    paths |= {path.with_name(ADAPTER_FILE) for path in directory.rglob(ADAPTER_CONFIG_FILE)}
    if not paths:
        raise UserError(f"{directory} contains neither prepared data nor a model")
    for path in sorted(paths):
        _read_metadata(path)
        _check_sums(path.parent)


def to_disk(config: LMConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the form of transformers' mixtures of experts; a dense model's are unchanged.

    Qwen2-MoE (softmax) multiplies its shared expert by sigmoid(gate x): the gate is written as zeros, which gives 1/2,
    and the expert's output matrix is doubled. It has no routed_scaling_factor, so the experts' output matrices are
    multiplied by it. Both architectures always have a shared expert; if ours has none, it is zero or empty.
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
    """The inverse of to_disk. UserError for a shared expert whose gate is not zero: model.py has no gate."""
    if not config.use_moe:
        return disk
    softmax = config.scoring_func == "softmax"
    tensors = {}
    for name, tensor in disk.items():
        if name.endswith(".shared_expert_gate.weight"):
            if tensor.any():
                raise UserError(f"{name} is not zero: gated shared experts are not supported")
        elif config.n_shared_experts or ".shared_expert" not in name:
            if softmax and ".mlp.experts." in name and name.endswith("down_proj.weight"):
                tensor = tensor / config.routed_scaling_factor
            elif softmax and ".mlp.shared_expert.down_proj" in name:
                tensor = tensor / 2
            tensors[name.replace(".shared_expert.", ".shared_experts.")] = tensor
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names. UserError for one that is missing."""
    directory = Path(directory)
    index = directory / INDEX_FILE
    if (directory / MODEL_FILE).exists() or not index.exists():
        return [directory / MODEL_FILE]
    shards = read_json(index).get("weight_map")
    names = sorted(set(shards.values())) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index} does not name the files of the weights in weight_map; {RESTORE}")
    for name in names:
        if not (directory / name).exists():
            raise UserError(f"{directory / name} is missing, one of {len(names)} files of the weights: fetch it again")
    return [directory / name for name in names]


def weights_fingerprint(directory: Path) -> str:
    """SHA-256 of model.safetensors; of shards, of their SHA-256 sums. UserError for an adapter's folder."""
    if base_of(directory) != Path(directory):
        raise UserError(
            f"{directory} contains an adapter: merge it first with python export.py {directory} --to merged"
        )
    files = weight_files(directory)
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def stop_ids(content: dict) -> list[int]:
    """The stop tokens that a generation_config.json or config.json names."""
    ids = content.get("eos_token_id")
    return [token_id for token_id in (ids if isinstance(ids, list) else [ids]) if type(token_id) is int]


def load_stop_ids(directory: Path, model: CausalLM):
    """Sets the stop tokens to those of generation_config.json or else config.json, keeps the former, and sets the one
    of its chats."""
    path = Path(directory) / GENERATION_FILE
    if (Path(directory) / "tokenizer.json").exists():
        model.end_of_turn = load_tokenizer(directory).end_of_turn
    if path.exists():
        model.generation_config = read_json(path)
    model.stop_token_ids = stop_ids(model.generation_config) or stop_ids(model.config.hf or {}) or model.stop_token_ids


def load_adapter(model: CausalLM, directory: Path, base_dir: Path):
    """Adds the adapters in `directory` to the model loaded from base_dir. UserError if they belong to another one."""
    finish_replacing(Path(directory))
    path = Path(directory) / ADAPTER_CONFIG_FILE
    if not path.exists():
        raise UserError(f"no adapter in {directory}; train one with: python 3-lora.py")
    tensors, metadata = load_tensors(Path(directory) / ADAPTER_FILE, model.lm_head.weight.device)
    expected = metadata.get("base_sha256")
    if expected and expected != weights_fingerprint(base_dir):
        raise UserError(f"the adapter in {directory} was trained on other weights than those in {base_dir}")
    from_peft(model, tensors, read_json(path))
    _check_sums(directory)
    load_stop_ids(directory, model)


def find_checkpoints(folder: Path) -> list[Path]:
    """The folders of models and adapters, at most 3 levels below `folder`, the newest first. Names with a dot at the
    front are files that are being written. Exports are left out."""
    for unfinished in folder.rglob(".*.new"):  # a kill may have come just before its last step
        if unfinished.is_dir() and not re.search(r"\.\d+\.new$", unfinished.name):
            finish_replacing(unfinished.with_name(unfinished.name[1:].removesuffix(".new")))
    files = [file for depth in (1, 2, 3) for file in folder.glob("*/" * depth + "*model.safetensors")]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files.sort(key=lambda file: (-file.stat().st_mtime, file))
    found = dict.fromkeys(file.parent for file in files if file.name in (MODEL_FILE, ADAPTER_FILE))
    return [directory for directory in found if not _is_export(directory)]


def _is_export(directory: Path) -> bool:
    try:
        return EXPORT_FIELD in read_json(directory / CONFIG_FILE)
    except (UserError, OSError):  # an adapter, or a damaged file: load_config says so
        return False


def load_config(directory: Path) -> LMConfig:
    """UserError if `directory` does not contain a supported model."""
    finish_replacing(Path(directory))
    path = Path(directory) / CONFIG_FILE
    if not path.exists():
        if path.with_name(ADAPTER_CONFIG_FILE).exists():
            raise UserError(f"{directory} contains an adapter, not a model: give its base model")
        script = STAGE_SCRIPTS.get(Path(directory).name, "1-pretrain.py")
        raise UserError(f"no model in {directory}; train one with: python {script}")
    content = read_json(path)
    try:
        config = LMConfig.from_hf(content)
        _check_limits(config)
    except (UserError, TypeError, KeyError, AttributeError) as error:  # a field has a wrong value or type
        raise UserError(f"{path}: {error}") from None
    return config


# No real model is larger: a damaged or malicious config.json is refused before memory is allocated for it.
LIMITS = {"num_hidden_layers": 1000, "n_routed_experts": 10_000, "n_shared_experts": 1000, "vocab_size": 2**24}
LIMITS |= dict.fromkeys(["hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads"], 2**20)
LIMITS |= {"head_dim": 2**16, "num_hidden_layers * n_routed_experts": 100_000}


def _check_limits(config: LMConfig):
    sizes = vars(config) | {"num_hidden_layers * n_routed_experts": config.num_hidden_layers * config.n_routed_experts}
    for name, limit in LIMITS.items():
        if sizes[name] > limit:
            raise UserError(f"{name} must be at most {limit:,}, not {sizes[name]:,}")


def load_outline(directory: Path) -> CausalLM:
    """The model in `directory` on the meta device, without its weights."""
    config = load_config(directory)
    with torch.device("meta"):
        model = CausalLM(config)
    load_stop_ids(directory, model)
    return model


def load_model(directory: Path, device: torch.device | str = "cpu", adapter: Path | None = None) -> CausalLM:
    """The model in `directory`, with the adapter in the folder `adapter` merged into its weights.

    If `directory` itself contains an adapter, its base model is loaded and the adapter merged.
    """
    base = base_of(directory)
    if base != Path(directory):
        if adapter:
            raise UserError(f"{directory} contains an adapter: to merge {adapter} instead, give the base model {base}")
        adapter = directory
    model = load_outline(base)
    tensors = {}
    for path in weight_files(base):
        tensors |= load_tensors(path, device)[0]
    load_weights(model, from_disk(model.config, without_copies(model.config, tensors, path)), path)
    _check_sums(base)
    model = model.to(device)
    if adapter:
        load_adapter(model, adapter, base)
        merge_lora(model)
    return model


def base_of(directory: Path) -> Path:
    """The folder of the model itself: `directory`, or the base model's if it contains an adapter.

    UserError if the adapter does not name its base model.
    """
    finish_replacing(Path(directory))
    path = Path(directory) / ADAPTER_CONFIG_FILE
    if path.with_name(CONFIG_FILE).exists() or not path.exists():
        return Path(directory)
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or not base.isprintable():
        raise UserError(f"{path} does not name the folder of its base model in base_model_name_or_path")
    return Path(base)


def without_copies(config: LMConfig, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Without what older files repeat: the frequencies of the rotation, and a head that is tied to the embedding.
    UserError if that is not the embedding."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    embedding = tensors.get("model.embed_tokens.weight")
    head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UserError(
            f"{path}: lm_head.weight differs from the embedding that config.json ties it to: "
            "if it should, set tie_word_embeddings to false there"
        )
    return tensors


def find_tokenizer(directory: Path, adapter: Path | None = None) -> Path:
    """The folder of a model's tokenizer: an adapter's own, which may have the template that it was trained with, or the
    one of its base model."""
    folders = [folder for folder in (adapter, Path(directory), base_of(directory)) if folder]
    return next((folder for folder in folders if (folder / "tokenizer.json").exists()), folders[-1])


def load_weights(model: CausalLM, tensors: dict[str, Tensor], path: Path):
    """Sets the model's weights. UserError names a tensor that is missing, left over, or of another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} does not fit its config.json: {name} is {found.get(name, 'missing')} in the file and "
                f"{expected.get(name, 'absent')} in the model"
            )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {tensor.dtype}: quantized weights are not supported")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str):
    """Writes a safetensors file with its checksum and further metadata. OSError if it cannot be written."""
    contiguous = {name: full_tensor(tensor).cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path):
        try:
            save_file(contiguous, temporary, metadata={"format": "pt", "sha256": NO_SUM.decode()} | metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        seal(temporary)

    write_file(path, write)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded (training/shard.py). Collective: every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _instead(path: Path) -> str:
    """What to do where a file of tensors is missing."""
    if path.with_suffix(".bin").exists() or path.with_name("pytorch_model.bin").exists():
        return "a .bin file may run code when it is opened, and is not read: fetch the model's safetensors files"
    return RESTORE


def _read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. UserError if it is missing, damaged, or does not have its checksum."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {_instead(path)}") from None
    except (SafetensorError, OSError) as error:
        if lacks_memory(error):
            raise MemoryError(str(error)) from None
        raise UserError(f"{path} is damaged ({error}); {RESTORE}") from None
    check_seal(path)
    return metadata


def load_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. UserError if it is missing or damaged."""
    metadata = _read_metadata(path)
    return load_file(path, device=str(device)), metadata
