"""Edge cases of `phattn.model`, which would crowd its page, nbs/05_model.ipynb."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from phattn import __version__
from phattn.data import digits, normalise
from phattn.engine.weights import save_weights
from phattn.model import CONFIGS, HardAttention, ModelConfig, own_parts
from phattn.partial_vae import NoFlow


def test_saved_model_gives_the_same_numbers(tmp_path):
    torch.manual_seed(0)
    model = HardAttention(CONFIGS["digits"])
    model(torch.randn(8, 3, 32, 32), torch.zeros(8, 2, 2).long())
    model.vae.start(torch.randn(64, 128))
    model.save(tmp_path / "model.safetensors")
    again, model = HardAttention.load(tmp_path / "model.safetensors"), model.eval()
    images, locations = torch.randn(2, 3, 32, 32), model.grid.random_locations(2, 5)
    assert torch.equal(model(images, locations), again(images, locations)) and not again.training
    h, generator = torch.randn(2, 128), torch.Generator()
    dreams = [m.vae.imagine(h, 3, generator.manual_seed(0)) for m in (model, again)]
    assert torch.equal(*dreams)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_what_is_said_about_a_model_is_text_and_up_to_date(tmp_path):
    model = HardAttention(CONFIGS["digits"])
    model.about = {"version": "0.1.0", "dataset": "digits"}
    model.save(tmp_path / "a.safetensors", epochs=3)
    about = HardAttention.load(tmp_path / "a.safetensors").about
    assert about == {"version": __version__, "dataset": "digits", "epochs": "3"}
    with pytest.raises(ValueError, match="about can't hold 'config'"):
        model.save(tmp_path / "b.safetensors", config=1)


class Gated(nn.Module):
    """A GRU cell as R."""

    def __init__(self, features, hidden):
        super().__init__()
        self.cell = nn.GRUCell(features, hidden)

    def start(self, batch):
        return self.cell.weight_hh.new_zeros(batch, self.cell.hidden_size)

    def forward(self, f, h):
        lead = torch.broadcast_shapes(f.shape[:-1], h.shape[:-1])
        f, h = (x.expand(*lead, -1) for x in (f, h))
        return self.cell(f.flatten(0, -2), h.flatten(0, -2)).unflatten(0, lead)


def test_own_parts_are_saved_by_name_and_asked_for(tmp_path):
    torch.manual_seed(0)
    parts = dict(recurrence=Gated(32, 128), classifier=nn.Sequential(nn.Linear(128, 9), nn.ReLU(), nn.Linear(9, 10)))
    model, path = HardAttention(CONFIGS["digits"], **parts).eval(), tmp_path / "own.safetensors"
    assert model.recurrence is parts["recurrence"] and set(own_parts(model)) == {"recurrence", "classifier"}
    model.save(path)
    with pytest.raises(ValueError, match=r"recurrence \(.*Gated\), classifier .*: give them, as recurrence="):
        HardAttention.load(path)
    anew = dict(recurrence=Gated(32, 128), classifier=nn.Sequential(nn.Linear(128, 9), nn.ReLU(), nn.Linear(9, 10)))
    again, images, places = HardAttention.load(path, **anew), torch.randn(2, 3, 32, 32), torch.zeros(2, 3, 2).long()
    assert torch.equal(again(images, places), model(images, places)) and again.recurrence is anew["recurrence"]
    with pytest.raises(ValueError, match="classifier is the user's own"):
        HardAttention.load(path, classes=3, **anew)
    with pytest.raises(ValueError, match="a part must be one of glimpse, .* got 'clasifier'"):
        HardAttention.load(path, clasifier=None)
    with pytest.raises(TypeError, match="classifier must be a module, got function"):
        HardAttention(CONFIGS["digits"], classifier=lambda h: h)
    with pytest.raises(TypeError, match="names must be a tuple of str, got 'abc'"):
        HardAttention.from_pretrained("digits", names="abc")


def test_changed_insides_make_a_part_ones_own():
    assert own_parts(HardAttention(CONFIGS["digits"])) == {}
    model = HardAttention(CONFIGS["digits"])
    model.glimpse.cnn[0][1] = nn.Tanh()
    assert set(own_parts(model)) == {"glimpse"}
    model.vae.flow = NoFlow()
    model.classifier.linear = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 10))
    assert set(own_parts(model)) == {"glimpse", "vae", "classifier"}


class Watched(HardAttention):
    """A subclass."""


def test_subclasses_load_as_themselves(tmp_path):
    assert type(Watched.from_pretrained("digits")) is Watched
    Watched(CONFIGS["digits"]).save(tmp_path / "w.safetensors")
    assert type(Watched.load(tmp_path / "w.safetensors")) is Watched


def test_other_classes_keep_all_but_the_classifier():
    ten, three = HardAttention.from_pretrained("digits"), HardAttention.from_pretrained("digits", classes=3)
    assert three.config.classes == 3 and three.config.names == () and three.about["dataset"] == "digits"
    assert "untrained" in three.about["classes"]
    assert HardAttention.from_pretrained("digits", classes=10).config.names == tuple("0123456789")
    for name, value in three.state_dict().items():
        same = name in ten.state_dict() and torch.equal(value, ten.state_dict()[name])
        assert same != name.startswith("classifier.")
    assert three(torch.randn(1, 3, 32, 32), torch.zeros(1, 2, 2).long()).shape == (1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_other_float_types(dtype):
    model = HardAttention.from_pretrained("digits")
    images, places = normalise(digits("test", seed=0, size=8).images), model.grid.random_locations(8, 4)
    exact, other = model(images, places), model.to(dtype)(images.to(dtype), places)
    assert model.dtype == other.dtype == dtype
    assert (exact.log_softmax(-1) - other.float().log_softmax(-1)).abs().max() < (1e-3 if dtype == torch.float64 else 1)
    h = model.recurrence.start(2)
    assert model.look_ahead(model.vae.imagine(h, 3).to(dtype), h).isfinite().all()


@pytest.mark.slow
def test_forward_compiles_into_one_graph():
    model, images = HardAttention.from_pretrained("digits"), torch.randn(4, 3, 32, 32)
    places = model.grid.random_locations(4, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images, places), model(images, places), atol=1e-4)


def test_bad_files_are_refused(tmp_path):
    path, model = tmp_path / "bad.safetensors", HardAttention(CONFIGS["digits"])
    with pytest.raises(FileNotFoundError, match="no model file at"):
        HardAttention.load(path)
    path.write_bytes(b"\x80\x04not safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        HardAttention.load(path)
    save_weights(model.state_dict(), path, {"config": {"clases": 10}})
    with pytest.raises(ValueError, match="unknown sizes"):
        HardAttention.load(path)
    save_weights(model.state_dict(), path, {"config": {"classes": 10}})
    with pytest.raises(ValueError, match="does not fit the model"):
        HardAttention.load(path)
    with pytest.raises(ValueError, match="no pretrained model 'imagenet'"):
        HardAttention.from_pretrained("imagenet")


def test_bad_sizes_are_refused():
    for dropout in (1.5, -0.1):
        with pytest.raises(ValueError, match=f"dropout must be at .* got {dropout}"):
            ModelConfig(dropout=dropout)
    with pytest.raises(ValueError, match="latent must be at least 1"):
        ModelConfig(latent=0)
    with pytest.raises(ValueError, match="nothing to choose"):
        ModelConfig(image=32, glimpse=32)
    with pytest.raises(ValueError, match="hidden must be at most 16384"):
        ModelConfig(hidden=2**40)
    with pytest.raises(ValueError, match="flow_layers must be at least 0"):
        ModelConfig(flow_layers=-1)
    with pytest.raises(ValueError, match="names must list all 10 classes or none, got 1"):
        ModelConfig(names=("a",))
    with pytest.raises(ValueError, match="image = 30 leaves 2 pixels .* 28 and 32 fit"):
        ModelConfig(image=30)
    with pytest.raises(TypeError, match="classes must be an int, got 10.0"):
        ModelConfig(classes=10.0)
    with pytest.raises(TypeError, match="channels must be a tuple of int, got '64'"):
        ModelConfig(channels="64")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_configuration_fits_together(name):
    with torch.device("meta"):
        model = HardAttention(CONFIGS[name])
        shape = (2, 3, model.config.image, model.config.image)
        assert model(torch.empty(shape), torch.zeros(2, 3, 2, dtype=torch.long)).shape == (2, 3, model.config.classes)
        context, mean, _ = model.vae.encoder(torch.empty(2, model.config.hidden))
        assert (context.shape[-1], mean.shape[-1]) == (model.config.features, model.config.latent)
        assert model.vae.decoder(mean).shape == (2, 49, model.config.features)
        assert len(model.vae.flow.norms) == model.config.flow_layers


def test_no_flow_is_none():
    assert isinstance(HardAttention(replace(CONFIGS["digits"], flow_layers=0)).vae.flow, NoFlow)


def test_no_more_flow_layers_than_any_use():
    with pytest.raises(ValueError, match="flow_layers must be at most 100, got 101"):
        ModelConfig(flow_layers=101)
