"""`python -m medhead.bench`: the speed benchmark."""

from medhead.bench.speed import main

raise SystemExit(main())
