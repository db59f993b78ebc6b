"""The networks, the losses with their gradients, and the look equal a second implementation for the same draws.

The second implementation is `benchmarks/plain.py`, written from the equations. Everything is compared in float64, on
small models whose every parameter and statistic is moved off its start.
"""

import inspect
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import sync
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from phattn.data.images import ImageSet, normalise
from phattn.evaluation import cost, evaluate, looking_cost, measure, predict, see_everything, stop_early, summary
from phattn.flows import ConditionalFlow
from phattn.glimpse import GlimpseNetwork
from phattn.model import CONFIGS, HardAttention, ModelConfig
from phattn.partial_vae import Decoder, Encoder, PartialVAE
from phattn.policy import EIG, POLICIES, View, expected_information_gain, look, oracle
from phattn.recurrence import Classifier
from phattn.training import LOSSES, Recipe, prepare, recipe, train_phase

CLOSE = dict(rtol=1e-9, atol=1e-10)
# image, glimpse, stride, channels: 5×5 places; 4×4; and 3×3 of grey glimpses whose stride is not half a side
GEOMETRIES = [(24, 8, None, 3), (20, 8, None, 3), (14, 10, 2, 1)]
BATCH, LOOKS = 4, 4
normal = partial(torch.randn, dtype=torch.float64)


class Recorder(TorchFunctionMode):
    """Keeps what torch draws, by the function that drew it."""

    def __init__(self):
        super().__init__()
        self.draws: dict[str, list[Tensor]] = defaultdict(list)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like):
            self.draws[function.__name__].append(result.double() if result.is_floating_point() else result)
        return result


@pytest.fixture(scope="module")
def plain():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(sync.ROOT / "benchmarks"))
        yield __import__("plain")


@pytest.fixture(params=GEOMETRIES, ids=str)
def model(request) -> HardAttention:
    image, glimpse, stride, channels = request.param
    torch.manual_seed(0)
    sizes = dict(classes=3, image=image, glimpse=glimpse, stride=stride, in_channels=channels, channels=(4, 5))
    sizes |= dict(features=6, latent=4, hidden=7, flow_layers=2, decoder_convolutions=2, dropout=0.0)
    made = HardAttention(ModelConfig(**sizes)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for name, value in made.named_buffers():
            if "running" in name:
                value.copy_(0.5 + torch.rand_like(value) if "var" in name else 0.3 * torch.randn_like(value))
    return made.eval()


@pytest.fixture
def reference(plain, model):
    """With tensors of its own."""
    learning = {name for name, _ in model.named_parameters()}
    copies = {name: value.clone().requires_grad_(name in learning) for name, value in model.state_dict().items()}
    return plain.Reference(copies, model.config.image)


def batch(model: HardAttention) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    side = model.config.image
    return torch.rand(BATCH, model.config.in_channels, side, side).double() * 2 - 1, torch.tensor([0, 1, 2, 1])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)


def same_gradients(model, reference, ours: Tensor, theirs: Tensor, learning: list) -> None:
    """The two losses agree, and so do the gradients of all parameters; those that learn have one."""
    close(ours.detach(), theirs.detach())
    ours.backward()
    theirs.backward()
    learning = {id(parameter) for parameter in learning}
    for name, parameter in model.named_parameters():
        expected = reference.tensors[name].grad
        if id(parameter) in learning:
            assert expected.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad, expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert parameter.grad is None, name


def test_features(model, reference):
    images, _ = batch(model)
    locations = model.grid.random_locations(BATCH, LOOKS)
    c = model.glimpse.see(images, locations)
    for number, image in enumerate(images):
        for t, (row, column) in enumerate(locations[number].tolist()):
            glimpse = reference.cut(image, row, column)[None]
            close(c[number, t], reference.cnn(glimpse)[0, :, 0, 0])
            expected = reference.features(c[number, t, None], locations[number, t])[0]
            close(model.glimpse.at(c, locations)[number, t], expected)


def test_features_of_the_whole_map(model, reference):
    images, _ = batch(model)
    c = model.map(images)
    for number, image in enumerate(images):
        for place in range(model.grid.count):
            glimpse = reference.cut(image, *reference.location(place))[None]
            close(c[number, place], reference.cnn(glimpse)[0, :, 0, 0])


def test_update_and_answer(model, reference):
    f, h = normal(5, 6), normal(5, 7)
    close(model.recurrence(f, h), reference.update(f, h))
    close(model.classifier(h).log_softmax(-1), reference.classify(h))


