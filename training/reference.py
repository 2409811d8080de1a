"""What a frozen model gives for each document of a split: computed once, and kept in a file for the next run."""

import argparse
import hashlib
import json
from collections.abc import Callable

from torch import Tensor

from model.checkpoint import load_tensors, save_tensors, weights_fingerprint
from training.machine import Machine
from training.packing import PackedDataset


def computed_once(
    args: argparse.Namespace, machine: Machine, data: PackedDataset, compute: Callable[[], Tensor]
) -> Tensor:
    """compute(), a number in float32 for every document of the split, (documents,); read from a file beside out_dir if
    an earlier run with the same model, data and rows has left it there."""
    key = [weights_fingerprint(args.init_from), data.prepared.fingerprint, args.max_seq_len, str(machine.dtype)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = args.out_dir.parent / "dpo-reference" / f"{data.split}-{name}.safetensors"
    if all(machine.gather(path.exists())):  # of several machines one may have it, and all compute together
        return load_tensors(path)[0]["numbers"]
    numbers = compute()
    if machine.rank == 0:
        save_tensors(path, {"numbers": numbers})
    return numbers
