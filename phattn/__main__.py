"""`python -m phattn`: the command line, see nbs/apps/cli.ipynb."""

from phattn.cli import main

raise SystemExit(main())
