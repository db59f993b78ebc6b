"""Mutation testing of the method: change one thing in a module at a time, and see whether a test notices.

    python -m venv --system-site-packages /tmp/mutants && /tmp/mutants/bin/pip install mutmut
    OMP_NUM_THREADS=1 /tmp/mutants/bin/python tests/mutate.py --sample 200 --out mutants.jsonl
    OMP_NUM_THREADS=1 /tmp/mutants/bin/python tests/mutate.py --again mutants.jsonl     what survived, once more

Each mutant is written into a copy of the repository. A child, forked from a process that has imported torch and pytest
once, runs the fast tests of the module and `test_reference.py`, the quickest first, up to the first failure. (mutmut's
own runner collects the tests and imports torch again for each.)

The changes are those of mutmut's operators and three that suit tensors: a statement that is a call removed, the call of
a tensor's method removed, a decorator removed. Left out is what no test can or should see: docstrings, annotations,
imports, tables and constants of a module, the text of errors, and on which device a tensor is made. A mutant that ends
in a TypeError and the like, or when it is imported, is noticed by any test that gets there; the summary also counts
without those. Needs fork.
"""

import argparse
import ast
import contextlib
import difflib
import gc
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libcst as cst
import libcst.matchers as m
import pytest
import torch
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import deep_replace
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parents[1]
METHOD = ["glimpse", "recurrence", "partial_vae", "flows", "model", "policy", "training", "evaluation"]
ALSO = "test_reference"  # beside the tests of the module
MEMORY = 8 * 2**30  # bytes that a child may take; more is a failure of its own
CRASHES = ("TypeError", "AttributeError", "NameError", "UnboundLocalError", "import")
SKIPPED = (
    m.Annotation() | m.Import() | m.ImportFrom() | m.Raise() | m.Decorator()
    | m.SimpleStatementLine(body=[m.Expr(m.SimpleString() | m.ConcatenatedString())])  # docstrings
    | m.Call(m.Name("isinstance") | m.Name("print") | m.Name("len") | m.Attribute(m.Name("warnings")))
    | (m.If | m.Else | m.ExceptHandler)(body=m.IndentedBlock(body=[m.ZeroOrMore(), m.SimpleStatementLine([m.Raise()])]))
)
KEPT_DECORATORS = ("property", "dataclass", "staticmethod", "classmethod", "contextmanager")  # without them all breaks
KEPT_METHODS = ("cpu", "cuda", "contiguous", "numpy")  # without them nothing changes on a CPU

Mutant = dict[str, Any]


