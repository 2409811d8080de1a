"""Fifty steps whose losses are known: no change of the code alters training unseen.

Where a near tie of a router falls depends on a CPU's last digit, and an expert's bias on that: with experts a run is
computed in double precision, in which CPUs differ by 1e-14.

Where a change is meant to alter it, `WRITE_GOLDEN=1 python -m pytest tests/training/test_golden.py` writes golden.json
again, and the commit says why.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZER, make_pairs, records, write_data

from model.chat import EOS, IM_END
from model.checkpoint import save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training.machine import TORCH

GOLDEN = Path(__file__).with_name("golden.json")
COMMON = "--max_steps 50 --batch_size 2 --max_seq_len 64 --eval_rows 4 --log_interval 10 --warmup_steps 5 --seed 7"
COMMON += " --epochs 100 --device cpu --learning_rate 2e-3 --min_learning_rate 2e-4"
RUNS = {  # name: script, flags of its own
    "dense": ("1-pretrain.py", "--preset tiny --optimizer muon"),
    "sft": ("2-sft.py", "--optimizer muon --accumulation_steps 2"),
    "lora": ("3-lora.py", "--lora_dropout 0.1"),
    "dpo": ("4-dpo.py", "--max_seq_len 128"),
}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_that_were_stored(name, data, chat_data, run_here, tmp_path):
    script, own = RUNS[name]
    if "dropout" in own and TORCH < (2, 13):
        pytest.skip("an older torch draws other numbers for dropout")
    flags = ["--out_dir", tmp_path / "out", *COMMON.split(), *own.split()]
    if script == "1-pretrain.py":
        flags += ["--data", data]
    else:
        torch.manual_seed(0)
        model = CausalLM(LMConfig(**PRESETS["tiny"]))
        model.stop_token_ids = [EOS, IM_END]
        save_model(tmp_path / "base", model, TOKENIZER)
        pairs = make_pairs(40)
        folder = write_data(tmp_path / "dpo", pairs[16:], pairs[:16], kind="dpo") if name == "dpo" else chat_data
        flags += ["--init_from", tmp_path / "base", "--data", folder]
    result = run_here(script, *flags)
    assert result.status == 0, result.err
    check(name, tmp_path / "out", tolerance=1e-4)


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_losses_with_experts_are_those_that_were_stored(double_precision, data, run_here, tmp_path):
    flags = ["--out_dir", tmp_path / "out", "--data", data, *COMMON.split()]
    result = run_here("1-pretrain.py", *flags, "--preset", "tiny-moe", "--optimizer", "adamw")
    assert result.status == 0, result.err
    check("experts", tmp_path / "out", tolerance=1e-9)


def check(name: str, out_dir: Path, tolerance: float):
    names = ("step", "loss", "val_loss", "grad_norm")
    found = [{key: record[key] for key in names if key in record} for record in records(out_dir)]
    stored = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {}
    if "WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(json.dumps(stored | {name: found}, indent=1), "utf-8")
    else:
        assert found == [pytest.approx(record, abs=tolerance, rel=tolerance) for record in stored[name]]
