"""Every size of the model, the presets, the checks, and the mapping to Hugging Face's config.json.

Edit the defaults of LMConfig to resize the model, or pick a preset for one run with `--preset NAME`. Later stages read
the size from the checkpoint. The names are Hugging Face's, so that its documentation explains them too.
"""

from dataclasses import dataclass, fields


@dataclass
class LMConfig:
    vocab_size: int = 6400
    hidden_size: int = 512
    intermediate_size: int = 1408  # about 8/3 of hidden_size: SwiGLU has three matrices where a plain MLP has two
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2  # fewer than query heads: grouped-query attention (arXiv 2305.13245), a smaller cache
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048  # tokens of context
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = True  # one matrix for input and output; untied, `small` would grow by an eighth
    qk_norm: bool = True  # normalise each head's query and key: stable at higher learning rates (arXiv 2302.05442)
    bos_token_id: int = 1  # <|begin_of_text|>
    eos_token_id: int = 2  # <|end_of_text|>

    # Mixture of experts (DeepSeekMoE, arXiv 2401.06066); read only when use_moe is set.
    use_moe: bool = False
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 3
    moe_intermediate_size: int = 352  # a quarter of intermediate_size: 3 routed + 1 shared = the dense layer's work
    first_k_dense_replace: int = 1  # this many leading layers stay dense
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    scoring_func: str = "softmax"  # or "sigmoid"

    def __post_init__(self):
        may_be_zero = {"n_shared_experts", "first_k_dense_replace", "bos_token_id", "eos_token_id"}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if value < 0 or (value == 0 and field.name not in may_be_zero):
                least = "at least 0" if field.name in may_be_zero else "above 0"
                raise ValueError(f"{field.name} must be {least}, not {value}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                    f"({self.num_attention_heads}), or head_dim must be given"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE turns pairs of numbers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): each key-value head serves equally many query heads"
            )
        if self.use_moe:
            self._check_moe()

    def _check_moe(self):
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most n_routed_experts "
                f"({self.n_routed_experts}): a token cannot visit more experts than there are"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) must be at most num_hidden_layers "
                f"({self.num_hidden_layers})"
            )
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f'scoring_func must be "softmax" or "sigmoid", not "{self.scoring_func}"')
        raise ValueError("use_moe: model.py has no mixture of experts yet; leave it False")

    def to_hf(self) -> dict:
        """The content of config.json: a Llama, or a Qwen3 with qk_norm (the same decoder with that one addition)."""
        hf = {name: getattr(self, name) for name in _SHARED_FIELDS}
        return hf | {
            "architectures": ["Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"],
            "model_type": "qwen3" if self.qk_norm else "llama",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "use_cache": True,
            "dtype": "float32",
        }

    @classmethod
    def from_hf(cls, hf: dict) -> "LMConfig":
        """The inverse of to_hf. ValueError for an architecture or a RoPE variant that model.py does not compute."""
        if hf.get("model_type") not in ("llama", "qwen3"):
            raise ValueError(f'model_type "{hf.get("model_type")}" is not supported; "llama" and "qwen3" are')
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f'rope_type "{kind}" is not supported; only "default" is')
        if hf.get("hidden_act", "silu") != "silu":
            raise ValueError(f'hidden_act "{hf["hidden_act"]}" is not supported; only "silu" is')
        known = {name: hf[name] for name in _SHARED_FIELDS if hf.get(name) is not None}
        theta = rope.get("rope_theta", hf.get("rope_theta", cls.rope_theta))
        return cls(**known, rope_theta=theta, qk_norm=hf["model_type"] == "qwen3")


# Fields that have the same name and meaning in config.json.
_SHARED_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id"
).split()

# Sizes that differ from the defaults above.
PRESETS = {
    "tiny": dict(  # 1 M: seconds, for tests
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1
    ),
    "mini": dict(  # 5 M: minutes on two CPU cores
        hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2
    ),
    "small": dict(),  # 26 M: the defaults; what a 4 GB card trains
    "base": dict(  # 100 M
        hidden_size=768, intermediate_size=2048, num_hidden_layers=15, num_attention_heads=12, num_key_value_heads=4
    ),
}

# Flags that were measured to pretrain a size better than the defaults of 1-pretrain.py.
TRAINING_FLAGS = {
    "mini": dict(optimizer="muon", learning_rate=6e-3, min_learning_rate=6e-5, warmup_steps=20),
}
