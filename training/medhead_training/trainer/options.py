"""Options of a training run: one dataclass, filled from defaults, a YAML file and the command line, in that order."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from medhead.errors import MedheadError
from medhead.heads import KINDS
from medhead.model.loading import DTYPES
from medhead_training.objective.losses import LOSSES

Rule = tuple[str, Callable[[Any], bool]]  # what is allowed, in words and as a check; None always passes
COUNT: Rule = ("at least 1", lambda value: value >= 1)
NOT_NEGATIVE: Rule = ("at least 0", lambda value: value >= 0)
POSITIVE: Rule = ("above 0", lambda value: 0 < value < math.inf)
FRACTION: Rule = ("from 0 to below 1", lambda value: 0 <= value < 1)
POSITIVE_FRACTION: Rule = ("above 0 and at most 1", lambda value: 0 < value <= 1)
SEED: Rule = ("from 0 to below 2**31", lambda value: 0 <= value < 2**31)
MASK_TOKEN: Rule = ("-1 or a token id", lambda value: value >= -1)
DRAFT_VOCAB: Rule = ("-1, 0 or a number of tokens", lambda value: value >= -1)


def one_of(names: Iterable[str]) -> Rule:
    """Return the rule that allows these names."""
    allowed = tuple(names)
    return f"one of {', '.join(allowed)}", lambda value: value in allowed


def option(default: Any, group: str, text: str, rule: Rule | None = None, **more: Any) -> Any:
    """Return a field that is also a command-line option; `more` goes to argparse."""
    if rule is None and "choices" in more:
        rule = one_of(more["choices"])
    made: dict[str, Any] = {"default_factory": list} if default == [] else {"default": default}
    return field(metadata={"group": group, "help": text, "rule": rule, "argparse": more}, **made)


RUN, HEADS, DATA, TRAINING, LORA, SAVING = "run", "heads", "data", "training", "LoRA", "saving and logging"


@dataclass
class TrainOptions:
    """Everything that determines a run. None means that the value is derived from the target and the amount of text."""

    # fmt: off
    model: str = option("", RUN, "model folder, hub id, GGUF file, or smollm2: the target")
    data: list[str] = option([], RUN, "training text: JSON lines (messages, prompt and answer, or text), folders of them, or a Hugging Face dataset", nargs="+")
    output: str = option("", RUN, "folder for checkpoints and the finished heads")
    recipe: str = option("heads", RUN, "heads: frozen target, its text does not change; joint: LoRA on the target too; qlora: LoRA on a 4-bit target", choices=("heads", "joint", "qlora"))
    kind: str | None = option(None, HEADS, f"kind of heads: {', '.join(sorted(KINDS))} (attention for less than 20,000 answer tokens, else recurrent; or that of --init-from)", one_of(sorted(KINDS)))
    depth: int = option(8, HEADS, "tokens that the heads draft ahead", COUNT)
    correction: str | None = option(None, HEADS, "how a draft token conditions the next ones: none, parent or recurrent", choices=("none", "parent", "recurrent"))
    blocks: int | None = option(None, HEADS, "layers of block heads (2), residual blocks of Medusa heads (1)", COUNT, type=int)
    inner_size: int | None = option(None, HEADS, "width inside the heads (twice the hidden size)", COUNT, type=int)
    correction_size: int | None = option(None, HEADS, "width of the correction (1.5 times the hidden size)", COUNT, type=int)
    feature_layers: list[int] | None = option(None, HEADS, "layers of the target that attention and block heads read (3, or 5, evenly spaced)", type=int, nargs="+")
    causal: bool = option(True, HEADS, "each slot of block heads attends to earlier slots only")
    mask_token: int = option(-1, HEADS, "id of the token whose embedding masks the slots of block heads after the root, which itself predicts nothing, as dflash checkpoints need it; -1: learnt masks", MASK_TOKEN)
    draft_vocab: int = option(-1, HEADS, "size of the draft vocabulary; 0: all tokens, -1: as many as cover 99.8 %% of the answers, from 8192 to 32768", DRAFT_VOCAB)
    init_from: str = option("", HEADS, "heads checkpoint to start from (same kind; its sizes are kept)")
    eval_data: list[str] = option([], DATA, "held-out text (a part of the data if not given)", nargs="+")
    held_out: float | None = option(None, DATA, "fraction of the documents that is held out, at most 256 documents (0.02, but 12 documents or a tenth of fewer than 120)", FRACTION, type=float)
    learn_from: str = option("auto", DATA, "answers: learn to predict the assistant's tokens; all: prompts, too (not with the loss hard); auto: all for less than 500,000 answer tokens", choices=("auto", "answers", "all"))
    seq_len: int | None = option(None, DATA, "tokens of a row; several documents are packed into one (1024; 256 or 512 for little text)", COUNT, type=int)
    batch_size: int | None = option(None, DATA, "rows per device and step (1 to 8, so that there are at least 400 updates)", COUNT, type=int)
    gradient_accumulation_steps: int = option(1, DATA, "steps whose gradients are summed before an update", COUNT)
    epochs: int | None = option(None, TRAINING, "passes over the data (3 to 24: about 4 million tokens in all)", COUNT, type=int)
    patience: int = option(5, TRAINING, "stop after so many evaluations without a larger held-out accepted length; the heads of the best evaluation are kept; 0: train to the end and keep the last (as recipes joint and qlora do)", NOT_NEGATIVE)
    max_steps: int = option(0, TRAINING, "maximum number of updates, which never adds to those of --epochs (0: until the epochs end)", NOT_NEGATIVE)
    loss: str = option("soft", TRAINING, "hard, soft, kl, reverse_kl, js, tv, lk or hybrid_lk", one_of(LOSSES))
    depth_decay: float = option(0.9, TRAINING, "weight of a depth relative to the one before", POSITIVE_FRACTION)
    random_depth: bool = option(True, TRAINING, "unroll to a random depth with these weights as probabilities, which is faster than weighting all depths")
    anchor_fraction: float = option(0.5, TRAINING, "fraction of the possible anchors that a step trains at", POSITIVE_FRACTION)
    optimizer: str = option("muon", TRAINING, "muon (for matrices, AdamW for the rest) or adamw", choices=("muon", "adamw"))
    lr: float | None = option(None, TRAINING, "peak learning rate of Muon (0.02 for hidden size 256, less for larger ones)", POSITIVE, type=float)
    adamw_lr: float | None = option(None, TRAINING, "peak learning rate of AdamW (0.003 for hidden size 256, less for larger ones)", POSITIVE, type=float)
    weight_decay: float | None = option(None, TRAINING, "weight decay of Muon (0.01; 0.1 for less than 500,000 answer tokens)", NOT_NEGATIVE, type=float)
    warmup_ratio: float = option(0.02, TRAINING, "fraction of the steps in which the learning rate rises", FRACTION)
    max_grad_norm: float = option(1.0, TRAINING, "norm to which gradients are clipped", POSITIVE)
    seed: int = option(0, TRAINING, "seed of everything random", SEED)
    device: str = option("auto", TRAINING, "cpu, cuda, ... (CUDA if there is one)")
    dtype: str = option("auto", TRAINING, "dtype of the target: float32, bfloat16 or float16 (float32 on a CPU)", choices=("auto", *DTYPES))
    features: str = option("auto", TRAINING, "keep: run a frozen target over the text once and keep what heads and loss need of it in the run folder until the heads are finished; recompute: run the target in every step; auto: keep in one process if there is more than 1 epoch and the disk has twice the room", choices=("auto", "keep", "recompute"))
    feature_dtype: str = option("bfloat16", TRAINING, "dtype of what is kept of the target", choices=("bfloat16", "float32"))
    gradient_checkpointing: bool = option(False, TRAINING, "recompute the target's layers in the backward pass (joint, qlora)")
    trust_remote_code: bool = option(False, TRAINING, "run Python code that comes with the model")
    shard: bool = option(False, TRAINING, "shard the frozen target over the processes, if it does not fit one GPU (recipe heads)")
    lora_rank: int = option(32, LORA, "rank", COUNT)
    lora_alpha: int = option(16, LORA, "scale times rank", COUNT)
    lora_dropout: float = option(0.05, LORA, "dropout", FRACTION)
    lora_targets: list[str] = option([], LORA, "modules to adapt (all linear layers)", nargs="+")
    lora_lr: float = option(2e-4, LORA, "peak learning rate of the adapter", POSITIVE)
    lora_start_ratio: float = option(0.1, LORA, "fraction of the steps before the adapter starts to learn", FRACTION)
    preservation_weight: float = option(1.0, LORA, "weight of KL(target without adapter || with it) on the answers", NOT_NEGATIVE)
    save_steps: int = option(200, SAVING, "updates between checkpoints", COUNT)
    logging_steps: int = option(10, SAVING, "updates between log entries", COUNT)
    eval_steps: int = option(0, SAVING, "updates between evaluations (0: 12 evaluations, or as often as checkpoints)", NOT_NEGATIVE)
    save_dtype: str = option("bfloat16", SAVING, "dtype of the stored heads", choices=tuple(DTYPES))
    tensorboard: bool = option(True, SAVING, "write TensorBoard logs if it is installed")
    # fmt: on

    def check(self) -> None:
        """Raise a `MedheadError` that names the first option whose value is not allowed."""
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise MedheadError(f"--{name} is missing: give it on the command line or in the --config file")
        for entry in fields(self):
            value, rule = getattr(self, entry.name), entry.metadata["rule"]
            if rule is not None and value is not None and not rule[1](value):
                raise _not_allowed(entry.name, value, rule[0])
        if self.learn_from == "all" and self.loss == "hard":
            raise _not_allowed("learn_from", self.learn_from, "answers with --loss hard")
        if self.seq_len is not None and self.seq_len < self.depth + 2:
            raise _not_allowed("seq_len", self.seq_len, f"at least {self.depth + 2}, 2 more than --depth")
        if self.shard and self.recipe != "heads":
            raise _not_allowed("recipe", self.recipe, "heads with --shard")
        if self.features == "keep" and (self.shard or self.recipe != "heads"):
            raise _not_allowed(
                "features", self.features, "auto or recompute with --shard and with a target that is trained"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _not_allowed(name: str, value: Any, allowed: str) -> MedheadError:
    return MedheadError(f"{_flag(name)} must be {allowed}, got {value!r}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of `TrainOptions`, without defaults, and `--config` to a parser."""
    parser.add_argument("--config", type=Path, help="YAML file with any of these options (names with _ instead of -)")
    groups: dict[str, Any] = {}
    for entry in fields(TrainOptions):
        more, group = dict(entry.metadata["argparse"]), entry.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        text, default = entry.metadata["help"], entry.default
        if default not in (MISSING, None, "", []):
            text += f" (default: {default})"
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif "type" not in more and isinstance(default, int | float):
            more["type"] = type(default)
        groups[group].add_argument(_flag(entry.name), dest=entry.name, default=argparse.SUPPRESS, help=text, **more)


