"""Entry point of `python -m medhead.bench`, and of the other benchmarks by name: `python -m medhead.bench step`."""

import sys
from importlib import import_module

from medhead.bench.command import main

if sys.argv[1:2] and sys.argv[1] in ("step", "tasks", "budget"):
    sys.exit(import_module(f"medhead.bench.{sys.argv[1]}").main(sys.argv[2:]))
sys.exit(main())
