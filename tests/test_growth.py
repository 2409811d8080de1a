"""The arithmetic of memory and cost, and the benchmarks that hold it against measurements."""

import functools
import multiprocessing
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import CONTEXT as FORKSERVER
from helpers import ROOT

from base.cli import UserError
from bench import card, contest, estimate, growth
from model.LMConfig import PRESETS, LMConfig
from model.lora import apply_lora, narrow_frozen
from model.model import CausalLM
from training import cost, optimizer
from training.cost import CONTEXT, StepSettings, fit_batch, largest_divisor, memory_estimate
from training.flags import parse_flags
from training.loss import TokenLosses
from training.machine import Machine
from training.optimizer import GradientBuffer, OptimizerSettings, build_optimizer


def make_model(preset: str = "tiny") -> CausalLM:
    with torch.device("meta"):
        return CausalLM(LMConfig(**PRESETS[preset]))


def settings(**changes) -> StepSettings:
    return replace(StepSettings(32, 1, 512, grad_checkpointing=False, optimizer="adamw"), **changes)


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_estimate_grows_with_tokens_by_what_the_layers_keep(preset):
    model = make_model(preset)
    rows = [memory_estimate(model, settings(batch_size=n)) for n in (32, 64, 96)]
    assert rows[1] - rows[0] == rows[2] - rows[1] > 0
    assert memory_estimate(model, settings(batch_size=16, max_seq_len=1024)) == rows[0]
    assert memory_estimate(model, settings(grad_checkpointing=True)) < 0.5 * rows[0]


def test_estimate_counts_what_the_optimizer_keeps():
    model = make_model()
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    adamw = memory_estimate(model, settings())
    gate_and_up = 2 * 4 * 256 * 96  # of the 4 layers: updated together, the most of one shape
    assert adamw - memory_estimate(model, settings(optimizer="muon")) == 4 * (matrices - 4 * gate_and_up)
    model.lm_head.weight.requires_grad = False
    assert adamw - memory_estimate(model, settings()) == 12 * model.lm_head.weight.numel()


def estimates(preset: str, **changes) -> dict[str, int]:
    args = (make_model(preset), settings(batch_size=8, **changes))
    return {
        "manual": memory_estimate(*args),
        "flash": memory_estimate(*args, bytes_per_number=2, attention="flash"),
        "masked": memory_estimate(*args, bytes_per_number=2, attention="masked"),
        "float32": memory_estimate(*args, attention="masked"),
    }


@pytest.mark.parametrize("preset", ["small", "small-moe"])
def test_on_a_card_the_estimate_counts_float32_residuals_the_mask_and_the_context(preset):
    here, longer = estimates(preset), estimates(preset, max_seq_len=1024)
    assert CONTEXT < here["flash"] < here["masked"] < here["float32"]
    config, tokens = make_model(preset).config, 8 * 512
    masks = 2 * tokens * 512 * config.num_hidden_layers
    assert here["masked"] - here["flash"] > masks
    assert longer["masked"] - longer["flash"] > 2 * (here["masked"] - here["flash"])
    assert 0 < here["masked"] - estimates(preset, grad_checkpointing=True)["masked"] < here["masked"]


@pytest.mark.parametrize(("rows", "room", "size"), [(32, 32, 32), (32, 9, 8), (12, 5, 4), (7, 6, 1), (8, 0, 1)])
def test_a_batch_that_fits_divides_the_step(rows, room, size):
    assert largest_divisor(rows, lambda n: n <= room) == size


def test_auto_keeps_the_step_and_takes_what_the_machine_holds(monkeypatch):
    machine, model = Machine(0, 1, torch.device("cpu"), torch.float32), make_model("small")
    args = settings(batch_size=8, accumulation_steps=4)
    for rows, accumulation, processes in ((16, 2, 1), (4, 8, 1), (4, 8, 2)):
        one = replace(args, batch_size=rows)
        room = 1.01 * processes * memory_estimate(model, one) / cost.ROOM
        monkeypatch.setattr(cost, "memory_of_machine", lambda room=room: room)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert fit_batch(args, machine, model, data=None) == replace(one, accumulation_steps=accumulation)