def read_options(args: argparse.Namespace) -> TrainOptions:
    """Return the options from defaults, the YAML file and the command line."""
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
    types = {entry.name: str(entry.type) for entry in fields(TrainOptions)}
    result = {}
    for name, value in found.items():
        key = str(name).replace("-", "_")
        if key not in types:
            raise MedheadError(f"--config {str(path)!r} holds the unknown option {name!r}")
        result[key] = _convert(value, types[key], f"{path}: {name}")
    return result


def _convert(value: Any, annotation: str, where: str) -> Any:
    """Return the value if it has the option's type; a single value stands for a list of one."""
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    item, is_list = (kind[5:-1], True) if kind.startswith("list[") else (kind, False)
    found = [_convert_item(one, item) for one in (value if is_list and isinstance(value, list) else [value])]
    if None in found:
        raise MedheadError(f"{where} must be {kind}, got {value!r}")
    return found if is_list else found[0]


def _convert_item(value: Any, kind: str) -> Any:
    """Return the value as `str`, `int`, `float` or `bool`, or None if it is not of this type."""
    if kind == "float" and isinstance(value, int | str) and not isinstance(value, bool):  # YAML reads 2e-4 as text
        try:
            return float(value)
        except ValueError:
            return None
    return value if type(value).__name__ == kind else None