def test_flow_and_its_log_determinant(model, reference):
    x, a = 3 * normal(50, 4), normal(50, 6)
    with Recorder():
        z, log_det = model.vae.flow(x, a)
    expected, expected_log_det = reference.flow(x, a)
    assert 0 < (expected.abs() > 5).sum() < expected.numel() / 2  # some in the tails
    close(z, expected)
    close(log_det, expected_log_det)
    for k in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda row, k=k: model.vae.flow(row, a[k])[0], x[k])
        close(log_det[k], jacobian.det().abs().log())


def test_samples(model, reference):
    h = normal(5, 7)
    with Recorder() as recorder:
        z, log_q = model.vae.sample(h, 3)
    (draws,) = recorder.draws["randn"]
    for k in range(3):
        expected, expected_log_q = reference.sample(h, draws[k])
        close(z[k], expected)
        close(log_q[k], expected_log_q)
    with Recorder():
        close(model.vae.log_prob(z, h), log_q)


def test_imagination(model, reference, monkeypatch):
    z = normal(5, 4)
    expected = reference.decode(z).flatten(2).transpose(1, 2)
    close(model.vae.decoder(z), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    close(model.vae.decoder(z), expected)


def test_bound(model, reference):
    h, features = normal(BATCH, 7), normal(BATCH, model.grid.count, 6)
    seen = torch.rand(BATCH, model.grid.count) < 0.3
    with Recorder() as recorder:
        elbo = model.vae.elbo(h, features, seen, samples=2)
    (draws,) = recorder.draws["randn"]
    for k in range(2):
        for number in range(BATCH):
            places = seen[number].nonzero()[:, 0].tolist()
            known = [(place, features[number, place, None]) for place in places]
            close(elbo.loss[k, number], reference.bound(h[number, None], draws[k, number], known))


def test_gain(model, reference):
    h = normal(BATCH, 7)
    with Recorder() as recorder:
        features = model.vae.imagine(h, 5)
        gain = expected_information_gain(model, features, h, model.classifier(h).log_softmax(-1))
    (draws,) = recorder.draws["randn"]
    for number in range(BATCH):
        close(gain[number], reference.gain(h[number, None], draws[:, number]))


def test_look_ahead(model, reference):
    h, features = normal(BATCH, 7), normal(2, BATCH, model.grid.count, 6)
    would = model.look_ahead(features, h).log_softmax(-1)
    for k in range(2):
        for number in range(BATCH):
            dream = features[k, number].T.view(1, 6, model.grid.n, model.grid.n)
            close(would[k, number], reference.ahead(dream, h[number, None]))


def test_oracle(model, reference):
    (images, _), h = batch(model), normal(BATCH, 7)
    now = model.classifier(h).log_softmax(-1)
    seen = torch.zeros(BATCH, model.grid.count, dtype=torch.bool)
    scores = oracle(View(model, h, now, seen, images))
    for number in range(BATCH):
        would = reference.ahead(reference.cnn(images[number, None]), h[number, None])
        close(scores[number], (would.exp() * (would - now[number])).sum(-1))


def test_first_loss(model, reference):
    images, labels = batch(model)
    learning = prepare(model, "first")
    with Recorder() as recorder:
        loss, log = LOSSES["first"](model, images, labels, Recipe(phase="first", epochs=1, looks=30))
    (locations,) = recorder.draws["randint"]
    last = model.config.image - model.config.glimpse
    assert all(set(part.tolist()) == set(range(last + 1)) for part in locations.flatten(0, 1).T)  # any pixel
    same_gradients(model, reference, loss, reference.first(images, labels, locations), learning)
    right = model(images, locations).argmax(-1) == labels[:, None]  # the statistics of a batch are used again
    assert log["cross-entropy"] == loss.detach() and torch.equal(log["accuracy"], right.float().mean(0))


@pytest.mark.parametrize("elbo_steps", [None, 2])
def test_second_loss(model, reference, elbo_steps):
    images, labels = batch(model)
    learning = prepare(model, "second")
    with Recorder() as recorder:
        loss, log = LOSSES["second"](
            model, images, labels, Recipe(phase="second", epochs=1, looks=LOOKS, elbo_steps=elbo_steps)
        )
    (order,), (steps,), (draws,) = (recorder.draws[name] for name in ("rand", "randperm", "randn"))
    assert order.shape == (BATCH, model.grid.count) and set(steps.tolist()) == set(range(LOOKS))
    places, steps = order.argsort(descending=True)[:, :LOOKS], steps[:elbo_steps].tolist()
    expected = reference.second(images, places, steps, draws.view(BATCH, len(steps), -1))
    same_gradients(model, reference, loss, expected, learning)
    close(log["bound"], -loss.detach())
    close(log["log_prior"] + log["log_likelihood"] - log["log_posterior"], log["bound"])


@pytest.mark.parametrize("elbo_steps", [None, 2])
def test_third_loss(model, reference, elbo_steps):
    images, labels = batch(model)
    learning = prepare(model, "third")
    with Recorder() as recorder:
        loss, log = LOSSES["third"](
            model, images, labels, Recipe(phase="third", epochs=1, looks=LOOKS, elbo_steps=elbo_steps, ccebal=16.0)
        )
    (places,), (steps,), (*choosing, draws) = (recorder.draws[name] for name in ("randint", "randperm", "randn"))
    assert set(steps.tolist()) == set(range(LOOKS))
    steps = steps[:elbo_steps].tolist()
    choosing = torch.stack([one.view(BATCH, -1) for one in choosing], 1)
    expected = reference.third(images, labels, places, choosing, steps, draws.view(BATCH, len(steps), -1), ccebal=16.0)
    same_gradients(model, reference, loss, expected, learning)
    close(16.0 * log["cross-entropy"] - log["bound"], loss.detach())
    assert log["accuracy"].shape == (LOOKS,)


def test_look(model, reference):
    images, _ = batch(model)
    with Recorder() as recorder:
        trace = look(model, images, EIG(3), LOOKS)
    (places,), choosing = recorder.draws["randint"], recorder.draws["randn"]
    expected, log_probs, gains = reference.look(images, places, torch.stack(choosing, 1).permute(2, 1, 0, 3))
    assert torch.equal(trace.candidates, expected)
    close(trace.log_probs, log_probs)
    close(trace.scores.flatten(2), gains)
    close(trace.entropy, -(log_probs.exp() * log_probs).sum(-1))
    again = look(model, images, EIG(3), LOOKS, first=places)
    assert torch.equal(again.candidates[:, 0], places) and torch.equal(again.log_probs[:, 0], trace.log_probs[:, 0])


def test_draws_come_from_the_generator_that_is_given(model):
    h, (images, _) = normal(BATCH, 7), batch(model)
    features, seen = normal(BATCH, model.grid.count, 6), torch.ones(BATCH, model.grid.count, dtype=torch.bool)
    draws = [
        lambda generator: model.grid.random_locations(BATCH, LOOKS, generator),
        lambda generator: model.grid.random_candidates(BATCH, LOOKS, generator),
        lambda generator: model.vae.sample(h, 2, generator)[0],
        lambda generator: model.vae.imagine(h, 2, generator),
        lambda generator: model.vae.elbo(h, features, seen, 2, generator).loss,
        lambda generator: model.vae.importance_weighted(h, features, seen, 2, generator),
        lambda generator: look(model, images, EIG(2), 2, generator=generator).scores,
        lambda generator: look(model, images, POLICIES["random"], LOOKS, generator=generator).candidates,
    ]
    for draw in draws:
        once, again, other = (draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(once, again) and not torch.equal(once, other)


def test_first_looks_are_anywhere(model):
    images, labels = (part.repeat_interleave(100, 0) for part in batch(model))
    with Recorder() as recorder:
        LOSSES["third"](model, images, labels, Recipe(phase="third", epochs=1, looks=1))
        look(model, images, EIG(1), 1)
    for places in recorder.draws["randint"]:
        counts = places.bincount(minlength=model.grid.count)
        assert len(counts) == model.grid.count and counts.min() > 0


def test_plain_computes_the_same_a_batch_at_a_time(plain, model, reference):
    images, labels = batch(model)
    theirs = plain.Plain(model)
    with Recorder() as recorder:
        loss = theirs.first(images, labels, 1)  # later looks are normalised apart
    close(loss, reference.first(images, labels, recorder.draws["randint"][0][:, None]))

    with Recorder() as recorder:
        loss = theirs.second(images, labels, LOOKS)
    (order,), draws = recorder.draws["rand"], torch.stack(recorder.draws["randn"], 1)
    close(loss, reference.second(images, order.argsort()[:, :LOOKS], range(LOOKS), draws))

    with Recorder() as recorder:
        loss = theirs.third(images, labels, LOOKS, ccebal=16.0)
    (places,), draws = recorder.draws["randint"], torch.stack(recorder.draws["randn"], 1)
    bounds, choosing = draws[:, ::2], draws[:, 1::2]  # in turn
    close(loss, reference.third(images, labels, places, choosing, range(LOOKS), bounds, ccebal=16.0))

    with Recorder() as recorder:
        h = theirs.look(images, LOOKS, 3)
    (places,), draws = recorder.draws["randint"], torch.stack(recorder.draws["randn"], 1)
    choosing = draws.view(3, BATCH, LOOKS - 1, -1).permute(1, 2, 0, 3)
    close(theirs.classify(h), reference.look(images, places, choosing)[1][:, -1])


@pytest.mark.parametrize("phase, drops", [("first", True), ("second", False), ("third", True)])
def test_the_answer_drops_channels_in_training(phase, drops):
    torch.manual_seed(0)
    model = HardAttention(ModelConfig(hidden=400, classes=50, features=4, latent=4, channels=(4,), dropout=0.3))
    prepare(model.eval(), phase)
    assert model.training and model.vae.training
    with torch.no_grad():
        model.classifier.linear.weight.fill_(1 / 400)
        kept = model.classifier(torch.ones(100, 400)) - model.classifier.linear.bias
    assert kept.mean().item() == pytest.approx(1, abs=0.02)
    assert kept[:, 0].std().item() == pytest.approx((0.3 / 0.7 / 400) ** 0.5 if drops else 0, abs=0.01)


@pytest.mark.parametrize("phase", ["first", "third"])
def test_losses_drop_channels(model, phase):
    images, labels = batch(model)
    prepare(model, phase)
    losses = []
    for model.classifier.dropout.p in (0.0, 0.5):
        torch.manual_seed(0)
        losses.append(LOSSES[phase](model, images, labels, Recipe(phase=phase, epochs=1, looks=1))[1]["cross-entropy"])
    assert losses[0] != losses[1]


def test_second_phase_starts_the_flow(model):
    model.float()  # as images are when they are trained with
    side = model.config.image
    images = torch.randint(256, (256, model.config.in_channels, side, side), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(256) % 3, tuple("abc"))
    places = model.grid.candidates()[model.grid.random_candidates(256, LOOKS)]
    found, weights = [], {name: value.clone() for name, value in model.named_parameters() if "flow.norms" not in name}
    for norm in model.vae.flow.norms:
        norm.register_forward_hook(lambda module, given, result: found.append(result[0].flatten(0, -2)))

    def outputs() -> list[Tensor]:
        model.eval()
        h = model.follow(model.glimpse.see(normalise(images), places), places)
        found.clear()
        with torch.no_grad():
            model.vae.sample(h, 4)
        return [torch.stack([y.mean(0).abs().max(), y.std(0).log().abs().max()]) for y in found]

    assert all(off.max() > 1 for off in outputs())
    state = torch.get_rng_state()
    train_phase(model, data, Recipe(phase="second", epochs=1, batch=128, looks=LOOKS, lr=1e-30))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(off.max() < 0.5 for off in outputs())
    assert all(norm.started for norm in model.vae.flow.norms)
    assert all(torch.equal(weights[name], value) for name, value in model.named_parameters() if name in weights)


def test_measures_by_hand():
    torch.manual_seed(0)
    log_probs, labels = torch.randn(300, 2, 4).mul(2).log_softmax(-1), torch.randint(4, (300,))
    found = measure(log_probs, labels)
    numbers = [value for values in (found | stop_early(log_probs, labels)).values() for value in values]
    assert all(type(value) is float for value in numbers)
    for t in range(2):
        right, surprise, bins = 0, 0.0, [[] for _ in range(15)]
        for beliefs, label in zip(log_probs[:, t].tolist(), labels.tolist()):
            answer = beliefs.index(max(beliefs))
            confidence = math.exp(beliefs[answer])
            right += answer == label
            surprise -= beliefs[label]
            bins[math.ceil(15 * confidence) - 1].append((answer == label) - confidence)
        assert found["accuracy"][t] == pytest.approx(right / 300)
        assert found["nll"][t] == pytest.approx(surprise / 300)
        assert found["ece"][t] == pytest.approx(sum(abs(sum(gaps)) for gaps in bins) / 300)


def test_everything_is_seen_once(model):
    model.float()
    side = model.config.image
    images = torch.randint(256, (6, model.config.in_channels, side, side), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(6) % 3, tuple("abc"))
    found, again = see_everything(model, data, seeds=(0, 1), batch=4), see_everything(model, data, seeds=(2,), batch=4)
    assert set(found) == {"accuracy", "nll", "ece", "stopped looks", "stopped accuracy"}
    assert 0 <= found["accuracy"] <= 1 and found["stopped looks"] == model.grid.count  # of those that never stop
    assert found["nll"] != again["nll"]  # another order


def test_summary_has_a_row_for_each_policy():
    lines = summary({"eig": {"accuracy": [0.25, 0.5]}, "random": {"accuracy": [0.125, 1.0]}}).split("\n")
    assert [line.split() for line in lines] == [
        ["accuracy,", "%", "t", "=", "1", "t", "=", "2"], ["eig", "25.0", "50.0"], ["random", "12.5", "100.0"]
    ]


@pytest.mark.parametrize(
    "name, classes, image, glimpse, features, latent, hidden, layers",
    [
        ("svhn", 10, 32, 8, 128, 256, 512, 4),
        ("cifar10", 10, 32, 8, 128, 256, 512, 4),
        ("cinic10", 10, 32, 8, 128, 256, 512, 4),
        ("cifar100", 100, 32, 8, 512, 1024, 2048, 6),
        ("tinyimagenet", 200, 64, 16, 512, 1024, 2048, 6),
    ],
)
def test_sizes_of_the_paper(name, classes, image, glimpse, features, latent, hidden, layers):
    sizes = dict(classes=classes, image=image, glimpse=glimpse, features=features, latent=latent, hidden=hidden)
    rest = dict(flow_layers=layers, channels=(64, 128, 256), bins=5, decoder_convolutions=6, dropout=0.5, in_channels=3)
    assert CONFIGS[name] == ModelConfig(**sizes, **rest)
    assert CONFIGS[name].grid.count == 49 and CONFIGS[name].grid.stride == glimpse // 2
    with torch.device("meta"):
        model = HardAttention(CONFIGS[name])
    widths = [layer.out_channels for layer in model.glimpse.cnn.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [64, 128, 256, *[256] * (glimpse // 2 - 4), features]
    assert [norm.normalized_shape[0] for norm in model.vae.decoder.norms] == [3, 5, 7, 7, 7, 7, 7, 7]
    assert len(model.vae.flow.splines) == layers and model.vae.flow.splines[0].network.outputs == 3 * 5 - 1


def test_parts_are_by_themselves_as_in_the_paper():
    with torch.device("meta"):
        model = HardAttention(CONFIGS["cifar10"])
        parts = dict(
            glimpse=GlimpseNetwork(model.grid),
            classifier=Classifier(512, 10),
            vae=PartialVAE(Encoder(512, 128, 256), ConditionalFlow(256, 128, 4), Decoder(7, 256, 128)),
        )
    for name, part in parts.items():
        usual = getattr(model, name)
        assert repr(part) == repr(usual)
        assert {key: value.shape for key, value in part.state_dict().items()} == {
            key: value.shape for key, value in usual.state_dict().items()
        }
    assert {layer.bound for layer in model.vae.flow.splines} == {5.0}


def test_looking_is_by_itself_as_in_the_paper():
    assert EIG() == POLICIES["eig"] == EIG(20)
    for function in (look, predict, evaluate, cost, looking_cost):
        assert inspect.signature(function).parameters["looks"].default == 7
    assert inspect.signature(look).parameters["policy"].default == EIG(20)
    assert all(inspect.signature(one).parameters["seeds"].default == (0,) for one in (evaluate, see_everything))


def test_recipes_of_the_paper():
    for phase, epochs, ccebal in (("first", 1000, 1), ("second", 100, 1), ("third", 100, 16)):
        found = recipe("svhn", phase)
        assert (found.epochs, found.lr, found.batch, found.looks, found.schedule) == (epochs, 1e-3, 64, 7, "plateau")
        assert (found.elbo_steps, found.augment, found.bf16, found.compile) == (None, False, False, False)
        assert found.ccebal == ccebal and recipe("cifar10", phase) == replace(found, augment=True)
