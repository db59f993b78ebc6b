"""Layouts in which people have the data sets. Written by hand: each builds a tree of its own."""

import io
import logging
import pickle
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_datasets import cinic_files, encode, packed, patch, tiny_files, write_arrays, write_files
from test_fetched import write_cifar, write_svhn

from phattn.data import datasets
from phattn.data.datasets import check_splits, load, own_size


@pytest.fixture(autouse=True)
def small(caplog, monkeypatch):
    """The stand-in for TinyImageNet has four classes; none is whole."""
    monkeypatch.setitem(datasets._DOCUMENTED, "tinyimagenet", dict(train=1, test=1, classes=4, size=64))
    datasets._say.cache_clear()
    caplog.set_level(logging.WARNING, "phattn")


def same(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels) and one.names == other.names


def below(top, files):
    return {top + name: content for name, content in files.items()}


def flattened(files):
    """TinyImageNet's training pictures without the folders `images`."""
    return {name.replace("/images/", "/") if "train" in name else name: content for name, content in files.items()}


def sorted_val(files, inner="", keep=False, part=1):
    """TinyImageNet's validation pictures in folders of their classes; with `part` 2 only every second one."""
    rows = [row.split("\t") for row in files["val/val_annotations.txt"].splitlines()][::part]
    moved = {f"val/{row[1]}/{inner}{row[0]}": files[f"val/images/{row[0]}"] for row in rows}
    gone = {f"val/images/{row[0]}" for row in rows} | ({"val/val_annotations.txt"} if part == 1 else set())
    return {name: content for name, content in files.items() if keep or name not in gone} | moved


TINY = {
    "as the makers have it": lambda files: files,
    "val in class folders": sorted_val,
    "val in class folders with images": lambda files: sorted_val(files, "images/"),
    "val copied into class folders": lambda files: sorted_val(files, keep=True),
    "half of val moved": lambda files: sorted_val(files, part=2),
    "train flattened": flattened,
    "both": lambda files: flattened(sorted_val(files)),
    "a wrapping folder": lambda files: below("tiny-imagenet-200/", files),
    "doubled": lambda files: below("tiny-imagenet-200/tiny-imagenet-200/", files),
    "the release's": lambda files: below("tinyimagenet/", sorted_val(files)),
    "with rubbish": lambda files: {**files, "__MACOSX/train/._n01": b"x", "train/.DS_Store": b"x", "notes.txt": b""},
}


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize(
    "kind", ["folder", "tiny-imagenet-200.zip", "Tiny_ImageNet-200.ZIP", "archive.zip", "tiny.tgz"]
)
def test_tinyimagenet_is_read_in_the_layouts_that_people_have(tmp_path, case, kind):
    whole = tiny_files(2)
    expected = [load("tinyimagenet", split, datapath=write_files(tmp_path / "a", whole)) for split in ("train", "test")]
    files, place = TINY[case](whole), tmp_path / "b"
    if kind == "folder":
        datapath = write_files(place, files)
    else:
        path = packed(place / kind, files)
        datapath = path if kind == "tiny.tgz" else place
    check_splits("tinyimagenet", datapath=datapath)
    for split, held in zip(("train", "test"), expected, strict=True):
        assert same(load("tinyimagenet", split, datapath=datapath), held)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_of_tinyimagenet_follow_the_sorted_numbers_with_or_without_wnids(tmp_path, kind):
    files = {name: content for name, content in sorted_val(tiny_files(2)).items() if not name.endswith(".txt")}
    path = write_files(tmp_path / "a", files) if kind == "folder" else packed(tmp_path / "archive.zip", files).parent
    for split in ("train", "test"):
        held = load("tinyimagenet", split, datapath=path)
        assert held.names == ("n01", "n02", "n03", "n04")
        assert held.labels.tolist() == sorted(held.labels.tolist())
    one = np.asarray(held.images[1].permute(1, 2, 0)).astype(int)  # of n02, which wnids.txt has first
    assert np.abs(one - patch(500, 64)).mean() < 8


@pytest.mark.parametrize("change", ["CRLF", "spaces", "a mark of the encoding"])
def test_text_files_may_have_been_edited(tmp_path, change):
    files = tiny_files(2)
    for name in ("wnids.txt", "val/val_annotations.txt"):
        text = files[name]
        files[name] = {"CRLF": text.replace("\n", "\r\n"), "spaces": text.replace("\t", "  ")}.get(
            change, "\ufeff" + text
        )
    tree = write_files(tmp_path, files)
    assert [len(load("tinyimagenet", split, datapath=tree)) for split in ("train", "test")] == [8, 4]


@pytest.mark.parametrize("part", ["train", "val"])
def test_one_part_may_be_given(tmp_path, part):
    tree = write_files(tmp_path, tiny_files(2))
    assert len(load("tinyimagenet", "train", datapath=tree / part)) == 8


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("dataset", ["cinic10", "tinyimagenet"])
def test_a_picture_that_is_there_twice_is_refused(tmp_path, dataset, kind):
    files = cinic_files(1) if dataset == "cinic10" else tiny_files(2)
    path, twice = tmp_path / f"a.{kind}", [*files.items(), next(item for item in files.items() if "train/" in item[0])]
    if kind == "zip":
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
            warnings.simplefilter("ignore")
            for name, content in twice:
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w") as archive:
            for name, content in twice:
                content = content if isinstance(content, bytes) else content.encode()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=f"{path}: {twice[-1][0]} is in it more than once"):
        load(dataset, "train", datapath=path)


