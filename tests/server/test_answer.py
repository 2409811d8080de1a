"""An answer as it comes, without a model: pieces put together are what ReplyStream makes of the whole."""

import random

import pytest
import torch

from engine.session import Session, read_tokens
from model.chat import IM_END, THINK, encode
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from server.answer import Answer, StopStrings, append
from server.schema import ChatRequest


def test_stop_strings_are_held_back_and_nothing_else_for_long():
    rng = random.Random(0)
    found = 0
    for _ in range(3000):
        text = "".join(rng.choices("ab\n", k=rng.randint(0, 20)))
        stops = ["".join(rng.choices("ab\n", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        stream, told, place = StopStrings(stops), "", 0
        while place < len(text) and not stream.found:
            end = place + rng.randint(1, 4)
            told += stream.put(text[place:end])
            place = end
            assert text.startswith(told)
            assert not any(stop in told for stop in stops)
            if not stream.found:
                assert text[:place] == told + stream.held
                assert stream.held == "" or any(stop.startswith(stream.held) for stop in stops)
        assert stream.found == any(stop in text[:place] for stop in stops)
        if stream.found:
            assert any(text.startswith(stop, len(told)) for stop in stops), "it was cut elsewhere"
        found += stream.found
    assert 500 < found < 2900


@pytest.mark.parametrize("seed", range(5))
def test_pieces_together_are_the_reply(tokenizer, seed):
    rng = random.Random(seed)
    with torch.device("meta"):
        model = CausalLM(LMConfig(**PRESETS["tiny"]))
    request = ChatRequest(messages=[{"role": "user", "content": "x"}], max_tokens=10)
    for _ in range(50):
        tokens = []
        for _ in range(rng.randint(0, 2)):
            tokens += [THINK, *encode(tokenizer, "".join(rng.choices("想一\n", k=5))), THINK + 1]
        tokens += encode(tokenizer, "".join(rng.choices("答👍\n ", k=rng.randint(0, 12)))) + [IM_END]
        answer, whole = Answer(0, Session(model, tokenizer, request.generation_config(1024)), request, [1]), {}
        for token in tokens:
            for name, new in answer.put(token, "stop" if token == IM_END else None).items():
                append(whole, name, new)
        reply = read_tokens(tokens, tokenizer)
        assert whole.get("content", "") == reply.content
        assert whole.get("reasoning_content", "") == reply.reasoning
        assert (answer.finish_reason, answer.n_tokens) == ("stop", len(tokens))
