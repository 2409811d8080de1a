"""The decoder against transformers, documents against each other, the first weights, and sizes that cannot be."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import TOKENIZER, random_ids, random_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from base.cli import UserError
from base.files import write_json
from model import cpu
from model.checkpoint import load_config, load_model, save_model
from model.LMConfig import CARD_PRESETS, HIDDEN_ACTS, PRESETS, LMConfig
from model.model import CausalLM, FeedForward
from model.operators import DocumentLengths, apply_rope, document_mask
from model.rope import rope_tables

TINY = LMConfig(**PRESETS["tiny"])
ODD_SIZES = dict(  # head_dim is not hidden_size / heads, one key-value head, two matrices for input and output
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=20,
    tie_word_embeddings=False,
    rms_norm_eps=1e-4,
    rope_theta=500.0,
)
DOCUMENTS = [7, 1, 12, 3]  # tokens of each


# ------------------------------------------------------------------------------------------------- against transformers


EXPORTED = {
    "llama, odd sizes": ODD_SIZES | dict(qk_norm=False),
    "qwen3, odd sizes": ODD_SIZES,
    "llama, relu2": PRESETS["tiny"] | dict(qk_norm=False, hidden_act="relu2"),
    "qwen3, gelu": PRESETS["tiny"] | dict(hidden_act="gelu_pytorch_tanh"),
    "qwen3, tied": PRESETS["tiny"],
}


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request, tmp_path_factory):
    """One of our models, and the same loaded by transformers."""
    model = random_model(LMConfig(**EXPORTED[request.param]))
    directory = tmp_path_factory.mktemp("exported")
    save_model(directory, model, TOKENIZER)
    return model, AutoModelForCausalLM.from_pretrained(directory), directory


@torch.no_grad()
def test_transformers_computes_the_same_logits(exported):
    ours, theirs, _ = exported
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if ours.config.qk_norm else "LlamaForCausalLM")
    assert theirs.dtype == torch.float32
    ids = random_ids(2, 300)
    logits = ours(ids)
    assert logits.std() > 0.5, "too flat to tell anything"
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_transformers_decodes_the_same_tokens(exported):
    ours, theirs, _ = exported
    prompt = random_ids(1, 9)
    ids = prompt
    for _ in range(20):
        ids = torch.cat((ids, ours(ids)[:, -1:].argmax(-1)), dim=1)
    generated = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=-1
    )
    assert generated.tolist() == ids.tolist()


@torch.no_grad()
def test_what_was_saved_is_loaded_unchanged(exported):
    ours, _, directory = exported
    again = load_model(directory).eval()
    assert again.config == ours.config
    ids = random_ids(1, 20)
    assert torch.equal(again(ids), ours(ids))


def test_the_tokenizer_beside_the_model_is_loaded_by_transformers(exported):
    *_, directory = exported
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "春天来了, it is 12 degrees.\n  def f(x):"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_saved_config_says_what_transformers_cannot_guess(exported):
    ours, _, directory = exported
    config = json.loads((directory / "config.json").read_text("utf-8"))
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": ours.config.rope_theta}
    assert config["rope_theta"] == ours.config.rope_theta  # transformers 4 reads this one, or assumes 10,000
    assert config["attention_dropout"] == 0
    if ours.config.qk_norm:  # fields of Qwen's that mistral.rs has no default for
        assert config["max_window_layers"] == ours.config.num_hidden_layers
        assert (config["use_sliding_window"], config["sliding_window"]) == (False, None)
    for name in ("head_dim", "rms_norm_eps", "tie_word_embeddings", "num_key_value_heads", "vocab_size"):
        assert config[name] == getattr(ours.config, name)
    assert config["architectures"] == ["Qwen3ForCausalLM" if ours.config.qk_norm else "LlamaForCausalLM"]


@torch.no_grad()
def test_a_model_that_transformers_saved_is_loaded(tmp_path):
    config = LlamaConfig(
        vocab_size=6400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,  # transformers' default for these heads, so it may be left out of the file
        rope_parameters={"rope_type": "default", "rope_theta": 20_000.0},
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ids = random_ids(1, 50)
    torch.testing.assert_close(load_model(tmp_path).eval()(ids), theirs(ids).logits, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------- what sees what


def packed(documents: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of the documents and padding: its ids and positions."""
    pieces = [*documents, torch.zeros(length - sum(map(len, documents)), dtype=torch.int64)]
    return torch.cat(pieces)[None], torch.cat([torch.arange(len(piece)) for piece in pieces])[None]


