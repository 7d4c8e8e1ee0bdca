"""Options of a training run: one dataclass, filled from defaults, a YAML file and the command line, in that order."""

from __future__ import annotations

import argparse
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from medhead.errors import MedheadError
from medhead.heads import KINDS
from medhead.model.loading import DTYPES
from medhead_training.objective.losses import LOSSES

RECIPES = ("heads", "joint", "qlora")


def option(default: Any, group: str, text: str, **more: Any) -> Any:
    """A field that is also a command-line option."""
    made: dict[str, Any] = {"default_factory": list} if default == [] else {"default": default}
    return field(metadata={"group": group, "help": text, **more}, **made)


WHAT, HEADS, DATA, HOW, SAVE, LORA = "what to train", "heads", "data", "training", "saving and logging", "LoRA"


@dataclass
class TrainOptions:
    """Everything that decides what a run does. None means: chosen from the target."""

    model: str = option("", WHAT, "model folder or hub id of the target")
    data: list[str] = option([], WHAT, "training text: JSON lines (messages, prompt/answer, text), folders, or a hub data set",
                             nargs="+")  # fmt: skip
    output: str = option("", WHAT, "folder for checkpoints and the finished heads")
    recipe: str = option("heads", WHAT, "heads: frozen target, text stays the same; joint: LoRA on the target too; qlora: on a 4-bit target",
                         choices=RECIPES)  # fmt: skip
    kind: str = option("block", HEADS, "kind of heads")
    depth: int = option(8, HEADS, "tokens that the heads guess ahead")
    correction: str | None = option(None, HEADS, "none, parent or recurrent: what tells siblings' children apart",
                                    choices=("none", "parent", "recurrent"))  # fmt: skip
    blocks: int | None = option(
        None, HEADS, "layers of a block head (2), residual blocks of a Medusa head (1)", type=int
    )
    inner_size: int | None = option(None, HEADS, "width inside the heads (twice the hidden size)", type=int)
    correction_size: int | None = option(None, HEADS, "width of the correction (1.5 times the hidden size)", type=int)
    feature_layers: list[int] | None = option(None, HEADS, "layers of the target that attention and block heads read (three, or five, spread evenly)",
                                    type=int, nargs="+")  # fmt: skip
    causal: bool = option(True, HEADS, "a slot of a block sees only earlier slots")
    draft_vocab: int = option(
        -1,
        HEADS,
        "tokens that the heads may name; 0 for all, -1: as many as cover 99.8 %% of the answers, at most 32768",
    )
    init_from: str = option("", HEADS, "heads checkpoint to start from (same kind; its sizes are kept)")
    eval_data: list[str] = option([], DATA, "held-out text; a share of the data if not given", nargs="+")
    held_out: float = option(0.02, DATA, "share of the documents held out, at most 256")
    length: int = option(1024, DATA, "tokens of a row; several documents are packed into one")
    batch_size: int = option(8, DATA, "rows of a step on one device")
    accumulation: int = option(1, DATA, "steps whose gradients are added up before an update")
    epochs: int = option(4, HOW, "passes over the data")
    max_steps: int = option(0, HOW, "end after so many updates (0: after the epochs)")
    loss: str = option("soft", HOW, "hard, soft, kl, reverse_kl, js, tv, lk or hybrid_lk")
    decay: float = option(0.9, HOW, "weight of a depth relative to the one before")
    random_depth: bool = option(
        True, HOW, "unroll to a random depth, as often as the weights say, instead of weighting: less work"
    )
    share: float = option(0.5, HOW, "share of the possible anchors that a step trains at")
    optimizer: str = option("muon", HOW, "muon (matrices, AdamW for the rest) or adamw", choices=("muon", "adamw"))
    lr: float | None = option(
        None, HOW, "peak learning rate of matrices (0.02 for hidden size 256, less for larger ones)", type=float
    )
    adamw_lr: float | None = option(
        None, HOW, "peak learning rate of what AdamW updates (0.003 for hidden size 256)", type=float
    )
    warmup: float = option(0.02, HOW, "share of the steps in which the learning rate rises")
    clip: float = option(1.0, HOW, "largest norm of the gradient")
    seed: int = option(0, HOW, "of everything random")
    device: str = option("auto", HOW, "cpu, cuda, ... (CUDA if there is one)")
    dtype: str = option("auto", HOW, "type of the target: float32, bfloat16 or float16 (float32 on a CPU)",
                        choices=("auto", *DTYPES))  # fmt: skip
    gradient_checkpointing: bool = option(
        False, HOW, "recompute the target's layers in the backward pass (joint, qlora)"
    )
    trust_remote_code: bool = option(False, HOW, "run code that comes with the model")
    shard: bool = option(
        False, HOW, "spread the frozen target over the processes, for one that no single GPU can hold (recipe heads)"
    )
    lora_rank: int = option(32, LORA, "rank")
    lora_alpha: int = option(16, LORA, "scale times rank")
    lora_dropout: float = option(0.05, LORA, "dropout")
    lora_targets: list[str] = option([], LORA, "modules to adapt (all linear layers)", nargs="+")
    lora_lr: float = option(2e-4, LORA, "peak learning rate of the adapter")
    lora_warmup: float = option(0.1, LORA, "share of the steps before the adapter starts to learn")
    preserve: float = option(1.0, LORA, "weight of KL(target without adapter || with it) on the answers")
    save_steps: int = option(200, SAVE, "updates between checkpoints")
    log_steps: int = option(10, SAVE, "updates between log entries")
    eval_steps: int = option(0, SAVE, "updates between evaluations (0: as often as checkpoints)")
    save_dtype: str = option("bfloat16", SAVE, "type of the stored heads", choices=tuple(DTYPES))
    tensorboard: bool = option(True, SAVE, "write TensorBoard logs if it is installed")

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            MedheadError: names the option and its value.
        """
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise MedheadError(f"--{name} is missing: give it on the command line or in the --config file")
        above_zero = [
            "depth",
            "length",
            "batch_size",
            "accumulation",
            "epochs",
            "save_steps",
            "log_steps",
            "lora_rank",
            "lora_alpha",
        ]
        above_zero += [name for name in ("blocks", "inner_size", "correction_size") if getattr(self, name) is not None]
        rates = [name for name in ("lr", "adamw_lr", "lora_lr", "clip") if getattr(self, name) is not None]
        rules: list[tuple[str, bool, str]] = [(name, getattr(self, name) >= 1, "at least 1") for name in above_zero]
        rules += [(name, 0 <= getattr(self, name) < 1, "from 0 to below 1") for name in
                  ("held_out", "warmup", "lora_warmup", "lora_dropout")]  # fmt: skip
        rules += [(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1") for name in ("decay", "share")]
        rules += [(name, 0 < getattr(self, name) < math.inf, "above 0") for name in rates]
        rules += [(name, getattr(self, name) >= 0, "at least 0") for name in ("max_steps", "eval_steps", "preserve")]
        rules += [
            ("seed", 0 <= self.seed < 2**31, "from 0 to below 2**31"),
            ("draft_vocab", self.draft_vocab >= -1, "-1, 0 or a number of tokens"),
            ("kind", self.kind in KINDS, f"one of {', '.join(sorted(KINDS))}"),
            ("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
            ("length", self.length >= self.depth + 2, f"at least {self.depth + 2}, 2 more than --depth"),
        ]
        rules.append(("recipe", self.recipe == "heads" or not self.shard, "heads with --shard"))
        for entry in fields(self):
            if choices := entry.metadata.get("choices"):
                rules.append(
                    (entry.name, getattr(self, entry.name) in (None, *choices), f"one of {', '.join(choices)}")
                )
        for name, good, expected in rules:
            if not good:
                raise MedheadError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser every option of `TrainOptions`, without defaults, and `--config`."""
    parser.add_argument("--config", type=Path, help="YAML file with any of these options (names with _ instead of -)")
    groups: dict[str, Any] = {}
    for entry in fields(TrainOptions):
        more = {key: value for key, value in entry.metadata.items() if key not in ("group", "help")}
        group = entry.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        text, default = entry.metadata["help"], entry.default
        if default not in (MISSING, None, "", []):
            text += f" (default: {default})"
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif "type" not in more and isinstance(default, int | float):
            more["type"] = type(default)
        flag = f"--{entry.name.replace('_', '-')}"
        groups[group].add_argument(flag, dest=entry.name, default=argparse.SUPPRESS, help=text, **more)


