"""The mixture of experts: routing, balance, gradients, the checkpoint, and what a run shows of it."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import (
    FIXED_WEIGHTS,
    ONCE,
    ROOT,
    SHORT_RUN,
    TOKENIZER,
    Processes,
    assert_same_tensors,
    make_documents,
    make_pairs,
    observe,
    random_ids,
    random_model,
    relative_difference,
    signal_in_pass,
    write_data,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from base.cli import UserError
from bench.train_speed import made_up_batch  # noqa: F401  for the compiled one
from engine.generation import generate
from model.checkpoint import load_model, save_model
from model.LMConfig import PRESETS, LMConfig
from model.lora import apply_lora, lora_layers
from model.model import CausalLM, MoEFeedForward
from training.balance import balance_loss, expert_balance, move_router_bias
from training.cost import step_flops
from training.log import expert_load_metrics
from training.loss import next_token_loss
from training.machine import start_machine
from training.optimizer import OptimizerSettings, build_optimizer
from training.packing import PackedDataset
from training.plots import plot_experts

SMALL = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    use_moe=True,
    n_routed_experts=6,
    moe_intermediate_size=16,
)
ROUTERS = ("sigmoid", "softmax")


def moe_model(**changes) -> CausalLM:
    """With weights that are large enough to tell experts apart, and biases that change the choice."""
    model = random_model(LMConfig(**SMALL | changes))
    for _, buffer in model.named_buffers():
        buffer.uniform_(-0.2, 0.2)
    return model


def routing_of(model: CausalLM, ids: torch.Tensor) -> list:
    routing = []
    model.model(ids, routing=routing)
    return routing


# ------------------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("scoring_func", ROUTERS)
@pytest.mark.parametrize("k", [1, 2, 6])
@torch.no_grad()
def test_a_token_gets_the_weighted_sum_of_its_experts_and_the_shared_ones(scoring_func, k):
    config = LMConfig(**SMALL | dict(num_experts_per_tok=k, scoring_func=scoring_func, routed_scaling_factor=1.7))
    layer = moe_model(**vars(config)).model.layers[1].mlp
    x = torch.randn(2, 7, 32)
    y, (scores, chosen) = layer(x)
    for token, result, score, experts in zip(x.flatten(0, 1), y.flatten(0, 1), scores, chosen):
        weights = score[experts] / (score[experts].sum() if k > 1 else 1)
        expected = layer.shared_experts(token)
        for weight, expert in zip(weights, experts):
            expected = expected + 1.7 * weight * layer.experts[expert](token)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
        ranking = score + layer.gate.e_score_correction_bias if scoring_func == "sigmoid" else score
        assert sorted(experts.tolist()) == sorted(ranking.topk(k).indices.tolist())


def test_leading_layers_are_dense():
    model = CausalLM(LMConfig(**SMALL | dict(num_hidden_layers=3, first_k_dense_replace=2)))
    assert [isinstance(layer.mlp, MoEFeedForward) for layer in model.model.layers] == [False, False, True]
    assert CausalLM(LMConfig(**SMALL | dict(n_shared_experts=0))).model.layers[1].mlp.shared_experts is None


@torch.no_grad()
def test_the_router_computes_in_float32_whatever_the_rest_does():
    model, ids = moe_model(), random_ids(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        ((scores, chosen),) = routing_of(model, ids)
    assert scores.dtype == torch.float32
    gate = model.model.layers[1].mlp.gate
    x = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = gate(x)
    assert all(a.equal(b) for a, b in zip(half, gate(x)))


def test_an_expert_without_a_token_gets_a_gradient_of_zero():
    model = moe_model().train()
    model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -9.0  # nobody comes
    model(random_ids(1, 20)).sum().backward()
    for name, parameter in model.model.layers[1].mlp.experts.named_parameters():
        idle = name.startswith("2.")
        assert (parameter.grad.abs().sum() == 0) == idle, name


@pytest.mark.parametrize("scoring_func", ROUTERS)
@pytest.mark.parametrize("k", range(1, 7))
def test_the_language_loss_alone_moves_the_router(scoring_func, k, data):
    model = moe_model(num_experts_per_tok=k, scoring_func=scoring_func).train()
    model.config.router_aux_loss_coef = 0.0
    loss_sum, *_ = next_token_loss(model, PackedDataset(data, "train", 64).batch([0, 1]))
    loss_sum.backward()
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.grad.norm() > 1e-3


# -------------------------------------------------------------------------------------------------------------- balance


@pytest.mark.parametrize("k", range(1, 7))
def test_even_loads_cost_exactly_one_for_every_k(k):
    M, E = 60, 6
    chosen = (torch.arange(M)[:, None] + torch.arange(k)) % E
    loss, load = balance_loss(torch.full((M, E), 0.3), chosen, torch.arange(M) // 12, torch.full((5,), 0.2))
    assert loss.item() == pytest.approx(1, abs=1e-6)
    assert load.tolist() == [M * k / E] * E


def test_all_tokens_at_one_expert_cost_as_many_times_as_there_are_experts():
    scores = torch.tensor([[1.0, 0, 0, 0]]).repeat(8, 1)
    loss, load = balance_loss(
        scores, torch.zeros(8, 1, dtype=torch.long), torch.zeros(8, dtype=torch.long), torch.ones(1)
    )
    assert loss.item() == pytest.approx(4)
    assert load.tolist() == [8, 0, 0, 0]


def test_padding_and_other_documents_change_nothing():
    torch.manual_seed(0)
    scores = torch.rand(30, 4)
    chosen = scores.topk(2).indices
    sequences = torch.tensor([0] * 10 + [1] * 12 + [-1] * 8)
    weights = torch.tensor([3.0, 5.0])
    loss, load = balance_loss(scores, chosen, sequences, weights)
    alone = [
        balance_loss(scores[part], chosen[part], torch.zeros(int(part.sum()), dtype=torch.long), torch.ones(1))
        for part in (sequences == 0, sequences == 1)
    ]
    assert loss.item() == pytest.approx((3 * alone[0][0] + 5 * alone[1][0]).item(), rel=1e-6)
    assert load.equal(alone[0][1] + alone[1][1])
    scores[sequences == -1] = torch.rand(8, 4)
    assert balance_loss(scores, scores.topk(2).indices, sequences, weights)[0].equal(loss)


@pytest.mark.parametrize("seq_aux", [True, False])
def test_the_balance_loss_is_added_to_the_gradient_and_not_to_the_value(seq_aux, data):
    batch = PackedDataset(data, "train", 64).batch([0, 1])
    gradients, values = [], []
    for coefficient in (0.0, 1.0, 3.0):
        model = moe_model(scoring_func="softmax", seq_aux=seq_aux).train()
        model.config.router_aux_loss_coef = coefficient
        loss_sum, count, metrics = next_token_loss(model, batch)
        loss_sum.backward()
        values.append(loss_sum.item())
        gradients.append(model.model.layers[1].mlp.gate.weight.grad)
        assert 1 <= metrics["balance_loss"] / count < 6
        assert metrics["expert_load"].sum() == batch.real_tokens * model.config.num_experts_per_tok
    assert values[0] == values[1] == values[2]
    one, three = gradients[1] - gradients[0], gradients[2] - gradients[0]
    assert one.norm() > 0
    torch.testing.assert_close(three, 3 * one, atol=1e-3, rtol=1e-3)
    model.eval()
    assert expert_balance(model, batch, routing_of(model, batch.input_ids), None) == (0.0, {})


def test_the_bias_moves_against_the_load_and_changes_the_choice_alone():
    torch.manual_seed(0)
    model = CausalLM(LMConfig(**SMALL | dict(router_bias_update_speed=0.01)))
    gate = model.model.layers[1].mlp.gate
    load = torch.tensor([[9.0, 1, 5, 5, 5, 5]])
    move_router_bias(model, load.numpy())
    assert gate.e_score_correction_bias.tolist() == pytest.approx([-0.01, 0.01, 0, 0, 0, 0])
    x = 0.5 + torch.randn(300, 32)
    with torch.no_grad():
        gate.weight.normal_(std=0.2)
    scores = gate(x)[2]
    for _ in range(400):
        move_router_bias(model, gate(x)[1].flatten().bincount(minlength=6)[None].float().numpy())
    weights, chosen, again = gate(x)
    assert again.equal(scores)
    expected = scores.gather(1, chosen)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))
    before = expert_load_metrics(scores.topk(3).indices.flatten().bincount(minlength=6)[None].numpy())["load_max"]
    after = expert_load_metrics(chosen.flatten().bincount(minlength=6)[None].numpy())["load_max"]
    assert before > 1.3
    assert after < 1.2
    gate.weight.requires_grad_(False)
    move_router_bias(model, load.numpy())
    assert gate(x)[1].equal(chosen), "a frozen router keeps its bias"


def test_rows_at_once_or_accumulated_give_the_same_gradient_with_experts(chat_data, tmp_path):
    """Balance within documents adds up over micro-batches, for chats too, whose documents count by scored tokens."""
    seen = []
    for rows in (4, 1):
        torch.manual_seed(0)
        model = CausalLM(LMConfig(**SMALL | dict(router_aux_loss_coef=1.0)))
        flags = ["--batch_size", rows, "--accumulation_steps", 4 // rows, "--max_steps", 1, *ONCE, *FIXED_WEIGHTS]
        seen.append(observe(chat_data, tmp_path / str(rows), *flags, model=model))
        bias = model.model.layers[1].mlp.gate.e_score_correction_bias
        assert bias.abs().max().item() == pytest.approx(model.config.router_bias_update_speed)
    assert relative_difference(seen[0].gradients[0], seen[1].gradients[0]) < 1e-5


@pytest.mark.parametrize("scoring_func", ROUTERS)
def test_an_uneven_router_becomes_even(scoring_func, data, tmp_path):
    torch.manual_seed(0)
    coefficient = 1.0 if scoring_func == "softmax" else 0.0
    own = dict(scoring_func=scoring_func, router_bias_update_speed=0.01, router_aux_loss_coef=coefficient)
    model = CausalLM(LMConfig(**SMALL | dict(num_experts_per_tok=1) | own))
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[:2] = model.model.layers[1].mlp.gate.weight[0] * 30
    flags = ["--batch_size", 4, "--learning_rate", "3e-3", "--epochs", 12, "--eval_interval", 1000, "--log_interval", 1]
    observe(data, tmp_path / "out", *flags, model=model)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    before, after = lines[1:2], lines[-5:]
    assert min(line["load_max"] for line in before) > 2 > max(line["load_max"] for line in after)
    assert max(line["load_entropy"] for line in before) < 0.9 < min(line["load_entropy"] for line in after)
    assert after[-1]["idle_experts"] == 0
    assert (tmp_path / "out" / "experts.png").stat().st_size > 0


# ------------------------------------------------------------------------------------------- the checkpoint, everywhere

EXPORTED = [
    dict(),
    dict(first_k_dense_replace=0, norm_topk_prob=False, routed_scaling_factor=2.5),
    dict(n_shared_experts=0, num_experts_per_tok=2),
    dict(n_shared_experts=3, num_experts_per_tok=1, tie_word_embeddings=False, head_dim=20, rope_theta=500.0),
]


@pytest.mark.parametrize("changes", EXPORTED, ids=str)
@pytest.mark.parametrize("scoring_func", ROUTERS)
@torch.no_grad()
def test_transformers_computes_the_same_logits_and_tokens(scoring_func, changes, tmp_path):
    model = moe_model(num_hidden_layers=3, scoring_func=scoring_func, **changes)
    save_model(tmp_path, model, TOKENIZER)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == {"sigmoid": "Glm4MoeForCausalLM", "softmax": "Qwen2MoeForCausalLM"}[scoring_func]
    assert not any(report.values()), report
    ids = random_ids(2, 100)
    logits = model(ids)
    assert logits.std() > 0.3, "too flat to tell anything"
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=0)
    again = load_model(tmp_path).eval()
    assert again.config == model.config
    torch.testing.assert_close(again(ids), logits, atol=1e-5, rtol=0)
    prompt = ids[:1, :9]
    generated = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=15, do_sample=False, eos_token_id=-1
    )
    ours = [token for (token,) in generate(model, prompt.tolist(), 15, temperature=0)]
    assert generated[0, 9:].tolist() == ours


def test_ragged_prompts_are_continued_as_one_by_one():
    model = moe_model()
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 9, 1)]
    together = list(zip(*generate(model, prompts, 12, temperature=0)))
    for prompt, tokens in zip(prompts, together):
        assert tokens == tuple(token for (token,) in generate(model, [prompt], 12, temperature=0))


def test_a_gated_shared_expert_is_refused(tmp_path):
    save_model(tmp_path, moe_model(scoring_func="softmax"), TOKENIZER)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.shared_expert_gate.weight"][0, 0] = 1.0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="shared_expert_gate"):
        load_model(tmp_path)


def test_lora_adapts_attention_and_says_why_nothing_else(tmp_path):
    model = moe_model()
    apply_lora(model, 2)
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(UserError, match="up_proj.*experts"):
        apply_lora(moe_model(), 2, targets=("q_proj", "up_proj"))


def two_processes_one_row(folder, data):
    sys.argv = ["test", "--device", "cpu"]
    machine = start_machine("cpu", "float32", 0)
    torch.manual_seed(0)
    model = CausalLM(LMConfig(**SMALL))
    flags = ["--batch_size", 1, "--epochs", 3, *ONCE]
    observe(data, folder / "out", *flags, machine=machine, model=model)
    save_file(dict(model.named_buffers()), folder / f"bias.{machine.rank}.safetensors")


def test_a_process_without_a_row_moves_its_bias_with_the_others(tmp_path):
    data = write_data(tmp_path / "data", make_documents("pretrain", 1, seed=3), make_documents("pretrain", 2, seed=4))
    results = Processes(tmp_path, two_processes_one_row, tmp_path, data, processes=2).wait()
    assert [result.status for result in results] == [0, 0], results
    one, other = (load_file(tmp_path / f"bias.{rank}.safetensors") for rank in range(2))
    for name, bias in one.items():
        assert bias.any()
        assert bias.equal(other[name])


def test_muon_leaves_an_expert_alone_that_no_token_visits():
    model = moe_model()
    optimizer = build_optimizer(model, OptimizerSettings("muon", weight_decay=0.0))
    gate = model.model.layers[1].mlp.gate.weight
    assert any(gate is p for group in optimizer.param_groups if not group["matrices"] for p in group["params"])
    expert, other = (model.model.layers[1].mlp.experts[i].up_proj.weight for i in range(2))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    expert.grad.zero_()
    before, before_other = expert.clone(), other.clone()
    optimizer.step()
    assert expert.equal(before)
    assert not other.equal(before_other)


@pytest.mark.parametrize("scoring_func", ROUTERS)
def test_checkpointed_gradients_are_the_same_with_experts(scoring_func, data):
    batch, gradients = PackedDataset(data, "train", 64).batch([0, 1, 2]), []
    for checkpointing in (False, True):
        model = moe_model(scoring_func=scoring_func, router_aux_loss_coef=1.0).train()
        model.model.gradient_checkpointing = checkpointing
        loss_sum, _, metrics = next_token_loss(model, batch)
        loss_sum.backward()
        assert metrics["expert_load"].sum() == 3 * batch.real_tokens
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative_difference(*gradients) < 1e-6


def test_a_step_in_bfloat16_is_close(data):
    batch, losses = PackedDataset(data, "train", 64).batch([0, 1]), []
    model = CausalLM(LMConfig(**SMALL)).train()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss_sum, count, _ = next_token_loss(model, batch)
        loss_sum.backward()
        losses.append(loss_sum.item() / count)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_only_the_experts_at_work_are_counted():
    model = CausalLM(LMConfig(**SMALL))
    expert = 3 * 32 * 16
    assert model.num_idle_parameters() == 3 * expert
    dense = model.num_parameters() - model.num_idle_parameters()
    assert step_flops(model, 10, 0) == 60 * dense
    apply_lora(model, 2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert step_flops(model, 10, 0) == 10 * (4 * dense + 6 * trained)


@pytest.mark.parametrize("size", ["tiny", "mini", "small", "base", "large", "xl"])
def test_a_moe_preset_has_as_many_weights_at_work_as_the_dense_one(size):
    with torch.device("meta"):
        dense, moe = CausalLM(LMConfig(**PRESETS[size])), CausalLM(LMConfig(**PRESETS[f"{size}-moe"]))
    at_work = moe.num_parameters() - moe.num_idle_parameters()
    assert 1 <= at_work / dense.num_parameters() < 1.02  # the routers
    assert moe.num_parameters() > 1.5 * dense.num_parameters()


# ------------------------------------------------------------------------------------------------- the stages, as users


def test_all_stages_run_with_experts(data, chat_data, run_here, tmp_path):
    short = ["--max_steps", 2, "--max_seq_len", 128, "--batch_size", 2, "--eval_rows", 1, "--log_interval", 1]
    pretrain, sft = tmp_path / "pretrain", tmp_path / "sft"
    run = ["--data", data, "--preset", "tiny-moe", *short, "--optimizer", "muon", "--learning_rate", "1e-3"]
    assert run_here("1-pretrain.py", "--out_dir", pretrain, *run).status == 0
    result = run_here("2-sft.py", "--data", chat_data, "--init_from", pretrain, "--out_dir", sft, *short)
    assert result.status == 0, result.err
    assert "busiest expert" in result.out
    assert "active per token" in result.out
    lora = ["--data", chat_data, "--init_from", sft, "--out_dir", tmp_path / "lora", *short]
    assert run_here("3-lora.py", *lora).status == 0
    bias = load_file(sft / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.abs().max() > 0, "the bias went into the checkpoint"
    assert run_here("export.py", tmp_path / "lora", "--to", "merged").status == 0
    merged = load_file(tmp_path / "lora-merged" / "model.safetensors")
    assert merged["model.layers.1.mlp.gate.e_score_correction_bias"].equal(bias)
    pairs = make_pairs(10)
    dpo_data = write_data(tmp_path / "pairs", pairs[:16], pairs[16:20], kind="dpo")
    dpo = ["--data", dpo_data, "--init_from", sft, "--out_dir", tmp_path / "dpo", *short]
    result = run_here("4-dpo.py", *dpo)
    assert result.status == 0, result.err
    first = json.loads((tmp_path / "dpo" / "metrics.jsonl").read_text("utf-8").splitlines()[0])
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["val_accuracy"] == 0.5
    result = run_here("eval.py", "--model", sft, "--prompt", "你好", "--max_new_tokens", 5, "--temperature", 0)
    assert result.status == 0, result.err


def test_killed_and_resumed_equals_uninterrupted_with_the_bias(data, start, tmp_path):
    flags = [
        "--data",
        data,
        *SHORT_RUN,
        "--preset",
        "tiny-moe",
        "--max_steps",
        5,
        "--save_interval",
        2,
        "--batch_size",
        3,
    ]
    (result,) = start("1-pretrain.py", "--out_dir", tmp_path / "whole", *flags).wait()
    assert result.status == 0, result.err
    run = ["1-pretrain.py", "--out_dir", tmp_path / "killed", *flags]
    start(*run, patch=partial(signal_in_pass, 4, signal.SIGKILL)).wait()
    (result,) = start(*run, "--resume").wait()
    assert result.status == 0, result.err
    assert_same_tensors(tmp_path / "whole", tmp_path / "killed")


def test_the_heat_map_can_be_drawn(tmp_path):
    record = {"step": 1, "tokens": 10, "expert_load": [[0.5, 0.5], [1.0, 0.0]]}
    plot_experts([record, record | {"tokens": 20}], tmp_path / "experts.png")
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_the_load_is_described():
    described = expert_load_metrics(torch.tensor([[2.0, 2, 2, 2], [8, 0, 0, 0]]).numpy())
    assert expert_load_metrics(torch.tensor([[1.0, 2]]).numpy())["expert_load"] == [[0.33333, 0.66667]]
    assert described["load_max"] == pytest.approx(4)
    assert described["load_entropy"] == pytest.approx(0, abs=1e-6)
    assert described["idle_experts"] == 3
    assert described["expert_load"] == [[0.25] * 4, [1, 0, 0, 0]]


@pytest.mark.slow  # the compiler takes half a minute
def test_compiled_experts_compute_the_same():
    code = (
        "import torch; from test_moe import *\n"
        "batch = made_up_batch(2, 64, 6400); gradients = []\n"
        "for compiled in (False, True):\n"
        "    model = moe_model(router_aux_loss_coef=1.0).train()\n"
        "    if compiled: model.model.compile()\n"
        "    next_token_loss(model, batch)[0].backward()\n"
        "    gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))\n"
        "print('difference', relative_difference(*gradients))"
    )
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 1e-4
