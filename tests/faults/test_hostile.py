"""Files that are made to harm: nothing in them is run, none takes more memory than a file of its kind may, or waits.

All are read in one process whose memory is limited, so that one that builds what it is told to build fails the test.
"""

import gzip
import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL_CONFIG, TOKENIZER, Processes, make_documents, write_data

import data_process
from base.cli import UserError
from corpus.exams import read_exam
from corpus.prepared import Prepared
from engine.session import GenerationConfig, Session
from model.chat import load_tokenizer
from model.checkpoint import load_adapter, load_model, save_model
from model.lora import apply_lora
from model.model import CausalLM
from training.log import read_metrics

MEMORY = 2**30  # bytes that reading may take beside what the process has when it begins

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs a limit for memory, pipes and devices"),
]


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def make_world(folder: Path):
    """A model, an adapter for it and prepared data, to be copied and spoilt."""
    torch.manual_seed(0)
    model = CausalLM(SMALL_CONFIG)
    save_model(folder / "model", model, TOKENIZER)
    apply_lora(model, 2, targets=["q_proj"])
    save_model(folder / "adapter", model, TOKENIZER, folder / "model")
    (folder / "adapter" / "metrics.jsonl").write_text('{"step": 1, "tokens": 2}\n')
    documents = make_documents("sft", 8, seed=0)
    write_data(folder / "data", documents[2:], documents[:2], "sft")
    for name in ("model", "adapter"):
        (folder / name / "sums.json").unlink()  # what a stranger sends has the sums that suit him


def read_model(world: Path):
    model, tokenizer = load_model(world / "model"), load_tokenizer(world / "model")
    model.stop_token_ids = [2, 4]
    return Session(model, tokenizer, GenerationConfig(max_new_tokens=4)).prompt_ids(
        [{"role": "user", "content": "春天 <unk>"}]
    )


def read_adapter(world: Path):
    load_adapter(load_model(world / "model"), world / "adapter", world / "model")


def read_data(world: Path):
    for split in ("train", "val"):
        load_tokenizer(Prepared(world / "data", split).tokenizer_dir)


def prepare(path: Path, output: Path):
    flags = ["--output", str(output), "--workers", "1", "--tokenizer", str(TOKENIZER)]
    data_process.main(["pretrain", str(path), *flags])


def read_corpus(world: Path):
    """The only file named corpus.*, as data_process.py reads it; bad lines are counted, and too many are refused."""
    for path in world.glob("corpus.*"):
        prepare(path, world / "out")


def change_json(name: str, **changes):
    def change(world: Path):
        content = json.loads((world / name).read_text("utf-8"))
        (world / name).write_text(json.dumps(content | changes), "utf-8")

    return change


def put(name: str, content: bytes):
    return lambda world: (world / name).write_bytes(content)


def pickled(name: str):
    return lambda world: (world / name).write_bytes(pickle.dumps(Payload(world / "pwned")))


def special(name: str, make):
    """A pipe, a device or a link in the place of a file."""

    def change(world: Path):
        (world / name).unlink(missing_ok=True)
        make(world / name)

    return change


def make_circle(folder: Path):
    folder.mkdir()
    (folder / "again").symlink_to(folder)
    text = "春天来了，山上的花开了，小河里的水慢慢地流。"
    (folder / "a.jsonl").write_text(json.dumps({"text": text}), "utf-8")


def huge_ids(world: Path):
    path = world / "model/tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["vocab"]["芥子芥子"] = 4_000_000_000
    path.write_text(json.dumps(content), "utf-8")


def tokens_of(name: str, **changes):
    """tokenizer.json asks for something when it encodes."""
    return change_json(name, **changes)


