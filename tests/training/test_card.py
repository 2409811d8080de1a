"""Training on a card, without one: number formats, the loss head in 16 bits, the scaler, what waits for the device."""

import copy
import json
import math
import os

import numpy as np
import pytest
import torch
from helpers import (
    ONCE,
    Processes,
    make_documents,
    observe,
    relative_difference,
    run_stage,
    saved_progress,
    write_data,
)
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from base.cli import UserError
from bench.train_speed import made_up_batch
from model import device as devices
from model.device import choose_device, note_unused_gpu
from model.LMConfig import PRESETS, LMConfig
from model.lora import apply_lora, lora_layers, narrow_frozen
from model.model import CausalLM
from training import loss
from training.balance import count_each
from training.loss import (
    CARD_CHUNK,
    CARD_LOGITS,
    TokenLosses,
    cross_entropy_sum,
    loss_chunk,
    next_token_loss,
    token_losses,
)
from training.machine import Machine, auto_dtype
from training.optimizer import GradientBuffer, OptimizerSettings, build_optimizer, optimizer_step
from training.packing import IGNORE, PackedDataset
from training.rollouts import RolloutBatch


@pytest.mark.parametrize(
    ("card", "capability", "dtype"),
    [
        ("", (0, 0), torch.float32),
        ("NVIDIA GeForce GTX 1060 6GB", (6, 1), torch.float32),
        ("NVIDIA GeForce GTX 1650", (7, 5), torch.float32),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), torch.float32),
        ("Tesla T4", (7, 5), torch.float16),
        ("NVIDIA GeForce RTX 2060", (7, 5), torch.float16),
        ("NVIDIA GeForce RTX 3050", (8, 6), torch.bfloat16),
        ("NVIDIA H100 80GB HBM3", (9, 0), torch.bfloat16),
    ],
)
def test_each_card_has_its_number_format(card, capability, dtype):
    assert auto_dtype(card, capability) == dtype


# ------------------------------------------------------------------------------------------------------------- the loss


