"""What people do to the commands: places, names, terminals, runs that are not finished or have lost something."""

import ast
import json
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_experiment_edges import NAMES, arrays

from phattn.apps.cli import COMMANDS, main
from phattn.apps.conclusions import lacking
from phattn.engine.files import check_writable, write_json

PACKAGE = Path(__file__).resolve().parent.parent / "phattn"
RUN = "--dataset=npz --training_phase=first --epochs=1 --T=2 --batch=12 --device=cpu --no-fast"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with status 2."""
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("phattn: ") and "\n" not in said, said
    return said


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small run on images of three classes, which lie beside it."""
    folder = tmp_path / "run"
    assert main(["train", *RUN.split(), f"--datapath={arrays(tmp_path / 'data')}", f"--logfolder={folder}"]) == 0
    return folder


def test_evaluate_matches_classes_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for names in (NAMES, ("sky", "apple", "lime")):
        place = arrays(tmp_path / names[0], names)
        capsys.readouterr()
        words = ["evaluate", str(run), f"--datapath={place}", "--json", "--policies", "random", "--device=cpu"]
        assert main(words) == 0
        found.append(json.loads(capsys.readouterr().out)["policies"])
    assert found[0] == found[1]
    for names in (("zapple", "lime", "sky"), ("cat", "dog", "owl"), None):
        place = arrays(tmp_path / "other", names)
        said = refused(["evaluate", str(run), f"--datapath={place}"], capsys)
        listed = ", ".join(names or ("0", "1", "2"))
        assert f"the images are of {listed}; {run} knows apple, lime, sky: they must be the same by name" in said
    said = refused(["evaluate", "cifar10", "--dataset=digits"], capsys)
    assert "are of 0, 1, 2" in said and "cifar10 knows airplane" in said


def test_evaluate_makes_again_what_is_lost(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not lacking(run)
    metrics = (run / "metrics.json").read_bytes()
    words = ["evaluate", str(run), f"--datapath={tmp_path / 'data'}", "--device=cpu"]
    assert main([*words, "--test-images=3"]) == 0 and (run / "metrics.json").read_bytes() == metrics
    for lost in (["metrics.json"], ["look0.png", "curves.png"], ["history.png", "look.gif"]):
        for name in lost:
            (run / name).unlink()
        assert main([*words, "--json"]) == 0 and sorted(lacking(run)) == sorted(lost)
        capsys.readouterr()
        assert main(words) == 0 and not lacking(run)
        said = capsys.readouterr().out
        assert f"written in {run}: " in said and all(name in said for name in lost)
    made = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert len(made["policies"]["random"]["accuracy"]) == 2  # as many looks as it was trained with
    assert made["epochs"] == json.loads(metrics)["epochs"]
    assert main([*words, "--rewrite", "--test-images=5"]) == 0
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["images"] == 5


def test_training_says_when_a_conclusion_fails(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("phattn.apps.conclusions.save_figure", fail)
    other = tmp_path / "other"
    assert main(["train", *RUN.split(), f"--datapath={tmp_path / 'data'}", f"--logfolder={other}"]) == 0
    said = capsys.readouterr().out
    assert "curves.png failed (RuntimeError: no font)" in said and "done: see" in said.splitlines()[-1]
    assert "look0.png" not in said.splitlines()[-1] and "metrics.json" in said.splitlines()[-1]


def test_unfinished_runs_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 40), "navy").save(tmp_path / "x.png")
    folder = tmp_path / "run"
    for phase in ("first", "second"):
        write_json({"options": {}}, folder / phase / "config.json")
    (folder / "first" / "weights_f_1.safetensors").touch()
    look = ["look", str(tmp_path / "x.png"), f"--model={folder}"]
    for words in (look, ["evaluate", str(folder)], ["info", str(folder)], ["export", str(folder)]):
        said = refused(words, capsys)
        assert f"--resume --logfolder={folder}" in said and f"{folder / 'first'}, which can not choose" in said


