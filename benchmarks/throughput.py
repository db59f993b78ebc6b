"""Images per second of each phase, of looking and of the input pipeline, by several implementations in turn.

    python benchmarks/throughput.py                     a table, at the CIFAR-10 widths, batch 64
    python benchmarks/throughput.py --json              one JSON object
    python benchmarks/throughput.py --widths digits --batch 512 --runs 9 --device cuda
    python benchmarks/throughput.py --against ../other  also the package of another checkout, 0.1.0 or newer

The columns: a plain implementation (`benchmarks/plain.py`), the package without `phattn.fast` ("unaided"), and the
package as on the command line ("ours"). All compute the same mathematics in float32; a training step includes the
backward pass, clipping and Adam (fused but for the plain one). Each column is a process of its own, of
`benchmarks/rows.py`; they take turns, so that a machine whose speed drifts treats them alike. The figures are medians
over the turns; the ratio, of "ours" to the first column or to "before", is the median of the ratios turn by turn. On a
machine that is shared, `OMP_NUM_THREADS=1` and `--cpu-time` count processor time. "onnx" is looking with P = 20, by
torch and by onnxruntime on the same threads (CPU only; left out where onnxruntime or its exporter is missing).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from rows import random_images

from phattn.apps.export import export_model, look_with, open_parts
from phattn.data.images import ImageSet
from phattn.model import CONFIGS, HardAttention
from phattn.policy import EIG, look

HERE = Path(__file__).resolve().parent
LOOKS = 7
COLUMNS = ("plain", "unaided", "ours")


class Column:
    """A process that times rows when asked to."""

    def __init__(self, name: str, checkout: Path, options: argparse.Namespace):
        chosen = {key: getattr(options, key) for key in ("widths", "batch", "device", "cpu_time")} | {"column": name}
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "rows.py"), json.dumps(chosen)],
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.rows: dict[str, int] = json.loads(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the column {self.name!r} ended early, with status {self.process.wait()}")
        return line

    def seconds(self, row: str) -> float:
        """Seconds of one call of a row."""
        self.process.stdin.write(f"{row}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


def in_turn(
    works: dict[str, Callable[[], float]], images: int, runs: int, base: str | None = None
) -> dict[str, float]:
    """Images per second of each, medians over turns, and the ratio of the last one's to the base's, or the first's."""
    turns = [{name: work() for name, work in works.items()} for _ in range(runs)]
    rates = {name: images / statistics.median(turn[name] for turn in turns) for name in works}
    last, base = list(works)[-1], base or next(iter(works))
    return rates | {"ratio": statistics.median(turn[base] / turn[last] for turn in turns)}


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All rows of all columns."""
    names = [name for name in options.columns if name != "before"] + ["before"] * bool(options.against)
    names.sort(key=lambda name: name == "ours")  # last
    columns = [Column(name, options.against if name == "before" else HERE.parent, options) for name in names]
    try:
        results, base = {}, "before" if options.against else None
        for row, images in columns[-1].rows.items():
            if not options.rows or row in options.rows:
                works = {one.name: lambda one=one, row=row: one.seconds(row) for one in columns}
                results[row] = in_turn(works, images, options.runs, base)
        return results
    finally:
        for column in columns:
            column.close()


def deployed(model: HardAttention, data: ImageSet, samples: int, runs: int) -> dict[str, float] | None:
    """Seven looks with EIG by torch and by onnxruntime, both from uint8; None where that can't be had."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        print(f"onnx: left out, there is no {' and no '.join(missing)}", file=sys.stderr)
        return None

    def timed(work: Callable[[], object]) -> float:
        work()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        try:
            opened = open_parts(export_model(model, folder, samples), torch.get_num_threads())
        except ValueError as error:  # a torch that can't write ONNX
            print(f"onnx: left out, {error}", file=sys.stderr)
            return None
        images, arrays = data.images, data.images.numpy()
        works = {
            "torch": lambda: timed(lambda: look(model, images, EIG(samples), LOOKS)),
            "onnxruntime": lambda: timed(lambda: look_with(opened, arrays, LOOKS)),
        }
        return in_turn(works, len(data), runs)


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(results: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """As text."""
    heading = (
        f"{options.widths} widths, batch {options.batch}, {options.device}, torch {torch.__version__}, {processor()}, "
        f"{torch.get_num_threads()} threads, medians of {options.runs}{', processor time' if options.cpu_time else ''}"
    )
    lines, shown = [heading], None
    for name, result in results.items():
        if list(result) != shown:
            shown = list(result)
            lines.append(f"{'images/s':10s}" + "".join(f"{column:>12s}" for column in shown))
        lines.append(f"{name:10s}" + "".join(f"{value:12.2f}" for value in result.values()))
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--widths", default="cifar10", choices=list(CONFIGS), help="sizes of the model")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--runs", type=int, default=5, help="turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", type=Path, help="another checkout, for a column before ours")
    parser.add_argument("--columns", nargs="+", default=COLUMNS, choices=COLUMNS)
    parser.add_argument("--rows", nargs="+", default=[], help="only these: first second third look1 look20 input onnx")
    parser.add_argument("--cpu-time", action="store_true", help="processor time in place of the wall clock's")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    results = measure(options)
    if options.device == "cpu" and (not options.rows or "onnx" in options.rows):
        model = HardAttention(CONFIGS[options.widths]).eval()
        data = random_images(options.widths, options.batch)[: min(options.batch, 64)]
        if result := deployed(model, data, 20, options.runs):
            results["onnx"] = result
    print(json.dumps(results) if options.json else table(results, options))


if __name__ == "__main__":
    main()
