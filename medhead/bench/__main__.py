"""`python -m medhead.bench`: the speed benchmark."""

import sys

from medhead.bench.speed import main

sys.exit(main())
