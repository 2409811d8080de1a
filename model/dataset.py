"""Prepared data on disk -> full rows of whole documents, in an order that depends on the seed alone.

A folder made by data_process.py holds, for the splits train and val: `.bin` (token ids end to end), `.idx` (where each
document begins, and the end of the last), `.mask` (chats: 1 where a token is trained) and `meta.json`.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # the label of a token that is not scored


@dataclass
class Batch:
    """B rows of T tokens. labels[b, t] is the token that should follow input_ids[b, t], or IGNORE."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64, from 0 in each document; the padding at a row's end counts as a document
    document_index: Tensor  # (B, T) int64, the place in `documents` of the one that a token belongs to; -1: padding
    documents: list[int]  # numbers of the documents in it; a pair's are neighbours
    split: str  # "train" or "val"
    real_tokens: int  # tokens that are not padding
    attention_pairs: int  # query-key pairs inside documents, to count the work

    def to(self, device: torch.device) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in values.items()})


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assigns each length to a row of `capacity` tokens, best fit decreasing; returns the row of each.

    Whole documents are kept whole (arXiv 2404.10830). A bit of `open_spaces` says that a row with this much space
    exists, so that the smallest space that is large enough is found in one shift: about 2 microseconds a document.
    """
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_spaces, n_rows = 0, 0
    row_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist()):
        large_enough = open_spaces >> length
        if large_enough:
            space = length + (large_enough & -large_enough).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                open_spaces ^= 1 << space
        else:
            space, row, n_rows = capacity, n_rows, n_rows + 1
        row_of[document] = row
        space -= length
        if space:
            rows_by_space[space].append(row)
            open_spaces |= 1 << space
    return row_of


class PackedDataset:
    """One split of a prepared folder, packed into rows of max_seq_len tokens; token files stay on disk (memory-mapped).

    A document of n tokens gives n - 1 pairs of a token and the one that follows. A text longer than a row is cut into
    pieces, so that every pair is trained once an epoch; a chat longer than a row keeps its beginning, since its rest
    would be an answer without a question, and is left out when no trained token remains (`truncated`, `dropped`).
    The two chats of a preference pair stay together; each may fill half a row.
    """

    def __init__(self, folder: str | Path, split: str, max_seq_len: int):
        folder = Path(folder)
        self.meta = read_meta(folder)
        self.split, self.max_seq_len = split, max_seq_len
        self.group = 2 if self.meta["kind"] == "dpo" else 1  # documents that stay together
        self.tokens = _memory_map(folder / f"{split}.bin", self.meta["dtype"])
        self.mask = None if self.meta["kind"] == "pretrain" else _memory_map(folder / f"{split}.mask", np.uint8)
        if self.mask is not None and len(self.mask) != len(self.tokens):
            raise ValueError(f"{folder}/{split}.mask and {split}.bin do not belong together; make the data anew")
        offsets = _memory_map(folder / f"{split}.idx", np.int64)
        if len(offsets) < 1 or offsets[-1] != len(self.tokens):
            raise ValueError(f"{folder}/{split}.idx and {split}.bin do not belong together; make the data anew")
        pairs = np.maximum(np.diff(offsets) - 1, 0)
        self.truncated = self.dropped = 0
        if self.mask is None:
            n_pieces = -(-pairs // max_seq_len)
            self.piece_document = np.repeat(np.arange(len(pairs)), n_pieces)
            nth = np.arange(len(self.piece_document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
            self.piece_start = offsets[self.piece_document] + nth * max_seq_len
            self.piece_length = np.minimum(pairs[self.piece_document] - nth * max_seq_len, max_seq_len)
        else:
            limit = max_seq_len // self.group
            start, length = np.asarray(offsets[:-1]), np.minimum(pairs, limit)
            edges = np.stack((start + 1, start + 1 + length), axis=1).ravel()
            # Whether a target is among those of a document, read in one pass: a running sum takes 8 bytes a token.
            has_target = np.maximum.reduceat(np.append(self.mask, np.uint8(0)), edges)[::2].astype(bool) & (length > 0)
            kept = has_target.reshape(-1, self.group).all(1).repeat(self.group)
            self.truncated, self.dropped = int((kept & (pairs > limit)).sum()), int((~kept).sum())
            self.piece_document = np.flatnonzero(kept)
            self.piece_start, self.piece_length = start[kept], length[kept]
        row_of = pack(self.piece_length.reshape(-1, self.group).sum(1), max_seq_len).repeat(self.group)
        self.pieces_by_row = np.argsort(row_of, kind="stable")  # piece numbers, those of row 0 first
        self.row_ends = np.cumsum(np.bincount(row_of)) if len(row_of) else np.zeros(0, np.int64)
        self.n_tokens = int(self.piece_length.sum())  # pairs an epoch

    def __len__(self) -> int:
        """Rows."""
        return len(self.row_ends)

    @property
    def real_share(self) -> float:
        return self.n_tokens / max(len(self) * self.max_seq_len, 1)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The row numbers in the order of this epoch."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def batch(self, rows: np.ndarray) -> Batch:
        B, T = len(rows), self.max_seq_len
        input_ids, labels = np.zeros((B, T), np.int64), np.full((B, T), IGNORE, np.int64)
        position_ids, document_index = np.zeros((B, T), np.int64), np.full((B, T), -1, np.int64)
        documents, real_tokens, attention_pairs = [], 0, 0
        for b, row in enumerate(rows):
            at = 0
            for piece in self.pieces_by_row[self.row_ends[row - 1] if row else 0 : self.row_ends[row]]:
                start, n = self.piece_start[piece], self.piece_length[piece]
                here = slice(at, at + n)
                input_ids[b, here] = self.tokens[start : start + n]
                labels[b, here] = self.tokens[start + 1 : start + 1 + n]
                if self.mask is not None:
                    labels[b, here][self.mask[start + 1 : start + 1 + n] == 0] = IGNORE
                position_ids[b, here] = np.arange(n)
                document_index[b, here] = len(documents)
                documents.append(int(self.piece_document[piece]))
                attention_pairs += int(n * (n + 1) // 2)
                at += n
            position_ids[b, at:] = np.arange(T - at)
            real_tokens += int(at)
        tensors = (torch.from_numpy(array) for array in (input_ids, labels, position_ids, document_index))
        return Batch(*tensors, documents, self.split, real_tokens, attention_pairs)


def read_meta(folder: Path) -> dict:
    """meta.json of a prepared folder. FileNotFoundError or ValueError, with what to do, if it is not one."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        kind = folder.name if folder.name in ("sft", "dpo") else "pretrain"
        raise FileNotFoundError(
            f"no prepared data in {folder}; make it with: python data_process.py {kind} YOUR_FILES --output {folder}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder}/meta.json is damaged ({error}); make the data anew") from None
    if not isinstance(meta, dict) or not {"format_version", "kind", "dtype", "files"} <= meta.keys():
        raise ValueError(f"{folder}/meta.json is not what data_process.py writes; make the data anew")
    if meta["format_version"] != 1:
        raise ValueError(f"{folder}/meta.json has format {meta['format_version']}, not 1; make the data anew")
    return meta


def _memory_map(path: Path, dtype) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make the data anew with data_process.py")
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    if path.stat().st_size % np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is cut short; make the data anew with data_process.py")
    return np.memmap(path, dtype=dtype, mode="r")
