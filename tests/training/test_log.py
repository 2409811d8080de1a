"""The log grows line by line; metrics are declared; a run's data are of the stage's kind."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from helpers import (
    SHORT_RUN,
    SMALL_CONFIG,
    assert_same_tensors,
    make_documents,
    make_pairs,
    records,
    saved_progress,
    write_data,
)

from base.cli import UserError
from base.files import METRICS_FILE
from model.checkpoint import load_model
from model.model import CausalLM
from training.log import COLUMNS, describe_record, duration, read_metrics
from training.loss import cross_entropy_sum, next_token_loss, plain_cross_entropy_sum
from training.optimizer import GradientBuffer
from training.packing import IGNORE


def test_a_line_is_in_the_file_before_the_first_save(data, run_here, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("training.state.save_tensors", lambda *args, **info: seen.append(read_metrics(hidden)))
    hidden = tmp_path / ".out.writing"
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", "--max_seq_len", "32"]
    assert run_here("1-pretrain.py", *flags, "--batch_size", "2", "--log_interval", "1", "--max_steps", "3").status == 0
    assert [record["step"] for record in seen[0]] == [0, 1, 2, 3]
    assert not hidden.exists()
    assert records(tmp_path / "out") == seen[0]


def test_a_torn_last_line_and_what_came_after_the_save_are_left_out(tmp_path):
    assert read_metrics(tmp_path) == []
    lines = [json.dumps({"step": step}) for step in range(4)]
    (tmp_path / METRICS_FILE).write_text("\n".join([*lines, '{"step": 4, "lo']), "utf-8")
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert [record["step"] for record in read_metrics(tmp_path, up_to_step=2)] == [0, 1, 2]


def test_what_is_damaged_in_a_log_is_left_out(tmp_path):
    lines = [b"\xff\xfe", b"[1]", b"{}", b"[" * 100_000, b'{"step": "x"}', json.dumps({"step": 7}).encode()]
    (tmp_path / METRICS_FILE).write_bytes(b"\n".join(lines))
    assert read_metrics(tmp_path) == [{"step": 7}]


def test_a_metric_that_was_not_declared_is_an_error():
    buffer = GradientBuffer([torch.nn.Parameter(torch.zeros(3))], {"accuracy": (), "load": (2, 2)})
    buffer.add_sums(accuracy=1.0, load=torch.ones(2, 2))
    with pytest.raises(KeyError, match="margin"):
        buffer.add_sums(margin=1.0)


def test_the_chunked_loss_is_the_plain_one():
    torch.manual_seed(0)
    model = CausalLM(SMALL_CONFIG)
    hidden = torch.randn(1200, SMALL_CONFIG.hidden_size, requires_grad=True)  # more tokens than a chunk
    labels = torch.randint(SMALL_CONFIG.vocab_size, (1200,))
    labels[::7] = IGNORE
    results = []
    for loss in (cross_entropy_sum, plain_cross_entropy_sum):
        loss_sum = loss(hidden, model.lm_head.weight, labels)
        results.append((loss_sum, *torch.autograd.grad(loss_sum, (hidden, model.lm_head.weight))))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("script", "kind"), [("1-pretrain.py", "dpo"), ("2-sft.py", "dpo"), ("2-sft.py", "pretrain"), ("4-dpo.py", "sft")]
)
def test_data_of_another_kind_are_refused(script, kind, base_dir, run_here, tmp_path):
    """Neighbours of ordinary chats would become pairs, and rejected answers would be learnt."""
    if kind == "dpo":
        documents = make_pairs(8)
    else:
        documents = make_documents(kind, 8, seed=0)
    write_data(tmp_path / "data", documents[2:], documents[:2], kind=kind)
    init = [] if script == "1-pretrain.py" else ["--init_from", base_dir]
    result = run_here(script, "--data", tmp_path / "data", "--out_dir", tmp_path / "out", *init)
    assert f"made with `data_process.py {kind}`" in result.error_line(status=2)


RECORD = {"step": 12_000, "tokens": 49_152_000, "loss": 10.5, "learning_rate": 1e-4, "grad_norm": 1.25}
RECORD |= {"tokens_per_s": 123_456.7, "mfu": 0.5, "real_fraction": 0.99, "minutes": 600.0, "minutes_left": 400.0}
GRPO = "length ended thinks calls entropy groups_solved groups_all_right groups_all_wrong gap sampling_seconds".split()
STAGES = {"sft": {}, "dpo": {"accuracy": 0.5, "margin": 0.1}, "grpo": {"reward": 0.25} | dict.fromkeys(GRPO, 0.125)}


@pytest.mark.parametrize("more", STAGES.values(), ids=STAGES)
def test_a_line_fits_and_shows_where_the_run_is(more):
    line = describe_record(RECORD | more, 0.12, everything=False)
    assert len(line) <= COLUMNS - len(" |█|"), "there is room for the bar"
    for shown in ("step 12,000/100,000", "loss 10.500", "123,457 tok/s", "6.7 h left"):
        assert shown in line
    assert ("reward 0.250" in line) == ("reward" in more)
    detailed = describe_record(RECORD | more | {"val_loss": 9.5, "expert_load": [1], "sample": "x"}, 0.12, True)
    assert max(map(len, detailed.splitlines())) <= COLUMNS
    assert " ".join(line.split()) in " ".join(detailed.split())
    for name in more | {"val_loss": 9.5}:
        assert f"{name} " in detailed
    assert "expert_load" not in detailed


def test_a_time_has_the_unit_that_suits_it():
    shown = {0.004: "0 s", 0.7: "42 s", 1: "1.0 min", 7.31: "7.3 min", 54: "54 min", 192: "3.2 h", 6000: "100 h"}
    assert {minutes: duration(minutes) for minutes in shown} == shown


def test_validation_begins_early_so_that_plots_can_compare(data, run_here, tmp_path):
    flags = ["--data", data, "--out_dir", tmp_path / "out", *SHORT_RUN, "--batch_size", "2", "--max_steps", "60"]
    assert run_here("1-pretrain.py", *flags).status == 0
    assert [record["step"] for record in records(tmp_path / "out") if "val_loss" in record] == [0, 20, 50, 60]


def test_a_run_without_a_preset_names_the_one_that_learns_faster(data, run_here, tmp_path):
    flags = ["--data", data, "--max_steps", "1", "--max_seq_len", "16", "--batch_size", "1", "--eval_rows", "1"]
    plain = run_here("1-pretrain.py", *flags, "--out_dir", tmp_path / "plain")
    preset = run_here("1-pretrain.py", *flags, "--out_dir", tmp_path / "preset", "--preset", "tiny")
    assert (plain.status, preset.status) == (0, 0), plain.err + preset.err
    assert "--preset small" in plain.out
    assert "--preset" not in preset.out


def next_command(result) -> list[str]:
    assert result.status == 0, result.err
    last = result.out.splitlines()[-1]
    assert last.startswith("next: ")
    return shlex.split(last.removeprefix("next: "))[1:]


def test_each_stage_names_the_next_and_it_runs(run_here, tmp_path):
    for kind in ("pretrain", "sft"):
        documents = make_documents(kind, 12, seed=0)
        write_data(tmp_path / "data" / kind, documents[2:], documents[:2], kind=kind)
    short = ["--max_seq_len", "64", "--batch_size", "2", "--max_steps", "2", "--device", "cpu"]
    flags = ["--data", tmp_path / "data" / "pretrain", "--out_dir", tmp_path / "base", "--preset", "tiny"]
    command = next_command(run_here("1-pretrain.py", *flags, *short))
    assert Path(command[0]).name == "2-sft.py"
    command = next_command(run_here(*command, "--out_dir", tmp_path / "chat", *short))
    assert Path(command[0]).name == "eval.py"
    result = run_here(*command, "--prompt", "你好", "--max_new_tokens", "2", "--device", "cpu")
    assert result.status == 0, result.err


@pytest.mark.parametrize(("folder", "script"), [("pretrain", "1-pretrain.py"), ("sft", "2-sft.py")])
def test_a_model_that_is_missing_is_an_error_with_the_script_that_trains_it(folder, script, tmp_path):
    with pytest.raises(UserError, match=f"train one with: python {script}"):
        load_model(tmp_path / folder)


def test_a_sample_is_written_at_each_validation_and_changes_nothing(data, run_here, tmp_path):
    flags = ["--data", data, *SHORT_RUN, "--batch_size", "2", "--max_steps", "4", "--eval_interval", "2"]
    for name, prompt in {"own": [], "given": ["--sample_prompt", "春天"], "none": ["--sample_prompt", ""]}.items():
        result = run_here("1-pretrain.py", *flags, "--out_dir", tmp_path / name, *prompt)
        assert result.status == 0, result.err
        samples = [record["sample"] for record in records(tmp_path / name) if "sample" in record]
        assert len(samples) == (0 if name == "none" else 3), "at steps 0, 2 and 4"
        assert result.out.count("\n  sample: ") == len(samples)
        if name == "given":
            assert all(sample.startswith("春天") and len(sample) > len("春天") for sample in samples)
        else:
            assert len({sample[:4] for sample in samples}) <= 1, "one prompt"
        if name == "own":
            assert len(set(samples)) > 1, "another model, another continuation"
    for name in ("given", "none"):
        assert_same_tensors(tmp_path / "own", tmp_path / name)


def test_a_signal_ends_a_validation_too(data, run_here, tmp_path, monkeypatch):
    """torchrun kills 30 seconds after SIGTERM; a validation may take longer."""
    passes = []

    def signalled(model, batch):
        passes.append(batch.split)
        if passes.count("val") == 3:  # one batch before the first step; of the next validation's this is the second
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token_loss(model, batch)

    monkeypatch.setattr("training.loss.next_token_loss", signalled)
    flags = ["--data", data, "--out_dir", tmp_path / "out", *SHORT_RUN, "--eval_rows", "9", "--batch_size", "1"]
    result = run_here("1-pretrain.py", *flags, "--max_steps", "4", "--eval_interval", "2")
    assert result.status == 128 + signal.SIGTERM, result.err
    assert passes == ["val", "train", "train", "val", "val"]
    assert saved_progress(tmp_path / "out")["step"] == 2
    assert ["val_loss" in record for record in records(tmp_path / "out")] == [True, False, False]
    assert result.out.splitlines()[-1].endswith("--resume")
