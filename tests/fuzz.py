"""Give every reader of files thousands of broken and forged ones.

    python tests/fuzz.py --count 10000               all kinds of files, in turn
    python tests/fuzz.py --only png --case 123       one case again

Each case takes a good file, changes some bytes (flips, cuts, insertions, copies; numbers made huge; inside a zip or
gzip also with the checksums put right again, in the header of a safetensors file with its length) and lets the package
read it. Two kinds are made anew for each case instead: folders of pictures, with odd names in odd places, and .npz
files with odd arrays. It must end in ValueError or OSError, or in a right load: never in another exception, a crash, a
hang of more than 20 seconds, or 1.5 GB of memory.
`tests/test_fuzz.py` does a few hundred.
"""

import argparse
import contextlib
import faulthandler
import gzip
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from phattn.data.archives import contents, listing
from phattn.data.folders import folder, npz
from phattn.data.images import read_image
from phattn.engine.files import read_json
from phattn.engine.loop import _resume, _schedule
from phattn.engine.pickles import load_pickled
from phattn.engine.runs import Run, check_history
from phattn.engine.weights import load_tensors, load_weights, save_tensors
from phattn.model import HardAttention, ModelConfig
from phattn.training import prepare, recipe

SECONDS, MEGABYTES = 20, 1536  # a picture of 89 million pixels, the most that Pillow allows, takes a gigabyte
SIZES = ModelConfig(channels=(4, 4, 4), features=4, latent=4, hidden=8, flow_layers=1, decoder_convolutions=1)


def model() -> HardAttention:
    torch.manual_seed(0)
    return HardAttention(SIZES)


def learner() -> tuple:
    chosen, learning = recipe("digits", "third", epochs=2), prepare(made := model(), "third")
    optimiser = torch.optim.Adam(learning, fused=True)
    return made, optimiser, _schedule(optimiser, chosen, 4)


# --- good files


def zipped(files: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", kind) as archive:
        warnings.simplefilter("ignore")
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def picture(kind: str = "PNG", side: int = 24) -> bytes:
    buffer, pixels = io.BytesIO(), np.random.RandomState(0).randint(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def deep_picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 2**16, (24, 24)).astype(np.uint16)).save(buffer, "TIFF")
    return buffer.getvalue()


def good_tree() -> bytes:
    return zipped({f"{name}/{k}.png": picture(side=8 + k) for k in range(20) for name in "ab"[k % 2]})


def good_npz() -> bytes:
    buffer, some = io.BytesIO(), np.random.RandomState(0)
    images = some.randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    np.savez_compressed(buffer, images=images, labels=np.arange(12) % 4, names=np.array(list("abcd")))
    return buffer.getvalue()


def good_tar(packed: bool) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("cat/1.png", "dog/" + "long" * 40 + ".png"):
            content = picture()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(buffer.getvalue()) if packed else buffer.getvalue()


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def saved(value: object) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(value, path := Path(folder) / "a.safetensors")
        return path.read_bytes()


def good_safetensors() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        model().save(path := Path(folder) / "a.safetensors", dataset="digits")
        return path.read_bytes()


def good_release() -> bytes:
    made, optimiser, _ = stepped()
    return pickled([made.state_dict(), optimiser.state_dict()])


def stepped() -> tuple:
    made, optimiser, schedule = learner()
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    return made, optimiser, schedule


def good_state() -> bytes:
    made, optimiser, schedule = stepped()
    history = [{"loss": 1.0, "lr": 0.1, "seconds": 1.0, "accuracy": [0.1, 0.2]}]
    states = {"model": made, "optimiser": optimiser, "schedule": schedule}
    return saved({name: part.state_dict() for name, part in states.items()} | {"history": history})


HISTORY = [{"loss": 1.5, "accuracy": [0.1, 0.2], "lr": 0.1, "seconds": 2.0}] * 2


# --- odd ones, each another

NAMES = ["cat", "dog", "train", "test", "Train", "TEST", "val", "valid", "__MACOSX", "@eaDir", ".hidden", "runs", "a b"]
NAMES += ["日本", "e\u0301", "\u00e9", "-x", "~", "a\nb", "%s", "x" * 250, "\udce9", "{}", "'\"", " ", "...", "\\"]
ENDINGS = [".png", ".jpg", ".jfif", ".JPE", ".ppm", ".tif", ".txt", "", ".", ".gz", ".npz", ".part", ".heic", ".h5"]
FILES = ["model.safetensors", ".train.lock", "Thumbs.db", "look0.png", "._1.png", "metrics.json", ".phattn-x.npy"]


