"""`python -m medhead.generate`: the command `medhead generate`."""

import sys

from medhead.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
