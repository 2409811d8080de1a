"""The layout for decoding: the same model, in float32 and nearly so in float16, and how eval.py asks for it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TOKENIZER, greedy, prompt, sharp_model
from torch.utils._python_dispatch import TorchDispatchMode

from engine import cache, decoding, generation
from engine.decoding import (
    FEW_ROWS,
    DecodingAttention,
    DecodingFeedForward,
    DecodingNorm,
    FusedLinear,
    FusedNorm,
    HalfLinear,
    PackedLinear,
    pack_for_decoding,
)
from engine.generation import Engine, Sampling, Sequence
from model.checkpoint import save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM

SIZES = {"num_hidden_layers": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama": PRESETS["tiny"] | SIZES | {"qk_norm": False},
    "qk_norm": PRESETS["tiny"] | SIZES,
    "as many keys as queries": PRESETS["tiny"] | SIZES | {"num_key_value_heads": 3},
    "untied": PRESETS["tiny"] | SIZES | {"tie_word_embeddings": False},
    "inner sizes that no part divides": PRESETS["tiny"] | SIZES | {"intermediate_size": 254},
    "sigmoid experts": PRESETS["tiny-moe"] | SIZES,
    "softmax experts": PRESETS["tiny-moe"] | SIZES | {"scoring_func": "softmax"},
    "relu2": PRESETS["tiny"] | SIZES | {"hidden_act": "relu2"},
    "gelu experts": PRESETS["tiny-moe"] | SIZES | {"hidden_act": "gelu_pytorch_tanh"},
}
NARROW = {"hidden_size": 96, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32}
CONFIGS |= {preset: flags | SIZES | NARROW for preset, flags in PRESETS.items()}  # each with its own heads
needs_fbgemm = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs FBGEMM")


def models(name: str, half_weights: bool = False):
    """A model, and the same laid out. Norms that are not 1, so that a forgotten weight shows."""
    model = sharp_model(LMConfig(**CONFIGS[name]))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model, pack_for_decoding(model, half_weights)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_changes_no_logit_and_no_text(name):
    model, packed = models(name)
    for rows, length in ((1, 1), (3, 4), (2, FEW_ROWS)):
        ids = torch.tensor([prompt(length, seed) for seed in range(rows)])
        expected = model(ids)
        torch.testing.assert_close(packed(ids), expected, atol=1e-4 * expected.std().item(), rtol=1e-4)
    prompts = [prompt(length, seed=length) for length in (5, 12, 1)]
    expected = greedy(model, prompts, 20)
    assert len({*sum(expected, [])}) > 6, "too dull to tell anything"
    assert greedy(packed, prompts, 20) == expected
    assert [greedy(packed, [one], 20)[0] for one in prompts] == expected


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("part", [DecodingFeedForward, DecodingAttention, DecodingNorm])
def test_a_layer_that_decodes_otherwise_is_reported(part, preset, monkeypatch):
    """Even with the weights of a model that has not been trained, which differ least."""
    forward = {
        DecodingFeedForward: lambda self, x: self.down_proj(F.gelu(self.gate_up_proj(x).chunk(2, -1)[0])),
        DecodingAttention: lambda self, x, *_: torch.zeros_like(x),
        DecodingNorm: lambda self, x: 1.01 * F.rms_norm(x, self.weight.shape[-1:]) * self.weight,
    }
    monkeypatch.setattr(part, "forward", forward[part])
    monkeypatch.setattr(decoding, "_COMPARED", set())
    with pytest.raises(RuntimeError, match="logits differ by"):
        pack_for_decoding(CausalLM(LMConfig(**PRESETS[preset])).eval())


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1, FEW_ROWS), (1, FEW_ROWS + 1), (0, 1)], ids=str)
@pytest.mark.parametrize("product", [PackedLinear, pytest.param(HalfLinear, marks=needs_fbgemm)])
def test_a_product_is_that_of_its_layers_side_by_side(shape, product):
    layers = [torch.nn.Linear(64, n_out, bias=False) for n_out in (24, 8)]
    with torch.inference_mode():
        x = torch.randn(*shape, 64)
        exact = torch.cat([layer(x) for layer in layers], dim=-1)
        # A weight is off by at most 2^-11 of itself in float16.
        bound = torch.cat([x.abs() @ layer.weight.abs().t() for layer in layers], dim=-1) / 2**11 + 1e-5
        atol = 1e-5 if product is PackedLinear else bound
        assert ((product(*layers)(x) - exact).abs() <= atol).all()


@needs_fbgemm
@pytest.mark.parametrize("name", ["qk_norm", "sigmoid experts"])
def test_half_weights_are_those_of_float16_and_nothing_else_is(name):
    model, halved = models(name, half_weights=True)
    with torch.no_grad():
        untied = torch.nn.Parameter(model.lm_head.weight.half().float())  # an embedding is looked up, not multiplied
        for parameter_name, parameter in model.named_parameters():
            if "_proj" in parameter_name:
                parameter.copy_(parameter.half())
        model.lm_head.weight = untied
        ids = torch.tensor([prompt(20)])
        expected = model(ids)
        torch.testing.assert_close(halved(ids), expected, atol=1e-4 * expected.std().item(), rtol=1e-4)


def test_half_weights_without_the_product_for_them_are_refused(monkeypatch):
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=["qnnpack"]))
    with pytest.raises(ValueError, match="no matrix product with float16 weights"):
        pack_for_decoding(sharp_model(LMConfig(**CONFIGS["llama"])), half_weights=True)


@needs_fbgemm
def test_eval_writes_with_half_weights(tmp_path, run_here):
    model, _ = models("qk_norm")
    save_model(tmp_path / "model", model, TOKENIZER)
    command = ("eval.py", "--model", tmp_path / "model", "--device", "cpu", "--prompt", "天", "--temperature", 0)
    command += ("--max_new_tokens", 8)
    assert run_here(*command, "--half_weights").out == run_here(*command).out


def test_half_weights_are_for_a_cpu_and_for_writing(tmp_path, run_here):
    result = run_here("eval.py", "--half_weights", "--model", tmp_path, "--data", tmp_path, "--device", "cpu")
    assert "--half_weights is for generation on a CPU" in result.error_line(2)


# ------------------------------------------------------------------------------------------------------------- on GPUs


def gpu_layers(dtype: torch.dtype, monkeypatch):
    layers = partial(FusedLinear, dtype=dtype), partial(FusedNorm, dtype=dtype), dtype
    monkeypatch.setattr(decoding, "decoding_layers", lambda *_: layers)
    monkeypatch.setattr(decoding, "_COMPARED", set())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qk_norm", "untied", "sigmoid experts"])
def test_the_layout_of_gpus_changes_no_text(name, monkeypatch):
    gpu_layers(torch.float32, monkeypatch)
    model, packed = models(name)
    prompts = [prompt(length, seed=length) for length in (5, 12, 1)]
    assert greedy(packed, prompts, 20) == greedy(model, prompts, 20)
    ids = torch.tensor([prompt(9)])
    torch.testing.assert_close(packed(ids), model(ids), atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qk_norm", "sigmoid experts"])
def test_in_bfloat16_weights_activations_and_cache_have_16_bits(name, monkeypatch):
    gpu_layers(torch.bfloat16, monkeypatch)
    model, packed = models(name)
    engine = Engine(packed, max_rows=2)
    for seed in range(2):
        engine.submit(Sequence(prompt(6, seed), 4))
    while engine.busy:
        engine.step()
    assert {x.dtype for x in (*engine.cache.keys, *engine.cache.values)} == {torch.bfloat16}
    ids = torch.tensor([prompt(9)])
    assert packed(ids).dtype == torch.bfloat16
    assert (packed(ids).float() - model(ids)).std() < 0.1 * model(ids).std()


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: copies to the CPU, and numbers that are asked for. Tensors without
    values answer 1."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            self.number += 1
            return 1
        to_cpu = function is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu"
        if to_cpu and args[0].is_meta:
            self.number += 1
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1)]
)
@pytest.mark.parametrize("lengths", [(5, 5), (3, 8)])
def test_a_token_of_all_rows_waits_for_a_gpu_once(sampling, lengths, monkeypatch):
    monkeypatch.setattr(decoding, "card_capability", lambda device: (8, 0))
    with torch.device("meta"):
        model = CausalLM(LMConfig(**CONFIGS["qk_norm"])).eval()
    engine = Engine(pack_for_decoding(model), max_rows=2)
    for length in lengths:
        engine.submit(Sequence(prompt(length), 9, sampling=sampling))

    def to_device(tensor, device):  # does not wait: tests/training/test_card.py
        return torch.empty_like(tensor, device=device)

    for module in (generation, cache):
        monkeypatch.setattr(module, "to_device", to_device)
    make = torch.tensor
    with Waits():
        engine.step()  # the prompts
    monkeypatch.setattr(torch, "tensor", lambda *args, device=None, **options: make(*args, **options))
    for _ in range(3):
        with Waits() as waits:
            assert len(engine.step()) == 2
        assert waits.number == 1
    assert {x.dtype for x in engine.cache.keys} == {torch.bfloat16}
