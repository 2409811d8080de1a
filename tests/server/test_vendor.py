"""The libraries of other people in server/web/vendor/ are those that libraries.json names, unchanged."""

import hashlib
import json

import pytest
from helpers import ROOT

VENDOR = ROOT / "server/web/vendor"
LIBRARIES = json.loads((VENDOR / "libraries.json").read_text("utf-8"))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_is_what_it_is_said_to_be(name):
    library = LIBRARIES[name]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (VENDOR / name).iterdir()}
    assert files == library["sha256"]
    licence = (VENDOR / name / "LICENSE").read_text("utf-8")
    assert {"MIT": "Permission is hereby granted, free of charge", "BSD-3-Clause": "Neither the name of"}[
        library["licence"]
    ] in licence
    version = library["npm"].rpartition("@")[2]
    assert any(version in path.read_text("utf-8", errors="replace") for path in (VENDOR / name).glob("*.*js"))


def test_there_is_no_other_file_and_little_of_it():
    assert {path.name for path in VENDOR.iterdir()} == {*LIBRARIES, "libraries.json"}
    assert sum(path.stat().st_size for path in VENDOR.rglob("*.*")) < 450_000
