"""`python -m medhead.tune`."""

import sys

from medhead.cli.tune import main

if __name__ == "__main__":
    sys.exit(main())
