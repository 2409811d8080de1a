"""What a step costs, by arithmetic: floating-point operations and memory; and how many rows fit at a time."""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model.LMConfig import LMConfig
from model.model import CausalLM
from model.operators import attention_here
from training.loss import LOSS_CHUNK, loss_chunk, next_token_loss
from training.machine import Machine
from training.optimizer import MUON_BATCH
from training.packing import Batch, PackedDataset

# Memory that activations take relative to their size, because freed memory seldom fits the next tensor exactly: fitted
# to the table of docs/scaling.md, which `python -m bench.memory` measures.
FRAGMENTATION = 1.45
# On a GPU, whose allocator rounds less, and bytes that its driver and libraries take. Both are assumed, not measured.
CARD_FRAGMENTATION = 1.1
CONTEXT = 400_000_000
ROOM = 0.9  # fraction of the memory of a GPU, or of a CPU's machine, that a run may take
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class StepSettings:
    """What the memory of a training step depends on, besides the model."""

    batch_size: int  # rows per process in a forward and backward pass
    accumulation_steps: int  # such passes per optimizer step
    max_seq_len: int  # tokens per row
    grad_checkpointing: bool | None  # None: where it takes too much memory without (decide_checkpointing)
    optimizer: str


def step_flops(model: CausalLM, tokens: int, attention_pairs: int) -> float:
    """Floating-point operations of forward and backward: 6 per weight and token (arXiv 2001.08361, 2.1), 4 where the
    weight is frozen; and per layer, query-key pair and number of a query 12, for q k^T and its product with v. Padding
    is not counted, nor are experts that a token is not routed to, except where anything is frozen (LoRA)."""
    config = model.config
    idle = model.num_idle_parameters()
    weights = model.num_parameters() - idle
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size  # the embedding is looked up, not multiplied
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    frozen -= idle if frozen else 0
    pair = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return (6 * weights - 2 * frozen) * tokens + pair * attention_pairs


def memory_estimate(
    model: CausalLM, step: StepSettings, bytes_per_number: int = 4, attention: str = "manual", processes: int = 1
) -> int:
    """Bytes at the peak of a training step; bench/memory.py measures the same.

    bytes_per_number: of the inputs of matrix products. Weights are what they are, gradients and optimizer float32;
    autocast also keeps cast weights. attention: Decoder.attention_kind; all but "manual" run on a GPU.
    processes: over which --shard shards weights, gradients and optimizer.
    """
    config = model.config
    on_gpu = attention != "manual"
    tokens = step.batch_size * step.max_seq_len
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = 3 * sum(parameter.numel() for parameter in trained)  # gradients, Adam's two moments
    if step.optimizer == "muon":  # one moment of a matrix; four copies of those that are updated at a time
        sizes = Counter()
        for parameter in model.model.layers.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                sizes[parameter.shape] += parameter.numel()
        state -= sizes.total()
    parameters = list(model.parameters())
    state = 4 * state + sum(parameter.numel() * parameter.element_size() for parameter in parameters)  # bytes
    if processes > 1:
        state = state // processes + 4 * _gathered_at_a_time(model)
    if step.optimizer == "muon":
        state += 16 * min(max(sizes.values(), default=0), MUON_BATCH)

    # With gradient checkpointing a layer keeps its input. On a CPU twice as much is lost around it to fragmentation.
    inside = 3 * config.intermediate_size  # gradients in a layer, in the backward pass
    if on_gpu:
        layers = [
            _kept_on_gpu(config, layer, bytes_per_number, attention, step.max_seq_len)
            for layer in range(config.num_hidden_layers)
        ]
        if config.use_moe:  # three copies of the experts' inputs and outputs, and five of what is inside
            visit = 3 * config.hidden_size + 5 * config.moe_intermediate_size
            inside = max(inside, config.num_experts_per_tok * visit)
        kept_input = _residual_size(bytes_per_number, attention) * config.hidden_size
        fragmentation = CARD_FRAGMENTATION
        # Of the logits: the product, its float32 copy, probabilities, and the gradient in the precision of the product.
        chunk = min(tokens, loss_chunk(torch.device("cuda"), config.vocab_size))
        loss = chunk * config.vocab_size * (8 + 2 * bytes_per_number)
        loss += 4 * config.vocab_size * config.hidden_size if model.lm_head.weight.requires_grad else 0
    else:
        layers = [bytes_per_number * _kept_on_cpu(config, layer) for layer in range(config.num_hidden_layers)]
        fragmentation, kept_input = FRAGMENTATION, 3 * bytes_per_number * config.hidden_size
        loss = 2 * min(tokens, LOSS_CHUNK) * config.vocab_size + config.vocab_size * config.hidden_size
        loss *= bytes_per_number
    kept = kept_input * len(layers) if step.grad_checkpointing else sum(layers)
    kept += 3 * (4 if on_gpu else bytes_per_number) * config.hidden_size  # the last norm, and its output's gradient

    # In addition, at the end of the forward pass a chunk of logits and of its gradients, and the gradient of the head's
    # weight; or, in the backward pass, the gradients inside one layer, and what is recomputed.
    backward = bytes_per_number * inside + (max(layers) if step.grad_checkpointing else 0)
    activations = tokens * round(fragmentation * kept) + max(loss, tokens * round(fragmentation * backward))
    copied = sum(parameter.numel() for parameter in parameters if parameter.element_size() > bytes_per_number)
    return state + bytes_per_number * copied + activations + (CONTEXT if on_gpu else 0)


