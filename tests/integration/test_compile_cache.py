"""Compiled passes that are kept: loaded by the next process, compiled again when anything but weights changed or is damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_captured import plain_text
from test_compiled_target import needs_compiler
from torch import Tensor, nn

from conftest import tiny_llama
from medhead import Decoder
from medhead.compile import CompiledTarget, kept_pass
from medhead.compile.trace import trace
from medhead.core.tree import TokenTree
from medhead.model.block_weights import use_blocks
from medhead.model.pass_key import pass_key
from medhead.model.target import Target
from medhead_kernels import block_linear

SIZES: dict[str, Any] = {"num_hidden_layers": 1, "context": 100}
TEXT: dict[str, Any] = {
    "input_ids": torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]]),
    "max_new_tokens": 30,
    "eos_token_id": None,
}
PROGRAM = """
import torch
from test_compile_cache import SIZES, compiled_text
from conftest import tiny_llama
from medhead.compile import trace

def forbidden(*_, **__):
    raise AssertionError("this process must neither trace nor compile")

torch.compile = torch._inductor.aot_compile = trace.make_fx = forbidden
print(*compiled_text(tiny_llama(4, **SIZES)))
"""


def compiled_text(model: Any) -> tuple[list[int], int]:
    """Return a text decoded with compiled passes over trees and over one node, and how many were compiled."""
    decoder, said = Decoder(model, "ngram", tree_size=5, step="compiled"), list[str]()
    assert decoder.compiled_target is not None
    decoder.compiled_target.on_progress = said.append
    return decoder.generate(**TEXT).tolist()[0], len(said)


def expected_text(model: Any) -> list[int]:
    tokens: list[int] = plain_text(Target(model, probe=False), **TEXT).tolist()[0]
    return tokens


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the passes of a model, compiled by this process."""
    folder, model = tmp_path_factory.mktemp("entries"), tiny_llama(**SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDHEAD_CACHE", str(folder))
        assert compiled_text(model) == (expected_text(model), 2)
    return folder


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MEDHEAD_CACHE", str(tmp_path))
    return tmp_path / "compiled"


@pytest.mark.slow
@needs_compiler
def test_the_next_process_neither_traces_nor_compiles(entries: Path) -> None:
    """Its weights are others, and so are its hashes of strings."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ["PYTHONPATH"]]
    more = {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(paths), "MEDHEAD_CACHE": str(entries)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | more, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == f"{expected_text(tiny_llama(4, **SIZES))} 0"


@pytest.mark.slow
@needs_compiler
def test_a_damaged_entry_is_compiled_again(entries: Path, cache: Path) -> None:
    shutil.copytree(entries / "compiled", cache)
    damaged = next(cache.glob("*/pass.pt2"))
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    model = tiny_llama(**SIZES)
    with pytest.warns(UserWarning, match=r"cannot be loaded \(its checksum is wrong\), so it is deleted"):
        assert compiled_text(model) == (expected_text(model), 1)
    assert compiled_text(model) == (expected_text(model), 0)


@pytest.mark.slow
@needs_compiler
def test_kept_passes_are_used_by_default(entries: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every proposer, where there are any; nothing is compiled, and a model without a kept pass runs the ordinary one."""
    model = tiny_llama(**SIZES)
    assert Decoder(model, "ngram").compiled_target is None
    monkeypatch.setenv("MEDHEAD_CACHE", str(entries))
    monkeypatch.setattr(CompiledTarget, "_compile", lambda *_: pytest.fail("it compiles"))
    for proposer, used in (("ngram", True), ("none", True), ("ngram", False)):
        model = tiny_llama(**SIZES) if used else tiny_llama(**SIZES, intermediate_size=40)
        with Decoder(model, proposer, tree_size=5 if proposer == "ngram" else None) as decoder:
            assert decoder.generate(**TEXT).tolist()[0] == expected_text(model)
            assert decoder.compiled_target is not None
            assert decoder.compiled_target.in_use == used
        with Decoder(model, proposer, step="loop") as decoder:
            assert decoder.compiled_target is None


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("weights", ["full", "int4"])
def test_passes_with_weights_of_the_kernel_are_kept(weights: str, cache: Path) -> None:
    """Packed copies of weights, and blocks in place of weights: the machine code is given those of the next model."""
    if (reason := block_linear.unavailable()) is not None:
        pytest.skip(reason)
    for seed, compiled in ((0, 2), (1, 0)):
        model = tiny_llama(seed, **SIZES, hidden_size=128, intermediate_size=256)
        if weights != "full":
            use_blocks(model, weights)
        assert compiled_text(model) == (expected_text(model), compiled)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.slow
@needs_compiler
def test_a_kept_pass_reads_new_copies_of_changed_weights(cache: Path) -> None:
    """Also of a number that no sample of the weights holds, and whose change PyTorch does not count."""
    if (reason := block_linear.unavailable()) is not None:
        pytest.skip(reason)
    model = tiny_llama(**SIZES, hidden_size=128, intermediate_size=256)
    with Decoder(model, "ngram", tree_size=5, step="compiled") as decoder:
        before = decoder.generate(**TEXT).tolist()[0]
        model.model.layers[0].mlp.down_proj.weight.data[3, 1:100] += 9
        expected = expected_text(model)
        assert before != expected
        assert decoder.generate(**TEXT).tolist()[0] == expected


def verified(target: Target, nodes: int = 2) -> tuple[Tensor, Tensor]:
    """Return logits and features of a pass over a tree."""
    with torch.inference_mode(), target.active():
        cache = target.new_cache(1, 40)
        target.prefill(cache, [[3, 4, 5]])
        return target.verify(cache, TokenTree.chain(torch.arange(5, 5 + nodes)[None]))


@pytest.mark.slow
@needs_compiler
def test_a_kept_pass_reads_the_weights_in_place(entries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is part of its code, not even of weights that are all one, as those of new norms are."""
    monkeypatch.setenv("MEDHEAD_CACHE", str(entries))
    model = tiny_llama(**SIZES)
    for weight in (model.model.norm.weight, model.model.layers[0].input_layernorm.weight, model.lm_head.weight):
        weight.data *= 2
        assert compiled_text(model) == (expected_text(model), 0)
        target = CompiledTarget(model, probe=False)
        for nodes in (2, 9):
            ours, ordinary = verified(target, nodes), verified(Target(model, probe=False), nodes)
            torch.testing.assert_close(ours, ordinary, atol=2e-4, rtol=2e-5)
    assert sum(file.stat().st_size for file in entries.rglob("*") if file.is_file()) < 10e6


def key(model: Any, form: Any = ()) -> str | None:
    target = CompiledTarget(model, probe=False)
    with target.active():
        return pass_key(target, form)


def _eps(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 1e-4


def _config(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3


def _activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def _dtype(model: Any) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [_eps, _config, _activation, _dtype])
def test_a_changed_model_has_another_key(change: Callable[[Any], None]) -> None:
    model = tiny_llama()
    before = key(model)
    assert before == key(tiny_llama(seed=9)) != key(model, "another form")
    change(model)
    assert key(model) not in (before, None)


def test_threads_and_versions_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model, keys = tiny_llama(), set[str | None]()
    keys.add(key(model))
    monkeypatch.setattr("transformers.__version__", "0.0")
    keys.add(key(model))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.add(key(model))
    with torch.autocast("cpu", torch.bfloat16):
        keys.add(key(model))
    assert len(keys) == 4


def test_a_model_that_other_code_changed_has_no_key() -> None:
    hooked, replaced = tiny_llama(), tiny_llama()
    hooked.model.norm.register_forward_hook(lambda *_: None)
    replaced.model.norm.forward = lambda x: x
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    assert [key(hooked), key(replaced), key(adapted)] == [None] * 3


@pytest.mark.usefixtures("cache")
def test_a_loaded_pass_that_disagrees_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, discarded = list[str](), list[str]()

    def load(name: str, model: Any, ordinary: Callable[..., Any]) -> Callable[..., Any] | None:
        return None if discarded else lambda *given: tuple(part * float("nan") for part in ordinary(*given))

    monkeypatch.setattr(kept_pass, "load", load)
    monkeypatch.setattr(kept_pass, "build", lambda name, *_: compiled.append(name))
    monkeypatch.setattr(kept_pass, "discard", discarded.append)
    monkeypatch.setattr("medhead.compile.compiled_target.compile_open", lambda run, _, keep: keep(run) or run)
    model = tiny_llama()
    torch.testing.assert_close(verified(CompiledTarget(model, probe=False)), verified(Target(model, probe=False)))
    assert compiled == discarded
    assert len(compiled) == 1


def test_without_a_writable_folder_a_pass_lasts_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDHEAD_CACHE", os.devnull)
    monkeypatch.setattr("medhead.compile.trace.compile_graph", lambda graph, *_, **__: graph)
    model = tiny_llama()
    with pytest.warns(
        UserWarning, match="cannot be kept in /dev/null/compiled .* they last for this process"
    ) as warned:
        found = verified(CompiledTarget(model, probe=False))
    assert len(warned) == 1
    torch.testing.assert_close(found, verified(Target(model, probe=False)))


def test_what_aotinductor_cannot_compile_lasts_for_the_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise NotImplementedError("an operation")

    monkeypatch.setattr(torch._inductor, "aot_compile", fails)
    monkeypatch.setattr("medhead.compile.trace.compile_graph", lambda graph, *_, **__: graph)
    decoder = Decoder(tiny_llama(), "ngram", step="compiled")
    with pytest.warns(UserWarning, match=r"\(an operation\); they last for this process"):
        decoder.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
    assert list(cache.iterdir()) == []


def test_a_pass_with_tensors_of_others_is_not_kept(cache: Path) -> None:
    """Such a tensor may depend on the weights, or on anything else."""
    table = torch.randn(4)
    graph = trace(lambda x: (x + table, x), [torch.zeros(3, 4)], "symbolic")
    kept_pass.build("name", dict(nn.Linear(4, 4).named_parameters()), graph)
    assert not cache.exists()


def test_two_processes_may_compile_one_pass(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to finish wins; what the other one made is dropped, and nothing is left behind."""

    def fill(folder: Path, *_: object) -> None:
        (folder / "about.json").write_text("ours")
        (cache / "name").mkdir()
        (cache / "name" / "about.json").write_text("theirs")

    monkeypatch.setattr(kept_pass, "_fill", fill)
    kept_pass.build(
        "name", dict(nn.Linear(4, 4).named_parameters()), trace(lambda x: (x, x), [torch.zeros(3, 4)], "symbolic")
    )
    assert [path.name for path in cache.iterdir()] == ["name"]
    assert (cache / "name" / "about.json").read_text() == "theirs"


@pytest.mark.slow
@needs_compiler
def test_sizes_that_were_not_compiled_for_use_the_ordinary_pass(cache: Path) -> None:
    linear = nn.Linear(4, 4)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x @ linear.weight) if x.shape[0] > 2 else x, x

    with torch.no_grad():
        kept_pass.build("name", dict(linear.named_parameters()), trace(run, [torch.zeros(3, 4)], "symbolic"))
        ordinary = list[int]()

        def counted(x: Tensor) -> tuple[Tensor, Tensor]:
            ordinary.append(len(x))
            return run(x)

        kept = kept_pass.load("name", dict(linear.named_parameters()), counted)
        assert kept is not None
        for rows in (2, 3, 5):
            torch.testing.assert_close(kept(torch.ones(rows, 4)), run(torch.ones(rows, 4)))
    assert ordinary == [2]
