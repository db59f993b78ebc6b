"""The plain implementation that the benchmark compares with computes the same numbers, and onnxruntime is measured."""

import sys

import pytest
import sync
import torch

from phattn.data.scenes import digits
from phattn.model import CONFIGS, HardAttention
from phattn.policy import expected_information_gain


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.syspath_prepend(str(sync.ROOT / "benchmarks"))
    yield __import__("plain")
    sys.modules.pop("plain", None)


@pytest.fixture
def throughput(plain):
    yield __import__("throughput")
    sys.modules.pop("throughput", None)


@torch.no_grad()
def test_plain_computes_the_same(plain):
    torch.manual_seed(0)
    model = HardAttention(CONFIGS["digits"]).eval()
    for parameter in model.vae.flow.parameters():  # a fresh flow is nearly the identity
        parameter += 0.2 * torch.randn_like(parameter)
    theirs, h = plain.Plain(model), torch.randn(5, 128)
    features, seen = torch.randn(5, 49, 32), torch.rand(5, 49) < 0.3

    torch.manual_seed(1)
    bound = theirs.bound(h, features.transpose(1, 2).reshape(5, 32, 7, 7), seen.float().view(5, 7, 7))
    gain = theirs.gain(h, 7)
    torch.manual_seed(1)
    ours = model.vae.elbo(h, features, seen).loss.mean() / model.config.latent
    assert torch.allclose(bound, ours, atol=1e-4)
    belief = model.classifier(h).log_softmax(-1)
    assert torch.allclose(gain, expected_information_gain(model, model.vae.imagine(h, 7), h, belief), atol=1e-5)


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
