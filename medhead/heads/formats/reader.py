"""Read a checkpoint of another project: tensors are taken one by one and checked by shape, and none may be left over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medhead.errors import MedheadError, one_line
from medhead.heads.base import Heads, HeadsConfig, build_heads
from medhead.heads.config import read_json
from medhead.heads.layers import Rotary
from medhead.model.target import Target

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MEDUSA_FILE = "medusa_lm_head.safetensors"
PICKLES = (".pt", ".bin", ".pth", ".ckpt", ".pkl")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALINGS = ("linear", "llama3", "yarn")  # rotary scalings whose angles do not depend on the length of the text


class CheckpointReader:
    """The configuration (`config.json`) and the tensors of a folder; a tensor is read when it is taken.

    Every method raises `MedheadError`, in one line that names the cause, where the checkpoint is damaged or does not fit.
    The folder holds `config.json` and safetensors; pickles are never opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / CONFIG_FILE)
        self._entries: dict[str, tuple[Any, str]] = {}  # open file and stored name of every tensor not yet taken
        for path in self._files():
            try:
                handle = safe_open(path, framework="pt")
                self._entries.update({name: (handle, name) for name in handle.keys()})  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise MedheadError(f"{path} is truncated or damaged ({one_line(error, 100)}); copy it again") from None

    def _files(self) -> list[Path]:
        for name in (MEDUSA_FILE, WEIGHTS_FILE):
            if (self.folder / name).is_file():
                return [self.folder / name]
        if (self.folder / INDEX_FILE).is_file():
            names = read_json(self.folder / INDEX_FILE).get("weight_map")
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
        return set(self._entries)

    def rename(self, old: str, new: str = "") -> None:
        """Replace a prefix of names."""
        renamed = ((new if name.startswith(old) else "") + name.removeprefix(old) for name in self._entries)
        self._entries = dict(zip(renamed, self._entries.values(), strict=True))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        if name not in self._entries:
            raise self.error(f"the tensor {name} is missing")
        handle, stored = self._entries[name]
        return tuple(handle.get_slice(stored).get_shape())

    def peek(self, name: str) -> Tensor:
        """Read a tensor that stays among the names."""
        handle, stored = self._entries[name]
        return handle.get_tensor(stored)

    def take(self, name: str, *shape: int, floating: bool = True) -> Tensor:
        """Read a tensor and remove it from the names."""
        given = self.shape(name)
        if given != shape:
            expected = f"expected {list(shape)} for this target and config.json"
            raise self.error(f"the tensor {name} is {list(given)}, {expected}")
        tensor = self.peek(name)
        self.drop(name)
        if floating and tensor.dtype not in FLOATS:
            raise self.error(f"the tensor {name} is stored as {tensor.dtype}; quantised heads are not supported")
        return tensor

    def take_token_ids(self, name: str, count: int, target: Target, offsets: bool = False) -> Tensor:
        """Read the token id of every row of an output matrix, `[count]` int64; `offsets` are token id minus row index."""
        token_ids = self.take(name, count, floating=False).long() + (torch.arange(count) if offsets else 0)
        if count == 0 or int(token_ids.min()) < 0 or int(token_ids.max()) >= target.vocab_size:
            raise self.error(f"the tensor {name} names tokens outside the vocabulary's {target.vocab_size}")
        if len(token_ids.unique()) < count:
            raise self.error(f"the tensor {name} names a token twice")
        return token_ids

    def drop(self, *names: str) -> None:
        """Ignore tensors."""
        for name in names:
            self._entries.pop(name, None)

    def load(
        self, config: HeadsConfig, stored_name: Callable[[str, HeadsConfig], str | None], given: dict[str, Tensor]
    ) -> Heads:
        """Return heads with this checkpoint's tensors, in the types they are stored in.

        `stored_name` is that of a `CheckpointFormat`; `given` are tensors, by the heads' names, that are taken already.
        """
        with torch.device("meta"):
            heads = build_heads(config)
        weights = dict(given)
        for name, tensor in heads.state_dict().items():
            if name not in given:
                weights[name] = self.take(stored_name(name, config) or name, *tensor.shape)
        if self._entries:
            raise self.error(
                f"the tensor {min(self._entries)} is not part of a checkpoint format that medhead supports "
                f"({len(self._entries)} such tensors)"
            )
        heads.load_state_dict(weights, assign=True)
        return heads

    # ---------------------------------------------------------------- configuration

    @property
    def architectures(self) -> list[str]:
        """Names of model classes in the configuration."""
        found = self.config.get("architectures")
        return [str(name) for name in found] if isinstance(found, list) else []

    def number(self, name: str, default: int | None = None) -> int:
        """Return a whole number of at least 1 from the configuration."""
        value = default if self.config.get(name) is None else self.config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{name} in config.json must be a whole number of at least 1, got {value!r}")
        return value

    def real(self, name: str, default: float | None) -> float:
        """Return a number above 0 from the configuration."""
        value = default if self.config.get(name) is None else self.config[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(f"{name} in config.json must be a number above 0, got {value!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return whether a switch of the configuration is on."""
        return bool(self.config.get(name))

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the configuration, empty if it is missing."""
        value = self.config.get(name) or {}
        if not isinstance(value, dict):
            raise self.error(f"{name} in config.json must hold names and values, got {value!r}")
        return value

    def target_layers(self, ids: Any, shift: int, target: Target) -> list[int]:
        """Return the layers of the target whose outputs are the feature: `ids`, each plus `shift`."""
        valid = isinstance(ids, list | tuple) and all(isinstance(id_, int) for id_ in ids) and ids
        if not valid or len(set(ids)) < len(ids) or not all(0 <= id_ + shift < target.layers for id_ in ids):
            raise self.error(
                f"the layer ids {ids!r} do not name distinct layers of {target.name}, which has {target.layers}"
            )
        return [id_ + shift for id_ in ids]

    def check_target(self, target: Target, **sizes: int) -> None:
        """Refuse a checkpoint whose configuration has another number under one of these names."""
        for name, of_target in sizes.items():
            value = self.config.get(name)
            if value is not None and value != of_target:
                here = f"{name} in config.json is {value}, {target.name} has {of_target}"
                raise self.error(f"was made for another model: {here}")

    def refuse(self, names: tuple[str, ...], subject: str, section: dict[str, Any] | None = None) -> None:
        """Refuse switches that are on, at the top level or in a section."""
        for name in names:
            if (self.config if section is None else section).get(name):
                raise self.error(f"{subject} not supported: config.json has {name}")

    def decoder_fields(self, head_dim: int | None, rope_theta: float | None = None) -> dict[str, Any]:
        """Return the fields of `HeadsConfig` that describe decoder layers.

        The arguments are used where `config.json` does not name them; a `head_dim` of None means hidden size / heads.
        """
        activation = self.config.get("hidden_act") or "silu"
        if activation != "silu":
            raise self.error(f"the activation {activation!r} is not supported, only silu")
        if "sliding_attention" in (self.config.get("layer_types") or ()):
            raise self.error("sliding-window attention is not supported: config.json has it in layer_types")
        heads = self.number("num_attention_heads")
        dim = self.number("head_dim", head_dim or max(1, self.number("hidden_size") // heads))
        return {
            "num_heads": heads,
            "num_kv_heads": self.number("num_key_value_heads", heads),
            "head_dim": dim,
            "inner_size": self.number("intermediate_size"),
            "rms_norm_eps": self.real("rms_norm_eps", 1e-6),
            **self._rope_fields(dim, rope_theta),
        }

    def _rope_fields(self, dim: int, default: float | None) -> dict[str, Any]:
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling`."""
        given = self.section("rope_parameters") or self.section("rope_scaling")
        given = given.get("full_attention", given)
        theta = given.get("rope_theta") or self.config.get("rope_theta") or default
        if not isinstance(theta, int | float) or theta <= 0:
            raise self.error(f"rope_theta in config.json must be a number above 0, got {theta!r}")
        if (given.get("partial_rotary_factor") or self.config.get("partial_rotary_factor") or 1) != 1:
            raise self.error("partial rotary positions are not supported: config.json has partial_rotary_factor")
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
            reason = one_line(f"{type(error).__name__} {error}", 100)
            raise self.error(f"the rotary scaling {scaling} in config.json cannot be used: {reason}") from None
        return {"rope_theta": float(theta), "rope_scaling": scaling, "max_position_embeddings": context}

    def error(self, what: str) -> MedheadError:
        """Return an error about this folder, in one line."""
        return MedheadError(f"heads in {str(self.folder)!r}: {what}")
