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
from corpus.prepared import Prepared
from model.operators import CuSeqlens

IGNORE = -100  # the label of a token that is not scored


class Piece(NamedTuple):
    """A document, or the part of one that stands in a row."""

    document: int
    input_ids: np.ndarray  # (n,)
    labels: np.ndarray  # (n,)
    more: tuple[np.ndarray, ...] = ()  # what else a subclass of Batch has of each token, (n,) each


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
    # Labels that are not IGNORE: counted where the batch is made, for there no device has to be waited for.
    scored: int | None = field(default=None, kw_only=True)
    # A mask for Decoder.forward; None on a CPU, which needs none.
    documents_on_card: CuSeqlens | None = field(default=None, kw_only=True)

    MORE: ClassVar[int] = 0  # how many tensors a subclass has of each token, (B, T) float32, after these fields

    @classmethod
    def of(cls, rows: list[list[Piece]], max_seq_len: int, split: str) -> "Batch":
        """The pieces of each row, laid end to end."""
        shape = (len(rows), max_seq_len)
        input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels, document_index = np.full(shape, IGNORE, np.int64), np.full(shape, -1, np.int64)
        more = np.zeros((cls.MORE, *shape), np.float32)
        documents = []
        real_tokens = attention_pairs = 0
        for b, pieces in enumerate(rows):
            at = 0  # the place in the row
            for piece in pieces:
                n = len(piece.input_ids)
                here = slice(at, at + n)
                input_ids[b, here] = piece.input_ids
                labels[b, here] = piece.labels
                position_ids[b, here] = np.arange(n)
                document_index[b, here] = len(documents)
                for row, values in zip(more[:, b], piece.more, strict=True):
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
        """On a device; nobody waits for it. What every batch has goes in one copy."""
        if device.type == "cpu":
            return self
        names = ("input_ids", "labels", "position_ids", "document_index")
        more = {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name not in names}
        B, T = self.input_ids.shape
        begins = self.position_ids == 0
        begins[:, 0] = True
        starts = begins.flatten().nonzero().flatten()
        ends = torch.full((1 << len(starts).bit_length(),), B * T)  # as many as a power of two: few recompilations
        ends[: len(starts)] = starts
        flat = send(torch.cat([*(getattr(self, name).flatten() for name in names), ends]), device)
        tensors, offsets = flat[: -len(ends)].view(len(names), B, T), flat[-len(ends) :].int()
        more = {name: send(tensor, device) for name, tensor in more.items()}
        return replace(self, **dict(zip(names, tensors)), **more, documents_on_card=CuSeqlens(offsets, T))

    def scored_places(self) -> Tensor:
        """Where a label is not IGNORE, counted through all rows, (scored,)."""
        return (self.labels != IGNORE).flatten().nonzero_static(size=self.scored)[:, 0]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to a device without waiting for it: to a card from memory that stays in place (pinned)."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


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
        batch = Batch.of([self._pieces(row) for row in rows], self.max_seq_len, self.split)
        if len(rows) and max(batch.input_ids.max(), batch.labels.max()) >= len(self.token_bytes):
            raise UserError(
                f"{self.prepared.folder}/{self.split}.bin holds tokens that no vocabulary has: it is damaged"
            )
        return batch

    def _pieces(self, row: int) -> list[Piece]:
        pieces = []
        first = self.row_ends[row - 1] if row else 0
        for i in self.pieces_by_row[first : self.row_ends[row]]:
            start, n = self.piece_start[i], self.piece_length[i]
            labels = self.tokens[start + 1 : start + 1 + n]
            if self.mask is not None:
                labels = np.where(self.mask[start + 1 : start + 1 + n], labels.astype(np.int64), IGNORE)
            pieces.append(Piece(int(self.piece_document[i]), self.tokens[start : start + n], labels))
        return pieces


