"""From a function of tensors to a compiled one: its operations are traced once, and PyTorch's compiler fuses them.

The trace holds the tensor operations that the function ran, whatever Python led to them, so any model can be compiled.
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

# Inductor packs the weights once, and its own GEMMs of few rows read the packed copy; BLAS repacks the weights on every
# call, which takes longer than the products of a tree's pass (`benchmarks/compiled-cpu`).
_FOR_CPU = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"}


def compile_fixed(run: Callable[..., Any], given: list[Tensor]) -> Callable[..., Any]:
    """Compile a function of tensors of just these sizes.

    Args:
        run: what to compile; it must not read tensors.
        given: arguments that it is called with now, so that it is compiled when this returns.
    """
    with torch.inference_mode(False), torch.no_grad():
        graph = trace(run, [torch.empty_like(tensor) for tensor in given], "fake")
    return compile_graph(graph, given, dynamic=False)


def compile_open(
    run: Callable[..., Any],
    examples: list[Tensor],
    keep: Callable[[GraphModule], Callable[..., Any] | None] = lambda graph: None,
) -> Callable[..., Any]:
    """Compile a function of tensors with dynamic sizes, and call it once.

    Args:
        run: what to compile; it must not read tensors.
        examples: arguments. Their sizes above 1 stay open, and sizes that are equal here must always be.
        keep: another way to compile what was traced; it may return None.
    """
    with torch.inference_mode(False), torch.no_grad():
        graph = trace(run, examples, "symbolic")
    if (kept := keep(_tidy(graph, examples))) is not None:
        return kept
    given = [example.clone() for example in examples]  # tensors of the present mode, inference or not
    return compile_graph(graph, given, dynamic=True)


def compile_graph(graph: GraphModule, given: list[Tensor], dynamic: bool) -> Callable[..., Any]:
    """Compile a traced function and call it once."""
    graph = _tidy(graph, given)
    function: Callable[..., Any] = torch.compile(graph, dynamic=dynamic)
    if given[0].device.type != "cpu":
        function(*given)
        return function
    try:
        with inductor.patch(_FOR_CPU):
            function(*given)
    except Exception as error:  # a dtype without a C++ GEMM template in Inductor
        if "NoValidChoices" not in str(error):
            raise
        function = torch.compile(graph, dynamic=dynamic)
        function(*given)
    return function


def trace(run: Callable[..., Any], examples: list[Tensor], mode: Literal["fake", "symbolic"]) -> GraphModule:
    """Trace the operations of `run` with tensors that hold nothing: it fails if it reads one.

    Args:
        run: takes tensors.
        examples: of what it takes.
        mode: `fake` for these sizes alone, `symbolic` for sizes that stay open.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True  # the caller reports a failure in one line
    try:
        return make_fx(run, tracing_mode=mode, _allow_non_fake_inputs=True)(*examples)
    finally:
        log.disabled = before


def _tidy(graph: GraphModule, given: list[Tensor]) -> GraphModule:
    """Drop unused operations; refuse a constant that shares memory with an argument.

    Packing weights, PyTorch's compiler (2.13) mistakes one for the other where a constant shares memory with an argument that
    changes.
    """
    changing = {tensor.untyped_storage().data_ptr() for tensor in given}
    graph.graph.eliminate_dead_code(_has_effect)
    graph = GraphModule(graph, graph.graph)  # takes over what the graph names, parameters and buffers
    for name, constant in [*graph.named_parameters(), *graph.named_buffers()]:
        if constant.untyped_storage().data_ptr() in changing:
            raise ValueError(f"the constant {name} shares memory with an argument")
    graph._lineno_map = None  # the compiler looks up lines in it that are not there
    return graph


def _has_effect(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.is_impure() or (schema is not None and schema.is_mutable)