def odd_tree(rng: random.Random) -> bytes:
    """A zip with pictures, damaged pictures and other things under odd names; a name with an arrow is a link."""
    files, some = {}, [rng.choice(NAMES) for _ in range(rng.randint(1, 5))]
    for _ in range(rng.choice((0, 3, 20, 20, 60))):
        parts = [rng.choice(some) for _ in range(rng.choice((0, *[1] * 20, *[2] * 10, 3, 3, 40)))]
        name = f"{rng.randint(0, 99)}{rng.choice(ENDINGS)}" if rng.random() < 0.9 else rng.choice(FILES)
        kind, side = rng.choice(("PNG", "JPEG", "PPM", "TIFF", "GIF", "WEBP")), rng.choice((1, 8, 24))
        content = picture(kind, side) + rng.randbytes(8)  # each another
        match rng.randrange(40):
            case 0:
                content = mutate(content, rng)
            case 1:
                name = f"{name}->{rng.choice(('..', '.', '/nowhere', '../..', '/dev/zero'))}"
            case 2:
                content, name = b"", rng.choice((name, name + "/"))
        files["/".join([*parts, name])] = content
    return zipped({name.encode("utf-8", "surrogateescape").decode("latin1"): held for name, held in files.items()})


def odd_arrays(rng: random.Random) -> bytes:
    """An .npz whose arrays have odd shapes, kinds and values, or odd headers."""
    some = np.random.RandomState(rng.randrange(2**32))
    count, side = rng.choice((0, 1, *[12] * 8)), rng.choice((0, 1, 9, *[8] * 7))
    plain = [(count, side, side, 3), (count, side, side), (count, side, side, 1)]
    shape = rng.choice((*plain * 3, (count, 3, side, side), (count,), ()))
    images = some.randint(0, 256, shape).astype(rng.choice((*["u1"] * 12, "i8", "f4", ">u2", "?")))
    labels = np.arange(count) % 4
    labels = rng.choice((*[labels] * 12, labels - 1, labels * 70_000, labels * 2**40, labels[None]))
    arrays = {"images": images, "labels": labels.astype(rng.choice(("i8", "i8", "u1", ">i4", "u8", "f4")))}
    names = ("abca", ("e\u0301", "\u00e9", "", "x"), (1, 2, 3, 4), (b"\xff", b"b", b"c", b""))
    names = rng.choice((None, None, "abcd", "abcd", *names))
    arrays |= {} if names is None else {"names": np.array(list(names))}
    arrays |= {rng.choice(("more", "names", "a b")): np.array(rng.choice(("a", 1.5)))} if rng.random() < 0.2 else {}
    buffer = io.BytesIO()
    order = rng.choice((np.ascontiguousarray, np.asfortranarray))
    rng.choice((np.savez, np.savez_compressed))(buffer, **{name: order(array) for name, array in arrays.items()})
    with zipfile.ZipFile(buffer) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if rng.random() < 0.2:
        name, number = rng.choice(list(files)), rng.choice((b"1000000000000", b"-3", b"(4,)", b"1e9", b"True", b"0"))
        files[name] = re.sub(rb"\d+(?=,)", number, files[name][:128], count=1) + files[name][128:]
    if rng.random() < 0.05:
        name = rng.choice(list(files))
        files[name] = files[name][:6] + rng.choice((b"\2\0", b"\3\0", b"\0\0")) + b"\xff\xff\xff\x7f" + bytes(2**22)
    if rng.random() < 0.05:
        files[rng.choice(("images", "labels.npy.npy", "../images.npy", "names.npy"))] = bytes(rng.randrange(200))
    return zipped(files, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


# --- readers


def read_folder(path: Path) -> None:
    """Unpack a tree, and read it: no picture may be on both sides, and all that are read have one."""
    root = path.with_name("tree")
    root.mkdir()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            place = os.path.join(os.fsencode(root), member.orig_filename.encode("latin1", "replace"))
            with contextlib.suppress(OSError, ValueError):  # a name too long, or one that is a folder already
                unpack(place, archive.read(member))
    train, test = (folder(split, root, size=8) for split in ("train", "test"))
    assert train.names == test.names and len(train) and len(test)
    if not any(held.name.casefold() in ("train", "training") for held in root.rglob("*")):
        again = folder("test", root, size=8)
        assert torch.equal(again.images, test.images)


def unpack(place: bytes, content: bytes) -> None:
    place, _, to = place.partition(b"->")
    os.makedirs(place if place.endswith(b"/") else os.path.dirname(place), exist_ok=True)
    if to:
        os.symlink(to, place)
    elif not place.endswith(b"/"):
        with open(place, "wb") as file:
            file.write(content)


def read_npz(path: Path) -> None:
    data = npz("train", path.parent)
    assert data.images.dtype == torch.uint8 and data.labels.max() < data.classes


def read_archive(path: Path) -> None:
    for _, content in contents(path, listing(path)):
        with contextlib.suppress(ValueError):
            read_image(io.BytesIO(content), 8)


def read_state(path: Path) -> None:
    with Run(path.parent, {}) as run:
        _resume(run, *learner())


def read_config(path: Path) -> None:
    Run(path.parent, {"lr": 1.0}, resume=True).__exit__()


def read_history(path: Path) -> None:
    check_history(read_json(path, "history")["history"])


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, a good one, what reads it, and what is packed in it: a zip, a gzip, a header.

    Or it has what makes an odd one for each case.
    """

    name: str
    make: Callable[[], bytes]
    read: Callable[[Path], object]
    wrap: str = ""
    odd: Callable[[random.Random], bytes] | None = None


KINDS = {
    "npz": Kind("train.npz", good_npz, read_npz, "zip"),
    "safetensors": Kind("a.safetensors", good_safetensors, HardAttention.load, "header"),
    "config": Kind("config.json", lambda: config().encode(), read_config),
    "history": Kind("history.json", lambda: json.dumps({"history": HISTORY}).encode(), read_history),
    "png": Kind("a.png", picture, lambda path: read_image(path, 16)),
    "jpeg": Kind("a.jpg", lambda: picture("JPEG"), lambda path: read_image(path, 16)),
    "tiff": Kind("a.tif", lambda: picture("TIFF"), lambda path: read_image(path, 16)),
    "16 bits": Kind("a.tif", deep_picture, lambda path: read_image(path, 16)),
    "gif": Kind("a.gif", lambda: picture("GIF"), lambda path: read_image(path, 16)),
    "webp": Kind("a.webp", lambda: picture("WEBP"), lambda path: read_image(path, 16)),
    "ppm": Kind("a.ppm", lambda: picture("PPM"), lambda path: read_image(path, 16)),
    "jp2": Kind("a.jp2", lambda: picture("JPEG2000"), lambda path: read_image(path, 16)),
    "bmp": Kind("a.bmp", lambda: picture("BMP"), lambda path: read_image(path, 16)),
    "tga": Kind("a.tga", lambda: picture("TGA"), lambda path: read_image(path, 16)),
    "folder": Kind("tree.zip", good_tree, read_folder, odd=odd_tree),
    "arrays": Kind("train.npz", good_npz, read_npz, odd=odd_arrays),
    "zip": Kind("a.zip", lambda: zipped({"a/1.png": picture(), "b/2.png": picture()}), read_archive, "zip"),
    "tar": Kind("a.tar", lambda: good_tar(False), read_archive),
    "tar.gz": Kind("a.tar.gz", lambda: good_tar(True), read_archive, "gzip"),
    "weights": Kind("a.safetensors", good_safetensors, lambda path: load_weights(model(), path), "header"),
    "state": Kind("state.safetensors", good_state, read_state, "header"),
    "tensors": Kind("b.safetensors", lambda: saved({"a": torch.ones(3), 1: [1, (), None]}), load_tensors, "header"),
    "pickled": Kind("a.pth", lambda: pickled(model().state_dict()), load_pickled, "zip"),
    "release": Kind("b.pth", good_release, load_pickled, "zip"),
}


def config() -> str:
    with tempfile.TemporaryDirectory() as folder:
        with Run(folder, {"lr": 1.0}):
            return (Path(folder) / "config.json").read_text()


# --- changes


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Change some bytes of a file."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, much = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(8):
            case 0 | 1 | 2:
                for k in range(at, min(at + much, len(data))):
                    data[k] ^= 1 << rng.randrange(8)
            case 3:
                del data[at : at + much * rng.choice((1, 1, 50))]
            case 4:
                data[at:at] = rng.randbytes(much)
            case 5:
                data[at : at + much] = rng.choice((b"\xff", b"\0", b"[", b"{", b"9")) * much
            case 6:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + much * 8]
            case 7:
                data = bytearray(enlarge(bytes(data), rng))
        if rng.random() < 0.03:
            del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


def enlarge(content: bytes, rng: random.Random) -> bytes:
    """Make a number that is written in the file absurd, be it in digits or in four bytes."""
    numbers = list(re.finditer(rb"\d+", content))
    if numbers and rng.random() < 0.7:
        found = rng.choice(numbers)
        number = rng.choice((b"-1", b"0", b"99999999999", b"1e999", b"NaN", b"[]", b'"x"', b"null", b"[" * 5000))
        return content[: found.start()] + number + content[found.end() :]
    at = rng.randrange(max(1, len(content) - 4))
    return content[:at] + rng.choice((2**31 - 1, 2**32 - 1, 2**28)).to_bytes(4, "little") + content[at + 4 :]


def forge(kind: Kind, content: bytes, rng: random.Random) -> bytes:
    """Change a file, or what is packed in it; or make an odd one."""
    if kind.odd:
        return kind.odd(rng)
    if not kind.wrap or rng.random() < 0.4:
        return mutate(content, rng)
    if kind.wrap == "gzip":
        return gzip.compress(mutate(gzip.decompress(content), rng), 1)
    if kind.wrap == "header":
        end = 8 + int.from_bytes(content[:8], "little")
        header = mutate(content[8:end], rng)
        return len(header).to_bytes(8, "little") + header + content[end:]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([name for name in files if name.endswith((".pkl", ".npy", ".png"))] + list(files))
    files[name] = mutate(files[name], rng)
    packing = zipfile.ZIP_DEFLATED if kind.name.endswith((".npz", ".zip")) else zipfile.ZIP_STORED
    return zipped(files, packing)


# --- the harness


class Hang(BaseException):
    """A reader took too long."""


def hang(*_: object) -> None:
    raise Hang


def memory_ran_out(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def outcome(kind: str, case: int, folder: Path, good: bytes) -> str:
    """What reading one forged file ends in: loaded, refused, or what is wrong."""
    rng = random.Random(f"{kind} {case}")
    place = folder / f"{kind}{case}"
    place.mkdir()
    path = place / KINDS[kind].name
    path.write_bytes(forge(KINDS[kind], good, rng))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind].read(path)
        found = "loaded"
    except (ValueError, OSError) as error:
        found = "memory ran out" if memory_ran_out(error) else "refused"
    except Hang:
        found = f"hung for {SECONDS} s"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    shutil.rmtree(place)
    return f"took {more:.0f} MB" if more > MEGABYTES else found


def fuzz(count: int, kinds: list[str], first: int = 0) -> tuple[Counter, list[str]]:
    """Read `count` forged files; returns how they ended by kind, and what went wrong."""
    signal.signal(signal.SIGALRM, hang)
    logging.getLogger("phattn").addHandler(logging.NullHandler())  # what is told is not looked at
    found, wrong, good = Counter(), [], {kind: KINDS[kind].make() for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:  # untouched, each is read; this also makes the imports, before memory is limited
            path = Path(folder) / kind / KINDS[kind].name
            path.parent.mkdir()
            path.write_bytes(good[kind])
            KINDS[kind].read(path)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + MEGABYTES * 2**20, limits[1]))
        try:
            for number in range(count):
                kind, case = kinds[number % len(kinds)], first + number // len(kinds)
                ended = outcome(kind, case, Path(folder), good[kind])
                found[kind, ended if ended in ("loaded", "refused") else "wrong"] += 1
                if ended not in ("loaded", "refused"):
                    wrong.append(f"--only {kind} --case {case}: {ended}")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    return found, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--only", choices=KINDS, help="one kind of file")
    parser.add_argument("--case", type=int, help="this case and no other; with --only")
    options = parser.parse_args()
    faulthandler.enable()
    count = options.count if options.case is None else 1
    found, wrong = fuzz(count, [options.only] if options.only else list(KINDS), options.case or 0)
    for kind in KINDS:
        print(f"{kind:12}", ", ".join(f"{found[kind, end]} {end}" for end in ("loaded", "refused", "wrong")))
    print("\n".join(wrong) or f"{found.total()} cases, all read or refused")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
