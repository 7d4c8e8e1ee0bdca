"""`python -m medhead.tune`: the command `medhead tune`."""

import sys

from medhead.cli.tune import main

sys.exit(main())