def _gathered_at_a_time(model: CausalLM) -> int:
    """Numbers that a process has in addition to its shard: the gathered weights of a layer and of the next, their
    gradients, and a copy of each in communication; outside the layers, gathered weights and gradients."""
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.model.layers]
    return 5 * max(layers) + 2 * (model.num_parameters() - sum(layers))


def _sizes(config: LMConfig) -> tuple[int, int, int]:
    """Per token: numbers of the hidden state, of all queries, and of all keys."""
    return (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )


def _kept_on_cpu(config: LMConfig, layer: int) -> int:
    """Numbers per token that a layer keeps for the backward pass on a CPU: the inputs of the norms, of each matrix
    product and of each nonlinearity, and the output of the attention."""
    H, heads, kv_heads = _sizes(config)
    attention = 3 * H + 4 * heads + 3 * kv_heads
    if not config.use_moe or layer < config.first_k_dense_replace:
        return attention + H + 4 * config.intermediate_size
    visits, width = config.num_experts_per_tok, config.moe_intermediate_size
    # The copies of the experts' inputs, and twice their outputs; the activations inside.
    return attention + H * (1 + 3 * visits) + 4 * width * (visits + config.n_shared_experts)


def _kept_on_gpu(config: LMConfig, layer: int, size: int, attention: str, max_seq_len: int) -> int:
    """Bytes per token that a layer keeps on a GPU, where products read numbers of `size` bytes. torch.compile keeps
    fewer."""
    H, heads, kv_heads = _sizes(config)
    kept = 2 * _residual_size(size, attention) * H + 2 * size * H  # inputs of both norms, and their outputs
    kept += size * (heads + 2 * kv_heads)  # q, k and v, before norm and rotation
    if attention == "masked":  # q, key heads repeated, output; input of the output product; a row of the additive mask
        kept += size * (5 * heads + max_seq_len)
    else:
        kept += size * (2 * heads + kv_heads)  # q, k, output
    if not config.use_moe or layer < config.first_k_dense_replace:
        return kept + size * 4 * config.intermediate_size
    visits, width = config.num_experts_per_tok, config.moe_intermediate_size
    # The router's input; gate and up of the visited experts (experts.visit_experts); four of the shared ones.
    return kept + 4 * H + size * width * (2 * visits + 4 * config.n_shared_experts)


def _residual_size(size: int, attention: str) -> int:
    """Bytes of a number of the residual stream on a GPU: it has float32 beside float16, the precision of GPUs that have
    no FlashAttention."""
    return size if attention == "flash" else 4