def test_archives_of_other_kinds_are_named(tmp_path):
    (tmp_path / "CINIC-10.tar.xz").write_bytes(b"\xfd7zXZ\0")
    with pytest.raises(
        ValueError, match=r"CINIC-10.tar.xz: is a xz archive; .zip, .tar, .tar.gz, .tgz are read: unpack"
    ):
        load("cinic10", "train", datapath=tmp_path)
    write_files(tmp_path / "CINIC-10.tar", cinic_files(1))  # a folder: what some tools make of it
    assert len(load("cinic10", "train", datapath=tmp_path)) == 20


CINIC = {
    "as the makers have it": lambda files: files,
    "doubled": lambda files: below("CINIC-10/CINIC-10/", files),
    "the release's": lambda files: below("cinic10/", files),
    "capitals": lambda files: {
        name.replace("train/", "Train/").replace("valid/", "VALID/"): content for name, content in files.items()
    },
    "val": lambda files: {name.replace("valid/", "val/"): content for name, content in files.items()},
}


KINDS = [("doubled", kind) for kind in ("CINIC-10.zip", "cinic10.tar.gz", "x.ZIP")]
KINDS += [(case, kind) for case in CINIC for kind in ("folder", "Archive (3).zip")]


@pytest.mark.parametrize(("case", "kind"), KINDS)
def test_cinic10_is_read_in_the_layouts_that_people_have(tmp_path, case, kind):
    whole = cinic_files(1)
    expected = [load("cinic10", split, datapath=write_files(tmp_path / "a", whole)) for split in ("train", "test")]
    files, place = CINIC[case](whole), tmp_path / "b"
    if kind == "folder":
        datapath = write_files(place, files)
    else:
        path = packed(place / kind, files)
        datapath = path if kind == "x.ZIP" else place
    check_splits("cinic10", datapath=datapath)
    for split, held in zip(("train", "test"), expected, strict=True):
        assert same(load("cinic10", split, datapath=datapath), held)


def test_two_downloads_of_one_name_are_told_apart(tmp_path):
    packed(tmp_path / "archive.zip", cinic_files(1))
    packed(tmp_path / "archive (1).zip", tiny_files(2), "tiny-imagenet-200/")
    assert len(load("cinic10", "train", datapath=tmp_path)) == 20
    assert len(load("tinyimagenet", "train", datapath=tmp_path)) == 8
    with pytest.raises(FileNotFoundError, match=r"cifar10.*has archive \(1\).zip, archive.zip"):
        load("cifar10", "train", datapath=tmp_path)


def test_pictures_of_others_in_the_same_folder_are_no_part_of_a_set(tmp_path):
    mine = {f"{part}/cats/{k}.png": encode(patch(k, 32), "png") for part in ("train", "val") for k in range(2)}
    write_files(tmp_path, mine)
    packed(tmp_path / "tiny-imagenet-200.zip", tiny_files(2))
    assert len(load("tinyimagenet", "train", datapath=tmp_path)) == 8
    (tmp_path / "tiny-imagenet-200.zip").unlink()
    with pytest.raises(ValueError, match=r"no wnids.txt in it, and train has a class 'cats'.*--dataset=folder"):
        load("tinyimagenet", "train", datapath=tmp_path)


def test_valid_among_the_training_images_is_whole(tmp_path, monkeypatch):
    files = {name.replace("valid/", "train/").replace("/0", f"/{name[0]}0"): c for name, c in cinic_files(1).items()}
    datapath = packed(tmp_path / "CINIC-10.zip", files).parent
    with pytest.raises(ValueError, match=r"CINIC-10.zip: there are no images in valid/"):
        load("cinic10", "train", datapath=datapath)
    monkeypatch.setitem(datasets._DOCUMENTED, "cinic10", dict(train=20, test=10, classes=10, size=32))
    assert len(load("cinic10", "train", datapath=datapath)) == 20


def test_what_was_stored_under_other_rules_is_not_used(tmp_path):
    """Labels in the order of wnids.txt, as phattn had them before, mean other classes."""
    files = tiny_files(2)
    tree = write_files(tmp_path, files)
    old = datasets.fingerprint(tree)
    held = load("tinyimagenet", "train", datapath=tree)
    arrays = dict(np.load(tree / ".phattn-tinyimagenet-train.npz"))
    assert str(arrays["fingerprint"]) != old
    arrays |= {"fingerprint": np.array(old), "labels": arrays["labels"][::-1]}
    np.savez(tree / ".phattn-tinyimagenet-train.npz", **arrays)
    assert same(load("tinyimagenet", "train", datapath=tree), held)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("where", ["inner", "renamed", "named", "doubled", "release", "archive", "archive in named"])
