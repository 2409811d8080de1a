"""What a card computes, without one: each of its paths against plain torch, on a CPU or on tensors without values."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import random_ids, random_model, relative_difference
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.train_speed import made_up_batch
from model import experts, operators
from model import model as model_module
from model.LMConfig import HIDDEN_ACTS, PRESETS, LMConfig
from model.model import CausalLM
from model.operators import CuSeqlens, MergedWeight, attend, attention_kind, document_mask, rms_norm
from model.rope import rope_tables
from training.loss import next_token_loss
from training.machine import Machine
from training.optimizer import GradientBuffer, OptimizerSettings, build_optimizer, optimizer_step
from training.packing import Batch

LONG = torch.arange(64).repeat(2, 1)
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "kind"),
    [
        (CPU, (0, 0), torch.float32, 64, "manual"),
        (CUDA, (9, 0), torch.bfloat16, 64, "flash"),
        (CUDA, (8, 6), torch.float16, 64, "flash"),
        (CUDA, (8, 0), torch.float32, 64, "masked"),
        (CUDA, (8, 0), torch.bfloat16, 20, "masked"),
        (CUDA, (8, 0), torch.bfloat16, 264, "masked"),
        (CUDA, (7, 5), torch.float16, 64, "masked"),
        (MPS, (0, 0), torch.float32, 64, "masked"),
    ],
    ids=str,
)
def test_each_machine_has_its_attention(device, capability, dtype, head_dim, kind):
    assert attention_kind(device, dtype, head_dim, capability) == kind


def plain_flash(query, key, value, cu_seqlens, max_seqlen):
    """flash_attention in plain torch, with what its kernel wants and does not check."""
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype.itemsize == 2
    assert cu_seqlens.dtype == torch.int32
    out = []
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        assert end - start <= max_seqlen
        q, k, v = (x[start:end].transpose(0, 1).float() for x in (query, key, value))  # (heads, n, D)
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
    return torch.cat(out).to(query.dtype)


def test_flash_attention_gets_the_documents_that_attention_by_hand_gets(monkeypatch):
    monkeypatch.setattr(operators, "flash_attention", plain_flash)
    torch.manual_seed(0)
    positions = torch.tensor([[*range(7), *range(5), *range(4)], [*range(16)]])
    q, k, v = (torch.randn(2, heads, 16, 8, requires_grad=True) for heads in (6, 2, 2))
    results = []
    for kind in ("manual", "masked", "flash"):
        mask = document_mask(positions, kind)
        inputs = (q, k, v.bfloat16()) if kind == "flash" else (q, k, v)  # as under autocast
        out = attend(*inputs, mask).float()
        results.append((out, *torch.autograd.grad(out.tanh().sum(), (q, k, v))))
    for name, *found in zip(("out", "q", "k", "v"), *results):
        assert relative_difference(found[1], found[0]) < 1e-5, name
        assert relative_difference(found[2], found[0]) < 2e-2, name


def test_the_kernel_of_flash_attention_takes_these_arguments_in_every_torch():
    """On tensors without values: fewer key heads than query heads, forward and backward, compiled too."""
    with torch.device("meta"):
        q, k, v = (torch.empty(16, heads, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
        cu_seqlens = torch.empty(3, dtype=torch.int32)
    compiled = torch.compile(operators.flash_attention, backend="aot_eager", fullgraph=True)
    for kernel in (operators.flash_attention, compiled):
        out = kernel(q, k, v, cu_seqlens, 16)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert [x.shape for x in (out, *gradients)] == [q.shape, q.shape, k.shape, v.shape]


def refusing(error: Exception):
    def kernel(*args):
        raise error

    return kernel


@pytest.mark.parametrize(
    ("capability", "kernel", "kind"),
    [
        ((9, 0), plain_flash, "flash"),
        ((7, 5), refusing(AssertionError("is not asked")), "masked"),
        ((9, 4), refusing(RuntimeError("FlashAttention on ROCm supports other GPUs")), "masked"),
        ((8, 6), refusing(TypeError("_flash_attention_forward() got other arguments")), "masked"),
        ((8, 6), lambda q, k, v, *_: (q + k + v) * torch.nan, "masked"),
    ],
)
def test_flash_attention_is_tried_once_on_a_card_that_should_have_it(capability, kernel, kind, monkeypatch):
    monkeypatch.setattr(operators, "FLASH_WORKS", True)
    monkeypatch.setattr(operators, "card_capability", lambda device: capability)
    monkeypatch.setattr(operators, "flash_attention", kernel)
    operators.try_flash(CPU)
    assert operators.attention_here(CUDA, torch.bfloat16, 64) == kind


def test_a_torch_built_without_flash_attention_is_not_tried(monkeypatch):
    monkeypatch.setattr(operators, "FLASH_WORKS", False)
    monkeypatch.setattr(operators, "card_capability", lambda device: (9, 0))
    monkeypatch.setattr(operators, "flash_attention", refusing(AssertionError("is not asked")))
    operators.try_flash(CPU)
    assert operators.attention_here(CUDA, torch.bfloat16, 64) == "masked"


def test_a_batch_brings_its_offsets_and_they_are_those_of_its_positions():
    batch = made_up_batch(4, 128, 6400)
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.shape == moved.labels.shape == (4, 128)
    assert moved.cu_seqlens.cu_seqlens.dtype == torch.int32
    found = document_mask(batch.position_ids, "flash").cu_seqlens.tolist()
    assert len(moved.cu_seqlens.cu_seqlens) == 1 << (len(found) - 1).bit_length()
    assert found[0] == 0
    assert found[-1] == 4 * 128
    assert document_mask(batch.position_ids, "flash", CuSeqlens(moved.position_ids, 1)).max_seqlen == 1


class FastKernelsOnly(TorchFunctionMode):
    """Fails where scaled_dot_product_attention would fall to torch's slow kernel on a card."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            self.calls += 1
            assert q.shape[1] == k.shape[1] == v.shape[1], "unequal heads"
            assert q.dtype == k.dtype == v.dtype
            assert not kwargs.get("enable_gqa")
            assert kwargs.get("attn_mask") is None or not kwargs["is_causal"]
        return function(*args, **kwargs)


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_a_forward_and_backward_pass_asks_the_device_nothing(preset, monkeypatch):
    """Tensors without values cannot be asked: .item(), .tolist(), nonzero and bincount raise."""
    monkeypatch.setattr(experts, "groups_at_once", lambda *_: True)
    with torch.device("meta"):
        model = CausalLM(LMConfig(**PRESETS[preset])).train()
    batch = made_up_batch(2, 64, 6400).to(torch.device("meta"))
    with FastKernelsOnly() as mode:
        loss_sum, count, _ = next_token_loss(model, batch)
    loss_sum.backward()
    assert mode.calls == model.config.num_hidden_layers
    assert count == 2 * 64
    assert all(parameter.grad is not None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------- launches


@torch.library.custom_op("jiezi_test::norm", mutates_args=())
def fused_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In the place of a GPU's fused kernel, which takes one dtype; a CPU has none, and would launch six."""
    assert x.dtype == weight.dtype
    return torch.empty_like(x)


@torch.library.custom_op("jiezi_test::norm_backward", mutates_args=())
def fused_norm_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@torch.library.custom_op("jiezi_test::flash", mutates_args=())
def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    return torch.empty_like(q)


@torch.library.custom_op("jiezi_test::flash_backward", mutates_args=())
def flash_backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


fused_norm.register_autograd(lambda ctx, dy: fused_norm_backward(dy, *ctx.saved_tensors), setup_context=keep_inputs)
flash.register_autograd(lambda ctx, d_out: flash_backward(d_out, *ctx.saved_tensors), setup_context=keep_inputs)
LAUNCHES = {"norm_backward": 2}  # kernels of an operation, where there is more than one


class Launches(TorchDispatchMode):
    """Counts the kernels that a GPU would launch, by operation."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if not function.is_view and name not in ("empty", "_unsafe_view", "detach"):
            self.counts[name] += LAUNCHES.get(name, 1)
        return function(*args, **(kwargs or {}))


def test_a_layer_launches_no_more_kernels_than_it_did(monkeypatch):
    """Under autocast with FlashAttention, without torch.compile: each launch keeps the host busy for microseconds."""
    monkeypatch.setattr(operators, "flash_attention", lambda q, k, v, *_: flash(q, k, v))
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: fused_norm(x, weight))
    config = LMConfig(**PRESETS["tiny"])
    assert config.qk_norm
    layer = CausalLM(config).model.layers[0].train()
    for parameter in layer.parameters():  # as GradientBuffer does
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(2, 64, config.hidden_size).bfloat16().requires_grad_()
    rope = rope_tables(LONG, config.head_dim, config.rope_theta)
    mask = CuSeqlens(torch.tensor([0, 64, 128], dtype=torch.int32), 64)
    with torch.autocast("cpu", torch.bfloat16), Launches() as forward:
        y, _ = layer(x, rope, mask)
    d_y = torch.ones_like(y)
    with Launches() as backward:
        y.backward(d_y)
    assert y.dtype == torch.bfloat16
    assert forward.counts.total() <= 29, forward.counts
    assert backward.counts.total() <= 51, backward.counts


def test_merged_weights_have_the_gradients_of_each():
    weights = [torch.randn(n, 6, requires_grad=True) for n in (4, 2, 3)]
    x = torch.randn(5, 6)
    merged = MergedWeight.apply(torch.bfloat16, *weights)
    expected = torch.cat(weights).bfloat16()
    assert merged.equal(expected)
    found, wanted = (torch.autograd.grad((x @ w.float().mT).tanh().sum(), weights) for w in (merged, expected))
    for ours, theirs in zip(found, wanted):
        assert ours.dtype == torch.float32
        assert ours.equal(theirs)


class Bfloat16Products(TorchDispatchMode):
    """Products of bfloat16 as a GPU computes them, with float32 sums; and fast on a CPU without bfloat16."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[0].dtype == torch.bfloat16:
            return function(*(x.float() for x in args)).bfloat16()
        return function(*args, **(kwargs or {}))


def losses_of_run(dtype: torch.dtype, steps: int) -> list[float]:
    """Of a `tiny` model on sentences of random words."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(16, 6400, (50, 4), generator=generator)
    model = random_model(LMConfig(**PRESETS["tiny"])).train()
    model.init_weights()
    buffer = GradientBuffer(list(model.parameters()), {})
    optimizer, machine = build_optimizer(model, OptimizerSettings("adamw", 5e-3)), Machine(0, 1, CPU, dtype)
    found = []
    for _ in range(steps):
        ids = words[torch.randint(50, (2, 17), generator=generator)].flatten(1)  # (2, 68)
        batch = Batch(ids[:, :64], ids[:, 1:65], LONG, ids, [], "train", 128, 0)
        with machine.autocast():
            loss_sum, count, _ = next_token_loss(model, batch)
        loss_sum.backward()
        buffer.add_sums(loss=loss_sum.detach(), count=count, real_tokens=128)
        sums = buffer.all_reduce(machine, 1.0, lambda: None)
        optimizer_step(optimizer, buffer, machine.scaler(), sums, grad_clip=1.0)
        found.append(sums["loss"] / count)
    return found


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_bfloat16_residual_stream_trains_as_float32_does(steps):
    exact = losses_of_run(torch.float32, steps)
    with Bfloat16Products():
        rounded = losses_of_run(torch.bfloat16, steps)
    assert exact[-1] < 0.9 * exact[0]
    for half in (slice(0, steps // 2), slice(steps // 2, steps)):
        print(f"{sum(rounded[half]) / sum(exact[half]) - 1:+.4%}")
        assert sum(rounded[half]) == pytest.approx(sum(exact[half]), rel=0.005)
    assert rounded != exact


def test_the_residual_stream_is_bfloat16_and_a_norm_sums_in_float32():
    seen, model = [], random_model(LMConfig(**PRESETS["tiny"]))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0].dtype, output[0].dtype)))
    for dtype, residual in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        with torch.autocast("cpu", dtype):
            hidden = model.model(random_ids(1, 8))
            assert model.lm_head(hidden).dtype == dtype
        assert {*seen} == {residual}
        seen.clear()
    x = torch.full((1, 4096), 1 / 256).bfloat16()  # a bfloat16 sum of its squares would stop growing
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(x, torch.ones(4096), 0.0).eq(1).all()


# -------------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize(
    ("capability", "hip", "known", "at_once"),
    [
        ((9, 0), None, True, True),
        ((8, 6), None, True, False),
        ((10, 0), None, True, False),  # an expert without visitors gets a gradient there
        ((9, 4), "7.0", True, False),
        ((9, 0), None, False, False),  # torch 2.9
    ],
)
def test_experts_are_grouped_only_where_the_kernel_is_right(capability, hip, known, at_once, monkeypatch):
    monkeypatch.setattr(experts, "card_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)
    if not known:
        monkeypatch.delattr(F, "grouped_mm")
    assert experts.groups_at_once(torch.zeros(8, 8, dtype=torch.bfloat16), 8, 16) == at_once


def random_visits():
    torch.manual_seed(0)
    M, k, E, H, m = 20, 3, 6, 8, 8
    tokens, gate_up, down = (torch.randn(*shape, dtype=torch.float64) for shape in ((M, H), (E, 2 * m, H), (E, H, m)))
    weights = torch.rand(M, k, dtype=torch.float64)
    chosen = torch.rand(M, E - 1).topk(k).indices  # nobody visits the last
    return [tokens.requires_grad_(), weights.requires_grad_(), chosen, gate_up.requires_grad_(), down.requires_grad_()]


@pytest.mark.parametrize("hidden_act", HIDDEN_ACTS)
def test_the_operators_gradients_are_right(hidden_act):
    tokens, weights, chosen, gate_up, down = random_visits()

    def visit(tokens, weights, gate_up, down):
        return experts.visit_experts(tokens, weights, chosen, gate_up, down, hidden_act)[0]

    assert torch.autograd.gradcheck(visit, (tokens, weights, gate_up, down))
    torch.library.opcheck(experts.visit_experts, (tokens, weights, chosen, gate_up, down, hidden_act))


grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch before 2.10")


@pytest.mark.parametrize(
    ("at_once", "hidden_act"),
    [(False, "silu"), pytest.param(True, "silu", marks=grouped), pytest.param(True, "relu2", marks=grouped)],
)
def test_the_operator_computes_what_the_loop_does(at_once, hidden_act, monkeypatch):
    monkeypatch.setattr(experts, "groups_at_once", lambda *_: at_once)
    config = LMConfig(**PRESETS["tiny-moe"], hidden_act=hidden_act)
    model, batch, results = random_model(config).train(), made_up_batch(2, 64, 6400), []
    layer = model.model.layers[1].mlp
    for operator in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda operator=operator: operator)
            x = model.model.embed_tokens(batch.input_ids)
            y, _ = layer(x)
        gradients = torch.autograd.grad(y.tanh().sum(), (x, *layer.parameters()))
        results.append((y, *gradients))
    for loop, operator in zip(*results):
        assert relative_difference(operator, loop) < 1e-5


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_compiled_layers_are_one_graph(preset, checkpoints):
    batch, gradients = made_up_batch(2, 64, 6400), []
    for compiled in (False, True):
        model = random_model(LMConfig(**PRESETS[preset] | dict(num_hidden_layers=2))).train()
        model.model.gradient_checkpointing = checkpoints
        if compiled:
            model.model.compile(backend="aot_eager", fullgraph=True)
        next_token_loss(model, batch)[0].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative_difference(gradients[1], gradients[0]) < 1e-5


def masked_flash(query, key, value, cu_seqlens, max_seqlen):
    """plain_flash without a question to the host, to be compiled."""
    place = torch.arange(len(query), device=query.device)
    document = torch.bucketize(place, cu_seqlens, right=True)
    mask = (document[:, None] == document) & (place[:, None] >= place)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_compiled_layers_with_flash_attention_are_one_graph_for_every_batch(checkpoints, monkeypatch):
    monkeypatch.setattr(operators, "flash_attention", masked_flash)
    monkeypatch.setattr(model_module, "attention_here", lambda *_: "flash")
    graphs, gradients = CompileCounterWithBackend("aot_eager"), {}
    for compiled in (False, True):
        model = random_model(LMConfig(**PRESETS["tiny"] | dict(num_hidden_layers=2))).train()
        model.model.gradient_checkpointing = checkpoints
        if compiled:
            model.model.compile(backend=graphs, fullgraph=True)
        for lengths in ([30, 34, 64], [7, 57, 60, 4], [128]):
            positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 64) if len(lengths) > 1 else LONG
            mask = document_mask(positions, "flash")
            ends = torch.full((8,), 128, dtype=torch.int32)
            ends[: len(mask.cu_seqlens)] = mask.cu_seqlens
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.model(random_ids(2, 64), positions, CuSeqlens(ends, 64))
            hidden.float().tanh().sum().backward()
        gradients[compiled] = torch.cat([p.grad.flatten() for p in model.model.parameters()])
    assert graphs.frame_count == 1, "compiled anew for another batch"
    assert relative_difference(gradients[True], gradients[False]) < 3e-2


@torch.no_grad()
def test_key_heads_are_repeated_as_grouped_queries_would_have_them():
    q, k, v = (torch.randn(2, heads, 9, 8) for heads in (6, 2, 2))
    expected = attend(q, k, v, None)
    with torch.device("meta"):
        assert attend(*(x.to("meta") for x in (q, k, v)), None).shape == expected.shape
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=True), expected)


def test_a_model_on_a_card_decodes_with_the_loop(monkeypatch):
    """Which reads the weights of the experts that are visited, not of all."""
    model = random_model(LMConfig(**PRESETS["tiny-moe"]))
    monkeypatch.setattr(experts, "visit_experts", None)
    assert model(random_ids(1, 5)).shape == (1, 5, 6400)
