"""The folder of a training run, and the checks that a run started again is the same run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from medhead.errors import MedheadError
from medhead_training.data.token_store import TokenStore
from medhead_training.trainer.options import TrainOptions
from medhead_training.trainer.trainer import last_checkpoint

OPTIONS_FILE, DATA_FILE, FACTS_FILE = "options.json", "data.json", "training.json"
CHANGEABLE = frozenset((
    "output", "device", "save_steps", "logging_steps", "eval_steps", "tensorboard", "lr", "adamw_lr", "lora_lr",
    "max_grad_norm",
))  # fmt: skip


def claim_folder(options: TrainOptions, main: bool = True) -> Path:
    """Return the run's folder, which is new or belongs to the same run; only the `main` process writes.

    The options in `CHANGEABLE` may always change, the others until the first checkpoint.
    """
    output, folder = Path(options.output), Path(options.output) / "run"
    record, temporary = folder / OPTIONS_FILE, folder / f".{OPTIONS_FILE}"
    now = json.loads(json.dumps(asdict(options)))
    if output.exists() and not output.is_dir():
        raise MedheadError(f"--output {options.output!r} is a file; give a folder")
    if record.exists():
        try:
            before = dict(json.loads(record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise MedheadError(f"{str(record)!r} cannot be read; give another --output") from None
        changed = sorted(name for name in now if name not in CHANGEABLE and before.get(name) != now[name])
        if changed and (last_checkpoint(folder) is not None or (output / FACTS_FILE).exists()):
            name = changed[0]
            raise MedheadError(
                f"--output {options.output!r} holds a run with other options: {name} was {before.get(name)!r}, now "
                f"{now[name]!r}; give the same options to resume it, or another folder"
            )
    elif output.is_dir() and not set(output.rglob("*")) <= {folder, temporary}:
        raise MedheadError(f"--output {options.output!r} holds something else; give a new or empty folder")
    if not main:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        temporary.replace(record)
    except OSError as error:
        raise MedheadError(f"--output {options.output!r} cannot be written: {error.strerror or error}") from None
    return folder


def check_same_data(folder: Path, stores: list[TokenStore], main: bool = True) -> None:
    """Refuse to resume with other data than the run started with; `main` is that of `claim_folder`."""
    record = folder / DATA_FILE
    now = [[store.documents, store.tokens, store.assistant_tokens] for store in stores]
    resumes = record.exists() and last_checkpoint(folder) is not None
    if resumes and (before := json.loads(record.read_text(encoding="utf-8"))) != now:
        raise MedheadError(
            f"the data is not what this run started with: documents, tokens and tokens to predict were {before}, now {now}; "
            "give the same data to resume it, or another --output"
        )
    if main:
        record.write_text(json.dumps(now) + "\n", encoding="utf-8")
