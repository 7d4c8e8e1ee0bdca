"""`python -m medhead_app`."""

import sys

from medhead_app.command import main

sys.exit(main())
