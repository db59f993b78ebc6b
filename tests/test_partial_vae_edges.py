"""Edge cases of `phattn.partial_vae`, which would crowd its page, nbs/03_partial_vae.ipynb."""

import pytest
import torch
from test_partial_vae import _bound_and_gradient, _small_vae

from phattn.partial_vae import Decoder, NoFlow, repeat_border


def test_border_is_repeated():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert repeat_border(x)[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_decoder_sizes():
    for n in (2, 3, 6, 7, 13):
        assert Decoder(n, 4, 5, 2)(torch.randn(2, 3, 4)).shape == (2, 3, n * n, 5)
    assert Decoder(7, 4, 5, 1)(torch.randn(0, 4)).shape == (0, 49, 5)
    for n, convolutions in ((1, 6), (7, 0)):
        with pytest.raises(ValueError, match=f"n must be at least 2 and .*, got {n} and {convolutions}"):
            Decoder(n, 4, 5, convolutions)


def test_some_places_are_those_of_the_map():
    torch.manual_seed(0)
    decoder, z, places = Decoder(7, 4, 5, 2, 16), torch.randn(3, 20, 4), torch.randint(49, (20, 6))
    some, every = decoder.at(z, places), decoder(z)
    for p in range(3):
        for b in range(20):
            assert torch.allclose(some[p, b], every[p, b, places[b]], atol=1e-5)


def test_places_are_in_row_major_order():
    torch.manual_seed(0)
    decoder, z = Decoder(5, 4, 3, 2, 8), torch.randn(1, 4)
    before = decoder(z)[0]
    with torch.no_grad():
        decoder.norms[-1].weight[0, 4] += 1  # the last norm, at row 0 and column 4
    moved = (decoder(z)[0] - before).abs().sum(-1).view(5, 5) > 1e-6
    assert moved.nonzero().tolist() == [[0, 3], [0, 4], [1, 3], [1, 4]]


def test_extreme_states_stay_finite():
    vae = _small_vae()
    vae.flow = NoFlow()
    h = torch.tensor([1e4, -1e4])[:, None].expand(2, 12)
    results = _bound_and_gradient(vae, h, torch.full((2, 9, 4), 100.0), torch.ones(2, 9, dtype=torch.bool))
    assert all(result.isfinite().all() for result in results)


def test_wrong_maps_are_refused():
    vae, h = _small_vae(), torch.randn(2, 12)
    with pytest.raises(ValueError, match=r"features must be …×9×nf"):
        vae.elbo(h, torch.randn(2, 49, 4), torch.ones(2, 49, dtype=torch.bool))
    with pytest.raises(ValueError, match="seen bool"):
        vae.elbo(h, torch.randn(2, 9, 4), torch.ones(2, 9))
