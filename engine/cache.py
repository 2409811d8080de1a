"""The KV cache: keys and values of all tokens so far, for rows of different lengths."""

import torch
from torch import Tensor

from model.device import to_device
from model.model import CausalLM


class KVCache:
    """Keys and values of up to `rows` sequences of max_length tokens; the first `len(lengths)` rows are in use.

    It is an argument of the model's forward, which does not store it. ValueError if a row is full.
    """

    def __init__(self, model: CausalLM, rows: int, max_length: int):
        config, weight = model.config, model.model.embed_tokens.weight
        shape = (rows, config.num_key_value_heads, max_length, config.head_dim)  # (R, K, S, D)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=weight.device, dtype=weight.dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=weight.device, dtype=weight.dtype) for _ in layers]
        self.max_length = max_length
        self.set_lengths([0] * rows)

    def set_lengths(self, lengths: list[int]):
        """Sets the number of tokens in each row in use."""
        self.lengths = lengths
        self.length = max(lengths, default=0)
        self.aligned = len(set(lengths)) <= 1  # then no mask is needed
        rows_and_positions = torch.tensor([range(len(lengths)), lengths], dtype=torch.int64)
        self.ends = tuple(to_device(rows_and_positions, self.keys[0].device))

    def mask(self) -> Tensor | None:
        """For one new token per row: True for the positions it attends to, itself included, (B, 1, 1, S); None: all."""
        if self.aligned:
            return None
        slots = torch.arange(self.length + 1, device=self.keys[0].device)
        return (slots <= self.ends[1][:, None])[:, None, None]

    def update(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens' (B, K, T, D) and returns all so far, (B, K, S, D). T is 1 unless rows are aligned."""
        B, _, T, _ = key.shape
        end = self.length + T
        if end > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens, not {end}")
        for kept, new in ((self.keys[layer_idx], key), (self.values[layer_idx], value)):
            if self.aligned:
                kept[:B, :, end - T : end] = new
            else:
                rows, positions = self.ends
                kept[rows, :, positions] = new[:, :, 0]
        return self.keys[layer_idx][:B, :, :end], self.values[layer_idx][:B, :, :end]

    def advance(self, tokens: int):
        """Call this after `tokens` new tokens of every row have passed all layers."""
        self.lengths = [length + tokens for length in self.lengths]
        self.length += tokens
        self.ends[1].add_(tokens)  # on the device, which need not be waited for

    def remove(self, row: int):
        """Frees a row; the last row takes its place."""
        *lengths, length = self.lengths
        if row < len(lengths):
            for kept in (*self.keys, *self.values):
                kept[row, :, :length] = kept[len(lengths), :, :length]
            lengths[row] = length
        self.set_lengths(lengths)

    def grow(self, model: CausalLM, rows: int, max_length: int) -> "KVCache":
        """A copy with at least this many rows and tokens."""
        larger = KVCache(model, max(rows, len(self.keys[0])), max(max_length, self.max_length))
        larger.set_lengths(self.lengths)
        n, length = len(self.lengths), self.length
        for old, new in zip((*self.keys, *self.values), (*larger.keys, *larger.values)):
            new[:n, :, :length] = old[:n, :, :length]
        return larger


class PromptCache:
    """Stores prompts that are packed into one row, each in one or several new rows of `cache`."""

    length = 0  # no earlier tokens

    def __init__(self, cache: KVCache, prompts: list[tuple[int, int]]):
        """prompts: the length of each, and the number of rows that get it."""
        self.cache, self.prompts = cache, prompts

    def update(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (1, K, T, D) of all prompts in their rows and returns it unchanged."""
        for kept, new in ((self.cache.keys[layer_idx], key), (self.cache.values[layer_idx], value)):
            row = len(self.cache.lengths)
            start = 0
            for length, copies in self.prompts:
                kept[row : row + copies, :, :length] = new[:, :, start : start + length]
                row += copies
                start += length
        return key, value

    def advance(self, tokens: int):
        new = []
        for length, copies in self.prompts:
            new += [length] * copies
        self.cache.set_lengths(self.cache.lengths + new)
