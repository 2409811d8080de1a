"""The engine: a text is the same in whatever company, and its log-probabilities are those of training."""

import random
from collections import deque

import pytest
import torch
from helpers import prompt, sharp_model

from engine.decoding import pack_for_decoding
from engine.generation import Engine, Sampling, Sequence
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM

SIZES = {"num_hidden_layers": 2, "max_position_embeddings": 64}
GREEDY = Sampling(temperature=0)
PROMPTS = [prompt(length, seed=length) for length in (3, 11, 1, 20, 7, 11, 5, 2, 9, 30)]
LIMITS = [12, 3, 20, 7, 1, 15, 9, 30, 4, 11]


@pytest.fixture(scope="module", params=["trained layers", "laid out for decoding", "experts"])
def model(request) -> CausalLM:
    config = LMConfig(**PRESETS["tiny-moe" if request.param == "experts" else "tiny"] | SIZES)
    model = sharp_model(config)
    return pack_for_decoding(model) if request.param == "laid out for decoding" else model


def write(model: CausalLM, sequences: list[Sequence], max_rows: int, **options) -> Engine:
    engine = Engine(model, max_rows, **options)
    for sequence in sequences:
        engine.submit(sequence)
    while engine.busy:
        engine.step()
    return engine


def sequences(**options) -> list[Sequence]:
    return [Sequence(prompt, limit, **options) for prompt, limit in zip(PROMPTS, LIMITS)]


@pytest.mark.parametrize("max_rows", [1, 3, 10])
def test_rows_that_enter_and_leave_write_what_they_write_alone(model, max_rows):
    alone = sequences(sampling=GREEDY)
    for sequence in alone:
        write(model, [sequence], max_rows=1)
    together = sequences(sampling=GREEDY)
    engine = write(model, together, max_rows)
    assert [sequence.tokens for sequence in together] == [sequence.tokens for sequence in alone]
    assert [len(sequence.tokens) for sequence in together] == LIMITS
    assert len(engine.cache.keys[0]) == max_rows, "more rows than were allowed"


def test_one_that_comes_later_enters_at_once(model):
    engine = Engine(model, max_rows=2)
    first, second = sequences(sampling=GREEDY)[:2]
    engine.submit(first)
    engine.step()
    engine.step()
    engine.submit(second)
    assert set(map(id, engine.step())) == {id(first), id(second)}
    while engine.busy:
        engine.step()
    alone = sequences(sampling=GREEDY)[:2]
    for sequence in alone:
        write(model, [sequence], max_rows=1)
    assert [first.tokens, second.tokens] == [sequence.tokens for sequence in alone]


def test_log_probabilities_are_those_of_the_training_forward(model):
    written = sequences(seed=1)
    write(model, written, max_rows=4, keep_log_probs=True)
    for sequence in written:
        ids = torch.tensor([sequence.prompt + sequence.tokens])
        with torch.no_grad():
            log_probs = model(ids)[0, len(sequence.prompt) - 1 : -1].log_softmax(-1)  # (tokens, V)
        expected = log_probs.gather(1, torch.tensor(sequence.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.log_probs), expected, atol=1e-5, rtol=1e-5)


def test_those_who_ask_get_the_most_probable_tokens_too_and_nobody_else_pays(model):
    tops = [3, None, 0, 5, 1]
    written = [Sequence(ids, 6, seed=1, n_top=n) for ids, n in zip(PROMPTS, tops)]
    write(model, written, max_rows=5)
    assert written[1].log_probs == written[1].top_log_probs == written[2].top_log_probs == []
    for sequence in (written[0], written[3], written[4]):
        ids = torch.tensor([sequence.prompt + sequence.tokens])
        with torch.no_grad():
            log_probs = model(ids)[0, len(sequence.prompt) - 1 : -1].log_softmax(-1)  # (tokens, V)
        best = log_probs.topk(sequence.n_top)
        for place, pairs in enumerate(sequence.top_log_probs):
            assert [token for token, _ in pairs] == best.indices[place].tolist()
            assert [value for _, value in pairs] == pytest.approx(best.values[place].tolist(), abs=1e-4)
    assert len(written[2].log_probs) == 6


