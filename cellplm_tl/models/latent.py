"""The latent distribution of a cell: Gaussian mixture, Gaussian, or none.

`MixtureLatent` is appendix D, equations (9) to (12): q(z|x) = N(mu(h), sigma^2(h)), q(y|z), p(z|y)
one Gaussian per component, p(y) uniform. `MixtureReleaseLatent` is the released `gmvae`, whose
inference runs the other way: q(y|h), then q(z|h, y). `GaussianLatent` has the standard normal prior
(the released `vae`; Table 10, "w/o Mixture of Gaussian"). `PlainLatent` has no distribution.

Each module maps h (cells, hidden) to a `Posterior`, and `terms(posterior, z)` gives the
Kullback-Leibler terms of the bound per cell, by name, without weights or thresholds (those belong
to the objective).

Axes: `cells`, `hidden`, `latent`, `components`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellplm_tl.models.config import CellPLMConfig
from cellplm_tl.models.linear import Linear, linear

LOG_VARIANCE_BOUND = 5.0  # of the released vae
VARIANCE_FLOOR = 1e-4  # added to exp(log variance) in the released vae
RELEASE_HIDDEN = 512  # width inside the released gmvae, hard-wired there
RELEASE_SAMPLE_EPSILON = 1e-10  # added to the variance before the root when the release samples
RELEASE_DENSITY_EPSILON = 1e-8  # added to variances in the release's log densities
GUMBEL_EPSILON = 1e-20
PRIOR_STD = 0.5  # spread of the initial component means: distinct, inside a unit prior


class Posterior(NamedTuple):
    """q(z | x) of the cells of a block, and what its prior needs to know."""

    mean: Tensor  # (cells, latent)
    variance: Tensor | None = None  # (cells, latent)
    logits: Tensor | None = None  # (cells, components), where y is inferred before z
    component: Tensor | None = None  # (cells, components): y as used, likewise


def clamp_through(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp in the forward pass and let the gradient through as if nothing had been clamped."""
    return x.detach().clamp(low, high) + (x - x.detach())  # what is added is exactly 0


def _draw(posterior: Posterior, noise: Tensor | None, epsilon: float = 0.0) -> Tensor:
    """z = mean + sigma noise; the mean without noise or variance."""
    if noise is None or posterior.variance is None:
        return posterior.mean
    return posterior.mean + (posterior.variance + epsilon).sqrt() * noise


class GaussianLatent(nn.Module):
    """q(z|x) = N(mu(h), sigma^2(h)) against p(z) = N(0, 1)."""

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        self.mean = Linear(config.hidden, config.latent_size)
        self.log_variance = Linear(config.hidden, config.latent_size)

    def forward(self, h: Tensor, start: Tensor | None = None) -> Posterior:
        """(cells, hidden) → posterior; `start` (cells, latent) is added to the mean."""
        mean = self.mean(h) if start is None else start + self.mean(h)
        log_variance = clamp_through(self.log_variance(h), -LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)
        return Posterior(mean, log_variance.exp() + VARIANCE_FLOOR)

    def sample(self, posterior: Posterior, noise: Tensor | None) -> Tensor:
        """Return z (cells, latent) for standard normal noise, or the mean for none."""
        return _draw(posterior, noise)

    def terms(self, posterior: Posterior, z: Tensor) -> dict[str, Tensor]:
        """KL(q(z|x) || N(0, 1)) per cell."""
        mean, variance = posterior.mean, posterior.variance
        assert variance is not None
        return {"latent": 0.5 * (mean.square() + variance - 1 - variance.log()).sum(1)}


class MixtureLatent(GaussianLatent):
    """Appendix D: q(z|x) q(y|z) against p(z|y) p(y)."""

    def __init__(self, config: CellPLMConfig):
        super().__init__(config)
        components, latent = config.components, config.latent_size
        self.assign = Linear(latent, components)  # f_pi: z → logits of q(y|z)
        self.prior_mean = nn.Parameter(torch.randn(components, latent) * PRIOR_STD)
        self.prior_log_variance = nn.Parameter(torch.zeros(components, latent))

    def components(self, z: Tensor) -> Tensor:
        """Return q(y|z), (cells, components)."""
        return self.assign(z).softmax(1)

    def place_components(self, centres: Tensor, variance: Tensor) -> None:
        """Start the prior from clusters of cells, and q(y|z) from Bayes' rule under that prior.

        Components that start at random are won by the first of them that nears the data; clusters
        give each a part of it.

        Parameters
        ----------
        centres : Tensor, shape (components, latent)
        variance : Tensor, shape (latent,)
            Within the clusters.
        """
        with torch.no_grad():
            self.prior_mean.copy_(centres)
            self.prior_log_variance.copy_(variance.log().expand_as(centres))
            self.assign.weight.copy_(centres / variance)
            self.assign.bias.copy_(-0.5 * (centres.square() / variance).sum(1))

    def terms(self, posterior: Posterior, z: Tensor) -> dict[str, Tensor]:
        """Return E_q(y|z) KL(q(z|x) || p(z|y)) and KL(q(y|z) || uniform) per cell: L_cond, L_Y."""
        mean, variance = posterior.mean, posterior.variance
        assert variance is not None
        log_prior = clamp_through(self.prior_log_variance, -LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)
        precision = (-log_prior).exp()  # (components, latent)
        # Each sum over the latent of (mean - prior mean)^2 / prior variance, as three products.
        distance = (
            (mean.square() + variance) @ precision.T
            - 2 * mean @ (precision * self.prior_mean).T
            + (precision * self.prior_mean.square()).sum(1)
        )  # (cells, components)
        divergence = 0.5 * (
            distance + log_prior.sum(1) - variance.log().sum(1, keepdim=True) - mean.shape[1]
        )
        log_y = self.assign(z).log_softmax(1)
        y = log_y.exp()
        return {
            "latent": (y * divergence).sum(1),
            "components": (y * (log_y + math.log(y.shape[1]))).sum(1),
        }


