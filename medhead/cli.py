"""`medhead generate ...` and `medhead bench ...`: the console script."""

from __future__ import annotations

import sys

USAGE = """\
usage: medhead {generate,bench} [options]

  generate   answer a prompt in the terminal
  bench      measure against plain decoding and transformers

`medhead generate --help` tells more.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "generate":
        from medhead.generate import main as generate

        return generate(rest)
    if command == "bench":
        from medhead.bench import main as bench

        return bench(rest)
    if command in ("", "-h", "--help"):
        print(USAGE, end="")
        return 0 if command else 2
    print(f"medhead: error: no command is called {command!r}; commands: generate, bench", file=sys.stderr)
    return 2
