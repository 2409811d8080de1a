"""The layout for decoding: the same model, in float32 and nearly so in float16, and how eval.py asks for it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TOKENIZER, greedy, prompt, sharp_model
from torch.utils._python_dispatch import TorchDispatchMode

from engine import cache, decoding, generation
from engine.decoding import (
    FEW_ROWS,
    MANY_ROWS,
    DecodingAttention,
    DecodingFeedForward,
    DecodingNorm,
    HalfLinear,
    Int8Linear,
    PackedLinear,
    gpu_layers,
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


class CountOperators(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.n += 1
        return operator(*arguments, **(options or {}))


def models(name: str, weight_dtype: str = "float32"):
    """A model, and the same laid out. Norms that are not 1, so that a forgotten weight shows."""
    model = sharp_model(LMConfig(**CONFIGS[name]))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model, pack_for_decoding(model, weight_dtype)


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
    model, halved = models(name, "float16")
    with torch.no_grad():
        untied = torch.nn.Parameter(model.lm_head.weight.half().float())  # an embedding is looked up, not multiplied
        for parameter_name, parameter in model.named_parameters():
            if "_proj" in parameter_name:
                parameter.copy_(parameter.half())
        model.lm_head.weight = untied
        ids = torch.tensor([prompt(20)])
        expected = model(ids)
        torch.testing.assert_close(halved(ids), expected, atol=1e-4 * expected.std().item(), rtol=1e-4)


@pytest.mark.parametrize("weight_dtype", ["float16", "int8"])
def test_weights_without_the_product_for_them_are_refused(weight_dtype, monkeypatch):
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=["qnnpack"]))
    with pytest.raises(ValueError, match="no matrix product with float16 weights"):
        pack_for_decoding(sharp_model(LMConfig(**CONFIGS["llama"])), weight_dtype)


@needs_fbgemm
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1, MANY_ROWS), (1, MANY_ROWS + 1), (0, 1)], ids=str)
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 32), (64, 31), (254, 32), (20, 7)])
def test_an_int8_product_is_that_of_rounded_weights(shape, n_in, n_out):
    """A row's result depends neither on the other rows nor on which product they take."""
    layers = [torch.nn.Linear(n_in, n_out, bias=False) for n_out in (4, n_out - 4)]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    with torch.inference_mode():
        product, x = Int8Linear(*layers), torch.randn(*shape, n_in)
        rounded = product.weight * product.scales.float()[:, None]
        assert ((rounded - weight).abs() <= 0.51 * product.scales.float()[:, None]).all()
        exact = x.bfloat16().float() @ rounded.t()
        torch.testing.assert_close(product(x), exact, rtol=2**-8, atol=1e-5)
        alone = [product(row[None]) for row in x.flatten(0, 1)]
        torch.testing.assert_close(product(x).flatten(0, 1), torch.cat([exact[:0, 0], *alone]), rtol=2**-7, atol=1e-5)


@needs_fbgemm
@pytest.mark.parametrize("name", ["qk_norm", "untied", "sigmoid experts"])
def test_int8_weights_change_logits_little(name):
    model, packed = models(name, "int8")
    with torch.no_grad():
        ids = torch.tensor([prompt(20)])
        expected = model(ids)
        assert (packed(ids) - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_a_token_takes_no_more_operators_than_it_did():
    """Starting an operator takes longer than its arithmetic when a model is small."""

    def operators(n_layers: int) -> int:
        config = LMConfig(**CONFIGS["qk_norm"] | {"num_hidden_layers": n_layers})
        engine = Engine(pack_for_decoding(CausalLM(config).eval()), max_rows=1)
        engine.submit(Sequence(prompt(4), 8, sampling=Sampling(temperature=0)))
        engine.step()
        with CountOperators() as counted:
            engine.step()
        return counted.n

    two, four = operators(2), operators(4)
    assert (four - two) / 2 <= 60, "of a layer"
    assert two <= 160


@needs_fbgemm
@pytest.mark.parametrize("weight_dtype", ["float16", "int8"])
def test_eval_writes_with_smaller_weights(weight_dtype, tmp_path, run_here):
    model, _ = models("qk_norm")
    save_model(tmp_path / "model", model, TOKENIZER)
    command = ("eval.py", "--model", tmp_path / "model", "--device", "cpu", "--prompt", "天", "--temperature", 0)
    command += ("--max_new_tokens", 8)
    assert run_here(*command, "--weight_dtype", weight_dtype).out == run_here(*command).out


def test_smaller_weights_are_for_a_cpu_and_for_writing(tmp_path, run_here):
    command = ("eval.py", "--weight_dtype", "int8", "--model", tmp_path, "--data", tmp_path, "--device", "cpu")
    assert "--weight_dtype is for generation on a CPU" in run_here(*command).error_line(2)


# ------------------------------------------------------------------------------------------------------------- on GPUs


def use_gpu_layers(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(decoding, "decoding_layers", lambda *_: gpu_layers(dtype))
    monkeypatch.setattr(decoding, "_COMPARED", set())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qk_norm", "untied", "sigmoid experts"])
def test_the_layout_of_gpus_changes_no_text(name, monkeypatch):
    use_gpu_layers(torch.float32, monkeypatch)
    model, packed = models(name)
    prompts = [prompt(length, seed=length) for length in (5, 12, 1)]
    assert greedy(packed, prompts, 20) == greedy(model, prompts, 20)
    ids = torch.tensor([prompt(9)])
    torch.testing.assert_close(packed(ids), model(ids), atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qk_norm", "sigmoid experts"])
def test_in_bfloat16_weights_activations_and_cache_have_16_bits(name, monkeypatch):
    use_gpu_layers(torch.bfloat16, monkeypatch)
    model, packed = models(name)
    engine = Engine(packed, max_rows=2)
    for seed in range(2):
        engine.submit(Sequence(prompt(6, seed), 4))
    while engine.busy:
        engine.step()
    assert {x.dtype for x in (*engine.cache.keys, *engine.cache.values)} == {torch.bfloat16}
    ids = torch.tensor([prompt(9)])
    assert packed.model(ids).dtype == torch.bfloat16
    assert packed(ids).dtype == torch.float16  # in bfloat16 logits would often be equal
    assert (packed(ids).float() - model(ids)).std() < 0.1 * model(ids).std()


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: copies to the CPU, and numbers that are asked for. Tensors without
    values answer 1."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"):
            self.number += 1
            return 1
        devices = {x.type for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device)}
        if name in ("aten::_to_copy", "aten::to") and "cpu" in devices and args[0].is_meta:
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
