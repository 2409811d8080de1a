"""What a frozen model gives for each document of a split: computed once, and kept in a file for the next run."""

import argparse
import hashlib
import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from base.cli import UserError
from model.checkpoint import load_tensors, save_tensors, weights_fingerprint
from training.machine import Machine
from training.packing import PackedDataset


def cached_log_probs(
    args: argparse.Namespace, machine: Machine, data: PackedDataset, compute: Callable[[np.ndarray], Tensor]
) -> Tensor:
    """compute(all rows), a number in float32 for every document of the split, (documents,); read from a file beside
    out_dir if an earlier run with the same model, data and rows has left it there.

    compute(rows) is 0 for documents of other rows. UserError where the file does not hold what the first rows give: it
    is not ours, or the code of the model has changed since, and a loss would not begin where it should.
    """
    key = [weights_fingerprint(args.init_from), data.prepared.fingerprint, args.max_seq_len, str(machine.dtype)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = args.out_dir.parent / "dpo-reference" / f"{data.split}-{name}.safetensors"
    rows = np.arange(len(data))
    if all(machine.gather(path.exists())):  # of several machines one may have it, and all compute together
        numbers, first = load_tensors(path)[0].get("numbers"), compute(rows[: args.batch_size])
        if numbers is None or not _agree(numbers, first):
            raise UserError(f"{path} does not hold what this model gives; delete it, and it is computed anew")
        return numbers
    numbers = compute(rows)
    if machine.rank == 0:
        save_tensors(path, {"numbers": numbers})
    return numbers


def _agree(numbers: Tensor, first: Tensor) -> bool:
    """Up to the rounding of 16 bits."""
    known = first != 0
    return numbers.shape == first.shape and torch.allclose(numbers[known], first[known], rtol=0.01, atol=0.1)
