"""Every pair of a token and the next is trained once, rows are full, and a damaged folder is one line."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from helpers import change_meta, make_documents, write_data

from base.cli import UserError
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training.loss import next_token_loss
from training.packing import IGNORE, PackedDataset, pack


def all_rows(dataset: PackedDataset):
    return dataset.batch(np.arange(len(dataset)))


def random_documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Of so many different tokens that hardly two pairs of neighbours are alike."""
    rng = random.Random(seed)
    return [[rng.randrange(1, 6400) for _ in range(length)] for length in lengths]


def trained_pairs(batch) -> Counter:
    scored = batch.labels != IGNORE
    return Counter(zip(batch.input_ids[scored].tolist(), batch.labels[scored].tolist()))


# ---------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("max_seq_len", [1, 7, 32, 1000])
def test_every_pair_of_every_text_is_trained_once_an_epoch(max_seq_len, tmp_path):
    rng = random.Random(max_seq_len)
    lengths = [1, 2, max_seq_len, max_seq_len + 1, max_seq_len + 2, 5 * max_seq_len + 1]
    documents = random_documents(lengths + [rng.randint(1, 3 * max_seq_len) for _ in range(60)])
    dataset = PackedDataset(write_data(tmp_path / "data", documents, documents[:1]), "train", max_seq_len)
    expected = Counter(pair for document in documents for pair in zip(document, document[1:]))
    assert trained_pairs(all_rows(dataset)) == expected
    assert dataset.n_tokens == sum(expected.values())


def test_one_epoch_of_batches_is_one_epoch_of_rows(data):
    dataset = PackedDataset(data, "train", 32)
    order = dataset.order(seed=0, epoch=3)
    pairs = Counter()
    for start in range(0, len(order), 5):
        pairs += trained_pairs(dataset.batch(order[start : start + 5]))
    assert pairs == trained_pairs(all_rows(dataset))


def test_rows_of_texts_of_natural_length_are_full(tmp_path):
    documents = make_documents("pretrain", 1500, seed=4)
    data = write_data(tmp_path / "data", documents, documents[:1])
    for max_seq_len in (128, 256, 512):
        dataset = PackedDataset(data, "train", max_seq_len)
        assert dataset.real_fraction >= 0.97, max_seq_len
        batch = all_rows(dataset)
        assert dataset.real_fraction == pytest.approx((batch.labels != IGNORE).float().mean().item())
        assert batch.real_tokens == dataset.n_tokens


def test_rows_of_chats_of_natural_length_are_full(tmp_path):
    chats = make_documents("sft", 600, seed=4)
    dataset = PackedDataset(write_data(tmp_path / "data", chats, chats[:1], kind="sft"), "train", 512)
    assert dataset.real_fraction >= 0.90


def test_packing_never_overfills_a_row_nor_loses_a_document():
    rng = np.random.default_rng(0)
    for _ in range(300):
        capacity = int(rng.integers(1, 60))
        lengths = rng.integers(0, capacity + 1, size=rng.integers(0, 80))
        rows = pack(lengths, capacity)
        filled = np.bincount(rows, weights=lengths) if len(rows) else np.zeros(0)
        assert len(rows) == len(lengths)
        assert (filled <= capacity).all()
        assert filled.sum() == lengths.sum()
        assert len(filled) <= 2 * np.ceil(lengths.sum() / capacity) + 1, "two rows that would fit into one"


