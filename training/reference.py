"""The log-probabilities that a frozen reference model gives the answers of a dataset: computed once, kept in files."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base.cli import UserError
from model.checkpoint import load_model, load_tensors, save_tensors, weights_fingerprint
from model.model import CausalLM
from training.machine import Machine
from training.packing import Batch, PackedDataset
from training.shard import shard_model

LogProbFunction = Callable[[CausalLM, Batch], Tensor]  # -> a number for each document of the batch, (documents,)


def reference_log_probs(
    reference: Path,
    datasets: tuple[PackedDataset, ...],
    log_probs: LogProbFunction,
    machine: Machine,
    batch_size: int,
    cache: Path,
) -> dict[str, Tensor]:
    """log_probs of every document under the model in `reference`, (documents,), by the dataset's split.

    The model is freed at the end, so that training holds one model. cache: a folder for files that the next run reads.
    """
    model = shard_model(load_model(reference), machine)

    @torch.no_grad()
    def compute(data: PackedDataset, rows: np.ndarray) -> Tensor:
        """Of the documents in these rows, and 0 for the others."""
        found = torch.zeros(data.n_documents, device=machine.device)
        for own in machine.rank_rows(rows, batch_size):
            batch = data.batch(own).to(machine.device)
            with machine.autocast():
                found[batch.documents] = log_probs(model, batch)
        return machine.all_reduce(found).cpu()

    found = {}
    for data in datasets:
        key = [weights_fingerprint(reference), data.fingerprint, data.max_seq_len, str(machine.dtype)]
        name = f"{data.split}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.safetensors"
        rows = np.arange(data.n_rows.sum())
        found[data.split] = cached_log_probs(cache / name, rows, batch_size, partial(compute, data), machine)
    return found


def cached_log_probs(
    path: Path, rows: np.ndarray, batch_size: int, compute: Callable[[np.ndarray], Tensor], machine: Machine
) -> Tensor:
    """compute(rows), from the file where an earlier run has left it.

    UserError where the file does not agree with compute(the first rows): it is damaged, or the code of the model has
    changed since, and the loss would not start at ln 2.
    """
    if all(machine.gather(path.exists())):  # of several machines one may have it: then all compute together
        numbers, first = load_tensors(path)[0].get("numbers"), compute(rows[:batch_size])
        if numbers is None or not _agree(numbers, first):
            raise UserError(f"{path} does not match this model; delete it, and it is computed again")
        return numbers
    numbers = compute(rows)
    if machine.rank == 0:
        save_tensors(path, {"numbers": numbers})
    return numbers


def _agree(numbers: Tensor, first: Tensor) -> bool:
    """Up to the rounding of 16 bits."""
    known = first != 0
    return numbers.shape == first.shape and torch.allclose(numbers[known], first[known], rtol=0.01, atol=0.1)