def read_options(args: argparse.Namespace) -> TrainOptions:
    """Options from defaults, the YAML file and the command line.

    Raises:
        MedheadError: the file cannot be read, or it or the command line holds something wrong.
    """
    given = {name: value for name, value in vars(args).items() if name != "config"}
    from_file = {} if args.config is None else _read_yaml(args.config)
    options = TrainOptions(**(from_file | given))
    options.check()
    return options


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise MedheadError(f"--config {str(path)!r} cannot be read: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        raise MedheadError(f"--config {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise MedheadError(f"--config {str(path)!r} must hold option names and values, got a {type(found).__name__}")
    known = {entry.name: entry for entry in fields(TrainOptions)}
    result = {}
    for name, value in found.items():
        key = str(name).replace("-", "_")
        if key not in known:
            raise MedheadError(f"--config {str(path)!r} holds the unknown option {name!r}")
        result[key] = _checked(value, known[key], f"{path}: {name}")
    return result


def _checked(value: Any, entry: Any, where: str) -> Any:
    """The value if its type is the option's; one value stands for a list of it."""
    kind = entry.type.removesuffix(" | None")
    if value is None and kind != entry.type:
        return None
    item, many = (kind[5:-1], True) if kind.startswith("list[") else (kind, False)
    found = [_typed(one, item) for one in (value if many and isinstance(value, list) else [value])]
    if None in found:
        raise MedheadError(f"{where} must be {kind}, got {value!r}")
    return found if many else found[0]


def _typed(value: Any, kind: str) -> Any:
    """The value as `str`, `int`, `float` or `bool`; None if it is no such thing."""
    if kind == "float" and isinstance(value, int | str) and not isinstance(value, bool):  # YAML takes 2e-4 for text
        try:
            return float(value)
        except ValueError:
            return None
    return value if type(value).__name__ == kind else None
