"""Captured steps as CUDA graphs: the text of plain decoding, and not one wait of the host inside a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_captured import SAMPLED, prompts

from conftest import HEADS, noise_heads, tiny_llama
from medhead import Decoder
from medhead.model.target import Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def on_gpu() -> Target:
    return Target(tiny_llama(hidden_size=64, head_dim=64).to(CUDA))


def there(**given: Any) -> dict[str, Any]:
    return {name: value.to(CUDA) for name, value in prompts().items()} | given


@pytest.mark.parametrize("way", ["graph", "compiled"])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["recurrent", "block_recurrent", "attention", "medusa"])
def test_a_graph_writes_plain_decodings_text(on_gpu: Target, name: str, sampling: dict[str, Any], way: str) -> None:
    assert name in HEADS
    captured = Decoder(on_gpu, "heads", heads=noise_heads(on_gpu, name), tree_size=12, step=way)
    given = there(max_new_tokens=60, **sampling)
    expected = Decoder(on_gpu, "none").generate(**given)
    for _ in range(2):  # the second one replays what the first has captured
        assert torch.equal(captured.generate(**given), expected)
    assert captured.statistics.captured_steps > 0
    assert captured.statistics.capture_seconds < 0.5


@pytest.mark.parametrize("way", ["eager", "graph"])
def test_no_step_waits_for_the_host(on_gpu: Target, way: str) -> None:
    captured = Decoder(on_gpu, "heads", heads=noise_heads(on_gpu, "block_recurrent"), tree_size=12, step=way)
    captured.generate(**there(max_new_tokens=20))
    assert captured.graphs is not None
    step = next(iter(captured.graphs))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with on_gpu.active(captured.proposer.feature_layers), torch.no_grad():
            step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["recurrent", "block_recurrent", "attention", "medusa"])
def test_a_graph_in_half_precision(name: str, sampling: dict[str, Any], dtype: torch.dtype) -> None:
    """The graph writes the text of the same step without a graph: the same kernels with the same sizes."""
    target = Target(tiny_llama(hidden_size=64, head_dim=64).to(CUDA, dtype))
    heads, given = noise_heads(target, name), there(max_new_tokens=60, **sampling)
    texts = [
        Decoder(target, "heads", heads=heads, tree_size=12, step=way).generate(**given) for way in ("eager", "graph")
    ]
    assert torch.equal(*texts)


def test_plain_decoding_is_a_graph_too(on_gpu: Target) -> None:
    given = there(max_new_tokens=60, **SAMPLED)
    captured = Decoder(on_gpu, "none", step="graph")
    assert torch.equal(captured.generate(**given), Decoder(on_gpu, "none").generate(**given))


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("proposer", "heads"), [("hybrid", "attention"), ("hybrid", None), ("ngram", None)])
def test_graphs_are_the_default(on_gpu: Target, proposer: str, heads: str | None, sampling: dict[str, Any]) -> None:
    """Draft tokens of the host come through pinned memory."""
    options = {} if heads is None else {"heads": noise_heads(on_gpu, heads)}
    decoder, given = Decoder(on_gpu, proposer, **options), there(max_new_tokens=60, **sampling)
    expected = Decoder(on_gpu, "none", step="loop").generate(**given)
    for _ in range(2):
        assert torch.equal(decoder.generate(**given), expected)
    assert decoder.statistics.captured_steps > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_kernels_serve_by_default(dtype: torch.dtype) -> None:
    model = tiny_llama(hidden_size=64, head_dim=64).to(CUDA, dtype)
    target, own = Target(model), Target(model, fused=False)
    assert {type(module) for module in target.fused.forwards} >= {type(model.model.norm), type(model.model.layers[0])}
    given = there(max_new_tokens=60)
    if dtype == torch.float32:
        assert torch.equal(*(Decoder(one, "none", step="loop").generate(**given) for one in (target, own)))
