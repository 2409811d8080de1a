"""torch.compile: which runs use it, and what they do where it fails."""

import importlib

from base.cli import lacks_memory, one_line
from model.model import CausalLM
from training.cost import forward_backward
from training.loss import TokenLosses
from training.machine import Machine
from training.packing import Batch
from training.shard import modules_to_compile

MINUTES = 5  # a shorter run does not make up for the minute that compiling takes


def has_triton() -> bool:
    """Whether torch can compile for a GPU; Windows has no Triton."""
    return importlib.import_module("torch.utils._triton").has_triton()


def pays_to_compile(machine: Machine, minutes: float) -> bool:
    """Whether a run of so many minutes compiles by default. In float32 it does not: compiled, a router would compute in
    TF32 (operators.exact_linear)."""
    return machine.device.type == "cuda" and machine.dtype.itemsize == 2 and not machine.shards and minutes > MINUTES


def compile_model(model: CausalLM, machine: Machine, batch: Batch, **options) -> str:
    """Compiles the layers and the loss, and tries them on a batch, which adds to the gradients. Returns why it failed,
    in one line; "" if it did not. It may fail where a library, a C compiler or a header is missing.

    options: of torch.compile.
    """
    if machine.device.type == "cuda" and not has_triton():
        return "this torch does not find Triton"
    random_state = machine.random_state()
    modules = modules_to_compile(model, machine)
    for module in modules:
        module.compile(**options)
    TokenLosses.compile(**options)
    if batch.cu_seqlens is not None:  # other batches have other numbers of documents
        importlib.import_module("torch._dynamo").maybe_mark_dynamic(batch.cu_seqlens.cu_seqlens, 0)
    try:
        forward_backward(model, batch, machine)
    except Exception as error:
        if lacks_memory(error):
            raise
        for module in modules:
            module._compiled_call_impl = None
        TokenLosses.compile(on=False)
        return f"{type(error).__name__}: {one_line(error)[:200]}"
    finally:
        machine.set_random_state(random_state)
    return ""
