"""The configuration of heads: everything needed to build them again and to tell whether they fit a target."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medhead.errors import MedheadError, one_line

CONFIG_FILE = "medhead_config.json"
CORRECTIONS = ("none", "parent", "recurrent")
_POSITIVE = ("depth", "hidden_size", "vocab_size", "inner_size", "num_layers", "tree_size", "tree_width", "tree_branching",
             "correction_size", "num_heads", "num_kv_heads", "head_dim")  # fmt: skip


@dataclass
class HeadsConfig:
    """Configuration of heads, one class for all kinds; fields that a kind does not use keep their defaults."""

    kind: str  # registered name of the kind
    depth: int  # number of tokens that the heads predict after the target's own next token
    hidden_size: int  # of the target
    vocab_size: int  # rows of the target's output matrix
    num_target_layers: int  # layers of the target, to recognise heads of another model
    target_type: str = ""  # `model_type` of the target's configuration
    inner_size: int = 384  # width of cell (recurrent), state (sequential), MLP (attention, block), correction (medusa)
    num_layers: int = 1  # residual blocks of each Medusa head, layers of a block head
    correction: str = "none"  # what makes the children of siblings differ in a parallel kind: none, parent or recurrent
    correction_size: int = 256  # width of a block head's correction
    feature_layers: list[int] = field(default_factory=list)  # target layers to fuse; empty: last hidden state
    num_heads: int = 4  # query heads of attention
    num_kv_heads: int = 2  # key and value heads of attention
    head_dim: int = 64  # size of an attention head
    rope_theta: float = 10000.0  # base of the rotary positions
    rope_scaling: dict[str, Any] | None = None  # an entry as in transformers' configurations
    max_position_embeddings: int = 0  # the context length that `rope_scaling` refers to; 0 without scaling
    rms_norm_eps: float = 1e-6
    causal: bool = True  # whether a slot of a block sees only earlier slots
    root_slot_predicts: bool = (
        True  # whether a block's slot 0 predicts the root's children (DSpark), or slot 1 (DFlash)
    )
    mask_token_id: int = -1  # a block's masks are the target's embedding of this token (DFlash); learnt vectors if -1
    draft_hidden_size: int = 0  # width of the layer of attention heads; 0 for the target's hidden size
    norm_before_residual: bool = False  # the residual stream of attention heads is the normed feature
    tie_weights: bool = False  # all depths share weights (sequential) or their own output matrix (medusa)
    scale_input: bool = False  # normalise the first state (sequential)
    own_embedding: bool = False  # the heads bring an embedding of their own (loaded checkpoints)
    own_output: bool = False  # the heads bring an output matrix of their own (loaded checkpoints)
    # measured on held-out text: accuracies[d][r] is the share of positions at which the rank-r draft token of depth d+1 was
    # right, given that the path to it was
    accuracies: list[list[float]] = field(default_factory=list)
    trees: dict[str, list[list[int]]] = field(default_factory=dict)  # best static trees (paths of ranks) by node count
    tree_size: int = 16  # nodes of the tree that decodes fastest with these heads on the machine that measured it
    tree_depth: int = 0  # maximum depth of a tree of that size; `depth` if 0
    tree_width: int = 4  # nodes of a frontier while a tree grows
    tree_branching: int = 4  # candidates of every frontier node
    # the heads propose only this many tokens, the most frequent ones of their training text (FR-Spec, Zhao et al. 2025); 0
    # means all. The target still verifies with its whole vocabulary.
    draft_vocab_size: int = 0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise MedheadError(f"{name} of the heads must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.draft_vocab_size <= self.vocab_size:
            raise MedheadError(
                f"draft_vocab_size must be from 0 to vocab_size {self.vocab_size}, got {self.draft_vocab_size!r}"
            )
        if not 0 <= self.tree_depth <= self.depth:
            raise MedheadError(f"tree_depth must be from 0 to the heads' depth {self.depth}, got {self.tree_depth!r}")
        if self.correction not in CORRECTIONS:
            raise MedheadError(f"correction must be one of {', '.join(CORRECTIONS)}, got {self.correction!r}")
        layers = self.feature_layers
        bad = [layer for layer in layers if not isinstance(layer, int) or not 0 <= layer < self.num_target_layers]
        if bad:
            raise MedheadError(
                f"feature_layers must be layers of the target from 0 to {self.num_target_layers - 1}, got {bad[0]!r} in {layers}"
            )
        if len(set(layers)) < len(layers):
            raise MedheadError(f"feature_layers must be distinct, got {layers}")

    @property
    def label(self) -> str:
        """Kind and correction, for tables."""
        return self.kind if self.correction == "none" else f"{self.kind} + {self.correction}"


def read_config(folder: str | Path) -> HeadsConfig:
    """Return the configuration of the heads in a folder; raise `MedheadError` where it is missing or wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MedheadError(f"heads folder {str(folder)!r} does not exist")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise MedheadError(f"{str(folder)!r} holds no {CONFIG_FILE}; it is not a heads checkpoint of medhead")
    try:
        return HeadsConfig(**read_json(path))
    except TypeError as error:
        raise MedheadError(f"{path} cannot be read: {error}") from None


def fitting_config(target: Any, kind: str, **fields: Any) -> HeadsConfig:
    """Return a configuration with the target's sizes."""
    return HeadsConfig(
        kind=kind,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_target_layers=target.layers,
        target_type=str(getattr(target.config, "model_type", "")),
        **fields,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds names and values; anything else is a `MedheadError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise MedheadError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise MedheadError(f"{path} must hold names and values, got a {type(content).__name__}")
    return content


def check_fit(config: HeadsConfig, target: Any, folder: str | Path) -> None:
    """Refuse heads of a model with another hidden size, vocabulary size or number of layers."""
    for name, of_heads, of_target in (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("vocabulary size", config.vocab_size, target.vocab_size),
        ("number of layers", config.num_target_layers, target.layers),
    ):
        if of_heads != of_target:
            raise MedheadError(
                f"the heads in {str(folder)!r} were trained for another model: their {name} is {of_heads}, "
                f"{target.name} has {of_target}; train heads for this model or give the right folder"
            )
