"""Decoding: the cache, batches of unlike prompts, sampling, ends, and text that streams in whole characters."""

import dataclasses

import pytest
import torch
from helpers import TOKENIZER, greedy, prompt, sharp_model
from transformers import AutoModelForCausalLM

from engine import generation
from engine.cache import KVCache
from engine.generation import TextStream, generate, penalize_repetition, sample
from model.chat import IM_END, encode
from model.checkpoint import save_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM

CONFIG = LMConfig(**PRESETS["tiny"] | {"num_hidden_layers": 2, "max_position_embeddings": 64})
LOGITS = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return sharp_model(CONFIG)


@torch.no_grad()
def without_cache(model, ids: list[int], n: int) -> list[int]:
    ids = torch.tensor([ids])
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return ids[0, -n:].tolist()


# ---------------------------------------------------------------------------------------------------------------- cache


def test_cached_uncached_and_transformers_write_the_same(model, tmp_path):
    save_model(tmp_path, model, TOKENIZER)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([prompt(9)])
    generated = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    expected = without_cache(model, prompt(9), 20)
    assert len(set(expected)) > 3, "too dull to tell anything"
    assert greedy(model, [prompt(9)], 20) == [expected]
    assert generated[0, 9:].tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1], [5], [5, 9], list(range(1, 16))], ids=str)
def test_a_prompt_in_pieces_is_the_prompt(cuts, model):
    ids = torch.tensor([prompt(16), prompt(16, seed=1)])
    cache = KVCache(model, 2, 16)
    pieces = [model(piece, cache=cache) for piece in ids.tensor_split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-4, rtol=1e-4)
    assert cache.length == 16


@torch.no_grad()
def test_a_full_cache_is_an_error_and_not_an_overflow(model):
    cache = KVCache(model, 1, 4)
    model(torch.tensor([prompt(3)]), cache=cache)
    with pytest.raises(ValueError, match="holds 4 tokens, not 5"):
        model(torch.tensor([prompt(2)]), cache=cache)


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unlike_prompts_in_a_batch_are_answered_as_if_alone(dtype, monkeypatch):
    model = sharp_model(CONFIG).to(dtype)
    prompts = [prompt(length, seed=length) for length in (3, 11, 1, 11, 7)]
    logits = []

    def recorded_sample(scores, *args, **kwargs):
        logits.append(scores.float())
        return sample(scores, *args, **kwargs)

    monkeypatch.setattr(generation, "sample", recorded_sample)
    together = greedy(model, prompts, 8)
    in_batch, logits = torch.stack(logits), []
    for row, one in enumerate(prompts):
        alone = greedy(model, [one], 8)
        assert in_batch[:, row].isfinite().all()
        precision = 1e-4 if dtype == torch.float32 else 0.05
        scale = in_batch[0, row].std()
        assert ((torch.stack(logits)[0, 0] - in_batch[0, row]).abs().max() / scale) < precision
        if dtype == torch.float32:
            assert together[row] == alone[0]
        logits.clear()


def test_the_padding_of_a_batch_is_not_a_repetition(model):
    prompts = [prompt(2), prompt(9, seed=1)]
    alone = [greedy(model, [one], 10, repetition_penalty=3.0)[0] for one in prompts]
    assert greedy(model, prompts, 10, repetition_penalty=3.0) == alone


# ----------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("n", [0, 1, 7])
def test_max_new_tokens_is_counted_exactly(n, model):
    assert len(list(generate(model, [prompt(5)], n))) == n


def test_a_stop_token_ends_its_prompt_and_the_last_one_ends_all(model):
    first, second = (greedy(model, [prompt(5, seed)], 12)[0] for seed in (0, 1))
    stop = {first[2], second[6]}
    assert not stop & {*first[:2], *second[:6]}, "choose other seeds"
    answers = greedy(model, [prompt(5, 0), prompt(5, 1)], 12, stop_ids=stop)
    assert answers == [first[:3] + [None] * 4, second[:7]]


def test_without_stop_tokens_none_ends_it(model):
    assert None not in greedy(model, [prompt(5)], 30)[0]


@pytest.mark.parametrize(("length", "room"), [(60, 4), (63, 1)])
def test_the_end_of_the_context_ends_the_text(length, room, model):
    assert greedy(model, [prompt(length)], 100) == [without_cache(model, prompt(length), room)]
    long, short = greedy(model, [prompt(length), prompt(3)], 100)
    assert [token for token in long if token is not None] == without_cache(model, prompt(length), room)
    assert short == without_cache(model, prompt(3), 61)


@pytest.mark.parametrize("length", [64, 65, 200])
def test_a_prompt_that_leaves_no_room_is_an_error_that_names_the_numbers(length, model):
    with pytest.raises(ValueError, match=f"{length} tokens.* 64"):
        list(generate(model, [prompt(3), prompt(length)], 5))


def test_an_empty_prompt_is_an_error(model):
    with pytest.raises(ValueError, match="no tokens"):
        list(generate(model, [prompt(3), []], 5))


# ------------------------------------------------------------------------------------------------------------- sampling


