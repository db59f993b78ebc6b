"""Edge cases of `phattn.policy`, which would crowd its page, nbs/06_policy.ipynb."""

import pytest
import torch
from test_policy import eig_by_loops

from phattn.data import digits
from phattn.data.images import normalise
from phattn.model import CONFIGS, HardAttention
from phattn.policy import EIG, View, centre_out, expected_information_gain, look, oracle, random


@torch.no_grad()
def test_eig_of_huge_logits_is_finite():
    torch.manual_seed(0)
    model = HardAttention(CONFIGS["digits"]).eval()
    h, dreams = torch.randn(3, 128), torch.randn(2, 3, 49, 32)
    model.classifier.linear.weight *= 1e4 / model.classifier(h).abs().max()
    belief = model.classifier(h).log_softmax(-1)
    assert belief.min() < -1e4 / 2
    gain = expected_information_gain(model, dreams, h, belief)
    assert gain.isfinite().all() and (gain >= 0).all()


@pytest.mark.parametrize("looks", [1, 2, 7, 49])
@pytest.mark.parametrize("policy", [random, centre_out, EIG(2), oracle])
def test_look_any_number_of_times(policy, looks):
    torch.manual_seed(0)
    model = HardAttention(CONFIGS["digits"])
    trace = look(model, 2 * torch.rand(3, 3, 32, 32) - 1, policy, looks)
    assert trace.locations.shape == (3, looks, 2) and trace.scores.shape == (3, looks - 1, 7, 7)
    assert trace.log_probs.exp().sum(-1).allclose(torch.ones(3, looks), atol=1e-5)
    assert all(len(set(places)) == looks for places in trace.candidates.tolist())
    assert torch.equal(model.grid.candidates()[trace.candidates], trace.locations)
    assert trace.seen(looks).sum((1, 2)).tolist() == [looks] * 3


def test_look_goes_to_the_best_place_not_seen():
    model = HardAttention(CONFIGS["digits"])
    wish = torch.full((49,), -1e30)
    wish[1 * 7 + 5], wish[6 * 7 + 0] = -1e29, -1e28
    trace = look(model, 2 * torch.rand(3, 32, 32) - 1, lambda view: wish[None], 4, first=torch.tensor([6 * 7]))
    assert trace.locations[0, :2].tolist() == [[24, 0], [4, 20]]
    assert len(set(trace.candidates[0].tolist())) == 4


@pytest.mark.parametrize("score", [-torch.inf, torch.nan, torch.inf, 0])
def test_no_score_leads_back_to_a_place_seen(score):
    model = HardAttention(CONFIGS["digits"])

    def same(view):
        return torch.full_like(view.seen, score, dtype=torch.float)

    trace = look(model, 2 * torch.rand(3, 32, 32) - 1, same, 49)
    assert len(set(trace.candidates[0].tolist())) == 49


def test_looking_repeats_and_leaves_no_trace_in_the_model():
    torch.manual_seed(0)
    model, images = HardAttention(CONFIGS["digits"]).train(), 2 * torch.rand(4, 3, 32, 32) - 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (look(model, images, EIG(3), generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.candidates, second.candidates) and torch.equal(first.scores, second.scores)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stopping_early_freezes_the_answer():
    torch.manual_seed(0)
    model, images = HardAttention(CONFIGS["digits"]), 2 * torch.rand(2, 3, 32, 32) - 1
    hope = iter(torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]))
    trace = look(model, images, lambda view: next(hope)[:, None].expand(2, 49), 10, stop_below=0.5)
    assert trace.looks.tolist() == [2, 4] and trace.log_probs.shape[1] == 4
    assert torch.equal(trace.log_probs[0, 1:], trace.log_probs[0, 1:2].expand(3, -1))
    assert trace.seen(4).sum((1, 2)).tolist() == [2, 4]


