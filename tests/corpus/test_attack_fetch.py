"""An attack on what comes from elsewhere: a hub that lies, files that are made to harm, and what `look` shows of them.

The hub is the one of test_fetch.py; here it says what it is told to. Allowed is a file that lies where it should, or
one line that says what is wrong. Nothing is written outside of data/ and the cache, and memory stays bounded.
"""

import gzip
import io
import json
import sys
import tarfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from test_fetch import LINES, Handler, hub, run, which  # noqa: F401  fixtures

import data_process
from base import cli
from corpus import fetch
from corpus.files import MAX_RECORD

MEMORY = 2**28
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="names, pipes and links of POSIX")


class Liar(Handler):
    """Says what it is told to, and else what the honest one says."""

    def do_GET(self):
        told = self.server.told
        is_listing = self.path.startswith("/api/datasets/") or "/repo/tree?" in self.path
        if is_listing and "listing" in told:
            self.answer(200, told["listing"](self.path), Content_Type="application/json")
        elif not is_listing and "content" in told:
            self.close_connection = True
            for block in told["content"](self.server):
                try:
                    self.wfile.write(block)
                except OSError:  # it has heard enough
                    return
        else:
            super().do_GET()

    do_HEAD = do_GET


@pytest.fixture
def liar(hub, monkeypatch):  # noqa: F811
    hub.RequestHandlerClass = Liar
    hub.told = {}
    hub.handle_error = lambda *_: None  # of a client that has hung up
    monkeypatch.setattr(fetch, "TRIES", 2)
    Path("outside").mkdir()
    return hub


def attempt(capfd, *words) -> str:
    """Runs it; the error, "" where there is none. Asserts what holds for all."""
    before = psutil.Process().memory_info().rss
    capfd.readouterr()
    status = 0
    try:
        cli.run(lambda: data_process.main([*map(str, words)]))
    except SystemExit as leave:
        status = leave.code
    out, err = capfd.readouterr()
    assert status in (0, 1, 2)
    assert "Traceback" not in out + err
    assert psutil.Process().memory_info().rss < before + MEMORY
    assert list(Path("outside").iterdir()) == []
    assert {path.name for path in Path().iterdir()} <= {"data", "cache", "outside", "catalogue.json", "mine"}
    if not status:
        return ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


# ------------------------------------------------------------------------------------------------- what files there are


def both(**fields):
    """A listing of one file, as either hub would say it."""

    def listing(path: str) -> bytes:
        if path.startswith("/api/datasets/"):
            own = {"type": "file", "path": "a.jsonl", "size": len(LINES), "oid": "0" * 40}
            names = {"Path": "path", "Size": "size"}
            own |= {names[name]: value for name, value in fields.items() if name in names}
            if "Sha256" in fields:
                own["lfs"] = {"oid": fields["Sha256"], "size": own["size"], "pointerSize": 100}
            return json.dumps([own]).encode()
        own = {"Type": "blob", "Path": "a.jsonl", "Size": len(LINES)} | fields
        return json.dumps({"Code": 200, "Data": {"Files": [own]}}).encode()

    return listing


def raw(data: bytes):
    return lambda path: data


