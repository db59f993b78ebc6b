"""What people train on, and what happens at the end: classes by name, sizes, subsets, and conclusions that fail."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phattn.apps.conclusions import PICTURES, lacking
from phattn.apps.experiment import _evenly, load_data, train
from phattn.apps.models import open_model
from phattn.apps.options import TrainOptions
from phattn.data.images import ImageSet
from phattn.data.scenes import digits
from phattn.evaluation import evaluate
from phattn.model import HardAttention
from phattn.policy import random

NAMES = ("apple", "lime", "sky")


def arrays(place: Path, names: tuple[str, ...] | None = NAMES, side: int = 16, test_side: int = 0) -> Path:
    """Images of three classes whose colours tell them apart, as train.npz and test.npz."""
    place.mkdir(parents=True, exist_ok=True)
    rng, order = np.random.RandomState(0), sorted(NAMES)
    for split, width in (("train", side), ("test", test_side or side)):
        labels = np.arange(24) % 3
        images = rng.randint(0, 60, (24, width, width, 3)).astype(np.uint8)
        images[np.arange(24), :, :, labels] += 150
        if names and set(names) == set(order):  # the same images under the same names, numbered otherwise
            labels = np.array([names.index(order[label]) for label in labels])
        held = {"names": np.array(names)} if names else {}
        np.savez(place / f"{split}.npz", images=images, labels=labels, **held)
    return place


def tiny(place: Path, **changes: Any) -> TrainOptions:
    """One epoch of the first phase."""
    first = dict(dataset="npz", training_phase="first", epochs=1, looks=2, batch=12, device="cpu", fast=False)
    return TrainOptions(**first | dict(datapath=place, logfolder=place.parent / "run") | changes)


def test_weights_are_a_start_only_for_classes_of_the_same_names(tmp_path: Path) -> None:
    train(tiny(arrays(tmp_path / "data")), lambda line: None)
    second = dict(training_phase="second", pretrain_checkpoint=tmp_path / "run", logfolder=tmp_path / "second")
    for names in (("lime", "sky", "zapple"), (*NAMES, "more")[1:]):
        said = f"are of {', '.join(names)}; .*run knows apple, lime, sky: they must be the same"
        with pytest.raises(ValueError, match=said):
            train(tiny(arrays(tmp_path / "other", names), **second), lambda line: None)
        assert not (tmp_path / "second").exists()
    other = arrays(tmp_path / "reordered", ("sky", "apple", "lime"))
    folder = train(tiny(other, **second), lambda line: None)
    assert open_model(folder).config.names == NAMES  # those of the weights, in their order
    torch.save(open_model(tmp_path / "run").state_dict(), tmp_path / "bare.pth")
    lines: list[str] = []
    bare = dict(pretrain_checkpoint=tmp_path / "bare.pth", logfolder=tmp_path / "third", training_phase="second")
    train(tiny(tmp_path / "data", **bare), lines.append)
    assert any("bare.pth does not name its classes: they are taken to be those of the images" in line for line in lines)


def test_a_run_is_not_resumed_with_other_classes(tmp_path: Path) -> None:
    options = tiny(arrays(tmp_path / "data"))
    train(options, lambda line: None)
    arrays(tmp_path / "data", ("lime", "sky", "zapple"))
    with pytest.raises(ValueError, match=r"model.names = \['apple', 'lime', 'sky'\], now \['lime', 'sky', 'zapple'\]"):
        train(replace(options, resume=True), lambda line: None)


def test_evaluation_follows_names_and_refuses_others() -> None:
    torch.manual_seed(0)
    model, data = HardAttention.from_pretrained("digits"), digits("test", size=40)
    turned = ImageSet(data.images, (data.labels + 3) % 10, tuple(data.names[(k - 3) % 10] for k in range(10)))
    same = [evaluate(model, part, {"random": random}, 2)["random"]["accuracy"] for part in (data, turned)]
    assert same[0] == same[1] and same[0][1] > 0.15
    other = ImageSet(data.images, data.labels, (*data.names[:9], "x"))
    with pytest.raises(ValueError, match="images are of 0, 1, .*, x; the model knows 0, 1, .*, 9: they must be the"):
        evaluate(model, other, {"random": random}, 2)


def test_one_class_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for split in ("train", "test"):
        images = np.zeros((24, 16, 16, 3), np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.zeros(24, int), names=np.array(["apple"]))
    with pytest.raises(ValueError, match="npz has one class, apple: two are needed to tell apart"):
        train(tiny(tmp_path, logfolder=tmp_path / "run"), lambda line: None)
    assert not (tmp_path / "run").exists()


def test_test_images_of_another_size_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    arrays(tmp_path / "svhn", tuple("0123456789"), side=32, test_side=16)
    options = tiny(tmp_path, dataset="svhn", logfolder=tmp_path / "run")
    with pytest.raises(ValueError, match="images are 16×16, and those of svhn 32×32"):
        train(options, lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_machine_that_lacks_something_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **named: Any) -> None:
        raise RuntimeError("no C++ compiler\nlong text")

    options = tiny(arrays(tmp_path / "data"))
    with monkeypatch.context() as patch:
        patch.setattr("torch.compile", broken)
        with pytest.raises(ValueError, match=r"compile: torch.compile does not work here \(no C\+\+ compiler\): leave"):
            train(replace(options, compile=True), lambda line: None)
    monkeypatch.setattr("phattn.engine.runs.import_module", broken)
    with pytest.raises(ValueError, match=r"tensorboard can't be imported, .*\(no C\+\+ compiler\)"):
        train(options, lambda line: None)
    assert not (tmp_path / "run").exists()


def test_training_images_are_drawn_evenly_and_always_the_same(tmp_path: Path) -> None:
    labels = torch.cat([torch.zeros(50), torch.ones(8), torch.full((3,), 2)]).long()
    data = ImageSet(torch.arange(61, dtype=torch.uint8).view(61, 1, 1, 1).expand(61, 3, 8, 8), labels, NAMES)
    some = _evenly(data, 12)
    assert some.labels.bincount().tolist() in ([5, 4, 3], [4, 5, 3]) and len(some.images[:, 0, 0, 0].unique()) == 12
    assert torch.equal(some.images, _evenly(data, 12).images) and len(_evenly(data, 61)) == 61
    options = tiny(arrays(tmp_path / "data"), train_images=12, batch=6)
    assert load_data(options, "train").labels.bincount().tolist() == [4, 4, 4] and len(load_data(options, "test")) == 24
    said: list[str] = []
    train(options, said.append)
    assert "npz: 12 training images" in said[0]
    for count in (2, 25):
        with pytest.raises(ValueError, match=f"train_images must be from 3, the 3 classes, to 24, got {count}"):
            train(replace(options, train_images=count, logfolder=tmp_path / "new"), lambda line: None)
    with pytest.raises(ValueError, match="batch must be at most 12"):
        train(replace(options, batch=20, logfolder=tmp_path / "new"), lambda line: None)


FAILING = {  # what fails -> what it is called, and what of the conclusions is missing then
    "evaluate": ("the test", ["curves.png", "metrics.json"]),
    "plot_curves": ("curves.png", ["curves.png"]),
    "plot_history": ("history.png", ["history.png"]),
    "plot_look": ("the pictures of looks", ["look0.png", "look.gif"]),
    "animate_look": ("the pictures of looks", ["look.gif"]),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_conclusion_that_fails_loses_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **named: Any) -> None:
        assert (tmp_path / "run" / "model.safetensors").is_file()
        raise MemoryError("not enough")

    said: list[str] = []
    monkeypatch.setattr(f"phattn.apps.conclusions.{name}", fail)
    folder = train(tiny(arrays(tmp_path / "data")), said.append)
    what, missing = FAILING[name]
    told = [line for line in said if line.startswith(f"{what} failed (MemoryError: not enough); ")]
    assert len(told) == 1 and f"phattn evaluate {folder}" in told[0]
    assert lacking(folder) == missing and set(missing) <= {*PICTURES, "metrics.json"}
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["epochs"]["first"][0]["loss"] > 0


def test_a_test_that_fails_while_training_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise RuntimeError("no font")

    said: list[str] = []
    monkeypatch.setattr("phattn.apps.experiment.look", fail)
    folder = train(tiny(arrays(tmp_path / "data"), epochs=2), said.append)
    assert said[1] == "the test after epoch 1 failed (RuntimeError: no font); training goes on"
    assert not lacking(folder)
