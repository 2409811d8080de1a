"""The checkpoints that are served: found at the start, and loaded at their first request."""

import asyncio
import sys
from pathlib import Path

import torch

from base.cli import UserError
from engine.decoding import pack_for_decoding
from engine.session import sampling_defaults
from model.chat import load_tokenizer
from model.checkpoint import (
    ADAPTER_FILE,
    base_of,
    find_checkpoints,
    find_tokenizer,
    load_model,
    load_outline,
    load_stop_ids,
    weight_files,
)
from server.batcher import Batcher

OUT = Path("out")


class Served:
    """A model, or an adapter with its base model."""

    def __init__(self, directory: Path, name: str | None = None):
        """name: by default the folder's. UserError if there is no model."""
        self.directory, self.name = directory, name or directory.resolve().name
        if not self.name.isprintable():  # a request could not name it
            raise UserError(f"the name {self.name!r} has characters that cannot be shown: rename the folder")
        self.base = base_of(directory)
        weights = weight_files(directory)[0] if self.base == directory else directory / ADAPTER_FILE
        outline = load_outline(self.base)
        load_stop_ids(directory, outline)
        if not weights.exists():
            raise UserError(f"no model in {directory}: {weights.name} is missing")
        self.tokenizer = load_tokenizer(find_tokenizer(directory))
        self.tokenizer.check_vocabulary(outline.config.vocab_size)
        self.created = int(weights.stat().st_mtime)
        self.is_chat, self.parameters = outline.is_chat, outline.num_parameters()
        self.context = outline.config.max_position_embeddings
        self.sampling = sampling_defaults(outline.generation_config)
        self.n_answers = 0  # that are being generated or sent
        self.batcher: Batcher | None = None
        self.opening = asyncio.Lock()

    async def open(self, device: torch.device, weight_dtype: str, max_rows: int):
        """Loads it, once. UserError if it cannot be loaded."""
        async with self.opening:
            if self.batcher is None:
                model = await asyncio.to_thread(self._load, device, weight_dtype)
                self.batcher = Batcher(model, max_rows)

    def _load(self, device: torch.device, weight_dtype: str):
        model = load_model(self.directory, device).eval()
        return pack_for_decoding(model, weight_dtype)


def find_models(directories: list[Path]) -> dict[str, Served]:
    """By name: the given folders, or all below out/, the newest first. UserError if there is none."""
    models = {}
    for directory in directories:
        served = Served(directory)
        if served.name in models:
            raise UserError(f"{directory} and {models[served.name].directory} have the same name: rename one")
        models[served.name] = served
    if directories:
        return models
    for directory in find_checkpoints(OUT):
        name = directory.relative_to(OUT).as_posix()  # such as quickstart/sft
        try:
            models[name] = Served(directory, name)
        except (UserError, OSError) as error:
            print(f"{directory} is left out: {error}", file=sys.stderr)
    if not models:
        raise UserError(f"no model under {OUT}/; train one with: python 1-pretrain.py, or name a model's folder")
    return models