DEEP = b"[" * 100_000
LISTINGS = {
    **{
        f"the listing {data[:20]!r}": raw(data)
        for data in (b"", b"<html>", b"3", b"null", b'"x"', b"\xff\xfe", b"[3]", b"{}")
    },
    **{
        f"the data {value}": raw(b'{"Data": %s}' % value)
        for value in (b"3", b"[]", b'"x"', b'{"Files": 3}', b'{"Files": [3]}')
    },
    "files that are a text": raw(b'{"Data": {"Files": "abc"}}'),
    "a file without a name": raw(b'{"Data": {"Files": [{"Type": "blob"}]}}'),
    "a deep listing": raw(DEEP),
    **{
        f"the name {name!r}"[:60]: both(Path=name) for name in (None, 3, [], {}, True, "", ".", "/", "..", "a.jsonl/..")
    },
    **{
        f"the name {name!r}"[:60]: both(Path=name)
        for name in ("/etc/a.jsonl", "../outside/a.jsonl", "x/../../../outside/a.jsonl", "../../../../outside/a.jsonl")
    },
    **{
        f"the name {name!r}"[:60]: both(Path=name)
        for name in (
            "\0.jsonl",
            "a\0.jsonl",
            "\ud800.jsonl",
            "a\nb.jsonl",
            "\x1b[2J.jsonl",
            "~/a.jsonl",
            "$HOME.jsonl",
            "-rf.jsonl",
        )
    },
    "a name of 300 letters": both(Path="a" * 300 + ".jsonl"),
    "a name of 9,999 folders": both(Path="a/" * 9999 + "a.jsonl"),
    **{f"the size {size!r}"[:40]: both(Size=size) for size in ("12", "x", [], {}, True, -1, 0.5, 1e300, 2**80, None)},
    **{
        f"the sum {value!r}"[:40]: both(Sha256=value)
        for value in (3, [], "", "x", "0" * 10**5, "../../outside/x", None)
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTINGS)
def test_listings(liar, which, name, capfd):  # noqa: F811
    liar.told["listing"] = LISTINGS[name]
    error = attempt(capfd, "fetch", "set", "--hub", which)
    left = [path for path in Path("data").rglob("*") if path.is_file() and path.suffix == ".jsonl"]
    assert error or left
    assert all(path.read_bytes() == LINES for path in left)


def test_a_listing_without_end(liar, which, capfd):  # noqa: F811
    """A hub that gives a full first page whatever page is asked for."""
    page = [{"Type": "blob", "Path": f"{i}.jsonl", "Size": 1} for i in range(100)]
    liar.told["listing"] = raw(json.dumps({"Data": {"Files": page}}).encode())
    assert attempt(capfd, "fetch", "set", "--hub", which)


@LINUX
@pytest.mark.parametrize("name", ["../other/a.jsonl", "../../outside/a.jsonl", "link/a.jsonl", "link/../a.jsonl"])
def test_no_name_reaches_a_file_of_another_set_by_a_link(liar, which, name, capfd):  # noqa: F811
    """The files of a set are links into the cache, and those of another set too."""
    Path("mine").mkdir()
    Path("mine/precious").write_text("precious")
    Path("data/set").mkdir(parents=True)
    Path("data/other").mkdir(parents=True)
    Path("data/other/a.jsonl").symlink_to(Path("mine/precious").absolute())
    Path("data/set/link").symlink_to(Path("mine").absolute())
    liar.told["listing"] = both(Path=name)
    assert "leads out of" in attempt(capfd, "fetch", "set", "--hub", which)
    assert Path("mine/precious").read_text() == Path("data/other/a.jsonl").read_text() == "precious"
    assert [path.name for path in Path("mine").iterdir()] == ["precious"]


# ------------------------------------------------------------------------------------------------ what files come as


def head(status: str = "200 OK", **headers) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def says(*blocks: bytes):
    return lambda server: blocks


def to(place: str):
    return says(head("302 Found", Location=place, Content_Length=0))


N = len(LINES)
CONTENTS = {
    "nothing": says(),
    "bytes": says(b"\xff\xfe\0" * 1000),
    "a status of letters": says(b"HTTP/1.1 OK\r\n\r\n"),
    "the status 999": says(head("999 x", Content_Length=0)),
    "the status 206 of another part": says(
        head("206 Partial", Content_Range=f"bytes 5-{N}/{N}", Content_Length=N - 5), LINES[5:]
    ),
    "the status 204": says(head("204 No Content")),
    "the status 304": says(head("304 Not Modified")),
    "the status 416": says(head("416 Range", Content_Length=0)),
    "100, again and again": says(head("100 Continue") * 10_000),
    "too little": says(head(Content_Length=N), LINES[: N // 2]),
    "too much": says(head(Content_Length=N * 2), LINES, LINES),
    "much too much": lambda server: (head(), *([bytes(2**20)] * 600)),
    "another file": says(head(Content_Length=N), LINES[::-1]),
    "a page": says(head(Content_Length=6, Content_Type="text/html"), b"<html>"),
    "gzip by its header": says(
        head(Content_Length=len(gzip.compress(LINES)), Content_Encoding="gzip"), gzip.compress(LINES)
    ),
    "a bomb by its header": lambda server: (head(Content_Encoding="gzip"), *([gzip.compress(bytes(2**26))] * 40)),
    "chunks that are none": says(head(Transfer_Encoding="chunked"), b"zz\r\n" + LINES),
    "chunks without end": says(head(Transfer_Encoding="chunked"), b"ffffffffffff\r\n" + LINES),
    "a length of 5,000 digits": says(head(Content_Length="9" * 5000), LINES),
    "a length of -1": says(head(Content_Length=-1), LINES),
    "a length of ²": says(head(Content_Length="²"), LINES),
    "a range of ²": says(head("206 Partial", Content_Range="bytes 0-1/²"), LINES),
    "a range of 5,000 digits": says(head("206 Partial", Content_Range="bytes 0-1/" + "9" * 5000), LINES),
    "a range of nothing": says(head("206 Partial", Content_Range="bytes */*"), LINES),
    "a header of a megabyte": says(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**20 + b"\r\n\r\n", LINES),
    "10,000 headers": says(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", LINES),
    "headers without end": lambda server: (b"HTTP/1.1 200 OK\r\n", *([b"X: y\r\n" * 1000] * 1000)),
    "a header that is none": says(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", LINES),
    **{
        f"wait {value!r}"[:30]: says(head("429 Slowly", Retry_After=value, Content_Length=0))
        for value in ("²", "-1", "9" * 5000, "x", "Wed, 21 Oct 2099 07:28:00 GMT", "1e9", "nan", "")
    },
    **{
        f"go to {place!r}"[:50]: to(place)
        for place in (
            "file:///etc/passwd",
            "ftp://127.0.0.1:9/x",
            "data:,x",
            "",
            "http://",
            "http://[",
            "http://127.0.0.1:9/",
            "//",
            "\x01",
        )
    },
    "go to a very long place": to("http://127.0.0.1:9/" + "a" * 60_000),
    "in circles": lambda server: [
        head("302 Found", Location=f"http://127.0.0.1:{server.server_port}/x", Content_Length=0)
    ],
    "always further": lambda server: [
        head("302 Found", Location=f"http://127.0.0.1:{server.server_port}/{time.perf_counter_ns()}", Content_Length=0)
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTENTS)
def test_contents(liar, which, name, capfd):  # noqa: F811
    liar.told["content"] = CONTENTS[name]
    error = attempt(capfd, "fetch", "set", "--hub", which)
    path = Path("data/set/a.jsonl")
    assert error or path.read_bytes() == LINES
    assert not path.exists() or path.read_bytes() == LINES
    liar.told.clear()  # and the honest one is fetched after it; where a wrong beginning was left, that goes first
    again = attempt(capfd, "fetch", "set", "--hub", which)
    assert not again or ("fetch it again" in again and not attempt(capfd, "fetch", "set", "--hub", which))
    assert path.read_bytes() == LINES


@pytest.mark.parametrize("sum_told", [True, False], ids=["with a sum", "without"])
@pytest.mark.parametrize("left", [b"x" * 9, b"x" * N, b"x" * (N + 9), LINES[:-9], LINES, LINES + b"x"], ids=range(6))
def test_what_an_earlier_run_has_left_is_gone_on_with_only_where_it_is_the_beginning(liar, left, sum_told, capfd):
    Path("data/set").mkdir(parents=True)
    Path("data/set/a.jsonl.part").write_bytes(left)
    if not sum_told:
        liar.told["listing"] = both(Sha256=None)
    error = attempt(capfd, "fetch", "set", "--hub", "ms")
    if sum_told or len(left) > N:
        assert bool(error) == (not LINES.startswith(left))
        if error:
            assert not attempt(capfd, "fetch", "set", "--hub", "ms"), "it is not mended by itself"
        assert Path("data/set/a.jsonl").read_bytes() == LINES
    else:
        assert Path("data/set/a.jsonl").stat().st_size == N  # no more can be known


@LINUX
def test_a_disk_that_is_full_is_one_line_and_no_file(liar, which, capfd, monkeypatch):  # noqa: F811
    import resource

    liar.files["a.jsonl"] = LINES * 20
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys.modules["signal"], "SIGXFSZ", 25, raising=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        error = attempt(capfd, "fetch", "set", "--hub", which)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in error
    assert not Path("data/set/a.jsonl").exists()


# --------------------------------------------------------------------------------------------- parts, and archives


def table(**columns) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


ZIPPED = gzip.compress(LINES)
PARTS = {
    "x.jsonl.gz": {
        "cut": ZIPPED[: len(ZIPPED) // 2],
        "without its end": ZIPPED[:-8],
        "damaged": ZIPPED[:200] + bytes(50) + ZIPPED[250:],
        "a wrong sum": ZIPPED[:-8] + bytes(8),
        "not gzip": LINES,
        "empty": b"",
        "a line without end": 70 * gzip.compress(b"x" * 2**20),
        "of gzip": gzip.compress(ZIPPED),
        "more behind": ZIPPED + b"garbage",
    },
    "x.jsonl": {
        "NUL": bytes(1000),
        "bytes": b"\xff\xfe\n" * 9,
        "UTF-16": LINES.decode().encode("utf-16"),
        "empty": b"",
        "blank": b"\n" * 9999,
        "escapes": b'{"text": "\x1b[2J"}\n',
        "deep": b'{"text": ' + DEEP + b"}\n",
    },
    "x.json": {
        "deep": DEEP,
        "open": b"[1, 2",
        "more": b"[1] 2",
        "one": b'{"text": "x"}',
        "numbers": b"[1,2,3]",
        "commas": b"[,,,,1,,]",
        "a digit bomb": b"[" + b"9" * 5000 + b"]",
        "NaN": b"[NaN, Infinity]",
    },
    "x.csv": {
        "NUL": b"text\na\0b\n",
        "open quote": b'text\n"a\nb\n',
        "no rows": b"text\n",
        "many columns": b"," * 10**5 + b"\n" + b"," * 10**5,
        "bytes": b"text\n\xff\xfe\n",
        "two of a name": b"text,text\n1,2\n",
        "more than there are": b"text\n1,2,3\n",
        "old line ends": b"text\ra\rb\r",
    },
    "x.parquet": {
        "bytes": b"PAR1" + bytes(99) + b"PAR1",
        "cut": table(text=["a"] * 999)[:-9],
        "empty": b"",
        "a footer of 2 GiB": b"PAR1" + b"\xff\xff\xff\x7fPAR1",
        "bytes in it": table(text=[b"\xff\xfe"]),
        "dates": table(text=pyarrow.array([2**62], pyarrow.timestamp("ns"))),
        "a date of the year 292,277": table(text=pyarrow.array([2**53], pyarrow.timestamp("ms"))),
        "numbers": table(text=[float("nan"), 1e308]),
        "lists": table(text=[[["a"]], None]),
        "no columns": table(),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in PARTS for kind in PARTS[name]])
def test_parts(liar, which, name, kind, capfd, monkeypatch):  # noqa: F811
    monkeypatch.setattr("corpus.files.MAX_RECORD", MAX_RECORD // 16)
    catalogue = json.loads(fetch.CATALOGUE.read_text())
    fetch.CATALOGUE.write_text(json.dumps([entry | {"files": ["x.*"]} for entry in catalogue]))
    liar.files[name] = PARTS[name][kind]
    error = attempt(capfd, "fetch", "set", "--hub", which, "--max_records", 10_000)
    left = [path.name for path in Path("data").rglob("*") if path.is_file()]
    assert left == ([] if error else ["x.part.jsonl"])
    if not error:
        attempt(capfd, "look", "data/set/x.part.jsonl")


def archive(write) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        write(file)
    return buffer.getvalue()


def tarred(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:bz2") as file:
        for member in members:
            file.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, size, 0o7777
    return info


def link_of_zip(file):
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    file.writestr(info, "../../outside")
    file.writestr("link/x", "x")


def marked(data: bytes, flag: int = 0, method: int | None = None) -> bytes:
    """The first file of a zip, encrypted by its flag, or compressed in a way that nobody knows."""
    changed = bytearray(data)
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = changed.index(mark) + place
        changed[start] |= flag
        if method is not None:
            changed[start + 2] = method
    return bytes(changed)


GOOD = archive(lambda file: file.writestr("val/a.csv", "x" * 999))
ARCHIVES = {
    "exam": {
        **{
            f"zip {name!r}"[:40]: archive(lambda file, name=name: file.writestr(name, "x"))
            for name in (
                "../../outside/x",
                "/tmp/../outside/x",
                "a/../../../outside/x",
                "..\\..\\outside\\x",
                "a\nb",
                "\x1b[2J",
                "a" * 300,
                "con",
                ".",
            )
        },
        "zip a link": archive(link_of_zip),
        "zip cut": GOOD[:-30],
        "zip without a beginning": GOOD[20:],
        "zip a wrong sum": GOOD[:35] + b"\xff\xff" + GOOD[37:],
        "zip encrypted": marked(GOOD, flag=1),
        "zip another method": marked(GOOD, method=99),
        "zip no zip": b"x" * 999,
        "zip empty": b"",
        "zip a bomb": archive(lambda file: [file.writestr(f"{i}", bytes(2**26)) for i in range(3)]),
        "zip a file and a folder": archive(lambda file: [file.writestr("a", "x"), file.writestr("a/b", "x")]),
        "zip itself": archive(lambda file: file.writestr("exam.zip", "x")),
    },
    "tar": {
        **{
            f"tar {name!r}": tarred(member(name, size=1))
            for name in ("../../outside/x", "/outside/x", "a/../../../outside/x", ".", "a\nb")
        },
        "tar a link": tarred(member("link", tarfile.SYMTYPE, "../../outside"), member("link/x", size=1)),
        "tar a link to all": tarred(member("link", tarfile.SYMTYPE, "/"), member("link/etc/x", size=1)),
        "tar a hard link": tarred(member("link", tarfile.LNKTYPE, "../../outside/x")),
        "tar a link in two steps": tarred(
            member("a", tarfile.SYMTYPE, "."), member("b", tarfile.SYMTYPE, "a/../../../outside"), member("b/x", size=1)
        ),
        "tar a device": tarred(member("zero", tarfile.CHRTYPE)),
        "tar a pipe": tarred(member("text.jsonl", tarfile.FIFOTYPE)),
        "tar cut": tarred(member("a.jsonl", size=10**5))[:-20],
        "tar no tar": b"x" * 999,
        "tar empty": b"",
        "tar a size of 2^40": tarred(member("a.jsonl", size=9)).replace(b"x", b"y"),
        "tar damaged": (lambda data: data[:40] + bytes(9) + data[49:])(tarred(member("a.jsonl", size=10**5))),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "name"), [(entry, name) for entry in ARCHIVES for name in ARCHIVES[entry]])
def test_archives(liar, entry, name, capfd):
    liar.files = {{"exam": "exam.zip", "tar": "corpus.tar.bz2"}[entry]: ARCHIVES[entry][name]}
    attempt(capfd, "fetch", entry, "--hub", "ms")
    for path in Path("data").rglob("*"):
        assert path.is_file() or path.is_dir(), path
        assert path.resolve().is_relative_to(Path("data").resolve()), path
        assert not path.stat().st_mode & 0o7000


def test_an_archive_that_is_larger_than_the_disk_is_refused(liar, capfd, monkeypatch):
    liar.files = {"exam.zip": ARCHIVES["exam"]["zip a bomb"]}
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: fetch.shutil._ntuple_diskusage(10**9, 0, 10**8))
    assert "make room" in attempt(capfd, "fetch", "exam", "--hub", "ms")
    assert [path.name for path in Path("data/exam").iterdir()] == ["exam.zip"]


# ---------------------------------------------------------------------------------------------------------------- look

SHOWN = {
    "colours": "\x1b[31m红\x1b[0m",
    "a title": "\x1b]0;owned\x07",
    "a screen that is wiped": "\x1b[2J\x1b[H",
    "8-bit codes": "\x9b2J",
    "backspaces": "safe\b\b\b\bevil",
    "a carriage return": "safe\revil",
    "letters from the right": "\u202egnp.exe",
    "NUL and DEL": "a\0b\x7f",
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown_of_a_stranger_file_cannot_steer_the_terminal(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    text = SHOWN[name] + "，山上的花开了，小河里的水慢慢地流，没有人回答。"
    records = {
        "text.jsonl": {"text": text},
        "chat.jsonl": {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]},
        "bad.jsonl": {"text": text, "messages": 3, SHOWN[name]: 1},
        "exam.jsonl": {"question": text, "A": text, "B": text, "answer": "A"},
    }
    for file, record in records.items():
        Path(file).write_text((json.dumps(record) + "\n" + json.dumps({"x": text}) + "\n") * 9, "utf-8")
        with suppress(SystemExit):
            cli.run(lambda file=file: data_process.main(["look", file]))
        out, err = capfd.readouterr()
        assert out
        assert not [letter for letter in out + err if not letter.isprintable() and letter not in "\n\t"], file
