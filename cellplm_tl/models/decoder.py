"""From the latent back to genes: decoders with covariates, and the heads of fine-tuned models.

All decoders share a trunk (hidden layers, each followed by the covariates) and end in a map to the
genes that were asked for; no other gene is ever computed.

Axes: `cells`, `latent`, `hidden` (the decoder's), `genes` (asked for).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cellplm_tl.models.config import CellPLMConfig
from cellplm_tl.models.embedder import make_norm
from cellplm_tl.models.latent import clamp_through
from cellplm_tl.models.linear import Linear, linear

MEAN_BOUNDS = (1e-5, 1e6)  # of the released decoder's mean
DISPERSION_BOUNDS = (1e-4, 1e4)  # of its inverse dispersion theta
BOTTLENECK = 128  # width before the genes in the release, hard-wired there
FRACTION_BOUNDS = (1e-12, 1e3)  # of the profile decoder's mean, which is scaled per cell later
PROFILE_FLOOR = 1e-7  # fraction of a gene that a context does not show

Covariates = dict[str, Tensor]  # name → level of each cell (cells,), int64


class Decoded(NamedTuple):
    """Parameters of the likelihood, for the genes asked for."""

    mean: Tensor  # (cells, genes): up to a factor per cell (counts), or lognorm (gaussian)
    theta: Tensor | None  # (genes,): inverse dispersion; None for the gaussian


class Background(NamedTuple):
    """What the profile decoder starts from, for the genes asked for."""

    profile: Tensor  # (genes,): mean fraction of each gene in the context
    loadings: Tensor  # (genes, factors): the spectrum's rows times the scale of the gene, s_g V_g
    eigenvalues: Tensor  # (factors,): of the spectrum


class CovariateTable(nn.Module):
    """Vector of a covariate's level; without a level, the release's sum over all levels.

    The release means an average and takes a sum; its norm divides scale out, so that the two differ
    only through the norm's epsilon.
    """

    def __init__(self, config: CellPLMConfig, n_levels: int):
        super().__init__()
        self.table = nn.Embedding(n_levels, config.decoder_hidden)
        self.activation = nn.PReLU()
        self.norm = make_norm(config, config.decoder_hidden)

    def forward(self, levels: Tensor | None) -> Tensor:
        """Return (cells, hidden), or (1, hidden) without levels."""
        if levels is None:
            rows = self.table.weight.detach().sum(0, keepdim=True)
        else:
            rows = self.table(levels)
        return self.norm(self.activation(rows))


class TrunkLayer(nn.Module):
    """norm(Dropout(PReLU(Linear(x)))) plus the covariates."""

    def __init__(self, config: CellPLMConfig, width: int):
        super().__init__()
        self.linear = Linear(width, config.decoder_hidden)
        self.activation = nn.PReLU()
        self.dropout = nn.Dropout(config.dropout)
        self.norm = make_norm(config, config.decoder_hidden)
        self.covariates = nn.ModuleDict(
            {name: CovariateTable(config, levels) for name, levels in config.covariates}
        )

    def forward(self, x: Tensor, covariates: Covariates) -> Tensor:
        """(cells, width) → (cells, hidden)."""
        x = self.norm(self.dropout(self.activation(self.linear(x))))
        for name, table in self.covariates.items():
            x = x + table(covariates.get(name))
        return x


class _Trunk(nn.Module):
    """Hidden layers from the latent, told the covariates."""

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        widths = [config.latent_size] + [config.decoder_hidden] * (config.decoder_layers - 2)
        self.layers = nn.ModuleList(TrunkLayer(config, width) for width in widths)

    def forward(self, z: Tensor, covariates: Covariates) -> Tensor:
        """(cells, latent) → (cells, hidden)."""
        for layer in self.layers:
            z = layer(z, covariates)
        return z


class _GeneDecoder(nn.Module):
    """Trunk, bottleneck, and a linear map to each gene."""

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        self.trunk = _Trunk(config)
        self.bottleneck = Linear(config.decoder_hidden, BOTTLENECK)
        self.genes = Linear(BOTTLENECK, config.n_genes)

    def outputs(self, z: Tensor, genes: Tensor, covariates: Covariates) -> Tensor:
        """(cells, latent) → (cells, genes)."""
        t = self.bottleneck(self.trunk(z, covariates)).relu()
        return linear(t, self.genes.weight[genes], self.genes.bias[genes])


class NegativeBinomialDecoder(_GeneDecoder):
    """The released decoder: mean = exp(...), one inverse dispersion per gene."""

    def __init__(self, config: CellPLMConfig):
        super().__init__(config)
        self.log_theta = nn.Parameter(torch.zeros(config.n_genes))

    def forward(
        self,
        z: Tensor,
        genes: Tensor,
        covariates: Covariates,
        background: Background | None = None,
    ) -> Decoded:
        """(cells, latent) → mean (cells, genes), theta (genes,).

        The clamp is on the exponent, so that nothing overflows, and lets its gradient through.
        """
        mean = _bounded_exp(self.outputs(z, genes, covariates), MEAN_BOUNDS)
        return Decoded(mean, _bounded_exp(self.log_theta[genes], DISPERSION_BOUNDS))


class GaussianDecoder(_GeneDecoder):
    """Equation (9) of the appendix: the mean of lognorm expression, with constant variance."""

    def forward(
        self,
        z: Tensor,
        genes: Tensor,
        covariates: Covariates,
        background: Background | None = None,
    ) -> Decoded:
        """(cells, latent) → mean of lognorm expression (cells, genes)."""
        return Decoded(self.outputs(z, genes, covariates), None)


class ProfileDecoder(nn.Module):
    """The context's mean profile, changed along the spectrum.

    mean_ig = profile_g exp(s_g V_g . f_i + b_g) with f = gain sqrt(eigenvalues) z + W trunk(z): the
    latent read back through the spectrum it came from, corrected by the network.
    """

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        self.trunk = _Trunk(config)
        self.gain = nn.Parameter(torch.ones(config.factors))
        self.correction = Linear(config.decoder_hidden, config.factors)
        self.bias = nn.Parameter(torch.zeros(config.n_genes))
        self.log_theta = nn.Parameter(torch.zeros(config.n_genes))

    def forward(
        self, z: Tensor, genes: Tensor, covariates: Covariates, background: Background
    ) -> Decoded:
        """(cells, latent) → mean (cells, genes), theta (genes,)."""
        profile, loadings, eigenvalues = background
        f = self.gain * eigenvalues.sqrt() * z + self.correction(self.trunk(z, covariates))
        change = f @ loadings.T + self.bias[genes]
        exponent = change + profile.clamp(min=PROFILE_FLOOR).log()
        return Decoded(
            _bounded_exp(exponent, FRACTION_BOUNDS),
            _bounded_exp(self.log_theta[genes], DISPERSION_BOUNDS),
        )


def _bounded_exp(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """exp(x) within bounds: the values of exp then clip, finite, with a gradient everywhere."""
    return clamp_through(x, math.log(bounds[0]), math.log(bounds[1])).exp()


class Head(nn.Module):
    """What replaces the decoder after fine-tuning: an MLP of `decoder_layers` linear layers."""

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        layers = config.decoder_layers
        widths = [config.latent_size, *[config.decoder_hidden] * (layers - 1), config.head_outputs]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, z: Tensor) -> Tensor:
        """(cells, latent) → (cells, outputs)."""
        *hidden, last = self.layers
        for layer in hidden:
            z = layer(self.dropout(z)).relu()
        return last(self.dropout(z))


class PatientHead(nn.Module):
    """One linear layer on the mean latent of the context."""

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        self.linear = Linear(config.latent_size, config.head_outputs)

    def forward(self, z: Tensor) -> Tensor:
        """(cells, latent) → (1, outputs)."""
        return self.linear(z.mean(0, keepdim=True))


DECODERS: dict[str, type[nn.Module]] = {
    "negative_binomial": NegativeBinomialDecoder,
    "gaussian": GaussianDecoder,
    "profile": ProfileDecoder,
}