def test_positions_restart_at_every_document_and_at_the_padding(tmp_path):
    documents = random_documents([9, 6, 4])  # 8 + 5 + 3 pairs: one row of 20 with 4 of padding
    dataset = PackedDataset(write_data(tmp_path / "data", documents, documents[:1]), "train", 20)
    batch = all_rows(dataset)
    starts = {document[0]: len(document) - 1 for document in documents}
    expected, at = [], 0
    while at < 16:
        length = starts.pop(int(batch.input_ids[0, at]))
        expected += range(length)
        at += length
    assert not starts
    assert batch.position_ids[0].tolist() == [*expected, *range(4)]
    assert (batch.labels[0, 16:] == IGNORE).all()
    assert batch.real_tokens == 16
    assert batch.attention_pairs == sum(n * (n + 1) // 2 for n in (8, 5, 3))


def test_labels_never_reach_into_the_next_document(tmp_path):
    documents = [[number] * 5 for number in range(100, 120)]  # a pair of two numbers would cross
    dataset = PackedDataset(write_data(tmp_path / "data", documents, documents[:1]), "train", 16)
    assert all(a == b for a, b in trained_pairs(all_rows(dataset)))


def test_the_documents_of_a_batch_are_named(tmp_path):
    documents = [[number + 100] * 4 for number in range(10)]
    dataset = PackedDataset(write_data(tmp_path / "data", documents, documents[:1]), "train", 10)
    for row in range(len(dataset)):
        batch = dataset.batch([row])
        tokens = batch.input_ids[batch.labels != IGNORE]
        assert Counter(batch.documents) == Counter((tokens - 100).unique().tolist())
        named = np.array(batch.documents)[batch.document_index[batch.labels != IGNORE]]
        assert named.tolist() == (tokens - 100).tolist()


# ---------------------------------------------------------------------------------------------------------------- order


def test_the_order_depends_on_seed_and_epoch_alone(data):
    first, again = (PackedDataset(data, "train", 32) for _ in range(2))
    np.random.seed(7)  # noqa: NPY002  the global state must not matter
    order = first.order(seed=0, epoch=0)
    assert sorted(order) == list(range(len(first)))
    assert order.tolist() == again.order(seed=0, epoch=0).tolist()
    others = [first.order(seed, epoch).tolist() for seed, epoch in ((0, 1), (1, 0), (1, 1))]
    assert order.tolist() != list(range(len(first)))
    assert len({tuple(o) for o in [order.tolist(), *others]}) == 4


def test_the_same_row_is_the_same_batch(data):
    dataset = PackedDataset(data, "train", 32)
    one, two = dataset.batch([3, 1]), dataset.batch([1])
    assert one.input_ids[1].equal(two.input_ids[0])
    assert one.labels[1].equal(two.labels[0])


# ---------------------------------------------------------------------------------------------------------------- chats


def chat(length: int, trained: range, first_token: int) -> tuple[list[int], list[int]]:
    return list(range(first_token, first_token + length)), [int(i in trained) for i in range(length)]


def test_only_the_trained_tokens_of_chats_are_targets(tmp_path):
    chats = [chat(8, range(3, 6), 100), chat(6, range(5, 6), 200), chat(5, range(1, 2), 300)]
    dataset = PackedDataset(write_data(tmp_path / "data", chats, chats[:1], kind="sft"), "train", 32)
    expected = {(ids[i - 1], ids[i]): 1 for ids, mask in chats for i in range(1, len(ids)) if mask[i]}
    assert trained_pairs(all_rows(dataset)) == expected
    assert (dataset.truncated, dataset.dropped) == (0, 0)


def test_chats_longer_than_a_row_are_cut_or_left_out_and_counted(tmp_path):
    chats = [
        chat(30, range(5, 30), 100),  # cut: its beginning has targets
        chat(30, range(15, 30), 200),  # left out: its targets begin after the cut
        chat(11, range(9, 11), 300),  # fits: 10 pairs
        chat(12, range(10, 12), 400),  # cut by one token: a target is left
        chat(12, range(11, 12), 500),  # the target is the one that is cut off
        chat(9, range(0), 600),  # no target at all
        chat(1, range(1), 700),  # a lone token has no pair
    ]
    dataset = PackedDataset(write_data(tmp_path / "data", chats, chats[:1], kind="sft"), "train", 10)
    assert sorted(set(dataset.piece_document.tolist())) == [0, 2, 3]
    assert (dataset.truncated, dataset.dropped) == (2, 4)
    batch = all_rows(dataset)
    assert ((batch.labels != IGNORE).sum(1) > 0).all(), "a row without a target"
    assert trained_pairs(batch) == Counter((i - 1, i) for r in ((105, 111), (309, 311), (410, 411)) for i in range(*r))


def test_every_row_of_chats_has_a_target_whatever_the_length(chat_data):
    for max_seq_len in (24, 40, 64, 128):
        dataset = PackedDataset(chat_data, "train", max_seq_len)
        assert len(dataset), max_seq_len
        assert ((all_rows(dataset).labels != IGNORE).sum(1) > 0).all(), max_seq_len


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def folder(tmp_path):
    chats = [chat(8, range(3, 6), 100 * n) for n in range(1, 9)]
    return write_data(tmp_path / "sft", chats[2:], chats[:2], kind="sft")


def cut(folder, name: str, size: int):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-size])


