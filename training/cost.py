"""What a step costs, by arithmetic: floating-point operations, and memory."""

import argparse
from collections import Counter

from model.model import CausalLM
from training.loss import LOSS_CHUNK
from training.optimizer import MUON_BATCH

# Memory that activations take over what they hold, for a freed place seldom suits the next tensor exactly: fitted to
# the table of docs/scaling.md, which `python -m bench.memory` measures.
FRAGMENTATION = 1.45


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


def memory_estimate(model: CausalLM, args: argparse.Namespace, bytes_per_number: int = 4) -> int:
    """Bytes at the peak of a training step, from what it holds at once; bench/memory.py measures the same.

    bytes_per_number: of activations. Weights, gradients and optimizer are float32; autocast also keeps cast weights.
    """
    config = model.config
    tokens = args.batch_size * args.max_seq_len
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = model.num_parameters()
    state = weights + 3 * sum(parameter.numel() for parameter in trained)  # weights, gradients, Adam's two moments
    if args.optimizer == "muon":  # one moment of a matrix; four copies of those that are updated at a time
        sizes = Counter()
        for parameter in model.model.layers.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                sizes[parameter.shape] += parameter.numel()
        state += 4 * min(max(sizes.values(), default=0), MUON_BATCH) - sizes.total()

    # What each layer keeps of a token: what the norms, each matrix product and each nonlinearity read; of the attention
    # also what it gave.
    attention = 3 * config.hidden_size + 4 * heads + 3 * kv_heads
    dense = config.hidden_size + 4 * config.intermediate_size
    layers = [attention + dense] * config.num_hidden_layers
    if config.use_moe:  # the copies of what goes into the experts, and twice what comes out; their insides
        visits = config.num_experts_per_tok
        width = config.moe_intermediate_size
        experts = config.hidden_size * (1 + 3 * visits) + 4 * width * (visits + config.n_shared_experts)
        n_experts = config.num_hidden_layers - config.first_k_dense_replace
        layers[-n_experts:] = [attention + experts] * n_experts
    # With checkpoints its input, and twice as much lost around it: it stays where all else comes and goes.
    kept = 3 * config.hidden_size * len(layers) if args.grad_checkpointing else sum(layers)
    kept += 3 * config.hidden_size  # the last norm, and the gradient of what it gave

    # Beside it, at the end of the forward pass a chunk of logits and of its gradients, and the gradient of the head's
    # weight; or, in the backward pass, the gradients inside one layer, and what is computed anew.
    loss = 2 * min(tokens, LOSS_CHUNK) * config.vocab_size + config.vocab_size * config.hidden_size
    backward = 3 * config.intermediate_size + (max(layers) if args.grad_checkpointing else 0)
    activations = bytes_per_number * (
        tokens * round(FRAGMENTATION * kept) + max(loss, tokens * round(FRAGMENTATION * backward))
    )
    copy = bytes_per_number * weights if bytes_per_number < 4 else 0
    return 4 * state + copy + activations