def frequencies(logits: torch.Tensor = LOGITS, n: int = 20_000, **options) -> torch.Tensor:
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()
    draws = sample(logits.expand(n, -1), uniforms, **options)
    return torch.bincount(draws, minlength=logits.shape[-1]) / n


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.05, 0.5, 0.15, 0.3]),
        (dict(temperature=0.5), [0.0025, 0.25, 0.0225, 0.09]),
        (dict(temperature=2.0), [0.05**0.5, 0.5**0.5, 0.15**0.5, 0.3**0.5]),
        (dict(temperature=0), [0, 1, 0, 0]),
        (dict(temperature=1e-6), [0, 1, 0, 0]),
        (dict(top_k=1), [0, 1, 0, 0]),
        (dict(top_k=2), [0, 0.5, 0, 0.3]),
        (dict(top_k=4), [0.05, 0.5, 0.15, 0.3]),
        (dict(top_k=1000), [0.05, 0.5, 0.15, 0.3]),
        (dict(top_p=0.45), [0, 1, 0, 0]),
        (dict(top_p=0.55), [0, 0.5, 0, 0.3]),
        (dict(top_p=0.9), [0, 0.5, 0.15, 0.3]),
        (dict(top_p=0.97), [0.05, 0.5, 0.15, 0.3]),
        (dict(top_p=0.0), [0, 1, 0, 0]),  # never nothing
        (dict(min_p=0.09), [0.05, 0.5, 0.15, 0.3]),
        (dict(min_p=0.2), [0, 0.5, 0.15, 0.3]),
        (dict(min_p=0.5), [0, 0.5, 0, 0.3]),
        (dict(min_p=1.0), [0, 1, 0, 0]),
        (dict(top_k=3, top_p=0.6), [0, 0.5, 0, 0.3]),  # 0.6 of what top_k left
        (dict(temperature=0.5, min_p=0.2), [0, 0.25, 0, 0.09]),  # min_p looks at the sharpened probabilities
    ],
    ids=str,
)
def test_samples_follow_the_distribution(options, expected):
    expected = torch.tensor(expected, dtype=torch.float32)
    found = frequencies(**options)
    assert (found[expected == 0] == 0).all(), found
    torch.testing.assert_close(found, expected / expected.sum(), atol=0.015, rtol=0)


def test_every_row_is_sampled_from_its_own_distribution():
    logits = torch.full((3, 50), -100.0)
    logits[torch.arange(3), torch.tensor([7, 0, 49])] = 0
    for options in (dict(), dict(top_p=0.9), dict(top_k=3), dict(min_p=0.1), dict(temperature=0)):
        assert sample(logits, [0.001, 0.5, 0.999999999], **options).tolist() == [7, 0, 49]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_sampled_in_full_precision(dtype):
    logits = torch.zeros(100_000, dtype=dtype)  # each has a probability that half precision cannot add up
    assert sample(logits[None], [0.5], top_p=0.5).shape == (1,)
    assert frequencies(logits[:4], top_p=0.9).sum() == pytest.approx(1)


def test_repetition_penalty_lowers_both_signs():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0, 0.0]]


def test_repetition_penalty_counts_the_prompt_and_what_was_written(model):
    ids = prompt(5)
    plain = greedy(model, [ids + greedy(model, [ids], 20)[0]], 20)[0]
    written = greedy(model, [ids], 40, repetition_penalty=1e6)[0]
    assert len({*written, *ids}) == 45, "a token came twice"
    assert len(set(plain)) < 20, "nothing repeats without a penalty, so this shows nothing"


def test_the_seed_and_it_alone_decides_the_text(model):
    def texts(seed):
        return [step[0] for step in generate(model, [prompt(4)], 20, seed=seed, temperature=1.0, top_p=0.9)]

    first = texts(3)
    torch.manual_seed(99)
    assert texts(3) == first
    assert texts(4) != first
    assert texts(None) != texts(None)


# ------------------------------------------------------------------------------------------------------------ streaming

TEXTS = {
    "Chinese": "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "rare characters": "龘靐齉𠮷𡈽㐂",
    "emoji": "好👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇳!",
    "Arabic": "السلام عليكم ورحمة الله",
    "combining": "é ñ ক্ষ ภาษาไทย 한국어",
    "mixed": "def f(x):\n\treturn  'naïve' # 注释 🙂\r\n",
    "blanks": "   a  b\n\n\n c ",
    "typed control tokens": "<|im_end|> <0xE4> <unk>",
    "zero": "a\0b",
}


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_join_to_the_text_with_no_broken_character_on_the_way(name, tokenizer):
    stream, so_far = TextStream(tokenizer), ""
    for token_id in encode(tokenizer, TEXTS[name]):
        so_far += stream.put(token_id)
        assert TEXTS[name].startswith(so_far)
    assert so_far + stream.end() == TEXTS[name]


def test_a_character_appears_as_soon_as_it_is_whole(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.put(token_id) for token_id in encode(tokenizer, "𠮷a")]
    assert pieces == ["", "", "", "𠮷", "a"]  # four bytes, then a letter


def test_bytes_that_are_no_character_are_marked_and_do_not_crash(tokenizer):
    def byte(value):
        return tokenizer.token_to_id(f"<0x{value:02X}>")

    stream = TextStream(tokenizer)
    text = "".join(stream.put(token_id) for token_id in [byte(0xFF), byte(0xE4), *encode(tokenizer, "好"), byte(0xE4)])
    assert text == "\ufffd\ufffd好"
    assert stream.end() == "\ufffd"


def test_control_tokens_are_not_shown(tokenizer):
    stream = TextStream(tokenizer)
    assert "".join(map(stream.put, [1, *encode(tokenizer, "好"), IM_END, 2])) + stream.end() == "好"


def test_every_token_can_be_streamed(tokenizer):
    stream = TextStream(tokenizer)
    assert all(isinstance(stream.put(token_id), str) for token_id in range(tokenizer.get_vocab_size()))


def test_the_cache_is_no_larger_than_the_text_needs(model, monkeypatch):
    rooms = []

    class RecordedCache(KVCache):
        def __init__(self, model, batch_size, max_length):
            super().__init__(model, batch_size, max_length)
            rooms.append(max_length)

    monkeypatch.setattr(generation, "KVCache", RecordedCache)
    long_context = sharp_model(dataclasses.replace(CONFIG, max_position_embeddings=10**6))
    list(generate(long_context, [prompt(5)], 3))
    assert rooms == [8]