def test_a_shared_prompt_is_computed_once_and_its_copies_go_their_own_ways(model, monkeypatch):
    tokens = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda ids, *rest: tokens.append(ids.numel()) or forward(ids, *rest))
    group = [Sequence(PROMPTS[3], 8, seed=seed) for seed in range(6)] + [Sequence(PROMPTS[0], 8, seed=0)]
    write(model, group, max_rows=7)
    assert tokens == [len(PROMPTS[3]) + len(PROMPTS[0]), *[7] * 7]
    assert len({tuple(sequence.tokens) for sequence in group[:6]}) == 6, "copies that share their random numbers"
    alone = Sequence(PROMPTS[3], 8, seed=4)
    write(model, [alone], max_rows=1)
    assert group[4].tokens == alone.tokens


def test_stop_tokens_and_seeds_are_a_rows_own(model):
    plain = sequences(sampling=GREEDY)
    write(model, plain, max_rows=10)
    stop = plain[2].tokens[4]
    first = plain[2].tokens.index(stop)
    stopped = sequences(sampling=GREEDY)
    stopped[2].stop_ids = frozenset([stop])
    write(model, stopped, max_rows=10)
    assert stopped[2].tokens == plain[2].tokens[: first + 1]
    assert stopped[2].finish_reason == "stop"
    assert [sequence.tokens for sequence in stopped[3:]] == [sequence.tokens for sequence in plain[3:]]
    assert {sequence.finish_reason for sequence in plain} == {"length"}
    by_seed = [Sequence(PROMPTS[0], 20, seed=seed) for seed in (1, 2, 1)]
    write(model, by_seed, max_rows=3)
    assert by_seed[0].tokens == by_seed[2].tokens != by_seed[1].tokens


def test_unlike_ways_of_sampling_share_a_batch(model):
    ways = [GREEDY, Sampling(top_k=5), Sampling(temperature=0.7, top_p=0.8), Sampling(repetition_penalty=1.5), GREEDY]
    together = [Sequence(prompt, 10, sampling=way, seed=3) for prompt, way in zip(PROMPTS, ways)]
    write(model, together, max_rows=5)
    for prompt_ids, way, sequence in zip(PROMPTS, ways, together):
        alone = Sequence(prompt_ids, 10, sampling=way, seed=3)
        write(model, [alone], max_rows=1)
        assert alone.tokens == sequence.tokens


def test_forced_tokens_come_next_and_what_follows_has_read_them(model):
    forced = Sequence(PROMPTS[0], 9, sampling=GREEDY)
    engine = Engine(model, max_rows=2)
    engine.submit(forced)
    engine.submit(Sequence(PROMPTS[1], 30, sampling=GREEDY))
    engine.step()
    forced.forced = deque([100, 200, 300])
    while forced.finish_reason is None:
        engine.step()
    assert forced.tokens[1:4] == [100, 200, 300]
    after = Sequence(PROMPTS[0] + forced.tokens[:4], 5, sampling=GREEDY)
    write(model, [after], max_rows=1)
    assert forced.tokens[4:] == after.tokens


def test_one_that_is_taken_out_leaves_the_others_as_they_were(model):
    rng = random.Random(0)
    plain = sequences(sampling=GREEDY)
    write(model, plain, max_rows=10)
    for _ in range(3):
        some = sequences(sampling=GREEDY)
        engine = Engine(model, max_rows=6)
        for sequence in some:
            engine.submit(sequence)
        leaving = rng.sample(some, 4)
        while engine.busy:
            engine.step()
            if leaving and rng.random() < 0.5:
                engine.remove(leaving.pop())
        for sequence, whole in zip(some, plain):
            assert sequence.tokens == whole.tokens[: len(sequence.tokens)]
            assert sequence.finish_reason in (None, "length")
    engine.remove(some[0])  # is not there any more


def test_prompts_that_are_too_many_for_one_pass_are_read_in_several(model, monkeypatch):
    monkeypatch.setattr("engine.generation.MAX_PREFILL_TOKENS", 16)
    few = sequences(sampling=GREEDY)
    write(model, few, max_rows=10)
    monkeypatch.undo()
    many = sequences(sampling=GREEDY)
    write(model, many, max_rows=10)
    assert [sequence.tokens for sequence in few] == [sequence.tokens for sequence in many]
