"""`python -m phattn`: the command line, see nbs/10_cli.ipynb."""

from phattn.cli import main

raise SystemExit(main())
