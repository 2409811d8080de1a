"""5-grpo.py: its formulas, whose tokens are learnt from, and that it stops, goes on and divides as every stage does."""

import itertools
import json
import math
import os
import random
import runpy
import shutil
import signal
import types
from collections import defaultdict
from functools import partial

import pytest
import torch
from helpers import (
    ROOT,
    assert_same_tensors,
    records,
    saved_progress,
    steps_of,
)
from safetensors.torch import load_file

from engine.generation import Sequence
from model.checkpoint import load_model
from training import rollouts
from training.loop import Run
from training.packing import IGNORE

GRPO = runpy.run_path(str(ROOT / "5-grpo.py"))
SHORT = "--questions 4 --generations 4 --max_new_tokens 12 --max_seq_len 64 --log_interval 1 --eval_rows 2".split()
SHORT += "--warmup_steps 1 --learning_rate 1e-3 --min_learning_rate 1e-4".split()


def flags(tasks, brief_dir, out_dir, reward="parity", *more) -> list:
    own = ["--data", tasks, "--init_from", brief_dir, "--out_dir", out_dir, *SHORT, "--max_steps", 3]
    return [*own, "--reward", f"{tasks.parent / 'rewards.py'}:{reward}", *more]


# ------------------------------------------------------------------------------------------------------------- formulas


def test_advantages_are_those_of_the_papers():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    plain = GRPO["group_advantages"](rewards, scale_rewards=False)
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75], [0, 0, 0, 0]]
    scaled = GRPO["group_advantages"](rewards, scale_rewards=True)
    for row, expected in zip(scaled, rewards):
        mean = expected.mean()
        std = ((expected - mean).square().sum() / 3).sqrt()  # with Bessel's correction
        torch.testing.assert_close(row, (expected - mean) / (std + 1e-4))
    halved = GRPO["group_advantages"](rewards, scale_rewards=False, worse_weight=0.5)
    assert halved.tolist() == [[0.5, -0.25, -0.25, 0.5], [-0.125, -0.125, -0.125, 0.75], [0, 0, 0, 0]]


@pytest.mark.parametrize("clip", [(0.2, 0.28), (0.2, 0.2)])
def test_the_loss_is_the_clipped_surrogate_and_where_it_is_clipped_nothing_is_learnt(clip):
    low, high = clip
    for advantage, ratio in itertools.product((-1.5, 2.0), (0.5, 0.79, 1.0, 1.1, 1.27, 1.5)):
        log_probs = torch.tensor([math.log(ratio * 0.3)], requires_grad=True)
        loss = GRPO["policy_loss"](log_probs, torch.tensor([math.log(0.3)]), torch.tensor([advantage]), low, high)
        clipped = min(max(ratio, 1 - low), 1 + high)
        assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage), rel=1e-5)
        loss.backward()
        learns = ratio * advantage <= clipped * advantage
        assert log_probs.grad.item() == pytest.approx(-ratio * advantage if learns else 0, rel=1e-4)


