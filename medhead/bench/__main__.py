"""Entry point of `python -m medhead.bench`."""

import sys

from medhead.bench.command import main

sys.exit(main())
