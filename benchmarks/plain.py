"""The method as one would write it from the paper, a loop over t, a call a step, `repeat` to look ahead.

It computes what `phattn` computes, with the same parameters. (In the training of phase one, BatchNorm sees the glimpses
of one step here, and those of all steps there.) The decoder keeps channels first; the masked networks multiply their
weights by masks at each call; the spline is written with searches and gathers along the bins, on the inputs inside its
box only. Nothing here is used by the package.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, leaky_relu, linear, logsigmoid, pad, softplus

from phattn.flows import ConditionalFlow, MaskedNetwork
from phattn.model import HardAttention, evaluating
from phattn.partial_vae import Decoder


class PlainDecoder(nn.Module):
    """D with channels first, from the parameters of ours."""

    def __init__(self, ours: Decoder):
        super().__init__()
        self.n, self.grow, self.refine, self.last = ours.n, ours.grow, ours.refine, ours.last
        side, _, channels = ours.norms[0].normalized_shape
        self.start = nn.ConvTranspose2d(ours.start.in_features, channels, side, bias=False)
        weight = ours.start.weight.detach().view(side, side, channels, -1).permute(3, 2, 0, 1)
        self.start.weight = nn.Parameter(weight.contiguous())
        self.shift = nn.Parameter(ours.start.bias.detach().view(side, side, channels).permute(2, 0, 1).contiguous())
        self.norms = nn.ModuleList()
        for norm in ours.norms:
            height, width, channels = norm.normalized_shape
            plain = nn.LayerNorm((channels, height, width))
            plain.weight.data = norm.weight.detach().permute(2, 0, 1).contiguous()
            plain.bias.data = norm.bias.detach().permute(2, 0, 1).contiguous()
            self.norms.append(plain)

    def forward(self, z: Tensor) -> Tensor:
        """B×nz -> B×nf×n×n."""
        x = self.norms[0](leaky_relu(self.start(z[:, :, None, None]) + self.shift))
        for k, layer in enumerate([*self.grow, *self.refine]):
            if k >= len(self.grow):
                x = pad(x, (1, 1, 1, 1), mode="replicate")
            x = self.norms[k + 1](leaky_relu(layer(x)))
        return self.last(pad(x, (1, 1, 1, 1), mode="replicate"))


def made(network: MaskedNetwork, x: Tensor, a: Tensor) -> Tensor:
    """Parameters of the splines from earlier dimensions and the context: x B×D, a B×C -> B×D×outputs."""
    for block in (network.first, network.second):
        a, bias = block.context(a).split(block.sizes, -1)
        x = leaky_relu(linear(x, block.masked.weight * block.masked.mask) + bias, 0.2)
        a = block.norm(leaky_relu(a, 0.2))
    mask = network.last.mask.repeat(network.outputs, 1)
    y = linear(x, network.last.weight * mask) + network.last_context(a)
    return y.view(len(x), network.outputs, -1).transpose(1, 2)


def spline(x: Tensor, raw: Tensor, bound: float, least: float = 1e-3) -> tuple[Tensor, Tensor]:
    """A rational-quadratic spline with linear tails: x B×D, raw B×D×(3K-1) -> y and the log of the slope, B×D."""
    y, log_slope = x.clone(), torch.zeros_like(x)
    inside = (x >= -bound) & (x <= bound)
    x, raw = x[inside], raw[inside]
    bins = (raw.shape[-1] + 1) // 3
    widths, heights, slopes = raw.split([bins, bins, bins - 1], -1)
    widths, heights = (2 * bound * (least + (1 - bins * least) * part.softmax(-1)) for part in (widths, heights))
    shift = torch.log(torch.expm1(torch.tensor(1 - least)))
    slopes = pad(least + softplus(slopes + shift), (1, 1), value=1.0)
    lefts, bottoms = (pad(part.cumsum(-1), (1, 0)) - bound for part in (widths, heights))
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


def flow(ours: ConditionalFlow, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The flow, layer by layer: x B×D, a B×C -> z and its log-determinant."""
    log_det = torch.zeros(len(x), device=x.device)
    for norm, layer in zip(ours.norms, ours.splines):
        scale, shift = norm.scale(a), norm.shift(a)
        x = x * norm.coeff.exp() * scale.sigmoid() + shift
        log_det = log_det + (norm.coeff + logsigmoid(scale)).sum(-1)
        x = x.flip(-1)
        x, log_slope = spline(x, made(layer.network, x, a), layer.bound)
        log_det = log_det + log_slope.sum(-1)
    return x, log_det


