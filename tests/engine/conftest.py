"""A chat model of random weights, and the project's tokenizer."""

import pytest
from helpers import TOKENIZER, sharp_model

from model.chat import EOS, IM_END, load_tokenizer
from model.LMConfig import PRESETS, LMConfig


@pytest.fixture(scope="module")
def model():
    model = sharp_model(LMConfig(**PRESETS["tiny"] | {"num_hidden_layers": 1}))
    model.stop_token_ids = [EOS, IM_END]
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)