def test_home_is_home_and_nothing_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(here)
    arrays(home / "data")
    assert main(["train", *RUN.split(), "--datapath=~/data", "--logfolder=~/r"]) == 0
    Image.new("RGB", (40, 40), "navy").save(home / "x.png")
    assert main(["look", "~/x.png", "--out=~/look.png", "--T=2", "--samples=1", "--device=cpu"]) == 0
    assert main(["info", "~/r", "--no-fast"]) == 0
    assert (home / "r" / "model.safetensors").is_file() and (home / "look.png").is_file() and not list(here.iterdir())
    for words in (
        ["train", "--datapath=~nosuchuser/x", "--dataset=npz"],
        ["train", "--logfolder=~nosuchuser/x"],
        ["look", "x.png", "--model=~nosuchuser/x"],
        ["look", "x.png", "--out=~nosuchuser/x.png"],
        ["evaluate", "~nosuchuser/x"],
    ):
        assert "there is no home folder ~nosuchuser" in refused(words, capsys)
    for words, name in (
        (["train", "--logfolder="], "--logfolder"),
        (["train", "--logfolder", ""], "--logfolder"),
        (["train", "--datapath=", "--dataset=npz"], "--datapath"),
        (["look", "x.png", "--out="], "--out"),
        (["export", "--out= "], "--out"),
        (["compare", "--name="], "--name"),
        (["evaluate", ""], "a word of the command"),
    ):
        assert f"{name} must not be empty" in refused(words, capsys)
    assert not list(here.iterdir())


def test_places_that_can_not_be_written_are_known_beforehand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results").write_text("a file", encoding="utf-8")
    assert "results is not a folder" in refused(["compare"], capsys)
    Image.new("RGB", (40, 40), "navy").save("x.png")
    for out, why in (("results/a.png", "is not a folder"), ("a.bmp", "out must end in .png"), (".", "out must end in")):
        assert why in refused(["look", "x.png", f"--out={out}"], capsys)
    Path("folder.png").mkdir()
    assert "got the folder folder.png" in refused(["look", "x.png", "--out=folder.png"], capsys)
    for name in ("a/b", "..", "a\\b"):
        assert f"got {name!r}" in refused(["compare", f"--name={name}"], capsys)
    assert not Path("runs").exists()
    check_writable("new/and/deep")
    assert not Path("new").exists()


def test_a_policy_of_ones_own_that_fails_is_known_beforehand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cli_wrong.py").write_text("def wrong(view): return view.h\n\ndef broken(view): 1 / 0\n", encoding="utf-8")
    for name, why in {"wrong": "a policy must return scores", "broken": "ZeroDivisionError"}.items():
        for command in (["evaluate", "digits"], ["compare", "--epochs=1"]):
            said = refused([*command, "--policies", "random", f"cli_wrong:{name}", "--device=cpu"], capsys)
            assert f"policies: 'cli_wrong:{name}' fails" in said and why in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["cli_wrong.py"]


@pytest.mark.parametrize("encoding", ["ascii", "latin1", "cp437", "cp932", "utf-8"])
def test_terminals_get_what_they_can_show(encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for words in ([], *([name] for name in COMMANDS)):
        shown = TextIOWrapper(BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "stdout", shown)
            main([*words, "--help"])
        shown.flush()
        assert not stop.value.code and len(shown.buffer.getvalue()) > 500
    shown = TextIOWrapper(BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", shown)
        assert main(["look", str(tmp_path / "größe…\udcff苹.png")]) == 2
    shown.flush()
    said = shown.buffer.getvalue().decode(encoding)
    assert "\\udcff" in said and "gr" in said and ("e..." in said or "e…" in said)
    assert encoding != "utf-8" or "größe…" in said


def test_classes_may_be_called_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["苹果", "$x_1$ a\\b", "-größe "]
    for k, name in enumerate(names):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.full((16, 16, 3), 20 * number + k, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    words = [*RUN.replace("npz", "folder").split(), "--size=16", f"--datapath={tmp_path / 'data'}"]
    assert main(["train", *words, f"--logfolder={tmp_path / 'run'}"]) == 0
    assert not lacking(tmp_path / "run") and "failed" not in capsys.readouterr().out


def test_files_are_opened_with_an_encoding() -> None:
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            given = {word.arg for word in call.keywords}
            text = name in ("read_text", "write_text") or (name in ("run", "Popen") and "text" in given)
            binary = any("b" in ast.unparse(mode) for mode in call.args[1:])
            text |= isinstance(call.func, ast.Name) and name == "open" and not binary
            assert not text or "encoding" in given, f"{path.name}:{call.lineno}: {ast.unparse(call)}"
