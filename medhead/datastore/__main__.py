"""Entry point of `python -m medhead.datastore`."""

import sys

from medhead.datastore.command import main

sys.exit(main())
