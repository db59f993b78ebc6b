"""The method written a second time, from its equations alone: what the package is tested against, and compared with.

Nothing of `phattn` is used here but the names of the tensors in a model's `state_dict`. `Networks` holds F, R, C, S and
D as functions of those tensors. `Reference` takes one image, one place and one imagination at a time and is given every
random draw: `tests/test_reference.py` compares the losses of the package and their gradients with it. `Plain` is what
one would write for speed without much thought, a batch at a time: a loop over the looks, a call a look, `repeat` to
look ahead; `benchmarks/throughput.py` times it. (In phase one, BatchNorm sees the glimpses of one look in `Plain`, and
in `Reference`, as in the package, those of all looks.)
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    batch_norm,
    conv2d,
    conv_transpose2d,
    cross_entropy,
    dropout,
    layer_norm,
    leaky_relu,
    linear,
    logsigmoid,
    pad,
    softplus,
)

BOUND = 5.0  # the splines act on [-5, 5], with linear tails
LEAST = 1e-3  # width and height of a bin, as shares of the box, and slope at a knot


def log_normal(x: Tensor) -> Tensor:
    """Log-density of the standard normal distribution: …×D -> …."""
    return (-0.5 * x**2 - 0.5 * math.log(2 * math.pi)).sum(-1)


def spline(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """A rational-quadratic spline with linear tails: x B×D, raw B×D×(3K-1) -> y and the log of the slope, B×D."""
    y, log_slope = x.clone(), torch.zeros_like(x)
    inside = (x >= -BOUND) & (x <= BOUND)
    x, raw = x[inside], raw[inside]
    bins = (raw.shape[-1] + 1) // 3
    widths, heights, slopes = raw.split([bins, bins, bins - 1], -1)
    widths, heights = (2 * BOUND * (LEAST + (1 - bins * LEAST) * part.softmax(-1)) for part in (widths, heights))
    slopes = LEAST + softplus(slopes + math.log(math.expm1(1 - LEAST)))  # zeros give a slope of 1
    slopes = pad(slopes, (1, 1), value=1.0)
    lefts, bottoms = (pad(part.cumsum(-1), (1, 0)) - BOUND for part in (widths, heights))
    k = torch.searchsorted(lefts[..., 1:-1].contiguous(), x[..., None])
    left, width, bottom, height = (part.gather(-1, k)[..., 0] for part in (lefts, widths, bottoms, heights))
    low, high = slopes.gather(-1, k)[..., 0], slopes.gather(-1, k + 1)[..., 0]
    steep, share = height / width, (x - left) / width
    rest = share * (1 - share)
    below = steep + (low + high - 2 * steep) * rest
    y[inside] = bottom + height * (steep * share**2 + low * rest) / below
    top = steep**2 * (high * share**2 + 2 * steep * rest + low * (1 - share) ** 2)
    log_slope[inside] = top.log() - 2 * below.log()
    return y, log_slope


class Networks:
    """F, R, C, S and D, as functions of the tensors of a model.

    Args:
        tensors: parameters and statistics, by their names in the model's `state_dict`.
        image: side H of the images, in pixels.
        dropout: of C in training, the probability of dropping a channel of the state.
    """

    def __init__(self, tensors: Mapping[str, Tensor], image: int, dropout: float = 0.0):
        self.tensors, self.image, self.dropout = tensors, image, dropout
        self.blocks = self.count("glimpse.cnn.{}.0.weight")
        last = self.count("vae.decoder.norms.{}.weight") - 1
        self.n, _, self.width = tensors[f"vae.decoder.norms.{last}.weight"].shape
        self.size = 2 * self.blocks + 2  # each 3×3 convolution takes 2 off, the last one, 2×2, makes it one pixel
        self.stride = (image - self.size) // (self.n - 1)
        self.latent = tensors["vae.decoder.start.weight"].shape[1]
        self.hidden = tensors["recurrence.from_state.weight"].shape[0]

    def count(self, pattern: str) -> int:
        """How many layers of a name there are, numbered from 0."""
        k = 0
        while pattern.format(k) in self.tensors:
            k += 1
        return k

    def of(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a layer."""
        return self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear layer."""
        return linear(x, *self.of(name))

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        """LayerNorm of vectors over their channels."""
        return layer_norm(x, x.shape[-1:], *self.of(name))

    def batch_norm(self, name: str, x: Tensor, training: bool) -> Tensor:
        """BatchNorm per channel: by the statistics of the batch in training, else by those that it kept."""
        kept = (self.tensors[f"{name}.running_mean"], self.tensors[f"{name}.running_var"])
        return batch_norm(x, *kept, *self.of(name), training)

    def cnn(self, images: Tensor, training: bool = False) -> Tensor:
        """c: B×3×g×g -> B×nf×1×1; of whole images, of all their candidates: B×3×H×W -> B×nf×n×n."""
        x = images
        for k in range(self.blocks):
            x = leaky_relu(conv2d(x, *self.of(f"glimpse.cnn.{k}.0")))
            x = self.batch_norm(f"glimpse.cnn.{k}.2", x, training)
        return conv2d(x, *self.of(f"glimpse.cnn.{self.blocks}"), stride=self.stride)

    def features(self, c: Tensor, locations: Tensor, training: bool = False) -> Tensor:
        """F_loc: c M×nf of glimpses at locations M×2 (row, column; pixels) -> f, M×nf."""
        scaled = 2 * locations.to(c.dtype) / (self.image - self.size + 1) - 1
        return self.batch_norm("glimpse.norm", leaky_relu(c + self.linear("glimpse.place", scaled)), training)

    def update(self, f: Tensor, h: Tensor) -> Tensor:
        """R: f M×nf, state M×nh -> the next state, M×nh."""
        x = self.linear("recurrence.from_state", h) + self.linear("recurrence.from_glimpse", f)
        return self.layer_norm("recurrence.norm", leaky_relu(x))

    def classify(self, h: Tensor, training: bool = False) -> Tensor:
        """C: states M×nh -> log p(y|h), M×classes."""
        return self.linear("classifier.linear", dropout(h, self.dropout, training)).log_softmax(-1)

    def sample(self, h: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """S: states M×nh, noise M×nz -> latents M×nz and log q(z|h), M."""
        x = self.layer_norm("vae.encoder.layers.2", leaky_relu(self.linear("vae.encoder.layers.0", h)))
        x = self.linear("vae.encoder.layers.3", x)
        a, mean, log_variance = x.split([x.shape[-1] - 2 * self.latent, self.latent, self.latent], -1)
        z, log_det = self.flow(mean + noise * log_variance.exp().sqrt(), a)
        return z, log_normal(noise) - 0.5 * log_variance.sum(-1) - log_det

    def flow(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The flow: x M×nz under context a M×nf -> z M×nz and its log-determinant, M."""
        log_det = x.new_zeros(len(x))
        for k in range(self.count("vae.flow.norms.{}.coeff")):
            norm = f"vae.flow.norms.{k}"
            coeff, scale = self.tensors[f"{norm}.coeff"], self.mlp(f"{norm}.scale", a)
            x = x * coeff.exp() * scale.sigmoid() + self.mlp(f"{norm}.shift", a)
            x, log_slope = x.flip(-1), (coeff + logsigmoid(scale)).sum(-1)
            x, bend = spline(x, self.made(f"vae.flow.splines.{k}.network", x, a))
            log_det = log_det + log_slope + bend.sum(-1)
        return x, log_det

    def mlp(self, name: str, a: Tensor) -> Tensor:
        """Scale or shift of an ActNorm, from the context."""
        x = self.layer_norm(f"{name}.2", leaky_relu(self.linear(f"{name}.0", a), 0.2))
        return self.linear(f"{name}.3", x)

    def made(self, name: str, x: Tensor, a: Tensor) -> Tensor:
        """Parameters of the splines, from earlier dimensions and the context: x M×D, a M×C -> M×D×(3K-1)."""
        dims = x.shape[-1]
        for block, diagonal in (("first", -1), ("second", 0)):  # a unit of the first layer doesn't see its dimension
            mixed = self.linear(f"{name}.{block}.context", a)
            a, bias = mixed[:, :-dims], mixed[:, -dims:]
            x = leaky_relu(linear(x, self.tensors[f"{name}.{block}.masked.weight"].tril(diagonal)) + bias, 0.2)
            a = self.layer_norm(f"{name}.{block}.norm", leaky_relu(a, 0.2))
        weight = self.tensors[f"{name}.last.weight"].view(-1, dims, dims).tril().flatten(0, 1)
        return (linear(x, weight) + self.linear(f"{name}.last_context", a)).view(len(x), -1, dims).transpose(1, 2)

    def decode(self, z: Tensor) -> Tensor:
        """D: latents M×nz -> imagined features f̃ of all candidates, M×nf×n×n."""
        name = "vae.decoder"
        side = self.tensors[f"{name}.norms.0.weight"].shape[0]
        x = self.linear(f"{name}.start", z).view(len(z), side, side, self.width).permute(0, 3, 1, 2)
        x, grow = self.map_norm(0, leaky_relu(x)), self.count(f"{name}.grow.{{}}.weight")
        for k in range(grow):
            x = self.map_norm(k + 1, leaky_relu(conv_transpose2d(x, *self.of(f"{name}.grow.{k}"))))
        for k in range(self.count(f"{name}.refine.{{}}.weight")):
            x = pad(x, (1, 1, 1, 1), mode="replicate")
            x = self.map_norm(k + 1 + grow, leaky_relu(conv2d(x, *self.of(f"{name}.refine.{k}"))))
        return conv2d(pad(x, (1, 1, 1, 1), mode="replicate"), *self.of(f"{name}.last"))

    def map_norm(self, k: int, x: Tensor) -> Tensor:
        """LayerNorm of D over channels, rows and columns together: M×C×side×side."""
        weight, bias = (part.permute(2, 0, 1).contiguous() for part in self.of(f"vae.decoder.norms.{k}"))
        return layer_norm(x, weight.shape, weight, bias)

    def error(self, imagined: Tensor, target: Tensor) -> Tensor:
        """½ [(f̃ − c(x))²/exp(w) + w], of each feature."""
        w = self.tensors["vae.log_variance"]
        return 0.5 * ((imagined - target) ** 2 / w.exp() + w)


