"""The console command `medhead`: tables of subcommands, each of which is imported when it is asked for."""

from __future__ import annotations

import importlib
import sys

from medhead import __version__
from medhead.cli.common import guarded

Commands = dict[str, tuple[str, str]]  # name: module and function, what it does
GROUPS: dict[str, Commands] = {
    "decode": {
        "generate": ("medhead.cli.generate:main", "answer a prompt in the terminal"),
        "verify": ("medhead.cli.verify:main", "decode the prompt of a receipt again and compare the text"),
        "chat": ("medhead_app.command:main", "open the chat page, with an OpenAI-compatible API beside it"),
        "serve": ("medhead_app.command:serve", "serve the OpenAI-compatible API alone"),
    },
    "train heads": {
        "generate-data": ("medhead_training.generate_data:main", "let a model write the text its heads learn from"),
        "finetune": ("medhead_training.finetune:main", "train heads for a model"),
        "evaluate": ("medhead_training.evaluate:main", "measure the accepted length of heads by tree size"),
        "export": ("medhead_training.export:main", "write heads in the checkpoint format of a serving engine"),
    },
    "make it faster": {
        "tune": ("medhead.cli.tune:main", "find the fastest tree or lookahead sizes on this machine"),
        "datastore": ("medhead.cli.datastore:main", "index text of your own for the proposer ngram"),
    },
    "measure": {
        "bench": ("medhead.cli.main:bench", "run a benchmark: speed, step, tasks, budget or kernels"),
        "load-test": ("medhead_app.load.command:main", "send requests of many clients to a server, check the answers"),
    },
}
COMMANDS: Commands = {name: command for group in GROUPS.values() for name, command in group.items()}
BENCHMARKS: Commands = {
    "speed": ("medhead.bench.speed:main", "tokens/s against plain decoding and transformers (default)"),
    "step": ("medhead.bench.step:main", "time of one step at the sizes of real models"),
    "tasks": ("medhead.bench.tasks:main", "accepted length and speed by task"),
    "budget": ("medhead.bench.budget:main", "the automatic tree size against fixed sizes"),
    "kernels": ("medhead_kernels.bench:main", "bandwidth of the attention backends"),
}
USAGE = """\
usage: medhead COMMAND [options]
       medhead COMMAND --help
       medhead --version

Exact speculative decoding with token trees for Hugging Face models.
{commands}
examples:
  medhead generate --prompt "Tell me a story about a dragon." --compare
  medhead chat --model Qwen/Qwen3-0.6B --proposer recycling
  medhead finetune --model Qwen/Qwen3-0.6B --data answers.jsonl --output my-heads
  medhead bench speed --num-prompts 4

exit codes: 0 done, 1 failure, 2 wrong input, 130 stopped with Ctrl-C
"""
BENCH_USAGE = """\
usage: medhead bench [BENCHMARK] [options]
       medhead bench BENCHMARK --help

Run a benchmark; without a name it is speed. Each writes a table, JSON and a picture to its --output folder.
{commands}
examples:
  medhead bench --num-prompts 4
  medhead bench step --shapes tiny --context 64 --nodes 8
  medhead bench kernels --contexts 2048 --nodes 1 64 --output results

exit codes: 0 done, 1 failure, 2 wrong input, 130 stopped with Ctrl-C
"""


def usage(text: str, groups: dict[str, Commands]) -> str:
    """Return a help text with its commands filled in."""
    lines = []
    for title, commands in groups.items():
        lines += ["", f"{title}:", *(f"  {name:15s}{does}" for name, (_, does) in commands.items())]
    return text.format(commands="\n".join([*lines, ""]))


def run(commands: Commands, prog: str, arguments: list[str]) -> int:
    """Import and run the command that is named first; return its exit code."""
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        print(f"{prog}: error: unknown command {name!r}; choose from {', '.join(commands)}", file=sys.stderr)
        return 2
    module, _, function = commands[name][0].partition(":")
    return guarded(f"{prog} {name}", lambda: getattr(importlib.import_module(module), function)(rest))


def bench(arguments: list[str]) -> int:
    """Run the benchmark that is named first, or `speed`; return its exit code."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage(BENCH_USAGE, {"benchmarks": BENCHMARKS}), end="")
        return 0
    named = arguments and not arguments[0].startswith("-")
    return run(BENCHMARKS, "medhead bench", arguments if named else ["speed", *arguments])


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(USAGE, GROUPS), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"medhead {__version__}")
        return 0
    return run(COMMANDS, "medhead", arguments)


if __name__ == "__main__":
    sys.exit(main())
