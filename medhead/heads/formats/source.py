"""A foreign checkpoint as a source of named tensors: taken one by one, checked by shape, nothing left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads.base import Heads, HeadsConfig, build_heads
from medhead.heads.layers import Rotary

if TYPE_CHECKING:
    from medhead.model.target import Target

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MEDUSA_FILE = "medusa_lm_head.safetensors"
PICKLES = (".pt", ".bin", ".pth", ".ckpt", ".pkl")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALINGS = ("linear", "llama3", "yarn")  # rotary scalings whose angles do not depend on the length of the text


class Source:
    """Configuration and tensors of a folder. Tensors are read when they are taken.

    Args:
        folder: holds `config.json` and safetensors; pickles are never opened.

    Raises:
        MedheadError: a file is missing, damaged, or a pickle.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_json(folder / CONFIG_FILE)
        self._where: dict[str, tuple[Any, str]] = {}  # open file and stored name of every tensor not yet taken
        for path in self._files():
            try:
                handle = safe_open(path, framework="pt")
                self._where.update({name: (handle, name) for name in handle.keys()})  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                reason = " ".join(str(error).split())[:100]
                raise MedheadError(f"{path} is truncated or damaged ({reason}); copy it again") from None

    def _files(self) -> list[Path]:
        for name in (MEDUSA_FILE, WEIGHTS_FILE):
            if (self.folder / name).is_file():
                return [self.folder / name]
        if (self.folder / INDEX_FILE).is_file():
            names = _read_json(self.folder / INDEX_FILE).get("weight_map")
            if not isinstance(names, dict) or any(Path(str(name)).name != name for name in names.values()):
                raise self.error(f"{INDEX_FILE} names no files of this folder")
            return [self.folder / name for name in sorted(set(names.values()))]
        pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise self.error(
                f"holds its weights as {pickles[0]}, a pickle, which can run code when it is opened: convert it to "
                f"safetensors (torch.load(..., weights_only=True), then safetensors.torch.save_file)"
            )
        raise self.error(f"holds no {WEIGHTS_FILE} and no {MEDUSA_FILE}")

    # ---------------------------------------------------------------- tensors

    @property
    def names(self) -> set[str]:
        """Names of the tensors not yet taken."""
        return set(self._where)

    def rename(self, old: str, new: str = "") -> None:
        """Replace a beginning of names."""
        self._where = {
            new + name.removeprefix(old) if name.startswith(old) else name: at for name, at in self._where.items()
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            MedheadError: there is none of that name.
        """
        if name not in self._where:
            raise self.error(f"the tensor {name} is missing")
        handle, stored = self._where[name]
        return tuple(handle.get_slice(stored).get_shape())

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name, of floating point.

        Raises:
            MedheadError: it is missing, quantised, or of another shape.
        """
        found = self.take_any(name, shape)
        if found.dtype not in FLOATS:
            raise self.error(f"the tensor {name} is stored as {found.dtype}; quantised heads are not supported")
        return found

    def take_any(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """The tensor of that name, of any type and one of these shapes.

        Raises:
            MedheadError: it is missing or of another shape.
        """
        given = self.shape(name)
        if given not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise self.error(f"the tensor {name} is {list(given)}, expected {expected} for this target and config.json")
        handle, stored = self._where.pop(name)
        return handle.get_tensor(stored)

    def drop(self, *names: str) -> None:
        """Tensors that do not matter."""
        for name in names:
            self._where.pop(name, None)

    def finish(self) -> None:
        """Refuse tensors that nothing asked for.

        Raises:
            MedheadError: names one.
        """
        if self._where:
            first = min(self._where)
            raise self.error(
                f"the tensor {first} is not part of a layout that medhead supports ({len(self._where)} such tensors)"
            )

    # ---------------------------------------------------------------- configuration

    @property
    def architectures(self) -> list[str]:
        """Names of model classes in the configuration."""
        found = self.config.get("architectures")
        return [str(name) for name in found] if isinstance(found, list) else []

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1 from the configuration.

        Raises:
            MedheadError: it is missing or something else.
        """
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{name} in config.json must be a whole number of at least 1, got {value!r}")
        return value

    def real(self, name: str, default: float) -> float:
        """A number above 0 from the configuration.

        Raises:
            MedheadError: it is something else.
        """
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(f"{name} in config.json must be a number above 0, got {value!r}")
        return float(value)

    def section(self, name: str) -> dict[str, Any]:
        """A part of the configuration, empty if it is missing.

        Raises:
            MedheadError: it is no mapping.
        """
        value = self.config.get(name) or {}
        if not isinstance(value, dict):
            raise self.error(f"{name} in config.json must hold names and values, got {value!r}")
        return value

    def layers(self, value: Any, shift: int, target: Target) -> list[int]:
        """Layers of the target whose outputs are the feature.

        Args:
            value: the ids.
            shift: what to add to an id to get the layer whose output it means.
            target: the target.

        Raises:
            MedheadError: they name no layers of the target, or one twice.
        """
        good = isinstance(value, list | tuple) and all(isinstance(id_, int) for id_ in value) and value
        if not good or len(set(value)) < len(value) or not all(0 <= id_ + shift < target.layers for id_ in value):
            raise self.error(
                f"the layer ids {value!r} do not name distinct layers of {target.name}, which has {target.layers}"
            )
        return [id_ + shift for id_ in value]

    def same(self, name: str, of_target: int, target: Target) -> None:
        """Refuse a configuration of another model.

        Raises:
            MedheadError: the number under that name is not the target's.
        """
        value = self.config.get(name)
        if value is not None and value != of_target:
            raise self.error(
                f"was made for another model: {name} in config.json is {value}, {target.name} has {of_target}"
            )

    def refuse(self, names: tuple[str, ...], what: str, where: dict[str, Any] | None = None) -> None:
        """Refuse switches that are on.

        Raises:
            MedheadError: names the first.
        """
        for name in names:
            if (self.config if where is None else where).get(name):
                raise self.error(f"{what} not supported: config.json has {name}")

    def transformer(self) -> None:
        """Refuse what no attention layer of medhead computes.

        Raises:
            MedheadError: names it.
        """
        activation = self.config.get("hidden_act") or "silu"
        if activation != "silu":
            raise self.error(f"the activation {activation!r} is not supported, only silu")
        if "sliding_attention" in (self.config.get("layer_types") or ()):
            raise self.error(
                "layers with sliding-window attention are not supported: config.json has layer_types with them"
            )

    def rope(self, dim: int, default: float | None = None) -> dict[str, Any]:
        """Fields of `HeadsConfig` for rotary positions, from `rope_parameters`, or `rope_theta` and `rope_scaling`.

        Raises:
            MedheadError: there is no base, or the scaling is not supported.
        """
        given = self.section("rope_parameters") or self.section("rope_scaling")
        given = given.get("full_attention", given)
        theta = given.get("rope_theta") or self.config.get("rope_theta") or default
        if not isinstance(theta, int | float) or theta <= 0:
            raise self.error(f"rope_theta in config.json must be a number above 0, got {theta!r}")
        if (given.get("partial_rotary_factor") or self.config.get("partial_rotary_factor") or 1) != 1:
            raise self.error(
                "rotary positions of a part of each head are not supported: config.json has partial_rotary_factor"
            )
        kind = given.get("rope_type") or given.get("type") or "default"
        scaling = None
        if kind in SCALINGS:
            scaling = {name: value for name, value in given.items() if name not in ("rope_theta", "type")}
            scaling["rope_type"] = kind
        elif kind not in ("default", "mrope"):  # for text alone mrope is the default
            raise self.error(f"the rotary scaling {kind!r} is not supported; supported: {', '.join(SCALINGS)}")
        context = self.number("max_position_embeddings", 2048)
        try:
            Rotary(dim, float(theta), scaling, context)(torch.zeros(1, 1, dim), torch.zeros(1, dtype=torch.long), 1)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())[:100]
            raise self.error(f"the rotary scaling {scaling} in config.json cannot be used: {reason}") from None
        return {"rope_theta": float(theta), "rope_scaling": scaling, "context": context}

    def error(self, what: str) -> MedheadError:
        """An error about this folder, in one line."""
        return MedheadError(f"heads in {str(self.folder)!r}: {what}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise MedheadError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise MedheadError(f"{path} must hold names and values, got a {type(found).__name__}")
    return found


def heads_config(target: Target, kind: str, **fields: Any) -> HeadsConfig:
    """A configuration that fits the target."""
    return HeadsConfig(
        kind=kind,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_layers=target.layers,
        target_type=str(getattr(target.config, "model_type", "")),
        **fields,
    )


def fill(config: HeadsConfig, weights: dict[str, Tensor]) -> Heads:
    """Heads with these weights, which are not copied."""
    with torch.device("meta"):
        heads = build_heads(config)
    heads.load_state_dict(weights, assign=True)
    return heads


def check_draft_tokens(source: Source, name: str, tokens: Tensor, target: Target) -> Tensor:
    """Token ids that a draft vocabulary means, `[draft_vocab]` int64.

    Raises:
        MedheadError: the tensor of that name holds no distinct tokens of the target.
    """
    tokens = tokens.long()
    if len(tokens) == 0 or int(tokens.min()) < 0 or int(tokens.max()) >= target.vocab_size:
        raise source.error(f"the tensor {name} names tokens outside the vocabulary's {target.vocab_size}")
    if len(tokens.unique()) < len(tokens):
        raise source.error(f"the tensor {name} names a token twice")
    return tokens
