"""Files that are written whole or not at all, JSON, a user's Python file, and SHA-256 sums."""

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
RESTORE = "restore it from a copy, or make it anew"
# What a training run leaves in its folder beside the model: its log, sampled answers, how it was made, its state.
METRICS_FILE, ROLLOUTS_FILE, RUN_FILE = "metrics.jsonl", "rollouts.jsonl", "run.json"
STATE_FILE = "training_state/state.safetensors"


def write_file(path: Path, write: Callable[[Path], object]):
    """Calls write(temporary_path) and renames the result to `path`. OSError, and the old file stays, if that fails."""
    if path.exists() and not path.is_file():  # a device, say: it would be replaced
        raise OSError(f"cannot write {path}: it is there, and is no file")
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
    # Half a surrogate pair, as in the sample of a bad record, has no UTF-8: it is written as the escape that it was.
    write_file(path, lambda temporary: temporary.write_text(text, "utf-8", errors="backslashreplace"))


def read_json(path: Path) -> dict:
    """The object in a file of JSON. UserError, naming the file, where it holds anything else."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device read without end
        raise UserError(f"{path} is no file")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value


@contextlib.contextmanager
def replacing_directory(directory: Path) -> Iterator[Path]:
    """A new, empty neighbour of `directory`, which takes its place if the block ends well, and else goes away."""
    directory = directory.absolute()  # so that "." has a name
    if directory.exists() and not directory.is_dir():  # a device, say
        raise UserError(f"{directory}: cannot be replaced: it is no folder")
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
    """Puts `written` in the place of `directory`; what stood there goes, or is kept as `<directory>.old`.

    Between the two renames there is no `directory` for a moment; a kill there is mended by finish_replacing.
    """
    old = directory.with_name(f"{directory.name}.old" if keep_old else f".{directory.name}.old")
    new = _new(directory)
    shutil.rmtree(new, ignore_errors=True)
    written.rename(new)  # this name says that it is whole
    try:
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        finish_replacing(directory)
    except OSError:  # another program holds it open, on Windows
        if old.exists() and not directory.exists():
            old.rename(directory)
        new.rename(written)
        raise
    if not keep_old:
        shutil.rmtree(old, ignore_errors=True)


def finish_replacing(directory: Path):
    """The last step of replace_directory; whoever reads `directory` takes it too, in case of a kill before it."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another process may be as quick
        if not directory.exists():
            _new(directory).rename(directory)


def _new(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.new")


def load_module(path: Path, name: str) -> ModuleType:
    """A Python file of the user's as a module of this name. UserError where it is missing, or fails."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever it raises
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from None
    return module


def sha256(path: Path, head: bytes = b"") -> str:
    """Of a file's content, in hexadecimal; with `head` in the place of as many bytes at its beginning."""
    digest = hashlib.sha256(head)
    with open(path, "rb") as file:
        file.seek(len(head))
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# A safetensors file begins with a header: its length in 8 bytes, and JSON, in which texts may stand. One of them is the
# sum of the whole file, taken while there are zeros in its place.
NO_SUM = b"0" * 64
SUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def _header(path: Path) -> bytes:
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), os.path.getsize(path)))


def seal(path: Path):
    """Fills in the sum of a safetensors file that has a text "sha256" of zeros. Its texts are put in order before: the
    library writes them in any, and equal contents should be equal files."""
    header = _header(path)
    content = json.loads(header[8:])
    content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    header = header[:8] + text.ljust(len(header) - 8)
    with open(path, "rb+") as file:
        file.write(header.replace(NO_SUM, sha256(path, header).encode(), 1))


def check_seal(path: Path):
    """UserError where a safetensors file is not as seal() left it; one of another program has no sum to compare."""
    header = _header(path)
    if (found := SUM.search(header)) and found[1].decode() != sha256(path, header.replace(found[1], NO_SUM)):
        raise UserError(f"{path} is damaged: its content does not have the sum that it was written with; {RESTORE}")


def check_sums(directory: Path, sums: dict[str, str], advice: str = RESTORE):
    """UserError names a file of `directory` that does not have its sum, or is not there."""
    for name, expected in sums.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {advice}")
        if sha256(path) != expected:
            raise UserError(f"{path} is damaged, or was changed after it was written; {advice}")
