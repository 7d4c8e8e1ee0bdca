"""`python -m medhead.datastore`: the command `medhead datastore`."""

import sys

from medhead.cli.datastore import main

sys.exit(main())
