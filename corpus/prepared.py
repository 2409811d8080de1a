"""The prepared folder, of which this file alone knows the format: one writer, one reader; numpy only.

    train.bin  train.idx  [train.mask]    token ids end to end; where each document begins, and the end of the last;
    val.bin    val.idx    [val.mask]      of chats, a byte per token: 1 where it is trained
    [train.jsonl, val.jsonl]              of questions, a note each: the answer that a reward is given for
    tokenizer/  token_bytes.bin           what the ids mean, and how many UTF-8 bytes of text each stands for
    meta.json                             what it is, counts, sources, SHA-256 sums

Numbers are little-endian: ids of 16 bits, or 32 where the vocabulary needs them, offsets of 64, byte counts of 16.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from base.cli import UserError
from base.files import check_sums, finish_replacing, read_json, replacing_directory, sha256, write_json
from model.chat import TEMPLATE_FILE, TOKENIZER_FILES, load_tokenizer, token_bytes, tokenizer_fingerprint

FORMAT_VERSION = 2
SPLITS = ("train", "val")
META, TOKENIZER, TOKEN_BYTES = "meta.json", "tokenizer", "token_bytes.bin"
CHECKED = 2**26  # bytes: readers compare smaller files with their sums, `data_process.py check` all of them


class PreparedWriter:
    """A folder that is being written. A sequence is a document, a chat, or one half of a pair."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        tokenizer_dir: Path,
        masked: bool,
        group: int,
        noted: bool,
        stack: contextlib.ExitStack,
        chat_template: str = "",
        date: str = "",
    ):
        """chat_template: a file that replaces the tokenizer's. date: that its template writes, if it does."""
        self.folder = folder
        tokenizer = folder / TOKENIZER
        tokenizer.mkdir()
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).exists():
                shutil.copyfile(tokenizer_dir / name, tokenizer / name)
        used = load_tokenizer(tokenizer_dir, chat_template)
        if used.template and (masked or noted):  # it may be in tokenizer_config.json, or in no file of the folder
            (tokenizer / TEMPLATE_FILE).write_text(used.template.source, "utf-8")
        sizes = token_bytes(used)
        sizes.astype("<u2").tofile(folder / TOKEN_BYTES)
        self.dtype = np.dtype("<u2" if len(sizes) <= 2**16 else "<u4")
        self.meta = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "masked": masked,  # whether only some tokens are trained
            "group": group,  # so many sequences stay together
            "dtype": self.dtype.name,
            "vocab_size": len(sizes),
            "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        }
        if used.template and (masked or noted):
            self.meta["chat_template_sha256"] = used.template.sha256
        if date:
            self.meta["date"] = date
        suffixes = ["bin", "idx", *(["mask"] if masked else []), *(["jsonl"] if noted else [])]
        self.files = {}
        self.counts = {}
        for split in SPLITS:
            paths = {suffix: folder / f"{split}.{suffix}" for suffix in suffixes}
            self.files[split] = {
                suffix: stack.enter_context(open(path, "wb"))  # noqa: SIM115  the stack closes it
                for suffix, path in paths.items()
            }
            self.files[split]["idx"].write(bytes(8))  # the first sequence begins at 0
            self.counts[split] = {"documents": 0, "tokens": 0, "bytes": 0} | ({"trained_tokens": 0} if masked else {})

    def add(self, split: str, parts: Iterable[tuple[bytes, bytes]], size: int = 0, note: str = ""):
        """One record: its sequences, each as ids and mask; how many UTF-8 bytes of text they are; its note."""
        files, counts = self.files[split], self.counts[split]
        for ids, mask in parts:
            counts["documents"] += 1
            counts["tokens"] += len(ids) // self.dtype.itemsize
            files["bin"].write(ids)
            files["idx"].write(counts["tokens"].to_bytes(8, "little"))
            if "mask" in files:
                counts["trained_tokens"] += mask.count(1)
                files["mask"].write(mask)
        counts["bytes"] += size
        if "jsonl" in files:
            files["jsonl"].write(note.encode() + b"\n")

    def finish(self):
        """When the files are closed."""
        paths = sorted(self.folder.rglob("*.*"))
        sums = {path.relative_to(self.folder).as_posix(): sha256(path) for path in paths}
        meta = json.loads(json.dumps(self.meta | {"splits": self.counts, "files": sums}))  # as it will be read
        write_json(self.folder / META, meta | {"sha256": _sum_of(meta)})