def statement(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    """A call on a line of its own -> nothing."""
    if m.matches(node, m.SimpleStatementLine(body=[m.Expr(m.Call())])) and not m.findall(node, m.Name("super")):
        yield node.with_changes(body=[cst.Pass()])


def method(node: cst.Call) -> Iterator[cst.CSTNode]:
    """x.exp() -> x."""
    if not isinstance(node.func, cst.Attribute) or m.matches(node.func.value, m.Name("torch") | m.Name("nn")):
        return
    name = node.func.attr.value
    moved = name == "to" and any(map(on_device, node.args))
    if hasattr(torch.Tensor, name) and name not in KEPT_METHODS and not moved:
        yield node.func.value


def decorator(node: cst.FunctionDef) -> Iterator[cst.CSTNode]:
    """A function without one of its decorators."""
    for one in node.decorators:
        if not m.findall(one, m.OneOf(*map(m.Name, KEPT_DECORATORS))):
            yield node.with_changes(decorators=[other for other in node.decorators if other is not one])


OURS = [(cst.SimpleStatementLine, statement), (cst.Call, method), (cst.FunctionDef, decorator)]


def on_device(arg: cst.Arg) -> bool:
    """Whether an argument says on which device."""
    places = m.Name("device") | m.Attribute(attr=m.Name("device"))
    return m.matches(arg, m.Arg(keyword=m.Name("device")) | m.Arg(value=places))


class Changes(cst.CSTVisitor):
    """Collects what can be changed in functions and classes: (operator, line, node, what takes its place, where)."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.found, self.line, self.top, self.inside = [], 0, {}, None

    def visit_Module(self, node: cst.Module) -> None:
        self.top = {id(child): number for number, child in enumerate(node.body)}

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Module):
            return super().on_visit(node)
        if id(node) in self.top:
            self.inside = self.top[id(node)]
            if not isinstance(node, cst.FunctionDef | cst.ClassDef):
                return False
        position = self.get_metadata(PositionProvider, node, None)
        self.line = position.start.line if position else self.line
        if m.matches(node, SKIPPED):
            if isinstance(node, cst.If):  # its condition and what comes after it count
                node.test.visit(self), node.orelse and node.orelse.visit(self)
            return False
        for kind, operator in [*mutation_operators, *OURS]:
            if isinstance(node, kind):
                made = list(operator(node))
                name = operator.__name__.removeprefix("operator_")
                for new in made[:1] if name == "string" else made:  # one a string is enough
                    if name != "arg_removal" or not any(on_device(arg) for arg in node.args if arg not in new.args):
                        self.found.append((name, self.line, node, new, self.inside))
        return True


def mutants_of(name: str) -> tuple[str, list[Mutant]]:
    """The source of a module, and every mutant that compiles and differs from it and from the others."""
    source = (ROOT / "phattn" / f"{name}.py").read_text()
    wrapper, seen, result = MetadataWrapper(cst.parse_module(source)), set(), []
    wrapper.visit(changes := Changes())
    module = wrapper.module
    parts = [module.code_for_node(part) for part in (*module.header, *module.body, *module.footer)]
    trees = [ast.dump(ast.parse(part)) for part in parts]
    for operator, line, old, new, number in changes.found:
        place = len(module.header) + number
        part = module.code_for_node(deep_replace(module.body[number], old, new))
        try:
            key = number, ast.dump(ast.parse(part))
        except SyntaxError:
            continue
        if key[1] != trees[place] and key not in seen:
            seen.add(key)
            code = "".join([*parts[:place], part, *parts[place + 1 :]])
            lines = difflib.unified_diff(parts[place].splitlines(), part.splitlines(), n=0, lineterm="")
            diff = [text for text in lines if not text.startswith(("---", "+++", "@@"))]
            result.append(dict(module=name, line=line, operator=operator, code=code, diff=diff))
    return source, result


def draw(mutants: list[Mutant], size: int, seed: int) -> list[Mutant]:
    """As many of each module as of the others, as far as it has them; a larger sample holds the smaller ones."""
    turns = []
    for name in dict.fromkeys(one["module"] for one in mutants):
        queue = [one for one in mutants if one["module"] == name]
        random.Random(f"{seed} {name}").shuffle(queue)
        turns += enumerate(queue)
    drawn = {id(one) for _, one in sorted(turns, key=lambda pair: pair[0])[:size]}
    return [one for one in mutants if id(one) in drawn]


class Watch:
    """A plugin of pytest: runs the quickest tests first, and notes durations and the first failure."""

    def __init__(self, durations: dict[str, float]):
        self.order, self.durations, self.failure = durations, {}, None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.order.get(item.nodeid, 0.0))

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> None:
        self.durations[item.nodeid] = self.durations.get(item.nodeid, 0.0) + call.duration
        if call.excinfo and call.excinfo.typename != "Skipped" and not self.failure:
            self.failure = [item.nodeid.rpartition("/")[2], call.excinfo.typename]


class Copy:
    """A copy of the repository in which the tests of one module at a time are run."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "copy"
        listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.root / name)
        os.chdir(self.root)
        os.environ.update(PYTHONPATH=str(self.root), MPLBACKEND="Agg", TORCHINDUCTOR_COMPILE_THREADS="1")
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.path[0] = str(self.root)  # in place of this script's folder
        sys.dont_write_bytecode = True
        torch.set_num_threads(1)
        self.times: dict[str, dict[str, float]] = {}
        self.limits: dict[str, float] = {}

    def warm_up(self, name: str) -> None:
        """A run without a mutant: how long does each test take? What the tests import is then imported here."""
        self.times[name], self.limits[name] = {}, 600
        status, (failure, self.times[name], loaded, home), seconds = self.run(name)
        if status != 0 or Path(home).parent != self.root / "phattn":
            output = (self.folder / "output.txt").read_text()[-2000:]
            sys.exit(f"the tests of {name} fail without a mutant, or import {home}: {failure}\n{output}")
        for module in loaded:
            if module.partition(".")[0] not in ("phattn", "tests", "conftest") and module[:5] != "test_":
                with warnings.catch_warnings(action="ignore"), contextlib.suppress(Exception):
                    importlib.import_module(module)
        assert "phattn" not in sys.modules  # each child imports it anew
        self.limits[name] = 3 * seconds + 10
        print(f"{name}: {seconds:.1f} s without a mutant, limit {self.limits[name]:.0f} s", flush=True)

    def attempt(self, mutant: Mutant, source: str) -> None:
        """Run the tests of a mutant, and note in it what came out."""
        path = self.root / "phattn" / f"{mutant['module']}.py"
        path.write_text(mutant.pop("code"))
        status, (failure, *_, home), seconds = self.run(mutant["module"])
        path.write_text(source)
        outcome = "timeout" if status == "timeout" else "survived" if status == 0 and home else "killed"
        by = failure or ["", "import" if status in (2, 4) else f"exit {status}"]
        mutant |= dict(outcome=outcome, seconds=round(seconds, 2), by=by if outcome == "killed" else None)

    def run(self, name: str) -> tuple[int | str, list, float]:
        """Run tests in a child: exit status or "timeout", what it noted, seconds of processor time."""
        notes, started, ended, limit = self.folder / "notes.json", time.monotonic(), 0, self.limits[name]
        notes.unlink(missing_ok=True)
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            self._test(name, notes)
        try:
            while not ended and time.monotonic() - started < 10 * limit:
                time.sleep(0.02)
                ended, status, used = os.wait4(child, os.WNOHANG)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and what it has started
        if not ended:
            _, status, used = os.wait4(child, 0)
        stopped = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        status = "timeout" if stopped else os.waitstatus_to_exitcode(status)
        noted = json.loads(notes.read_text()) if notes.exists() else [None, {}, [], None]
        return status, noted, used.ru_utime + used.ru_stime

    def _test(self, name: str, notes: Path) -> None:
        """What the child does; it never returns."""
        status = 70
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(self.limits[name]),) * 2)
            output = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            random.seed(0)
            options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short"]
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", f"--basetemp={self.folder / 'tmp'}"]
            names = (f"test_{name}", f"test_{name}_edges", ALSO)
            files = [file for file in (f"tests/{test}.py" for test in names) if os.path.exists(file)]
            status = int(pytest.main([*options, *files], plugins=[watch := Watch(self.times[name])]))
            home = sys.modules["phattn"].__file__
            notes.write_text(json.dumps([watch.failure, watch.durations, list(sys.modules), home]))
        finally:
            os._exit(status)