def test_the_gradient_is_that_of_the_expected_reward():
    """On a toy of three tokens every answer can be counted: the mean of A grad ln p over samples is the gradient of the
    expected reward, and subtracting the group's mean changes only its scale, by (G - 1) / G."""
    torch.manual_seed(0)
    logits = torch.randn(3, requires_grad=True)
    reward = torch.tensor([0.0, 1.0, 0.3])
    (exact,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    answers = 4
    estimate = torch.zeros(3)
    for group in itertools.product(range(3), repeat=answers):  # all groups, with their probabilities
        chosen = torch.tensor(group)
        log_probs = logits.log_softmax(0)[chosen]
        weight = log_probs.detach().sum().exp()
        advantages = GRPO["group_advantages"](reward[chosen][None], scale_rewards=False)[0]
        loss = GRPO["policy_loss"](log_probs, log_probs.detach(), advantages, 0.2, 0.28).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        estimate -= weight * gradient
    torch.testing.assert_close(estimate, exact * (answers - 1) / answers, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- what is learnt from


def made_up_rollouts(number: int) -> list[rollouts.Rollout]:
    rng = random.Random(0)
    made = []
    for i in range(number):
        tokens = [rng.randrange(16, 6400) for _ in range(rng.randint(2, 20))] + [4]
        sequence = Sequence([rng.randrange(16, 6400) for _ in range(rng.randint(1, 9))], 99, tokens=tokens)
        sequence.chosen = [rng.random() < 0.8 for _ in tokens[:-1]] + [True]
        sequence.log_probs = [rng.uniform(-5, 0) for _ in tokens]
        made.append(rollouts.Rollout(i, sequence, None, 0.0, advantage=float(i + 1)))
    return made


@pytest.mark.parametrize("order", ["as written", "shuffled"])
def test_exactly_the_chosen_tokens_are_learnt_each_with_its_own_advantage(order):
    made = made_up_rollouts(30)
    given = list(made)
    if order == "shuffled":
        random.Random(1).shuffle(given)
    found = {one.question: [] for one in made}
    for batch in rollouts.learning_batches(given, max_seq_len=64, batch_size=3):
        for b, t in (batch.labels != IGNORE).nonzero().tolist():
            question = batch.documents[batch.document_index[b, t]]
            assert batch.advantages[b, t] == question + 1
            found[question].append((batch.labels[b, t].item(), round(batch.old_log_probs[b, t].item(), 4)))
    for one in made:
        sequence = one.sequence
        parts = zip(sequence.tokens, sequence.log_probs, sequence.chosen)
        assert found[one.question] == [(token, round(lp, 4)) for token, lp, chosen in parts if chosen]
        assert found[one.question][-1][0] == 4, "the stop token is learnt"


def test_the_one_who_writes_and_the_one_who_learns_agree(tasks, brief_dir, run_here, tmp_path):
    assert run_here("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "out")).status == 0
    lines = [record for record in records(tmp_path / "out") if "gap" in record]
    assert len(lines) == 3
    assert all(record["gap"] < 1e-4 for record in lines)
    assert any(record["grad_norm"] > 0 for record in lines), "nothing was learnt, so this shows nothing"
    assert {"reward", "entropy", "groups_all_wrong", "length", "sampling_seconds"} <= lines[0].keys()
    samples = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").read_text("utf-8").splitlines()]
    assert {"step", "question", "answer", "written", "reward"} <= samples[0].keys()
    assert {"val_accuracy", "val_sampled", "val_best"} <= records(tmp_path / "out")[0].keys()


def test_answers_are_json_of_a_schema(tasks, brief_dir, run_here, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}')
    more = ["--json_schema", schema, "--max_new_tokens", 24]
    assert run_here("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "out", "parity", *more)).status == 0
    for record in records(tmp_path / "out"):
        if "gap" in record:  # the probabilities of generation are those of learning
            assert record["gap"] < 1e-4
    with open(tmp_path / "out" / "rollouts.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["written"].partition("<|")[0].rpartition("</think>")[2] for line in lines]
    assert texts
    assert all(json.loads(text)["n"] in (1, 22) for text in texts)


def test_where_all_answers_are_as_good_nothing_moves(tasks, brief_dir, run_here, tmp_path):
    assert run_here("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "out", "same")).status == 0
    before, after = load_file(brief_dir / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(before[name].equal(after[name]) for name in before)


def test_without_weight_answers_that_are_all_wrong_and_those_below_the_mean_teach_nothing(
    tasks, brief_dir, run_here, tmp_path, monkeypatch
):
    learnt, batches = [], rollouts.learning_batches

    def noted(chosen, *sizes):
        learnt.extend(chosen)
        return batches(chosen, *sizes)

    monkeypatch.setattr(rollouts, "learning_batches", noted)
    assert run_here("5-grpo.py", *flags(tasks, brief_dir, tmp_path, "parity", "--worse_weight", 0)).status == 0
    assert learnt
    assert all(one.reward == 1 and one.advantage > 0 for one in learnt)


@pytest.mark.extra
@pytest.mark.parametrize(
    "options",
    [
        ["--loss", "dapo"],
        ["--loss", "dr_grpo"],
        ["--loss", "grpo"],
        ["--loss", "grpo", "--scale_rewards", "--beta", "0.1"],
    ],
    ids=" ".join,
)
def test_loss_and_gradient_of_a_step_are_trls(options, tasks, brief_dir, run_here, tmp_path, monkeypatch):
    """In a second update with the same answers, where rho is not 1 and some of it is clipped."""
    from trl import GRPOTrainer

    ours = {}
    generate, update = rollouts.RolloutGenerator.generate, Run.update

    def writing(self, tasks, *rest, **more):
        groups = generate(self, tasks, *rest, **more)
        if tasks.split == "train":
            ours["answers"] = [one for group in groups for one in group]
        return groups

    def updating(self, sums):
        ours["loss"] = sums["loss"] / sums["count"]
        ours["weights"] = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        ours["gradients"] = {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}
        return update(self, sums)

    monkeypatch.setattr(rollouts.RolloutGenerator, "generate", writing)
    monkeypatch.setattr(Run, "update", updating)
    more = ["--max_steps", 1, "--updates", 2, "--learning_rate", 0.01, *options]
    result = run_here("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "out", "parity", *more))
    assert result.status == 0, result.err

    def log_probs_of(model, answers):
        rows = []
        for one in answers:
            ids = torch.tensor(one.sequence.prompt + one.sequence.tokens)
            log_probs = model(ids[None, :-1])[0].log_softmax(-1)
            rows.append(log_probs.gather(1, ids[1:, None])[len(one.sequence.prompt) - 1 :, 0])
        return padded(rows)

    model = load_model(brief_dir)
    answers = ours["answers"]
    with torch.no_grad():
        reference = log_probs_of(model, answers)
    model.load_state_dict(ours["weights"])
    mask = padded([torch.ones(len(one.sequence.tokens)) for one in answers])
    inputs = dict(
        prompt_ids=mask[:, :0],  # what stands before the answers is our affair
        prompt_mask=mask[:, :0],
        completion_ids=mask,
        completion_mask=mask,
        advantages=torch.tensor([one.advantage for one in answers]),
        old_per_token_logps=padded([torch.tensor(one.sequence.log_probs) for one in answers]),
        ref_per_token_logps=reference,
        num_items_in_batch=mask.sum(),
    )
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        accelerator=types.SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=model.train(),
        loss_type=options[1],
        beta=0.1 if "--beta" in options else 0.0,
        epsilon_low=0.2,
        epsilon_high=0.28,
        max_completion_length=12,
        current_gradient_accumulation_steps=1,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs_of(model, answers), mask, None),
    )
    loss = GRPOTrainer._compute_loss(trainer, model, inputs)
    loss.backward()
    (clipped,) = trainer._metrics["train"]["clip_ratio/region_mean"]
    assert clipped > 0, "nothing is clipped, so this does not show the clip"
    assert ours["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours["gradients"][name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    """(answers, longest), zeros after the ends."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


# ------------------------------------------------------------------------------------------------- as every stage does


def weights_after(result, out_dir) -> torch.Tensor:
    assert result.status == 0, result.err
    tensors = load_file(out_dir / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("loss", ["dapo", "dr_grpo", "grpo"])
def test_rows_at_once_one_by_one_and_in_two_processes_are_the_same_step(
    loss, tasks, brief_dir, run_here, start, tmp_path
):
    options = ["--loss", loss, "--max_steps", 1, "--optimizer", "muon"]
    many = run_here("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "8", "parity", *options, "--batch_size", 8))
    expected = weights_after(many, tmp_path / "8")
    assert "step 1" in many.out
    one = run_here("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "1", "parity", *options, "--batch_size", 1))
    torch.testing.assert_close(weights_after(one, tmp_path / "1"), expected, atol=1e-5, rtol=1e-4)
    if loss == "dapo":
        two = start("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "2", "parity", *options), processes=2).wait()
        torch.testing.assert_close(weights_after(two[0], tmp_path / "2"), expected, atol=1e-5, rtol=1e-4)


def killed_in_step(number: int):
    """Kills the process when it begins to write the answers of this step."""
    generate, steps = rollouts.RolloutGenerator.generate, itertools.count(1)

    def killing(self, tasks, *rest, **options):
        if tasks.split == "train" and next(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(self, tasks, *rest, **options)

    rollouts.RolloutGenerator.generate = killing


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tasks, brief_dir, start, tmp_path):
    more = ["--save_interval", 1, "--updates", 2, "--max_steps", 4]
    whole = start("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "whole", "parity", *more))
    cut = start(
        "5-grpo.py", *flags(tasks, brief_dir, tmp_path / "cut", "parity", *more), patch=partial(killed_in_step, 3)
    )
    assert whole.wait()[0].status == 0
    assert cut.wait()[0].status == -signal.SIGKILL
    assert saved_progress(tmp_path / "cut")["step"] == 2
    (result,) = start("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "cut", "parity", *more, "--resume")).wait()
    assert result.status == 0, result.err
    assert_same_tensors(tmp_path / "whole", tmp_path / "cut")
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "whole")


def asked_to_stop(place: tuple[type, str], call: int, rank: int = 0):
    """Has this process asked to stop after so many calls of a method."""
    owner, name = place
    method, calls = getattr(owner, name), itertools.count(1)

    def asking(self, *arguments):
        result = method(self, *arguments)
        if int(os.environ["RANK"]) == rank and next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    setattr(owner, name, asking)


def test_a_step_whose_weights_have_moved_is_finished_before_it_stops(tasks, brief_dir, start, tmp_path):
    more = ["--updates", 2, "--max_steps", 3]
    whole = start("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "whole", "parity", *more))
    between = partial(asked_to_stop, (Run, "update"), 3)  # between the two updates of step 2
    cut = start("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "cut", "parity", *more), patch=between)
    assert whole.wait()[0].status == 0
    assert cut.wait()[0].status == 128 + signal.SIGTERM
    assert saved_progress(tmp_path / "cut")["step"] == 2
    (result,) = start("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "cut", "parity", *more, "--resume")).wait()
    assert result.status == 0, result.err
    assert_same_tensors(tmp_path / "whole", tmp_path / "cut")


def test_processes_that_hear_of_a_stop_in_unlike_steps_stop_together(tasks, brief_dir, start, tmp_path):
    more = ["--save_interval", 1, "--max_steps", 4]
    after_saving = partial(asked_to_stop, (Run, "save"), 1)  # one stands between two steps, the other has gone on
    run = flags(tasks, brief_dir, tmp_path / "out", "parity", *more)
    results = start("5-grpo.py", *run, patch=after_saving, processes=2).wait()
    assert [result.status for result in results] == [128 + signal.SIGTERM] * 2, results
    assert saved_progress(tmp_path / "out")["step"] == 1


def test_an_adapter_and_a_reference(tasks, brief_dir, run_here, tmp_path):
    more = ["--lora_rank", 2, "--beta", 0.1, "--scale_rewards"]
    result = run_here("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "out", "parity", *more))
    assert result.status == 0, result.err
    assert (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--max_new_tokens", 63], "no question of train has room in 64 tokens"),
        (["--reward", "praise"], "no reward is called praise"),
        (["--tools", "abacus"], "no tool is called abacus"),
    ],
)
def test_what_cannot_be_is_one_line(more, named, tasks, brief_dir, run_here, tmp_path):
    result = run_here("5-grpo.py", *flags(tasks, brief_dir, tmp_path / "out"), *more)
    assert named in result.error_line(status=2)


def test_questions_come_from_several_folders_in_their_proportions(tasks):
    shutil.copytree(tasks, tasks.with_name("more"), dirs_exist_ok=True)
    data = [f"a={tasks}", f"b={tasks.with_name('more')}"]
    questions = rollouts.PromptDataset(data, "train", 64, 12, {"a": 3, "b": 1})
    assert len(questions.first_questions(2)) == 4  # validation asks questions of each folder
    order = questions.order(seed=0, epoch=0)
    assert len(order) == len(questions) == 2 * 20
    assert (order < 20).sum() == 30
    for first, second in zip(range(20), range(20, 40)):
        assert questions.prompt(first) == questions.prompt(second)
        assert questions.notes[first] == questions.notes[second]
    assert questions.samples([25]) == {str(tasks.with_name("more")): [5]}


def test_chats_are_refused(chat_data, brief_dir, run_here, tmp_path):
    result = run_here("5-grpo.py", "--data", chat_data, "--init_from", brief_dir, "--out_dir", tmp_path / "out")
    assert "needs rl data" in result.error_line(status=2)
