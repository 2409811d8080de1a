"""Training on a card, without one: number formats, the loss head in 16 bits, the scaler, what waits for the device."""

import copy
import functools
import json
import math
import os
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bench.train_speed import made_up_batch
from model import experts
from model.LMConfig import PRESETS, LMConfig
from model.lora import apply_lora, lora_layers, narrow_frozen
from model.model import CausalLM
from training import compiling, cost, loop, loss
from training import optimizer as optimizers
from training.balance import count_each
from training.compiling import compile_model, pays_to_compile
from training.cost import busiest_batch
from training.loss import (
    CARD_CHUNK,
    CARD_LOGITS,
    LOSS_CHUNK,
    TokenLosses,
    cross_entropy_sum,
    loss_chunk,
    next_token_loss,
    token_losses,
)
from training.machine import Machine, auto_dtype, backend, matmul_rate, start_machine
from training.optimizer import GradientBuffer, OptimizerSettings, build_optimizer, optimizer_step, orthogonalize
from training.packing import IGNORE, Batch, PackedDataset, open_data, to_device
from training.rollouts import RolloutBatch

CPU = torch.device("cpu")


def test_matrix_products_are_timed_with_random_numbers_and_draw_none_of_the_runs(monkeypatch):
    factors = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                factors.append(args[0])
            return function(*args, **kwargs or {})

    state = torch.get_rng_state()
    with Products():
        assert matmul_rate(Machine(0, 1, torch.device("cpu"), torch.float32), size=128) > 0
    assert factors[0].std() == pytest.approx(1, abs=0.02)
    assert torch.get_rng_state().equal(state)


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