class TrainingData:
    """What a run knows of its data, in whatever form a stage reads them: prepared folders by name, of one tokenizer.

    Documents are numbered through: those of the first folder, then those of the second, …
    """

    def __init__(self, prepared: dict[str, Prepared], shares: dict[str, float]):
        """shares: of the tokens, by name."""
        self.folders, self.shares = prepared, shares
        first = next(iter(prepared.values()))
        self.split, self.kind, self.group = first.split, first.kind, first.group
        self.token_bytes, self.tokenizer_dir = first.token_bytes, first.tokenizer_dir
        self.vocab_size, self.tokenizer_sha256 = first.meta["vocab_size"], first.meta["tokenizer_sha256"]
        self.masked = any(other.meta["masked"] for other in prepared.values())
        for other in prepared.values():
            if other.meta["tokenizer_sha256"] != self.tokenizer_sha256:
                raise UserError(
                    f"{first.folder} and {other.folder} were made with different tokenizers; make one of them anew"
                )
        n_documents = np.array([len(one.offsets) - 1 for one in prepared.values()])
        self.first_document = np.cumsum(n_documents) - n_documents  # of each folder

    @property
    def paths(self) -> str:
        """The folders, as one types them."""
        return " ".join(str(one.folder) for one in self.folders.values())

    @property
    def fingerprint(self) -> str | dict[str, str]:
        """Of the content; of several folders, by name."""
        fingerprints = {name: one.fingerprint for name, one in self.folders.items()}
        return fingerprints if len(fingerprints) > 1 else next(iter(fingerprints.values()))

    def samples(self, documents: list[int]) -> dict[str, list[int]]:
        """Where documents lie: by folder, their numbers as `data_process.py show --index` counts."""
        samples: dict[str, set[int]] = {}
        folders = [str(one.folder) for one in self.folders.values()]
        for document in documents:
            i = np.searchsorted(self.first_document, document, side="right") - 1
            index = (document - int(self.first_document[i])) // self.group
            samples.setdefault(folders[i], set()).add(index)
        return {folder: sorted(found) for folder, found in samples.items()}


class Mixture(TrainingData):
    """Packed datasets that are read as one, each with its share of the tokens; a single one as if it stood alone.

    An epoch has as many tokens as all sources together, in shares that are exact to a row; their turns are shuffled. A
    source is read in its own epochs, end to end, each in another order: what is left of one when an epoch of the
    mixture ends comes first in the next, so that no row comes again before all others of its source have come.

    Rows are numbered through as documents are.
    """

    def __init__(self, sources: dict[str, PackedDataset], shares: dict[str, float] | None = None):
        """shares: how much each source counts, in any unit; without it, by its tokens: each is read once an epoch."""
        self.sources = dict(sorted(sources.items()))  # the order of --data does not matter
        self.n_rows = np.array([len(source) for source in self.sources.values()])
        self.source_tokens = np.array([source.n_tokens for source in self.sources.values()])
        weights = self.source_tokens if shares is None else np.array([shares[name] for name in self.sources])
        weights = weights / max(weights.sum(), 1e-9)  # they add up to 1
        prepared = {name: source.prepared for name, source in self.sources.items()}
        super().__init__(prepared, dict(zip(self.sources, weights.tolist())))
        self.max_seq_len = next(iter(self.sources.values())).max_seq_len
        self.first_row = np.cumsum(self.n_rows) - self.n_rows  # of each source
        self.truncated = sum(source.truncated for source in self.sources.values())
        self.dropped = sum(source.dropped for source in self.sources.values())

    @functools.cached_property
    def epoch_rows(self) -> np.ndarray:
        """Rows of each source in an epoch, (sources,)."""
        tokens = np.array([*self.shares.values()]) * self.source_tokens.sum()
        tokens_a_row = self.source_tokens / self.n_rows
        return np.maximum(np.rint(tokens / tokens_a_row), 1).astype(np.int64)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return int(self.epoch_rows.sum())

    @property
    def n_tokens(self) -> int:
        """Pairs of a token and the next in an epoch."""
        return round(float((self.epoch_rows * self.source_tokens / self.n_rows).sum()))

    @property
    def real_share(self) -> float:
        return self.n_tokens / (len(self) * self.max_seq_len)

    def turns(self, seed: int, epoch: int) -> np.ndarray:
        """Whose turn it is: the number of a source for every row of this epoch."""
        turns = np.repeat(np.arange(len(self.sources)), self.epoch_rows)
        np.random.default_rng([seed, epoch, len(self.sources)]).shuffle(turns)
        return turns

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The row numbers in the order of this epoch."""
        rows = self.turns(seed, epoch)
        turns = rows.copy()
        for i, source in enumerate(self.sources.values()):
            start = epoch * self.epoch_rows[i]  # so many of its rows are behind us
            nth = np.arange(start // len(source), -(-(start + self.epoch_rows[i]) // len(source)))  # epochs of its own
            own = np.concatenate([source.order(seed, n) for n in nth])[start % len(source) :]
            rows[turns == i] = self.first_row[i] + own[: self.epoch_rows[i]]
        return rows

    def validation_rows(self, rows: int | None) -> dict[str, np.ndarray]:
        """Of each source the same `rows` rows every time, or all."""
        orders = (source.order(seed=0, epoch=0)[:rows] for source in self.sources.values())
        return {name: first + order for name, first, order in zip(self.sources, self.first_row, orders)}

    def times_seen(self, seed: int, epoch: int, row: int) -> dict[str, float]:
        """How often each source has been read when the run is at this row of this epoch."""
        rows = epoch * self.epoch_rows + np.bincount(self.turns(seed, epoch)[:row], minlength=len(self.sources))
        return dict(zip(self.sources, (rows / self.n_rows).tolist()))

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows, those of the first source before those of the second."""
        owners = np.searchsorted(self.first_row, rows, side="right") - 1  # (B,)
        parts, documents = [], []
        for i, source in enumerate(self.sources.values()):
            if (owners == i).any():
                part = source.batch(rows[owners == i] - self.first_row[i])
                part.document_index += len(documents) * (part.document_index >= 0)
                documents += [int(self.first_document[i]) + document for document in part.documents]
                parts.append(part)
        names = ("input_ids", "labels", "position_ids", "document_index")
        tensors = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        real_tokens = sum(part.real_tokens for part in parts)
        return Batch(*tensors, documents, self.split, real_tokens, sum(part.attention_pairs for part in parts))


