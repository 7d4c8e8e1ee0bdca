"""`python -m medhead.tune`: the command `medhead tune`."""

from medhead.cli.tune import main

raise SystemExit(main())
