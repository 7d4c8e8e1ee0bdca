"""`python -m medhead_app`."""

import sys

from medhead_app.load.command import main

sys.exit(main())
