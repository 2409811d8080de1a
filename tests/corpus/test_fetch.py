"""data_process.py list and fetch, from a server on this machine that speaks as both hubs do, and fails as they do."""

import gzip
import hashlib
import io
import json
import logging
import re
import tarfile
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

import data_process
from base import cli
from corpus import fetch
from corpus.kinds import KINDS

ROOT = Path(data_process.__file__).parent
LINES = b"".join(json.dumps({"text": f"第 {i} 篇：" + "春眠不觉晓。" * (i % 7)}).encode() + b"\n" for i in range(3000))


class Hub(ThreadingHTTPServer):
    """What it serves, how it shall fail, and what it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"a.jsonl": LINES, "README.md": b"# read me"}
        self.sums = {}  # wrong ones, by name
        self.cuts = 0  # so many answers end in their middle
        self.busy = 0  # so many are 429
        self.gated = self.ranges = False
        card = {"id": "some/small", "modelId": "some/small", "cardData": {"license": "apache-2.0"}}  # of a model
        self.card = card | {"Data": {"License": "apache-2.0"}}
        self.asked: list[tuple[str, str | None]] = []  # of contents: name, range

    def sum_of(self, name: str) -> str:
        return self.sums.get(name) or hashlib.sha256(self.files[name]).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub, url = self.server, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if "missing" in url.path:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif re.fullmatch("/api/(v1/)?models/[^/]+/[^/]+", url.path):
            self.answer(200, json.dumps(hub.card).encode(), Content_Type="application/json")
        elif url.path.startswith(("/api/datasets/", "/api/models/")):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                | {"lfs": {"oid": hub.sum_of(name), "size": len(data), "pointerSize": 100}}
                for name, data in hub.files.items()
            ]
            self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
        elif url.path.endswith(("/datasets/some/set/repo/tree", "/models/some/small/repo/files")):
            listing = [{"Type": "tree", "Path": "deep"}] + [
                {"Type": "blob", "Path": name, "Size": len(data), "Sha256": hub.sum_of(name)}
                for name, data in hub.files.items()
            ]
            page, size = int(query["PageNumber"]) - 1, int(query["PageSize"])
            body = {"Code": 200, "Data": {"Files": listing[page * size : (page + 1) * size]}}
            self.answer(200, json.dumps(body).encode())
        else:
            self.content(query.get("FilePath") or unquote(url.path.partition("/resolve/main/")[2]))

    do_HEAD = do_GET

    def content(self, name: str):
        hub, data, asked = self.server, self.server.files[name], self.headers.get("Range")
        if hub.gated and self.headers.get("Authorization") != "Bearer hf_right":
            self.answer(403, b"{}", X_Error_Code="GatedRepo")
            return
        if self.command == "GET":
            hub.asked.append((name, asked))
        if hub.busy:
            hub.busy -= 1
            self.answer(429, b"slowly", Retry_After="0")
            return
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and not hub.ranges else 0
        headers = {"ETag": f'"{hub.sum_of(name)}"', "X_Repo_Commit": "f" * 40, "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if hub.cuts and self.command == "GET":
            hub.cuts -= 1
            self.close_connection = True
            body = body[: len(body) // 2]
        self.answer(206 if start else 200, body, len(data) - start, **headers)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in dict(HF_ENDPOINT=address, MODELSCOPE_ENDPOINT=address, NO_PROXY="*", LANG="C").items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**14)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [])  # it holds another test's stderr
    entry = dict(stage="pretrain", hf="some/set", ms="some/set", revision=None, files=["*.jsonl"], flags=[])
    entry |= dict(licence="MIT", mb=1, seen=None, en="Good for tests.", zh="供测试用。")
    catalogue = [entry | {"name": "set"}, entry | {"name": "gone", "hf": "some/missing", "ms": "some/missing"}]
    catalogue += [entry | {"name": "exam", "stage": "exam", "files": ["*.zip"]}]
    catalogue += [entry | {"name": "tar", "files": ["*.tar.bz2"]}]
    (tmp_path / "catalogue.json").write_text(json.dumps(catalogue))
    monkeypatch.setattr(fetch, "CATALOGUE", tmp_path / "catalogue.json")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def run(*words, status=0):
    got = 0
    try:
        cli.run(lambda: data_process.main([*map(str, words)]))
    except SystemExit as leave:
        got = leave.code
    assert got == status


@pytest.fixture(params=["hf", "ms"])
def which(request):
    return request.param


def test_a_set_is_fetched_with_what_is_known_of_it_said_first(hub, which, capsys):
    run("fetch", "set", "--hub", which)
    out = capsys.readouterr().out
    assert Path("data/set/a.jsonl").read_bytes() == LINES
    assert [path.name for path in Path("data/set").iterdir()] == ["a.jsonl"]
    told = ["MIT", "never tried by us", "Good for tests.", "1 files, ", "SHA-256 as the hub tells", "next: "]
    places = [out.index(words) for words in told]
    assert places == sorted(places)
    assert "data_process.py pretrain data/set/a.jsonl" in out.replace("\\", "/")
    run("fetch", "set", "--hub", which)  # again: nothing to do
    assert "there already" in capsys.readouterr().out
    assert len(hub.asked) == 1


def test_the_cache_of_hugging_face_is_used(hub):
    run("fetch", "set")
    run("fetch", "set", "--output", "elsewhere")
    assert Path("elsewhere/set/a.jsonl").read_bytes() == LINES
    assert len(hub.asked) == 1


def test_after_a_cut_it_goes_on_where_it_was(hub, which):
    hub.cuts = 2
    run("fetch", "set", "--hub", which)
    assert Path("data/set/a.jsonl").read_bytes() == LINES
    starts = [int((asked or "bytes=0-")[6:-1]) for _, asked in hub.asked]
    assert starts == sorted(starts)
    assert len(LINES) // 2 < starts[2] < len(LINES)


def test_after_a_stop_the_next_run_goes_on(hub, monkeypatch):
    """And a server that sends all, though a part was asked for, does no harm."""
    monkeypatch.setattr(fetch, "TRIES", 1)
    hub.cuts = 1
    run("fetch", "set", "--hub", "ms", status=1)
    half = Path("data/set/a.jsonl.part").stat().st_size
    assert 0 < half < len(LINES)
    hub.ranges = True  # ignored
    run("fetch", "set", "--hub", "ms")
    assert hub.asked[-1][1] == f"bytes={half}-"
    assert Path("data/set/a.jsonl").read_bytes() == LINES
    assert not Path("data/set/a.jsonl.part").exists()


def test_a_busy_hub_is_asked_again_and_at_last_named(hub, which, capsys):
    hub.busy = 2
    run("fetch", "set", "--hub", which)
    assert Path("data/set/a.jsonl").read_bytes() == LINES
    hub.files["b.jsonl"], hub.busy = LINES[:999], 1000
    run("fetch", "set", "--hub", which, status=2)
    assert "b.jsonl: is asked for too often: wait some minutes" in capsys.readouterr().err


def test_a_wrong_sum_is_found_and_the_file_deleted(hub, which, capsys):
    hub.sums["a.jsonl"] = "0" * 64
    run("fetch", "set", "--hub", which, status=2)
    assert "a.jsonl: what came has another SHA-256 than the hub tells" in capsys.readouterr().err
    left = [path for folder in ("data", "cache") for path in Path(folder).rglob("*") if path.is_file()]
    assert not [path for path in left if path.stat().st_size >= len(LINES)]
    hub.sums.clear()
    run("fetch", "set", "--hub", which)
    assert Path("data/set/a.jsonl").read_bytes() == LINES


def test_what_is_not_there_is_named_with_its_page(hub, which, capsys):
    run("fetch", "gone", "--hub", which, status=2)
    assert "gone: is not there: it may have moved; see http://127.0.0.1" in capsys.readouterr().err
    hub.files = {"other.txt": b""}
    run("fetch", "set", "--hub", which, status=2)
    assert "set: no file there is called *.jsonl; there is other.txt" in capsys.readouterr().err
    run("fetch", "sets", status=2)
    assert "no data set is called sets: maybe set" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--max_records", 5]])
def test_a_gated_set_says_where_to_agree_and_a_token_opens_it(hub, which, flags, monkeypatch, capsys):
    hub.gated = True
    run("fetch", "set", "--hub", which, *flags, status=2)
    token = {"hf": "HF_TOKEN", "ms": "MODELSCOPE_API_TOKEN"}[which]
    assert f"/datasets/some/set and give a token in {token}" in capsys.readouterr().err
    monkeypatch.setenv(token, "hf_right")
    run("fetch", "set", "--hub", which, *flags)


def test_a_hub_that_cannot_be_reached_is_a_failure_in_one_line(hub, which, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "TRIES", 2)
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    run("fetch", "set", "--hub", which, status=1)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: set could not be fetched from ")


def test_a_full_disk_is_seen_before(hub, which, monkeypatch, capsys):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: fetch.shutil._ntuple_diskusage(9, 9, 9))
    run("fetch", "set", "--hub", which, status=2)
    assert "MB are to come and 0 MB are free: make room" in capsys.readouterr().err
    assert not hub.asked


def test_a_part_is_taken_without_the_rest(hub, which):
    table = pyarrow.table({"text": [f"第 {i} 行" for i in range(50_000)]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=100)
    hub.files |= {"b.parquet": buffer.getvalue(), "c.jsonl.gz": gzip.compress(LINES)}
    hub.cuts = 1
    hub.files["a.jsonl"] = LINES * 100
    run("fetch", "set", "--hub", which, "--max_records", 10)
    assert Path("data/set/a.part.jsonl").read_bytes() == b"".join(LINES.splitlines(True)[:10])
    run("fetch", "set", "--hub", which, "--max_mb", 0.1)
    assert 0.1e6 <= Path("data/set/a.part.jsonl").stat().st_size < 0.101e6
    remote = {"hf": fetch.HuggingFace, "ms": fetch.ModelScope}[which]("some/set", None)
    for name in ("b.parquet", "c.jsonl.gz"):
        [path] = fetch.fetch_part(remote, [file for file in remote.files() if file.path == name], Path("data"), 0, 3)
        wanted = [{"text": f"第 {i} 行"} for i in range(3)] if name == "b.parquet" else json_lines(LINES)[:3]
        assert json_lines(path.read_bytes()) == wanted
    assert max(int(asked[6:-1]) for name, asked in hub.asked if name == "b.parquet") > 0  # the end was read on its own


def json_lines(data: bytes) -> list:
    return [json.loads(line) for line in data.splitlines()]


def test_fetched_and_prepared_in_one(hub, which):
    flags = ["--tokenizer", str(ROOT / "model/tokenizer"), "--workers", "1"]
    fetch.CATALOGUE.write_text(fetch.CATALOGUE.read_text().replace('"flags": []', f'"flags": {json.dumps(flags)}'))
    run("fetch", "set", "--hub", which, "--max_records", 50, "--prepare")
    meta = json.loads(Path("dataset/pretrain/meta.json").read_text("utf-8"))
    assert meta["report"]["records"] == 50


def test_archives_are_unpacked_and_names_that_lead_out_are_refused(hub, which, capsys):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("val/physics_val.csv", "id,question,A,B,C,D,answer\n0,几？,1,2,3,4,A\n")
    hub.files["exam.zip"] = buffer.getvalue()
    run("fetch", "exam", "--hub", which)
    assert Path("data/exam/val/physics_val.csv").exists()
    assert "eval.py --choice data/exam\n" in capsys.readouterr().out.replace("\\", "/")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:bz2") as archive:
        archive.addfile(tarfile.TarInfo("deep/text.jsonl"))
    hub.files["corpus.tar.bz2"] = buffer.getvalue()
    run("fetch", "tar", "--hub", which)
    assert Path("data/tar/deep/text.jsonl").exists()
    assert capsys.readouterr().out.replace("\\", "/").endswith("data_process.py pretrain data/tar\n")
    hub.files["../../evil.jsonl"] = b"{}\n"
    run("fetch", "set", "--hub", which, status=2)
    assert "leads out of data" in capsys.readouterr().err
    assert not list(Path().glob("**/evil.jsonl"))


def test_a_token_is_not_sent_where_the_hub_sends_us(monkeypatch):
    seen = []

    class Elsewhere(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization"), self.headers.get("Range")))
            self.send_response(302 if self.path == "/" else 200)
            if self.path == "/":
                self.send_header("Location", "/store")
            self.send_header("Content-Length", "0" if self.path == "/" else "2")
            self.end_headers()
            self.wfile.write(b"" if self.path == "/" else b"ok")

    monkeypatch.setenv("NO_PROXY", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        assert fetch.RemoteStream(url, {"Authorization": "Bearer secret"}, None).readall() == b"ok"
        server.shutdown()
    assert seen == [("/", "Bearer secret", "bytes=0-"), ("/store", None, "bytes=0-")]


def test_the_catalogue_is_whole():
    catalogue = fetch.read_catalogue()
    assert len(catalogue) >= 15
    assert {entry.stage for entry in catalogue.values()} == set(data_process.STAGES)
    for entry in catalogue.values():
        assert entry.hf or entry.ms
        assert entry.files
        assert entry.licence
        assert any(ord(letter) > 0x2E80 for letter in entry.zh)
        assert entry.en.isascii()
        if entry.stage in KINDS:
            assert data_process.document_settings(data_process.parse_arguments([entry.stage, "x", *entry.flags]))


def test_the_list_says_what_was_never_tried(capsys):
    data_process.main(["list", "--language", "zh"])
    out = capsys.readouterr().out
    for entry in fetch.read_catalogue().values():
        assert entry.name in out
        assert entry.zh in out
    assert out.count("never tried by us") == sum(entry.seen is None for entry in fetch.read_catalogue().values())
