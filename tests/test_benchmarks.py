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
    sys.modules.pop("throughput", None)


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
