"""`python -m phattn`: the command line, see nbs/apps/cli.ipynb."""

from phattn.apps.cli import main
from phattn.engine.distributed import end

raise SystemExit(end(main()))
