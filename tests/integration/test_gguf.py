"""A GGUF file is a model wherever one is named."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import medhead
from conftest import tiny_llama
from gguf_files import dequantised, write_gguf
from medhead.cli.main import main
from medhead.model import gguf as gguf_module
from medhead.model.gguf import is_gguf, read_header
from medhead_kernels import block_linear

TEXT = "Once upon a time the dragon said: Grüße! 12 日本語 <|end|>"


@pytest.fixture(scope="module")
def llama(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    # sizes that are multiples of the 32 weights of a Q8_0 block
    return tiny_llama(vocab=len(tokenizer), intermediate_size=64, eos_token_id=1, bos_token_id=None)


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Path]:
    """GGUF files in float32 and Q8_0, and folders with the same weights in safetensors."""
    root = tmp_path_factory.mktemp("gguf")
    for name in ("F32", "Q8_0"):
        model = copy.deepcopy(llama)
        if name == "Q8_0":
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.data = dequantised(parameter.data)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        write_gguf(root / f"{name}.gguf", llama, tokenizer, quantised=name == "Q8_0")
    return {path.name: path for path in root.iterdir()}


def generated(name: Path, capsys: pytest.CaptureFixture[str]) -> str:
    options = ["--prompt", "Once upon a time", "--max-new-tokens", "24", "--device", "cpu", "--json"]
    assert main(["generate", "--model", str(name), *options]) == 0
    text: str = json.loads(capsys.readouterr().out)["text"]
    return text


@pytest.mark.parametrize("name", ["F32", "Q8_0"])
def test_a_file_is_the_model_in_safetensors(
    name: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, folder = files[f"{name}.gguf"], files[name]
    model = medhead.load_model(file, "cpu", "float32")
    reference = AutoModelForCausalLM.from_pretrained(folder).eval().state_dict()
    loaded = model.state_dict()
    assert loaded.keys() == reference.keys()
    assert all(torch.equal(loaded[key], reference[key]) for key in reference)
    assert generated(file, capsys) == generated(folder, capsys)
    assert not hasattr(model.config, "quantization_config")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (1, 1)
    model.save_pretrained(tmp_path)  # it is an ordinary model: saved, cast, loaded
    again = medhead.load_model(tmp_path, "cpu", "float32").state_dict()
    assert all(torch.equal(again[key], reference[key]) for key in reference)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16


def test_dtype_and_tokenizer(files: dict[str, Path], tokenizer: PreTrainedTokenizerBase) -> None:
    file = str(files["Q8_0.gguf"])
    model = medhead.load_model(file, torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found = medhead.load_tokenizer(file)
    assert found.chat_template == tokenizer.chat_template
    assert (found.eos_token_id, found.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert found.padding_side == "left"
    ids = found(TEXT)["input_ids"]
    assert ids == tokenizer(TEXT)["input_ids"]
    assert found.decode(ids) == TEXT


def test_a_file_is_known_by_its_first_bytes(files: dict[str, Path], tmp_path: Path) -> None:
    """The caches of other programs hold GGUF files under names without an ending."""
    renamed = tmp_path / "sha256-1234"
    renamed.write_bytes(files["F32.gguf"].read_bytes())
    assert is_gguf(renamed)
    assert is_gguf("missing.gguf")
    assert not is_gguf(files["F32"])
    assert not is_gguf("gpt2")
    header = read_header(renamed)
    assert header.architecture == "llama"
    assert header.weights == sum(p.numel() for p in medhead.load_model(renamed, "cpu", "float32").parameters())


def test_a_folder_that_lacks_weights_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(files["F32"], tmp_path / "lacking")
    weights = tmp_path / "lacking" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(medhead.MedheadError, match=r"1 of its weights are missing \(model.layers.0.mlp"):
        medhead.load_model(tmp_path / "lacking", "cpu")


def test_every_cut_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    content = files["Q8_0.gguf"].read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 400, 7), *range(400, len(content) - 40, 1999), len(content) - 33]:
        cut.write_bytes(content[:length])
        with pytest.raises(medhead.MedheadError, match=r"truncated|is not a GGUF file"):
            medhead.load_tokenizer(cut)


def test_wrong_files_are_one_line(
    files: dict[str, Path],
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusal(name: str) -> str:
        assert main(["generate", "--model", name, "--prompt", "x", "--device", "cpu"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    write_gguf(tmp_path / "other.gguf", llama, tokenizer, architecture="plamo2")
    assert "plamo2" in refusal(str(tmp_path / "other.gguf"))
    write_gguf(tmp_path / "lacking.gguf", llama, tokenizer, without="model.layers.1.mlp.up_proj.weight")
    assert "weights are missing (model.layers.1.mlp.up_proj.weight)" in refusal(str(tmp_path / "lacking.gguf"))
    (tmp_path / "text.gguf").write_text("just text")
    assert "is not a GGUF file" in refusal(str(tmp_path / "text.gguf"))
    (tmp_path / "notes.txt").write_text("just text")
    assert "is a file, but not a GGUF file" in refusal(str(tmp_path / "notes.txt"))
    assert "does not exist" in refusal(str(tmp_path / "none.gguf"))
    content = files["F32.gguf"].read_bytes()
    (tmp_path / "old.gguf").write_bytes(content[:4] + b"\x01" + content[5:])
    assert "version 1" in refusal(str(tmp_path / "old.gguf"))
    monkeypatch.setattr(gguf_module, "find_spec", lambda name: None)
    assert "pip install 'medhead[gguf]'" in refusal(str(files["F32.gguf"]))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_stored_weights_are_those_of_the_file(
    kind: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The 8-bit integers of the file stay, in the order of the model's rows; the text is that of the dequantised file."""
    from medhead.model.block_weights import BlockLinear

    stored = medhead.load_model(files[f"{kind}.gguf"], "cpu", "float32", weights="stored")
    reference = medhead.load_model(files[f"{kind}.gguf"], "cpu", "float32")
    layers = {name: layer for name, layer in stored.named_modules() if isinstance(layer, BlockLinear)}
    assert len(layers) == 2 * 7 + 1
    for name, layer in layers.items():
        assert layer.kind == {"F32": "float32", "Q8_0": "int8"}[kind]
        assert torch.equal(layer.rows(), reference.get_submodule(name).weight)
    ids = torch.tensor([[5, 9, 3, 12, 7]])
    expected = reference.generate(ids, max_new_tokens=30, do_sample=False)
    with medhead.Decoder(stored, "ngram") as decoder:
        assert torch.equal(decoder.generate(ids, max_new_tokens=30, do_sample=False), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_integers_of_a_tensor(kind: str) -> None:
    """The blocks of every type are, row by row and bit for bit, what the package gguf dequantises from any bytes."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    from medhead.model.gguf_blocks import parse

    size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    stored = np.random.default_rng(0).integers(0, 256, (40, 3 * num_bytes), np.uint8)
    for place in {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0]}.get(kind, [0, 2]):  # finite scales and minimums
        stored[:, place + 1 :: num_bytes] &= 0xBF
    found = parse(kind, torch.from_numpy(stored), 3 * size)
    expected = torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType[kind]))
    assert torch.equal(found.weight(), expected)
    assert torch.equal(block_linear.rows(block_linear.from_levels(*found)), expected)
