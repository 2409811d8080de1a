"""A run that was killed or stopped goes on as if nothing had happened: every tensor bit for bit, every sample once."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    SHORT_RUN,
    TOKENIZER,
    Processes,
    assert_same_tensors,
    make_documents,
    make_pairs,
    run_stage,
    saved_progress,
    signal_in_pass,
    snapshot,
    steps_of,
    write_data,
)

from base.cli import python_command
from model.checkpoint import load_model, load_tensors, save_model, save_tensors
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training import loss, schedule, state
from training.loss import next_token_loss
from training.packing import PackedDataset

# 27 rows, 6 a step: an epoch is 5 steps, the last one of 3 rows and one pass, which makes 9 passes.
# Saved after steps 3 and 6, ended after step 8, in the second epoch.
RUN = [*SHORT_RUN, *"--max_seq_len 128 --batch_size 3 --accumulation_steps 2 --epochs 3 --max_steps 8".split()]
RUN += "--save_interval 3 --eval_interval 4".split()


def record_documents(file: str, killed_in_pass: int | None = None):
    """Writes the documents of every whole step into a file of each process, one line a step."""
    documents, advance = [], schedule.TrainState.advance
    if killed_in_pass:
        signal_in_pass(killed_in_pass, signal.SIGKILL)
    loss_fn = loss.next_token_loss

    def recording_loss(model, batch):
        if batch.split == "train":
            documents.extend(batch.documents)
        return loss_fn(model, batch)

    def recording_advance(self, *args):
        advance(self, *args)
        with open(file + os.environ.get("RANK", "0"), "a") as lines:
            print(json.dumps([self.step, documents]), file=lines)
        documents.clear()

    loss.next_token_loss, schedule.TrainState.advance = recording_loss, recording_advance


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The run that all others must equal, made in one go."""
    out_dir = tmp_path_factory.mktemp("uninterrupted") / "out"
    run = ["1-pretrain.py", "--data", data, "--out_dir", out_dir, *RUN]
    (result,) = Processes(out_dir.parent, run_stage, None, *run).wait()
    assert result.status == 0, result.err
    return out_dir


def test_killed_in_an_accumulation_and_resumed_equals_uninterrupted_bit_for_bit(data, uninterrupted, start, tmp_path):
    run = ["1-pretrain.py", "--data", data, "--out_dir", tmp_path / "out", *RUN]
    in_step_6 = partial(signal_in_pass, 9 + 2, signal.SIGKILL)  # in the second of its two passes, in epoch 2
    (result,) = start(*run, patch=in_step_6).wait()
    assert result.status == -signal.SIGKILL, result.err
    assert "step 5/8 " in result.out, "it was not killed beyond what was saved"
    assert saved_progress(tmp_path / "out")["step"] == 3
    (result,) = start(*run, "--resume").wait()
    assert result.status == 0, result.err
    whole, resumed = saved_progress(uninterrupted), saved_progress(tmp_path / "out")
    assert whole | {"seconds": 0} == resumed | {"seconds": 0}
    assert (whole["step"], whole["epoch"], whole["row"]) == (8, 1, 3 * 6)
    assert_same_tensors(uninterrupted, tmp_path / "out")
    assert steps_of(tmp_path / "out") == steps_of(uninterrupted), "a step stands twice in metrics.jsonl, or is missing"


