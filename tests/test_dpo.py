"""DPO: the loss of the paper, ln 2 at step 0, pairs that stay together, and a reference that is computed once."""

import json
import math
import runpy

import numpy as np
import pytest
import torch
from helpers import ROOT, make_pairs, write_data

from model.chat import IM_END
from model.checkpoint import load_model, load_tensors, save_tensors
from training.machine import Machine
from training.packing import IGNORE, PackedDataset
from training.reference import cached_log_probs

DPO = runpy.run_path(str(ROOT / "4-dpo.py"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    chats = make_pairs(48)
    return write_data(tmp_path_factory.mktemp("data") / "dpo", chats[16:], chats[:16], kind="dpo")


def test_loss_and_gradient_are_the_published_formulas():
    beta, smoothing = 0.3, 0.1
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 5, generator=generator, dtype=torch.float64) * 3
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = values

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    for kind, epsilon in (("sigmoid", 0.0), ("sigmoid", smoothing), ("ipo", 0.0)):
        chosen = (policy_chosen - ref_chosen).float().requires_grad_()
        rejected = (policy_rejected - ref_rejected).float().requires_grad_()
        losses = DPO["preference_loss"](chosen, rejected, beta, kind, epsilon)
        losses.sum().backward()
        for i, margin in enumerate(((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)).tolist()):
            if kind == "ipo":  # 2310.12036, eq. 17
                loss, slope = (margin - 1 / (2 * beta)) ** 2, 2 * (margin - 1 / (2 * beta))
            else:  # 2305.18290, eq. 7, and its gradient, below it; with label smoothing, a mixture of both directions
                loss = -(1 - epsilon) * math.log(sigmoid(beta * margin)) - epsilon * math.log(sigmoid(-beta * margin))
                slope = -beta * ((1 - epsilon) * sigmoid(-beta * margin) - epsilon * sigmoid(beta * margin))
            assert losses[i].item() == pytest.approx(loss, rel=1e-5)
            assert chosen.grad[i].item() == pytest.approx(slope, rel=1e-5)
            assert rejected.grad[i].item() == pytest.approx(-slope, rel=1e-5)


def test_log_probabilities_are_those_of_each_answer_alone(pairs, base_dir):
    model, data = load_model(base_dir).eval(), PackedDataset(pairs, "train", 256)
    batch = data.batch(np.arange(min(2, len(data))))
    with torch.no_grad():
        log_probs, lengths = DPO["answer_log_probs"](model, batch)
    assert len(log_probs) == len(batch.documents)
    for document, log_prob, length in zip(batch.documents, log_probs.tolist(), lengths.tolist()):
        ids, mask = make_pairs(48)[16:][document]
        ids, mask = torch.tensor(ids), torch.tensor(mask[1:], dtype=torch.bool)
        with torch.no_grad():
            alone = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0][mask].sum().item()
        assert log_prob == pytest.approx(alone, abs=1e-3)
        assert length == mask.sum()


def test_a_pair_stays_together_in_one_row_and_each_half_may_fill_half_of_it(pairs):
    for max_seq_len in (256, 64, 40):
        data = PackedDataset(pairs, "train", max_seq_len)
        seen = []
        for row in range(len(data)):
            batch = data.batch(np.array([row]))
            documents = batch.documents
            assert documents[1::2] == [document + 1 for document in documents[0::2]]
            assert not any(document % 2 for document in documents[0::2])
            scored = batch.document_index[batch.labels != IGNORE]
            assert set(scored.tolist()) == set(range(len(documents)))  # every half has a target
            seen += documents
        assert len(seen) == len(set(seen)) == 80 - data.dropped
    assert data.truncated + data.dropped > 0  # at 40 tokens a row


def test_both_halves_see_the_same_prompt_and_are_trained_to_stop(pairs):
    chats = make_pairs(48)
    for (chosen, chosen_mask), (rejected, rejected_mask) in zip(chats[0::2], chats[1::2]):
        assert chosen[: chosen_mask.index(1)] == rejected[: rejected_mask.index(1)]
        assert [t for t, m in zip(rejected, rejected_mask) if m][-1] == IM_END


def test_the_stage_starts_at_ln_2_learns_the_preference_and_reads_the_reference_again(
    pairs, base_dir, run_here, tmp_path
):
    flags = ["--data", pairs, "--init_from", base_dir, "--max_seq_len", 256, "--eval_interval", 8, "--max_steps", 16]
    flags += ["--batch_size", 2, "--learning_rate", 3e-3, "--warmup_steps", 2]
    assert run_here("4-dpo.py", *flags, "--out_dir", tmp_path / "dpo").status == 0
    records = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert records[0]["val_reward_margin"] == pytest.approx(0, abs=1e-3)
    assert records[0]["val_accuracy"] == 0.5, "all are ties"
    assert "val_bits_per_byte" not in records[0]
    assert records[-1]["val_accuracy"] == 1
    assert records[-1]["val_reward_margin"] > 0.1
    assert records[-1]["val_reward_margin"] == pytest.approx(
        records[-1]["val_reward_chosen"] - records[-1]["val_reward_rejected"], rel=1e-3
    )
    files = sorted((tmp_path / "dpo-reference").iterdir())
    assert len(files) == 2
    numbers = load_tensors(files[0])[0]["numbers"]
    for spoilt in ({"numbers": 0.9 * numbers}, {"numbers": numbers[:-2]}, {"other": numbers}):  # step 0 were not ln 2
        save_tensors(files[0], spoilt)
        line = run_here("4-dpo.py", *flags, "--out_dir", tmp_path / "again").error_line(status=2)
        assert f"{files[0].name} does not match this model; delete it" in line
    files[0].write_bytes(files[0].read_bytes()[:-4] + bytes(4))
    assert files[0].name in run_here("4-dpo.py", *flags, "--out_dir", tmp_path / "third").error_line(status=2)
    files[0].unlink()
    assert run_here("4-dpo.py", *flags, "--out_dir", tmp_path / "again").status == 0
    assert load_tensors(files[0])[0]["numbers"].equal(numbers)


@pytest.mark.parametrize("flags", ["--beta 0", "--label_smoothing 1.5", "--sft_weight -1", "--lora_rank -2"])
def test_an_impossible_value_is_refused_with_the_flag_named(flags, pairs, base_dir, run_here, tmp_path):
    result = run_here(
        "4-dpo.py", "--data", pairs, "--init_from", base_dir, "--out_dir", tmp_path / "dpo", *flags.split()
    )
    assert result.status == 2, result.out + result.err
    assert flags.split()[0] in result.err


def test_where_one_of_two_machines_has_the_reference_both_compute_it(pairs, base_dir, tmp_path):
    data = PackedDataset(pairs, "train", 256)
    here, both = (Machine(0, 1, torch.device("cpu"), torch.float32) for _ in range(2))
    both.gather = lambda value: [value, False]  # the other has no such file
    calls, numbers, rows = [], torch.arange(-3.0, 0), np.arange(len(data))

    def compute(rows):
        calls.append(len(rows))
        return numbers if len(rows) == len(data) else torch.tensor([0, numbers[1], 0])

    for machine in (here, both, here):
        assert torch.equal(cached_log_probs(tmp_path / "numbers.safetensors", rows, 1, compute, machine), numbers)
    assert calls == [len(data), len(data), 1], "the last has it, and looks at one row alone"
