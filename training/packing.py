"""Prepared data on disk -> full rows of whole documents, in an order that depends on the seed alone."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base.cli import UserError
from corpus.prepared import Prepared

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
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


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
        self.prepared = data = Prepared(folder, split)
        self.split, self.max_seq_len = split, max_seq_len
        self.tokens, self.mask, self.group = data.tokens, data.mask, data.group
        self.token_bytes = data.token_bytes
        self.truncated = self.dropped = 0
        if data.mask is None:
            self._take_all_pairs()
        else:
            self._take_beginnings()
        lengths = self.piece_length.reshape(-1, self.group).sum(1)  # of what stays together
        row_of = pack(lengths, max_seq_len).repeat(self.group)  # of each piece
        self.pieces_by_row = np.argsort(row_of, kind="stable")  # piece numbers, those of row 0 first
        self.row_ends = np.cumsum(np.bincount(row_of)) if len(row_of) else np.zeros(0, np.int64)
        self.n_tokens = int(self.piece_length.sum())  # pairs an epoch

    def _take_all_pairs(self):
        """Every document, cut into pieces of at most a row: its document, start and length of each piece, (pieces,)."""
        starts = self.prepared.offsets[:-1]
        pairs = np.maximum(np.diff(self.prepared.offsets) - 1, 0)  # of each document
        n_pieces = -(-pairs // self.max_seq_len)
        first_piece = np.cumsum(n_pieces) - n_pieces  # of each document
        self.piece_document = np.repeat(np.arange(len(pairs)), n_pieces)
        nth = np.arange(len(self.piece_document)) - first_piece[self.piece_document]
        self.piece_start = starts[self.piece_document] + nth * self.max_seq_len
        self.piece_length = np.minimum(pairs[self.piece_document] - nth * self.max_seq_len, self.max_seq_len)

    def _take_beginnings(self):
        """The beginning of every document, or of every pair of them, that has a trained token there."""
        starts = np.asarray(self.prepared.offsets[:-1])
        pairs = np.maximum(np.diff(self.prepared.offsets) - 1, 0)
        limit = self.max_seq_len // self.group
        lengths = np.minimum(pairs, limit)
        # Whether a target is among those of a document, read in one pass: a running sum takes 8 bytes a token.
        edges = np.stack((starts + 1, starts + 1 + lengths), axis=1).ravel()
        mask = np.append(self.mask, np.uint8(0))  # so that the last edge is inside
        has_target = np.maximum.reduceat(mask, edges)[::2].astype(bool) & (lengths > 0)
        kept = has_target.reshape(-1, self.group).all(1).repeat(self.group)
        self.truncated = int((kept & (pairs > limit)).sum())
        self.dropped = int((~kept).sum())
        self.piece_document = np.flatnonzero(kept)
        self.piece_start = starts[kept]
        self.piece_length = lengths[kept]

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
        input_ids = np.zeros((B, T), np.int64)
        labels = np.full((B, T), IGNORE, np.int64)
        position_ids = np.zeros((B, T), np.int64)
        document_index = np.full((B, T), -1, np.int64)
        documents = []
        real_tokens = attention_pairs = 0
        for b, row in enumerate(rows):
            at = 0  # the place in the row
            first = self.row_ends[row - 1] if row else 0
            for piece in self.pieces_by_row[first : self.row_ends[row]]:
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


def open_data(args: argparse.Namespace, *kinds: str) -> tuple[PackedDataset, PackedDataset]:
    """The two splits, train and val, of args.data. UserError where the folder is of another kind than those named."""
    train_set, val_set = (PackedDataset(args.data, split, args.max_seq_len) for split in ("train", "val"))
    kind = train_set.prepared.kind
    if kind not in kinds:
        raise UserError(
            f"{args.data} was made with `data_process.py {kind}`; this stage needs {' or '.join(kinds)} data"
        )
    if not len(train_set):
        raise UserError(f"{args.data} holds no training rows; give data_process.py more text")
    return train_set, val_set