def open_data(args: argparse.Namespace, *kinds: str) -> tuple[Mixture, Mixture]:
    """The two splits, train and val, of the folders of args.data in the shares of args.mix.

    UserError where a folder is of another kind than those named, or where shares and folders do not go together.
    """
    train_set, val_set = (open_sources(args.data, split, args.max_seq_len) for split in ("train", "val"))
    for source in train_set.values():
        folder, kind = source.prepared.folder, source.prepared.kind
        if kind not in kinds:
            raise UserError(
                f"{folder} was made with `data_process.py {kind}`; this stage needs {' or '.join(kinds)} data"
            )
        if not len(source):
            raise UserError(f"{folder} holds no training rows; give data_process.py more text")
    mixture = Mixture(train_set, read_mix(args.mix, list(train_set)))
    return mixture, Mixture(val_set, mixture.shares)


def open_sources(data: Path | list[str], split: str, max_seq_len: int) -> dict[str, PackedDataset]:
    """A split of the folders of --data, by name."""
    return {name: PackedDataset(folder, split, max_seq_len) for name, folder in named_folders(data).items()}


def named_folders(data: Path | list[str]) -> dict[str, Path]:
    """The folders of --data, or a stage's default: DIR has its last part for a name, or another in NAME=DIR."""
    folders = {}
    for text in map(str, [data] if isinstance(data, Path) else data):
        name, _, folder = text.partition("=")
        if not (name and folder) or Path(name).name != name:  # no NAME= before it: an = further on belongs to a folder
            name, folder = Path(text).resolve().name, text
        if name in folders:
            raise UserError(f"two sources have the name {name}; give --data NAME={folder}")
        folders[name] = Path(folder)
    return folders


def read_mix(words: list[str] | None, names: list[str]) -> dict[str, float] | None:
    """Shares by source, from NAME=SHARE words or a file of JSON; UserError where they are not those of `names`."""
    if not words:
        return None
    if "=" in words[0]:
        shares = dict(word.partition("=")[::2] for word in words)
    elif Path(words[0]).is_file():
        shares = read_json(Path(words[0]))
    else:
        raise UserError(f"--mix {words[0]}: neither NAME=SHARE nor a file")
    if sorted(shares) != sorted(names):
        raise UserError(
            f"--mix names {', '.join(sorted(shares))}; the sources of --data are {', '.join(sorted(names))}"
        )
    try:
        return {name: above_zero(share) for name, share in shares.items()}
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        raise UserError(f"--mix: shares must be numbers above 0, not {', '.join(map(str, shares.values()))}") from None
