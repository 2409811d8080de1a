"""Prepared data on disk -> full rows of whole documents, in an order that depends on the seed alone."""

import argparse
import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from base.cli import UserError, above_zero
from base.files import read_json
from corpus.kinds import KINDS
from corpus.prepared import Prepared
from model.chat import load_tokenizer
from model.device import to_device
from model.operators import CuSeqlens

IGNORE = -100  # the label of a token that is not scored


class Piece(NamedTuple):
    """A document, or the part of one that is in a row."""

    document: int
    input_ids: np.ndarray  # (n,)
    labels: np.ndarray  # (n,)
    extra: tuple[np.ndarray, ...] = ()  # further tensors of a subclass of Batch, (n,) each


@dataclass
class Batch:
    """B rows of T tokens. labels[b, t] is the token that should follow input_ids[b, t], or IGNORE."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64, from 0 in each document; the padding at a row's end counts as a document
    document_index: Tensor  # (B, T) int64, of a token's document in `documents`; -1: padding
    documents: list[int]  # numbers of the documents in the batch; those of a pair are neighbours
    split: str  # "train" or "val"
    real_tokens: int  # tokens that are not padding
    attention_pairs: int  # query-key pairs inside documents, to count the work
    # Labels that are not IGNORE, counted on the host: to count them on a GPU would make the host wait.
    scored: int | None = field(default=None, kw_only=True)
    # Boundaries of documents for Decoder.forward on a GPU; None on a CPU, which does not need them.
    cu_seqlens: CuSeqlens | None = field(default=None, kw_only=True)

    EXTRA: ClassVar[int] = 0  # further tensors of a subclass, (B, T) float32, after these fields

    @classmethod
    def of(cls, rows: list[list[Piece]], max_seq_len: int, split: str) -> "Batch":
        """The pieces of each row, one after the other."""
        shape = (len(rows), max_seq_len)
        input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels, document_index = np.full(shape, IGNORE, np.int64), np.full(shape, -1, np.int64)
        more = np.zeros((cls.EXTRA, *shape), np.float32)
        documents = []
        real_tokens = attention_pairs = 0
        for b, pieces in enumerate(rows):
            at = 0  # the position in the row
            for piece in pieces:
                n = len(piece.input_ids)
                here = slice(at, at + n)
                input_ids[b, here] = piece.input_ids
                labels[b, here] = piece.labels
                position_ids[b, here] = np.arange(n)
                document_index[b, here] = len(documents)
                for row, values in zip(more[:, b], piece.extra, strict=True):
                    row[here] = values
                documents.append(piece.document)
                attention_pairs += n * (n + 1) // 2
                at += n
            position_ids[b, at:] = np.arange(max_seq_len - at)
            real_tokens += at
        tensors = map(torch.from_numpy, (input_ids, labels, position_ids, document_index))
        return cls(*tensors, documents, split, real_tokens, attention_pairs, *map(torch.from_numpy, more))

    def __post_init__(self):
        if self.scored is None:
            self.scored = int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """A copy on the device, made without waiting for it; the four tensors of every batch travel as one."""
        if device.type == "cpu":
            return self
        names = ("input_ids", "labels", "position_ids", "document_index")
        more = {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name not in names}
        B, T = self.input_ids.shape
        begins = self.position_ids == 0
        begins[:, 0] = True
        starts = begins.flatten().nonzero().flatten()
        ends = torch.full((1 << len(starts).bit_length(),), B * T)  # a power of two: few recompilations
        ends[: len(starts)] = starts
        flat = to_device(torch.cat([*(getattr(self, name).flatten() for name in names), ends]), device)
        tensors, offsets = flat[: -len(ends)].view(len(names), B, T), flat[-len(ends) :].int()
        more = {name: to_device(tensor, device) for name, tensor in more.items()}
        return replace(self, **dict(zip(names, tensors)), **more, cu_seqlens=CuSeqlens(offsets, T))

    def scored_positions(self) -> Tensor:
        """The positions of labels that are not IGNORE, of B * T, (scored,)."""
        found = (self.labels != IGNORE).flatten()
        if found.device.type in ("cpu", "cuda", "meta"):  # Macs have it since torch 2.13
            return found.nonzero_static(size=self.scored)[:, 0]
        return found.nonzero()[:, 0]


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assigns each length to a row of `capacity` tokens, best fit decreasing; returns the row of each.

    No document is split (arXiv 2404.10830). A bit of `open_spaces` says that a row with this much space exists, so that
    the smallest space that is large enough is found in one shift: about 2 microseconds per document.
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


class Pieces(NamedTuple):
    """The pieces of a folder's documents that are trained, (pieces,) each."""

    document: np.ndarray  # its number in the folder
    start: np.ndarray  # in the folder's tokens
    length: np.ndarray  # pairs of a token and the next
    truncated: int = 0  # documents that lost their end
    dropped: int = 0  # documents of which nothing is left


