"""What the benchmark measures. (That the plain implementation computes the same is tested in `test_reference.py`.)"""

import sys

import pytest
import sync

from phattn.data.scenes import digits
from phattn.model import HardAttention


@pytest.fixture
def throughput(monkeypatch):
    monkeypatch.syspath_prepend(str(sync.ROOT / "benchmarks"))
    yield __import__("throughput")
    for name in ("throughput", "rows", "plain"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_onnxruntime_is_measured_beside_torch(throughput):
    pytest.importorskip("torch", minversion="2.8")
    model, data = HardAttention.from_pretrained("digits"), digits("test", size=2)
    found = throughput.deployed(model, data, samples=1, runs=1)
    assert list(found) == ["torch", "onnxruntime", "ratio"] and min(found.values()) > 0
    assert found["ratio"] == pytest.approx(found["onnxruntime"] / found["torch"])


def test_without_onnxruntime_it_is_left_out(throughput, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert throughput.deployed(HardAttention.from_pretrained("digits"), digits("test", size=1), 1, 1) is None
    assert "there is no onnxruntime" in capsys.readouterr().err


def test_turns_are_compared_turn_by_turn(throughput):
    times = {"one": iter([1.0, 4.0, 2.0]), "other": iter([0.5, 4.0, 1.0])}  # the machine was slow in the second turn
    works = {name: lambda left=left: next(left) for name, left in times.items()}
    assert throughput.in_turn(works, images=8, runs=3) == {"one": 4.0, "other": 8.0, "ratio": 2.0}


@pytest.mark.slow
def test_two_checkouts_are_timed_in_the_same_run(throughput):
    given = ["--widths=digits", "--batch=2", "--runs=1", f"--against={sync.ROOT}", "--rows", "look1", "--cpu-time"]
    options = throughput.parse([*given, "--columns", "plain", "ours"])
    found = throughput.measure(options)
    assert list(found) == ["look1"] and list(found["look1"]) == ["plain", "before", "ours", "ratio"]
    assert min(found["look1"].values()) > 0 and "digits widths" in throughput.table(found, options)
