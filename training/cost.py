"""What a step costs, by arithmetic: floating-point operations, and memory; and how many rows fit at a time."""

import argparse
import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from model.LMConfig import LMConfig
from model.model import CausalLM
from training.loss import CARD_CHUNK, LOSS_CHUNK, next_token_loss
from training.machine import Machine
from training.optimizer import MUON_BATCH
from training.packing import Batch

# Memory that activations take over what they hold, for a freed place seldom suits the next tensor exactly: fitted to
# the table of docs/scaling.md, which `python -m bench.memory` measures.
FRAGMENTATION = 1.45
# On a card, whose allocator rounds less, and what its driver and libraries take. Both are assumptions: not measured.
CARD_FRAGMENTATION = 1.1
CONTEXT = 400_000_000
ROOM = 0.9  # of the memory of a card, or of a CPU's machine, that a run may take
CGROUPS = Path("/sys/fs/cgroup")


def step_flops(model: CausalLM, tokens: int, attention_pairs: int) -> float:
    """Floating-point operations of forward and backward: 6 a weight and token (arXiv 2001.08361, 2.1), 4 where it is
    frozen, and for each layer and query-key pair 12 a number of the query, for q k^T and its product with v. Padding
    is not counted, nor are experts that a token does not visit; where anything is frozen (LoRA), all experts are."""
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
    model: CausalLM, args: argparse.Namespace, bytes_per_number: int = 4, attention: str = "manual", processes: int = 1
) -> int:
    """Bytes at the peak of a training step, from what it holds at once; bench/memory.py measures the same.

    bytes_per_number: of what products read. Weights, gradients and optimizer are float32; autocast also keeps cast
    weights. attention: Decoder.attention_kind; all but "manual" are a card's.
    processes: over how many --shard spreads weights, gradients and optimizer.
    """
    config = model.config
    on_card = attention != "manual"
    tokens = args.batch_size * args.max_seq_len
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = model.num_parameters()
    state = weights + 3 * sum(parameter.numel() for parameter in trained)  # weights, gradients, Adam's two moments
    if args.optimizer == "muon":  # one moment of a matrix; four copies of those that are updated at a time
        sizes = Counter()
        for parameter in model.model.layers.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                sizes[parameter.shape] += parameter.numel()
        state -= sizes.total()
    if processes > 1:
        state = state // processes + _whole_at_a_time(model)
    if args.optimizer == "muon":
        state += 4 * min(max(sizes.values(), default=0), MUON_BATCH)

    # With checkpoints a layer keeps its input; on a CPU, twice as much is lost around it: it stays where all else comes
    # and goes.
    inside = 3 * config.intermediate_size  # gradients in a layer, in the backward pass
    if on_card:
        layers = [
            _kept_on_card(config, layer, bytes_per_number, attention, args.max_seq_len)
            for layer in range(config.num_hidden_layers)
        ]
        if config.use_moe:  # three copies of what goes to the experts and comes back, and five of what is inside
            visit = 3 * config.hidden_size + 5 * config.moe_intermediate_size
            inside = max(inside, config.num_experts_per_tok * visit)
        fragmentation, kept_input, chunk = CARD_FRAGMENTATION, 4 * config.hidden_size, CARD_CHUNK
        # Of the logits: the product, in float32, probabilities, and their gradient for the product.
        loss = min(tokens, chunk) * config.vocab_size * (8 + 2 * bytes_per_number)
        loss += 4 * config.vocab_size * config.hidden_size
    else:
        layers = [bytes_per_number * _kept_by_hand(config, layer) for layer in range(config.num_hidden_layers)]
        fragmentation, kept_input = FRAGMENTATION, 3 * bytes_per_number * config.hidden_size
        loss = 2 * min(tokens, LOSS_CHUNK) * config.vocab_size + config.vocab_size * config.hidden_size
        loss *= bytes_per_number
    kept = kept_input * len(layers) if args.grad_checkpointing else sum(layers)
    kept += 3 * (4 if on_card else bytes_per_number) * config.hidden_size  # the last norm, and its result's gradient

    # Beside it, at the end of the forward pass a chunk of logits and of its gradients, and the gradient of the head's
    # weight; or, in the backward pass, the gradients inside one layer, and what is computed anew.
    backward = bytes_per_number * inside + (max(layers) if args.grad_checkpointing else 0)
    activations = tokens * round(fragmentation * kept) + max(loss, tokens * round(fragmentation * backward))
    copy = bytes_per_number * weights if bytes_per_number < 4 else 0
    return 4 * state + copy + activations + (CONTEXT if on_card else 0)


def _whole_at_a_time(model: CausalLM) -> int:
    """Numbers that a process has beside its part, under --shard: of a layer the weights, and those of the next, their
    gradients, and a copy of each on its way; of what no layer has, weights and gradients."""
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.model.layers]
    return 5 * max(layers) + 2 * (model.num_parameters() - sum(layers))