DAMAGE = {  # what happened: how, and what the message must name
    "tokens cut": (lambda f: cut(f, "train.bin", 2), "train.bin"),
    "tokens cut within one": (lambda f: cut(f, "train.bin", 1), "train.bin"),
    "index cut": (lambda f: cut(f, "train.idx", 8), "train.idx"),
    "index cut within a number": (lambda f: cut(f, "train.idx", 3), "train.idx"),
    "mask cut": (lambda f: cut(f, "train.mask", 1), "train.mask"),
    "mask of the other split": (lambda f: (f / "val.mask").replace(f / "train.mask"), "train.mask"),
    "tokens empty": (lambda f: (f / "train.bin").write_bytes(b""), "train.bin"),
    "index empty": (lambda f: (f / "train.idx").write_bytes(b""), "train.idx"),
    "mask empty": (lambda f: (f / "train.mask").write_bytes(b""), "train.mask"),
    "no tokens": (lambda f: (f / "train.bin").unlink(), "train.bin"),
    "no index": (lambda f: (f / "train.idx").unlink(), "train.idx"),
    "no mask": (lambda f: (f / "train.mask").unlink(), "train.mask"),
    "no meta": (lambda f: (f / "meta.json").unlink(), "no prepared data"),
    "meta empty": (lambda f: (f / "meta.json").write_bytes(b""), "meta.json"),
    "meta cut": (lambda f: cut(f, "meta.json", 5), "meta.json"),
    "meta not UTF-8": (lambda f: (f / "meta.json").write_bytes(b"\xff\xfe"), "meta.json"),
    "meta a list": (lambda f: (f / "meta.json").write_text("[1]"), "meta.json"),
    "meta of another format": (lambda f: change_meta(f, format_version=1), "meta.json has format 1"),
    "meta without format": (lambda f: change_meta(f, format_version=None), "meta.json"),
    "meta without kind": (lambda f: change_meta(f, kind=None), "meta.json"),
    "no tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer.json"),
    "no sizes of tokens": (lambda f: (f / "token_bytes.bin").unlink(), "token_bytes.bin"),
    "meta without dtype": (lambda f: change_meta(f, dtype=None), "meta.json"),
    "meta with a strange dtype": (lambda f: change_meta(f, dtype="float64"), "meta.json"),
    "meta with a strange group": (lambda f: change_meta(f, group=0), "meta.json"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_one_line_that_names_the_file(what, folder):
    damage, named = DAMAGE[what]
    damage(folder)
    with pytest.raises(UserError) as error:
        PackedDataset(folder, "train", 16)
    message = str(error.value)
    assert named in message
    assert str(folder) in message
    assert "\n" not in message


def test_a_folder_that_is_not_there_names_the_command(tmp_path):
    with pytest.raises(UserError, match=re.escape("python data_process.py sft")):
        PackedDataset(tmp_path / "sft", "train", 16)


def test_a_split_without_documents_has_no_rows(tmp_path):
    data = write_data(tmp_path / "data", [[1, 2, 3]], [])
    assert len(PackedDataset(data, "val", 16)) == 0
    assert PackedDataset(data, "val", 16).real_fraction == 0


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_a_batch_of_no_rows_is_padding_that_adds_nothing(preset, data):
    """With --shard a process without a row takes part in the pass with such a batch."""
    batch = PackedDataset(data, "train", 32).batch(np.arange(0))
    assert (batch.documents, batch.real_tokens, batch.attention_pairs, batch.scored) == ([], 0, 0, 0)
    model = CausalLM(LMConfig(**PRESETS[preset])).train()
    loss_sum, count, metrics = next_token_loss(model, batch)
    loss_sum.backward()
    assert (loss_sum.item(), count) == (0, 0)
    assert all(not metric.any() for metric in metrics.values())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
