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
import torch.nn.functional as F
from torch import Tensor, nn

from cellplm_tl.models.config import CellPLMConfig
from cellplm_tl.models.embedder import Counts, make_norm, sparse_product, with_length
from cellplm_tl.models.latent import clamp_through
from cellplm_tl.models.linear import Linear, linear

MEAN_BOUNDS = (1e-5, 1e6)  # of the released decoder's mean
DISPERSION_BOUNDS = (1e-4, 1e4)  # of its inverse dispersion theta
BOTTLENECK = 128  # width before the genes in the release, hard-wired there
FRACTION_BOUNDS = (1e-12, 1e3)  # of the profile decoder's mean, which is scaled per cell later
SMALLEST_SHARE = 1e-6  # below which odds and distances are told apart no more
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

    mean_ig = profile_g exp(s_g V_g . f_i + u_g . a_i + b_g) with f = gain sqrt(eigenvalues) z + W
    trunk(z): the latent read back through the spectrum it came from, corrected by the network. With
    `decoder_features`, a = relu(A [z of length sqrt(latent), trunk(z)]) are features that no factor
    of the spectrum has; u_g starts at 0.
    """

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        self.trunk = _Trunk(config)
        self.gain = nn.Parameter(torch.ones(config.factors))
        self.correction = Linear(config.decoder_hidden, config.factors)
        self.bias = nn.Parameter(torch.zeros(config.n_genes))
        self.log_theta = nn.Parameter(torch.zeros(config.n_genes))
        self.features: Linear | None = None
        if config.decoder_features:
            width = config.latent_size + config.decoder_hidden
            self.features = Linear(width, config.decoder_features)
            self.gene_features = nn.Parameter(torch.zeros(config.n_genes, config.decoder_features))

    def forward(
        self, z: Tensor, genes: Tensor, covariates: Covariates, background: Background
    ) -> Decoded:
        """(cells, latent) → mean (cells, genes), theta (genes,)."""
        profile, loadings, eigenvalues = background
        h = self.trunk(z, covariates)  # (cells, hidden)
        f = self.gain * eigenvalues.sqrt() * z + self.correction(h)
        change = f @ loadings.T + self.bias[genes]
        if self.features is not None:
            direction = with_length(z, z.shape[1] ** 0.5)
            a = self.features(torch.cat((direction, h), 1)).relu()  # (cells, features)
            change = change + a @ self.gene_features[genes].T
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


class TypeHead(nn.Module):
    """Which of some types a cell is, how sure that is, and how far the cell is from all of them.

    Two readings of a cell are weighed against each other. The one is linear in what the network
    makes of the cell: the features, latent and residual. The other is the likelihood of its counts
    under the mean profile of each type; it knows how little few counts say. Both weights depend on
    the cell's depth:

        log p = log softmax( exp(a + b d) log softmax(W features + bias) + exp(a' + b' d) L )

    with d the logarithm of the library size, within what the head was fitted on, and L_t = sum_g
    counts_g log(profile_tg / sum of the measured profile_t). Where a cell has no counts, p is the
    prior.

    How far a cell is: the mean of three standard scores, of log odds against the likeliest type,
    log Mahalanobis distance to the nearest type, and log (1 - cosine) of the latent to the nearest
    type's mean.
    """

    residual_directions: Tensor
    residual_mean: Tensor
    residual_length: Tensor
    log_profiles: Tensor
    log_prior: Tensor
    weights: Tensor
    depth: Tensor
    precision: Tensor
    toward: Tensor
    offset: Tensor
    centres: Tensor
    score_mean: Tensor
    score_scale: Tensor

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        n_genes, n_types, n_residual = config.n_genes, config.head_outputs, config.residual_inputs
        width = config.latent_size + n_residual
        self.linear = Linear(width, n_types)
        buffers = {
            "residual_directions": torch.zeros(n_genes, n_residual),
            "residual_mean": torch.zeros(n_residual),
            "residual_length": torch.zeros(()),
            "log_profiles": torch.zeros(n_genes, n_types),
            "log_prior": torch.full((n_types,), -math.log(n_types)),
            "weights": torch.zeros(4),  # a, b, a', b'
            "depth": torch.tensor([0.0, 0.0, 0.0]),  # centre, lowest and highest of d
            "precision": torch.eye(width),  # of the Mahalanobis distance (x - m)^T P (x - m),
            "toward": torch.zeros(width, n_types),  # P m,
            "offset": torch.zeros(n_types),  # and m^T P m
            "centres": torch.zeros(config.latent_size, n_types),  # unit length
            "score_mean": torch.zeros(3),
            "score_scale": torch.ones(3),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def likelihood(self, counts: Counts, genes: Tensor) -> Tensor:
        """Return L of some cells, (cells, types); `genes` are the measured ones' positions."""
        profiles = self.log_profiles[genes].float()  # (genes, types)
        profiles = profiles - profiles.logsumexp(0)
        columns, offsets = counts.columns.long(), counts.offsets.long()
        return sparse_product(counts.values, columns, offsets, profiles.contiguous())

    def forward(self, features: Tensor, likelihood: Tensor, library_size: Tensor) -> Tensor:
        """(cells, features), (cells, types), (cells,) → log p (cells, types)."""
        centre, lowest, highest = self.depth
        d = library_size.clamp(min=1).log().clamp(lowest, highest) - centre
        a, b, of_counts, b_of_counts = self.weights
        read = self.linear(features).log_softmax(1)
        counted = likelihood.log_softmax(1)
        log_p = (a + b * d).exp()[:, None] * read
        log_p = log_p + (of_counts + b_of_counts * d).exp()[:, None] * counted
        empty = (library_size == 0)[:, None]
        return torch.where(empty, self.log_prior, log_p.log_softmax(1))

    def distances(self, features: Tensor, log_p: Tensor) -> Tensor:
        """Return the three scores before they are standardised, (cells, 3)."""
        square = (features @ self.precision * features).sum(1, keepdim=True)
        mahalanobis = square - 2 * features @ self.toward + self.offset  # (cells, types)
        latent = F.normalize(features[:, : self.centres.shape[0]], dim=1)
        cosine = latent @ self.centres
        top = log_p.amax(1).exp()
        odds = (1 - top + SMALLEST_SHARE) / top
        apart = 1 - cosine.amax(1)
        scores = (odds, mahalanobis.amin(1), apart)
        return torch.stack([score.clamp(min=SMALLEST_SHARE) for score in scores], 1).log()

    def unknown_score(self, features: Tensor, log_p: Tensor) -> Tensor:
        """How far each cell is from all types, (cells,): about 0 for cells of the reference."""
        scores = self.distances(features, log_p)
        return ((scores - self.score_mean) / self.score_scale).mean(1)


DECODERS: dict[str, type[nn.Module]] = {
    "negative_binomial": NegativeBinomialDecoder,
    "gaussian": GaussianDecoder,
    "profile": ProfileDecoder,
}
