"""A GGUF file in llama.cpp: the same tokens from the same texts, and the same texts from the same prompts."""

import random
import re

import pytest
import torch
from helpers import PAGES, TOKENIZER, greedy, make_text, prompt, sharp_model

from engine.session import GenerationConfig
from model import gguf
from model.chat import EOS, IM_END, encode, encode_chat, load_tokenizer
from model.checkpoint import load_model, save_model
from model.llama_cpp import LlamaCpp
from model.LMConfig import PRESETS, LMConfig
from model.verify import verify_gguf

pytestmark = pytest.mark.extra

EXPERTS = dict(use_moe=True, moe_intermediate_size=48, routed_scaling_factor=1.7)  # 48: rows that no block of 32 fits
CONFIGS = {
    "llama": dict(qk_norm=False),
    "qwen3": dict(head_dim=64),
    "untied": dict(tie_word_embeddings=False),
    "sigmoid": EXPERTS,
    "sigmoid, none shared": EXPERTS | dict(n_shared_experts=0, norm_topk_prob=False),
    "softmax": EXPERTS | dict(scoring_func="softmax", n_shared_experts=2),
    "softmax, one": EXPERTS | dict(scoring_func="softmax", num_experts_per_tok=1),
}


def chat_model(**changes):
    """Its weights are such that no two tokens are nearly equally probable, and none is a byte or a control token."""
    model = sharp_model(LMConfig(**PRESETS["tiny"] | changes))
    model.stop_token_ids = [EOS, IM_END]
    with torch.no_grad():
        model.lm_head.weight[:272] = 0
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_writes_what_the_engine_writes(name, tmp_path):
    model = chat_model(**CONFIGS[name])
    gguf.write_gguf(tmp_path / "model.gguf", model, TOKENIZER, "f32")
    assert "log-probabilities differ" in verify_gguf(tmp_path / "model.gguf", model, TOKENIZER, "f32")
    llama_cpp = LlamaCpp(tmp_path / "model.gguf", 256, threads=1, exact=True)
    assert llama_cpp.generate(prompt(40), 24)["tokens"] == greedy(model, [prompt(40)], 24)[0]


@pytest.mark.parametrize("weight_type", gguf.WEIGHT_TYPES)
@pytest.mark.parametrize("name", ["qwen3", "sigmoid"])
def test_every_type_of_weights_agrees_within_its_limit(name, weight_type, tmp_path):
    model = chat_model(**CONFIGS[name])
    with torch.no_grad():  # flatter, as a trained model is: rounding must not decide which expert is chosen
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1)
    gguf.write_gguf(tmp_path / "model.gguf", model, TOKENIZER, weight_type)
    verify_gguf(tmp_path / "model.gguf", model, TOKENIZER, weight_type)
    smaller = {"f32": 1, "f16": 1.9, "bf16": 1.9, "q8_0": 2.9, "q4_0": 3}[weight_type]
    assert (tmp_path / "model.gguf").stat().st_size < 4 * model.num_parameters() / smaller + 400_000


@pytest.mark.parametrize("question", ["你好，请问天空为什么是蓝色的？", "What is the capital of France?"])
def test_eval_answers_the_same(question, tmp_path, run_here):
    save_model(tmp_path / "sft", chat_model(), TOKENIZER)
    result = run_here("export.py", tmp_path / "sft", "--to", "ollama", "--type", "f32")
    assert result.status == 0, result.err
    assert "a chat with tools and reasoning" in result.out
    llama_cpp = LlamaCpp(tmp_path / "sft-ollama" / "sft-f32.gguf", 256, threads=1, exact=True)
    messages = [{"role": "user", "content": question}]
    ids, _ = encode_chat(load_tokenizer(TOKENIZER), messages, add_generation_prompt=True)
    assert llama_cpp.encode_chat(messages) == ids
    flags = "--temperature 0 --repetition_penalty 1 --max_new_tokens 32 --device cpu".split()
    answer = run_here("eval.py", "--model", tmp_path / "sft", "--prompt", question, *flags)
    assert llama_cpp.generate(ids, 32)["content"] == answer.out.removesuffix("\n") != ""
    modelfile = (tmp_path / "sft-ollama" / "Modelfile").read_text("utf-8")
    assert modelfile.startswith("FROM ./sft-f32.gguf\nTEMPLATE")
    assert re.findall(r"PARAMETER stop (.*)", modelfile) == ['"<|end_of_text|>"', '"<|im_end|>"']


def test_a_thousand_real_lines_have_the_same_tokens(tmp_path):
    gguf.write_gguf(tmp_path / "model.gguf", chat_model(), TOKENIZER, "f16")
    llama_cpp, tokenizer = LlamaCpp(tmp_path / "model.gguf", 256, threads=1), load_tokenizer(TOKENIZER)
    lines = [line for page in PAGES for line in page.read_text("utf-8").splitlines() if line]
    rng = random.Random(0)
    lines = rng.sample(lines, 900) + [make_text(rng) for _ in range(100)]
    tags = [tokenizer.id_to_token(token_id) for token_id in gguf.TAGS]
    lines = [line for line in lines if not any(tag in line for tag in tags)]
    assert len(lines) > 990
    assert [line for line in lines if llama_cpp.encode(line) != encode(tokenizer, line)] == []
    assert llama_cpp.encode("<think>") == [5] != encode(tokenizer, "<think>")  # as add_tokenizer says


def test_a_base_model_begins_with_bos_and_has_no_template(tmp_path):
    model = chat_model()
    model.stop_token_ids = [EOS]
    save_model(tmp_path / "pretrain", model, TOKENIZER)
    path = tmp_path / "model.gguf"
    gguf.write_gguf(path, load_model(tmp_path / "pretrain"), TOKENIZER, "f16")
    verify_gguf(path, model, TOKENIZER, "f16")
    ids = encode(load_tokenizer(TOKENIZER), "春天")
    assert LlamaCpp(path, 256, threads=1).post("tokenize", content="春天", add_special=True)["tokens"] == [1, *ids]
    gguf.write_modelfile(tmp_path / "Modelfile", model, path, load_tokenizer(TOKENIZER), vars(GenerationConfig()))
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "Modelfile").read_text("utf-8")


def wrong_rotation(monkeypatch):
    monkeypatch.setattr(gguf, "interleave_halves", lambda weight, head_dim: weight)


def wrong_tokens(monkeypatch):
    monkeypatch.setattr(gguf, "TAGS", range(3, 200))


def wrong_stop(monkeypatch):
    monkeypatch.setattr(gguf, "SPECIAL_TOKENS", ("<unk>",) * 2)


@pytest.mark.parametrize("mistake", [wrong_rotation, wrong_tokens, wrong_stop])
@pytest.mark.parametrize("weight_type", ["f32", "q8_0", "q4_0"])
def test_a_mistake_is_found_and_its_file_left_out(mistake, weight_type, tmp_path, monkeypatch, run_here):
    save_model(tmp_path / "sft", chat_model(qk_norm=False), TOKENIZER)
    mistake(monkeypatch)
    assert "verification failed" in run_here("export.py", tmp_path / "sft", "--to", "gguf", "--type", weight_type).err
    assert list((tmp_path / "sft-gguf").iterdir()) == []
