"""The decoder: RMSNorm, RoPE, grouped-query attention and SwiGLU, as in Llama 3.1 (arXiv 2407.21783), with QK-norm; and
a mixture of experts in the place of SwiGLU, as in DeepSeekMoE (arXiv 2401.06066).

Shapes in the comments:  B rows, T tokens in a row, S tokens that can be seen (cached ones included), H hidden_size,
I intermediate_size, N query heads, K key-value heads, D head_dim, V vocab_size, E routed experts, of which a
token visits k.
Module and parameter names are Hugging Face's: a state dict is a checkpoint.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import experts
from model.chat import IM_END
from model.LMConfig import LMConfig
from model.operators import (
    ACTIVATIONS,
    Mask,
    apply_rope,
    attend,
    attention_here,
    document_mask,
    exact_linear,
    linear_layers,
    product_dtype,
    rms_norm,
    without_autocast,
)
from model.rope import rope_tables


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): N query heads share K key-value heads."""

    def __init__(self, config: LMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache=None) -> Tensor:
        qkv = linear_layers(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv)  # (B, T, N, D), (B, T, K, D) twice
        if self.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = apply_rope(q, *rope).transpose(1, 2)  # (B, N, T, D)
        k = apply_rope(k, *rope).transpose(1, 2)  # (B, K, T, D)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # (B, K, S, D)
        out = attend(q, k, v, mask)  # (B, N, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202, eq. 6); LMConfig.hidden_act may replace silu."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.act_fn, _ = ACTIVATIONS[hidden_act]
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear_layers(x, self.gate_proj, self.up_proj)  # (B, T, I)
        return self.down_proj(self.act_fn(gate) * up)  # (B, T, H)


