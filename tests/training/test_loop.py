"""The loop: gradients, several processes, numbers that are not finite, the schedule, the flags, the limits."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FIXED_WEIGHTS,
    ONCE,
    ROOT,
    SMALL_CONFIG,
    TIMEOUT,
    Processes,
    change_meta,
    flat,
    make_documents,
    observe,
    records,
    relative_difference,
    write_data,
)
from safetensors.torch import load_file, save_file

from base.cli import run
from model.model import CausalLM
from training import loss
from training.flags import TRAINING_FLAGS, parse_flags
from training.machine import start_machine
from training.optimizer import OptimizerSettings, build_optimizer, orthogonalize
from training.packing import IGNORE, PackedDataset
from training.plots import plot
from training.schedule import Schedule

MUON = ["--optimizer", "muon", "--learning_rate", "1e-2", "--max_steps", "3"]


# --------------------------------------------------------------------------------------------- two processes, one start


class TwoProcesses:
    """Runs in both processes of the fixture `pair`; what it finds goes into files for the tests below."""

    def __init__(self, folder: Path, data: Path, chats: Path, one_row_data: Path):
        self.folder, self.data, self.chats, self.one_row_data = folder, data, chats, one_row_data
        self.rank = int(os.environ["RANK"])
        self.machine = start_machine("cpu", "float32", 0)
        self.calls = 0
        self.suspects = []

    def observe(self, data, name, *flags, **options):
        print(f"--- {name}")
        self.calls = 0
        seen = observe(data, self.folder / name, *ONCE, *flags, machine=self.machine, **options)
        tensors = {f"gradient.{i}": gradient for i, gradient in enumerate(seen.gradients)}
        tensors |= {f"weights.{i}": weights for i, weights in enumerate(seen.weights)}
        save_file(tensors, self.folder / f"{name}.{self.rank}.safetensors")
        report = {"all_reduces": seen.all_reduces, "suspects": self.suspects}
        (self.folder / f"{name}.{self.rank}.json").write_text(json.dumps(report), "utf-8")

    def infinite_once(self, model, batch):
        """The second process's third pass of training has an infinite loss."""
        loss_sum, count, metrics = loss.next_token_loss(model, batch)
        self.calls += batch.split == "train"
        if self.rank == 1 and self.calls == 3 and batch.split == "train":
            self.suspects = batch.documents
            loss_sum = loss_sum * math.inf
        return loss_sum, count, metrics

    def signalled(self, model, batch):
        """The second process alone is told to stop, in the first pass of its third step."""
        self.calls += batch.split == "train"
        if self.rank == 1 and self.calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss.next_token_loss(model, batch)

    def with_metric(self, model, batch):
        loss_sum, count, _ = loss.next_token_loss(model, batch)
        return loss_sum, count, {"twice": 2.0 * count}

    def never_finite(self, model, batch):
        loss_sum, count, metrics = loss.next_token_loss(model, batch)
        return loss_sum * (math.nan if self.rank == 1 and batch.split == "train" else 1), count, metrics

    def main(self):
        two = ["--batch_size", "1", "--accumulation_steps", "2"]
        self.observe(self.chats, "gradients", "--batch_size", "1", "--accumulation_steps", "4", *FIXED_WEIGHTS)
        self.observe(self.data, "infinite", *two, "--max_steps", "4", loss_fn=self.infinite_once)
        self.observe(self.data, "signalled", *two, "--max_steps", "9", loss_fn=self.signalled)
        self.observe(self.one_row_data, "metric", *two, "--epochs", "2", loss_fn=self.with_metric, metrics=("twice",))
        self.observe(self.data, "muon", "--batch_size", "1", *MUON)
        observe(
            self.data,
            self.folder / "never",
            *ONCE,
            *two,
            "--epochs",
            "9",
            machine=self.machine,
            loss_fn=self.never_finite,
        )


def two_processes(*folders):
    run(TwoProcesses(*folders).main)


