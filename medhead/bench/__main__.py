"""Entry point of `python -m medhead.bench`."""

import sys

from medhead.bench import main

sys.exit(main())
