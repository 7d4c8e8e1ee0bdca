"""`medhead generate ...`, `medhead bench ...` and the training commands: the console script."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {  # name: module with a `main`, what it does
    "generate": ("medhead.generate", "answer a prompt in the terminal"),
    "chat": ("medhead_app.command", "open the chat page, and an OpenAI-compatible API beside it"),
    "bench": ("medhead.bench", "measure against plain decoding and transformers"),
    "bench-tasks": ("medhead.bench.tasks", "measure every proposer on every kind of task"),
    "tune": ("medhead.tune", "find the fastest tree for some heads on this machine"),
    "datastore": ("medhead.cli.datastore", "make text of your own searchable for the proposer ngram"),
    "finetune": ("medhead_training.finetune", "train heads for a model of your own"),
    "generate-data": ("medhead_training.generate_data", "let a model write the text its heads are trained on"),
    "evaluate": ("medhead_training.evaluate", "accepted length of heads by tree size on real decoding"),
    "export": ("medhead_training.export", "write heads in the checkpoint format of a serving engine"),
}


def usage() -> str:
    """What the console script says of itself."""
    lines = "\n".join(f"  {name:14s}{text}" for name, (_, text) in COMMANDS.items())
    return f"usage: medhead COMMAND [options]\n\n{lines}\n\n`medhead generate --help` tells more.\n"


def _extra(command: str) -> str:
    return "app" if command == "chat" else "train"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in COMMANDS:
        try:
            module = importlib.import_module(COMMANDS[command][0])
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("medhead"):
                raise
            print(
                f"medhead: error: {error.name} is not installed: pip install 'medhead[{_extra(command)}]'",
                file=sys.stderr,
            )
            return 2
        return int(module.main(rest))
    if command in ("", "-h", "--help"):
        print(usage(), end="")
        return 0 if command else 2
    known = ", ".join(COMMANDS)
    print(f"medhead: error: no command is called {command!r}; commands: {known}", file=sys.stderr)
    return 2