def tensors(header: dict, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def bomb(begin: bytes, byte: bytes) -> bytes:
    """1 GiB of a byte after some others, gzipped: parts that follow each other are one file."""
    return gzip.compress(begin) + 64 * gzip.compress(byte * 2**24)


DEEP = b"[" * 200_000
PADDING = {
    "strategy": {"Fixed": 10**9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
}
PADDING |= {"pad_token": "<unk>"}
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
ESCAPE = b"{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__['os'].mkdir('pwned') }}"
DATA = ["meta.json", "train.bin", "train.idx", "train.mask", "val.bin", "val.idx", "val.mask", "token_bytes.bin"]

REFUSED = {  # name: (what is done to the world, who reads it)
    "a pickled model": (pickled("model/model.safetensors"), read_model),
    "a pickled config": (pickled("model/config.json"), read_model),
    "a pickled generation config": (pickled("model/generation_config.json"), read_model),
    "a pickled tokenizer": (pickled("model/tokenizer.json"), read_model),
    "pickled sums": (pickled("model/sums.json"), read_model),
    "a pickled adapter": (pickled("adapter/adapter_model.safetensors"), read_adapter),
    "a pickled adapter config": (pickled("adapter/adapter_config.json"), read_adapter),
    **{f"pickled {name}": (pickled(f"data/{name}"), read_data) for name in DATA},
    "a pickled tokenizer of data": (pickled("data/tokenizer/tokenizer.json"), read_data),
    **{
        f"a pickled corpus.{kind}": (pickled(f"corpus.{kind}"), read_corpus)
        for kind in ("jsonl", "json", "csv", "parquet")
    },
    **{
        f"a pickled exam.{kind}": (pickled(f"exam.{kind}"), lambda world, kind=kind: read_exam(world / f"exam.{kind}"))
        for kind in ("csv", "zip")
    },
    "10^9 layers": (change_json("model/config.json", num_hidden_layers=10**9), read_model),
    "1000 layers of weights that are not there": (change_json("model/config.json", num_hidden_layers=1000), read_model),
    "a vocabulary of 10^12": (change_json("model/config.json", vocab_size=10**12), read_model),
    "a layer of 2^62": (change_json("model/config.json", intermediate_size=2**62), read_model),
    "an adapter of rank 10^9": (change_json("adapter/adapter_config.json", r=10**9), read_adapter),
    "a deep config": (put("model/config.json", DEEP), read_model),
    "deep sums": (put("model/sums.json", DEEP), read_model),
    "deep meta": (put("data/meta.json", DEEP), read_data),
    "a deep tokenizer": (put("model/tokenizer.json", DEEP), read_model),
    "a deep line": (put("corpus.jsonl", b'{"text": ' + DEEP + b"\n"), read_corpus),
    "a deep array": (put("corpus.json", DEEP), read_corpus),
    "a tokenizer of 4 * 10^9 ids": (huge_ids, read_model),
    "a header of 2^62 bytes": (put("model/model.safetensors", struct.pack("<Q", 2**62) + b"{}"), read_model),
    "a tensor of 2^60 bytes": (
        put("model/model.safetensors", tensors({"x": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}})),
        read_model,
    ),
    "sums of files elsewhere": (put("model/sums.json", b'{"../../../../etc/passwd": "00"}'), read_model),
    "a line of 1 GiB, gzipped": (put("corpus.jsonl.gz", bomb(b"", b"\0")), read_corpus),
    "an array of 1 GiB, gzipped": (put("corpus.json.gz", bomb(b'["', b"x")), read_corpus),
    "a field of 1 GiB, gzipped": (put("corpus.csv.gz", bomb(b'text\n"', b"x")), read_corpus),
    **{
        f"a pipe for {name}": (special(name, os.mkfifo), read)
        for name, read in {
            **dict.fromkeys(("model/config.json", "model/model.safetensors", "model/tokenizer.json"), read_model),
            **dict.fromkeys(("model/generation_config.json", "model/sums.json"), read_model),
            **dict.fromkeys(("adapter/adapter_config.json", "adapter/adapter_model.safetensors"), read_adapter),
            **dict.fromkeys(("data/meta.json", "data/train.bin", "data/train.mask"), read_data),
        }.items()
    },
    "a device for a corpus": (special("corpus.txt", lambda path: path.symlink_to("/dev/zero")), read_corpus),
    "a device for a model": (
        special("model/model.safetensors", lambda path: path.symlink_to("/dev/zero")),
        read_model,
    ),
    "a device for tokens": (special("data/train.bin", lambda path: path.symlink_to("/dev/zero")), read_data),
    "links in a circle for a model": (special("model/config.json", lambda path: path.symlink_to(path)), read_model),
    "links in a circle for a corpus": (
        special("corpus.txt", lambda path: path.symlink_to(path)),
        lambda world: prepare(world / "corpus.txt", world / "out"),
    ),
}
HARMLESS = {
    "a base model elsewhere": (
        change_json("adapter/adapter_config.json", base_model_name_or_path="../../../../etc/passwd"),
        read_adapter,
    ),
    "a template that escapes": (put("model/chat_template.jinja", ESCAPE), read_model),
    "a tokenizer that pads to 10^9": (tokens_of("model/tokenizer.json", padding=PADDING), read_model),
    "a tokenizer that cuts": (tokens_of("model/tokenizer.json", truncation=TRUNCATION), read_model),
    "a pickled log": (pickled("adapter/metrics.jsonl"), lambda world: read_metrics(world / "adapter")),
    "a pipe for a log": (special("adapter/metrics.jsonl", os.mkfifo), lambda world: read_metrics(world / "adapter")),
    "a folder that holds itself": (
        special("corpus.d", make_circle),
        read_corpus,
    ),
}


def read_all(folder: Path, cases: str):
    """Prints what came of each case, as JSON; in a process with little memory."""
    import resource  # not on Windows

    os.chdir(folder)
    make_world(folder / "world")
    expected = read_model(folder / "world")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    results = {}
    for name, (change, read) in globals()[cases].items():
        world = folder / "spoilt"
        shutil.copytree(folder / "world", world)
        change(world)
        try:
            found = read(world)
            results[name] = "" if found in (None, [], expected) or cases == "REFUSED" else f"read as {found}"
        except UserError as error:
            results[name] = f"refused: {error}"
        except BaseException as error:  # noqa: B036  a MemoryError, a SystemExit: all of it is to be told
            results[name] = f"{type(error).__name__}: {error}"
        if (world / "pwned").exists() or Path("pwned").exists():
            results[name] = "it was run"
        shutil.rmtree(world)
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize("cases", ["REFUSED", "HARMLESS"])
def test_what_is_made_to_harm(cases, tmp_path):
    (result,) = Processes(tmp_path / "logs", read_all, tmp_path, cases).wait()
    assert result.status == 0, result.err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == globals()[cases].keys()
    begins = "refused: " if cases == "REFUSED" else ""
    wrong = {name: text for name, text in results.items() if not text.startswith(begins) or (text and not begins)}
    assert not wrong
    assert not [text for text in results.values() if "\n" in text]
