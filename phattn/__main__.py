"""`python -m phattn`: the command line, see nbs/apps/cli.ipynb."""

from phattn.apps.cli import main

raise SystemExit(main())
