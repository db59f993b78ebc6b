"""Images per second of each phase, of looking and of the input pipeline: a plain implementation and ours, in turn.

    python benchmarks/throughput.py                    a table, at the CIFAR-10 widths, batch 64
    python benchmarks/throughput.py --json             one JSON object
    python benchmarks/throughput.py --widths digits --batch 512 --runs 9 --device cuda

Both compute the same mathematics in float32 with the same parameters (`benchmarks/plain.py`); a training step includes
the backward pass, clipping and Adam. The two take turns, so that a machine whose speed drifts treats them alike; the
figures are medians over the runs, the ratio is the median of the ratios run by run.
"""

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from plain import Plain
from torch import nn

from phattn.data import ImageSet, normalise
from phattn.memory import keep_freed_memory
from phattn.model import CONFIGS, HardAttention
from phattn.policy import EIG, look
from phattn.training import LOSSES, Recipe, prepare

LOOKS = 7


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


def turn(plain: Callable, ours: Callable, device: torch.device) -> tuple[float, float]:
    """Seconds of each, after a call that is not counted; ours keeps freed memory, as `phattn train` does."""
    usual_memory()
    plain()
    theirs = seconds(plain, device)
    keep_freed_memory()
    ours()
    return theirs, seconds(ours, device)


def pair(plain: Callable, ours: Callable, images: int, runs: int, device: torch.device) -> dict[str, float]:
    """Medians over `runs` turns."""
    times = [turn(plain, ours, device) for _ in range(runs)]
    a, b = zip(*times)
    ratio = statistics.median(one / two for one, two in times)
    return {"plain": images / statistics.median(a), "ours": images / statistics.median(b), "ratio": ratio}


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
    loader = torch.utils.data.DataLoader(_Pictures(data), batch, shuffle=True, num_workers=2, persistent_workers=True)
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

    results = phases(model, images, labels, options.runs)
    few = images[: min(options.batch, 16)] if device.type == "cpu" else images
    results["look1"] = looking(model, few, 1, options.runs)
    results["look20"] = looking(model, few, 20, options.runs)
    results["input"] = pipeline(data, options.batch, options.runs, device)
    if options.json:
        print(json.dumps(results))
        return
    print(f"{options.widths} widths, batch {options.batch}, {device}, torch {torch.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads, medians of {options.runs}")
    print(f"{'images/s':10s}{'plain':>12s}{'ours':>12s}{'ratio':>8s}")
    for name, result in results.items():
        print(f"{name:10s}{result['plain']:12.1f}{result['ours']:12.1f}{result['ratio']:8.1f}")


if __name__ == "__main__":
    main()
