"""Training in two processes, as torchrun starts them: the same as in one, to rounding; and what happens if one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from interrupt import ROOT, differ, leavings

from phattn.engine.weights import load_tensors

EPOCHS = 3
TRAIN = f"""
import os, sys
from pathlib import Path
from phattn.apps.cli import main
from phattn.data.scenes import digits
from phattn.data.datasets import DATASETS
Path("pid" + os.environ.get("RANK", "0")).write_text(str(os.getpid()))
DATASETS["digits"] = lambda split, datapath, *, seed, **_: digits(split, seed=seed, size=96)
small = ["--dataset=digits", "--no-fast", "--epochs={EPOCHS}", "--T=4", "--batch=32", "--lr=1e-4"]
sys.exit(main(["train", *small, *sys.argv[1:]]))
"""
DOUBLE = """
import json, torch
from phattn.data.scenes import digits
from phattn.data.shared import deal
from phattn.engine import loop
from phattn.engine.distributed import average, join, rank
from phattn.model import CONFIGS, HardAttention
from phattn.training import LOSSES, prepare, recipe

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double  # what the losses do in float32 on purpose
losses = {}

def noted(log):
    log = average(log)
    losses.setdefault(phase, []).append(log["loss"].item())
    return log

loop.average = noted
with join(torch.device("cpu")) as device:
    for phase in LOSSES:
        torch.manual_seed(0)
        model, data = HardAttention(CONFIGS["digits"]), deal(digits("train", seed=0, size=96), device)
        how = recipe("digits", phase, epochs=2, batch=32, looks=4, augment=True)
        loss = lambda model, images, *rest: LOSSES[phase](model, images.double(), *rest)
        batches = data.shuffled(how.batch, augment=True)
        loop.learn(model, loss, batches, how, parameters=prepare(model, phase))
        losses[phase] += [value.double().sum().item() for value in model.state_dict().values()]
if rank() == 0:
    print(json.dumps(losses))
"""

SKIP = """
import torch
from contextlib import nullcontext
from phattn.data.scenes import digits
from phattn.data.shared import deal
from phattn.engine.distributed import average, join, rank
from phattn.engine.loop import learn
from phattn.model import CONFIGS, HardAttention
from phattn.engine.runs import Run
from phattn.engine.weights import load_tensors
from phattn.training import LOSSES, prepare, recipe

calls = []

def bad(model, images, labels, recipe):
    calls.append(1)
    loss, log = LOSSES["second"](model, images, labels, recipe)
    return (loss * torch.nan if len(calls) == 3 and rank() == 1 else loss), log  # its first call only listens

with join(torch.device("cpu")) as device:
    torch.manual_seed(0)
    model, data = HardAttention(CONFIGS["digits"]), deal(digits("train", seed=0, size=96), device)
    how = recipe("digits", "second", epochs=2, batch=32, looks=4, on_nonfinite="skip")
    with Run("run", {}) if rank() == 0 else nullcontext() as run:
        batches = data.shuffled(how.batch)
        history = learn(model, bad, batches, how, parameters=prepare(model, "second"), run=run)
    own = torch.stack([value.double().sum() for value in model.parameters()]).float()
    apart = (average({"all": own})["all"] - own).abs().max().item()
if rank() == 0:
    skipped = sum(record.get("skipped", 0) for record in history)
    kept = load_tensors("run/nonfinite.safetensors")
    rows = [*kept["inputs"].shape, kept["rank"], kept["processes"]]
    print(f"second phase skipped {skipped} of {len(calls) - 1}, rows {rows}, apart {apart}")
"""


def start(place: Path, processes: int, *words: str, program: str = TRAIN) -> subprocess.Popen:
    """Begin a program, in `place`; what it says goes to a file there."""
    (place / "program.py").write_text(program)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, *launch, *(["program.py"] if program else ["-m", "phattn"]), *words]
    with (place / "output").open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=place)


def told(place: Path, processes: int, *words: str, program: str = TRAIN, code: int = 0) -> str:
    """Let a program get through; what it said."""
    process = start(place, processes, *words, program=program)
    ended, said = process.wait(600), (place / "output").read_text()
    assert bool(ended) == bool(code), said
    return said


@pytest.mark.slow
def test_in_double_precision_two_processes_do_what_one_does(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        said = told(tmp_path, processes, program=DOUBLE)
        found.append(json.loads(next(line for line in said.splitlines() if line.startswith("{"))))
    for phase, values in found[0].items():
        assert found[1][phase] == pytest.approx(values, rel=1e-9, abs=1e-9), phase


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_the_run_resumes(tmp_path: Path) -> None:
    told(tmp_path, 2, "--logfolder=whole", "--device=cpu")
    folder, words = tmp_path / "broken", ("--logfolder=broken", "--device=cpu")
    for number, phase in ((0, "first"), (1, "second")):
        kept = folder / phase / "state.safetensors"
        process = start(tmp_path, 2, *words, *(["--resume"] if folder.exists() else []))
        until = time.monotonic() + 400
        while not kept.exists():
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "output").read_text()
            time.sleep(0.01)
        os.kill(int((tmp_path / f"pid{number}").read_text()), signal.SIGKILL)
        assert process.wait(120) != 0
        said = (tmp_path / "output").read_text()
        assert f"rank {1 - number} of 2: stopped; go on with the same options and --resume" in said, said
        assert "Signal 9 (SIGKILL)" in said and f"rank      : {number} (local_rank: {number})" in said, said
        assert 1 <= len(load_tensors(kept)["history"]) <= EPOCHS
    told(tmp_path, 2, *words, "--resume")
    assert not differ(leavings(tmp_path / "whole"), leavings(folder))


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(tmp_path: Path) -> None:
    runs = []
    for processes in (1, 2):
        said = told(tmp_path, processes, f"--logfolder=run{processes}", "--device=cpu")
        assert said.count("done: see") == 1 and said.count("third: 100%") >= 1
        assert (" in 2 processes, " in said) == (processes == 2)
        runs.append(leavings(tmp_path / f"run{processes}"))
    assert runs[0]["files"] == runs[1]["files"]
    for phase in ("first", "second", "third"):
        one, two = ([epoch["loss"] for epoch in run[f"{phase} history"]] for run in runs)
        assert two == pytest.approx(one, rel=1e-4), phase
        for name, value in runs[0][phase].items():
            torch.testing.assert_close(runs[1][phase][name], value, rtol=1e-2, atol=1e-3)
    assert json.loads((tmp_path / "run2" / "metrics.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_what_several_processes_can_not_do_is_said(tmp_path: Path) -> None:
    said = told(tmp_path, 2, "train", "--batch=63", "--device=cpu", program="", code=2)
    assert "phattn: rank 0 of 2: batch must be a multiple of 2, the number of processes, got 63" in said, said
    assert not (tmp_path / "runs").exists()
    said = told(tmp_path, 2, "info", program="", code=2)
    assert "only train runs in several processes: start this command without torchrun" in said, said


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_train_as_one(tmp_path: Path) -> None:
    losses = []
    for processes in (1, 2):
        told(tmp_path, processes, f"--logfolder=run{processes}", "--device=cuda")
        histories = [tmp_path / f"run{processes}" / phase / "history.json" for phase in ("first", "second", "third")]
        losses.append([epoch["loss"] for path in histories for epoch in json.loads(path.read_text())])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_a_bad_step_of_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    said = told(tmp_path, 2, program=SKIP)
    assert "second phase skipped 1 of 6, rows [16, 3, 32, 32, 0, 2], apart 0.0" in said, said
