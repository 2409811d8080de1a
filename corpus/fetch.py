"""Data sets by name: the catalogue, and the two hubs that they (and models, corpus/hub.py) are fetched from.

Hugging Face by its own library (HF_ENDPOINT, HF_TOKEN and the cache are as everywhere), ModelScope by plain HTTP
(MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN). Either goes on after a cut, and both tell sums that are checked.
"""

import csv
import difflib
import fnmatch
import gzip
import http.client
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import time
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from tqdm import tqdm

from base.cli import UserError, one_line
from base.files import sha256
from corpus.errors import BadRecord
from corpus.files import ReadOptions, open_decompressed, read_records, suffix_of

CATALOGUE = Path(__file__).parent / "catalogue.json"
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2")
TRIES, WAIT, MOST_WAIT = 6, 1.0, 60.0  # seconds before the second try; twice as long before each further one
BLOCK = 2**20
MOST_FILES, MOST_LISTING = 100_000, 2**26  # of a data set; bytes in which a hub may name a part of them
# Errors of urllib and of the library, for a cut or for what is no HTTP, and of readers of what came.
NETWORK = (OSError, http.client.HTTPException, huggingface_hub.errors.HTTPError)
NO_SENSE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
DAMAGED = (ValueError, OverflowError, EOFError, zlib.error, csv.Error)
NO_ARCHIVE = (*DAMAGED, shutil.ReadError, tarfile.TarError, RuntimeError)  # the last for passwords and odd methods
REASONS = {  # HTTP status -> what it means here
    401: "asks who you are, or for your consent: agree on {page} and give a token in {token}",
    403: "asks who you are, or for your consent: agree on {page} and give a token in {token}",
    404: "is not there: it may have moved; see {page}",
    429: "is asked for too often: wait some minutes and run the command again; it goes on from where it stopped",
}


class Entry(NamedTuple):
    """A data set of the catalogue."""

    name: str
    stage: str  # the command of data_process.py that takes it, or "exam"
    hf: str | None  # its id on Hugging Face
    ms: str | None  # and on ModelScope
    revision: str | None  # None: the newest
    files: list[str]  # patterns of names within it
    flags: list[str]  # for the command
    licence: str
    mb: float | None  # about; None: not known
    seen: str | None  # the day on which it was last fetched by us; None: never
    en: str  # what it is good for
    zh: str

    @property
    def facts(self) -> str:
        size = f"{self.mb:,g} MB" if self.mb else "size not known"
        hubs = " and ".join(hub for hub in HUBS if getattr(self, hub))
        return f"{size}; {hubs}; {self.licence}; {self.seen and f'worked on {self.seen}' or 'never tried by us'}"


class RemoteFile(NamedTuple):
    path: str
    size: int | None  # bytes
    sha256: str | None

    def checked(self) -> "RemoteFile":
        """ValueError where a hub says what cannot be."""
        if not isinstance(self.path, str) or not self.path.isprintable():
            raise ValueError(f"a file's name is {self.path!r:.60}")
        if self.size is not None and (type(self.size) is not int or self.size < 0):
            raise ValueError(f"a file's size is {self.size!r:.60}")
        if self.sha256 is not None and not isinstance(self.sha256, str):
            raise ValueError(f"a file's sum is {self.sha256!r:.60}")
        return self


def read_catalogue() -> dict[str, Entry]:
    return {entry["name"]: Entry(**entry) for entry in json.loads(CATALOGUE.read_text("utf-8"))}


def find_entry(name: str) -> Entry:
    catalogue = read_catalogue()
    if name not in catalogue:
        near = difflib.get_close_matches(name, catalogue, 3)
        raise UserError(f"no data set is called {name}{near and ': maybe ' + ' or '.join(near) or ''}")
    return catalogue[name]


# ---- HTTP -----------------------------------------------------------------------------------------------------------


def status_of(error: Exception) -> int | None:
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return 404  # it answers 401 for what does not exist
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        return status_of(error.__cause__)
    return getattr(error, "code", None)


def _is_local(error: Exception) -> bool:
    """Whether it is the disk that fails, not the line."""
    return isinstance(error, OSError) and getattr(error, "filename", None) is not None and not status_of(error)


def _number(text: str | None) -> int | None:
    """Of a header's value, where it is one."""
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None


