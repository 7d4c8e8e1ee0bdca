"""Entry point of `python -m medhead.datastore`."""

import sys

from medhead.cli.datastore import main

sys.exit(main())
