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


# A room may import from its own floor and from those before it.
FLOORS = ("engine", "data", "story", "fast", "rivals", "apps")
PACKAGE = sync.ROOT / "phattn"


def modules() -> dict[str, str]:
    """Dotted name inside phattn -> the notebook that it is made from, without folder `nbs/` and ending."""
    found = {}
    for path in PACKAGE.glob("**/*.py"):
        if made := re.search(r"File to edit: [./]*nbs/(\S+)\.ipynb", path.read_text(encoding="utf-8")):
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = made[1]
    return found


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports from, anywhere in its code."""
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    here, found = module.split(".")[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            room = here[: len(here) - node.level + 1]
            found |= {".".join([*room, node.module])} if node.module else set()
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("phattn."):
            found.add(node.module.removeprefix("phattn."))
    return found


def test_the_layout_of_the_package_is_that_of_the_notebooks() -> None:
    assert modules()
    for module, notebook in modules().items():
        assert re.sub(r"(^|/)[0-9]+_", r"\1", notebook).replace("/", ".") == module


def test_imports_go_one_way() -> None:
    """Up the floors and, in the story, up the numbers; only the applications import what is there for speed."""
    made = modules()
    floor = {module: FLOORS.index(module.split(".")[0] if "." in module else "story") for module in made}
    for module, notebook in made.items():
        for other in imported(module) & set(made):
            assert floor[other] <= floor[module], f"{notebook} imports from {made[other]}, which stands above it"
            if floor[other] == floor[module] == FLOORS.index("story"):
                assert made[other] < notebook, f"{notebook} imports from {made[other]}, which comes later"
            if other.startswith("fast."):
                allowed = module.startswith(("fast.", "apps."))
                assert allowed, f"{notebook} imports from {made[other]}, which is for speed"


def test_no_page_of_the_story_uses_what_is_there_for_speed_or_for_the_command_line() -> None:
    for notebook in (sync.ROOT / "nbs").glob("[0-9]*.ipynb"):
        for _, _, code in sync.code_cells(notebook):
            found = re.findall(r"phattn\.(?:fast|apps)\b|from phattn import (?:fast|apps)\b", code)
            assert not found, f"{notebook.name} imports {found[0]}"


def test_no_imports_go_in_circles() -> None:
    above = {module: imported(module) & set(modules()) for module in modules()}
    while free := [module for module, others in above.items() if not others & set(above)]:
        for module in free:
            del above[module]
    assert not above, f"these import one another: {', '.join(above)}"


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
            timeout=1200,
        )
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"{name} ran for more than {expired.timeout:.0f} s", pytrace=False)
    if run.returncode:
        pytest.fail(f"{name}:\n{run.stdout}", pytrace=False)
