"""The log grows line by line; metrics are declared; a run's data are of the stage's kind."""

import json

import pytest
import torch
from helpers import SMALL_CONFIG, make_documents, make_pairs, records, write_data

from model.model import CausalLM
from training.log import METRICS_FILE, read_metrics
from training.loss import cross_entropy_sum, plain_cross_entropy_sum
from training.optimizer import GradientBuffer
from training.packing import IGNORE


def test_a_line_is_in_the_file_before_the_first_save(data, run_here, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("training.state.save_tensors", lambda *args, **info: seen.append(read_metrics(hidden)))
    hidden = tmp_path / ".out.writing"
    flags = ["--data", data, "--out_dir", tmp_path / "out", "--preset", "tiny", "--max_seq_len", "32"]
    assert run_here("1-pretrain.py", *flags, "--batch_size", "2", "--log_interval", "1", "--max_steps", "3").status == 0
    assert [record["step"] for record in seen[0]] == [0, 1, 2, 3]
    assert not hidden.exists()
    assert records(tmp_path / "out") == seen[0]


def test_a_torn_last_line_and_what_came_after_the_save_are_left_out(tmp_path):
    assert read_metrics(tmp_path) == []
    lines = [json.dumps({"step": step}) for step in range(4)]
    (tmp_path / METRICS_FILE).write_text("\n".join([*lines, '{"step": 4, "lo']), "utf-8")
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert [record["step"] for record in read_metrics(tmp_path, up_to_step=2)] == [0, 1, 2]


def test_what_is_damaged_in_a_log_is_left_out(tmp_path):
    lines = [b"\xff\xfe", b"[1]", b"{}", b"[" * 100_000, b'{"step": "x"}', json.dumps({"step": 7}).encode()]
    (tmp_path / METRICS_FILE).write_bytes(b"\n".join(lines))
    assert read_metrics(tmp_path) == [{"step": 7}]


def test_a_metric_that_was_not_declared_is_an_error():
    buffer = GradientBuffer([torch.nn.Parameter(torch.zeros(3))], {"accuracy": (), "load": (2, 2)})
    buffer.add_sums(accuracy=1.0, load=torch.ones(2, 2))
    with pytest.raises(KeyError, match="margin"):
        buffer.add_sums(margin=1.0)


def test_the_chunked_loss_is_the_plain_one():
    torch.manual_seed(0)
    model = CausalLM(SMALL_CONFIG)
    hidden = torch.randn(3, 400, SMALL_CONFIG.hidden_size, requires_grad=True)  # more tokens than a chunk
    labels = torch.randint(SMALL_CONFIG.vocab_size, (3, 400))
    labels[:, ::7] = IGNORE
    results = []
    for loss in (cross_entropy_sum, plain_cross_entropy_sum):
        loss_sum = loss(hidden, model.lm_head.weight, labels)
        results.append((loss_sum, *torch.autograd.grad(loss_sum, (hidden, model.lm_head.weight))))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("script", "kind"), [("1-pretrain.py", "dpo"), ("2-sft.py", "dpo"), ("2-sft.py", "pretrain"), ("4-dpo.py", "sft")]
)
def test_data_of_another_kind_are_refused(script, kind, base_dir, run_here, tmp_path):
    """Neighbours of ordinary chats would become pairs, and rejected answers would be learnt."""
    if kind == "dpo":
        documents = make_pairs(8)
    else:
        documents = make_documents(kind, 8, seed=0)
    write_data(tmp_path / "data", documents[2:], documents[:2], kind=kind)
    init = [] if script == "1-pretrain.py" else ["--init_from", base_dir]
    result = run_here(script, "--data", tmp_path / "data", "--out_dir", tmp_path / "out", *init)
    assert f"made with `data_process.py {kind}`" in result.error_line(status=2)
