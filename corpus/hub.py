"""Models by name, such as Qwen/Qwen3-0.6B: fetched into the cache of Hugging Face or ModelScope, once.

Only settings, tokenizer and safetensors are fetched: nothing that could run code.
"""

import fnmatch
import os
import re
from pathlib import Path

from base.cli import UserError, one_line
from base.files import read_json
from corpus.fetch import (
    HUBS,
    NETWORK,
    NO_SENSE,
    HuggingFace,
    ModelScope,
    RemoteFile,
    check_space,
    explain,
    status_of,
)
from model.LMConfig import LMConfig

SETTINGS = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
OURS = ("out", "dataset", "model")  # folders of this project: a name in them is never one of a hub


def model_folder(name: Path | None, weights: bool = True) -> Path | None:
    """`name`, if it is a folder; else the folder of the hub's model of that name. "ms:" before it: on ModelScope.

    weights: False for the tokenizer alone. UserError if the model is not there, cannot be reached, or is of an
    architecture that model.py does not compute.
    """
    text = "" if name is None else name.as_posix()
    match = re.fullmatch(r"(?:(hf|ms):)?(([\w-][\w.-]*)/[\w-][\w.-]*)", text)
    if not match or name.exists():
        return name
    prefix, repo, owner = match.groups()
    if not prefix and (owner in OURS or Path(owner).exists()):
        return name
    hub = HUBS[prefix or "hf"](repo, None, kind="model")
    try:
        files = [file.checked() for file in hub.files()]
    except NETWORK as error:
        if status_of(error):
            raise explain(error, repo, hub) from None
        return _offline(hub, error, weights)
    except NO_SENSE as error:
        raise OSError(f"{repo}: {hub.title} names its files in a way that makes no sense ({error})") from None
    return _fetch(hub, files, weights)


def _fetch(hub: HuggingFace | ModelScope, files: list[RemoteFile], weights: bool) -> Path:
    """Says what is to come, checks config.json, and fetches what is not there yet. Returns the folder."""
    chosen = _chosen(files, SETTINGS)
    tensors = _chosen(files, WEIGHTS)
    if weights and not tensors:
        raise UserError(f"{hub.page} has no model.safetensors, the only weights that are read: choose another model")
    chosen += tensors if weights else []
    missing = [file for file in chosen if not hub.cached(file)]
    if missing and int(os.environ.get("RANK", 0)) == 0:
        size = sum(file.size or 0 for file in missing) / 1e6
        print(f"{hub.page}: {size:,.1f} MB in {len(missing)} files, licence {hub.licence()}", flush=True)
    check_space(missing, hub.cache())
    folder = hub.cache()
    try:
        for file in sorted(chosen, key=lambda file: file.path != "config.json"):
            folder = hub.fetch(file).parent
            if weights and file.path == "config.json":
                _check_config(hub, folder / "config.json")
    except (*NETWORK, *NO_SENSE) as error:
        if isinstance(error, UserError):
            raise
        raise explain(error, hub.repo, hub) from None
    return folder


def _chosen(files: list[RemoteFile], patterns: tuple[str, ...]) -> list[RemoteFile]:
    """Those at the top whose names match."""
    top = [file for file in files if "/" not in file.path]
    return [file for file in top if any(fnmatch.fnmatch(file.path, pattern) for pattern in patterns)]


def _check_config(hub: HuggingFace | ModelScope, path: Path):
    """UserError before the weights are fetched."""
    try:
        LMConfig.from_hf(read_json(path))
    except (UserError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{hub.page}: {error}") from None


def _offline(hub: HuggingFace | ModelScope, error: Exception, weights: bool) -> Path:
    """What is there already. UserError says what to do without a network."""
    folder = hub.offline()
    if folder is None or (weights and not any(folder.glob("model*.safetensors"))):
        other = "the prefix ms: (ModelScope)" if isinstance(hub, HuggingFace) else "no prefix (Hugging Face)"
        raise UserError(
            f"{hub.repo} is not on this machine, and {hub.endpoint} cannot be reached ({one_line(error)}): give the "
            f"folder of a copy, another {hub.endpoint_variable}, or {other}"
        ) from None
    return folder
