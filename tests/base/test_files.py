"""Files are written whole or not at all."""

from pathlib import Path

import pytest
from helpers import snapshot

from base.cli import UserError
from base.files import finish_replacing, read_json, replace_directory, replacing_directory, write_file, write_json


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(OSError, match=r"cannot write .*a\.json"):
        write_file(tmp_path / "a.json", lambda path: path.write_text("ne") and (path / "b").open())
    assert snapshot(tmp_path) == {Path("a.json"): b"old"}


def test_a_directory_takes_the_place_of_another_or_leaves_it(tmp_path):
    target = tmp_path / "out"
    for content in ("one", "two"):
        with replacing_directory(target) as new:
            (new / "file").write_text(content)
        assert snapshot(tmp_path) == {Path("out/file"): content.encode()}
    with pytest.raises(FileNotFoundError), replacing_directory(target) as new:
        (new / "nowhere" / "file").write_text("three")
    assert snapshot(tmp_path) == {Path("out/file"): b"two"}


def test_the_directory_before_is_kept_where_that_is_asked_for(tmp_path):
    for content in ("one", "two", "three"):
        written = tmp_path / "written"
        written.mkdir()
        (written / "file").write_text(content)
        replace_directory(tmp_path / "out", written, keep_old=True)
    assert snapshot(tmp_path) == {Path("out/file"): b"three", Path("out.old/file"): b"two"}


def test_the_second_of_two_renames_is_made_by_the_next_reader(tmp_path):
    (tmp_path / ".out.new").mkdir()
    (tmp_path / "out.new").mkdir()  # somebody's own
    finish_replacing(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.new"]


def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out: cannot be written"), replacing_directory(tmp_path / "file/out"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, "\xff"])
def test_json_that_is_no_object_is_named(content, tmp_path):
    (tmp_path / "a.json").write_text(content, "latin-1")
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json")


def test_json_takes_what_has_no_utf_8(tmp_path):
    write_json(tmp_path / "a.json", {"sample": "half a pair: \ud800"})
    assert read_json(tmp_path / "a.json") == {"sample": "half a pair: \ud800"}