@pytest.mark.parametrize("path", ["documents apart, as on a CPU", "one masked product, as on a GPU"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_documents_of_a_row_do_not_see_each_other(path, qk_norm, monkeypatch):
    if "GPU" in path:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = random_model(LMConfig(**PRESETS["tiny"] | {"num_hidden_layers": 2}, qk_norm=qk_norm))
    rows = [[random_ids(1, n, seed=n + 20 * row)[0] for n in DOCUMENTS[row:]] for row in range(2)]
    ids, positions = (torch.cat(parts) for parts in zip(*(packed(documents, 26) for documents in rows)))
    logits = model(ids, positions)
    apart = [model(document[None])[0] for documents in rows for document in documents]
    together = [
        logits[row, start : start + len(document)]
        for row, documents in enumerate(rows)
        for document, start in zip(documents, [sum(map(len, documents[:i])) for i in range(len(documents))])
    ]
    for a, b in zip(apart, together, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)

    target = torch.randn(6400, generator=torch.Generator().manual_seed(3))  # a loss that every logit has a part in
    gradients = torch.autograd.grad(sum((a.tanh() @ target).sum() for a in apart), list(model.parameters()))
    packed_gradients = torch.autograd.grad(sum((b.tanh() @ target).sum() for b in together), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), gradients, packed_gradients):
        assert (a - b).norm() <= 1e-5 * a.norm(), name


def test_the_ways_to_mask_say_the_same():
    positions = packed([torch.ones(n, dtype=torch.int64) for n in DOCUMENTS], 26)[1]
    assert document_mask(positions, "manual") == DocumentLengths([*DOCUMENTS, 3])
    mask = document_mask(positions, "masked")
    assert mask.shape == (1, 1, 26, 26)
    assert mask.sum() == sum(n * (n + 1) // 2 for n in [*DOCUMENTS, 3])


def random_doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_the_norm_by_hand_is_torchs():
    torch.manual_seed(0)
    x, weight = random_doubles(2, 3, 8), random_doubles(8)
    torch.testing.assert_close(cpu.Norm.apply(x, weight, 0.1), F.rms_norm(x, (8,), weight, 0.1))
    assert torch.autograd.gradcheck(cpu.Norm.apply, (x, weight, 0.1))


def test_the_rotation_by_hand_is_apply_rope(monkeypatch):
    torch.manual_seed(0)
    cos, sin = rope_tables(torch.arange(5)[None], 8, 100.0)
    x = random_doubles(2, 5, 3, 8)
    by_hand = cpu.Rotation.apply(x, cos, sin)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(by_hand, apply_rope(x, cos, sin))
    assert torch.autograd.gradcheck(cpu.Rotation.apply, (x, cos.double(), sin.double()))


@pytest.mark.parametrize("lengths", [[9], [1, 4, 3, 5], [4, 4], [3, 2, 4, 7, 3, 2]])
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 3), (1, 4), (3, 1)])
def test_attention_by_hand_is_torchs_in_each_document(lengths, kv_heads, group, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", 4)
    monkeypatch.setattr(cpu, "PADDING", 2)  # short documents are padded, also the last one
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (random_doubles(kv_heads, tokens, *shape) for shape in ((group, 6), (6,), (6,)))
    out = cpu.DocumentAttention.apply(q, k, v, lengths)
    for a, b, c, d in zip(*(x.split(lengths, dim=1) for x in (out, q, k, v))):
        for head in range(group):
            theirs = F.scaled_dot_product_attention(b[:, :, head], c, d, is_causal=True, scale=1.0)
            torch.testing.assert_close(a[:, :, head], theirs)
    assert torch.autograd.gradcheck(lambda q, k, v: cpu.DocumentAttention.apply(q, k, v, lengths), (q, k, v))


@pytest.mark.parametrize("length", [cpu.BLOCK - 1, cpu.BLOCK, 2 * cpu.BLOCK + 5])
def test_long_documents_have_the_same_gradients_by_hand_as_by_torch(length, monkeypatch):
    ids, positions = packed([random_ids(1, n)[0] for n in (length, 20, length)], 2 * length + 20)
    gradients = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        model = random_model(TINY)
        hidden = model.model(ids, positions)
        hidden.tanh().sum().backward()
        gradients.append([hidden] + [p.grad for p in model.model.parameters()])
    for a, b in zip(*gradients):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_under_autocast_attention_and_norms_by_hand_stay_in_float32():
    model, (ids, positions) = random_model(TINY), packed([random_ids(1, n)[0] for n in DOCUMENTS], 26)
    exact = model(ids, positions)
    seen = []
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, inputs, out: seen.extend([*inputs, out]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, positions)
    assert [x.dtype for x in seen] == [torch.float32, torch.bfloat16]
    assert (logits - exact).norm() < 0.05 * exact.norm()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [True, False])