class Reference(Networks):
    """The losses and the look for given draws: one image, one place and one imagination at a time."""

    def location(self, place: int) -> tuple[int, int]:
        """Row and column, in pixels, of a candidate; they are numbered row by row."""
        return place // self.n * self.stride, place % self.n * self.stride

    def cut(self, image: Tensor, row: int, column: int) -> Tensor:
        """The glimpse of an image 3×H×W whose top-left pixel is at (row, column)."""
        return image[:, row : row + self.size, column : column + self.size]

    def glance(self, image: Tensor, place: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Look at a candidate: c of its glimpse, 1×nf, and the next state, 1×nh."""
        row, column = self.location(place)
        c = self.cnn(self.cut(image, row, column)[None])[:, :, 0, 0]
        return c, self.update(self.features(c, torch.tensor([[row, column]])), h)

    def start(self, images: Tensor) -> Tensor:
        """The state before the first look: zeros, 1×nh."""
        return images.new_zeros(1, self.hidden)

    def ahead(self, dream: Tensor, h: Tensor) -> Tensor:
        """log p(y|h) after looking at each candidate, N×classes, if features 1×nf×n×n were found there; state 1×nh."""
        beliefs = []
        for place in range(self.n**2):
            f = self.features(dream[:, :, place // self.n, place % self.n], torch.tensor([self.location(place)]))
            beliefs.append(self.classify(self.update(f, h))[0])
        return torch.stack(beliefs)

    def gain(self, h: Tensor, noise: Tensor) -> Tensor:
        """EIG of every candidate, N, for a state 1×nh and the noise of P imaginations, P×nz."""
        now, gains = self.classify(h)[0], 0.0
        for one in noise:
            dream = self.decode(self.sample(h, one[None])[0])
            divergences = [(then.exp() * (then - now)).sum() for then in self.ahead(dream, h)]
            gains = gains + torch.stack(divergences) / len(noise)
        return gains

    def best(self, gains: Tensor, seen: Sequence[int]) -> int:
        """Where the gain is largest among the places not seen."""
        return max(set(range(self.n**2)) - set(seen), key=lambda place: gains[place].item())

    def bound(self, h: Tensor, noise: Tensor, seen: Sequence[tuple[int, Tensor]]) -> Tensor:
        """L_V of one state 1×nh, with the noise nz of one imagination, and c (1×nf) of each of the places seen."""
        z, log_q = self.sample(h, noise[None])
        imagined, loss = self.decode(z)[0], log_q[0] - log_normal(z[0])
        for place, c in seen:
            loss = loss + self.error(imagined[:, place // self.n, place % self.n], c[0].detach()).sum()
        return loss

    def first(self, images: Tensor, labels: Tensor, locations: Tensor) -> Tensor:
        """Loss of phase one, for locations B×T×2 (row, column; pixels)."""
        looks, loss = locations.shape[1], 0.0
        pairs = [(image, location.tolist()) for image, row in zip(images, locations) for location in row]
        glimpses = torch.stack([self.cut(image, *location) for image, location in pairs])
        f = self.features(self.cnn(glimpses, True)[:, :, 0, 0], locations.flatten(0, 1), True)  # normalised together
        for number, label in enumerate(labels):
            h = self.start(images)
            for t in range(looks):
                h = self.update(f[None, number * looks + t], h)
                loss = loss - self.classify(h)[0, label]
        return loss / (len(images) * looks)

    def second(self, images: Tensor, places: Tensor, steps: Sequence[int], noise: Tensor) -> Tensor:
        """Loss of phase two.

        Args:
            images: B×3×H×W.
            places: the candidates looked at, in order, B×T.
            steps: after which looks, from 0, the bound is taken.
            noise: of the imaginations then, B×steps×nz.
        """
        loss = 0.0
        for image, row, draws in zip(images, places.tolist(), noise):
            h, states, seen = self.start(images), [], []
            for place in row:
                with torch.no_grad():
                    c, h = self.glance(image, place, h)
                states.append(h)
                seen.append((place, c))
            for t, draw in zip(steps, draws):
                loss = loss + self.bound(states[t], draw, seen[: t + 1])
        return loss / (len(images) * len(steps) * self.latent)

    def third(
        self,
        images: Tensor,
        labels: Tensor,
        places: Tensor,
        choosing: Tensor,
        steps: Sequence[int],
        noise: Tensor,
        ccebal: float,
    ) -> Tensor:
        """Loss of phase three.

        Args:
            images: B×3×H×W. labels: B.
            places: the first candidates to look at, B.
            choosing: the noise of the imagination by which each next one is chosen, B×(T-1)×nz.
            steps: after which looks, from 0, the bound is taken.
            noise: of the imaginations then, B×steps×nz.
            ccebal: weight of the cross-entropy.
        """
        bounds, surprise, looks = 0.0, 0.0, choosing.shape[1] + 1
        for image, label, place, dreams, draws in zip(images, labels, places.tolist(), choosing, noise):
            h, states, seen = self.start(images), [], []
            for t in range(looks):
                c, h = self.glance(image, place, h)
                states.append(h)
                seen.append((place, c))
                surprise = surprise - self.classify(h)[0, label]
                if t + 1 < looks:
                    with torch.no_grad():
                        place = self.best(self.gain(h, dreams[t, None]), [place for place, _ in seen])
            for t, draw in zip(steps, draws):
                bounds = bounds + self.bound(states[t], draw, seen[: t + 1])
        return bounds / (len(images) * len(steps) * self.latent) + ccebal * surprise / (len(images) * looks)

    @torch.no_grad()
    def look(self, images: Tensor, places: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look where EIG is largest.

        Args:
            images: B×3×H×W.
            places: the first candidates to look at, B.
            noise: of the P imaginations by which each next one is chosen, B×(T-1)×P×nz.

        Returns:
            The candidates looked at B×T, log p(y|h) B×T×classes, and EIG after each look but the last, B×(T-1)×N.
        """
        results = []
        for image, place, draws in zip(images, places.tolist(), noise):
            h, looked, beliefs, maps = self.start(images), [], [], []
            for t in range(len(draws) + 1):
                looked.append(place)
                h = self.glance(image, place, h)[1]
                beliefs.append(self.classify(h)[0])
                if t < len(draws):
                    maps.append(self.gain(h, draws[t]))
                    place = self.best(maps[-1], looked)
            results.append((torch.tensor(looked), torch.stack(beliefs), torch.stack(maps)))
        looked, beliefs, maps = (torch.stack(part) for part in zip(*results))
        return looked, beliefs, maps


class Plain(Networks):
    """The losses and the look of a batch at a time, with the tensors of `model`."""

    def __init__(self, model: nn.Module):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        super().__init__(tensors, model.config.image, model.config.dropout)
        side = self.stride * torch.arange(self.n, device=model.device)
        self.candidates = torch.cartesian_prod(side, side)

    def start(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Before the first look: the states, zeros B×nh, and no place seen, zeros B×N."""
        return images.new_zeros(len(images), self.hidden), images.new_zeros(len(images), len(self.candidates))

    def glimpse(self, images: Tensor, locations: Tensor, training: bool = False) -> Tensor:
        """f of one glimpse for each image, cut out one by one: B×nf."""
        g = self.size
        cut = [image[:, row : row + g, col : col + g] for image, (row, col) in zip(images, locations.tolist())]
        return self.features(self.cnn(torch.stack(cut), training).flatten(1), locations, training)

    def draw(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """One latent for each state, and log q."""
        return self.sample(h, torch.randn(len(h), self.latent, device=h.device).to(h))

    def bound(self, h: Tensor, target: Tensor, seen: Tensor) -> Tensor:
        """L_V / nz after a look; target B×nf×n×n, seen B×N."""
        z, log_q = self.draw(h)
        error = self.error(self.decode(z), target) * seen.view(-1, 1, self.n, self.n)
        return (error.sum((1, 2, 3)) - log_normal(z) + log_q).mean() / self.latent

    @torch.no_grad()
    def gain(self, h: Tensor, samples: int) -> Tensor:
        """EIG of all candidates: B×N."""
        batch, count = len(h), len(self.candidates)
        dreams = self.decode(self.draw(h.repeat(samples, 1))[0]).flatten(2).transpose(1, 2)
        f = self.features(dreams.flatten(0, 1), self.candidates.repeat(samples * batch, 1))
        ahead = self.update(f, h.repeat(samples, 1)[:, None].repeat(1, count, 1).flatten(0, 1))
        would, belief = self.classify(ahead).view(samples, batch, count, -1), self.classify(h)
        return (would.exp() * (would - belief[:, None])).sum(-1).mean(0)

    def anywhere(self, images: Tensor) -> Tensor:
        """A random candidate for each image: B."""
        return torch.randint(len(self.candidates), (len(images),), device=images.device)

    def see(self, seen: Tensor, place: Tensor) -> Tensor:
        """The places seen, with one more for each image."""
        seen = seen.clone()
        seen[torch.arange(len(seen)), place] = 1
        return seen

    def first(self, images: Tensor, labels: Tensor, looks: int) -> Tensor:
        """Loss of phase one."""
        h, loss = self.start(images)[0], 0.0
        for _ in range(looks):
            locations = torch.randint(self.image - self.size + 1, (len(images), 2), device=images.device)
            h = self.update(self.glimpse(images, locations, True), h)
            loss = loss + cross_entropy(self.classify(h, True), labels) / looks
        return loss

    def second(self, images: Tensor, labels: Tensor, looks: int) -> Tensor:
        """Loss of phase two."""
        (h, seen), loss = self.start(images), 0.0
        with torch.no_grad():
            target = self.cnn(images)
        places = torch.rand(seen.shape, device=images.device).argsort(-1)
        for t in range(looks):
            with torch.no_grad():
                h = self.update(self.glimpse(images, self.candidates[places[:, t]]), h)
            seen = self.see(seen, places[:, t])
            loss = loss + self.bound(h, target, seen) / looks
        return loss

    def third(self, images: Tensor, labels: Tensor, looks: int, ccebal: float = 16.0) -> Tensor:
        """Loss of phase three."""
        (h, seen), loss = self.start(images), 0.0
        with torch.no_grad():
            target = self.cnn(images)
        place = self.anywhere(images)
        for t in range(looks):
            h, seen = self.update(self.glimpse(images, self.candidates[place]), h), self.see(seen, place)
            loss = loss + self.bound(h, target, seen) / looks
            loss = loss + ccebal * cross_entropy(self.classify(h, True), labels) / looks
            if t + 1 < looks:
                place = (self.gain(h, 1) - 1e9 * seen).argmax(-1)
        return loss

    @torch.no_grad()
    def look(self, images: Tensor, looks: int, samples: int) -> Tensor:
        """The state after looking where EIG is largest."""
        h, seen = self.start(images)
        place = self.anywhere(images)
        for t in range(looks):
            h, seen = self.update(self.glimpse(images, self.candidates[place]), h), self.see(seen, place)
            if t + 1 < looks:
                place = (self.gain(h, samples) - 1e9 * seen).argmax(-1)
        return h
