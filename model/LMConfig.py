"""The model's configuration, the presets, and the mapping to Hugging Face's config.json.

Edit the defaults of LMConfig to resize the model, or pick a preset for one run with `--preset NAME`. Later stages read
the size from the checkpoint. The names are Hugging Face's, so its documentation applies.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass, fields

from base.cli import UserError


@dataclass
class LMConfig:
    vocab_size: int = 6400
    hidden_size: int = 512
    intermediate_size: int = 1408  # about 8/3 of hidden_size: SwiGLU has three matrices where a plain MLP has two
    hidden_act: str = "silu"  # of the feed-forward layers: one of HIDDEN_ACTS
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2  # fewer than query heads: grouped-query attention (2305.13245), a smaller KV cache
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048  # tokens of context
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # to a longer context than the trained one (model/rope.py); None: not scaled
    tie_word_embeddings: bool = True  # one matrix for input and output; untied, `small` would grow by an eighth
    qk_norm: bool | None = None  # normalise each head's query and key: stable at higher learning rates (2302.05442);
    #                              None: True, except for softmax experts, whose Hugging Face class has no QK-norm
    qkv_bias: bool = False  # of the query, key and value matrices, as in Qwen2
    bos_token_id: int = 1  # <|begin_of_text|>
    eos_token_id: int = 2  # <|end_of_text|>

    # Mixture of experts (DeepSeekMoE, arXiv 2401.06066); used only if use_moe is set.
    use_moe: bool = False
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 3
    moe_intermediate_size: int = (
        352  # a quarter of intermediate_size: 3 routed + 1 shared cost as much as the dense layer
    )
    first_k_dense_replace: int = 1  # this many leading layers stay dense
    norm_topk_prob: bool = True  # the weights of a token's experts add up to 1
    routed_scaling_factor: float = 1.0  # and are multiplied by this
    scoring_func: str = "sigmoid"  # balanced by a bias (DeepSeek-V3); or "softmax", balanced by a loss (DeepSeek-V2)
    router_aux_loss_coef: float | None = None  # weight of the balance loss; None: 1e-4 for sigmoid, 0.01 for softmax
    seq_aux: bool = True  # balance within each document; False: within each micro-batch, so that its size matters
    router_bias_update_speed: float = 1e-2  # how far one step moves an expert's bias (sigmoid)

    # The config.json that it was read from.
    hf: dict | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self):
        may_be_zero = set(
            "n_shared_experts first_k_dense_replace bos_token_id eos_token_id router_aux_loss_coef "
            "router_bias_update_speed".split()
        )
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is_a(value, field.type):
                raise UserError(f"{field.name} must be {getattr(field.type, '__name__', field.type)}, not {value!r}")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not 0 <= value < math.inf or (value == 0 and field.name not in may_be_zero):
                least = "at least 0" if field.name in may_be_zero else "above 0"
                raise UserError(f"{field.name} must be {least}, not {value}")
        if self.hidden_act not in HIDDEN_ACTS:
            raise UserError(f'hidden_act must be one of {", ".join(HIDDEN_ACTS)}, not "{self.hidden_act}"')
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                    f"({self.num_attention_heads}), or head_dim must be given"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise UserError(f"head_dim ({self.head_dim}) must be even: RoPE turns pairs of numbers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): each key-value head serves equally many query heads"
            )
        if self.use_moe:
            self._check_moe()
        elif self.qk_norm is None:
            self.qk_norm = not self.qkv_bias
        if self.qkv_bias and (self.qk_norm or self.use_moe):
            raise UserError("qkv_bias needs qk_norm False and no experts: no Hugging Face class has both")
        if self.rope_scaling is not None:
            check_scaling(self.rope_scaling)

    def _check_moe(self):
        if self.num_experts_per_tok > self.n_routed_experts:
            raise UserError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most n_routed_experts "
                f"({self.n_routed_experts}): a token cannot visit more experts than there are"
            )
        if self.n_routed_experts < 2:
            raise UserError("n_routed_experts must be at least 2: with one there is nothing to route")
        if self.first_k_dense_replace >= self.num_hidden_layers:
            raise UserError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) must be below num_hidden_layers "
                f"({self.num_hidden_layers}): no layer would have experts"
            )
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise UserError(f'scoring_func must be "softmax" or "sigmoid", not "{self.scoring_func}"')
        if self.scoring_func == "softmax" and self.qk_norm:
            raise UserError(
                'scoring_func "softmax" needs qk_norm False: the model is saved as a Qwen2-MoE, which has no QK-norm; '
                'use "sigmoid" to have both'
            )
        if self.qk_norm is None:
            self.qk_norm = self.scoring_func == "sigmoid"
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = 1e-4 if self.scoring_func == "sigmoid" else 0.01
        if self.num_experts_per_tok == 1:
            self.norm_topk_prob = False  # a single weight divided by itself is always 1: the router gets no gradient

    def extend(self, scaling: dict):
        """Scales the rotation (model/rope.py), to a context of `factor` times the trained length.

        original_max_position_embeddings is the trained length; without it, the context of today or the one that an
        earlier scaling names. UserError for a scaling that is not supported.
        """
        trained = (self.rope_scaling or {}).get("original_max_position_embeddings", self.max_position_embeddings)
        self.rope_scaling = check_scaling({"original_max_position_embeddings": trained} | scaling)
        length = self.rope_scaling["factor"] * self.rope_scaling["original_max_position_embeddings"]
        self.max_position_embeddings = max(self.max_position_embeddings, int(length))

    def to_hf(self) -> dict:
        """The content of config.json. One that was loaded stays as it was, but for fields that have changed since."""
        if self.hf is None:
            return self._new_hf()
        before = LMConfig.from_hf(self.hf)._new_hf()
        changed = {name: value for name, value in self._new_hf().items() if before.get(name) != value}
        dropped = {"layer_types"} if "num_hidden_layers" in changed else ()  # a list with an entry for each layer
        return {name: value for name, value in self.hf.items() if name not in dropped} | changed

    def _new_hf(self) -> dict:
        """The architecture is Llama, Qwen2 with qkv_bias, or Qwen3 with qk_norm (the same decoder with that one
        addition), Glm4Moe with sigmoid experts, or Qwen2Moe with softmax experts (see checkpoint.to_disk)."""
        if not self.use_moe:
            architecture, model_type = ("Qwen3ForCausalLM", "qwen3") if self.qk_norm else ("LlamaForCausalLM", "llama")
            if self.qkv_bias:
                architecture, model_type = "Qwen2ForCausalLM", "qwen2"
        elif self.scoring_func == "sigmoid":
            architecture, model_type = "Glm4MoeForCausalLM", "glm4_moe"
        else:
            architecture, model_type = "Qwen2MoeForCausalLM", "qwen2_moe"
        rope = (self.rope_scaling or {"rope_type": "default"}) | {"rope_theta": self.rope_theta}
        hf = {
            "architectures": [architecture],
            "model_type": model_type,
            "rope_parameters": rope,
            "rope_theta": self.rope_theta,  # once more: transformers 4 and others read it here
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "use_cache": True,
            "dtype": "float32",
        }
        if self.rope_scaling:
            hf["rope_scaling"] = self.rope_scaling  # once more, for transformers 4 and others
        if model_type == "glm4_moe":
            hf |= {
                "use_qk_norm": self.qk_norm,
                "rope_parameters": rope | {"partial_rotary_factor": 1.0},  # its default rotates half of each head
                "partial_rotary_factor": 1.0,
                "n_group": 1,
                "topk_group": 1,
                "num_nextn_predict_layers": 0,
            }
        elif model_type == "qwen2_moe":
            hf |= {
                "num_experts": self.n_routed_experts,
                "shared_expert_intermediate_size": max(self.n_shared_experts, 1) * self.moe_intermediate_size,
                "mlp_only_layers": list(range(self.first_k_dense_replace)),
                "decoder_sparse_step": 1,
                "qkv_bias": False,
            }
        if model_type.startswith("qwen"):  # fields that mistral.rs needs
            hf |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": self.num_hidden_layers}
        names = _SHARED_FIELDS + (_MOE_FIELDS if self.use_moe else [])
        return hf | {name: getattr(self, name) for name in names}  # last: no literal above replaces a field

    @classmethod
    def from_hf(cls, hf: dict) -> "LMConfig":
        """The inverse of to_hf. UserError for an architecture or a RoPE variant that model.py does not compute."""
        model_type = hf.get("model_type")
        if model_type not in _MODEL_TYPES:
            known = ", ".join(f'"{name}"' for name in _MODEL_TYPES)
            raise UserError(f'model_type "{model_type}" is not supported; {known} are: choose a model of these types')
        for name, plain in PLAIN_HF.items():
            if (hf.get(name) or plain) != plain:
                raise UserError(f'{name} "{hf[name]}" is not supported; only "{plain}" is: choose another model')
        if missing := [name for name in _REQUIRED_FIELDS if hf.get(name) is None]:
            raise UserError(f"{missing[0]} is missing")
        rope, window = hf.get("rope_parameters") or hf.get("rope_scaling") or {}, hf.get("sliding_window", 4096)
        windowed = set(hf.get("layer_types") or ()) - {"full_attention"}
        if model_type == "mistral":  # with a window unless the field is null; one that spans the context does nothing
            windowed = window is not None and window < hf["max_position_embeddings"]
        if windowed or rope.get("partial_rotary_factor", 1) != 1:
            raise UserError("sliding-window attention and partial rotation are not supported: choose another model")
        use_moe = model_type in ("glm4_moe", "qwen2_moe")
        if use_moe and not set(_MOE_FIELDS) <= hf.keys():
            raise UserError(f'of "{model_type}" only models saved by Jiezi are supported')
        names = _SHARED_FIELDS + (_MOE_FIELDS if use_moe else [])
        values = _DEFAULTS_HF | {name: hf[name] for name in names if hf.get(name) is not None}
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        if model_type == "qwen3":
            values.setdefault("head_dim", 128)
        if isinstance(values.get("eos_token_id"), list):  # the first one ends a document
            values["eos_token_id"] = next(iter(values["eos_token_id"]), cls.eos_token_id)
        return cls(
            **values,
            rope_theta=rope.get("rope_theta", hf.get("rope_theta", cls.rope_theta)),
            rope_scaling=_read_scaling(rope, hf),
            qk_norm=model_type == "qwen3" or (model_type == "glm4_moe" and hf["use_qk_norm"]),
            qkv_bias=model_type == "qwen2",
            use_moe=use_moe,
            hf=hf,
        )


def _is_a(value: object, kind: type) -> bool:
    """Whether `value` has a field's type: an int is also a float, and a bool is neither."""
    if isinstance(value, bool):
        return kind in (bool, bool | None)
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.5, kind))