def decide_checkpointing(step: StepSettings, any_batch_size: bool, machine: Machine, model: CausalLM) -> StepSettings:
    """A step with gradient checkpointing if one without does not fit by the estimate; as it is where a flag decides.

    any_batch_size: whether fit_batch will find one, so that one row has to fit. All processes decide alike.
    """
    if step.grad_checkpointing is not None:
        return step
    plain = replace(step, grad_checkpointing=False)
    fits = fits_by_estimate(replace(plain, batch_size=1) if any_batch_size else plain, machine, model)
    return replace(step, grad_checkpointing=not all(machine.gather(fits)))


def fit_batch(step: StepSettings, machine: Machine, model: CausalLM, data: PackedDataset) -> StepSettings:
    """A step of as many rows, with as many at a time as fit: on a GPU by trying, on a CPU by the estimate. All
    processes take what fits in the smallest of them."""
    rows = step.batch_size * step.accumulation_steps

    def fits(n: int) -> bool:
        if machine.device.type == "cuda":
            return fits_card(busiest_batch(data, n), machine, model)
        return fits_by_estimate(replace(step, batch_size=n), machine, model)

    size = largest_divisor(rows, fits)
    size = min(machine.gather(size))
    return replace(step, batch_size=size, accumulation_steps=rows // size)


def largest_divisor(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` that fits; 1 if none does."""
    return next((n for n in range(rows, 1, -1) if rows % n == 0 and fits(n)), 1)


def fits_by_estimate(step: StepSettings, machine: Machine, model: CausalLM) -> bool:
    """Whether there is memory for this step: on the GPU, or for all processes that compute on this machine's CPU."""
    shards = machine.world_size if machine.shards else 1
    attention = attention_here(machine.device, machine.dtype, model.config.head_dim)
    needed = memory_estimate(model, step, machine.dtype.itemsize, attention, shards)
    if machine.device.type == "cuda":
        return needed <= ROOM * torch.cuda.get_device_properties(machine.device).total_memory
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * needed <= ROOM * memory_of_machine()


def memory_of_machine() -> float:
    """Bytes of memory that the system or the container has for all its processes; infinite where that is unknown
    (Windows)."""
    limits = [math.inf]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _files_of_limits():
        with contextlib.suppress(OSError, ValueError):  # no such file, or its content is "max"
            limits.append(int(path.read_text()))
    return min(limits)


def _files_of_limits() -> list[Path]:
    """Where Linux states the memory limit of this process's control group, cgroup 2 or 1: above it, it is killed."""
    groups = [""]  # in a container its own group is often the root
    with contextlib.suppress(OSError):
        groups += [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    names = ((f"{group}/memory.max", f"/memory{group}/memory.limit_in_bytes") for group in groups)
    return [Path(f"{CGROUPS}{name}") for both in names for name in both]


def busiest_batch(data: PackedDataset, rows: int) -> Batch:
    """The rows with the most documents: FlashAttention's backward pass pads each of them by up to 128 tokens."""
    documents = np.diff(data.row_ends, prepend=0)  # of each row
    return data.batch(np.resize(np.argsort(-documents, kind="stable")[:rows], rows))


def fits_card(batch: Batch, machine: Machine, model: CausalLM) -> bool:
    """Whether a GPU has memory for a forward and backward pass of this batch, and for the optimizer in addition."""
    batch = batch.to(machine.device)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    torch.cuda.reset_peak_memory_stats(machine.device)
    try:
        forward_backward(model, batch, machine)
        peak = torch.cuda.max_memory_reserved(machine.device)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(machine.device).total_memory
    return peak + 8 * trained + CONTEXT <= ROOM * total  # 8: the optimizer's moments, not allocated yet


def forward_backward(model: CausalLM, batch: Batch, machine: Machine):
    """In a function of its own, whose end frees the graph, also where memory runs out in the backward pass."""
    with machine.autocast():
        loss_sum, *_ = next_token_loss(model, batch)
    loss_sum.backward()
