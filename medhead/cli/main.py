"""The console command `medhead`: a table of subcommands, each of which is imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from medhead import __version__
from medhead.cli.common import missing


class Command(NamedTuple):
    """Where a subcommand is, and what it does."""

    module: str
    does: str
    function: str = "main"


GROUPS: dict[str, dict[str, Command]] = {
    "decode": {
        "generate": Command("medhead.cli.generate", "answer a prompt in the terminal"),
        "chat": Command("medhead_app.command", "open the chat page, with an OpenAI-compatible API beside it"),
        "serve": Command("medhead_app.command", "serve the OpenAI-compatible API alone", "serve"),
    },
    "train heads": {
        "generate-data": Command("medhead_training.generate_data", "let a model write the text its heads learn from"),
        "finetune": Command("medhead_training.finetune", "train heads for a model"),
        "evaluate": Command("medhead_training.evaluate", "measure the accepted length of heads by tree size"),
        "export": Command("medhead_training.export", "write heads in the format of a serving engine"),
    },
    "make it faster": {
        "tune": Command("medhead.cli.tune", "find the fastest tree or lookahead sizes on this machine"),
        "datastore": Command("medhead.cli.datastore", "index text of your own for the proposer ngram"),
    },
    "measure": {
        "bench": Command("medhead.cli.main", "run a benchmark: speed, step, tasks, budget or kernels", "bench"),
        "load-test": Command("medhead_app.load.command", "send requests of many clients to a server and check the answers"),
    },
}  # fmt: skip
BENCHMARKS = {
    "speed": Command("medhead.bench.command", "tokens/s against plain decoding and transformers (default)"),
    "step": Command("medhead.bench.step", "time of one step at the sizes of real models"),
    "tasks": Command("medhead.bench.tasks", "accepted length and speed by task"),
    "budget": Command("medhead.bench.budget", "the automatic tree size against fixed sizes"),
    "kernels": Command("medhead_kernels.bench", "bandwidth of the attention backends"),
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
EXIT_CODES = "exit codes: 0 done, 1 failure, 2 wrong input, 130 stopped with Ctrl-C\n"


def usage() -> str:
    """Return the help of `medhead`."""
    groups = "\n".join(f"{title}:\n{_listed(commands)}" for title, commands in GROUPS.items())
    return f"""\
usage: medhead COMMAND [options]
       medhead COMMAND --help
       medhead --version

Exact speculative decoding with token trees for Hugging Face models.

{groups}
examples:
  medhead generate --prompt "Tell me a story about a dragon." --compare
  medhead chat --model Qwen/Qwen3-0.6B --proposer recycling
  medhead finetune --model Qwen/Qwen3-0.6B --data answers.jsonl --output my-heads
  medhead bench speed --count 4

{EXIT_CODES}"""


def bench_usage() -> str:
    """Return the help of `medhead bench`."""
    return f"""\
usage: medhead bench [BENCHMARK] [options]
       medhead bench BENCHMARK --help

Run a benchmark; without a name it is speed. Each writes a table, JSON and a picture to its --output folder.

benchmarks:
{_listed(BENCHMARKS)}
examples:
  medhead bench --count 4
  medhead bench step --shapes tiny --context 64 --nodes 8
  medhead bench kernels --contexts 2048 --nodes 1 64 --output results

{EXIT_CODES}"""


def _listed(commands: dict[str, Command]) -> str:
    return "".join(f"  {name:15s}{command.does}\n" for name, command in commands.items())


def bench(arguments: list[str]) -> int:
    """Run the benchmark that is named first, or `speed`; return its exit code."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(bench_usage(), end="")
        return 0
    if not arguments or arguments[0].startswith("-"):
        arguments = ["speed", *arguments]
    return run(BENCHMARKS, "medhead bench", arguments)


def run(commands: dict[str, Command], prog: str, arguments: list[str]) -> int:
    """Import and run the command that is named first; return its exit code."""
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        print(f"{prog}: error: unknown command {name!r}; choose from {', '.join(commands)}", file=sys.stderr)
        return 2
    command = commands[name]
    try:
        function = getattr(importlib.import_module(command.module), command.function)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("medhead"):
            raise
        print(f"{prog} {name}: error: {missing(error)}", file=sys.stderr)
        return 2
    return int(function(rest))


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"medhead {__version__}")
        return 0
    return run(COMMANDS, "medhead", arguments)


if __name__ == "__main__":
    sys.exit(main())
