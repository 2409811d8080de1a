"""Models by name, from a server on this machine that speaks as both hubs do."""

import json
from pathlib import Path

import pytest
from helpers import TOKENIZER
from test_fetch import hub  # noqa: F401  a fixture

from base.cli import UserError
from corpus.hub import model_folder
from model.checkpoint import load_model, save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM


@pytest.fixture(params=["hf", "ms"])
def prefix(request):
    return f"{request.param}:" if request.param == "ms" else ""


@pytest.fixture
def models(hub, tmp_path, monkeypatch):  # noqa: F811
    """A hub with one model, some/small."""
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    save_model(tmp_path / "saved", CausalLM(LMConfig(**PRESETS["tiny"])), TOKENIZER)
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    hub.files |= {"pytorch_model.bin": b"pickle", "modeling_small.py": b"code", "onnx/model.safetensors": b"no"}
    return hub


def test_a_model_is_fetched_once_and_its_size_and_licence_are_said_first(models, prefix, capsys, tmp_path):
    folder = model_folder(Path(f"{prefix}some/small"))
    load_model(folder)
    said = capsys.readouterr().out
    size = sum(len(data) for name, data in models.files.items() if "_" not in name or name.endswith("json")) / 1e6
    assert "licence apache-2.0" in said
    assert f"{size:,.1f} MB" in said
    asked = [name for name, _ in models.asked]
    assert not {"pytorch_model.bin", "modeling_small.py", "onnx/model.safetensors"} & {*asked}
    assert asked[0] == "config.json"
    assert model_folder(Path(f"{prefix}some/small")) == folder
    assert [name for name, _ in models.asked] == asked
    assert not capsys.readouterr().out


def test_a_tokenizer_is_fetched_without_the_weights(models, prefix):
    folder = model_folder(Path(f"{prefix}some/small"), weights=False)
    assert (folder / "tokenizer.json").read_bytes() == models.files["tokenizer.json"]
    assert "model.safetensors" not in [name for name, _ in models.asked]


def test_without_a_network_the_cache_is_used_or_a_line_says_what_to_do(models, prefix, monkeypatch):
    def cut():
        for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")

    folder = model_folder(Path(f"{prefix}some/small"))
    cut()
    assert model_folder(Path(f"{prefix}some/small")) == folder
    with pytest.raises(UserError, match=r"give the folder of a copy, another (HF|MODELSCOPE)_ENDPOINT") as error:
        model_folder(Path(f"{prefix}other/small"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config.json": b'{"model_type": "mamba"}'}, "mamba"),
        ({"config.json": b"{"}, "config.json"),
        ({"model.safetensors": None}, "no model.safetensors"),
    ],
    ids=["architecture", "damaged", "pickles"],
)
def test_what_cannot_be_used_is_refused_before_the_weights_are_fetched(models, prefix, changes, named):
    models.files = {name: data for name, data in (models.files | changes).items() if data is not None}
    with pytest.raises(UserError, match=named) as error:
        model_folder(Path(f"{prefix}some/small"))
    assert "\n" not in str(error.value)
    assert "model.safetensors" not in [name for name, _ in models.asked]


def test_a_model_that_is_not_there_or_gated_is_named(models, prefix):
    with pytest.raises(UserError, match="some/missing: is not there"):
        model_folder(Path(f"{prefix}some/missing"))
    models.gated = True
    with pytest.raises(UserError, match="agree on"):
        model_folder(Path(f"{prefix}some/small"))


def test_folders_are_no_names(models, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("out/sft", "mine/sft", "saved", "a/b/c", str(tmp_path / "saved")):
        assert model_folder(Path(name)) == Path(name)
    assert model_folder(None) is None
    assert not models.asked


def test_files_that_lead_elsewhere_are_not_fetched(models, prefix, tmp_path):
    models.files["../config.json"] = json.dumps({}).encode()
    model_folder(Path(f"{prefix}some/small"))
    assert "../config.json" not in [name for name, _ in models.asked]
