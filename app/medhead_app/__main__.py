"""Run `python -m medhead_app`, the same as `medhead chat`."""

import sys

from medhead_app.command import main

sys.exit(main())