def random_head(tokens: int, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(50, (tokens,))
    labels[::7] = IGNORE
    return hidden, weight, labels


def test_the_loss_by_chunks_has_the_right_gradients(monkeypatch):
    monkeypatch.setattr(loss, "CARD_CHUNK", 4)
    hidden, weight, labels = random_head(10, torch.float64)
    chunked = TokenLosses.apply(hidden, weight, labels, torch.float64)
    torch.testing.assert_close(chunked, token_losses(hidden, weight, labels))
    assert (chunked == 0).tolist() == (labels == IGNORE).tolist()
    assert torch.autograd.gradcheck(lambda h, w: TokenLosses.apply(h, w, labels, torch.float64), (hidden, weight))
    assert TokenLosses.apply(hidden[:0], weight, labels[:0], torch.float64).shape == (0,)


def test_a_large_vocabulary_has_smaller_chunks_on_a_card():
    card = torch.device("cuda")
    assert loss_chunk(card, 6400) == CARD_CHUNK
    for vocab_size in (49152, 128256, 151936, 2**30):
        chunk = loss_chunk(card, vocab_size)
        assert chunk == 1 or vocab_size * chunk <= CARD_LOGITS < vocab_size * (chunk + 1)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = random_head(10)
    expected = torch.autograd.grad(TokenLosses.apply(hidden, weight, labels, torch.float32).sum(), hidden)[0]
    weight.requires_grad_(False)
    TokenLosses.apply(hidden, weight, labels, torch.float32).sum().backward()
    assert weight.grad is None
    assert torch.equal(hidden.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_matrices_in_16_bits_train_an_adapter_as_before(dtype):
    torch.manual_seed(0)
    model = CausalLM(LMConfig(**PRESETS["tiny"]))
    apply_lora(model, r=4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    narrow = copy.deepcopy(model)
    narrow_frozen(narrow, dtype)
    kinds = {name: parameter.dtype for name, parameter in narrow.named_parameters()}
    assert kinds["model.embed_tokens.weight"] == kinds["model.layers.0.mlp.up_proj.weight"] == dtype
    assert {kind for name, kind in kinds.items() if "lora_" in name or "norm" in name} == {torch.float32}
    ids = torch.randint(6400, (2, 65))
    labels, losses = ids[:, 1:].flatten(), []
    for network in (model, narrow):
        with torch.autocast("cpu", dtype):
            losses.append(network(ids[:, :-1], head=lambda h, w: cross_entropy_sum(h.flatten(0, 1), w, labels)))
        (losses[-1] / 128).backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    for (name, parameter), other in zip(model.named_parameters(), narrow.parameters()):
        if parameter.requires_grad:
            assert relative_difference(other.grad, parameter.grad) < 0.05, name


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_a_head_in_16_bits_sums_in_32(dtype, error):
    """The sum of so many tokens is beyond float16, and none is rounded to a few digits."""
    hidden, weight, labels = random_head(CARD_CHUNK * 9)
    exact = cross_entropy_sum(hidden, weight, labels)
    gradients = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", dtype):
        total = cross_entropy_sum(hidden, weight, labels)
    assert exact > 65_504
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=1e-4)
    for ours, expected in zip(torch.autograd.grad(total, (hidden, weight)), gradients):
        assert ours.dtype == torch.float32
        assert relative_difference(ours, expected) < error


# ----------------------------------------------------------------------------------------------------------- no waiting


class Transfers(TorchDispatchMode):
    """Counts copies from a device to the CPU, and between a device's tensors and others."""

    def __init__(self):
        super().__init__()
        self.to_device = self.to_host = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
            if kwargs["device"].type == "cpu":
                self.to_host += 1
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
            self.to_device += 1
            assert kwargs.get("non_blocking")
        return function(*args, **kwargs)


def test_a_step_copies_a_batch_once_and_waits_once(monkeypatch):
    """On tensors without values, of which torch's AdamW has no fused kernel; any other question to them raises."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **options: adamw(groups, **options))
    machine, device = Machine(0, 1, torch.device("meta"), torch.float32), torch.device("meta")
    with device:
        model = CausalLM(LMConfig(**PRESETS["tiny"])).train()
    buffer = GradientBuffer(list(model.parameters()), metrics={})
    optimizer = build_optimizer(model, OptimizerSettings("muon"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = made_up_batch(2, 64, 6400)
    with Transfers() as transfers:
        on_device = batch.to(device)
        loss_sum, count, _ = next_token_loss(model, on_device)
        loss_sum.backward()
        buffer.add_sums(loss=loss_sum.detach(), count=count, real_tokens=batch.real_tokens, flops=1e9)
        assert (transfers.to_device, transfers.to_host) == (1, 0)
        sums = buffer.all_reduce(machine, 1.0, lambda: None)
        assert (transfers.to_device, transfers.to_host) == (2, 1)
        optimizer_step(optimizer, buffer, scaler, sums | {"grad_norm": 2.0}, grad_clip=1.0)
    assert (transfers.to_device, transfers.to_host) == (2, 1)


def test_the_next_batch_is_made_before_the_device_is_waited_for(data, tmp_path, monkeypatch):
    events, make, reduce = [], PackedDataset.batch, GradientBuffer.all_reduce

    def made(self, rows):
        events.append(f"batch {self.split}")
        return make(self, rows)

    def reduced(*args):
        events.append("wait")
        return reduce(*args)

    monkeypatch.setattr(PackedDataset, "batch", made)
    monkeypatch.setattr(GradientBuffer, "all_reduce", reduced)
    observe(data, tmp_path / "out", "--batch_size", "2", "--max_steps", "3", *ONCE)
    steps = [event for event in events if event != "batch val"]
    assert steps == ["batch train", *["batch train", "wait"] * 3]


def test_counting_is_bincount():
    numbers = torch.tensor([0, 3, 3, 1])
    assert count_each(numbers, 6).equal(numbers.bincount(minlength=6))


# ----------------------------------------------------------------------------------------------------------- the scaler


def scaler_state(out_dir) -> dict:
    with safe_open(out_dir / "training_state/state.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["info"])["scaler"]


HALF = ["--dtype", "float16", "--batch_size", "1", "--max_seq_len", "32", "--eval_rows", "1", "--log_interval", "1"]


def test_float16_works_in_a_process_without_a_row(tmp_path):
    document = make_documents("pretrain", 1, seed=3)[0][:30]
    data = write_data(tmp_path / "data", [document], [document])
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", *HALF, "--max_steps", "2"]
    arguments = (None, "1-pretrain.py", *flags, "--device", "cpu", "--epochs", "2")
    results = Processes(tmp_path / "run", run_stage, *arguments, processes=2).wait()
    assert [result.status for result in results] == [0, 0], results
    assert saved_progress(tmp_path / "out")["step"] == 2


def test_an_overflow_halves_the_scale_and_is_not_taken_for_broken_data(data, tmp_path, capsys, monkeypatch):
    """Twelve in a row do not end the run, which ends after ten steps of broken data; and the scale is resumed."""
    step, calls = GradientBuffer.all_reduce, []

    def overflowing(self, *args):
        calls.append(1)
        if len(calls) <= 12:
            self.gradients[0] = math.inf
        return step(self, *args)

    monkeypatch.setattr(GradientBuffer, "all_reduce", overflowing)
    flags = [*HALF, "--epochs", "9", "--save_interval", "1000", "--eval_interval", "1000"]
    observe(data, tmp_path / "out", *flags, "--max_steps", "13")
    assert scaler_state(tmp_path / "out")["scale"] == 65536 / 2**12
    said = capsys.readouterr().out
    assert said.count("float16 overflowed") == 12
    assert "skipped" not in said
    observe(data, tmp_path / "out", *flags, "--max_steps", "14", "--resume")
    state = scaler_state(tmp_path / "out")
    assert (state["scale"], state["_growth_tracker"]) == (16.0, 2)


# ----------------------------------------------------------------------------------------------------------- the device


def test_a_machine_without_a_gpu_computes_on_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="--device cuda"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("requested", "cuda", "driver", "lines"),
    [("auto", "13.0", True, 1), ("auto", "13.0", False, 0), ("auto", None, True, 0), ("cpu", "13.0", True, 0)],
)
def test_an_unused_gpu_is_reported_once_where_a_driver_is_installed(
    requested, cuda, driver, lines, monkeypatch, capsys
):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    del os.environ[devices.GPU_NOTE]
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name if driver else None)
    monkeypatch.setattr(devices.os.path, "exists", lambda path: False)
    choose_device(requested)
    assert capsys.readouterr() == ("", "")
    for _ in range(2):
        note_unused_gpu()
    assert capsys.readouterr().out.count("no GPU found, although torch is built for CUDA 13.0") == lines


def test_the_first_lines_say_how_it_attends(data, tmp_path, capsys):
    observe(data, tmp_path / "out", "--batch_size", "2", "--max_steps", "1", *ONCE)
    assert "attention manual" in capsys.readouterr().out


def test_sums_of_the_host_and_of_the_device_add_up():
    buffer = GradientBuffer([torch.nn.Parameter(torch.zeros(2))], {"load": (2,)})
    buffer.gradients[:] = torch.tensor([3.0, 4.0])
    buffer.add_sums(loss=torch.tensor(2.0), count=3, load=torch.tensor([1, 2]))
    buffer.add_sums(loss=1.5, count=2, load=torch.tensor([1, 2]))
    sums = buffer.all_reduce(Machine(0, 1, torch.device("cpu"), torch.float32), 10.0, lambda: None)
    assert (sums["loss"], sums["count"], sums["grad_norm"]) == (3.5, 5, 10.0)
    assert np.array_equal(sums["load"], [2, 4])
    assert buffer.gradients.tolist() == [6, 8]


def test_random_numbers_are_taken_up_again_also_from_a_run_on_a_card():
    machine = Machine(0, 1, torch.device("cpu"), torch.float32)
    state = machine.random_state()
    drawn = torch.rand(3)
    machine.set_random_state(torch.cat((state, torch.zeros(16, dtype=torch.uint8))))  # the card's stands behind
    assert torch.rand(3).equal(drawn)


def test_what_a_stage_adds_to_a_batch_goes_to_the_device_too():
    batch = made_up_batch(2, 64, 6400)
    tensors = (batch.input_ids, batch.labels, batch.position_ids, batch.document_index)
    own = torch.ones(2, 64), torch.zeros(2, 64)
    rollouts = RolloutBatch(*tensors, [0], "train", 128, 0, *own)
    assert rollouts.scored == 128
    moved = rollouts.to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.advantages.dtype == torch.float32