def test_cifar_is_found_where_people_have_it(tmp_path, monkeypatch, dataset, where):
    theirs = write_cifar(tmp_path / "theirs", monkeypatch, dataset, count={"cifar10": 10, "cifar100": 100}[dataset])
    archive, inside = next(theirs.glob("*.tar.gz")), next(path for path in theirs.iterdir() if path.is_dir())
    expected = load(dataset, "test", datapath=theirs)
    place = tmp_path / "ours"
    target, datapath = {
        "inner": (place / inside.name, place / inside.name),
        "renamed": (place / "c", place / "c"),
        "named": (place / dataset.upper(), place),
        "doubled": (place / inside.name / inside.name, place),
        "release": (place / dataset / inside.name, place),
        "archive": (place / "x.tgz", place / "x.tgz"),
        "archive in named": (place / dataset / archive.name, place),
    }[where]
    target.parent.mkdir(parents=True)
    shutil.copy(archive, target) if where.startswith("archive") else shutil.copytree(inside, target)
    check_splits(dataset, datapath=datapath)
    for _ in range(2):
        assert same(load(dataset, "test", datapath=datapath), expected)


def test_cifar_from_inside_its_folder(tmp_path, monkeypatch):
    inside = write_cifar(tmp_path, monkeypatch, "cifar10", count=10) / "cifar-10-batches-py"
    monkeypatch.chdir(inside)
    assert len(load("cifar10", "test", datapath=".")) == 10


def test_cifar_packed_by_others_is_told_the_way_that_works(tmp_path, monkeypatch):
    inside = write_cifar(tmp_path, monkeypatch, "cifar100", count=100) / "cifar-100-python"
    held = pickle.loads((inside / "test").read_bytes())
    (inside / "test").write_bytes(pickle.dumps(held, protocol=2))
    with pytest.raises(ValueError, match="packed by others.*give arrays: .*cifar100/train.npz and test.npz") as error:
        check_splits("cifar100", datapath=tmp_path)
    way = Path(str(error.value).split("give arrays: ")[1].split("/train.npz")[0])
    for split in ("train", "test"):
        write_arrays(way, 100, split)
    check_splits("cifar100", datapath=tmp_path)
    assert len(load("cifar100", "test", datapath=tmp_path)) == 100


@pytest.mark.parametrize("where", [".", "svhn", "SVHN", "a file"])
def test_svhn_is_found_where_people_have_it(tmp_path, monkeypatch, where):
    write_svhn(tmp_path / ("." if where == "a file" else where), monkeypatch)
    datapath = tmp_path / "test_32x32.mat" if where == "a file" else tmp_path
    check_splits("svhn", datapath=datapath)
    assert [len(load("svhn", split, datapath=datapath)) for split in ("train", "test")] == [60, 30]


def test_arrays_are_found_in_the_folder_that_was_given(tmp_path):
    for split in ("train", "test"):
        write_arrays(tmp_path / "cifar10", 20, split)
    for datapath in (tmp_path, tmp_path / "cifar10"):
        check_splits("cifar10", datapath=datapath)
        assert len(load("cifar10", "train", datapath=datapath)) == 20


def test_keras_arrays_are_images_of_ones_own(tmp_path):
    images, labels = np.random.RandomState(0).randint(0, 256, (40, 28, 28)).astype(np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    for datapath in (tmp_path, tmp_path / "mnist.npz"):
        check_splits("npz", datapath=datapath, size=32)
        assert own_size("npz", datapath) == 28
        held = load("npz", "test", datapath=datapath, size=32, channels=1)
        assert (len(held), held.size, held.classes) == (20, 32, 10)


def test_the_file_itself_may_be_given(tmp_path):
    for split in ("train", "test"):
        write_arrays(tmp_path, 20, split)
    for name in ("train.npz", "test.npz"):
        assert own_size("npz", tmp_path / name) == len(load("npz", "train", datapath=tmp_path / name)) + 12


def test_errors_about_what_is_missing_are_one_line_with_separators(tmp_path):
    (tmp_path / "cinic10").mkdir()
    for dataset in ("svhn", "cifar10", "cifar100", "cinic10", "tinyimagenet"):
        with pytest.raises(FileNotFoundError) as error:
            load(dataset, "train", datapath=tmp_path)
        said = str(error.value)
        assert "\n" not in said and said.startswith(f"datapath: {dataset} is not there; looked for ")
        assert (
            f"{tmp_path}, {tmp_path}/{dataset}, and for {tmp_path}/{dataset}/train.npz; {tmp_path} has cinic10" in said
        )


def test_many_classes_take_no_time(tmp_path):
    """Each line of wnids.txt is a class, and a file may have millions of lines."""
    files = {**tiny_files(2), "wnids.txt": "\n".join(f"n{k:08}" for k in range(200_000))}
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="is of class 'n0[1-4]', which wnids.txt does not have"):
        load("tinyimagenet", "train", datapath=path)
    files["wnids.txt"] += "\nn01\nn02\nn03\nn04"
    path = packed(tmp_path / "b.zip", files)
    with pytest.raises(ValueError, match="no image of class n00000000"):
        load("tinyimagenet", "train", datapath=path)
