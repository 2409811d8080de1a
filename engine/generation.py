"""Decoding: the KV cache, sampling, streaming."""

import codecs
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer

from base.cli import UserError
from model.chat import token_pieces
from model.model import CausalLM


class KVCache:
    """The keys and values of the tokens so far, so that a new token costs one row of work. Room for max_length tokens.

    It is handed to the model's forward, which never keeps it. ValueError when the room is used up.
    """

    def __init__(self, model: CausalLM, batch_size: int, max_length: int):
        config, weight = model.config, model.model.embed_tokens.weight
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)  # (B, K, S, D)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, device=weight.device, dtype=weight.dtype) for _ in layers]
        self.values = [torch.empty(shape, device=weight.device, dtype=weight.dtype) for _ in layers]
        self.length = 0  # tokens in it
        self.max_length = max_length

    def update(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes in the new tokens' (B, K, T, D) and returns all so far, (B, K, S, D)."""
        end = self.length + key.shape[2]
        if end > self.max_length:
            raise ValueError(f"the KV cache has room for {self.max_length} tokens, not {end}")
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int):
        """So many new tokens have gone through all layers."""
        self.length += tokens


def sample(
    logits: torch.Tensor,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """Draws a token for each row of logits (B, V); returns (B,). Temperature 0 takes the most probable.

    top_k keeps the k most probable (0: all; more than V: all); top_p the fewest that hold this much probability
    (nucleus sampling, arXiv 1904.09751); min_p those at least this share of the most probable's (arXiv 2407.01082).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(-1)
    if min_p > 0:
        probabilities[probabilities < min_p * probabilities.max(-1, keepdim=True).values] = 0
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the probability of all that are more probable
        before[:, 0] = -1  # the most probable always stays
        ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)  # weights need not add up to 1


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Makes tokens that occurred less probable (CTRL, arXiv 1909.05858, 4.1). logits (B, V), seen (B, V) boolean."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: set[int] | frozenset[int] = frozenset(),
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    **sampling,
) -> Iterator[list[int | None]]:
    """Yields, step by step, the next token of every prompt; None for one that has ended (its stop token is yielded).

    Prompts of different lengths are padded on the left, and the padding is masked: a batch gives what its prompts
    give one by one. Ends when all have met a token of stop_ids, after max_new_tokens, or when the context is full
    (max_position_embeddings). `sampling` goes to sample(). UserError when a prompt alone does not fit.
    """
    device = model.model.embed_tokens.weight.device
    longest = max(map(len, prompts))
    context = model.config.max_position_embeddings
    if min(map(len, prompts)) == 0:
        raise ValueError("a prompt has no tokens")
    if longest >= context:
        raise UserError(f"the prompt has {longest} tokens; the model's context is {context}: shorten it")
    max_new_tokens = min(max_new_tokens, context - longest)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)  # (B,)
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    slots = torch.arange(longest + max_new_tokens, device=device)  # of the cache, (S,)
    real = slots >= padding[:, None]  # (B, S)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts):
        row[prompt] = True
    cache = KVCache(model, len(prompts), longest + max_new_tokens)
    ended = [False] * len(prompts)
    ragged = bool(padding.any())
    for _ in range(max_new_tokens):
        past = cache.length
        T = input_ids.shape[1]
        queries = slots[past : past + T]
        position_ids = mask = None
        if ragged:
            position_ids = (queries - padding[:, None]).clamp(min=0)  # (B, T)
            visible = real[:, None, : past + T] & (slots[: past + T] <= queries[:, None])  # (B, T, S)
            mask = (visible | (slots[: past + T] == queries[:, None]))[:, None]  # padding sees itself: no row is empty
        hidden = model.model(input_ids, position_ids, mask, cache)[:, -1]  # (B, H): only the last token is asked
        logits = model.lm_head(hidden)  # (B, V)
        if repetition_penalty != 1:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        next_ids = sample(logits, generator, **sampling)  # (B,)
        if repetition_penalty != 1:
            seen.scatter_(1, next_ids[:, None], True)
        input_ids = next_ids[:, None]
        tokens = next_ids.tolist()
        yield [None if over else token for token, over in zip(tokens, ended)]
        ended = [over or token in stop_ids for token, over in zip(tokens, ended)]
        if all(ended):
            return


class TextStream:
    """Tokens to text as they come, whole characters only: the bytes of an unfinished one wait for the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self.pieces = token_pieces(tokenizer)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        return self.decoder.decode(self.pieces[token_id])

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)
