"""Run `python -m medhead_app`, the same as `medhead chat`."""

from medhead_app.command import main

raise SystemExit(main())
