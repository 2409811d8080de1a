"""Several folders: exact proportions, every row of one before any comes again, and figures of each."""

import json
import math
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import (
    SHORT_RUN,
    SMALL_CONFIG,
    assert_same_tensors,
    change_meta,
    make_documents,
    make_pairs,
    records,
    saved_progress,
    signal_in_pass,
    write_data,
)

from base.cli import UserError
from model.model import CausalLM
from training import loss
from training.loss import evaluate, next_token_loss
from training.machine import Machine
from training.packing import IGNORE, PackedDataset, named_folders, read_mix
from training.plots import plot

MIX = {"zh": 0.7, "en": 0.3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sources: en has three times the tokens of zh."""
    directory = tmp_path_factory.mktemp("sources")
    for name, number, seed in (("en", 90, 1), ("zh", 30, 2)):
        documents = make_documents("pretrain", number + 8, seed)
        write_data(directory / name, documents[8:], documents[:8])
    return [directory / "zh", directory / "en"]


def mixture(folders, weights=None, split: str = "train") -> PackedDataset:
    return PackedDataset(folders, split, 64, weights)


def pairs(batch) -> Counter:
    scored = batch.labels != IGNORE
    return Counter(zip(batch.input_ids[scored].tolist(), batch.labels[scored].tolist()))


def rows_by_source(mixed: PackedDataset, epochs: int) -> list[np.ndarray]:
    """Of each source its rows, numbered as it numbers them, in the order of so many epochs."""
    order = np.concatenate([mixed.order(seed=5, epoch=epoch) for epoch in range(epochs)])
    ends = [*mixed.first_row[1:], sum(mixed.n_rows)]
    return [order[(order >= first) & (order < end)] - first for first, end in zip(mixed.first_row, ends)]


# ---------------------------------------------------------------------------------------------------------------- order


def test_one_source_is_read_as_if_it_stood_alone(folders):
    alone = PackedDataset(folders[0], "train", 64)
    mixed = mixture(folders[:1])
    assert (len(mixed), mixed.n_tokens, mixed.real_fraction) == (len(alone), alone.n_tokens, alone.real_fraction)
    for seed in (0, 3):
        for epoch in (0, 1, 7):
            order = mixed.order(seed, epoch)
            assert order.tolist() == alone.order(seed, epoch).tolist()
            one, other = mixed.batch(order[:3]), alone.batch(order[:3])
            for name, value in vars(one).items():
                same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                assert same(value, getattr(other, name)), name


def test_without_weights_every_token_of_all_sources_is_trained_once_an_epoch(folders):
    mixed = mixture(folders)
    expected = Counter()
    for folder in folders:
        alone = PackedDataset(folder, "train", 64)
        expected += pairs(alone.batch(np.arange(len(alone))))
    order = mixed.order(seed=0, epoch=2)
    assert pairs(mixed.batch(order)) == expected
    assert mixed.n_tokens == sum(expected.values())


def test_weights_are_exact_in_every_epoch(folders):
    mixed = mixture(folders, MIX)
    for epoch in range(4):
        order = mixed.order(seed=0, epoch=epoch)
        assert len(order) == len(mixed)
        real = [mixed.batch(order[(order >= mixed.first_row[1]) == which]).real_tokens for which in (False, True)]
        assert real[1] / sum(real) == pytest.approx(0.7, abs=0.03)  # rows are full to some per cent
        half = order[: len(order) // 2] >= mixed.first_row[1]
        assert 0.55 < half.mean() < 0.85, "one source after the other"


def test_no_row_comes_again_before_all_others_of_its_source_have_come(folders):
    mixed = mixture(folders, MIX)
    for rows, n_rows in zip(rows_by_source(mixed, epochs=9), mixed.n_rows):
        assert len(rows) > 2 * n_rows, "the test must see several epochs of each source"
        own_epochs = [rows[start : start + n_rows] for start in range(0, len(rows) - n_rows + 1, n_rows)]
        assert all(sorted(epoch) == list(range(n_rows)) for epoch in own_epochs)
        assert len({tuple(epoch) for epoch in own_epochs}) == len(own_epochs), "two epochs in one order"


def test_the_order_depends_on_seed_and_epoch_alone(folders):
    one, other = mixture(folders, MIX), mixture(folders[::-1], MIX)
    orders = {(seed, epoch): tuple(one.order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert all(tuple(other.order(*key)) == order for key, order in orders.items()), "the order of --data matters"


def test_times_seen_counts_what_the_order_holds(folders):
    mixed = mixture(folders, MIX)
    rows = np.concatenate([mixed.order(0, 0), mixed.order(0, 1)[:10]])
    counts = Counter("zh" if row >= mixed.first_row[1] else "en" for row in rows)
    sizes = dict(zip(mixed.folders, mixed.n_rows))
    assert mixed.times_seen(0, epoch=1, row=10) == {name: counts[name] / sizes[name] for name in ("en", "zh")}


def test_rows_of_a_batch_are_those_of_their_sources(folders):
    mixed = mixture(folders, MIX)
    en, zh = (PackedDataset(folder, "train", 64) for folder in folders[::-1])
    batch = mixed.batch(np.array([mixed.first_row[1] + 2, 3]))
    parts = [zh.batch(np.array([2])), en.batch(np.array([3]))]
    for b, part in enumerate(parts):
        for name in ("input_ids", "labels", "position_ids"):
            assert getattr(batch, name)[b].equal(getattr(part, name)[0]), name
    of_zh, of_en = (part.documents for part in parts)
    assert batch.documents == [en.n_documents + document for document in of_zh] + of_en
    shifted = torch.where(parts[1].document_index < 0, -1, parts[1].document_index + len(of_zh))
    assert batch.document_index[0].equal(parts[0].document_index[0])
    assert batch.document_index[1].equal(shifted[0])
    assert mixed.samples(batch.documents) == {str(folders[0]): sorted({*of_zh}), str(folders[1]): sorted({*of_en})}


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_by_source_are_those_of_each_alone_and_the_mean_counts_weights(folders):
    torch.manual_seed(0)
    model, machine = CausalLM(SMALL_CONFIG), Machine(0, 1, torch.device("cpu"), torch.float32)
    figures = evaluate(model, next_token_loss, mixture(folders, MIX, "val"), machine, batch_size=3)
    bytes_a_token, alone = {}, {}
    for name, folder in zip(MIX, folders):
        alone[name] = evaluate(model, next_token_loss, mixture([folder], split="val"), machine, batch_size=3)
        assert alone[name].keys() == {"val_loss", "val_bits_per_byte"}
        for key, value in alone[name].items():
            assert figures[f"{key}_{name}"] == value
        bytes_a_token[name] = alone[name]["val_loss"] / math.log(2) / alone[name]["val_bits_per_byte"]
    mean = sum(weight * alone[name]["val_loss"] for name, weight in MIX.items())
    mean_bytes = sum(weight * bytes_a_token[name] for name, weight in MIX.items())
    assert figures["val_loss"] == pytest.approx(mean, rel=1e-9)
    assert figures["val_bits_per_byte"] == pytest.approx(mean / math.log(2) / mean_bytes, rel=1e-9)


def test_the_plot_shows_each_source(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    values = dict(tokens=1e6, loss=3.0, val_loss=3.0, val_bits_per_byte=1.0)
    values |= {f"{key}_{name}": 2.0 for key in ("val_loss", "val_bits_per_byte") for name in MIX}
    plot([values], tmp_path / "loss.png")
    labels = {axes.get_ylabel(): {line.get_label() for line in axes.get_lines()} for axes in drawn[0].axes}
    assert labels["loss"] == {"loss", "val_loss", "val_loss_zh", "val_loss_en"}
    assert labels["bits"] == {"val_bits_per_byte_zh", "val_bits_per_byte_en"}


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def run_flags(folders):
    flags = ["1-pretrain.py", "--data", *folders, *SHORT_RUN, "--batch_size", "8", "--epochs", "9"]
    return [*flags, "--eval_interval", "4"]


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(folders, run_flags, run_here, monkeypatch, tmp_path):
    steps = math.ceil(len(mixture(folders, MIX)) / 8) + 3  # into the second epoch
    run = [*run_flags, "--mix", "zh=0.7", "en=0.3", "--max_steps", str(steps)]
    whole = run_here(*run, "--out_dir", tmp_path / "whole")
    assert whole.status == 0, whole.err
    assert "zh: 70.0% of the tokens" in whole.out
    monkeypatch.setattr(loss, "next_token_loss", next_token_loss)
    signal_in_pass(steps - 1, signal.SIGINT)
    assert run_here(*run, "--out_dir", tmp_path / "out").status == 130
    assert saved_progress(tmp_path / "out")["epoch"] == 1
    assert run_here(*run, "--out_dir", tmp_path / "out", "--resume").status == 0
    assert_same_tensors(tmp_path / "whole", tmp_path / "out")
    last = records(tmp_path / "out")[-1]
    assert {"val_loss", "val_loss_zh", "val_loss_en", "val_bits_per_byte_zh"} <= last.keys()
    run_record = json.loads((tmp_path / "out/run.json").read_text("utf-8"))
    assert run_record["mix"] == pytest.approx(MIX)
    assert run_record["data"].keys() == MIX.keys()

    result = run_here(*run_flags, "--mix", "zh=0.6", "en=0.4", "--out_dir", tmp_path / "out", "--resume")
    assert "its mix was {'en': 0.3, 'zh': 0.7}" in result.error_line(status=2)


def test_a_run_of_one_source_that_is_older_than_the_mix_can_be_resumed(folders, run_flags, run_here, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    run = ["1-pretrain.py", "--data", folders[0], *run_flags[4:], "--out_dir", tmp_path / "out"]
    assert run_here(*run, "--max_steps", "1").status == 0
    path = tmp_path / "out/training_state/state.safetensors"
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()["info"])
    del info["must_agree"]["mix"]
    save_file(load_file(path), path, {"info": json.dumps(info)})
    result = run_here(*run, "--max_steps", "2", "--resume")
    assert result.status == 0, result.err


def test_preferences_of_several_sources_start_at_ln_2(base_dir, run_here, tmp_path):
    """Where a document's reference were another's, the ratio of a model to itself would not be 1."""
    chats = make_pairs(40)
    for name, part in (("a", chats[:32]), ("b", chats[32:])):
        write_data(tmp_path / name, part[8:], part[:8], kind="dpo")
    flags = ["--data", tmp_path / "a", tmp_path / "b", "--mix", "a=1", "b=3", "--init_from", base_dir]
    flags += ["--max_seq_len", 256, "--max_steps", 1, "--batch_size", 2, "--out_dir", tmp_path / "dpo"]
    result = run_here("4-dpo.py", *flags)
    assert result.status == 0, result.err
    first, last = (records(tmp_path / "dpo")[i] for i in (0, -1))
    for name in ("val_loss", "val_loss_a", "val_loss_b"):
        assert first[name] == pytest.approx(math.log(2), abs=1e-4)
    assert last["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["val_reward_chosen_a"] == pytest.approx(0, abs=1e-3)
    assert len([*(tmp_path / "dpo-reference").iterdir()]) == 2


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_weights_come_from_words_or_a_file(tmp_path):
    assert read_mix(["zh=7", "en=3"], ["en", "zh"]) == {"zh": 7, "en": 3}
    (tmp_path / "mix.json").write_text(json.dumps(MIX))
    assert read_mix([str(tmp_path / "mix.json")], ["en", "zh"]) == MIX
    assert read_mix(None, ["en", "zh"]) is None


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("zh=1", "--mix names zh; the sources of --data are en, zh"),
        ("zh=1 en=1 fr=1", "fr"),
        ("zh=1 en=0", "above 0"),
        ("zh=1 en=much", "above 0"),
        ("zh", "neither NAME=WEIGHT nor a file"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(mix, message, folders, run_here):
    result = run_here("1-pretrain.py", "--data", *folders, "--mix", *mix.split())
    assert message in result.error_line(status=2)


def test_names_are_the_folders_or_given(folders, tmp_path):
    assert [*named_folders(folders)] == ["zh", "en"]
    assert [*named_folders([f"a={folders[0]}", f"b={folders[0]}"])] == ["a", "b"]
    assert named_folders([tmp_path / "x=1" / "c"]) == {"c": tmp_path / "x=1" / "c"}
    with pytest.raises(UserError, match=f"two sources have the name zh; give --data NAME={folders[0]}"):
        named_folders([folders[0], folders[0]])


def test_every_source_must_be_of_the_stage_s_kind(folders, chat_data, base_dir, run_here):
    result = run_here("2-sft.py", "--data", chat_data, folders[0], "--init_from", base_dir)
    assert f"{folders[0]} was made with `data_process.py pretrain`" in result.error_line(status=2)


def test_sources_of_two_tokenizers_are_refused(folders, tmp_path):
    other = write_data(tmp_path / "other", [[1, 5, 2]], [[1, 5, 2]])
    change_meta(other, tokenizer_sha256="another")
    with pytest.raises(UserError, match="different tokenizers"):
        mixture([folders[0], other])
