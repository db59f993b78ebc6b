"""The notebooks as a whole: nothing generated lags behind, imports go one way, and each runs from top to bottom."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sync

NOTEBOOKS = [name for name in sync.files(sync.ROOT) if name.endswith(".ipynb")]
RUN = (
    "import sys; from pathlib import Path; from nbdev.test import test_nb; sys.exit(not test_nb(Path(sys.argv[1]))[0])"
)


def test_everything_in_step(capsys: pytest.CaptureFixture[str]) -> None:
    status = sync.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_imports_go_upward() -> None:
    """A module imports only from notebooks with a smaller number, so that the book can be read in order."""
    order = {}
    for path in (sync.ROOT / "phattn").glob("*.py"):
        if made := re.search(r"File to edit: \.\./nbs/(\S+)\.ipynb", path.read_text(encoding="utf-8")):
            order[path.stem] = made[1]
    assert order
    for module, notebook in order.items():
        for node in ast.walk(ast.parse((sync.ROOT / "phattn" / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level and node.module in order:
                assert order[node.module] < notebook, f"{notebook} imports from {order[node.module]}, which comes later"


# Each in its own process: in this one, a notebook would leave behind its plot style, random state, threads and nbdev's
# IN_TEST, and one that hangs could not be stopped. In a copy, so that nothing that it writes lands in the checkout.
@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name: str, tmp_path: Path) -> None:
    shutil.copy(sync.ROOT / "settings.ini", tmp_path)
    for folder in ("nbs", "results"):
        if (sync.ROOT / folder).exists():
            shutil.copytree(sync.ROOT / folder, tmp_path / folder)
    environment = {key: value for key, value in os.environ.items() if key not in ("RETRAIN", "MPLBACKEND")}
    environment.setdefault("OMP_NUM_THREADS", "1")  # as in conftest.py
    environment["PYTHONPATH"] = os.pathsep.join([str(sync.ROOT), environment.get("PYTHONPATH", "")])
    try:
        run = subprocess.run(
            [sys.executable, "-c", RUN, str(tmp_path / name)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"{name} ran for more than {expired.timeout:.0f} s", pytrace=False)
    if run.returncode:
        pytest.fail(f"{name}:\n{run.stdout}", pytrace=False)