class Plain:
    """The three losses and the look, step by step, with the parameters of `model`."""

    def __init__(self, model: HardAttention):
        self.model, self.decoder = model, PlainDecoder(model.vae.decoder)
        self.candidates = model.grid.candidates(model.device)

    def glimpse(self, images: Tensor, locations: Tensor) -> Tensor:
        """f of one glimpse for each image, cut out one by one: B×nf."""
        g = self.model.grid.glimpse
        cut = [image[:, row : row + g, col : col + g] for image, (row, col) in zip(images, locations.tolist())]
        return self.model.glimpse.at(self.model.glimpse.cnn(torch.stack(cut)).flatten(1), locations)

    def classify(self, h: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy after one step."""
        return cross_entropy(self.model.classifier(h), labels)

    def sample(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """One latent for each state, and log q."""
        a, mean, log_variance = self.model.vae.encoder(h)
        noise = torch.randn_like(mean)
        z, log_det = flow(self.model.vae.flow, mean + noise * (0.5 * log_variance).exp(), a)
        log_noise = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
        return z, log_noise - 0.5 * log_variance.sum(-1) - log_det

    def bound(self, h: Tensor, target: Tensor, seen: Tensor) -> Tensor:
        """L_V / nz of one step; target B×nf×n×n, seen B×n×n."""
        z, log_q = self.sample(h)
        w = self.model.vae.log_variance
        error = (self.decoder(z) - target) ** 2 / w.exp() + w
        log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        return (0.5 * (error * seen[:, None]).sum((1, 2, 3)) - log_prior + log_q).mean() / z.shape[-1]

    def gain(self, h: Tensor, samples: int) -> Tensor:
        """EIG of all candidates: B×N."""
        model, (batch, n) = self.model, (len(h), len(self.candidates))
        belief = model.classifier(h).log_softmax(-1)
        dreams = self.decoder(self.sample(h.repeat(samples, 1))[0]).flatten(2).transpose(1, 2)
        places = self.candidates.repeat(samples * batch, 1)
        f = model.glimpse.at(dreams.reshape(samples * batch * n, -1), places)
        ahead = model.recurrence(f, h.repeat(samples, 1)[:, None].repeat(1, n, 1).flatten(0, 1))
        would = model.classifier(ahead).log_softmax(-1).view(samples, batch, n, -1)
        return (would.exp() * (would - belief[:, None])).sum(-1).mean(0)

    def nowhere(self, images: Tensor) -> Tensor:
        """No place seen yet: zeros, B×N."""
        return torch.zeros(len(images), len(self.candidates), device=images.device)

    def anywhere(self, images: Tensor) -> Tensor:
        """A random candidate for each image: B."""
        return torch.randint(len(self.candidates), (len(images),), device=images.device)

    def shuffled(self, images: Tensor) -> Tensor:
        """All candidates in random order for each image: B×N."""
        return torch.rand(len(images), len(self.candidates), device=images.device).argsort(-1)

    def pixels(self, images: Tensor) -> Tensor:
        """A random place for each image, at any pixel: B×2."""
        side = images.shape[-1] - self.model.grid.glimpse + 1
        return torch.randint(side, (len(images), 2), device=images.device)

    def first(self, images: Tensor, labels: Tensor, looks: int) -> Tensor:
        """Loss of phase one."""
        h, loss = self.model.recurrence.start(len(images)), 0.0
        for _ in range(looks):
            locations = self.pixels(images)
            h = self.model.recurrence(self.glimpse(images, locations), h)
            loss = loss + self.classify(h, labels) / looks
        return loss

    def second(self, images: Tensor, labels: Tensor, looks: int) -> Tensor:
        """Loss of phase two."""
        with torch.no_grad():
            target = self.model.glimpse.cnn(images)
        h, seen, loss = self.model.recurrence.start(len(images)), self.nowhere(images), 0.0
        places = self.shuffled(images)
        for t in range(looks):
            with torch.no_grad():
                h = self.model.recurrence(self.glimpse(images, self.candidates[places[:, t]]), h)
            seen[torch.arange(len(images)), places[:, t]] = 1
            loss = loss + self.bound(h, target, seen.clone().view(-1, *target.shape[2:])) / looks
        return loss

    def third(self, images: Tensor, labels: Tensor, looks: int, ccebal: float = 16.0) -> Tensor:
        """Loss of phase three."""
        with torch.no_grad():
            target = self.model.glimpse.cnn(images)
        h, seen, loss = self.model.recurrence.start(len(images)), self.nowhere(images), 0.0
        place = self.anywhere(images)
        for t in range(looks):
            h = self.model.recurrence(self.glimpse(images, self.candidates[place]), h)
            seen[torch.arange(len(images)), place] = 1
            loss = loss + self.bound(h, target, seen.clone().view(-1, *target.shape[2:])) / looks
            loss = loss + ccebal * self.classify(h, labels) / looks
            if t + 1 < looks:
                with evaluating(self.model):
                    place = (self.gain(h, 1) - 1e9 * seen).argmax(-1)
        return loss

    @torch.no_grad()
    def look(self, images: Tensor, looks: int, samples: int) -> Tensor:
        """The state after looking where EIG is largest."""
        h, seen = self.model.recurrence.start(len(images)), self.nowhere(images)
        place = self.anywhere(images)
        for t in range(looks):
            h = self.model.recurrence(self.glimpse(images, self.candidates[place]), h)
            seen[torch.arange(len(images)), place] = 1
            if t + 1 < looks:
                place = (self.gain(h, samples) - 1e9 * seen).argmax(-1)
        return h
