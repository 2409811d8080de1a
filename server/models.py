"""The checkpoints that are served: found, described, and loaded when first asked for."""

import asyncio
import sys
from pathlib import Path

import torch

from base.cli import UserError
from engine.decoding import pack_for_decoding
from model.chat import load_tokenizer
from model.checkpoint import (
    ADAPTER_FILE,
    MODEL_FILE,
    base_of,
    load_model,
    load_outline,
    load_stop_ids,
)
from server.batcher import Batcher

OUT = Path("out")
DEPTH = 3  # levels below it where a model may stand
WEIGHTS = "*model.safetensors"  # MODEL_FILE or ADAPTER_FILE


class Served:
    """A checkpoint, or an adapter together with the model that it belongs to."""

    def __init__(self, directory: Path, name: str | None = None):
        """name: its folder's, without one. UserError where there is none."""
        self.directory, self.name = directory, name or directory.resolve().name
        if not self.name.isprintable():  # bytes that are no text, a new line: no one could ask for it
            raise UserError(f"the name {self.name!r} cannot be shown: rename the folder")
        self.base = base_of(directory)
        weights = directory / (MODEL_FILE if self.base == directory else ADAPTER_FILE)
        outline = load_outline(self.base)
        load_stop_ids(directory, outline)
        if not weights.exists():
            raise UserError(f"no model in {directory}: {weights.name} is missing")
        self.created = int(weights.stat().st_mtime)
        self.is_chat, self.parameters = outline.is_chat, outline.num_parameters()
        self.context = outline.config.max_position_embeddings
        self.n_answers = 0  # that are being written, or not yet sent
        self.batcher: Batcher | None = None
        self.opening = asyncio.Lock()

    async def open(self, device: torch.device, half_weights: bool, max_rows: int):
        """Loads it, once. UserError where it cannot be loaded."""
        async with self.opening:
            if self.batcher is None:
                model, self.tokenizer = await asyncio.to_thread(self._load, device, half_weights)
                self.batcher = Batcher(model, max_rows)

    def _load(self, device: torch.device, half_weights: bool):
        model = load_model(self.directory, device).eval()
        if device.type == "cpu":
            model = pack_for_decoding(model, half_weights)
        return model, load_tokenizer(self.base)


def find_models(directories: list[Path]) -> dict[str, Served]:
    """By name; those of the folders, or all below out/, the newest first. UserError where there is none."""
    models = {}
    for directory in directories:
        served = Served(directory)
        if served.name in models:
            raise UserError(f"{directory} and {models[served.name].directory} have the same name: rename one")
        models[served.name] = served
    if directories:
        return models
    found = []
    for directory in sorted(path.parent for depth in range(1, DEPTH + 1) for path in OUT.glob("*/" * depth + WEIGHTS)):
        name = directory.relative_to(OUT).as_posix()  # quickstart/sft
        if any(part.startswith(".") for part in directory.parts):  # what is being written
            continue
        try:
            found.append(Served(directory, name))
        except (UserError, OSError) as error:
            print(f"{directory} is left out: {error}", file=sys.stderr)
    if not found:
        raise UserError(f"no model under {OUT}/; train one with: python 1-pretrain.py, or name the folder of one")
    return {served.name: served for served in sorted(found, key=lambda served: -served.created)}