def test_a_later_token_never_changes_an_earlier_logit(with_positions):
    model, ids = random_model(TINY), random_ids(1, 24)
    positions = torch.arange(24)[None] if with_positions else None
    before = model(ids, positions)
    for place in (23, 10, 1):
        changed = ids.clone()
        changed[0, place] += 1
        after = model(changed, positions)
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-6, rtol=0)
        assert not torch.allclose(after[:, place], before[:, place], atol=1e-3), "the token itself must count"


@torch.no_grad()
def test_the_order_of_earlier_tokens_counts():
    model, ids = random_model(TINY), random_ids(1, 12)
    swapped = ids.clone()
    swapped[0, [2, 3]] = ids[0, [3, 2]]
    assert not torch.allclose(model(ids)[0, -1], model(swapped)[0, -1], atol=1e-3)


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = random_model(TINY).train(), random_ids(2, 16)
    gradients = []
    for model.model.gradient_checkpointing in (False, True):
        model.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1).flatten()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- the first weights


def test_what_adds_to_the_residual_stream_starts_smaller_and_nothing_else_does():
    torch.manual_seed(0)
    model = CausalLM(TINY)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.02 / (2 * TINY.num_hidden_layers) ** 0.5 if residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.08), name  # 3,072 numbers or more
        assert abs(parameter.mean().item()) < 0.1 * expected, name


def test_the_seed_decides_the_first_weights():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(CausalLM(TINY).model.layers[1].mlp.up_proj.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("preset", "millions"), [("tiny", 1), ("mini", 5), ("small", 26), ("base", 100), ("large", 350), ("xl", 1000)]
)
def test_presets_have_the_size_that_they_claim(preset, millions):
    with torch.device("meta"):
        model = CausalLM(LMConfig(**PRESETS[preset]))
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.15)


@pytest.mark.parametrize("preset", CARD_PRESETS)
def test_a_preset_is_a_model_of_transformers_with_as_many_weights(preset):
    config = LMConfig(**PRESETS[preset])
    with torch.device("meta"):
        ours = CausalLM(config)
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf()))
    assert theirs.num_parameters() == ours.num_parameters()


@pytest.mark.slow  # gigabytes go to the disk and back
@pytest.mark.parametrize("preset", ["large", "large-moe", "xl"])
@torch.no_grad()
def test_a_large_model_is_exported_too(preset, tmp_path):
    torch.manual_seed(0)
    ours, ids = CausalLM(LMConfig(**PRESETS[preset])).eval(), random_ids(1, 12)
    logits = ours(ids)
    save_model(tmp_path, ours, TOKENIZER)
    del ours
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-4, rtol=0)
    del theirs
    assert torch.equal(load_model(tmp_path).eval()(ids), logits)


def test_tied_weights_are_one_matrix():
    model = CausalLM(TINY)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = CausalLM(dataclasses.replace(TINY, tie_word_embeddings=False))
    assert untied.num_parameters() == model.num_parameters() + 6400 * TINY.hidden_size


