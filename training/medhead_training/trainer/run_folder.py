"""The folder of a training run: whose it is, and whether a run that is started again is still the same run."""

from __future__ import annotations

import json
from pathlib import Path

from medhead.errors import MedheadError
from medhead_training.data.feature_store import TokenStore
from medhead_training.trainer.options import TrainOptions
from medhead_training.trainer.trainer import last_checkpoint

OPTIONS_FILE, DATA_FILE, FACTS_FILE = "options.json", "data.json", "training.json"
FREE = ("output", "device", "save_steps", "log_steps", "eval_steps", "tensorboard", "lr", "adamw_lr", "lora_lr", "clip")


def claim(options: TrainOptions, main: bool = True) -> Path:
    """The run's folder: a new one, or that of the same run. Nothing else is ever written into.

    Args:
        options: of the run.
        main: whether this process writes; others only read what the first one has written.

    Options may change as long as there is nothing that was trained with them; those in `FREE` always.

    Raises:
        MedheadError: the output folder holds something else, or a run with other options.
    """
    output, folder = Path(options.output), Path(options.output) / "run"
    record, new = folder / OPTIONS_FILE, folder / f".{OPTIONS_FILE}"
    now = json.loads(json.dumps(options.to_dict()))
    if output.exists() and not output.is_dir():
        raise MedheadError(f"--output {options.output!r} is a file; give a folder")
    if record.exists():
        try:
            before = dict(json.loads(record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise MedheadError(f"{str(record)!r} cannot be read; give another --output") from None
        other = sorted(name for name in now if name not in FREE and before.get(name) != now[name])
        if other and (last_checkpoint(folder) is not None or (output / FACTS_FILE).exists()):
            name = other[0]
            raise MedheadError(
                f"--output {options.output!r} holds a run with other options: {name} was {before.get(name)!r}, now "
                f"{now[name]!r}; give the same options to go on, or another folder"
            )
    elif output.is_dir() and not set(output.rglob("*")) <= {folder, new}:
        raise MedheadError(f"--output {options.output!r} holds something else; give a new or empty folder")
    if not main:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        new.replace(record)
    except OSError as error:
        raise MedheadError(f"--output {options.output!r} cannot be written: {error.strerror or error}") from None
    return folder


def same_data(folder: Path, stores: list[TokenStore], main: bool = True) -> None:
    """Refuse to go on with other data than the run began with. `main` is that of `claim`.

    Raises:
        MedheadError: the numbers of documents or tokens are not those of the run.
    """
    record = folder / DATA_FILE
    now = [[store.documents, store.tokens, store.assistant_tokens] for store in stores]
    if record.exists() and last_checkpoint(folder) is not None:
        before = json.loads(record.read_text(encoding="utf-8"))
        if before != now:
            raise MedheadError(
                f"the data is not what this run began with: documents, tokens and tokens to guess were {before}, now {now}; "
                "give the same data to go on, or another --output"
            )
    if main:
        record.write_text(json.dumps(now) + "\n", encoding="utf-8")
