"""The last line of a preparing command: data against the model, and a validation split that is too small."""

import json
from pathlib import Path

import pytest

import data_process
from corpus.enough import is_it_enough, parameters_of
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM


@pytest.mark.parametrize("preset", ["tiny", "mini", "small"])
def test_the_parameters_of_a_preset_are_those_of_the_model(preset):
    assert parameters_of(preset, 6400) == CausalLM(LMConfig(**PRESETS[preset])).num_parameters()


def counts(train: int, val: int, tokens: int = 0) -> dict:
    return {"train": {"documents": train, "tokens": tokens}, "val": {"documents": val, "tokens": 0}}


def test_tokens_are_related_to_parameters():
    line = is_it_enough("pretrain", counts(10_000, 300, 600_000_000), 1, 6400)
    assert "23.2 per parameter of the preset small (25,830,912): enough; 300 for validation" in line
    line = is_it_enough("pretrain", counts(10_000, 300, 30_000_000), 1, 6400)
    assert "1.16 per parameter" in line
    assert "--preset tiny has 20" in line
    assert "too few for any preset" in is_it_enough("pretrain", counts(10, 1, 1000), 1, 6400)


def test_few_chats_and_a_small_validation_split_are_named_with_the_fix():
    assert "85 chats are few (85 were memorized" in is_it_enough("sft", counts(85, 100), 1, 6400)
    assert "few (" not in is_it_enough("sft", counts(5000, 100), 1, 6400)
    assert "1,000 pairs; validation on 50" in is_it_enough("dpo", counts(2000, 100), 2, 6400)
    assert "too few to trust: give --val_fraction 0.059, or a file" in is_it_enough("sft", counts(5000, 50), 1, 6400)
    assert "on 4 is too few to trust: give --val_fraction 0.2, or a file" in is_it_enough(
        "sft", counts(396, 4), 1, 6400
    )
    assert "nothing is left for validation" in is_it_enough("sft", counts(1, 0), 1, 6400)


def test_the_line_is_the_last_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"问{i}", "completion": f"答{i}"}) for i in range(400)]
    Path("a.jsonl").write_text("\n".join(lines))
    tokenizer = Path(data_process.__file__).parent / "model/tokenizer"
    data_process.main(["sft", "a.jsonl", "--output", "out", "--workers", "1", "--tokenizer", str(tokenizer)])
    last = capsys.readouterr().out.splitlines()[-2]  # before the next command
    assert last.startswith("is it enough? 39")
    assert "is too few to trust" in last