def test_sigterm_saves_and_the_printed_command_finishes_the_run(data, uninterrupted, start, tmp_path):
    out_dir = tmp_path / "my out"
    run = ["1-pretrain.py", "--data", data, "--out_dir", out_dir, *RUN]
    (result,) = start(*run, patch=partial(signal_in_pass, 9 + 2 + 1, signal.SIGTERM)).wait()  # in step 7
    assert (result.status, result.err) == (128 + signal.SIGTERM, "")
    assert saved_progress(out_dir)["step"] == 6, "the step that was not whole must be left out"
    command = shlex.split(result.out.splitlines()[-1].removeprefix("next: "))
    assert command[:2] == [python_command(), "1-pretrain.py"]
    (result,) = start(*command[1:]).wait()
    assert (result.status, result.err) == (0, "")
    assert_same_tensors(uninterrupted, out_dir)


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): Ctrl-C in forward pass number n of training, in this process."""

    def in_pass(call: int):
        monkeypatch.setattr(loss, "next_token_loss", next_token_loss)  # to be restored at the end
        signal_in_pass(call, signal.SIGINT)

    return in_pass


def test_ctrl_c_saves_and_muon_goes_on_bit_for_bit(data, run_here, interrupt, tmp_path):
    run = ["1-pretrain.py", "--data", data, *SHORT_RUN, "--batch_size", "2", "--max_steps", "4", "--optimizer", "muon"]
    assert run_here(*run, "--out_dir", tmp_path / "whole").status == 0
    interrupt(3)
    result = run_here(*run, "--out_dir", tmp_path / "out")
    assert (result.status, result.err) == (130, "")
    assert "stopped at step 2" in result.out
    assert result.out.splitlines()[-1].endswith(" --resume")
    assert saved_progress(tmp_path / "out")["step"] == 2
    assert run_here(*run, "--out_dir", tmp_path / "out", "--resume").status == 0
    assert_same_tensors(tmp_path / "whole", tmp_path / "out")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a model to adapt."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_model(directory, CausalLM(LMConfig(**PRESETS["tiny"])), TOKENIZER)
    return directory


@pytest.fixture
def adapter_run(chat_data, base):
    flags = ["--data", chat_data, "--init_from", base, "--max_seq_len", "64", "--batch_size", "2", "--max_steps", "4"]
    return ["3-lora.py", *flags, "--eval_rows", "2", "--log_interval", "1", "--lora_dropout", "0.3"]


def test_an_adapter_and_its_dropout_go_on_bit_for_bit(adapter_run, run_here, interrupt, tmp_path):
    """Dropout draws random numbers in every step, so this needs the random state too."""
    assert run_here(*adapter_run, "--out_dir", tmp_path / "whole").status == 0
    interrupt(3)
    assert run_here(*adapter_run, "--out_dir", tmp_path / "out").status == 130
    assert saved_progress(tmp_path / "out")["step"] == 2
    result = run_here(*adapter_run, "--out_dir", tmp_path / "out", "--resume")
    assert result.status == 0, result.err
    assert_same_tensors(tmp_path / "whole", tmp_path / "out", "adapter_model.safetensors")


def test_an_adapter_is_not_resumed_on_another_base(adapter_run, base, run_here, interrupt, tmp_path):
    interrupt(3)
    assert run_here(*adapter_run, "--out_dir", tmp_path / "out").status == 130
    shutil.copytree(base, tmp_path / "other")
    torch.manual_seed(1)
    save_model(tmp_path / "other", CausalLM(LMConfig(**PRESETS["tiny"])), TOKENIZER)
    result = run_here(*adapter_run, "--init_from", tmp_path / "other", "--out_dir", tmp_path / "out", "--resume")
    assert "cannot resume" in result.error_line(status=2)


@pytest.mark.parametrize("mix", [[], ["--mix", "pretrain=2", "more=1"]], ids=["one source", "two sources"])
def test_two_processes_killed_and_one_resumed_see_every_document_once(mix, data, start, tmp_path):
    out_dir, record = tmp_path / "out", str(tmp_path / "documents.")
    sources = [data]
    if mix:
        documents = make_documents("pretrain", 24, seed=5)
        sources.append(write_data(tmp_path / "more", documents[2:], documents[:2]))
    run = ["1-pretrain.py", "--data", *sources, *mix, "--out_dir", out_dir, *SHORT_RUN, "--batch_size", "3"]
    run += ["--accumulation_steps", "2", "--epochs", "1", "--save_interval", "2"]
    in_step_4 = partial(record_documents, record, killed_in_pass=2 * 3 + 2)
    results = start(*run, patch=in_step_4, processes=2).wait()
    assert [result.status for result in results] == [-signal.SIGKILL] * 2, results
    saved = saved_progress(out_dir)
    assert (saved["step"], saved["row"]) == (2, 2 * 2 * 3 * 2)  # steps, processes, rows, passes
    seen = Counter()
    for rank in range(2):
        for line in Path(record + str(rank)).read_text().splitlines():
            step, documents = json.loads(line)
            assert documents, "a process had nothing to do"
            seen.update(documents if step <= 2 else [])
    Path(record + "0").unlink()
    (result,) = start(*run, "--resume", "--save_interval", "99", patch=partial(record_documents, record)).wait()
    assert result.status == 0, result.err
    for line in Path(record + "0").read_text().splitlines():
        seen.update(json.loads(line)[1])
    if mix:
        mixture = PackedDataset(sources, "train", 64, {"pretrain": 2, "more": 1})
        assert seen == Counter(mixture.batch(mixture.order(0, 0)).documents)
    else:
        assert seen == Counter(PackedDataset(data, "train", 64).piece_document.tolist())


@pytest.fixture
def finished(data, uninterrupted, tmp_path):
    """The flags of a run that has ended, without --resume; tmp_path / "out" is what it has written."""
    shutil.copytree(uninterrupted, tmp_path / "out")
    return ["--data", data, "--out_dir", tmp_path / "out", *RUN]


def test_resuming_a_finished_run_says_so_and_changes_nothing(finished, run_here, tmp_path):
    before = snapshot(tmp_path / "out")
    result = run_here("1-pretrain.py", *finished, "--resume")
    assert (result.status, result.err) == (0, "")
    assert "done: 8 steps" in result.out
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--seed", "1"], "seed was 0, and is 1 now"),
        (["--max_seq_len", "32"], "max_seq_len was 128, and is 32 now"),
        (["--preset", "mini"], "hidden_size 96 there, 256 here"),
        (["--data", "OTHER"], "its data was"),
    ],
    ids=["seed", "row length", "size", "data"],
)
def test_resuming_something_else_is_refused_and_the_difference_named(changes, named, finished, run_here, tmp_path):
    if "OTHER" in changes:
        documents = make_documents("pretrain", 20, seed=3)
        changes = ["--data", write_data(tmp_path / "other", documents[2:], documents[:2])]
    before = snapshot(tmp_path / "out")
    result = run_here("1-pretrain.py", *finished, "--resume", "--max_steps", "10", *changes)
    assert named in result.error_line(status=2)
    assert snapshot(tmp_path / "out") == before


def test_resuming_where_there_is_nothing_says_what_to_do(data, run_here, tmp_path):
    result = run_here("1-pretrain.py", "--data", data, "--out_dir", tmp_path / "nothing", *SHORT_RUN, "--resume")
    assert re.search(r"nothing to resume|no model", result.error_line(status=2)), result.err


def test_a_model_without_training_state_cannot_be_resumed(finished, run_here, tmp_path):
    (tmp_path / "out/training_state/state.safetensors").unlink()
    result = run_here("1-pretrain.py", *finished, "--resume")
    assert "nothing to resume" in result.error_line(status=2)


def test_a_damaged_training_state_is_one_line(finished, run_here, tmp_path):
    path = tmp_path / "out/training_state/state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = run_here("1-pretrain.py", *finished, "--resume")
    assert "state.safetensors is damaged" in result.error_line(status=2)


def test_a_fresh_run_keeps_the_old_one_until_it_has_saved_and_then_as_old(finished, run_here, tmp_path, monkeypatch):
    first = snapshot(tmp_path / "out")
    again = [*finished, "--seed", "7", "--max_steps", "1"]
    with monkeypatch.context() as patch:  # ends before its first save

        def broken_disk(*args, **texts):
            raise OSError("no space left")

        patch.setattr(state, "save_tensors", broken_disk)
        assert "no space left" in run_here("1-pretrain.py", *again).error_line(status=1)
    assert snapshot(tmp_path / "out") == first
    assert run_here("1-pretrain.py", *again).status == 0
    assert snapshot(tmp_path / "out.old") == first
    assert saved_progress(tmp_path / "out")["step"] == 1
    assert steps_of(tmp_path / "out") == [0, 1], "lines of the old run in the new one's metrics.jsonl"
    assert json.loads((tmp_path / "out/run.json").read_text("utf-8"))["arguments"]["seed"] == 7
    assert not [*tmp_path.glob("*.new"), *tmp_path.glob("*.writing")]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--lora_alpha", "3"], "alpha 16, on"),
        (["--lora_rank", "4"], "its adapter was rank 8"),
        (["--lora_targets", "q_proj"], "down_proj"),
        (["--optimizer", "muon"], "its optimizer was adamw"),
    ],
)
def test_an_adapter_of_another_kind_is_not_resumed(changes, named, adapter_run, run_here, tmp_path):
    run = [*adapter_run, "--out_dir", tmp_path / "out"]
    assert run_here(*run, "--max_steps", "1").status == 0
    assert named in run_here(*run, "--resume", *changes).error_line(status=2)


def test_preferences_are_not_resumed_with_another_reference(base, run_here, tmp_path):
    """Rewards are measured against the model of --init_from."""
    pairs = make_pairs(12)
    data = write_data(tmp_path / "dpo", pairs[4:], pairs[:4], kind="dpo")
    torch.manual_seed(1)
    save_model(tmp_path / "other", CausalLM(LMConfig(**PRESETS["tiny"])), TOKENIZER)
    run = ["4-dpo.py", "--data", data, "--max_seq_len", "128", "--batch_size", "2", "--out_dir", tmp_path / "out"]
    assert run_here(*run, "--init_from", base, "--max_steps", "1").status == 0
    result = run_here(*run, "--init_from", tmp_path / "other", "--max_steps", "2", "--resume")
    assert "its reference was" in result.error_line(status=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors, texts: texts.pop("info"), "info is missing or damaged"),
        (lambda tensors, texts: texts.update(info='{"progress": 1, "must_agree": 2}'), "info is missing or damaged"),
        (lambda tensors, texts: texts.update(info="[" * 100_000), "info is missing or damaged"),
        (lambda tensors, texts: tensors.pop("weight.model.norm.weight"), "weight.model.norm.weight is missing"),
        (lambda tensors, texts: tensors.update({"weight.x": torch.zeros(1)}), "not the state of this model"),
        (lambda tensors, texts: tensors.update({"weight.model.norm.weight": torch.zeros(7)}), "not the state of this"),
        (lambda tensors, texts: tensors.update({"optimizer.x/exp_avg": torch.zeros(7)}), "not the state of this"),
        (lambda tensors, texts: tensors.update({"random.0": torch.zeros(7)}), "not the state of this"),
    ],
    ids=["no info", "info of numbers", "deep info", "no weight", "more weights", "shape", "optimizer", "random"],
)
def test_a_state_that_no_run_has_written_is_one_line(change, named, finished, run_here, tmp_path):
    path = tmp_path / "out/training_state/state.safetensors"
    tensors, texts = load_tensors(path)
    change(tensors, texts)
    save_tensors(path, tensors, **{name: text for name, text in texts.items() if name == "info"})
    result = run_here("1-pretrain.py", *finished, "--resume", "--max_steps", "9")
    assert "state.safetensors" in result.error_line(status=2)
    assert named in result.err


def test_a_run_without_one_finite_step_is_no_success(base, chat_data, run_here, tmp_path):
    model = load_model(base)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    save_model(tmp_path / "nan", model, TOKENIZER)
    flags = ["--data", chat_data, "--init_from", tmp_path / "nan", "--out_dir", tmp_path / "out", "--max_seq_len", "64"]
    result = run_here("2-sft.py", *flags, "--batch_size", "2", "--max_steps", "3", "--eval_rows", "2")
    assert "no step was finite" in result.error_line(status=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_resumed_run_no_longer_maps_the_state_that_its_next_save_replaces(data, run_here, tmp_path, monkeypatch):
    """Windows does not replace a file that is mapped."""
    run = ["1-pretrain.py", "--data", data, "--out_dir", tmp_path / "out", *SHORT_RUN, "--batch_size", "2"]
    assert run_here(*run, "--max_steps", 1).status == 0
    mapped, save = [], state.Checkpointer.save

    def looking_save(self, *args):
        mapped.append("state.safetensors" in Path("/proc/self/maps").read_text())
        save(self, *args)

    monkeypatch.setattr(state.Checkpointer, "save", looking_save)
    assert run_here(*run, "--max_steps", 2, "--resume").status == 0
    assert mapped == [False]
