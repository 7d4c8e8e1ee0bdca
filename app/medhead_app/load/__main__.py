"""Run `python -m medhead_app.load`, the same as `medhead load-test`."""

from medhead_app.load.command import main

raise SystemExit(main())