def summary(results: list[Mutant], counts: Counter) -> None:
    """Print what survived, and how many were killed by module and by operator."""
    for one in results:
        if one["outcome"] == "survived":
            print(f"\nsurvived: phattn/{one['module']}.py:{one['line']}, {one['operator']}", *one["diff"], sep="\n  ")
    for key in ("module", "operator"):
        print(f"\nkilled/tried by {key}")
        for value in dict.fromkeys(one[key] for one in results):
            some = [one for one in results if one[key] == value]
            dead = sum(one["outcome"] != "survived" for one in some)
            crashed = sum(one["by"] is not None and one["by"][1] in CRASHES for one in some)
            of = f" of {counts[value]}" if key == "module" else ""
            left = f"{dead - crashed}/{len(some) - crashed}"
            print(f"{value:20s} {dead}/{len(some)}{of} ({dead / len(some):.0%}), without crashes {left}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=METHOD, metavar="module", help=f"of {', '.join(METHOD)}")
    parser.add_argument("--sample", type=int, help="try so many, as many of each module as of the others")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only those that survived in an earlier --out")
    parser.add_argument("--out", type=Path, help="write a line of JSON for each mutant")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so long")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))

    out = given.out and given.out.resolve()
    made = {name: mutants_of(name) for name in given.modules}
    chosen = [one for _, mutants in made.values() for one in mutants]
    if given.again:
        records = map(json.loads, given.again.read_text().splitlines())
        survived = {(one["module"], *one["diff"]) for one in records if one["outcome"] == "survived"}
        chosen = [one for one in chosen if (one["module"], *one["diff"]) in survived]
    counts, results = Counter(one["module"] for one in chosen), []
    chosen = chosen if given.sample is None else draw(chosen, given.sample, given.seed)
    if out:
        out.write_text("")
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copy, until = Copy(Path(folder).resolve()), time.monotonic() + 60 * given.minutes
        for name in dict.fromkeys(one["module"] for one in chosen):
            copy.warm_up(name)
        gc.collect(), gc.freeze()
        for number, one in enumerate(chosen, 1):
            if time.monotonic() > until:
                print(f"out of time after {number - 1} of {len(chosen)}")
                break
            copy.attempt(one, made[one["module"]][0])
            results.append(one)
            if out:
                with out.open("a") as file:
                    print(json.dumps(one, ensure_ascii=False), file=file)
            line = f"{one['module']}:{one['line']} {one['operator']}: {one['outcome']}"
            print(f"{number}/{len(chosen)} {line}, {one['seconds']:.1f} s", flush=True)
    summary(results, counts)


if __name__ == "__main__":
    main()