@contextlib.contextmanager
def writing_prepared(
    folder: Path,
    kind: str,
    tokenizer_dir: Path,
    masked: bool = False,
    group: int = 1,
    noted: bool = False,
    chat_template: str = "",
    date: str = "",
) -> Iterator[PreparedWriter]:
    """A writer whose folder takes the place of `folder` when the block ends well; what it adds to .meta is kept.

    UserError where `folder` contains anything but prepared data: it may be someone's work.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name} if folder.exists() else set()
    ours = {f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx", "mask", "jsonl")}
    ours |= {META, TOKENIZER, TOKEN_BYTES}
    if names and not (META in names and names <= ours):
        raise UserError(f"{folder} contains more than prepared data: choose another --output, or move it away")
    with replacing_directory(folder) as new:
        with contextlib.ExitStack() as stack:
            writer = PreparedWriter(new, kind, tokenizer_dir, masked, group, noted, stack, chat_template, date)
            yield writer
        writer.finish()


class Prepared:
    """One split of a prepared folder; its token files stay on disk (memory-mapped)."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.meta = read_meta(self.folder)
        self.kind: str = self.meta["kind"]
        self.group: int = self.meta["group"]
        self.tokens = self._map(f"{split}.bin", self.meta["dtype"])  # (tokens,)
        self.offsets = self._map(f"{split}.idx", "<i8")  # (sequences + 1,)
        self.mask = self._map(f"{split}.mask", np.uint8) if self.meta["masked"] else None
        self.token_bytes = self._map(TOKEN_BYTES, "<u2").astype(np.int64)  # (V,)
        if not (self.tokenizer_dir / "tokenizer.json").exists():
            raise UserError(
                f"{self.tokenizer_dir}/tokenizer.json is missing; prepare the data again with data_process.py"
            )
        rising = len(self.offsets) > 0 and self.offsets[0] == 0 and (np.diff(self.offsets) >= 0).all()
        if not rising or self.offsets[-1] != len(self.tokens):
            raise UserError(f"{folder}/{split}.idx and {split}.bin do not belong together; prepare the data again")
        if self.mask is not None and len(self.mask) != len(self.tokens):
            raise UserError(f"{folder}/{split}.mask and {split}.bin do not belong together; prepare the data again")
        other = SPLITS[1 - SPLITS.index(split)]
        sums = {name: value for name, value in self.meta["files"].items() if not name.startswith(f"{other}.")}
        small = {name: value for name, value in sums.items() if _size(self.folder / name) <= CHECKED}
        check_sums(self.folder, small, f"{self.folder / META} has another sum; prepare the data again")

    @property
    def tokenizer_dir(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def fingerprint(self) -> str:
        """Of the content: equal fingerprints mean equal tokens."""
        return hashlib.sha256(json.dumps(self.meta["files"], sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        """Records: a pair is one."""
        return (len(self.offsets) - 1) // self.group

    def record(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The sequences of a record, each as its ids and its mask: all ones where everything is trained."""
        sequences = []
        for i in range(index * self.group, (index + 1) * self.group):
            here = slice(self.offsets[i], self.offsets[i + 1])
            ids = np.asarray(self.tokens[here])
            mask = np.ones(len(ids), np.uint8) if self.mask is None else np.asarray(self.mask[here])
            sequences.append((ids, mask))
        return sequences

    def notes(self) -> list[dict]:
        """Of every record, in their order."""
        path = self.folder / f"{self.split}.jsonl"
        try:
            notes = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({error}); prepare the data again") from None
        if not all(isinstance(note, dict) for note in notes):
            raise UserError(f"{path} has a line that is not a JSON object; prepare the data again")
        if len(notes) != len(self):
            raise UserError(f"{path} and {self.split}.idx do not belong together; prepare the data again")
        return notes

    def _map(self, name: str, dtype) -> np.ndarray:
        path, dtype = self.folder / name, np.dtype(dtype)
        if not path.is_file():
            raise UserError(f"{path} is missing; prepare the data again with data_process.py")
        size = path.stat().st_size
        if size == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        if size % dtype.itemsize:
            raise UserError(f"{path} is cut short; prepare the data again with data_process.py")
        return np.memmap(path, dtype=dtype, mode="r")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check_prepared(folder: Path):
    """UserError names a file that does not have the sum that it was written with."""
    check_sums(folder, read_meta(folder)["files"])


def _sum_of(meta: dict) -> str:
    """Of all of meta.json but its sum."""
    content = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_meta(folder: Path) -> dict:
    """meta.json of a prepared folder. UserError, with what to do, if it is not one."""
    finish_replacing(folder)
    path = folder / META
    if not path.exists():
        kind = folder.name if folder.name in ("sft", "dpo", "rl") else "pretrain"
        raise UserError(
            f"no prepared data in {folder}; make it with: python data_process.py {kind} YOUR_FILES --output {folder}"
        )
    meta = read_json(path)
    if meta.get("format_version") != FORMAT_VERSION:
        version = meta.get("format_version", "of another program")
        raise UserError(f"{path} has format {version}, not {FORMAT_VERSION}; prepare the data again")
    types = {"kind": str, "masked": bool, "group": int, "dtype": str, "vocab_size": int, "files": dict}
    wrong = [name for name, kind in types.items() if not isinstance(meta.get(name), kind)]
    if wrong or meta["dtype"] not in ("uint16", "uint32") or meta["group"] < 1:
        raise UserError(f"{path} is not what data_process.py writes; prepare the data again")
    if meta.get("sha256", _sum_of(meta)) != _sum_of(meta):  # data made earlier have none
        raise UserError(f"{path} is damaged, or was changed after it was written; prepare the data again")
    return meta
