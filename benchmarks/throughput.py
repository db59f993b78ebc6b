"""Images per second of each phase, of looking and of the input pipeline: a plain implementation and ours, in turn.

    python benchmarks/throughput.py                    a table, at the CIFAR-10 widths, batch 64
    python benchmarks/throughput.py --json             one JSON object
    python benchmarks/throughput.py --widths digits --batch 512 --runs 9 --device cuda

Both compute the same mathematics in float32 with the same parameters (`benchmarks/plain.py`); a training step includes
the backward pass, clipping and Adam (ours the fused one). Ours also keeps freed memory (`phattn.memory`), as on the
command line. The two take turns, so that a machine whose speed drifts treats them alike; the figures are medians over
the runs, the ratio is the median of the ratios run by run. "onnx" is looking with P = 20, by torch and by onnxruntime
on the same threads (CPU only; left out where onnxruntime or its exporter is missing).
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from plain import Plain
from torch import nn

from phattn.apps.export import export_model, look_with, open_parts
from phattn.data.images import ImageSet, normalise
from phattn.engine.loop import Recipe
from phattn.fast.memory import keep_freed_memory
from phattn.model import CONFIGS, HardAttention
from phattn.policy import EIG, look
from phattn.training import LOSSES, prepare

LOOKS = 7
PAIR = ("plain", "ours")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def usual_memory() -> None:
    """glibc's allocator as it is by itself, once it has met blocks of 32 MiB."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 64 << 20), libc.mallopt(-3, 32 << 20), libc.malloc_trim(0)
    except (OSError, AttributeError):
        pass


def turn(one: Callable, other: Callable, device: torch.device, alike: bool) -> tuple[float, float]:
    """Seconds of each, after a call that is not counted.

    The second keeps freed memory, as `phattn` on the command line does; the first only if they are to be treated alike.
    """
    keep_freed_memory() if alike else usual_memory()
    one()
    first = seconds(one, device)
    keep_freed_memory()
    other()
    return first, seconds(other, device)


def pair(
    one: Callable, other: Callable, images: int, runs: int, device: torch.device, names: tuple[str, str] = PAIR
) -> dict[str, float]:
    """Medians over `runs` turns."""
    times = [turn(one, other, device, alike=names != PAIR) for _ in range(runs)]
    rates = [images / statistics.median(column) for column in zip(*times)]
    return dict(zip(names, rates)) | {"ratio": statistics.median(a / b for a, b in times)}


def step(loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter], fused: bool) -> Callable[[], None]:
    """A training step on one batch."""
    optimiser = torch.optim.Adam(parameters, lr=1e-5, fused=fused)

    def run() -> None:
        optimiser.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimiser.step()

    return run


def phases(model: HardAttention, images: torch.Tensor, labels: torch.Tensor, runs: int) -> dict[str, dict]:
    """Training steps of the three phases."""
    plain, results = Plain(model), {}
    for phase in ("first", "second", "third"):
        parameters, recipe = prepare(model, phase), Recipe(phase, epochs=1, ccebal=16.0, looks=LOOKS)
        theirs = step(lambda phase=phase: getattr(plain, phase)(images, labels, LOOKS), parameters, fused=False)
        ours = step(lambda r=recipe: LOSSES[r.phase](model, images, labels, r)[0], parameters, fused=True)
        results[phase] = pair(theirs, ours, len(images), runs, images.device)
    return results


def looking(model: HardAttention, images: torch.Tensor, samples: int, runs: int) -> dict[str, float]:
    """Seven looks with EIG."""
    plain = Plain(model.eval())
    theirs, ours = (lambda: plain.look(images, LOOKS, samples)), (lambda: look(model, images, EIG(samples), LOOKS))
    return pair(theirs, ours, len(images), runs, images.device)


def deployed(model: HardAttention, data: ImageSet, samples: int, runs: int) -> dict[str, float] | None:
    """Seven looks with EIG by torch and by onnxruntime, both from uint8; None where that can't be had."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        print(f"onnx: left out, there is no {' and no '.join(missing)}", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            opened = open_parts(export_model(model, folder, samples), torch.get_num_threads())
        except ValueError as error:  # a torch that can't write ONNX
            print(f"onnx: left out, {error}", file=sys.stderr)
            return None
    images, arrays = data.images, data.images.numpy()
    works = (lambda: look(model, images, EIG(samples), LOOKS), lambda: look_with(opened, arrays, LOOKS))
    return pair(*works, len(data), runs, torch.device("cpu"), ("torch", "onnxruntime"))


class _Pictures(torch.utils.data.Dataset):
    """PIL images through torchvision's transforms, one by one, as the release does."""

    def __init__(self, data: ImageSet):
        from torchvision import transforms

        self.data = data
        steps = [
            transforms.ToPILImage(),
            transforms.RandomResizedCrop(data.size, scale=(0.75, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.4, 0.4, 0.4),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, k: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.data.images[k]), int(self.data.labels[k])


def pipeline(data: ImageSet, batch: int, runs: int, device: torch.device) -> dict[str, float]:
    """One epoch of augmented batches on the device. The loader's workers are started once, beforehand."""
    many = dict(num_workers=os.cpu_count(), persistent_workers=True)
    loader = torch.utils.data.DataLoader(_Pictures(data), batch, shuffle=True, **many)
    resident, generator = data.to(device), torch.Generator().manual_seed(0)

    def theirs() -> None:
        for images, labels in loader:
            images.to(device), labels.to(device)

    def ours() -> None:
        for _ in resident.batches(batch, generator=generator, augment=True):
            pass

    return pair(theirs, ours, len(data), runs, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--widths", default="cifar10", choices=list(CONFIGS), help="sizes of the model")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--runs", type=int, default=5, help="turns that count")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    device, config = torch.device(options.device), CONFIGS[options.widths]
    model = HardAttention(config).to(device)
    shape = (max(2048, 2 * options.batch), 3, config.image, config.image)
    labels = torch.randint(config.classes, shape[:1])
    data = ImageSet(torch.randint(256, shape, dtype=torch.uint8), labels, tuple(map(str, range(config.classes))))
    images, labels = normalise(data.images[: options.batch]).to(device), labels[: options.batch].to(device)

    few = images[:64] if device.type == "cpu" else images  # 512 would take the plain version minutes
    looks = {f"look{samples}": looking(model, few, samples, options.runs) for samples in (1, 20)}
    results = phases(model, images, labels, options.runs) | looks
    results["input"] = pipeline(data, options.batch, options.runs, device)
    if device.type == "cpu" and (result := deployed(model, data[: len(few)], 20, options.runs)):
        results["onnx"] = result
    if options.json:
        print(json.dumps(results))
        return
    print(f"{options.widths} widths, batch {options.batch}, {device}, torch {torch.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads, medians of {options.runs}")
    print(f"{'images/s':10s}{'plain':>12s}{'ours':>12s}{'ratio':>8s}")
    for name, result in results.items():
        if name == "onnx":
            print(f"{'':10s}{'torch':>12s}{'onnxruntime':>12s}{'ratio':>8s}")
        print(f"{name:10s}" + "".join(f"{value:{width}.1f}" for value, width in zip(result.values(), (12, 12, 8))))


if __name__ == "__main__":
    main()
