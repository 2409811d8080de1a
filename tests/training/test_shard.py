"""--shard: what a run learns, saves and resumes is the same as without, and no process holds all of it."""

import dataclasses
import json
import math
import os
import runpy
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import (
    ROOT,
    SHORT_RUN,
    Processes,
    assert_same_tensors,
    hurry,
    make_documents,
    make_pairs,
    random_model,
    records,
    relative_difference,
    saved_progress,
    signal_in_pass,
    write_data,
)
from safetensors.torch import load_file

from base.cli import UserError
from bench.train_speed import made_up_batch
from model import model as model_module
from model.checkpoint import load_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training import loop, loss, machine
from training.cost import StepSettings, memory_estimate
from training.rollouts import RolloutGenerator
from training.shard import local_shard, modules_to_compile, shard_model

pytestmark = pytest.mark.skipif(machine.TORCH < (2, 8), reason="--shard needs torch 2.8")
MOE = ["--preset", "tiny-moe", "--optimizer", "muon", "--grad_checkpointing", "--batch_size", "1"]
MOE += ["--accumulation_steps", "2", "--epochs", "2", "--max_steps", "9"]  # steps without a row for one of them
TUNE = ["--max_seq_len", "128", "--batch_size", "1", "--max_steps", "4", "--eval_interval", "2", "--log_interval", "1"]
TUNE += ["--eval_rows", "3"]
RUNS = {
    "dense": ["1-pretrain.py", "--data", "texts", *SHORT_RUN, "--batch_size", "2", "--max_steps", "4"],
    "experts": ["1-pretrain.py", "--data", "few", *SHORT_RUN, *MOE],
    "chats": ["2-sft.py", "--data", "chats", "--init_from", "base", *TUNE],
    "adapter": ["3-lora.py", "--data", "chats", "--init_from", "base", *TUNE, "--lora_dropout", "0.3"],
    "pairs": ["4-dpo.py", "--data", "pairs", "--init_from", "base", *TUNE],
    "pairs, adapter": ["4-dpo.py", "--data", "pairs", "--init_from", "base", *TUNE, "--lora_rank", "4"],
}
FAST = ("dense", "experts", "adapter")


