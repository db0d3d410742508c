"""Everything that shapes a network, in one frozen record.

The same record covers the paper (Wen et al., ICLR 2024, sections B, D, E of its appendix), the
layouts of the official release, the ablations of its Table 10 and the models of this package: parts
are chosen here, once, and built once by the constructors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

NORM_GROUPS = 4  # groups of channels in the release's GroupNorm
OPTIONS: dict[str, tuple[str, ...]] = {
    "embedder": ("table", "spectrum"),
    "target_sum": ("library", "panel"),
    "positions": ("none", "sinusoidal"),
    "encoder": ("flow", "mlp", "none"),
    "norm": ("groupnorm", "layernorm"),
    "latent": ("mixture", "mixture_release", "gaussian", "linear", "none"),
    "decoder": ("negative_binomial", "gaussian", "profile", "none"),
    "head": (
        "none",
        "annotation",
        "denoising",
        "imputation",
        "perturbation",
        "patient_classification",
        "types",
    ),
}


@dataclass(frozen=True)
class CellPLMConfig:
    """Sizes and parts of a :class:`CellPLM`.

    The defaults are the paper's (Table 5), for `genes` of one's own.

    Parameters
    ----------
    genes : tuple of str, shape (genes,)
        Ensembl ids, without version, of the genes that the model knows, in the order of its tables.
    embedder : {"table", "spectrum"}
        `"table"`: log1p of the counts times a learned gene table (paper, section 3; the release).
        `"spectrum"`: posterior factors of the measured genes under a fixed gene × factor spectrum,
        centred on the context (this package's own models).
    factors : int
        Columns of the spectrum (`"spectrum"` only).
    noise : float
        Variance of the noise in the factor model, in units of its scaled expression.
    residual_weight : float
        Weight of what the factors leave unexplained when the embedding is put together
        (`"spectrum"` only).
    target_sum : {"library", "panel"}
        What the counts of a cell are scaled to (`"spectrum"` only). `"library"`: to 10,000,
        whatever is measured. `"panel"`: to the part of 10,000 that the measured genes have in the
        pool, so that a gene's values mean the same on a panel as on a whole transcriptome.
    unit_length : bool
        Whether the factors that the encoder reads, and in the embedding the latent and the residual
        of each cell, are brought to one length, so that depth does not set a cell's distance from
        the mean (`"spectrum"` only).
    factor_share : float
        Share that the factors' own direction has in a cell's part of the embedding, beside that of
        the latent (`unit_length` only).
    positions : {"none", "sinusoidal"}
        Equation (8) of the appendix, with a learned placeholder for cells without coordinates; the
        released checkpoints are `"none"`, since their code never added it.
    encoder : {"flow", "mlp", "none"}
        Flow attention over the context; the ablation "w/o transformer" of Table 10; or no network
        at all, the factors of a spectrum alone.
    hidden, encoder_layers, heads : int
        Width, depth and number of heads of the encoder (Table 5: 1024, 4; 8 in the release).
    dropout : float
        Rate in embedder, encoder, decoder and heads while training (Table 5: 0.2).
    norm : {"groupnorm", "layernorm"}
        Normalisation in embedder and decoder; the encoder always has layer norms, as in the
        release.
    latent : {"mixture", "mixture_release", "gaussian", "linear", "none"}
        `"mixture"`: appendix D, q(z|x) and q(y|z). `"mixture_release"`: the released `gmvae`,
        q(y|h) and q(z|h, y). `"gaussian"`: the released `vae` and Table 10's "w/o mixture".
        `"linear"`: the `ae` of the release's annotation. `"none"`: Table 10's "w/o latent
        distribution".
    latent_size, components : int
        Width of the latent (Table 5: 512) and number of mixture components (Table 5: 16).
    decoder : {"negative_binomial", "gaussian", "profile", "none"}
        `"negative_binomial"`: the release. `"gaussian"`: the paper's equation (9). `"profile"`: the
        change of the context's mean profile along the spectrum (needs `embedder="spectrum"`).
    decoder_hidden, decoder_layers : int
        Width and number of linear layers of decoder or head, the last included (Table 5: 1024, 2).
    decoder_features : int
        Learned features of a cell, and as many numbers per gene, by which the profile decoder goes
        beyond the spectrum; 0 for none.
    covariates : tuple of (str, int)
        Name and number of levels of each covariate that the decoder is told.
    head : str
        What replaces the decoder after fine-tuning; see :class:`~cellplm_tl.models.Head`.
    head_outputs : int
        Width of the head's output.
    residual_inputs : int
        Directions of the residual that the head reads beside the latent (`head="types"` of models
        with a spectrum): the pool does not know every tissue.

    Examples
    --------
    >>> import cellplm_tl as cp
    >>> config = cp.models.CellPLMConfig(genes=("ENSG00000010610", "ENSG00000153563"), hidden=32)
    >>> config.encoder, config.latent, config.latent_size
    ('flow', 'mixture', 512)
    """

    genes: tuple[str, ...] = field(repr=False)
    embedder: str = "table"
    factors: int = 0
    noise: float = 0.2
    residual_weight: float = 0.7
    target_sum: str = "library"
    unit_length: bool = False
    factor_share: float = 0.0
    positions: str = "sinusoidal"
    encoder: str = "flow"
    hidden: int = 1024
    encoder_layers: int = 4
    heads: int = 8
    dropout: float = 0.2
    norm: str = "groupnorm"
    latent: str = "mixture"
    latent_size: int = 512
    components: int = 16
    decoder: str = "negative_binomial"
    decoder_hidden: int = 1024
    decoder_layers: int = 2
    decoder_features: int = 0
    covariates: tuple[tuple[str, int], ...] = ()
    head: str = "none"
    head_outputs: int = 0
    residual_inputs: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "genes", tuple(self.genes))
        object.__setattr__(self, "covariates", tuple((str(n), int(k)) for n, k in self.covariates))
        for name, allowed in OPTIONS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}."
                )
        if len(set(self.genes)) != len(self.genes) or not self.genes:
            raise ValueError("genes must be a non-empty tuple of distinct ids.")
        for name in ("hidden", "heads", "latent_size", "components", "decoder_hidden", "noise"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.encoder_layers < 0:
            raise ValueError(f"encoder_layers={self.encoder_layers} must not be negative.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1).")
        if self.encoder == "flow" and self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not a multiple of heads={self.heads}.")
        if self.positions == "sinusoidal" and self.hidden % 4:
            raise ValueError(f"positions='sinusoidal' needs hidden % 4 == 0, not {self.hidden}.")
        grouped = {"hidden": self.encoder != "none", "decoder_hidden": self.has_decoder}
        for name in (name for name, built in grouped.items() if built):
            if self.norm == "groupnorm" and getattr(self, name) % NORM_GROUPS:
                raise ValueError(
                    f"norm='groupnorm' needs {name}={getattr(self, name)} to be a multiple of "
                    f"{NORM_GROUPS}."
                )
        if (self.embedder == "spectrum") != (self.factors > 0):
            raise ValueError("factors must be positive with embedder='spectrum', and 0 without.")
        if self.embedder != "spectrum" and (self.target_sum == "panel" or self.unit_length):
            raise ValueError("target_sum='panel' and unit_length need embedder='spectrum'.")
        if not 0 <= self.factor_share <= 1 or (self.factor_share and not self.unit_length):
            raise ValueError("factor_share must be in [0, 1], and 0 without unit_length.")
        if self.decoder == "profile" and self.embedder != "spectrum":
            raise ValueError("decoder='profile' needs embedder='spectrum'.")
        if self.decoder_features < 0 or (self.decoder_features and self.decoder != "profile"):
            raise ValueError("decoder_features must not be negative, and 0 but in 'profile'.")
        if self.embedder == "spectrum" and self.latent_size != self.factors:
            raise ValueError("with embedder='spectrum' latent_size must equal factors.")
        if self.embedder == "spectrum" and self.latent == "mixture_release":
            raise ValueError("embedder='spectrum' has no latent='mixture_release'.")
        if self.encoder == "none" and (self.embedder, self.latent, self.hidden) != (
            "spectrum",
            "none",
            self.factors,
        ):
            raise ValueError(
                "encoder='none' needs embedder='spectrum', latent='none' and hidden=factors."
            )
        if self.latent == "none" and self.latent_size != self.hidden:
            raise ValueError("with latent='none' latent_size must equal hidden.")
        if (self.head == "none") != (self.head_outputs == 0):
            raise ValueError("head_outputs must be positive with a head, and 0 without.")
        reads_residual = self.embedder == "spectrum" and self.head == "types"
        if self.residual_inputs < 0 or (self.residual_inputs and not reads_residual):
            raise ValueError(
                "residual_inputs needs embedder='spectrum' and head='types', and is never negative."
            )
        end = "decoder" if self.has_decoder else "head"
        least = 2 if self.has_decoder else int(self.head != "none")
        if self.decoder_layers < least:
            raise ValueError(
                f"decoder_layers={self.decoder_layers} is less than the {least} of a {end}."
            )
        names = [name for name, _ in self.covariates]
        if len(set(names)) != len(names) or min((k for _, k in self.covariates), default=1) < 1:
            raise ValueError("covariates need distinct names, and one level or more each.")

    @property
    def n_genes(self) -> int:
        """Number of genes in the model's tables."""
        return len(self.genes)

    @property
    def has_decoder(self) -> bool:
        """Whether there is a decoder: a head takes its place."""
        return self.decoder != "none" and self.head == "none"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return {**asdict(self), "genes": list(self.genes), "covariates": list(self.covariates)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CellPLMConfig:
        """Build a config from :meth:`to_dict`; a name that is no field is an error."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields in a CellPLM config: {', '.join(unknown)}.")
        return cls(**values)