class RemoteStream(io.RawIOBase):
    """A file on a server, read by ranges: it goes on by itself after a cut, and can be sought in."""

    def __init__(self, url: str, headers: dict[str, str], size: int | None):
        self.url, self.headers = url, headers
        self.size = size
        self.position = 0
        self.response = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if start + offset != self.position:
            self._hang_up()
        self.position = start + offset
        return self.position

    def readinto(self, buffer) -> int:
        """Tries again where the line was cut or the hub is busy."""
        tries = 0
        while True:
            tries += 1
            try:
                return self._read_once(buffer)
            except (OSError, http.client.HTTPException) as error:
                self._hang_up()
                status = status_of(error)
                if tries == TRIES or (status and status not in (408, 429) and status < 500):
                    raise
                asked = _number(error.headers.get("Retry-After")) if status else None
                wait = min(WAIT * 2 ** (tries - 1) if asked is None else asked, MOST_WAIT)
                print(f"{self.url}: {error}; again in {wait:g} s", flush=True)
                time.sleep(wait)

    def _read_once(self, buffer) -> int:
        if self.size is not None and self.position >= self.size:
            return 0
        if self.response is None:
            self._call()
        count = self.response.readinto(buffer)
        if not count and self.size is not None:
            raise ConnectionError(f"cut at {self.position:,} of {self.size:,} bytes")
        self.position += count
        return count

    def _call(self):
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.position}-"})
        for name, value in self.headers.items():
            request.add_unredirected_header(name, value)  # a token is for the hub, not for where it sends us
        self.response = urllib.request.urlopen(request, timeout=60)
        headers = self.response.headers
        if self.size is None:
            self.size = _number(headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length"))
        left = self.position if self.response.status != 206 else 0  # it sends all, though a part was asked for
        while left and (block := self.response.read(min(left, BLOCK))):
            left -= len(block)

    def _hang_up(self):
        if self.response is not None:
            self.response.close()
        self.response = None

    def close(self):
        self._hang_up()
        super().close()


# ---- Hubs -----------------------------------------------------------------------------------------------------------


class HuggingFace:
    title, token, endpoint_variable = "Hugging Face", "HF_TOKEN", "HF_ENDPOINT"

    def __init__(self, repo: str, revision: str | None, kind: str = "dataset"):
        """kind: or "model"."""
        self.repo, self.revision = repo, revision
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        self.page = f"{self.endpoint}/{repo}" if kind == "model" else f"{self.endpoint}/datasets/{repo}"
        self.where = dict(repo_id=repo, repo_type=kind, revision=revision)

    def files(self) -> list[RemoteFile]:
        api = huggingface_hub.HfApi(endpoint=self.endpoint)
        tree = itertools.islice(api.list_repo_tree(**self.where, recursive=True), MOST_FILES)
        files = [item for item in tree if isinstance(item, huggingface_hub.hf_api.RepoFile)]
        return [RemoteFile(file.path, file.size, file.lfs.sha256 if file.lfs else None) for file in files]

    def stream(self, file: RemoteFile) -> RemoteStream:
        url = huggingface_hub.hf_hub_url(filename=file.path, endpoint=self.endpoint, **self.where)
        return RemoteStream(url, huggingface_hub.utils.build_hf_headers(), file.size)

    def disk(self, target: Path) -> Path:
        """Where the bytes will lie: in the library's cache."""
        return Path(huggingface_hub.constants.HF_HUB_CACHE)

    def download(self, file: RemoteFile, target: Path):
        """Into the library's cache, if it is not there; `target` becomes a link to it, or a copy without links."""
        where = dict(filename=file.path, endpoint=self.endpoint, **self.where)
        cached = Path(huggingface_hub.hf_hub_download(**where))  # it tries again by itself
        if file.sha256 and sha256(cached) != file.sha256:
            cached.resolve().unlink()
            cached.unlink(missing_ok=True)
            raise _wrong_sum(file)
        target.unlink(missing_ok=True)
        try:
            target.symlink_to(cached.absolute())
        except OSError:  # Windows wants a right for it
            shutil.copyfile(cached, target)

    # Of a model:

    def licence(self) -> str:
        card = huggingface_hub.HfApi(endpoint=self.endpoint).model_info(self.repo).card_data
        return getattr(card, "license", None) or "not known"

    def cache(self) -> Path:
        return self.disk(Path())

    def cached(self, file: RemoteFile) -> bool:
        where = dict(cache_dir=self.cache(), revision=self.revision)
        return isinstance(huggingface_hub.try_to_load_from_cache(self.repo, file.path, **where), str)

    def fetch(self, file: RemoteFile) -> Path:
        where = dict(cache_dir=self.cache(), endpoint=self.endpoint, **self.where)
        return Path(huggingface_hub.hf_hub_download(filename=file.path, **where))

    def offline(self) -> Path | None:
        """The folder of the model, if it was fetched before."""
        config = huggingface_hub.try_to_load_from_cache(self.repo, "config.json", cache_dir=self.cache())
        return Path(config).parent if isinstance(config, str) else None


class ModelScope:
    title, token, endpoint_variable = "ModelScope", "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT"

    def __init__(self, repo: str, revision: str | None, kind: str = "dataset"):
        self.repo, self.revision, self.kind = repo, revision or "master", kind
        self.endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "").rstrip("/") or "https://www.modelscope.cn"
        self.page = f"{self.endpoint}/{kind}s/{repo}"
        self.api = f"{self.endpoint}/api/v1/{kind}s/{repo}/repo"
        key = os.environ.get(self.token)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def files(self) -> list[RemoteFile]:
        found = []
        while True:  # page by page, until one is not full
            page = dict(Revision=self.revision, Recursive="True", PageNumber=len(found) // 100 + 1, PageSize=100)
            listing = "files" if self.kind == "model" else "tree"
            items = self._ask(f"{self.api}/{listing}?{urllib.parse.urlencode(page)}").get("Files") or []
            if len(found) >= MOST_FILES or (found and items[:1] == found[:1]):
                raise ValueError("its list has no end")
            found += items
            if len(items) < 100:
                break
        files = [item for item in found if item.get("Type") != "tree"]
        return [RemoteFile(item["Path"], item.get("Size"), item.get("Sha256") or None) for item in files]

    def _ask(self, url: str) -> dict:
        with RemoteStream(url, self.headers, None) as stream:
            return json.loads(io.BufferedReader(stream).read(MOST_LISTING)).get("Data") or {}

    def stream(self, file: RemoteFile) -> RemoteStream:
        query = urllib.parse.urlencode(dict(Revision=self.revision, FilePath=file.path))
        return RemoteStream(f"{self.api}?{query}", self.headers, file.size)

    def disk(self, target: Path) -> Path:
        return target

    def download(self, file: RemoteFile, target: Path):
        """By way of `target`.part, which stays when the line is cut, and is gone on with the next time."""
        part = target.with_name(f"{target.name}.part")
        with open(part, "ab") as out, self.stream(file) as stream:
            stream.seek(out.tell())
            with tqdm(total=file.size, initial=out.tell(), desc=target.name, unit="B", unit_scale=True) as bar:
                while block := stream.read(BLOCK):
                    out.write(block)
                    bar.update(len(block))
        if (file.sha256 and sha256(part) != file.sha256) or file.size not in (None, part.stat().st_size):
            part.unlink()
            raise _wrong_sum(file)
        os.replace(part, target)

    # Of a model:

    def licence(self) -> str:
        return self._ask(self.api.removesuffix("/repo")).get("License") or "not known"

    def cache(self) -> Path:
        """Where ModelScope's own library would put it."""
        cache = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope" / "hub")
        return cache / "models" / self.repo.replace(".", "___")

    def cached(self, file: RemoteFile) -> bool:
        path = self.cache() / file.path
        return path.exists() and file.size in (None, path.stat().st_size)

    def fetch(self, file: RemoteFile) -> Path:
        path = self.cache() / file.path
        if not self.cached(file):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.download(file, path)
        return path

    def offline(self) -> Path | None:
        return self.cache() if (self.cache() / "config.json").exists() else None


def _wrong_sum(file: RemoteFile) -> UserError:
    return UserError(
        f"{file.path}: what came has another SHA-256 than the hub tells, or another size, and was deleted: "
        "fetch it again"
    )


HUBS = {"hf": HuggingFace, "ms": ModelScope}
Hub = HuggingFace | ModelScope


# ---- Fetching -------------------------------------------------------------------------------------------------------


def open_hub(entry: Entry, hub: str) -> Hub:
    """The hub that was asked for, or the only one that has the set."""
    if not getattr(entry, hub):
        hub = "ms" if hub == "hf" else "hf"
        print(f"{entry.name}: not known to be on the other hub: taken from {HUBS[hub].title}")
    return HUBS[hub](getattr(entry, hub), entry.revision)


def explain(error: Exception, what: str, hub: Hub) -> Exception:
    """A UserError for what the user can mend, an OSError for the rest."""
    if reason := REASONS.get(status_of(error)):
        return UserError(f"{what}: {reason.format(page=hub.page, token=hub.token)}")
    if _is_local(error):
        return error
    return OSError(f"{what} could not be fetched from {hub.title} ({one_line(error)}): run the command again to go on")


def choose_files(entry: Entry, hub: Hub) -> list[RemoteFile]:
    """Those of the set's files that the catalogue means. UserError where there are none, or it is not there."""
    try:
        files = [file.checked() for file in hub.files()]
    except NETWORK as error:
        raise explain(error, entry.name, hub) from None
    except NO_SENSE as error:
        raise OSError(f"{entry.name}: {hub.title} names its files in a way that makes no sense ({error})") from None
    chosen = [file for file in files if any(fnmatch.fnmatch(file.path, pattern) for pattern in entry.files)]
    chosen = [file for file in chosen if Path(file.path).name not in ("dataset_infos.json", "dataset_info.json")]
    if not chosen:
        names = ", ".join(file.path for file in files[:8])
        raise UserError(f"{entry.name}: no file there is called {' or '.join(entry.files)}; there is {names or 'none'}")
    return chosen


def check_space(files: list[RemoteFile], folder: Path):
    """UserError where the disk has less room than the files take."""
    needed = sum(file.size or 0 for file in files)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e6:,.0f} MB are to come and {free / 1e6:,.0f} MB are free: "
            "make room, choose another --output, or take a part with --max_mb"
        )