ROPE_FIELDS = {  # rope_type -> the numbers that it needs, and those that it may have
    "linear": ({"factor"}, {"original_max_position_embeddings"}),  # which changes nothing
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": ({"factor", "original_max_position_embeddings"}, {"attention_factor", "beta_fast", "beta_slow"}),
}


def parse_scaling(text: str) -> dict:
    """The type of a flag: TYPE:FACTOR or TYPE:FACTOR:TRAINED_LENGTH, such as yarn:4."""
    kind, *numbers = text.split(":")
    scaling = {"rope_type": kind} | ({"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {})
    try:
        scaling["factor"] = float(numbers[0])
        if len(numbers) > 1:
            scaling["original_max_position_embeddings"] = int(numbers[1])
        check_scaling({"original_max_position_embeddings": 1} | scaling)
    except (ValueError, IndexError) as error:  # a UserError too
        reason = error if isinstance(error, UserError) else "must be TYPE:FACTOR, such as yarn:4"
        raise argparse.ArgumentTypeError(f"{reason}: {text}") from None
    return scaling


def _read_scaling(rope: dict, hf: dict) -> dict | None:
    """The scaling in rope, the entry of a config.json about the rotation; None: not scaled. UserError for a type that
    is not supported."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    dropped = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    scaling = {"rope_type": kind} | {name: value for name, value in rope.items() if name not in dropped}
    if kind in ("llama3", "yarn") and scaling.get("original_max_position_embeddings") is None:
        trained = hf.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
        scaling["original_max_position_embeddings"] = trained
    return check_scaling({name: value for name, value in scaling.items() if value is not None})


def check_scaling(scaling: dict) -> dict:
    """Returns it. UserError names what is missing, unknown or not a number above 0."""
    kind = scaling.get("rope_type")
    if kind not in ROPE_FIELDS:
        raise UserError(f'rope_type "{kind}" is not supported; "default", {", ".join(ROPE_FIELDS)} are')
    needed, possible = ROPE_FIELDS[kind]
    names = scaling.keys() - {"rope_type"}
    for name in sorted((needed - names) | (names - needed - possible)):
        what = "needs" if name in needed else "is not supported with"
        raise UserError(f'rope_type "{kind}" {what} {name}')
    for name in sorted(names):
        value = scaling[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f'rope_type "{kind}" needs a number above 0 as {name}, not {value!r}')
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError('rope_type "llama3" needs a low_freq_factor below high_freq_factor')
    return scaling


HIDDEN_ACTS = ("silu", "relu2", "gelu_pytorch_tanh")  # Hugging Face's names; operators.ACTIVATIONS computes them

# Fields of config.json that change what is computed, with the only value that model.py supports.
PLAIN_HF = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "quantization_config": None}

# Fields that have the same name and meaning in config.json.
_SHARED_FIELDS = (
    "vocab_size hidden_size intermediate_size hidden_act num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id"
).split()
_MOE_FIELDS = (
    "n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size first_k_dense_replace norm_topk_prob "
    "routed_scaling_factor scoring_func router_aux_loss_coef seq_aux router_bias_update_speed"
).split()
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "glm4_moe", "qwen2_moe")
_REQUIRED_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
).split()
_DEFAULTS_HF = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # of a config.json that lacks them

# Sizes that differ from the defaults above.
PRESETS = {
    "tiny": dict(  # 1 M: seconds, for tests; minutes, for the demonstration
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1
    ),
    "mini": dict(  # 5 M: minutes on two CPU cores
        hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2
    ),
    "small": dict(),  # 26 M: the defaults; a 4 GB GPU can train it
    "base": dict(  # 100 M
        hidden_size=768, intermediate_size=2048, num_hidden_layers=15, num_attention_heads=12, num_key_value_heads=4
    ),
    "large": dict(  # 320 M, for a GPU: the shape of MobileLLM-350M, deep and thin (arXiv 2402.14905)
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5
    ),
    "xl": dict(  # 980 M, for a GPU: TinyLlama's shape (arXiv 2401.02385)
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    ),
}
# The same with experts: as many active parameters, two to three times as many in total.
PRESETS |= {
    "tiny-moe": PRESETS["tiny"] | dict(use_moe=True, moe_intermediate_size=64),
    "mini-moe": PRESETS["mini"] | dict(use_moe=True, moe_intermediate_size=176),
    "small-moe": PRESETS["small"] | dict(use_moe=True, moe_intermediate_size=352),
    "base-moe": PRESETS["base"] | dict(use_moe=True, moe_intermediate_size=512),
    "large-moe": PRESETS["large"] | dict(use_moe=True, moe_intermediate_size=640),
    "xl-moe": PRESETS["xl"] | dict(use_moe=True, moe_intermediate_size=1408),
}
CARD_PRESETS = ("large", "large-moe", "xl", "xl-moe")  # a CPU would take months
