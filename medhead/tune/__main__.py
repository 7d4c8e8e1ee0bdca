"""`python -m medhead.tune`."""

import sys

from medhead.tune.command import main

if __name__ == "__main__":
    sys.exit(main())