def fetch_files(hub: Hub, files: list[RemoteFile], folder: Path) -> list[Path]:
    """Whole files, those that are there already left alone, archives unpacked. Returns what lies in `folder` then."""
    missing = []
    for file in files:
        target = _target(folder, file.path)
        if target.exists() and file.size in (None, target.stat().st_size):
            print(f"{target}: there already")
        else:
            missing.append((file, target))
    check_space([file for file, _ in missing], hub.disk(folder))
    for file, target in missing:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            hub.download(file, target)
        except UserError:
            raise
        except (*NETWORK, *NO_SENSE) as error:
            raise explain(error, file.path, hub) from None
        checked = "SHA-256 as the hub tells" if file.sha256 else "the hub tells no sum"
        print(f"{target}: {target.stat().st_size / 1e6:,.1f} MB, {checked}")
    paths = [_target(folder, file.path) for file in files]
    for path in paths:
        if path.name.lower().endswith(ARCHIVES):
            unpack(path)
    return paths


def unpack(path: Path):
    """An archive's files, beside it. UserError where it is damaged, or larger than the disk."""
    is_zip = path.suffix.lower() == ".zip"
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                inside = [RemoteFile(info.filename, info.file_size, None) for info in archive.infolist()]
            check_space(inside, path.parent)
        shutil.unpack_archive(path, path.parent, **({} if is_zip else {"filter": "data"}))
    except UserError:
        raise
    except (*NO_ARCHIVE, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be unpacked ({one_line(error)}): delete it and fetch it again") from None
    print(f"{path}: unpacked")


def _target(folder: Path, path: str) -> Path:
    """Where a file of the hub comes to lie; UserError for a name that leads out of the folder."""
    target = folder / path
    # Of its folder, for it may itself be a link: into the library's cache.
    if not target.parent.resolve().is_relative_to(folder.resolve()) or not target.name or ".." in Path(path).parts:
        raise UserError(f"{path}: the hub gives this as a file's name, and it leads out of {folder}")
    return target


def fetch_part(hub: Hub, files: list[RemoteFile], folder: Path, max_mb: float, max_records: int) -> list[Path]:
    """The first records of the files, as JSON lines, read from the hub only as far as they go. A limit of 0 is none."""
    paths, records, size = [], 0, 0.0
    for file in files:
        if (max_records and records >= max_records) or (max_mb and size >= max_mb * 1e6):
            break
        if not suffix_of(Path(file.path)):
            raise UserError(f"{file.path}: of an archive no part can be taken: leave out --max_mb and --max_records")
        stem = Path(file.path).as_posix().removesuffix(".gz").rpartition(".")[0]
        target = _target(folder, f"{stem}.part.jsonl")

        new = target.with_name(f".{target.name}.new")
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(new, "wb") as out, tqdm(desc=file.path, unit="B", unit_scale=True) as bar:
                for line in _lines(hub, file):
                    out.write(line)
                    bar.update(len(line))
                    records, size = records + 1, size + len(line)
                    if records == max_records or (max_mb and size >= max_mb * 1e6):
                        break
            os.replace(new, target)
        except gzip.BadGzipFile as error:  # which is an OSError
            raise UserError(f"{file.path}: {error}") from None
        except NETWORK as error:
            raise explain(error, file.path, hub) from None
        except DAMAGED as error:
            raise UserError(f"{file.path}: {one_line(error)}") from None
        finally:
            new.unlink(missing_ok=True)
        print(f"{target}: {target.stat().st_size / 1e6:,.1f} MB; a part, so no sum can be checked")
        paths.append(target)
    return paths


def _lines(hub: Hub, file: RemoteFile) -> Iterator[bytes]:
    """The records of a file on the hub as lines of JSON."""
    with io.BufferedReader(hub.stream(file), BLOCK) as stream:
        for _, record in read_records(Path(file.path), open_decompressed(stream), ReadOptions()):
            if isinstance(record, BadRecord):
                continue  # which the command that prepares the part would skip too
            if isinstance(record, bytes):
                yield record.rstrip(b"\n") + b"\n"
            else:
                yield (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
