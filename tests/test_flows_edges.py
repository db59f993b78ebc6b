"""Edge cases of `phattn.flows`, which would crowd its page, nbs/04_flows.ipynb."""

import math

import pytest
import torch
from test_flows import random_flow, randomise
from torch.autograd.functional import jacobian

from phattn.flows import ConditionalFlow, SplineLayer, spline_parameters


def test_splines_stay_in_float32_under_autocast():
    layer = randomise(SplineLayer(6, 4)).float()
    torch.manual_seed(0)
    x, a = torch.randn(6), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        y, logdet = layer(x, a)
        j = jacobian(lambda x: layer(x, a)[0], x)
    assert y.dtype == logdet.dtype == torch.float32
    assert (j.triu(1) == 0).all()
    assert (j.diagonal().log().sum() - logdet).abs() < 1e-3


def test_save_and_load_give_the_same_numbers():
    flow = random_flow(4, 8, 2)
    torch.manual_seed(0)
    fresh = ConditionalFlow(4, 8, 2).double()
    fresh.load_state_dict(flow.state_dict())
    x, a = torch.randn(16, 4).double(), torch.randn(16, 8).double()
    fresh.start(100 * x, a)
    assert all(torch.equal(p, q) for p, q in zip(flow(x, a), fresh(x, a), strict=True))
    assert not any(name.endswith(".mask") for name in flow.state_dict())


@pytest.mark.slow
def test_compiles_into_one_graph():
    flow = random_flow(8, 4, 2)
    x, a = torch.randn(16, 8).double(), torch.randn(16, 4).double()
    compiled = torch.compile(flow, fullgraph=True, backend="eager")
    for ours, theirs in zip(flow(x, a), compiled(x, a), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "name, value",
    [
        ("dims", 0),
        ("context", 0),
        ("layers", 0),
        ("bins", 1),
        ("bins", 501),
        ("bound", -1.0),
        ("bound", math.inf),
        ("dims", 2.5),
    ],
)
def test_bad_sizes_are_named(name, value):
    sizes = {"dims": 4, "context": 8, "layers": 1} | {name: value}
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be .* got {value}"):
        ConditionalFlow(**sizes)


def test_bad_inputs_are_named():
    flow = ConditionalFlow(4, 8, 1)
    for run in (flow, flow.inverse, flow.start):
        with pytest.raises(ValueError, match="^x has shape"):
            run(torch.zeros(3, 5), torch.zeros(3, 8))
        with pytest.raises(ValueError, match="^context has shape"):
            run(torch.zeros(3, 4), torch.zeros(3, 7))
    for bad in (torch.zeros(1, 4), torch.full((3, 4), torch.nan)):
        with pytest.raises(ValueError, match="start"):
            flow.start(bad, torch.zeros(len(bad), 8))
    with pytest.raises(ValueError, match="3K-1"):
        spline_parameters(torch.zeros(13), 5.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_flows_of_half_precision_stay_near(dtype):
    flow = random_flow(6, 8, 2, 0.3, dtype=torch.float32)
    torch.manual_seed(0)
    x, a = torch.randn(20, 6), torch.randn(20, 8)
    exact = flow(x, a)[0]
    z, logdet = flow.to(dtype)(x.to(dtype), a.to(dtype))
    assert z.dtype == logdet.dtype == torch.float32 and (z - exact).abs().mean() < 0.05


def test_limits_of_sizes_are_limits():
    with pytest.raises(ValueError, match="K from 2 to 500"):
        spline_parameters(torch.zeros(3 * 501 - 1), 5.0)
    with pytest.raises(ValueError, match="bound must be at most 1000"):
        SplineLayer(2, 2, bound=1001.0)