def test_every_activation_keeps_as_much_for_the_backward_pass():
    """training/cost.py counts four tensors of intermediate_size, whatever the activation."""
    sizes = set()
    for hidden_act in HIDDEN_ACTS:
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor
            return tensor

        layer, x = FeedForward(16, 32, hidden_act), torch.randn(4, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        assert y.requires_grad
        inner = [tensor.numel() for tensor in kept.values() if tensor.shape == (4, 32)]
        sizes.add(sum(inner))
    assert sizes == {4 * 4 * 32}


# ----------------------------------------------------------------------------------------------------- impossible sizes


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        (dict(hidden_size=100, num_attention_heads=3), ["hidden_size", "num_attention_heads"]),
        (dict(num_attention_heads=8, num_key_value_heads=3), ["num_attention_heads", "num_key_value_heads"]),
        (dict(num_attention_heads=2, num_key_value_heads=4), ["num_attention_heads", "num_key_value_heads"]),
        (dict(head_dim=15), ["head_dim"]),
        (dict(hidden_size=24, num_attention_heads=8), ["head_dim"]),  # 24 / 8 is odd
        (dict(vocab_size=0), ["vocab_size"]),
        (dict(hidden_size=-64), ["hidden_size"]),
        (dict(intermediate_size=0), ["intermediate_size"]),
        (dict(num_hidden_layers=-1), ["num_hidden_layers"]),
        (dict(num_attention_heads=0), ["num_attention_heads"]),
        (dict(num_key_value_heads=0), ["num_key_value_heads"]),
        (dict(head_dim=0), ["head_dim"]),
        (dict(max_position_embeddings=0), ["max_position_embeddings"]),
        (dict(rms_norm_eps=-1e-5), ["rms_norm_eps"]),
        (dict(rope_theta=0.0), ["rope_theta"]),
        (dict(use_moe=True, n_routed_experts=4, num_experts_per_tok=5), ["num_experts_per_tok", "n_routed_experts"]),
        (dict(use_moe=True, num_experts_per_tok=0), ["num_experts_per_tok"]),
        (dict(use_moe=True, n_shared_experts=-1), ["n_shared_experts"]),
        (dict(use_moe=True, num_hidden_layers=2, first_k_dense_replace=3), ["first_k_dense_replace"]),
        (dict(use_moe=True, scoring_func="tanh"), ["scoring_func"]),
    ],
    ids=str,
)
def test_an_impossible_size_is_refused_by_name(sizes, named):
    with pytest.raises(UserError) as error:
        LMConfig(**sizes)
    assert all(name in str(error.value) for name in named), error.value


# ------------------------------------------------------------------------------------------------- to config.json, back


@pytest.mark.parametrize("preset", [name for name in PRESETS if "moe" not in name])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_config_survives_the_way_to_hugging_face_and_back(preset, qk_norm):
    config = LMConfig(**PRESETS[preset] | {"qk_norm": qk_norm})
    assert LMConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_odd_sizes_survive_too():
    config = LMConfig(**ODD_SIZES, max_position_embeddings=77, qk_norm=False)
    assert LMConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "model_type"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding-window"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": "wide"}, "hidden_size must be int"),
        ({"hidden_size": 96.0}, "hidden_size must be int"),
        ({"hidden_size": True}, "hidden_size must be int"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be bool"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be above 0"),
        ({"hidden_act": ["silu"]}, "hidden_act must be str"),
    ],
    ids=str,
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        LMConfig.from_hf(TINY.to_hf() | changes)


@pytest.mark.parametrize(
    ("preset", "changes", "named"),
    [
        ("tiny", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("tiny", {"head_dim": 10**6}, "head_dim"),
        ("tiny-moe", {"num_hidden_layers": 1000, "n_routed_experts": 1000}, r"num_hidden_layers \* n_routed_experts"),
    ],
    ids=str,
)
def test_a_config_file_of_impossible_size_is_refused(preset, changes, named, tmp_path):
    write_json(tmp_path / "config.json", LMConfig(**PRESETS[preset]).to_hf() | changes)
    with pytest.raises(UserError, match=f"config.json: {named} must be at most"):
        load_config(tmp_path)


def test_of_several_ends_the_first_is_that_of_a_text():
    assert LMConfig.from_hf(TINY.to_hf() | {"eos_token_id": [2, 4]}).eos_token_id == 2


def test_the_older_place_of_rope_theta_is_read():
    config = TINY.to_hf() | {"rope_theta": 1e6}
    del config["rope_parameters"]
    assert LMConfig.from_hf(config).rope_theta == 1e6