def test_the_largest_gain_is_looked_at():
    model, images = HardAttention.from_pretrained("digits"), digits("test", seed=0, size=20).images
    trace = look(model, images, EIG(5), 4, generator=torch.Generator().manual_seed(0))
    for t in range(3):
        scores = trace.scores[:, t].masked_fill(trace.seen(t + 1), -torch.inf).flatten(1)
        assert torch.equal(scores.argmax(-1), trace.candidates[:, t + 1])


def test_centre_out_begins_in_the_centre_and_ends_in_a_corner():
    model = HardAttention(CONFIGS["digits"])
    trace = look(model, 2 * torch.rand(1, 3, 32, 32) - 1, centre_out, 49, first=torch.tensor([24]))
    ring = (trace.candidates[0] // 7 - 3) ** 2 + (trace.candidates[0] % 7 - 3) ** 2
    assert (ring.diff() >= 0).all() and ring[-1] == 18 and ring[1] == 1


def test_oracle_takes_the_true_features():
    model, images = HardAttention.from_pretrained("digits"), normalise(digits("test", seed=0, size=3).images)
    h = model.recurrence.start(3)
    with torch.no_grad():
        belief, true = model.classifier(h).log_softmax(-1), model.map(images)[None]
        scores = oracle(View(model, h, belief, torch.zeros(3, 49, dtype=torch.bool), images))
    assert torch.allclose(scores, eig_by_loops(model, true, h, belief), atol=1e-5)


def test_bad_looks_are_refused():
    model, image = HardAttention(CONFIGS["digits"]), 2 * torch.rand(3, 32, 32) - 1
    for looks in (0, 50):
        with pytest.raises(ValueError, match=f"looks must be at .* got {looks}"):
            look(model, image, random, looks)
    with pytest.raises(ValueError, match=r"images must be B×3×32×32 for this model, got \(1, 3, 28, 28\)"):
        look(model, image[:, :28, :28])
    for first in ([49], [-1], [1.0], [True], [1, 2]):
        with pytest.raises(ValueError, match="first must hold 1 candidates from 0 to 48"):
            look(model, image, first=torch.tensor(first))
    with pytest.raises(ValueError, match=r"must return scores \(1, 49\), got \(1,\)"):
        look(model, image, lambda view: view.seen.sum(1))
    with pytest.raises(ValueError, match="samples must be at least 1"):
        EIG(0)
    with pytest.raises(TypeError, match="images must be a tensor, got ndarray"):
        look(model, image.numpy())
    with pytest.raises(TypeError, match="first must be a tensor, got list"):
        look(model, image, first=[3])
    with pytest.raises(TypeError, match="tensor of scores, got NoneType"):
        look(model, image, lambda view: None)
    with pytest.raises(ValueError, match=r"got torch.int64"):
        look(model, image.long())


def test_images_of_any_float_type_and_bytes_are_looked_at():
    model, image = HardAttention(CONFIGS["digits"]), torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    firsts = [torch.tensor([3], dtype=kind) for kind in (torch.long, torch.int32, torch.uint8, torch.int8)]
    as_float = image / 127.5 - 1
    traces = [
        look(model, given, centre_out, first=first)
        for given in (image, as_float, as_float.double())
        for first in firsts
    ]
    assert all(torch.allclose(trace.log_probs, traces[0].log_probs, atol=1e-5) for trace in traces)
    assert look(model, torch.ones(3, 32, 32), centre_out).looks.tolist() == [7]


@pytest.mark.parametrize("scale, said", [((0, 1), "as if in"), ((0, 255), "give uint8"), ((-3, 3), "give uint8")])
def test_floats_of_another_range_are_recognised(scale, said):
    low, high = scale
    image = low + (high - low) * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=said):
        look(HardAttention(CONFIGS["digits"]), image, centre_out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_types_look(dtype):
    model, scenes = HardAttention.from_pretrained("digits").to(dtype), digits("test", seed=0, size=60)
    trace = look(model, scenes.images, EIG(2), 4, generator=torch.Generator().manual_seed(0))
    assert trace.log_probs.isfinite().all() and trace.scores.isfinite().all()
    assert (trace.predictions[:, -1] == scenes.labels).float().mean() > 0.6