class Router(nn.Module):
    """Scores every expert for every token and chooses k. In float32, because rounding would decide near ties.

    softmax  scores are a distribution over the experts; a loss keeps them balanced (arXiv 2405.04434, 2.2.3)
    sigmoid  each expert is scored independently; a bias, which training moves against the load, is added for the choice
             but not for the weight (arXiv 2412.19437, eq. 13 to 16; 2408.15664)
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.scoring_func == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B * T, H) -> weights (B * T, k) and numbers (B * T, k) of the chosen experts, scores of all (B * T, E)."""
        with without_autocast(x.device.type):
            logits = exact_linear(x, self.weight)  # (B * T, E)
        if self.config.scoring_func == "softmax":
            scores = ranking = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            ranking = scores + self.e_score_correction_bias
        chosen = ranking.topk(self.config.num_experts_per_tok, sorted=False).indices
        weights = scores.gather(1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.config.routed_scaling_factor, chosen, scores


class MoEFeedForward(nn.Module):
    """Many small experts, k of them for each token, and shared ones for all tokens (arXiv 2401.06066, eq. 3 to 5)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        H, size, act = config.hidden_size, config.moe_intermediate_size, config.hidden_act
        self.gate = Router(config)
        self.experts = nn.ModuleList(FeedForward(H, size, act) for _ in range(config.n_routed_experts))
        self.shared_experts = FeedForward(H, config.n_shared_experts * size, act) if config.n_shared_experts else None

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, T, H) -> the same shape, and the router's scores (B * T, E) and choices (B * T, k)."""
        tokens = x.flatten(0, 1)
        weights, chosen, scores = self.gate(tokens)
        y = self.visit_experts(tokens, weights, chosen).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, (scores, chosen)

    def visit_experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """sum_i weights[:, i] * expert[chosen[:, i]](tokens), (B * T, H).

        The visits are sorted by expert, so that each expert multiplies one contiguous slab. GPUs in training and
        torch.compile use one operator for all experts (model/experts.py).
        """
        if torch.compiler.is_compiling() or (self.training and tokens.device.type not in ("cpu", "mps")):
            dtype = product_dtype(tokens.device.type, tokens.dtype)
            gate_up = [matrix for expert in self.experts for matrix in (expert.gate_proj.weight, expert.up_proj.weight)]
            gate_up = torch.stack(gate_up).to(dtype).unflatten(0, (-1, 2)).flatten(1, 2)  # (E, 2 m, H)
            down = torch.stack([expert.down_proj.weight for expert in self.experts]).to(dtype)  # (E, H, m)
            act = self.config.hidden_act
            return experts.visit_experts(tokens.to(dtype), weights, chosen, gate_up, down, act)[0].to(tokens.dtype)
        visits = chosen.flatten().argsort(stable=True)  # (B * T * k,): those to expert 0 first
        sizes = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        visitors = visits // chosen.shape[1]  # tokens
        slabs = tokens.index_select(0, visitors).split(sizes)
        # In training, experts without visitors are included: their gradient is zero instead of None.
        outputs = [expert(slab) for expert, slab in zip(self.experts, slabs) if len(slab) or self.training]
        outputs = torch.cat(outputs) * weights.flatten().index_select(0, visits)[:, None]
        return torch.zeros_like(tokens).index_add(0, visitors, outputs.to(tokens.dtype))


class DecoderLayer(nn.Module):
    """Pre-norm: attention and feed-forward layer read a normalised x, and their outputs are added to x."""

    def __init__(self, config: LMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.has_experts = config.use_moe and layer_idx >= config.first_k_dense_replace
        if self.has_experts:
            self.mlp = MoEFeedForward(config)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache=None):
        """x (B, T, H) -> the same shape, and the router's scores and choices (MoEFeedForward.forward) or None."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        normed = self.post_attention_layernorm(x)
        if not self.has_experts:
            return x + self.mlp(normed), None
        y, routed = self.mlp(normed)
        return x + y, routed


class Decoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each layer in the backward pass: less memory, a third more work
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Mask = None,
        cache=None,
        routing: list | None = None,
    ) -> Tensor:
        """input_ids (B, T) to hidden states (B, T, H).

        position_ids (B, T) count from 0 in each document: attention does not cross from one document of a packed row
        to the next. Without them a row is one document, continued from the cache (generation.KVCache) if there is one.
        mask: (B, 1, T, S) boolean, True where a query may look; replaces the causal or document mask. Or what a batch
        knows of its documents beside position_ids (Batch.cu_seqlens), which saves a card the looking for them.
        routing: a list that gets each router's scores (B * T, E) and choices (B * T, k), for the balance of experts.
        """
        T = input_ids.shape[1]
        past = 0 if cache is None else cache.length
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)[None]  # (1, T)
            if past and T > 1 and mask is None:  # a query sees the cached tokens and those before it
                mask = torch.ones(T, past + T, dtype=torch.bool, device=input_ids.device).tril(past)[None, None]
        elif cache is None and not isinstance(mask, Tensor):
            mask = document_mask(position_ids, self.attention_kind(), mask)
        config = self.config
        rope = rope_tables(position_ids, config.head_dim, config.rope_theta, config.rope_scaling)
        x = self.embed_tokens(input_ids)  # (B, T, H)
        if (dtype := product_dtype(x.device.type)).itemsize == 2:
            # The residual stream: bfloat16 halves its memory traffic, float16 has too small a range for it.
            x = x.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x, routed = checkpoint(layer, x, rope, mask, use_reentrant=False)
            else:
                x, routed = layer(x, rope, mask, cache)
            if routed is not None and routing is not None:
                routing.append(routed)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def attention_kind(self) -> str:
        """How packed rows attend here and now: "manual", "flash" or "masked" (operators.attention_kind)."""
        weight = self.embed_tokens.weight
        dtype = product_dtype(weight.device.type, weight.dtype)
        return attention_here(weight.device, dtype, self.config.head_dim)


class CausalLM(nn.Module):
    """The decoder and the output head, which scores every token of the vocabulary."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.stop_token_ids = [config.eos_token_id]  # end a document; a chat model also stops at end_of_turn
        self.end_of_turn: int | None = IM_END  # of its tokenizer (model/chat.py)
        self.generation_config: dict = {}  # of generation_config.json, as it was loaded
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    def init_weights(self):
        """Normal with standard deviation 0.02, times 1/sqrt(2 layers) for matrices that add to the residual stream
        (GPT-2, 2.3)."""
        residual_std = 0.02 / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if residual else 0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Mask = None,
        cache=None,
        routing: list | None = None,
        head: Callable | None = None,
    ):
        """Logits (B, T, V), or head(hidden (B, T, H), weight (V, H)): losses do not need all logits at once.

        The other arguments are Decoder.forward's.
        """
        hidden = self.model(input_ids, position_ids, mask, cache, routing)
        return self.lm_head(hidden) if head is None else head(hidden, self.lm_head.weight)

    @property
    def is_chat(self) -> bool:
        """Whether it was trained to answer and to stop at the end of its turn."""
        return self.end_of_turn in self.stop_token_ids

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_idle_parameters(self) -> int:
        """Parameters that are not active for a token: of the routed experts that it does not visit."""
        config = self.config
        idle_experts = config.n_routed_experts - config.num_experts_per_tok
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        return sum(idle_experts * expert for layer in self.model.layers if layer.has_experts)
