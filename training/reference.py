"""What a frozen model gives for each document of a split: computed once, and kept in a file for the next run."""

import argparse
import hashlib
import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from base.files import write_file
from model.checkpoint import weights_fingerprint
from training.machine import Machine
from training.packing import PackedDataset


def computed_once(
    args: argparse.Namespace, machine: Machine, data: PackedDataset, compute: Callable[[], Tensor]
) -> Tensor:
    """compute(), a number in float32 for every document of the split, (documents,); read from a file beside out_dir if
    an earlier run with the same model, data and rows has left it there."""
    key = [weights_fingerprint(args.init_from), data.prepared.fingerprint, args.max_seq_len, str(machine.dtype)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = args.out_dir.parent / "dpo-reference" / f"{data.split}-{name}.bin"
    if path.exists() and path.stat().st_size == 4 * (len(data.prepared.offsets) - 1):
        return torch.from_numpy(np.fromfile(path, np.float32))
    numbers = compute()
    if machine.rank == 0:
        write_file(path, lambda temporary: temporary.write_bytes(numbers.numpy().tobytes()))
    return numbers