class MixtureReleaseLatent(nn.Module):
    """The released gmvae: q(y|h) = softmax, q(z|h, y) = N(mu, var) through a hidden layer.

    The release draws y at random even when it predicts. Without noise this module returns the mean
    over those draws, sum_k q(y = k|h) mu(h, k): deterministic, continuous in h, and the expectation
    of what the release returns.
    """

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        hidden, latent, components = config.hidden, config.latent_size, config.components
        self.logits = Linear(hidden, components)
        self.join = Linear(hidden + components, RELEASE_HIDDEN)
        self.mean = Linear(RELEASE_HIDDEN, latent)
        self.variance = Linear(RELEASE_HIDDEN, latent)
        self.prior_mean = Linear(components, latent)
        self.prior_variance = Linear(components, latent)

    def forward(
        self, h: Tensor, start: Tensor | None = None, uniform: Tensor | None = None
    ) -> Posterior:
        """(cells, hidden) → posterior, averaged over y; or for one y drawn with Gumbel noise.

        Parameters
        ----------
        uniform : Tensor, shape (cells, components), optional
            Uniform draws. While training y is the softmax of the perturbed logits, else their
            argmax.
        """
        logits = self.logits(h)
        if uniform is None:
            return self._expected(h, logits)
        gumbel = -(-(uniform + GUMBEL_EPSILON).log() + GUMBEL_EPSILON).log()
        y = (logits + gumbel).softmax(1)
        if not self.training:
            y = F.one_hot(y.argmax(1), y.shape[1]).to(h.dtype)
        t = self.join(torch.cat((h, y), 1)).relu()
        return Posterior(self.mean(t), F.softplus(self.variance(t)), logits, y)

    def _expected(self, h: Tensor, logits: Tensor) -> Posterior:
        y = logits.softmax(1)
        from_h, from_y = self.join.weight.split((h.shape[1], y.shape[1]), 1)
        base = linear(h, from_h, self.join.bias)  # (cells, 512)
        # mu is affine in t, so the mean of mu(t) over y is mu of the mean of t.
        t = torch.zeros_like(base)
        for k in range(y.shape[1]):
            t = t.addcmul(y[:, k : k + 1], (base + from_y[:, k]).relu())
        return Posterior(self.mean(t), F.softplus(self.variance(t)), logits, y)

    def sample(self, posterior: Posterior, noise: Tensor | None) -> Tensor:
        """Return z (cells, latent) for standard normal noise, or the mean for none."""
        return _draw(posterior, noise, RELEASE_SAMPLE_EPSILON)

    def terms(self, posterior: Posterior, z: Tensor) -> dict[str, Tensor]:
        """Return ln q(z|h, y) - ln p(z|y) at the sample z, and ln K - H(q(y|h)), per cell."""
        assert posterior.variance is not None and posterior.component is not None
        assert posterior.logits is not None
        prior_mean = self.prior_mean(posterior.component)
        prior_variance = F.softplus(self.prior_variance(posterior.component))
        latent = _log_density(z, posterior.mean, posterior.variance) - _log_density(
            z, prior_mean, prior_variance
        )
        log_y = posterior.logits.log_softmax(1)
        return {
            "latent": latent,
            "components": (log_y.exp() * log_y).sum(1) + math.log(log_y.shape[1]),
        }


def _log_density(z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Log density of a diagonal Gaussian, summed over the latent, (cells,)."""
    variance = variance + RELEASE_DENSITY_EPSILON
    square = (z - mean).square() / variance
    return -0.5 * (square + variance.log() + math.log(2 * math.pi)).sum(1)


class PlainLatent(nn.Module):
    """No distribution: a linear layer (the release's `ae`), or h itself."""

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        has_linear = config.latent == "linear"
        self.linear = Linear(config.hidden, config.latent_size) if has_linear else nn.Identity()

    def forward(self, h: Tensor, start: Tensor | None = None) -> Posterior:
        """(cells, hidden) → (cells, latent); `start` is added to a linear layer's result."""
        z = self.linear(h)
        return Posterior(z if start is None else start + z)

    def sample(self, posterior: Posterior, noise: Tensor | None) -> Tensor:
        """Return the mean: there is nothing to draw."""
        return posterior.mean

    def terms(self, posterior: Posterior, z: Tensor) -> dict[str, Tensor]:
        """Return no term."""
        return {}


LATENTS: dict[str, type[nn.Module]] = {
    "mixture": MixtureLatent,
    "mixture_release": MixtureReleaseLatent,
    "gaussian": GaussianLatent,
    "linear": PlainLatent,
    "none": PlainLatent,
}
