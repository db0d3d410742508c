"""What a negative binomial says of a count: expectations and quantiles, entry by entry.

A count X has mean m and inverse dispersion r (variance m + m² / r). Sums over k = 0, 1, … end for
an entry when less than `TAIL` of its probability is left: after a few terms for nearly all entries
of a matrix of cells. The few with large means, or long tails, take an integral, or scipy.

Axes: `cells`, `genes`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import nbinom
from torch import Tensor

TAIL = 1e-5  # probability that a sum leaves out
MAX_TERMS = 64  # of a sum
TERMS_BETWEEN = 4  # looks at which entries are done
# Of the integral over u = log t: e^-t has fallen to nothing above, and to its start below.
LOG_T = (-24.0, 4.0)
LOG_T_STEP = 0.25


class _Entries(NamedTuple):
    """Entries of a matrix on their way through the terms of a sum."""

    at: Tensor  # (entries,) positions in the flattened matrix
    mean: Tensor  # (entries,)
    theta: Tensor  # (entries,)
    probability: Tensor  # (entries,) P(X = k)
    below: Tensor  # (entries,) P(X <= k)

    def next(self, k: int) -> _Entries:
        """Go on to P(X = k)."""
        odds = self.mean / (self.theta + self.mean)
        probability = self.probability * ((self.theta + (k - 1)) / k) * odds
        return self._replace(probability=probability, below=self.below + probability)

    def where(self, condition: Tensor) -> _Entries:
        """Keep some of the entries."""
        return _Entries(*(part[condition] for part in self))


def _start(mean: Tensor, theta: Tensor) -> _Entries:
    """Return all entries with a positive mean, at k = 0."""
    flat = mean.reshape(-1)
    at = torch.nonzero(flat > 0)[:, 0]
    m, r = flat[at], theta[at % mean.shape[1]].to(flat)
    probability = torch.exp(-r * torch.log1p(m / r))
    return _Entries(at, m, r, probability, probability)


def expected_log1p(mean: Tensor, theta: Tensor, scale: Tensor) -> Tensor:
    """E log(1 + s X), which is less than log(1 + s m).

    Parameters
    ----------
    mean : Tensor, shape (cells, genes)
        Expected counts.
    theta : Tensor, shape (genes,)
        Inverse dispersion.
    scale : Tensor, shape (cells,)
        s: what a count of the cell is multiplied with, such as 10,000 over its library size.

    Returns
    -------
    Tensor, shape (cells, genes), float32
        Natural logarithm.

    Notes
    -----
    Where the sum does not end, log(1 + x) = ∫ (1 - e^-xt) e^-t dt / t is taken, under which the
    expectation is closed: E e^-aX = (1 + m (1 - e^-a) / r)^-r.
    """
    n_genes = mean.shape[1]
    result = torch.zeros(mean.numel(), dtype=torch.float32, device=mean.device)
    entries = _start(mean.float(), theta.float())
    for k in range(1, MAX_TERMS + 1):
        entries = entries.next(k)
        s = scale[entries.at // n_genes].float()
        result[entries.at] += entries.probability * torch.log1p(s * k)
        if k % TERMS_BETWEEN == 0:
            entries = entries.where(1 - entries.below > TAIL)
    s = scale[entries.at // n_genes]
    result[entries.at] = _expected_log1p_by_integral(entries.mean, entries.theta, s).float()
    return result.reshape(mean.shape)


def _expected_log1p_by_integral(mean: Tensor, theta: Tensor, scale: Tensor) -> Tensor:
    mean, theta, scale = mean.double(), theta.double(), scale.double()
    result = torch.zeros_like(mean)
    for u in np.arange(LOG_T[0], LOG_T[1], LOG_T_STEP):
        t = float(np.exp(u))
        ratio = mean / theta * -torch.expm1(-t * scale)
        result -= torch.expm1(-theta * torch.log1p(ratio)) * float(np.exp(-t))
    return result * LOG_T_STEP


def seen_probability(mean: Tensor, theta: Tensor) -> Tensor:
    """P(X > 0), (cells, genes)."""
    return -torch.expm1(-theta * torch.log1p(mean / theta))


def quantile(mean: Tensor, theta: Tensor, level: float) -> Tensor:
    """Return the smallest count k with P(X <= k) >= level, (cells, genes) float32.

    Parameters
    ----------
    mean : Tensor, shape (cells, genes)
    theta : Tensor, shape (genes,)
    level : float
        Between 0 and 1.
    """
    result = torch.zeros(mean.numel(), dtype=torch.float32, device=mean.device)
    entries = _start(mean.double(), theta.double())
    for k in range(1, MAX_TERMS + 1):
        entries = entries.where(entries.below < level)
        result[entries.at] = k
        entries = entries.next(k)
    entries = entries.where(entries.below < level)
    success = entries.theta / (entries.theta + entries.mean)
    found = nbinom.ppf(level, entries.theta.cpu().numpy(), success.cpu().numpy())
    result[entries.at] = torch.from_numpy(np.asarray(found)).to(result)
    return result.reshape(mean.shape)
