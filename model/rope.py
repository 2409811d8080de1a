"""Rotary position embeddings (RoFormer, arXiv 2104.09864), and their scaling to contexts longer than the trained one.

A scaling is Hugging Face's dict, as in config.json: rope_type, factor, and what the type adds. It slows the rotation
down, so that positions beyond the trained length turn queries and keys by angles that were seen in training.
"""

import math

import torch
from torch import Tensor


def rope_tables(
    position_ids: Tensor, head_dim: int, theta: float, scaling: dict | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles (RoFormer, eq. 15), each (B, T, 1, D/2) in float32."""
    frequencies = rope_frequencies(head_dim, theta, position_ids.device)
    size = 1.0  # of the rotated vectors
    if scaling is not None:
        frequencies, size = scale_frequencies(frequencies, head_dim, theta, scaling)
    angles = position_ids[..., None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if size == 1 else (cos * size, sin * size)


def rope_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair of numbers, (D/2,)."""
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    return theta**-exponents


def yarn_size(factor: float) -> float:
    """Of queries and keys, which a longer context makes too alike (arXiv 2309.00071, eq. 22)."""
    return 0.1 * math.log(max(factor, 1)) + 1


def scale_frequencies(frequencies: Tensor, head_dim: int, theta: float, scaling: dict) -> tuple[Tensor, float]:
    """Scaled frequencies, (D/2,), and a factor of queries and keys.

    linear  all frequencies divided by the factor: position interpolation (arXiv 2306.15595)
    llama3  those of less than low_freq_factor turns in the trained length divided, those of more than high_freq_factor
            kept, a linear mixture between them (Llama 3.1's reference code)
    yarn    the same idea with the mixture linear in the dimension, and a sharper softmax (arXiv 2309.00071, 3.2, 3.4)
    """
    slow = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow, 1.0
    trained = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = trained * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,)
        return slow.lerp(frequencies, kept), 1.0

    def dimension(turns: float) -> float:  # whose frequency makes so many turns in the trained length
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(dimension(scaling.get("beta_slow", 1))), head_dim - 1)
    numbers = torch.arange(head_dim // 2, device=frequencies.device)
    kept = 1 - ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)  # (D/2,)
    return slow.lerp(frequencies, kept), scaling.get("attention_factor") or yarn_size(scaling["factor"])