def batch_of_documents(lengths: list[int]) -> Batch:
    """A row."""
    ids = torch.randint(16, 6400, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return Batch(ids, ids.roll(-1), positions, ids, [], "train", ids.numel(), 0)


def random_head(tokens: int, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(50, (tokens,))
    labels[::7] = IGNORE
    return hidden, weight, labels


def test_the_loss_by_chunks_has_the_right_gradients(monkeypatch):
    monkeypatch.setattr(loss, "LOSS_CHUNK", 4)
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


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_the_loss_of_an_older_torch_is_the_same(monkeypatch):
    """By chunks of another size, so that the sums have another order."""
    results = []
    for known in (True, False):
        if not known:
            monkeypatch.delattr(F, "linear_cross_entropy")
        hidden, weight, labels = random_head(LOSS_CHUNK * 3 + 5)
        total = cross_entropy_sum(hidden, weight, labels)
        results.append((total, *torch.autograd.grad(total, (hidden, weight))))
    for ours, expected in zip(results[1], results[0]):
        assert relative_difference(ours, expected) < 1e-6


# ------------------------------------------------------------------------------------------------------------ compiling


@pytest.fixture
def eager_losses():
    yield
    TokenLosses.compile(on=False)


@pytest.mark.parametrize(
    ("device", "dtype", "shards", "minutes", "compiles"),
    [
        ("cuda", torch.bfloat16, False, 9, True),
        ("cuda", torch.float16, False, 9, True),
        ("cuda", torch.bfloat16, False, 2, False),
        ("cuda", torch.bfloat16, True, 9, False),
        ("cuda", torch.float32, False, 9, False),
        ("cpu", torch.bfloat16, False, 9, False),
        ("mps", torch.bfloat16, False, 9, False),
    ],
)
def test_long_runs_on_a_gpu_compile(device, dtype, shards, minutes, compiles):
    assert pays_to_compile(Machine(0, 1, torch.device(device), dtype, shards), minutes) is compiles


def test_compiled_chunks_have_the_losses_and_gradients_of_eager_ones(monkeypatch, eager_losses):
    monkeypatch.setattr(loss, "CARD_CHUNK", 4)
    hidden, weight, labels = random_head(10, torch.float64)
    found = []
    for on in (False, True):
        TokenLosses.compile(on, backend="aot_eager")
        losses = TokenLosses.apply(hidden, weight, labels, torch.float64)
        found.append((losses.detach(), *torch.autograd.grad(losses.square().sum(), (hidden, weight))))
    for eager, compiled in zip(*found):
        torch.testing.assert_close(compiled, eager)


def test_a_model_is_not_compiled_anew_for_other_numbers_of_documents(eager_losses):
    """And its trial leaves nothing behind but its gradients, which a run sets to 0."""
    graphs, gradients, machine = CompileCounterWithBackend("aot_eager"), [], Machine(0, 1, CPU, torch.bfloat16)
    torch.manual_seed(0)
    model = CausalLM(LMConfig(**PRESETS["tiny"] | dict(num_hidden_layers=2))).train()
    batches = [batch_of_documents(lengths) for lengths in ([30, 34], [7, 10, 20, 27], [64])]
    counts = []
    for compiled in (False, True):
        state = torch.get_rng_state()
        model.zero_grad()
        if compiled:
            assert compile_model(model, machine, batches[0], backend=graphs) == ""
        assert torch.get_rng_state().equal(state)
        model.zero_grad(set_to_none=False)
        for batch in batches:
            with machine.autocast():
                next_token_loss(model, batch)[0].backward()
            counts.append(graphs.frame_count)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert counts[:3] == [0, 0, 0]
    assert 3 <= counts[3] == counts[5], "layers, losses and their gradients have a graph each"
    assert relative_difference(gradients[1], gradients[0]) < 3e-2


def broken(graph, inputs):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


def test_a_run_that_cannot_compile_says_so_and_goes_on(data, tmp_path, monkeypatch, capsys, eager_losses):
    flags = ["--batch_size", "2", "--max_steps", "2", *ONCE]
    plain = observe(data, tmp_path / "plain", *flags)
    monkeypatch.setattr(loop, "compile_model", functools.partial(compile_model, backend=broken))
    capsys.readouterr()
    found = observe(data, tmp_path / "out", *flags, "--compile")
    said = [line for line in capsys.readouterr().out.splitlines() if "without torch.compile" in line]
    assert len(said) == 1
    assert "Failed to find C compiler. Please" in said[0]
    for ours, expected in zip(found.weights, plain.weights, strict=True):
        assert ours.equal(expected)


def test_compiling_needs_triton_on_a_gpu(monkeypatch):
    monkeypatch.delattr(torch.utils, "_triton", raising=False)  # torch does not import it by itself
    assert compiling.has_triton() is False  # on a CPU
    monkeypatch.setattr(compiling, "has_triton", lambda: False)
    assert "Triton" in compile_model(None, Machine(0, 1, torch.device("cuda"), torch.bfloat16), None)


def test_the_rows_that_are_tried_are_those_with_the_most_documents(data):
    train_set, _ = open_data([str(data)], None, 128, "pretrain")
    documents = [len(train_set.batch(np.array([row])).documents) for row in range(len(train_set))]
    assert len(busiest_batch(train_set, 2).documents) == sum(sorted(documents)[-2:])
    assert busiest_batch(train_set, len(documents) + 5).input_ids.shape == (len(documents) + 5, 128)


# ----------------------------------------------------------------------------------------------------------- no waiting


@pytest.mark.parametrize(("kind", "blocks"), [("cuda", False), ("mps", True), ("xpu", True)])
def test_only_copies_to_cuda_are_not_waited_for(kind, blocks, monkeypatch):
    """On a Mac, the copy would read a source that is freed by then."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **options: calls.append(options))
    to_device(torch.zeros(3), torch.device(kind))
    assert calls == [{} if blocks else {"non_blocking": True}]


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


class OnMac(torch.Tensor):
    """A tensor on the CPU that says it is on a Mac's GPU, which had no nonzero_static before torch 2.13."""

    device = property(lambda self: torch.device("mps"))

    def nonzero_static(self, **options):
        raise NotImplementedError("aten::nonzero_static is not implemented for the MPS device")


def test_a_mac_finds_the_scored_positions():
    batch = made_up_batch(2, 64, 6400)
    batch.labels[0, ::3] = IGNORE
    batch = replace(batch, scored=int((batch.labels != IGNORE).sum()))
    expected = batch.scored_positions()
    found = replace(batch, labels=batch.labels.as_subclass(OnMac)).scored_positions()
    assert found.as_subclass(torch.Tensor).equal(expected)


class Float32Only(TorchDispatchMode):
    """A device without float64, such as a Mac's GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in pytree.tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64 or tensor.device.type == "cpu"
        return result


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_needs_no_float64(preset, optimizer, monkeypatch):
    monkeypatch.setattr(experts, "groups_at_once", lambda *_: True)
    adamw, device = torch.optim.AdamW, torch.device("meta")
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **options: adamw(groups, **options))
    with device:
        model = CausalLM(LMConfig(**PRESETS[preset])).train()
    with Float32Only():
        buffer = GradientBuffer(list(model.parameters()), metrics={})
        update = build_optimizer(model, OptimizerSettings(optimizer))
        loss_sum, count, _ = next_token_loss(model, made_up_batch(2, 64, 6400).to(device))
        loss_sum.backward()
        buffer.add_sums(loss=loss_sum.detach(), count=count)
        with Transfers():
            buffer.all_reduce(Machine(0, 1, device, torch.float32), 1.0, lambda: None)
        update.step()


def test_a_trial_that_runs_out_of_memory_frees_its_graph_before_the_cache_is_emptied(monkeypatch):
    """In the backward pass, while the loss, and with it the whole graph, is still alive."""
    alive, freed = [], []
    model = CausalLM(LMConfig(**PRESETS["tiny"])).train()

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def full_loss(model, batch):
        loss_sum = Full.apply(next_token_loss(model, batch)[0])
        alive.append(weakref.ref(loss_sum))
        return loss_sum, batch.scored, {}

    monkeypatch.setattr(cost, "next_token_loss", full_loss)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(alive[0]() is None))
    assert not cost.fits_card(made_up_batch(2, 64, 6400), Machine(0, 1, torch.device("cpu"), torch.float32), model)
    assert freed == [True]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_updates_are_orthogonalized_in_the_16_bits_that_a_gpu_is_fast_in(dtype, error, monkeypatch):
    """float16 on a T4, where bfloat16 is emulated; also of gradients that float16 could not hold."""
    matrices = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 1e-6
    exact = orthogonalize(matrices.double())
    monkeypatch.setattr(optimizers, "device_dtype", lambda device: dtype)
    result = orthogonalize(matrices)
    assert result.dtype == dtype
    assert relative_difference(result.double(), exact) < error


# -------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize(("kind", "nccl", "name"), [("cuda", True, "cpu:gloo,cuda:nccl"), ("cuda", False, "gloo")])
def test_objects_do_not_pass_through_the_gpu(kind, nccl, name, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    assert backend(torch.device(kind)) == name
    assert backend(torch.device("cpu")) == "gloo"


def orthogonalize_in_processes(file: str):
    """Five matrices in three processes: as a CPU and as a GPU would."""
    start_machine("cpu", "float32", 0)
    matrices = torch.randn(5, 8, 6, generator=torch.Generator().manual_seed(0))
    gathered, all_gather = [], optimizers.all_gather

    def recording(mine):
        gathered.append(mine.dtype)
        return all_gather(mine)

    optimizers.all_gather = recording
    exact = optimizers._orthogonalize_together(matrices)
    optimizers.device_dtype = lambda device: torch.bfloat16
    rounded = optimizers._orthogonalize_together(matrices)
    torch.save([gathered, matrices, exact, rounded], file + os.environ["RANK"])


def test_updates_are_gathered_in_the_precision_that_they_are_computed_in(tmp_path):
    results = Processes(tmp_path / "logs", orthogonalize_in_processes, str(tmp_path / "of"), processes=3).wait()
    assert [result.status for result in results] == [0] * 3, results
    for rank in range(3):
        gathered, matrices, exact, rounded = torch.load(tmp_path / f"of{rank}")
        assert gathered == [torch.float32, torch.bfloat16]
        assert exact.equal(orthogonalize(matrices))
        assert rounded.dtype == torch.float32
        assert 0 < relative_difference(rounded, exact) < 3e-2


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
