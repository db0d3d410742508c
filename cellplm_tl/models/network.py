"""CellPLM: embedder → encoder → latent → decoder or head (Wen et al., ICLR 2024).

The tokens are cells and a context (a tissue sample, a field of view) is the sentence: every cell
sees the sums that flow attention takes over the cells of its context. The files of this folder are
read in the order config, position, attention, embedder, encoder, latent, decoder, network.

| axis | meaning |
| --- | --- |
| cells | of one context, or of a block of it |
| entries | non-zero counts of those cells |
| genes | measured, or asked for |
| hidden | width of the encoder |
| heads, head_dim | of flow attention; hidden = heads x head_dim |
| factors | of the spectrum |
| latent | width of z |
| components | of the mixture prior |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from cellplm_tl.models.config import CellPLMConfig
from cellplm_tl.models.decoder import (
    DECODERS,
    Background,
    Covariates,
    Decoded,
    Head,
    PatientHead,
    TypeHead,
)
from cellplm_tl.models.embedder import NORM_EPSILON, Counts, SpectrumEmbedder, TableEmbedder
from cellplm_tl.models.encoder import make_encoder
from cellplm_tl.models.latent import LATENTS, Posterior
from cellplm_tl.models.position import grid_positions

INITIAL_STD = 0.02  # of covariate tables


class Encoded(NamedTuple):
    """A whole context after encoder and latent."""

    posterior: Posterior  # mean (cells, latent) and what belongs to it
    factors: Tensor | None  # (cells, factors), spectrum only
    explained: Tensor | None  # (cells,), spectrum only
    total: Tensor | None  # (cells,), spectrum only
    profile: Tensor | None  # (genes,): the context's mean fractions, spectrum only


class CellPLM(nn.Module):
    """The network of a :class:`CellPLMConfig`.

    A call encodes one context held in memory. Inference over any number of cells drives the same
    parts block by block (`embedder`, then each layer of `encoder`, then :meth:`to_latent`).

    Parameters
    ----------
    config : CellPLMConfig
        Sizes and parts.

    Examples
    --------
    >>> import torch, cellplm_tl as cp
    >>> config = cp.models.CellPLMConfig(
    ...     genes=("ENSG00000010610", "ENSG00000153563"), hidden=16, heads=2, encoder_layers=1,
    ...     latent_size=4, decoder_hidden=16)
    >>> network = cp.models.CellPLM(config).eval()
    >>> counts = cp.models.Counts(
    ...     values=torch.tensor([1.0, 2.0, 5.0]), columns=torch.tensor([0, 1, 1]),
    ...     offsets=torch.tensor([0, 2, 3]), library_size=torch.tensor([3.0, 5.0]))
    >>> network(counts, genes=torch.tensor([0, 1])).posterior.mean.shape
    torch.Size([2, 4])
    """

    # The parts are chosen by the config; each kind has the interface of its siblings.
    embedder: Any
    latent: Any
    decoder: Any
    head: Any

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        self.config = config
        spectrum = config.embedder == "spectrum"
        alone = config.encoder == "none"
        self.embedder = (SpectrumEmbedder if spectrum else TableEmbedder)(config)
        self.encoder = make_encoder(config)  # (cells, hidden) → (cells, hidden), layer by layer
        norm = nn.Identity() if alone else nn.LayerNorm(config.hidden, NORM_EPSILON)
        self.pre_latent_norm = norm
        self.latent = LATENTS[config.latent](config)  # (cells, hidden) → Posterior
        self.decoder, self.head = None, None  # (cells, latent) → genes, or outputs
        if config.head == "patient_classification":
            self.head = PatientHead(config)
        elif config.head == "types":
            self.head = TypeHead(config)
        elif config.head != "none":
            self.head = Head(config)
        elif config.decoder != "none":
            self.decoder = DECODERS[config.decoder](config)
        self._initialise()

    def _initialise(self) -> None:
        """Set initial weights, where PyTorch's own are not wanted.

        | what | value |
        | --- | --- |
        | latent mean (spectrum) | 0: training starts from the factors themselves |
        | profile decoder's correction | 0: likewise |
        | covariate tables | N(0, 0.02²) |
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)
        starts_at_zero = []
        if self.config.embedder == "spectrum" and self.config.latent != "none":
            starts_at_zero.append(getattr(self.latent, "mean", None) or self.latent.linear)
        if self.config.decoder == "profile" and self.decoder is not None:
            starts_at_zero.append(self.decoder.correction)
        for linear in starts_at_zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def to_latent(
        self, hidden: Tensor, factors: Tensor | None = None, **noise: Tensor
    ) -> Posterior:
        """(cells, hidden) after the encoder, and the embedder's factors → posterior of z."""
        start = None
        if factors is not None and self.config.encoder != "none":
            start = self.embedder.unit_factors(factors)
        return self.latent(self.pre_latent_norm(hidden), start, **noise)

    def direction(self, latent: Tensor, factors: Tensor | None) -> Tensor:
        """Return z as cells are compared by it, (cells, latent).

        Of unit length, and joined by the direction of the embedder's factors, where the config says
        so; else the latent as it is.
        """
        if not self.config.unit_length or factors is None:
            return latent
        of_latent = F.normalize(latent, dim=1)
        of_factors = F.normalize(self.embedder.unit_factors(factors), dim=1)
        share = self.config.factor_share
        return F.normalize((1 - share) * of_latent + share * of_factors, dim=1)

    def forward(
        self,
        counts: Counts,
        genes: Tensor,
        coordinates: Tensor | None = None,
        panel: Any = None,
        **noise: Tensor,
    ) -> Encoded:
        """Encode one whole context.

        Parameters
        ----------
        counts : Counts
            The context's cells, a CSR matrix over `genes`.
        genes : Tensor, shape (genes,), int64
            Position of each measured gene in the model's list.
        coordinates : Tensor, shape (cells, 2), optional
            In one unit; NaN where a cell has none. Used by models with positions.
        panel
            `embedder.panel(genes)`, where it has been computed before.
        **noise : Tensor
            `uniform=` draws for the released mixture (see :class:`MixtureReleaseLatent`).
        """
        panel = self.embedder.panel(genes) if panel is None else panel
        block = self.embedder.begin(counts, panel)
        context: tuple[Tensor, ...] = ()
        for number in range(self.embedder.n_rounds):
            context = context + self.embedder.sums(number, block, panel)
        positions = None if coordinates is None else grid_positions(coordinates)
        embedded = self.embedder.finish(block, panel, context, positions)
        u = embedded.hidden  # (cells, hidden)
        for layer in self.encoder:
            u = over_context(layer, u)
        posterior = self.to_latent(u, embedded.factors, **noise)
        profile = self.embedder.profile(context) if self.embedder.n_rounds else None
        return Encoded(posterior, embedded.factors, embedded.explained, embedded.total, profile)

    def background(self, profile: Tensor | None, measured: Tensor, genes: Tensor) -> Tensor | None:
        """Return mean fractions of `genes` for :meth:`decode`; None for models without a spectrum.

        Parameters
        ----------
        profile : Tensor, shape (measured,), optional
            The context's, of an :class:`Encoded`.
        measured, genes : Tensor, int64
            Positions in the model's list.
        """
        return None if profile is None else self.embedder.background(profile, measured, genes)

    def decode(
        self,
        z: Tensor,
        genes: Tensor,
        covariates: Covariates | None = None,
        profile: Tensor | None = None,
    ) -> Decoded:
        """(cells, latent) → parameters of the likelihood for `genes` (positions in the list).

        Parameters
        ----------
        profile : Tensor, shape (genes,), optional
            Mean fractions of those genes in the context; the profile decoder needs it.
        """
        background = None
        if profile is not None and self.config.decoder == "profile":
            scale = self.embedder.scale[genes]
            loadings = self.embedder.loadings[genes].float() * scale[:, None]
            background = Background(profile, loadings, self.embedder.eigenvalues)
        return self.decoder(z, genes, covariates or {}, background)


def over_context(layer: Any, u: Tensor) -> Tensor:
    """Run one encoder layer over a whole context in memory, (cells, hidden) → (cells, hidden)."""
    block = layer.begin(u)
    return layer.finish(block, sums_over_context(layer, block))


def sums_over_context(layer: Any, block: Any) -> tuple[Tensor, ...]:
    """Return a layer's sums over a whole context that it has begun as one block."""
    context: tuple[Tensor, ...] = ()
    for number in range(layer.n_rounds):
        context = context + layer.sums(number, block, context)
    return context


def count_parameters(network: nn.Module, *, trainable: bool = False) -> int:
    """Return the number of parameters, buffers of the state dict included unless `trainable`."""
    if trainable:
        return sum(p.numel() for p in network.parameters() if p.requires_grad)
    return sum(t.numel() for t in network.state_dict().values())
