"""Kill training at random moments, resume it, and see whether it ends as if nothing had happened.

    python tests/interrupt.py --kills 50 --seed 0

A small run of all three phases is made once in peace. Then it is made again and again, each time killed at a random
moment by SIGKILL, SIGTERM or SIGINT (Ctrl-C) and started anew with --resume, until it gets through. What it leaves must
be the same to the last bit: weights, histories and metrics (but for seconds). `tests/test_interruption.py` does a few.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
PHASES, EPOCHS, IMAGES = ("first", "second", "third"), 3, 320
STAGES = ("start", *PHASES, "conclusions")
SIGNALS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
CHILD = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent did with it
from phattn.apps.cli import main
from phattn.data.scenes import digits
from phattn.data.datasets import DATASETS
DATASETS["digits"] = lambda split, datapath, *, seed, **_: digits(split, seed=seed, size={IMAGES})
options = ["--dataset=digits", "--epochs={EPOCHS}", "--T=4", "--batch=32", "--device=cpu", "--no-fast"]
sys.exit(main(["train", *options, *sys.argv[1:]]))
"""


@dataclass
class Record:
    """What happened to the processes."""

    kills: Counter = field(default_factory=Counter)  # of (signal, stage that it met)
    runs: int = 0
    wrong: list[str] = field(default_factory=list)


def start(folder: Path, output: Path) -> subprocess.Popen:
    """Begin the run in `folder`, or go on with it."""
    words = [f"--logfolder={folder}", *(["--resume"] if folder.is_dir() else [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-u", "-c", CHILD, *words], stdout=file, stderr=file, env=environment, cwd=output.parent
        )


def spoken(output: Path) -> bool:
    """Whether the process has got as far as its first line: imports are done, training begins."""
    return b"training images" in output.read_bytes()


def met(folder: Path) -> str:
    """The stage that a run is in: before the phases, one of them, or the tests and pictures at the end."""
    if all((folder / phase / f"weights_f_{EPOCHS}.safetensors").exists() for phase in PHASES):
        return "conclusions"
    return next((phase for phase in reversed(PHASES) if (folder / phase / "config.json").exists()), "start")


def peace(folder: Path, output: Path) -> dict[str, float]:
    """Let the run get through; returns the seconds that it spent in each stage."""
    process, seconds, before = start(folder, output), dict.fromkeys(STAGES, 0.0), time.monotonic()
    while process.poll() is None:
        time.sleep(0.02)
        now = time.monotonic()
        seconds[met(folder)] += now - before
        before = now
    if process.returncode:
        raise RuntimeError(f"training failed:\n{output.read_text()}")
    return seconds


def interrupt(folder: Path, output: Path, seconds: dict[str, float], left: list[str], rng, record: Record) -> str:
    """One process, killed at a random moment of one of the stages `left`; returns which, or "" if it got through."""
    target = rng.choice(left[:2])
    number, wait = rng.choice(list(SIGNALS)), rng.uniform(0, seconds[target])
    process, resumed = start(folder, output), folder.is_dir()
    while process.poll() is None and STAGES.index(met(folder)) < STAGES.index(target):
        time.sleep(0.01)
    while resumed and target != "start" and process.poll() is None and not spoken(output):
        time.sleep(0.01)  # or a resumed stage is met before anything has been imported
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        begun, place = spoken(output), met(folder)
        process.send_signal(number)
        code, said = process.wait(300), output.read_text(errors="replace")
        if code == 0 or "done: see" in said:  # too late: Python was on its way out
            return ""
        record.kills[signal.Signals(number).name, place] += 1
        if begun and code != SIGNALS[number]:
            record.wrong.append(f"{number!r} in {place}: exit status {code}\n{said}")
        if begun and number != signal.SIGKILL and ("--resume --logfolder" not in said or "Traceback" in said):
            record.wrong.append(f"{number!r} in {place}: not a clean end\n{said}")
        return place
    if process.returncode:
        record.wrong.append(f"resuming failed\n{output.read_text(errors='replace')}")
    return ""


def leavings(folder: Path) -> dict[str, object]:
    """All that must be the same whatever happened on the way."""
    found: dict[str, object] = {"model": (folder / "model.safetensors").read_bytes()}
    for phase in PHASES:
        found[phase] = load_file(folder / phase / f"weights_f_{EPOCHS}.safetensors")
        found[f"{phase} history"] = [
            {name: value for name, value in epoch.items() if name != "seconds"}
            for epoch in json.loads((folder / phase / "history.json").read_text())
        ]
    metrics = json.loads((folder / "metrics.json").read_text())
    found["policies"] = metrics["policies"]
    found["files"] = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "tfevents" not in path.name and not path.name.endswith(".lock")
    )
    return found


def differ(one: dict[str, object], two: dict[str, object]) -> list[str]:
    """Names of what is not the same."""

    def same(a: object, b: object) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [name for name in one if not same(one[name], two[name])]


def harness(kills: int, seed: int, place: Path, tell=print) -> Record:
    """Kill `kills` processes; the record's `wrong` is empty if every run ended as the one in peace."""
    rng, record, output = random.Random(seed), Record(), place / "output"
    seconds = peace(place / "peace", output)
    whole = leavings(place / "peace")
    tell("in peace: " + ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))
    while record.kills.total() < kills and not record.wrong:
        folder, left = place / f"run{record.runs}", list(STAGES)
        while left and record.kills.total() < kills and not record.wrong:  # at most one kill in each stage
            met_last = interrupt(folder, output, seconds, left, rng, record)
            left = left[left.index(met_last) + 1 :] if met_last in left else left[1:] if met_last else []
        if not record.wrong:
            peace(folder, output)
        if not record.wrong:
            record.runs += 1
            record.wrong += [f"{folder.name}: {name} differs" for name in differ(whole, leavings(folder))]
            tell(f"{record.kills.total()} kills, {record.runs} runs got through, wrong: {record.wrong or 'none'}")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        record = harness(options.kills, options.seed, Path(place))
    for (name, phase), count in sorted(record.kills.items()):
        print(f"{count:3} × {name} in {phase}")
    print("\n".join(record.wrong) or f"all {record.runs} runs ended as the one in peace, bit for bit")
    return bool(record.wrong)


if __name__ == "__main__":
    sys.exit(main())