class Pair(NamedTuple):
    folder: Path
    results: list

    def tensors(self, name: str, rank: int) -> dict[str, torch.Tensor]:
        assert (self.folder / f"{name}.{rank}.json").exists(), self.results[rank].err
        return load_file(self.folder / f"{name}.{rank}.safetensors")

    def series(self, name: str, rank: int, kind: str) -> list[torch.Tensor]:
        tensors = self.tensors(name, rank)
        return [tensors[f"{kind}.{i}"] for i in range(sum(key.startswith(kind) for key in tensors))]

    def report(self, name: str, rank: int) -> dict:
        assert (self.folder / f"{name}.{rank}.json").exists(), self.results[rank].err
        return json.loads((self.folder / f"{name}.{rank}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def few_chats(tmp_path_factory) -> Path:
    """Some 20 rows of 96 tokens, with unlike numbers of scored tokens."""
    chats = make_documents("sft", 24, seed=2)
    return write_data(tmp_path_factory.mktemp("data") / "sft", chats[2:], chats[:2], kind="sft")


@pytest.fixture(scope="module")
def pair(data, few_chats, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    short = make_documents("pretrain", 2, seed=5)
    one_row = write_data(folder / "one_row", [short[0][:50]], [short[1][:50]])
    return Pair(folder, Processes(folder / "logs", two_processes, folder, data, few_chats, one_row, processes=2).wait())


@pytest.fixture(scope="module")
def expected_gradients(few_chats) -> list[torch.Tensor]:
    """The gradient of every step of 8 rows, of the mean over all scored tokens, as one would write it down."""
    torch.manual_seed(0)
    model, rows = CausalLM(SMALL_CONFIG), PackedDataset(few_chats, "train", 96)
    order, gradients = rows.order(seed=0, epoch=0), []
    for start in range(0, len(order), 8):
        batch = rows.batch(order[start : start + 8])
        logits = model(batch.input_ids, batch.position_ids)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        gradients.append(flat(torch.autograd.grad(loss, list(model.parameters()))))
    assert len(order) % 8, "the last step must be a smaller one"
    counts = {int((rows.batch(order[i : i + 1]).labels != IGNORE).sum()) for i in range(8)}
    assert max(counts) > 1.5 * min(counts), "the rows must differ in their number of scored tokens"
    return gradients


@pytest.mark.parametrize("batch_size", [8, 1])
def test_rows_at_once_or_accumulated_give_the_gradient_of_the_mean(batch_size, few_chats, expected_gradients, tmp_path):
    flags = ["--batch_size", batch_size, "--accumulation_steps", 8 // batch_size, *FIXED_WEIGHTS, *ONCE]
    seen = observe(few_chats, tmp_path / "out", *flags)
    assert len(seen.gradients) == len(expected_gradients), "the last, smaller step is missing"
    differences = [relative_difference(a, b) for a, b in zip(seen.gradients, expected_gradients)]
    assert max(differences) < 1e-5, differences


def test_two_processes_give_the_gradient_of_the_mean(pair, expected_gradients):
    for rank in range(2):
        gradients = pair.series("gradients", rank, "gradient")
        assert len(gradients) == len(expected_gradients)
        differences = [relative_difference(a, b) for a, b in zip(gradients, expected_gradients)]
        assert max(differences) < 1e-5, differences


def test_one_all_reduce_a_step_whatever_the_accumulation(pair):
    for name in ("gradients", "infinite"):
        counts = pair.report(name, 0)["all_reduces"]
        assert {b - a for a, b in zip(counts, counts[1:])} == {1}, counts


def test_weights_are_equal_in_both_processes_after_every_step(pair):
    for name in ("gradients", "infinite", "metric"):
        weights = [pair.series(name, rank, "weights") for rank in range(2)]
        assert len(weights[0]) > 1
        assert all(torch.equal(a, b) for a, b in zip(*weights)), name


def test_muon_in_two_processes_updates_as_in_one(pair, data, tmp_path):
    alone = observe(data, tmp_path / "out", "--batch_size", "2", *MUON, *ONCE).weights
    for rank in range(2):
        together = pair.series("muon", rank, "weights")
        assert len(together) == 3
        assert max(relative_difference(a, b) for a, b in zip(together, alone)) < 1e-5
    moved = relative_difference(alone[2], alone[0])
    assert moved > 1e-2, "else this would hold whatever the optimizer did"


def test_an_infinite_loss_in_one_process_skips_the_step_in_both(pair):
    for rank in range(2):
        weights = pair.series("infinite", rank, "weights")
        changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
        assert changed == [False, True, True], "the second step, and only that, should have changed nothing"
        assert all(w.isfinite().all() for w in weights)


def test_the_documents_of_an_infinite_loss_are_named(pair):
    suspects = pair.report("infinite", 1)["suspects"]
    assert suspects
    assert f"samples: {sorted(suspects)}" in pair.results[0].out
    assert [record["step"] for record in records(pair.folder / "infinite")] == [0, 1, 3, 4]


def test_ten_steps_in_a_row_without_a_finite_loss_end_the_run(pair):
    assert [result.status for result in pair.results] == [1, 1], pair.results[1].err
    assert "10 steps in a row" in pair.results[0].error_line(status=1)
    assert "--learning_rate" in pair.results[0].err
    assert pair.results[0].out.partition("--- muon")[2].count("skipped") == 10
    assert not (pair.folder / "never").exists()


def test_a_signal_to_one_process_saves_in_both_with_the_whole_steps_only(pair):
    assert len(pair.series("signalled", 0, "weights")) == len(pair.series("signalled", 1, "weights")) == 2
    assert "stopped at step 2, and saved" in pair.results[0].out
    assert (pair.folder / "signalled/training_state/state.safetensors").exists()


def test_a_process_without_a_row_neither_waits_nor_counts(pair):
    validated, *trained = records(pair.folder / "metric")
    assert validated["val_twice"] == pytest.approx(2)
    assert [record["twice"] for record in trained] == pytest.approx([2, 2])
    assert trained[0]["loss"] == pytest.approx(math.log(SMALL_CONFIG.vocab_size), abs=0.2)


# ---------------------------------------------------------------------------------------------------- not finite, alone


def test_a_step_that_is_skipped_at_the_end_still_leaves_a_checkpoint(data, tmp_path):
    calls = []

    def last_is_infinite(model, batch):
        calls.append(batch.split)
        loss_sum, count, metrics = loss.next_token_loss(model, batch)
        return loss_sum * (math.inf if calls.count("train") == 3 else 1), count, metrics

    seen = observe(data, tmp_path / "out", "--batch_size", "2", "--max_steps", "3", *ONCE, loss_fn=last_is_infinite)
    saved = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(saved["model.embed_tokens.weight"].flatten(), seen.weights[1][: 6400 * SMALL_CONFIG.hidden_size])


def test_a_gradient_that_is_not_finite_skips_the_step_though_the_loss_is(data, tmp_path):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    calls = []

    def broken_backward(model, batch):
        calls.append(batch.split)
        loss_sum, count, metrics = loss.next_token_loss(model, batch)
        return (Broken.apply(loss_sum) if calls.count("train") == 2 else loss_sum), count, metrics

    seen = observe(data, tmp_path / "out", "--batch_size", "2", "--max_steps", "3", *ONCE, loss_fn=broken_backward)
    assert torch.equal(seen.weights[0], seen.weights[1])
    assert not torch.equal(seen.weights[1], seen.weights[2])
    assert seen.weights[2].isfinite().all()


# ----------------------------------------------------------------------------------------------- schedule and optimizer


@pytest.mark.parametrize(
    ("step", "done", "expected"),
    [
        (0, 0.0, 1e-3 / 10),  # the first step already moves
        (4, 0.0, 1e-3 / 2),
        (9, 0.0, 1e-3),
        (50, 0.5, (1e-3 + 1e-4) / 2),
        (50, 0.25, 1e-4 + 9e-4 * (2 + math.sqrt(2)) / 4),
        (99, 1.0, 1e-4),
        (150, 1.2, 1e-4),
    ],
)
def test_learning_rate_rises_then_follows_half_a_cosine(step, done, expected):
    schedule = Schedule(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=10, epochs=1)
    assert schedule.rate(step, done) == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer):
    model = CausalLM(SMALL_CONFIG)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    updater = build_optimizer(model, OptimizerSettings(optimizer, learning_rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    updater.step()
    for name, parameter in model.named_parameters():
        factor = 1 if "norm" in name else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_factor_is_for_an_embedding_that_is_not_also_the_head(data, tmp_path, optimizer, tied):
    flags = [*ONCE, "--optimizer", optimizer, "--max_steps", 1, "--weight_decay", 0, "--learning_rate", 1e-3]
    updates = []
    for factor in (1, 5):
        torch.manual_seed(0)
        model = CausalLM(replace(SMALL_CONFIG, tie_word_embeddings=tied))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        observe(data, tmp_path / f"{factor}", *flags, "--embedding_factor", factor, model=model)
        updates.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
    for name, update in updates[0].items():
        expected = 5 * update if "embed_tokens" in name and not tied else update
        torch.testing.assert_close(updates[1][name], expected, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("shape", [(64, 64), (160, 48), (48, 160)], ids=str)
def test_orthogonalized_matrices_turn_and_do_not_stretch(shape):
    matrices = (
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    )
    result = orthogonalize(matrices)
    stretches = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape
    assert (stretches > 0.3).float().mean() > 0.95, "directions are lost"  # a square one is nearly singular
    assert (stretches < 1.3).all()
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)  # the nearest matrix that only turns is u v
    assert (F.cosine_similarity(result.flatten(1), (u @ v).flatten(1)) > 0.97).all()


def test_muon_keeps_momentum_for_matrices_and_is_adam_for_the_rest():
    torch.manual_seed(0)
    model, twin = CausalLM(SMALL_CONFIG), CausalLM(SMALL_CONFIG)
    twin.load_state_dict(model.state_dict())
    muon = build_optimizer(model, OptimizerSettings("muon", learning_rate=0.01))
    adam = build_optimizer(twin, OptimizerSettings("adamw", learning_rate=0.01))
    name = "model.layers.1.mlp.up_proj.weight"
    matrix, gradients = model.get_parameter(name), []
    for _ in range(4):
        for one, other in zip(model.parameters(), twin.parameters()):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        gradients.append(matrix.grad.clone())
        before = matrix.detach().clone()
        muon.step()
        adam.step()
    momentum = torch.zeros_like(before)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
    u, _, v = torch.linalg.svd(0.95 * momentum + 0.05 * gradients[-1], full_matrices=False)  # Nesterov's step ahead
    update = before * (1 - 0.01 * 0.1) - matrix.detach()
    assert F.cosine_similarity(update.flatten(), (u @ v).flatten(), dim=0) > 0.97
    assert update.square().mean().sqrt() == pytest.approx(0.01 * 0.2, rel=0.2), "of the size of an update of Adam"
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "embed" in name:
            torch.testing.assert_close(parameter, twin.get_parameter(name), atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(optimizer, data, tmp_path):
    flags = ["--batch_size", "8", "--optimizer", optimizer, "--learning_rate", "1e-2", "--epochs", "1", *ONCE]
    observe(data, tmp_path / "out", *flags)
    losses = [record["loss"] for record in records(tmp_path / "out") if "loss" in record]
    assert losses[-1] < losses[0] - 0.8, losses


def test_clipping_bounds_the_update_and_the_log_shows_the_norm_before_it(data, tmp_path):
    seen = observe(data, tmp_path / "out", "--batch_size", "2", "--max_steps", "2", "--grad_clip", "0.01", *ONCE)
    norms = [record["grad_norm"] for record in records(tmp_path / "out") if "grad_norm" in record]
    assert norms == pytest.approx([gradient.norm().item() for gradient in seen.gradients], rel=1e-4)
    assert min(norms) > 0.01
    state = load_file(tmp_path / "out/training_state/state.safetensors")
    moments = flat(value for key, value in state.items() if key.endswith("/exp_avg"))
    assert 0 < moments.norm() <= 0.01, "the optimizer was given a gradient above the limit"


# ------------------------------------------------------------------------------------------ what a run prints and keeps


def test_the_first_loss_is_that_of_a_model_that_knows_nothing(data, tmp_path, capsys):
    observe(data, tmp_path / "out", "--batch_size", "2", "--max_steps", "1", *ONCE)
    assert records(tmp_path / "out")[0]["val_loss"] == pytest.approx(math.log(6400), abs=0.05)
    assert "warning" not in capsys.readouterr().out


def test_a_first_loss_that_is_too_high_is_warned_of(data, tmp_path, capsys):
    model = CausalLM(SMALL_CONFIG)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)
    observe(data, tmp_path / "out", "--batch_size", "2", "--max_steps", "1", *ONCE, model=model)
    assert "warning" in capsys.readouterr().out


def test_a_checkpoint_before_the_first_line_of_the_log_can_be_written(data, tmp_path):
    flags = ["--batch_size", "2", "--max_steps", "3", "--save_interval", "1", "--log_interval", "50"]
    observe(data, tmp_path / "out", *flags, "--eval_rows", "2")
    assert [record["step"] for record in records(tmp_path / "out")] == [0, 3]


FIRST, SECOND = {"step": 0, "tokens": 0, "val_loss": 8.7}, {"step": 1, "tokens": 9, "loss": 8.6, "margin": 0.1}


@pytest.mark.parametrize("lines", [[FIRST], [FIRST, SECOND], [SECOND, SECOND | {"val_loss": 8.5}], []], ids=str)
def test_the_curves_can_be_drawn_whatever_there_is(lines, tmp_path, recwarn):
    plot(lines, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not [str(warning.message) for warning in recwarn]


def test_the_folder_holds_all_that_was_promised(data, tmp_path):
    observe(data, tmp_path / "out", "--batch_size", "2", "--max_steps", "2", *ONCE)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        *("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "training_state", "metrics.jsonl", "loss.png", "run.json"),
    }
    run = json.loads((tmp_path / "out/run.json").read_text("utf-8"))
    assert run["arguments"]["max_steps"] == 2
    assert run["versions"]["torch"] == torch.__version__
    record = records(tmp_path / "out")[-1]
    assert record.keys() >= {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_s", "val_loss"}


def test_tokens_in_the_log_are_the_real_ones(data, tmp_path):
    observe(data, tmp_path / "out", "--batch_size", "16", "--epochs", "1", *ONCE)
    assert records(tmp_path / "out")[-1]["tokens"] == PackedDataset(data, "train", 96).n_tokens


# ----------------------------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize(
    ("flags", "steps"),
    [(["--max_steps", "2"], 2), (["--epochs", "2"], 2 * 3), (["--epochs", "1", "--max_steps", "99"], 3)],
    ids=["steps", "epochs", "the nearer one"],
)
def test_steps_and_epochs_end_the_run(flags, steps, data, tmp_path):
    assert len(PackedDataset(data, "train", 96)) == 36  # 16 + 16 + 4 rows an epoch
    assert len(observe(data, tmp_path / "out", "--batch_size", "16", *ONCE, *flags).weights) == steps


def test_every_epoch_sees_every_document_in_another_order(data, tmp_path):
    seen = []

    def recording_loss(model, batch):
        seen.extend(batch.documents if batch.split == "train" else [])
        return loss.next_token_loss(model, batch)

    observe(data, tmp_path / "out", "--batch_size", "16", "--epochs", "2", *ONCE, loss_fn=recording_loss)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert sorted(first) == sorted(second) == sorted(PackedDataset(data, "train", 96).piece_document.tolist())
    assert first != second


def test_minutes_end_the_run_and_the_cosine_with_it(data, tmp_path):
    flags = ["--batch_size", "2", "--epochs", "1000", "--max_minutes", "0.01", "--learning_rate", "1e-3"]
    updates = len(observe(data, tmp_path / "out", *flags, "--eval_rows", "2", "--log_interval", "1").weights)
    assert 1 <= updates < 1000 * math.ceil(len(PackedDataset(data, "train", 96)) / 2)
    last = records(tmp_path / "out")[-1]
    assert last["minutes"] >= 0.01
    assert updates == last["step"]


# ------------------------------------------------------------------------------------------------------------ the flags


def parsed(monkeypatch, *flags, **defaults):
    monkeypatch.setattr(sys, "argv", ["test", *flags])
    return parse_flags("", **defaults)


def test_a_preset_beats_the_stage_and_the_command_line_beats_both(monkeypatch):
    monkeypatch.setitem(TRAINING_FLAGS, "tiny", {"learning_rate": 0.5, "batch_size": 7})
    args = parsed(monkeypatch, "--preset", "tiny", "--batch_size", "3", learning_rate=0.1, batch_size=2, epochs=9)
    assert (args.learning_rate, args.batch_size, args.epochs) == (0.5, 3, 9)
    args = parsed(monkeypatch, learning_rate=0.1, batch_size=2)
    assert (args.learning_rate, args.batch_size) == (0.1, 2)


@pytest.mark.parametrize("preset", TRAINING_FLAGS)
def test_the_measured_flags_of_every_preset_exist(preset, monkeypatch):
    known = vars(parsed(monkeypatch))
    assert TRAINING_FLAGS[preset].keys() <= known.keys()


@pytest.mark.parametrize(
    "flags",
    [
        "--batch_size 0",
        "--batch_size -2",
        "--epochs two",
        "--max_steps 0",
        "--preset huge",
        "--dtype int8",
        "--optimizer sgd",
        "--batch 4",
        "--nonsense",
        "--device quantum",
        "--max_minutes 0",
        "--max_minutes -1",
        "--warmup_steps -1",
        "--learning_rate -1",
        "--learning_rate nan",
        "--grad_clip 0",
        "--weight_decay -0.1",
        "--seed -1",
        "--max_seq_len 4096",
    ],
)
def test_an_impossible_value_is_refused_with_the_flag_named(flags, data, run_here, tmp_path):
    common = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", "--max_seq_len", "16"]
    result = run_here(
        "1-pretrain.py", *common, "--batch_size", "1", "--max_steps", "1", "--eval_rows", "1", *flags.split()
    )
    assert result.status == 2, result.out + result.err
    assert flags.split()[0] in result.err
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------- errors about the input


def test_missing_data_is_answered_with_the_command_that_makes_it(run_here, tmp_path):
    result = run_here("1-pretrain.py", "--data", tmp_path / "nothing", "--preset", "tiny")
    assert "python data_process.py pretrain" in result.error_line(status=2)


def test_data_of_another_vocabulary_are_refused(run_here, tmp_path):
    documents = make_documents("pretrain", 8, seed=1)
    data = write_data(tmp_path / "data", documents[2:], documents[:2])
    change_meta(data, vocab_size=5000)
    error = run_here("1-pretrain.py", "--data", data, "--preset", "tiny").error_line(status=2)
    assert "5000" in error
    assert "6400" in error


def test_data_of_another_tokenizer_than_the_models_are_refused(base_dir, run_here, tmp_path):
    chats = make_documents("sft", 8, seed=1)
    data = write_data(tmp_path / "data", chats[2:], chats[:2], kind="sft")
    change_meta(data, tokenizer_sha256="0" * 64)
    flags = ["--data", data, "--init_from", base_dir, "--out_dir", tmp_path / "out"]
    assert "another tokenizer" in run_here("2-sft.py", *flags).error_line(status=2)


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_without_a_text_are_refused(split, run_here, tmp_path):
    documents = make_documents("pretrain", 8, seed=1)
    train, val = ([], documents) if split == "train" else (documents, [])
    data = write_data(tmp_path / "data", train, val)
    out_dir = tmp_path / "out"
    flags = ["--preset", "tiny", "--max_seq_len", "32", "--batch_size", "2", "--out_dir", out_dir]
    assert "more" in run_here("1-pretrain.py", "--data", data, *flags).error_line(status=2)


# ------------------------------------------------------------------------------------------------------------- machines


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_takes_a_step_on_a_cpu(dtype, data, tmp_path):
    flags = ["--dtype", dtype, "--batch_size", "1", "--max_seq_len", "32", "--max_steps", "2", "--eval_rows", "1"]
    seen = observe(data, tmp_path / "out", *flags, "--log_interval", "1")
    assert not torch.equal(seen.weights[0], seen.weights[-1])
    assert seen.weights[-1].dtype == torch.float32
    record = records(tmp_path / "out")[-1]
    assert record["loss"] == pytest.approx(math.log(6400), abs=0.3)


def test_checkpointed_gradients_are_the_same(data, tmp_path):
    flags = ["--batch_size", "4", "--max_steps", "1", *ONCE]
    plain = observe(data, tmp_path / "plain", *flags)
    recomputed = observe(data, tmp_path / "recomputed", *flags, "--grad_checkpointing")
    assert relative_difference(recomputed.gradients[0], plain.gradients[0]) < 1e-6


def test_torchrun_starts_it_and_wandb_stays_out(data, tmp_path):
    """The real launcher, and the script as it is: nothing is patched, there is but a check at the end."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
    (tmp_path / "check.py").write_text(code + "assert 'wandb' not in sys.modules")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "check.py"]
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", "--max_seq_len", "64"]
    result = subprocess.run(
        [
            sys.executable,
            *launcher,
            "1-pretrain.py",
            *flags,
            "--batch_size",
            "2",
            "--max_steps",
            "2",
            "--eval_rows",
            "2",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done: 2 steps") == 1, "each process prints"
    assert "machine  2 x cpu" in result.stdout
    assert (tmp_path / "out/model.safetensors").exists()
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
