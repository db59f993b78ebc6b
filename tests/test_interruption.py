"""What happens to real machines: killed processes, full disks, folders that vanish. Written by hand: it needs processes
and file systems of its own. `PHATTN_KILLS=50 pytest tests/test_interruption.py` kills more."""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import interrupt
import pytest
import torch

from phattn.engine.runs import Run
from phattn.engine.weights import load_tensors, save_tensors


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a full disk that needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mount(place: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    return bool(shutil.which("mount")) and not subprocess.run(command, capture_output=True).returncode


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mount(place, "size=12m"):
        pytest.skip("mounting a small disk is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def two_states(folder: Path) -> Run:
    run = Run(folder, {})
    for epoch in (1, 2):
        run.keep({"epoch": epoch})
    return run


def still_there(folder: Path) -> bool:
    """The last two states are whole, and nothing lies beside them."""
    states = [load_tensors(folder / name)["epoch"] for name in ("state.safetensors", "state_before.safetensors")]
    left = {path.name for path in folder.iterdir()} - {".lock"}
    return states == [2, 1] and left == {"config.json", "state.safetensors", "state_before.safetensors"}


def test_a_state_that_does_not_fit_costs_none_of_the_old(tmp_path: Path) -> None:
    with two_states(tmp_path) as run, limited(50_000):
        with pytest.raises(OSError, match=r"could not write .*state_next\.safetensors: File too large"):
            run.keep({"epoch": torch.zeros(100_000)})
        assert still_there(tmp_path) and run.state() == {"epoch": 2}


def test_a_full_disk_costs_none_of_the_old_states(disk: Path) -> None:
    with two_states(disk / "run") as run:
        with pytest.raises(OSError, match=r"could not write .*state_next\.safetensors: No space left"):
            run.keep({"epoch": torch.zeros(4_000_000)})
        assert still_there(disk / "run") and run.state() == {"epoch": 2}


def test_a_folder_that_became_read_only_is_named(disk: Path) -> None:
    with two_states(disk / "run") as run:
        pass
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match=r"could not write .*state_next\.safetensors: Read-only"):
        run.keep({"epoch": 3})
    assert still_there(disk / "run")
    for folder in (disk / "run", disk / "new"):
        with pytest.raises(OSError, match=f"could not write to {folder}: Read-only"):
            Run(folder, {}, resume=True)
    with pytest.raises(OSError, match="could not write .*Read-only"):
        save_tensors({"a": 1}, disk / "a.safetensors")


def wait_for(there: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 400  # importing TensorBoard alone takes minutes on a machine that is busy
    while not there.exists():
        assert process.poll() is None and time.monotonic() < until, f"{there} did not appear"
        time.sleep(0.02)


def one_line(output: Path) -> str:
    """The error of a process: its last line, the only one that is not of the progress bars."""
    said = output.read_text()
    assert "Traceback" not in said, said
    assert said.count("phattn: ") == 1, said
    return said.rstrip().rpartition("\n")[2]


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    record = interrupt.harness(int(os.environ.get("PHATTN_KILLS", "4")), 1, tmp_path)
    assert not record.wrong, "\n".join(record.wrong)


@pytest.mark.slow
def test_training_on_a_disk_that_fills_up_goes_on_where_there_is_room(disk: Path, tmp_path: Path) -> None:
    folder, output = disk / "run", tmp_path / "output"
    assert interrupt.start(folder, output).wait(300) == 2
    assert "No space left" in one_line(output)
    states = list(folder.rglob("state*.safetensors"))
    assert states and all(load_tensors(state)["history"] for state in states)
    subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    assert interrupt.start(folder, output).wait(300) == 0, output.read_text()
    assert (folder / "metrics.json").exists()


@pytest.mark.slow
def test_one_folder_serves_one_process_and_may_not_vanish(tmp_path: Path) -> None:
    folder, output, other = tmp_path / "run", tmp_path / "output", tmp_path / "other"
    process = interrupt.start(folder, output)
    wait_for(folder / "first" / "state.safetensors", process)
    process.send_signal(signal.SIGSTOP)
    assert interrupt.start(folder, other).wait(400) == 2
    assert "another process is writing to" in one_line(other)
    folder.rename(tmp_path / "moved")
    process.send_signal(signal.SIGCONT)
    assert process.wait(400) == 2
    assert "has vanished while training" in one_line(output) or "No such file" in one_line(output)
    assert not folder.exists()
    assert all(load_tensors(state)["history"] for state in (tmp_path / "moved").rglob("state*.safetensors"))
    assert interrupt.start(tmp_path / "moved", output).wait(300) == 0, output.read_text()
