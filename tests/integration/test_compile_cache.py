"""Compiled functions that are kept: loaded by the next process, compiled again when anything changed or is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_captured import plain_text
from test_compiled_target import needs_compiler
from torch import Tensor, nn

from conftest import tiny_llama
from medhead.compile import CompiledTarget, packages
from medhead.compile.model_key import model_key
from medhead.compile.trace import compile_fixed
from medhead.core.tree import TokenTree
from medhead.model.target import Target

PROGRAM = """
import json, sys
import torch
from conftest import tiny_llama
from medhead import Decoder
decoder, said = Decoder(tiny_llama(num_hidden_layers=1), "ngram", tree_size=5, step="compiled"), []
decoder.compiled_target.on_progress = said.append
ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
print(json.dumps([decoder.generate(ids, max_new_tokens=30, eos_token_id=None).tolist(), len(said)]))
"""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MEDHEAD_CACHE", str(tmp_path))
    return tmp_path / "compiled"


@pytest.mark.slow
@needs_compiler
def test_the_next_process_compiles_nothing(cache: Path) -> None:
    """It finds the packages though its hashes of strings differ, and writes the text of plain decoding."""
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    target = Target(tiny_llama(num_hidden_layers=1), probe=False)
    expected = plain_text(target, input_ids=ids, max_new_tokens=30, eos_token_id=None).tolist()
    compiled = []
    for seed in ("1", "2"):
        paths = [str(Path(__file__).parents[1]), os.environ["PYTHONPATH"]]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        text, times = json.loads(done.stdout.splitlines()[-1])
        assert text == expected
        compiled.append(times)
    assert compiled[0] > 0
    assert compiled[1] == 0


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_package_is_compiled_again(cache: Path, damage: str) -> None:
    weight, said = torch.randn(8, 8), list[str]()
    given = [torch.randn(3, 8)]

    def compiled() -> tuple[Tensor, ...]:
        with torch.no_grad():
            result: tuple[Tensor, ...] = compile_fixed(lambda x: (x @ weight,), given, lambda: said.append(""))(*given)
        torch.testing.assert_close(result[0], given[0] @ weight)
        return result

    compiled()
    compiled()
    assert len(said) == 1
    (file,) = cache.glob("*/function.pt2")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes(len(content)))
    with pytest.warns(UserWarning, match="cannot be loaded .*; compiling again"):
        compiled()
    compiled()
    assert len(said) == 2


def _weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6


def _attribute(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 1e-4


def _config(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3


def _activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.ReLU()


@pytest.mark.parametrize("change", [_weight, _attribute, _config, _activation])
def test_a_changed_model_has_another_key(change: Callable[[Any], None]) -> None:
    first, same, changed = (CompiledTarget(tiny_llama(), probe=False) for _ in range(3))
    with first.active():
        assert model_key(first) == model_key(same)
    change(changed.model)
    assert model_key(first) != model_key(changed)


def test_the_number_of_threads_and_the_versions_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    target = CompiledTarget(tiny_llama(), probe=False)
    keys = [model_key(target)]
    monkeypatch.setattr("transformers.__version__", "0.0")
    keys.append(model_key(target))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.append(model_key(target))
    assert keys[0] != keys[1] != keys[2]


def test_a_model_that_other_code_changed_has_no_key() -> None:
    hooked, replaced = (CompiledTarget(tiny_llama(), probe=False) for _ in range(2))
    hooked.model.model.norm.register_forward_hook(lambda *_: None)
    replaced.model.model.norm.forward = lambda x: x
    assert model_key(hooked) is None
    assert model_key(replaced) is None


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("fault", ["other values", "another number of outputs", "an error"])
def test_a_loaded_pass_that_disagrees_is_compiled_again(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def loaded(key: str) -> packages.Function:
        def run(*given: Tensor) -> tuple[Tensor, ...]:
            if fault == "an error":
                raise RuntimeError("out of luck")
            logits = torch.zeros(1, given[0].shape[1], 64)
            return (
                (logits,) if fault == "another number of outputs" else (logits, torch.zeros(1, given[0].shape[1], 32))
            )

        return run

    compiled, discarded = list[str](), list[str]()

    def compile_open(
        run: Callable[..., Any], _: object, on_compile: Callable[[], None], key: str
    ) -> Callable[..., Any]:
        compiled.append(key)
        return run

    monkeypatch.setattr(packages, "load", loaded)
    monkeypatch.setattr(packages, "discard", discarded.append)
    monkeypatch.setattr("medhead.compile.compiled_target.compile_open", compile_open)
    target = CompiledTarget(tiny_llama(), probe=False)
    logits = []
    for one in (target, Target(target.model, probe=False)):
        with torch.inference_mode(), one.active():
            cache = one.new_cache(1, 40)
            one.prefill(cache, [[3, 4, 5]])
            logits.append(one.verify(cache, TokenTree.from_parents(torch.tensor([5, 6]), torch.tensor([0, 0])))[0])
    torch.testing.assert_close(*logits)
    assert compiled == discarded
    assert len(compiled) == 1


def _graph(run: Callable[..., Any], given: list[Tensor]) -> Any:
    from medhead.compile.trace import trace

    return trace(run, given, "fake")


def test_several_processes_may_make_one_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to finish wins; what the other made is dropped, and nothing is left behind."""

    def make(graph: Any, file: Path) -> None:
        file.write_text("ours")
        (cache / "key").mkdir()
        (cache / "key" / "function.pt2").write_text("theirs")

    monkeypatch.setattr(packages, "_compile", make)
    monkeypatch.setattr(packages, "load", lambda key: key)
    assert packages.build("key", _graph(lambda x: (x + 1,), [torch.zeros(2)])) == "key"
    assert [path.name for path in cache.iterdir()] == ["key"]
    assert (cache / "key" / "function.pt2").read_text() == "theirs"


def test_without_a_writable_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDHEAD_CACHE", os.devnull)
    graph = _graph(lambda x: (x + 1,), [torch.zeros(2)])
    assert packages.load("key") is None
    with pytest.warns(UserWarning, match="compiled steps cannot be kept in /dev/null/compiled"):
        assert packages.build("key", graph) is None


@pytest.mark.usefixtures("cache")
def test_what_cannot_be_packaged_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fails(graph: Any, file: Path) -> None:
        tried.append(file)
        raise NotImplementedError("an operation")

    monkeypatch.setattr(packages, "_compile", fails)
    monkeypatch.setattr("medhead.compile.trace._compile_here", lambda graph, *_: graph)
    for _ in range(2):
        run = compile_fixed(lambda x: (x + 1,), [torch.zeros(2)], lambda: None)
        assert run(torch.ones(2))[0].tolist() == [2, 2]
    assert len(tried) == 1


def test_packages_that_nothing_uses_are_deleted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_compile", lambda graph, file: file.write_text(""))
    monkeypatch.setattr(packages, "load", lambda key: key)
    for name in ("old", "new"):
        (cache / name).mkdir(parents=True)
    os.utime(cache / "old", (0, 0))
    packages.build("key", _graph(lambda x: (x + 1,), [torch.zeros(2)]))
    assert {path.name for path in cache.iterdir()} == {"new", "key"}
