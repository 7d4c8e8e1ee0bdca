"""Run `python -m medhead_app.load`, the same as `medhead load-test`."""

import sys

from medhead_app.load.command import main

sys.exit(main())
