"""From a function of tensors to a compiled one: its operations are written down once, and PyTorch's compiler fuses them.

What is written down is what the function did, whatever Python it took, so any model can be compiled; nothing has to be
understood by the compiler but operations on tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

# Weights are packed once, and the compiler's own products of a few rows read them as they lie; BLAS packs them anew in every
# product, which takes a tree's pass longer than to compute it (`benchmarks/compiled-cpu`).
_FOR_CPU = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"}


def compile_fixed(run: Callable[..., Any], given: list[Tensor]) -> Callable[..., Any]:
    """Compile a function of tensors of just these sizes.

    Args:
        run: what to compile; it must not read tensors.
        given: arguments that it is called with now, so that it is compiled when this returns.
    """
    with torch.inference_mode(False), torch.no_grad():
        tape = write_down(run, [torch.empty_like(tensor) for tensor in given], "fake")
    return compile_tape(tape, given, dynamic=False)


def compile_open(run: Callable[..., Any], examples: list[Tensor]) -> Callable[..., Any]:
    """Compile a function of tensors whose sizes stay open, and call it once.

    Args:
        run: what to compile; it must not read tensors.
        examples: arguments. Their sizes above 1 stay open, and sizes that are equal here must always be.
    """
    with torch.inference_mode(False), torch.no_grad():
        tape = write_down(run, examples, "symbolic")
    given = [example.clone() for example in examples]  # tensors of the mode that rules here, inference or not
    return compile_tape(tape, given, dynamic=True)


def compile_tape(tape: GraphModule, given: list[Tensor], dynamic: bool) -> Callable[..., Any]:
    """The compiled tape, after its first call."""
    tape = _tidy(tape, given)
    compiles: Callable[..., Any] = torch.compile(tape, dynamic=dynamic)
    if given[0].device.type != "cpu":
        compiles(*given)
        return compiles
    try:
        with inductor.patch(_FOR_CPU):
            compiles(*given)
    except Exception as error:  # a type that the compiler has no product of its own for
        if "NoValidChoices" not in str(error):
            raise
        compiles = torch.compile(tape, dynamic=dynamic)
        compiles(*given)
    return compiles


def write_down(run: Callable[..., Any], examples: list[Tensor], mode: Literal["fake", "symbolic"]) -> GraphModule:
    """The operations of `run`, written down with tensors that hold nothing: it fails if it reads one.

    Args:
        run: takes tensors.
        examples: of what it takes.
        mode: `fake` for these sizes alone, `symbolic` for sizes that stay open.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True  # what fails is said in one line by those who ask
    try:
        return make_fx(run, tracing_mode=mode, _allow_non_fake_inputs=True)(*examples)
    finally:
        log.disabled = before


def _tidy(tape: GraphModule, given: list[Tensor]) -> GraphModule:
    """The same without what nobody uses.

    Packing weights, the compiler (2.13) takes one for another where a constant shares memory with an argument that changes.
    """
    changing = {tensor.untyped_storage().data_ptr() for tensor in given}
    tape.graph.eliminate_dead_code(_acts)
    tape = GraphModule(tape, tape.graph)  # takes over what the graph names, parameters and buffers
    for name, constant in [*tape.named_parameters(), *tape.named_buffers()]:
        if constant.untyped_storage().data_ptr() in changing:
            raise ValueError(f"the constant {name} shares memory with an argument")
    tape._lineno_map = None  # the compiler looks lines up in it that are not there
    return tape


def _acts(node: Node) -> bool:
    """Whether an operation does something besides what it returns."""
    schema = getattr(node.target, "_schema", None)
    return node.is_impure() or (schema is not None and schema.is_mutable)