def _sizes(config: LMConfig) -> tuple[int, int, int]:
    """Numbers of a token's hidden state, of its queries, and of its keys."""
    return (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )


def _kept_by_hand(config: LMConfig, layer: int) -> int:
    """Numbers of a token that a layer keeps for the backward pass on a CPU: what the norms, each matrix product and
    each nonlinearity read; of the attention also what it gave."""
    H, heads, kv_heads = _sizes(config)
    attention = 3 * H + 4 * heads + 3 * kv_heads
    if not config.use_moe or layer < config.first_k_dense_replace:
        return attention + H + 4 * config.intermediate_size
    visits, width = config.num_experts_per_tok, config.moe_intermediate_size
    # The copies of what goes into the experts, and twice what comes out; their insides.
    return attention + H * (1 + 3 * visits) + 4 * width * (visits + config.n_shared_experts)


def _kept_on_card(config: LMConfig, layer: int, size: int, attention: str, max_seq_len: int) -> int:
    """Bytes of a token that a layer keeps on a card, where products read numbers of `size` bytes. Norms and rotations
    read float32 all the same, and under autocast each product makes a copy of its own of what it reads."""
    H, heads, kv_heads = _sizes(config)
    copies = 1 if size == 4 else 3  # of what the q, k and v products read
    kept = 2 * 4 * H + copies * size * H  # what both norms read; what the q, k and v products read
    kept += 2 * 4 * (heads + kv_heads)  # what the norms of q and k read, and their rotations
    repeated = heads if attention == "masked" else kv_heads
    kept += size * (2 * heads + 2 * repeated + heads)  # q, k, v and what came out; what the output product reads
    if attention == "masked":
        kept += size * max_seq_len  # a row of the mask, as numbers to add
    copies = 1 if size == 4 else 2
    if not config.use_moe or layer < config.first_k_dense_replace:
        return kept + size * (copies * H + 4 * config.intermediate_size)
    visits, width = config.num_experts_per_tok, config.moe_intermediate_size
    experts = H + 2 * width * visits  # what goes in; gate and up (experts.visit_experts)
    shared = (copies * H + 4 * width * config.n_shared_experts) if config.n_shared_experts else 0
    return kept + 4 * H + size * (experts + shared)


def fit_batch(args: argparse.Namespace, machine: Machine, model: CausalLM) -> tuple[int, int]:
    """--batch_size and --accumulation_steps of a step of as many rows as these flags ask for, with the most rows at a
    time that fit: on a card by trying, on a CPU by the estimate. All processes take what fits the least of them."""
    rows = args.batch_size * args.accumulation_steps
    fits = fits_card if machine.device.type == "cuda" else fits_by_estimate
    size = min(machine.gather(largest_divisor(rows, lambda n: fits(args, machine, model, n))))
    return size, rows // size


def largest_divisor(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest number that divides `rows` and fits; 1 if none does."""
    return next((n for n in range(rows, 1, -1) if rows % n == 0 and fits(n)), 1)


def fits_by_estimate(args: argparse.Namespace, machine: Machine, model: CausalLM, rows: int) -> bool:
    """Whether the processes of this machine find room for so many rows each."""
    settings = argparse.Namespace(**vars(args) | {"batch_size": rows})
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return processes * memory_estimate(model, settings, machine.dtype.itemsize) <= ROOM * memory_of_machine()


def memory_of_machine() -> float:
    """Bytes that the system, or a container, has for this process and its neighbours; without end where nothing says
    so (Windows)."""
    limits = [math.inf]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _files_of_limits():
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            limits.append(int(path.read_text()))
    return min(limits)


def _files_of_limits() -> list[Path]:
    """Where Linux writes what this process's control group may take, cgroup 2 or 1: who takes more is killed."""
    groups = [""]  # a container's own is often the root of what it sees
    with contextlib.suppress(OSError):
        groups += [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    names = ((f"{group}/memory.max", f"/memory{group}/memory.limit_in_bytes") for group in groups)
    return [Path(f"{CGROUPS}{name}") for both in names for name in both]


def fits_card(args: argparse.Namespace, machine: Machine, model: CausalLM, rows: int) -> bool:
    """Whether a forward and backward pass of so many rows, and the optimizer's memory beside it, find room."""
    ids = torch.zeros(rows, args.max_seq_len, dtype=torch.int64)
    positions = torch.arange(args.max_seq_len).expand_as(ids).contiguous()
    batch = Batch(ids, ids, positions, ids, [0], "train", ids.numel(), 0).to(machine.device)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    torch.cuda.reset_peak_memory_stats(machine.device)
    try:
        with machine.autocast():
            loss_sum, *_ = next_token_loss(model, batch)
        loss_sum.backward()
        peak = torch.cuda.max_memory_reserved(machine.device)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(machine.device).total_memory
    return peak + 8 * trained + CONTEXT <= ROOM * total  # 8: the optimizer's moments, which are not there yet