def test_auto_is_a_value_of_the_flag(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test", "--batch_size", "auto", "--accumulation_steps", "3"])
    args = parse_flags("", batch_size=4)
    assert (args.fit_batch, args.batch_size, args.accumulation_steps) == (True, 4, 3)
    monkeypatch.setattr(sys, "argv", ["test", "--batch_size", "2"])
    assert not parse_flags("").fit_batch


def test_muon_gives_the_same_update_in_small_batches(monkeypatch):
    def updated(numbers: int) -> list[torch.Tensor]:
        monkeypatch.setattr(optimizer, "MUON_BATCH", numbers)
        torch.manual_seed(0)
        model = CausalLM(LMConfig(**PRESETS["tiny"]))
        GradientBuffer(list(model.parameters()), metrics={})
        update = build_optimizer(model, OptimizerSettings("muon", learning_rate=0.01))
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad.normal_()
            update.step()
        return list(model.parameters())

    for one_by_one, at_once in zip(updated(1), updated(2**30)):
        torch.testing.assert_close(one_by_one, at_once, rtol=0, atol=1e-5)


@pytest.fixture
def run_bench(monkeypatch, capsys):
    def run_main(module, *flags) -> list[str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        module.main()
        return capsys.readouterr().out.splitlines()

    return run_main


def test_cost_on_a_card(run_bench):
    lines = run_bench(estimate, "--preset", "small", "--card", "T4", "--tokens", 1000, "--price", 2)
    hours, cost = (float(word) for word in lines[-1].split()[3:5])
    assert cost == pytest.approx(2 * hours, abs=0.02)
    # 6 x 25.8 M + 12 x 512 x 8 x 256.5 = 167 M operations a token, at 0.35 x 65 T a second
    assert hours == pytest.approx(1e9 * 167.4e6 / (0.35 * 65e12) / 3600, rel=0.01)


def test_the_estimates_fit_a_screen_and_name_their_currency(run_bench):
    lines = run_bench(estimate)
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert "1 USD" in lines[1]
    cells = {line[:10].strip(): line for line in lines[4:]}
    assert {"RTX 4060": " 8", "RTX 3060": "12"}.items() <= {card: line[11:13] for card, line in cells.items()}.items()
    assert cells["GTX 1650"].endswith("-")  # xl
    assert "EUR" in run_bench(estimate, "--card", "T4", "--currency", "EUR")[3]


def test_the_rows_that_fit_a_card(run_bench):
    lines = run_bench(estimate, "--preset", "base-moe", "--card", "GTX 1650", "A100")
    assert "does not fit" in lines[-2]
    without, _, checkpointed = lines[-1].split()[-3:]
    assert 0 < int(without) < int(checkpointed)


TINY = replace(card.SHRUNK, max_seq_len=32, product=64, copied=2**16, visitors=32, steps=1, new_tokens=2)


@pytest.mark.parametrize("part", [name for name in card.PARTS if name != "run"])
def test_each_part_of_the_report_of_a_gpu(part, monkeypatch):
    """On a CPU, which has all but the kernels."""
    monkeypatch.setattr(card, "has_triton", lambda: False)
    try:
        lines = list(card.PARTS[part][0](torch.device("cpu"), TINY))
    finally:
        TokenLosses.compile(on=False)
    assert len(lines) >= 1
    assert not [line for line in lines if "FAILED" in line or "WRONG" in line or "nan" in line]
    expected = {"machine": 6, "right": 4, "decode": 5, "experts": 4}.get(part)
    assert expected is None or len(lines) == expected, lines


def test_the_real_run_of_the_report_needs_neither_jsonlines_nor_wandb(tmp_path):
    code = "import sys; sys.modules.update(jsonlines=None, wandb=None)\n"
    code += "from bench import card; card.print_part('run', 'cpu', card.SHRUNK)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "FAILED" not in said.stdout
    assert "done: 10 steps" in said.stdout
    assert "done: 20 steps" in said.stdout


def test_a_part_that_hangs_or_dies_is_a_line_of_the_report(tmp_path, capsys):
    report = card.Report(tmp_path / "out" / "card.txt")
    codes = [
        "import time; print('found', flush=True); time.sleep(60)",
        "print('half'); raise RuntimeError('illegal memory access')",
        "import os; os.abort()",
        "print('whole')",
    ]
    for code in codes:
        card.run_part([sys.executable, "-c", code], 5.0, report)
    text = (tmp_path / "out" / "card.txt").read_text("utf-8")
    assert text == capsys.readouterr().out
    lines = text.splitlines()
    assert lines[:4] == ["  found", "  CUT OFF after 5 s", "  half", "  FAILED with exit status 1"]
    assert any("illegal memory access" in line for line in lines)
    assert sum("FAILED" in line for line in lines) == 2
    assert lines[-1] == "  whole"


def test_the_report_leaves_out_what_there_is_no_time_for(run_bench, tmp_path):
    with pytest.raises(UserError, match="no GPU"):
        run_bench(card)
    path = tmp_path / "card.txt"
    lines = run_bench(card, "--device", "cpu", "--seconds", 1, "--output", path)
    assert len([line for line in lines if "left out" in line]) == len(card.PARTS)
    assert path.read_text("utf-8").splitlines() == lines[:-1]


def test_growth_tables_and_plot(run_bench, monkeypatch, tmp_path):
    monkeypatch.setattr(contest, "matmul_rate", functools.partial(contest.matmul_rate, size=64))
    monkeypatch.setattr(growth, "start_of_run", lambda *_: 1.0)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKSERVER)  # with torch loaded
    monkeypatch.setattr(contest, "PAUSE", 0)
    sizes = ["--models", "32x1", "64x1", "--lengths", 16, 32, "--corpora", 1, 2, "--batch_size", 1, "--max_seq_len", 32]
    lines = run_bench(growth, *sizes, "--steps", 1, "--plot", tmp_path / "plots" / "growth.png")
    assert [line.split()[0] for line in lines] == ["torch", *["model"] * 2, *["length"] * 2, "step", *["corpus"] * 2]
    tokens = [float(line.partition("MB")[2].split()[0]) for line in lines if line.startswith("corpus")]
    assert tokens == pytest.approx([0.3, 0.6], rel=0.1)
    assert (tmp_path / "plots" / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_says_when_its_first_step_begins(tmp_path):
    growth.write_corpus(tmp_path / "data", 1)
    assert growth.start_of_run(tmp_path / "data", 1, 64) > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_is_what_a_step_takes():
    command = [sys.executable, "-m", "bench.memory", "--preset", "mini", "--batch_size", "4", "8"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    assert len(lines) == 8
    for line in lines:
        assert abs(int(line.split()[-1].rstrip("%"))) <= 15, line


QWEN3 = dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16)
QWEN3 |= dict(num_key_value_heads=8, head_dim=128, max_position_embeddings=40960)  # Qwen3-0.6B


def test_lora_on_an_open_model_fits_in_a_card_of_4_gb_by_estimate():
    with torch.device("meta"):
        model = CausalLM(LMConfig(**QWEN3))
        apply_lora(model, r=8)
    step = settings(batch_size=1, max_seq_len=1024, grad_checkpointing=True)
    wide = memory_estimate(model, step, 2, "flash")
    narrow_frozen(model, torch.bfloat16)
    narrow = memory_estimate(model, step, 2, "flash")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.dim() > 1)
    assert wide - narrow == 4 * frozen  # 4 bytes and a copy of 2 become 2
    assert narrow < 3.6 * 2**30 < memory_estimate(model, replace(step, grad_checkpointing=False), 2, "flash")


def test_gradient_checkpointing_is_used_where_a_step_does_not_fit_without(monkeypatch):
    machine, model = Machine(0, 1, torch.device("cpu"), torch.float32), make_model("small")
    plain, saved = (memory_estimate(model, settings(grad_checkpointing=used)) for used in (False, True))
    one_row = memory_estimate(model, settings(batch_size=1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    step = settings(grad_checkpointing=None)
    for room, any_batch_size, used in (
        (1.01 * plain, False, False),
        (0.99 * plain, False, True),
        (saved / 2, False, True),
        (1.01 * one_row, True, False),
        (0.99 * one_row, True, True),
    ):
        monkeypatch.setattr(cost, "memory_of_machine", lambda room=room: room / cost.ROOM)
        assert cost.decide_checkpointing(step, any_batch_size, machine, model) == settings(grad_checkpointing=used)
    for used in (False, True):  # a flag decides
        step = settings(grad_checkpointing=used)
        assert cost.decide_checkpointing(step, False, machine, model) == step
