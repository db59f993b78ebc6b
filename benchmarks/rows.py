"""What the benchmark times, in a process of its own for each column.

    python benchmarks/rows.py '{"column": "ours", "widths": "digits", "batch": 64, "device": "cpu", "cpu_time": false}'

It prints the names of its rows with the images that a call takes, then reads names from its input and answers each with
the seconds of one call, after one that is not counted. With `PYTHONPATH` at another checkout, phattn 0.1.0 or newer, it
times that one: `throughput.py --against` does so.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from plain import Plain
from torch import nn

from phattn.model import CONFIGS, HardAttention
from phattn.policy import EIG, look
from phattn.training import LOSSES, prepare

try:
    from phattn.data.images import ImageSet, normalise
    from phattn.fast import accelerate, keep_freed_memory
    from phattn.training import Recipe
except ImportError:  # phattn 0.1.0, in which training keeps freed memory and there is nothing to accelerate
    from phattn.learning import Recipe
    from phattn.memory import keep_freed_memory

    from phattn.data import ImageSet, normalise

    def accelerate(model: nn.Module) -> list[str]:
        """Nothing."""
        return []


LOOKS = 7
Work = Callable[[], object]


def random_images(widths: str, batch: int) -> ImageSet:
    """2048 images of noise, or twice a batch if that is more."""
    config = CONFIGS[widths]
    shape = (max(2048, 2 * batch), 3, config.image, config.image)
    labels = torch.randint(config.classes, shape[:1])
    return ImageSet(torch.randint(256, shape, dtype=torch.uint8), labels, tuple(map(str, range(config.classes))))


def step(loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter], fused: bool) -> Work:
    """A training step on one batch."""
    optimiser = torch.optim.Adam(parameters, lr=1e-5, fused=fused)

    def run() -> None:
        optimiser.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimiser.step()

    return run


def once(model: HardAttention, phase: str) -> None:
    """Put the networks into the mode of a phase, or of looking, unless they are in it: no part of a step."""
    if getattr(model, "mode", None) != phase:
        prepare(model, phase) if phase in LOSSES else model.eval()
        model.mode = phase


def training(model: HardAttention, images: torch.Tensor, labels: torch.Tensor, phase: str, plain: bool) -> Work:
    """A training step of a phase."""
    recipe, parameters = Recipe(phase=phase, epochs=1, ccebal=16.0, looks=LOOKS), prepare(model, phase)
    theirs = Plain(model) if plain else None

    def loss() -> torch.Tensor:
        once(model, phase)
        if theirs:
            return getattr(theirs, phase)(images, labels, LOOKS)
        return LOSSES[phase](model, images, labels, recipe)[0]

    return step(loss, parameters, fused=not plain)


def looking(model: HardAttention, images: torch.Tensor, samples: int, plain: bool) -> Work:
    """Seven looks with EIG."""

    def run() -> None:
        once(model, "looking")
        Plain(model).look(images, LOOKS, samples) if plain else look(model, images, EIG(samples), LOOKS)

    return run


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


def pipeline(data: ImageSet, batch: int, device: torch.device, plain: bool) -> Work:
    """One epoch of augmented batches on the device. The plain one's workers are started once, beforehand."""
    if plain:
        many = dict(num_workers=os.cpu_count(), persistent_workers=True)
        loader = torch.utils.data.DataLoader(_Pictures(data), batch, shuffle=True, **many)
        return lambda: [(images.to(device), labels.to(device)) and None for images, labels in loader]
    resident, generator = data.to(device), torch.Generator().manual_seed(0)
    return lambda: [None for _ in resident.batches(batch, generator=generator, augment=True)]


def rows(column: str, widths: str, batch: int, device: torch.device) -> dict[str, tuple[int, Work]]:
    """Images and work of each row."""
    torch.manual_seed(0)
    data, model, plain = random_images(widths, batch), HardAttention(CONFIGS[widths]).to(device), column == "plain"
    if column in ("ours", "before"):
        keep_freed_memory()
        accelerate(model)
    images, labels = normalise(data.images[:batch]).to(device), data.labels[:batch].to(device)
    few = images[:64] if device.type == "cpu" else images  # 512 would take the plain version minutes
    made = {phase: (batch, training(model, images, labels, phase, plain)) for phase in ("first", "second", "third")}
    made |= {f"look{samples}": (len(few), looking(model, few, samples, plain)) for samples in (1, 20)}
    return made | {"input": (len(data), pipeline(data, batch, device, plain))}


def seconds(work: Work, device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def main(options: dict[str, Any]) -> None:
    device = torch.device(options["device"])
    clock = time.process_time if options["cpu_time"] else time.perf_counter
    made = rows(options["column"], options["widths"], options["batch"], device)
    print(json.dumps({name: images for name, (images, _) in made.items()}), flush=True)
    for line in sys.stdin:
        work = made[line.strip()][1]
        work()
        print(seconds(work, device, clock), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