class ManyRuns:
    """Runs in all processes, one run after the other, for processes are slow to start."""

    def __init__(self, folder: Path, names: tuple[str, ...]):
        self.folder, self.names = folder, names

    def main(self):
        hurry()
        sys.argv = ["test", "--device", "cpu"]
        self.machine = machine.start_machine("cpu", "float32", 0)
        PRESETS["tiny-moe"] |= dict(num_hidden_layers=2, n_routed_experts=6)
        machine.start_machine = self.same_machine
        self.optimizer_step, loop.optimizer_step = loop.optimizer_step, self.observed_step
        os.chdir(self.folder)
        for name in self.names:
            for self.kind in ("whole", "spread"):
                shard = ["--shard"] if self.kind == "spread" else []
                self.run(*RUNS[name], *shard, "--out_dir", f"{self.kind}/{name}/out")
        if "dense" in self.names:
            self.kind = "broken"
            self.next_token_loss, self.calls = loss.next_token_loss, 0
            for break_loss in (self.infinite_loss, self.signalled_loss):
                self.calls, loss.next_token_loss = 0, break_loss
                self.run(*RUNS["dense"], "--shard", "--out_dir", f"broken/{break_loss.__name__}/out")

    def run(self, script: str, *flags):
        print("---", script, *flags, flush=True)
        sys.argv = [script, *flags]
        with suppress(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")

    def same_machine(self, device, dtype, seed, shard, compile):
        torch.manual_seed(seed)
        return dataclasses.replace(self.machine, shards=shard)

    def observed_step(self, optimizer, buffer, scaler, sums, grad_clip):
        norm = self.optimizer_step(optimizer, buffer, scaler, sums, grad_clip)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = [x for values in optimizer.state.values() for x in values.values() if x.dim()]
        held = {"gradients": len(buffer.gradients)}
        held |= {
            name: sum(local_shard(x).numel() for x in xs) for name, xs in (("weights", parameters), ("state", state))
        }
        held["all"] = {"weights": sum(p.numel() for p in parameters), "state": sum(x.numel() for x in state)}
        Path(f"held.{self.kind}.{self.machine.rank}").write_text(json.dumps(held), "utf-8")
        return norm

    def infinite_loss(self, model, batch):
        """The second process's second pass of training has an infinite loss."""
        loss_sum, count, metrics = self.next_token_loss(model, batch)
        self.calls += batch.split == "train"
        broken = self.machine.rank == 1 and self.calls == 2 and batch.split == "train"
        return loss_sum * (math.inf if broken else 1), count, metrics

    def signalled_loss(self, model, batch):
        """The second process alone is told to stop, in its third step."""
        self.calls += batch.split == "train"
        if self.machine.rank == 1 and self.calls == 3 and batch.split == "train":
            os.kill(os.getpid(), signal.SIGTERM)
        return self.next_token_loss(model, batch)


def many_runs(folder, names):
    ManyRuns(folder, names).main()


class Runs(NamedTuple):
    folder: Path
    results: list


def make_runs(folder: Path, data, chats, base_dir, names, processes: int) -> Runs:
    texts, pairs = make_documents("pretrain", 12, seed=4), make_pairs(24)
    write_data(folder / "few", texts[2:], texts[:2])
    write_data(folder / "pairs", pairs[8:], pairs[:8], kind="dpo")
    for name, path in (("texts", data), ("chats", chats), ("base", base_dir)):
        (folder / name).symlink_to(path)
    return Runs(folder, Processes(folder / "logs", many_runs, folder, names, processes=processes).wait())


@pytest.fixture(scope="module")
def two(tmp_path_factory, data, chat_data, base_dir) -> Runs:
    return make_runs(tmp_path_factory.mktemp("two"), data, chat_data, base_dir, FAST, processes=2)


def assert_equal_runs(runs: Runs, name: str, bound: float = 1e-5):
    whole, spread = (runs.folder / kind / name / "out" for kind in ("whole", "spread"))
    assert (spread / "run.json").exists(), [result.err for result in runs.results]
    ours, theirs = records(spread), records(whole)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, expected in zip(ours, theirs):
        for key in expected.keys() & {"loss", "val_loss", "grad_norm", "balance_loss"}:
            assert line[key] == pytest.approx(expected[key], rel=bound), (line["step"], key)
        assert line["tokens"] == expected["tokens"]
    for file in (spread.glob("*.safetensors"), spread.glob("training_state/*")):
        (path,) = file
        tensors, expected = load_file(path), load_file(whole / path.relative_to(spread))
        assert tensors.keys() == expected.keys()
        for key in tensors:
            if not key.startswith("random."):  # of a gradient's squares, four times the rounding
                allowed = 4 * bound if key.startswith("optimizer.") else bound
                assert relative_difference(tensors[key], expected[key]) < allowed or not expected[key].any(), key


@pytest.mark.parametrize("name", FAST)
def test_a_sharded_run_learns_what_a_whole_one_does(name, two):
    assert_equal_runs(two, name)


def test_each_process_holds_its_share_of_weights_gradients_and_optimizer(two):
    for rank in range(2):
        held = json.loads((two.folder / f"held.spread.{rank}").read_text("utf-8"))
        for name in ("weights", "gradients", "state"):
            whole = held["all"]["state" if name == "state" else "weights"]
            assert held[name] <= 0.51 * whole, name


def test_a_step_that_is_not_finite_is_left_out_by_all(two):
    said = two.results[0].out.partition("infinite_loss")[2]
    assert "step 2 skipped: loss or gradient not finite; samples: [" in said
    out = two.folder / "broken/infinite_loss/out"
    assert saved_progress(out)["step"] == 4
    assert all(parameter.isfinite().all() for parameter in load_model(out).parameters())


def test_a_stop_that_one_process_hears_stops_all_and_the_step_is_left_out(two):
    assert saved_progress(two.folder / "broken/signalled_loss/out")["step"] == 2
    assert [result.status for result in two.results] == [0, 0], two.results


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_stage_learns_the_same_in_several_processes(processes, data, chat_data, base_dir, tmp_path):
    runs = make_runs(tmp_path, data, chat_data, base_dir, tuple(RUNS), processes)
    for name in RUNS:
        assert_equal_runs(runs, name)


class Graphs(list):
    """A compiler's backend that runs graphs as they are, and keeps how many attentions each has."""

    def __call__(self, graph: torch.fx.GraphModule, inputs):
        self.append(sum("scaled_dot_product_attention" in str(node.target) for node in graph.graph.nodes))
        return graph.forward


def compile_sharded(folder: Path):
    """The gradients of sharded models of two and four layers, compiled and not, and the graphs."""
    machine_of_two, found = machine.start_machine("cpu", "float32", 0, shard=True), {}
    model_module.attention_here = lambda *_: "masked"
    for layers, checkpoints in ((2, False), (4, False), (2, True)):
        for compiled in (False, True):
            model = random_model(LMConfig(**PRESETS["tiny"] | dict(num_hidden_layers=layers))).train()
            model.model.gradient_checkpointing = checkpoints
            shard_model(model, machine_of_two)
            graphs = Graphs()
            if compiled:
                torch._dynamo.reset()
                for module in modules_to_compile(model, machine_of_two):
                    module.compile(backend=graphs)
            loss.next_token_loss(model, made_up_batch(2, 64, 6400))[0].backward()
            gradient = torch.cat([local_shard(parameter.grad).flatten() for parameter in model.parameters()])
            found[layers, checkpoints, compiled] = [*graphs], gradient
    torch.save(found, folder / f"found.{machine_of_two.rank}")


@pytest.mark.slow  # the compiler takes its time
def test_the_layers_of_a_sharded_model_are_compiled_once_and_compute_the_same(tmp_path):
    """With the attention that GPUs have; all layers use one graph, so that no limit of graphs is met."""
    results = Processes(tmp_path / "logs", compile_sharded, tmp_path, processes=2).wait()
    assert [result.status for result in results] == [0, 0], results
    for rank in range(2):
        found = torch.load(tmp_path / f"found.{rank}")
        for layers, checkpoints in ((2, False), (4, False), (2, True)):
            graphs, gradient = found[layers, checkpoints, True]
            assert relative_difference(gradient, found[layers, checkpoints, False][1]) < 1e-5
            assert graphs == [1]


def stop_in_step_5():
    signal_in_pass(5, signal.SIGTERM)


def assert_close(one: Path, other: Path):
    for name in ("model.safetensors", "training_state/state.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        for key in a.keys() - {"random.0", "random.1", "random.2", "random.3"}:
            assert relative_difference(a[key], b[key]) < 1e-3 or not b[key].any(), key


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit_and_to_rounding_otherwise(data, start, tmp_path):
    """In as many processes; and in more, or in one that holds all. And one of whole models goes on sharded."""

    def finish(name: str, processes: int, *flags, begun: str = "", status: int = 0, patch=None):
        if begun:
            shutil.copytree(tmp_path / begun, tmp_path / name)
            flags = (*flags, "--resume")
        command = [*RUNS["dense"], "--data", data, "--max_steps", "8", "--device", "cpu", "--out_dir", tmp_path / name]
        results = start(*command, *flags, patch=patch, processes=processes).wait()
        assert {result.status for result in results} == {status}, results

    finish("stopped", 2, "--shard", status=143, patch=stop_in_step_5)
    assert saved_progress(tmp_path / "stopped")["step"] == 4
    finish("whole", 2)
    finish("uninterrupted", 2, "--shard")
    finish("resumed", 2, "--shard", begun="stopped")
    assert_same_tensors(tmp_path / "uninterrupted", tmp_path / "resumed")
    finish("in four", 4, "--shard", "--batch_size", "1", begun="stopped")
    finish("in one", 1, "--batch_size", "4", begun="stopped")
    finish("stopped whole", 2, status=143, patch=stop_in_step_5)
    finish("spread later", 2, "--shard", begun="stopped whole")
    for name in ("uninterrupted", "in four", "in one", "spread later"):
        assert_close(tmp_path / name, tmp_path / "whole")


def test_the_estimate_falls_by_what_is_spread():
    """The first line of the table in docs/hardware.md."""
    with torch.device("meta"):
        model = CausalLM(LMConfig(**PRESETS["xl"]))
    step = StepSettings(8, 1, 512, grad_checkpointing=True, optimizer="adamw")
    estimates = [memory_estimate(model, step, 2, "flash", processes) / 2**30 for processes in (1, 2, 4, 8)]
    assert estimates == pytest.approx([17.8, 11.4, 7.7, 5.9], abs=0.051)


def test_what_cannot_be_sharded_is_refused(data, run_here, tmp_path, monkeypatch):
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--shard"]
    assert "give --nproc_per_node" in run_here("1-pretrain.py", *flags).error_line(status=2)
    sharded = machine.Machine(0, 2, torch.device("cpu"), torch.float32, shards=True)
    with pytest.raises(UserError, match="this runs without --shard"):  # 5-grpo.py, and 6-distill.py where it generates
        RolloutGenerator(None, None, sharded, None)
    result = run_here("1-pretrain.py", *flags, "--batch_size", "auto")
    assert result.status == 2
    assert "--shard" in result.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(machine, "TORCH", (2, 7))
    assert "needs torch 2.8" in run_here("1-pretrain.py", *flags).error_line(status=2)