def split_texts(prepared: Prepared, max_seq_len: int) -> Pieces:
    """Every document, split into pieces of at most a row, so that every pair is trained once per epoch."""
    starts = prepared.offsets[:-1]
    pairs = np.maximum(np.diff(prepared.offsets) - 1, 0)  # of each document
    n_pieces = -(-pairs // max_seq_len)
    first_piece = np.cumsum(n_pieces) - n_pieces  # of each document
    document = np.repeat(np.arange(len(pairs)), n_pieces)
    nth = np.arange(len(document)) - first_piece[document]
    length = np.minimum(pairs[document] - nth * max_seq_len, max_seq_len)
    return Pieces(document, starts[document] + nth * max_seq_len, length)


def truncate_chats(prepared: Prepared, max_seq_len: int) -> Pieces:
    """The beginning of every chat that has a trained token there: its rest would be an answer without a question.

    Of a preference pair both chats must have one; each may fill half a row.
    """
    starts = np.asarray(prepared.offsets[:-1])
    pairs = np.maximum(np.diff(prepared.offsets) - 1, 0)
    limit = max_seq_len // prepared.group
    length = np.minimum(pairs, limit)
    # Whether a document's targets include a trained token, read in one pass: a running sum takes 8 bytes per token.
    edges = np.stack((starts + 1, starts + 1 + length), axis=1).ravel()
    mask = np.append(prepared.mask, np.uint8(0))  # so that the last edge is inside
    has_target = np.maximum.reduceat(mask, edges)[::2].astype(bool) & (length > 0)
    kept = has_target.reshape(-1, prepared.group).all(1).repeat(prepared.group)
    truncated, dropped = int((kept & (pairs > limit)).sum()), int((~kept).sum())
    return Pieces(np.flatnonzero(kept), starts[kept], length[kept], truncated, dropped)


class PackedDataset:
    """One split of one or several prepared folders, packed into rows of max_seq_len tokens.

    A document of n tokens gives n - 1 pairs of a token and the next. Token files stay on disk (memory-mapped).
    Documents, pieces and rows are numbered through all folders, in the order of their names.

    An epoch has as many tokens as all folders together, in the proportions of their weights, exact to a row and in
    shuffled order. Each folder is read in epochs of its own, end to end and each in another order: no row comes again
    before all others of its folder have come, also where an epoch of the mixture ends between them.
    """

    def __init__(
        self,
        data: str | Path | list[str],
        split: str,
        max_seq_len: int,
        weights: dict[str, float] | None = None,
        kinds: tuple[str, ...] = tuple(KINDS),
    ):
        """data: [NAME=]DIR of each folder. weights: how much each counts, in any unit; without them, by its tokens, so
        that all are read once per epoch. UserError where a folder is not one of `kinds`, or of another tokenizer.
        """
        folders = named_folders(data)
        self.folders = {name: Prepared(folders[name], split) for name in sorted(folders)}
        self.split, self.max_seq_len = split, max_seq_len
        first = next(iter(self.folders.values()))
        self.kind, self.group = first.kind, first.group  # group: documents that make one sample, 2 of a preference pair
        self.token_bytes, self.tokenizer_dir = first.token_bytes, first.tokenizer_dir
        self.vocab_size, self.tokenizer_sha256 = first.meta["vocab_size"], first.meta["tokenizer_sha256"]
        self.masked = any(one.meta["masked"] for one in self.folders.values())
        templates = {one.meta.get("chat_template_sha256") for one in self.folders.values()} - {None}
        if len(templates) > 1:
            raise UserError(f"{self.paths} were made with different chat templates; prepare them with the same one")
        self.chat_template_sha256 = next(iter(templates), None)  # of an open model's chats
        for other in self.folders.values():
            if other.kind not in kinds:
                raise UserError(
                    f"{other.folder} was made with `data_process.py {other.kind}`; this stage needs "
                    f"{' or '.join(kinds)} data"
                )
            if other.meta["tokenizer_sha256"] != self.tokenizer_sha256:
                raise UserError(
                    f"{first.folder} and {other.folder} were made with different tokenizers; prepare one of them again"
                )
        n_documents = [len(one.offsets) - 1 for one in self.folders.values()]
        self.n_documents = sum(n_documents)
        self.first_document = np.cumsum(n_documents) - n_documents  # of each folder
        self.place_pieces([self.pieces_of(one) for one in self.folders.values()])
        counts = self.folder_tokens if weights is None else np.array([weights[name] for name in self.folders])
        self.weights = dict(zip(self.folders, (counts / max(counts.sum(), 1e-9)).tolist()))  # they add up to 1

    def pieces_of(self, prepared: Prepared) -> Pieces:
        return (split_texts if prepared.mask is None else truncate_chats)(prepared, self.max_seq_len)

    def rows_of(self, lengths: np.ndarray) -> np.ndarray:
        """The row of each of a folder's pieces; the two of a preference pair stay together."""
        return pack(lengths.reshape(-1, self.group).sum(1), self.max_seq_len).repeat(self.group)

    def place_pieces(self, found: list[Pieces]):
        """Numbers the pieces and rows of all folders."""
        rows = [self.rows_of(pieces.length) for pieces in found]
        self.n_rows = np.array([row.max(initial=-1) + 1 for row in rows])  # of each folder
        self.first_row = np.cumsum(self.n_rows) - self.n_rows
        self.piece_document = np.concatenate([n + one.document for n, one in zip(self.first_document, found)])
        self.piece_start = np.concatenate([pieces.start for pieces in found])
        self.piece_length = np.concatenate([pieces.length for pieces in found])
        row_of = np.concatenate([n + row for n, row in zip(self.first_row, rows)])  # of each piece
        self.pieces_by_row = np.argsort(row_of, kind="stable")  # piece numbers, those of row 0 first
        self.row_ends = np.cumsum(np.bincount(row_of))
        self.folder_tokens = np.array([int(pieces.length.sum()) for pieces in found])  # pairs in each folder
        self.truncated, self.dropped = (sum(getattr(one, name) for one in found) for name in ("truncated", "dropped"))

    @functools.cached_property
    def vocab(self) -> dict[str, int]:
        """Fields of LMConfig for a new model with the tokenizer of an open one. Of ours LMConfig has the size."""
        tokenizer = load_tokenizer(self.tokenizer_dir)
        if tokenizer.is_own:
            return {}
        eos = self.vocab_size - 1 if tokenizer.eos is None else tokenizer.eos
        return {"vocab_size": self.vocab_size, "bos_token_id": [*tokenizer.bos, eos][0], "eos_token_id": eos}

    @functools.cached_property
    def epoch_rows(self) -> np.ndarray:
        """Rows of each folder in an epoch, (folders,)."""
        tokens = np.array([*self.weights.values()]) * self.folder_tokens.sum()
        rows = np.rint(tokens * self.n_rows / np.maximum(self.folder_tokens, 1)).astype(np.int64)
        return np.maximum(rows, np.minimum(self.n_rows, 1))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return int(self.epoch_rows.sum())

    @property
    def n_tokens(self) -> int:
        """Pairs of a token and the next in an epoch."""
        return round(float((self.epoch_rows * self.folder_tokens / np.maximum(self.n_rows, 1)).sum()))

    @property
    def real_fraction(self) -> float:
        """Of the positions of a row, those that are not padding."""
        return self.n_tokens / max(len(self) * self.max_seq_len, 1)

    @property
    def paths(self) -> str:
        """The folders, as typed on a command line."""
        return " ".join(str(one.folder) for one in self.folders.values())

    @property
    def fingerprint(self) -> str | dict[str, str]:
        """Of the content; of several folders, by name."""
        fingerprints = {name: one.fingerprint for name, one in self.folders.items()}
        return fingerprints if len(fingerprints) > 1 else next(iter(fingerprints.values()))

    def turns(self, seed: int, epoch: int) -> np.ndarray:
        """The number of the folder that each row of this epoch comes from."""
        turns = np.repeat(np.arange(len(self.folders)), self.epoch_rows)
        np.random.default_rng([seed, epoch, len(self.folders)]).shuffle(turns)
        return turns

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The row numbers in the order of this epoch."""
        turns = self.turns(seed, epoch)
        rows = np.empty_like(turns)
        for i in np.flatnonzero(self.n_rows):
            n_rows, here = self.n_rows[i], self.epoch_rows[i]
            start = epoch * here  # so many of its rows have been read
            own_epochs = range(start // n_rows, -(-(start + here) // n_rows))
            own = np.concatenate([np.random.default_rng([seed, n]).permutation(n_rows) for n in own_epochs])
            rows[turns == i] = self.first_row[i] + own[start % n_rows :][:here]
        return rows

    def validation_rows(self, rows: int | None) -> dict[str, np.ndarray]:
        """Of each folder the same `rows` rows every time, or all."""
        orders = (np.random.default_rng([0, 0]).permutation(n)[:rows] for n in self.n_rows)
        return {name: first + order for name, first, order in zip(self.folders, self.first_row, orders)}

    def times_seen(self, seed: int, epoch: int, row: int) -> dict[str, float]:
        """How often each folder has been read when the run is at this row of this epoch."""
        rows = epoch * self.epoch_rows + np.bincount(self.turns(seed, epoch)[:row], minlength=len(self.folders))
        return dict(zip(self.folders, (rows / self.n_rows).tolist()))

    def samples(self, documents: list[int]) -> dict[str, list[int]]:
        """The folder of documents, and their numbers there as `data_process.py show --index` counts."""
        samples: dict[str, set[int]] = {}
        folders = [str(one.folder) for one in self.folders.values()]
        for document in documents:
            i = np.searchsorted(self.first_document, document, side="right") - 1
            index = (document - int(self.first_document[i])) // self.group
            samples.setdefault(folders[i], set()).add(index)
        return {folder: sorted(found) for folder, found in samples.items()}

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers; of none, a row of padding, which adds nothing to any sum."""
        batch = Batch.of([self.pieces_in(row) for row in rows] or [[]], self.max_seq_len, self.split)
        if max(batch.input_ids.max(), batch.labels.max()) >= len(self.token_bytes):
            raise UserError(f"{self.split}.bin of {self.paths} contains tokens that no vocabulary has: it is damaged")
        return batch

    def pieces_in(self, row: int) -> list[Piece]:
        folder = [*self.folders.values()][np.searchsorted(self.first_row, row, side="right") - 1]
        first = self.row_ends[row - 1] if row else 0
        pieces = []
        for i in self.pieces_by_row[first : self.row_ends[row]]:
            start, n = self.piece_start[i], self.piece_length[i]
            labels = folder.tokens[start + 1 : start + 1 + n]
            if folder.mask is not None:
                labels = np.where(folder.mask[start + 1 : start + 1 + n], labels.astype(np.int64), IGNORE)
            pieces.append(Piece(int(self.piece_document[i]), folder.tokens[start : start + n], labels))
        return pieces


def open_data(
    data: Path | list[str], mix: list[str] | None, max_seq_len: int, *kinds: str
) -> tuple[PackedDataset, PackedDataset]:
    """The two splits, train and val, of the folders of --data with the weights of --mix.

    UserError where a folder is of another kind than those named, or where weights and folders do not go together.
    """
    weights = read_mix(mix, list(named_folders(data)))
    train_set = PackedDataset(data, "train", max_seq_len, weights, kinds)
    for folder, n_rows in zip(train_set.folders.values(), train_set.n_rows):
        if not n_rows:
            raise UserError(f"{folder.folder} contains no training rows; give data_process.py more text")
    return train_set, PackedDataset(data, "val", max_seq_len, train_set.weights)


def named_folders(data: str | Path | list[str]) -> dict[str, Path]:
    """The folders of --data, or a stage's default: DIR has its last part for a name, or another in NAME=DIR."""
    folders = {}
    for text in map(str, [data] if isinstance(data, str | Path) else data):
        name, _, folder = text.partition("=")
        if not (name and folder) or Path(name).name != name:  # no NAME= before it: an = further on belongs to a folder
            name, folder = Path(text).resolve().name, text
        if name in folders:
            raise UserError(f"two sources have the name {name}; give --data NAME={folder}")
        folders[name] = Path(folder)
    return folders


def read_mix(words: list[str] | None, names: list[str]) -> dict[str, float] | None:
    """Weights by source, from NAME=WEIGHT words or a file of JSON; UserError where they are not those of `names`."""
    if not words:
        return None
    if "=" in words[0]:
        weights = dict(word.partition("=")[::2] for word in words)
    elif Path(words[0]).is_file():
        weights = read_json(Path(words[0]))
    else:
        raise UserError(f"--mix {words[0]}: neither NAME=WEIGHT nor a file")
    if sorted(weights) != sorted(names):
        raise UserError(
            f"--mix names {', '.join(sorted(weights))}; the sources of --data are {', '.join(sorted(names))}"
        )
    try:
        return {name: above_zero(weight) for name, weight in weights.items()}
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        raise UserError(
            f"--mix: weights must be numbers above 0, not {', '.join(map(str, weights.values()))}"
        ) from None
