"""Edge cases of `phattn.glimpse`, which would crowd its page, nbs/01_glimpse.ipynb."""

import pytest
import torch

from phattn.glimpse import GlimpseNetwork, Grid, sense


@torch.no_grad()
def test_place_reaches_the_features():
    torch.manual_seed(0)
    network = GlimpseNetwork(Grid(32, 8), (8,), 16).eval()
    c = torch.randn(1, 16)
    here, swapped = (network.at(c, torch.tensor([place])) for place in [[3, 20], [20, 3]])
    assert (here - swapped).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_grey_images_and_other_types(dtype):
    torch.manual_seed(0)
    network, places = GlimpseNetwork(Grid(32, 8), (8,), 16, in_channels=1).eval(), torch.tensor([[[3, 20], [0, 24]]])
    image = torch.randn(1, 1, 32, 32)
    f = network(image, places)
    other = network.to(dtype)(image.to(dtype), places)
    assert other.dtype == dtype and torch.allclose(f, other.float(), atol=0.1)
    assert network(image[:0].to(dtype), places[:0]).shape == (0, 2, 16)


def test_bad_geometry_is_refused():
    with pytest.raises(ValueError, match="glimpse must be an even number from 4 to image = 32"):
        Grid(32, 33)
    for glimpse in (2, 7, 34):
        with pytest.raises(ValueError, match=f"glimpse must be an even number.* got {glimpse}"):
            Grid(32, glimpse)
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"stride must be from 1 to glimpse = 8, got {stride}"):
            Grid(32, 8, stride)
    for channels in ((), (8, 8, 8, 8)):
        with pytest.raises(ValueError, match="channels must list 1 to 3"):
            GlimpseNetwork(Grid(32, 8), channels)
    image = torch.zeros(1, 3, 32, 32)
    for place in ([0, 25], [25, 0], [-1, 0], [0, -1]):
        with pytest.raises(ValueError, match=r"from \(0, 0\) to \(24, 24\)"):
            sense(image, torch.tensor([[place]]), 8)
    with pytest.raises(ValueError, match="locations B×T×2"):
        sense(image, torch.zeros(1, 2), 8)
