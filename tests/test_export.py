"""export.py's folders, which need no further package; tests/interop/test_gguf.py has the GGUF files."""

import json
import sys

import pytest
import torch
from helpers import SMALL_CONFIG, TOKENIZER, random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model.chat import EOS, IM_END
from model.checkpoint import load_model, save_model
from model.LMConfig import LMConfig
from model.lora import apply_lora, lora_layers

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
EXPERTS = dict(use_moe=True, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
CONFIGS = {
    "llama": dict(qk_norm=False),
    "qwen3": {},
    "glm4_moe": EXPERTS,
    "qwen2_moe": EXPERTS | dict(scoring_func="softmax"),
}


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    model = random_model(LMConfig(**SIZES | CONFIGS[request.param]))
    model.stop_token_ids = [EOS, IM_END]
    save_model(tmp_path / "sft", model, TOKENIZER)
    return tmp_path / "sft"


@pytest.mark.parametrize(("to", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_the_size(saved, run_here, to, dtype):
    result = run_here("export.py", saved, "--to", to)
    assert result.status == 0, result.err
    assert "verified in transformers: the same most probable token" in result.out
    tensors = load_file(saved.with_name(f"sft-{to}") / "model.safetensors")
    assert {t.dtype for name, t in tensors.items() if not name.endswith("correction_bias")} == {dtype}
    original = load_model(saved).state_dict()
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors[name], original[name].to(dtype))
    assert AutoModelForCausalLM.from_pretrained(saved.with_name(f"sft-{to}"), dtype="auto").dtype == dtype


def test_untied_has_a_head_of_its_own(saved, run_here):
    assert run_here("export.py", saved, "--to", "untied", "--output", saved.with_name("new")).status == 0
    folder = saved.with_name("new")
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    run_here("export.py", saved, "--to", "untied", "--output", folder)  # a second one takes the place of the first
    assert torch.equal(load_model(folder).lm_head.weight, load_model(saved).lm_head.weight)


def test_an_adapter_is_merged(tmp_path, run_here):
    save_model(tmp_path / "sft", random_model(SMALL_CONFIG), TOKENIZER)
    model = load_model(tmp_path / "sft")
    apply_lora(model, 4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    save_model(tmp_path / "lora", model, TOKENIZER, tmp_path / "sft")
    assert "--lora" in run_here("export.py", tmp_path / "sft", "--to", "merged").error_line(2)
    ids = torch.arange(20, 40)[None]
    for words, name in (([tmp_path / "sft", "--lora", tmp_path / "lora"], "sft"), ([tmp_path / "lora"], "lora")):
        result = run_here("export.py", *words, "--to", "merged")
        assert result.status == 0, result.err
        merged = load_model(tmp_path / f"{name}-merged").eval()
        assert torch.allclose(merged(ids), model.eval()(ids), atol=1e-4)
    assert not torch.allclose(merged(ids), load_model(tmp_path / "sft")(ids), atol=1e-2)


def test_what_does_not_agree_is_not_left_behind(tmp_path, run_here):
    model = random_model(SMALL_CONFIG)
    with torch.no_grad():
        model.model.embed_tokens.weight[300] = 1e5  # float16 ends at 65504
    save_model(tmp_path / "sft", model, TOKENIZER)
    assert "verification failed" in run_here("export.py", tmp_path / "sft", "--to", "fp16").error_line(1)
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]


def test_a_run_is_not_overwritten(saved, run_here):
    (saved.with_name("dpo") / "training_state").mkdir(parents=True)
    for output in (saved, saved.with_name("dpo")):
        line = run_here("export.py", saved, "--to", "bf16", "--output", output).error_line(2)
        assert "--output" in line


def test_llama_cpp_has_no_other_activation(tmp_path, run_here):
    save_model(tmp_path / "sft", random_model(LMConfig(**SIZES, hidden_act="relu2")), TOKENIZER)
    assert 'not "relu2"' in run_here("export.py", tmp_path / "sft", "--to", "gguf").error_line(2)
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]


def test_a_missing_package_is_named_with_the_command(saved, run_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    line = run_here("export.py", saved, "--to", "gguf").error_line(2)
    assert "gguf" in line
    assert "pip install -r requirements/export.txt -c constraints.txt" in line
