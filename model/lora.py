"""LoRA (arXiv 2106.09685): a low-rank addition to a frozen matrix W is trained, W + (alpha / r) B A.

A is initialised at random and B at zero, so that an adapted model starts as its base model. Only the adapters are
saved, in PEFT's format: about a hundredth of the weights.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.cli import UserError
from model.model import CausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


# Fields of PEFT's adapter_config.json that change what is computed, with the only value that LoRALinear supports.
PLAIN_PEFT = {"peft_type": "LORA", "bias": "none", "lora_bias": False, "fan_in_fan_out": False}
PLAIN_PEFT |= {"use_dora": False, "use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}}
PLAIN_PEFT |= {"modules_to_save": [], "layers_to_transform": [], "trainable_token_indices": []}


class LoRALinear(nn.Linear):
    """A frozen linear layer with an adapter: x W^T + (alpha / r) dropout(x) A^T B^T, A (r, in), B (out, r) (eq. 3)."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        device = base.weight.device
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.r, self.alpha, self.dropout = r, alpha, dropout

    def forward(self, x: Tensor) -> Tensor:
        adapted = self.lora_B(self.lora_A(F.dropout(x, self.dropout, self.training)))
        return F.linear(x, self.weight, self.bias) + self.alpha / self.r * adapted

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A linear layer that computes the same. The sum is in float64, so that it is rounded once; on the CPU, because
        not every device has float64."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight, b, a = (x.cpu().double() for x in (self.weight, self.lora_B.weight, self.lora_A.weight))
        linear.weight, linear.bias = nn.Parameter((weight + b @ a * (self.alpha / self.r)).to(self.weight)), self.bias
        return linear


def lora_layers(model: CausalLM) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def has_lora(model: CausalLM) -> bool:
    return bool(lora_layers(model))


def apply_lora(
    model: CausalLM, r: int, alpha: float | None = None, dropout: float = 0.0, targets: Sequence[str] | None = None
):
    """Freezes the model and adds an adapter to every layer whose name ends in one of `targets`; default alpha: 2 r.

    Default targets: all projections; in a model with experts only those of attention, because transformers and PEFT
    store all experts in one tensor and would silently drop their adapters. UserError for a target that no layer has, or
    that such a model cannot export.
    """
    if r < 1:
        raise UserError(f"the rank of an adapter must be at least 1, not {r}")
    if has_lora(model):
        raise UserError("the model has adapters already; merge them first")
    targets = targets or (ATTENTION if model.config.use_moe else TARGETS)
    if model.config.use_moe and (beyond := sorted(set(targets) - set(ATTENTION))):
        raise UserError(
            f"no adapter for {', '.join(beyond)} in a model with experts: PEFT would not find it in transformers' "
            f"fused experts; adapt {', '.join(ATTENTION)}"
        )
    # Of the layers alone: the losses read lm_head's weight past its forward.
    linears = {
        name: module for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)
    }
    found = {name: module for name, module in linears.items() if name.rpartition(".")[2] in targets}
    missing = set(targets) - {name.rpartition(".")[2] for name in found}
    if missing or not found:
        known = sorted({name.rpartition(".")[2] for name in linears})
        raise UserError(f"no layer is called {', '.join(sorted(missing))}; there are {', '.join(known)}")
    model.requires_grad_(False)
    for name, linear in found.items():
        model.set_submodule(name, LoRALinear(linear, r, alpha or 2 * r, dropout))


def narrow_frozen(model: CausalLM, dtype: torch.dtype):
    """Converts frozen matrices to the dtype of the products that read them, which saves memory and changes no product.
    Norms and routers, which compute in float32, stay."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.dim() > 1 and not name.endswith("mlp.gate.weight"):
            parameter.data = parameter.data.to(dtype)


def merge_lora(model: CausalLM):
    """Adds the adapters to the weights. UserError if there are none, so that nothing is merged twice."""
    layers = lora_layers(model)
    if not layers:
        raise UserError("the model has no adapters to merge")
    for name, layer in layers.items():
        model.set_submodule(name, layer.merged())


def to_peft(model: CausalLM) -> tuple[dict[str, Tensor], dict]:
    """The adapters' tensors with PEFT's names, and the content of adapter_config.json."""
    layers = lora_layers(model)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.weight.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.weight.detach().contiguous()
    one = next(iter(layers.values()))
    return tensors, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": one.r,
        "lora_alpha": one.alpha,
        "lora_dropout": one.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def from_peft(model: CausalLM, tensors: dict[str, Tensor], config: dict):
    """Applies an adapter in PEFT's format. UserError for unsupported fields, and for tensors that do not fit."""
    for name, plain in PLAIN_PEFT.items():
        if (config.get(name) or plain) != plain:
            raise UserError(f'adapter_config.json has {name} "{config[name]}"; only "{plain}" is supported')
    r, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    targets = config.get("target_modules")
    right = {
        "r": type(r) is int and {tensor.shape[:1] for name, tensor in tensors.items() if ".lora_A." in name} == {(r,)},
        "lora_alpha": isinstance(alpha, int | float) and 0 < alpha <= 2**31,
        "lora_dropout": isinstance(dropout, int | float) and 0 <= dropout <= 1,
        "target_modules": isinstance(targets, list) and bool(targets) and all(isinstance(x, str) for x in targets),
    }
    for name in right:
        if not right[name]:
            value = repr(config.get(name))[:60]
            raise UserError(f"adapter_config.json has the {name} {value}, which this adapter cannot have")
    apply_lora(model, r, alpha, dropout, tuple(targets))
    expected, _ = to_peft(model)
    for name in sorted(expected.keys() | tensors.keys()):
        there, here = tensors.get(name), expected.get(name)
        if there is None or here is None or there.shape != here.shape:
            raise UserError(f"the adapter does not fit the model at {name}")
        here.copy_(there)
