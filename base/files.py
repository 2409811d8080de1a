"""Atomic files and folders, JSON, a user's Python file, and SHA-256 checksums."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from base.cli import UserError

UMASK = os.umask(0o077)
os.umask(UMASK)  # the only way to read it is to set it
RESTORE = "restore it from a copy, or create it again"
# What a training run leaves in its folder beside the model: its log, sampled answers, how it was made, its state.
METRICS_FILE, ROLLOUTS_FILE, RUN_FILE = "metrics.jsonl", "rollouts.jsonl", "run.json"
STATE_FILE = "training_state/state.safetensors"


def write_file(path: Path, write: Callable[[Path], object]):
    """Calls write(temporary_path) and renames the result to `path`. If that fails: OSError, and the old file stays."""
    if path.exists() and not path.is_file():  # such as a device, which would be replaced
        raise OSError(f"cannot write {path}: it exists and is not a file")
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the content must reach the disk before the name does
        temporary.chmod(0o666 & ~UMASK)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {path} ({reason}); what was saved before is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object):
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Half a surrogate pair (as in the sample of a bad record) has no UTF-8: it is written as an escape.
    write_file(path, lambda temporary: temporary.write_text(text, "utf-8", errors="backslashreplace"))


def read_json(path: Path) -> dict:
    """The JSON object in a file. UserError with the file's name if it contains anything else."""
    if path.exists() and not path.is_file():  # reading a pipe would block, reading a device might not end
        raise UserError(f"{path} is not a file")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object")
    return value


@contextlib.contextmanager
def replacing_directory(directory: Path) -> Iterator[Path]:
    """A new, empty folder that replaces `directory` if the block succeeds, and is deleted otherwise."""
    directory = directory.absolute()  # so that "." has a name
    if directory.exists() and not directory.is_dir():  # such as a device
        raise UserError(f"{directory}: cannot be replaced: it is not a folder")
    new = directory.with_name(f".{directory.name}.{os.getpid()}.new")
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from None
    try:
        yield new
        replace_directory(directory, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def replace_directory(directory: Path, written: Path, keep_old: bool = False):
    """Renames `written` to `directory`; the old folder is deleted, or kept as `<directory>.old`.

    Between the two renames there is no `directory` for a moment; finish_replacing repairs a kill at this point.
    """
    old = directory.with_name(f"{directory.name}.old" if keep_old else f".{directory.name}.old")
    new = _new(directory)
    shutil.rmtree(new, ignore_errors=True)
    written.rename(new)  # this name means that it is complete
    try:
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        finish_replacing(directory)
    except OSError:  # on Windows, if another program has it open
        if old.exists() and not directory.exists():
            old.rename(directory)
        new.rename(written)
        raise
    if not keep_old:
        shutil.rmtree(old, ignore_errors=True)


def finish_replacing(directory: Path):
    """The last step of replace_directory; readers of `directory` call it too, in case of a kill before this step."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another process may be faster
        if not directory.exists():
            _new(directory).rename(directory)


def _new(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.new")


def load_module(path: Path, name: str) -> ModuleType:
    """Loads a user's Python file as a module with this name. UserError if it is missing or raises."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from None
    return module


def sha256(path: Path, head: bytes = b"") -> str:
    """Of a file's content, in hexadecimal; `head` replaces as many bytes at its beginning."""
    digest = hashlib.sha256(head)
    with open(path, "rb") as file:
        file.seek(len(head))
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# A safetensors file starts with a header: its length in 8 bytes, then JSON that may contain strings. One of them is the
# checksum of the whole file, computed with zeros in its place.
NO_SUM = b"0" * 64
SUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def _header(path: Path) -> bytes:
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), os.path.getsize(path)))


def seal(path: Path):
    """Fills in the checksum of a safetensors file whose metadata has a "sha256" of zeros. Sorts the metadata first:
    the library writes it in any order, and equal contents should give equal files."""
    header = _header(path)
    content = json.loads(header[8:])
    content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    header = header[:8] + text.ljust(len(header) - 8)
    with open(path, "rb+") as file:
        file.write(header.replace(NO_SUM, sha256(path, header).encode(), 1))


def check_seal(path: Path):
    """UserError if a safetensors file has changed since seal(). Files of other programs have no checksum."""
    header = _header(path)
    if (found := SUM.search(header)) and found[1].decode() != sha256(path, header.replace(found[1], NO_SUM)):
        raise UserError(f"{path} is damaged: its content does not have the sum that it was written with; {RESTORE}")


def check_sums(directory: Path, sums: dict[str, str], advice: str = RESTORE):
    """UserError names a file of `directory` that is missing or does not have its checksum."""
    for name, expected in sums.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {advice}")
        if sha256(path) != expected:
            raise UserError(f"{path} is damaged, or was changed after it was written; {advice}")
