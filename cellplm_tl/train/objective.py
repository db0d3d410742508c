"""The denoising variational bound (appendix D, equation 12), term by term.

For a cell, with counts hidden from the network as targets:

    L = E_q(z|x~) [ log p(hidden counts | z) ] - KL_z - KL_y

`KL_z` and `KL_y` come from the latent (see `models.latent`): for the mixture L_cond and L_Y of
equation (12). All terms are in nats per cell, summed over genes. The bound is maximised, so the
loss is its negative. The release holds both KL terms above a threshold with a maximum, which takes
their gradient away (with its values the categorical term never acts); here they enter with a weight
and keep it.

Axes: `cells`, `genes` (targets), `latent`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cellplm_tl.models.decoder import Decoded
from cellplm_tl.models.embedder import TARGET_SUM

NB_EPSILON = 1e-10  # inside the logarithms (the release)
MIN_TOTAL = 1e-8


def negative_binomial_nll(counts: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """Negative log likelihood of counts, entry by entry.

    With t counts, m mean, r inverse dispersion (variance m + m^2 / r): ln G(r) + ln G(t + 1) - ln
    G(t + r) + (r + t) ln(1 + m / r) + t (ln r - ln m).

    Parameters
    ----------
    counts, mean : Tensor, shape (cells, genes)
    theta : Tensor, shape (genes,)

    Returns
    -------
    Tensor, shape (cells, genes)
        Nats.
    """
    r = theta + NB_EPSILON
    constant = torch.lgamma(r) + torch.lgamma(counts + 1) - torch.lgamma(counts + r)
    ratio = torch.log1p(mean / r)
    return constant + (r + counts) * ratio + counts * (r.log() - (mean + NB_EPSILON).log())


def scale_to_total(mean: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Scale each cell's mean to the total of its counts, over the entries with weight.

    Parameters
    ----------
    mean, counts : Tensor, shape (cells, genes)
    weights : Tensor, shape (genes,) or (cells, genes), optional
        0 for entries that take no part in the totals.
    """
    if weights is None:
        return mean * (counts.sum(1) / mean.sum(1).clamp(min=MIN_TOTAL))[:, None]
    totals = (counts * weights).sum(1) / (mean * weights).sum(1).clamp(min=MIN_TOTAL)
    return mean * totals[:, None]


def reconstruction(
    decoded: Decoded, target: Tensor, weights: Tensor, target_total: Tensor | None = None
) -> Tensor:
    """Negative log likelihood of the hidden counts, summed over genes, per cell.

    Parameters
    ----------
    decoded : Decoded
        Of the decoder, for the target genes.
    target : Tensor, shape (cells, genes)
        Counts that were hidden.
    weights : Tensor, shape (cells, genes)
        1 for entries that were hidden, 0 for entries that were not.
    target_total : Tensor, shape (cells,), optional
        Library size of the targets, for the gaussian, whose targets are lognorm.

    Returns
    -------
    Tensor, shape (cells,)
    """
    if decoded.theta is None:  # gaussian with constant variance, equation (9)
        assert target_total is not None
        scale = TARGET_SUM / target_total.clamp(min=1)
        lognorm = (target * scale[:, None]).log1p()
        return 0.5 * ((decoded.mean - lognorm).square() * weights).sum(1)
    mean = scale_to_total(decoded.mean, target, weights)
    return (negative_binomial_nll(target, mean, decoded.theta) * weights).sum(1)


def multinomial_nll(mean: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Negative log likelihood of where a cell's hidden counts fall, whatever their number.

    Parameters
    ----------
    mean, target : Tensor, shape (cells, genes)
        Expected up to a factor per cell, and counted.
    weights : Tensor, shape (cells, genes)
        1 for entries that were hidden, 0 for entries that were not.

    Returns
    -------
    Tensor, shape (cells,)
        Nats, without the multinomial coefficient.
    """
    return -(target * weights * _log_share(mean, weights)).sum(1)


def _log_share(mean: Tensor, weights: Tensor) -> Tensor:
    mean = mean * weights
    return (mean / mean.sum(1, keepdim=True).clamp(min=1e-12)).clamp(min=1e-9).log()


def explained_likelihood(
    decoded: Decoded, target: Tensor, weights: Tensor, profile: Tensor
) -> Tensor:
    """Gain in multinomial log likelihood over the context's mean profile, nats per hidden count.

    The measure that runs are compared by: 0 is the mean of the context, whatever the depth.

    Parameters
    ----------
    decoded, target, weights
        As in :func:`reconstruction`.
    profile : Tensor, shape (genes,)
        Mean fraction of each target gene in the context.

    Returns
    -------
    Tensor, shape ()
    """
    gain = _log_share(decoded.mean, weights) - _log_share(profile.expand_as(target), weights)
    hidden = target * weights
    return (hidden * gain).sum() / hidden.sum().clamp(min=1)
