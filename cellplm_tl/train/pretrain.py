"""`cp.train.pretrain`: the self-supervised objective on a pool of files."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellplm_tl import _weights
from cellplm_tl._anndata import read_file, read_gene_ids
from cellplm_tl._errors import OptionError, TrainingError
from cellplm_tl._settings import logger
from cellplm_tl.models import CellPLM, CellPLMConfig
from cellplm_tl.train.contexts import Corruption, Example, Source, draw_example
from cellplm_tl.train.fit import Terms, TrainConfig, fit
from cellplm_tl.train.objective import explained_likelihood, reconstruction

DEPTH_OFFSET = 200.0  # counts: keeps the weight of shallow cells finite
KL_TERMS = ("latent", "components")
# Modules of a network, by the part that they belong to.
PARTS = {
    "embedder": ("embedder",),
    "encoder": ("encoder",),
    "latent": ("pre_latent_norm", "latent"),
    "decoder": ("decoder",),
}
START_EXAMPLES = 60  # contexts whose cells the mixture's components start from,
FIRST_OF_START = 2_000_000  # drawn as steps that training never reaches


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run, whole.

    Parameters
    ----------
    files : tuple of str
        h5ad files of the pool, counts of human genes.
    out : str
        Directory that the model is written to; state and log are kept in `<out>.run`.
    batch_key : str
        Column of `obs` that names the contexts of a file; a file without it is one context.
    weights : dict of str to float
        Factors, by a file's stem, on its chance to be drawn, which goes with the root of its cells.
    start : str, optional
        Model with a spectrum whose genes the network is built on. Every tensor that both have
        begins as it is there: the spectrum, and of a trained model all that has the same shape.
    frozen : tuple of {"embedder", "encoder", "latent", "decoder"}
        Parts that stay as they are in `start`. With a frozen latent the decoder is trained on its
        mean, which is what it is given later, and the bound has no other term than reconstruction.
    network : dict
        Fields of :class:`CellPLMConfig` that differ from its defaults; `genes` come from `start`,
        or are all genes that at least `min_files` files measure.
    min_files : int
        See `network`.
    validation : tuple of str
        Stems of files that are held out; their loss chooses the weights that are kept.
    corruption : Corruption
        How counts are hidden.
    kl_weight : dict of str to float
        Weight of the terms `latent` and `components` of the bound; 1 is the bound itself.
    agreement : float
        Weight of 1 - cos(mean of z, unit factors of the other binomial half of the same cell), for
        models with a spectrum: two views of a cell are brought together, and never told apart from
        other cells. It acts in the steps that thin.
    kl_warmup : int
        Steps over which these weights rise from 0.
    train : TrainConfig
        Optimisation.
    dtype : {"float32", "float16"}
        Of the stored weights.

    Examples
    --------
    >>> import cellplm_tl as cp
    >>> config = cp.train.PretrainConfig(files=("a.h5ad", "b.h5ad"), out="my_model")
    >>> config.corruption.cell_mask_rate, config.corruption.gene_mask_rate
    (0.75, 0.25)
    """

    files: tuple[str, ...]
    out: str
    batch_key: str = "batch"
    weights: dict[str, float] = field(default_factory=dict)
    start: str | None = None
    frozen: tuple[str, ...] = ()
    network: dict[str, Any] = field(default_factory=dict)
    min_files: int = 1
    validation: tuple[str, ...] = ()
    corruption: Corruption = field(default_factory=Corruption)
    kl_weight: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KL_TERMS, 1.0))
    agreement: float = 0.0
    kl_warmup: int = 0
    train: TrainConfig = field(default_factory=TrainConfig)
    dtype: str = "float32"

    @classmethod
    def from_toml(cls, path: str | Path) -> PretrainConfig:
        """Read a run from a TOML file; tables `corruption` and `train` hold those configs' fields.

        Paths in it are relative to the file; `files` may hold patterns such as `pool/*.h5ad`.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text())
            files = []
            for pattern in values.pop("files"):
                glob = "*" in pattern
                files += sorted(path.parent.glob(pattern)) if glob else [path.parent / pattern]
            corruption: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.pop("corruption", {}).items()
            }
            return cls(
                files=tuple(str(file) for file in files),
                out=str(path.parent / values.pop("out")),
                validation=tuple(values.pop("validation", ())),
                frozen=tuple(values.pop("frozen", ())),
                corruption=Corruption(**corruption),
                train=TrainConfig(**values.pop("train", {})),
                **values,
            )
        except (TypeError, KeyError, ValueError) as error:
            raise OptionError(f"{path} is no pretraining run: {error}") from error


def pretrain(config: PretrainConfig) -> _weights.Model:
    """Train a network on a pool of files by the denoising variational bound (appendix D, E).

    Each step draws one context of one file, hides a part of its counts (binomial halves, or the
    paper's masks on 75 % of the cells and 25 % of their genes), and predicts what was hidden, over
    genes that the file measures. A run that was interrupted goes on from its last saved state.

    Parameters
    ----------
    config : PretrainConfig
        The run.

    Returns
    -------
    Model
        As written to `config.out`, with the weights that were best on the held-out files.

    Raises
    ------
    OptionError
        The configuration names no file, or files that do not exist.
    TrainingError
        `config.out` exists, or the loss stopped being a number.

    Notes
    -----
    The bound of a cell (nats) is weighed by 1 / (hidden counts + 200), so that a deep cell does not
    drown the others; its terms keep their proportions.

    Examples
    --------
    >>> import tempfile, scanpy as sc, cellplm_tl as cp
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adata.write_h5ad(f"{folder}/pbmc.h5ad")
    ...     model = cp.train.pretrain(cp.train.PretrainConfig(
    ...         files=(f"{folder}/pbmc.h5ad",), out=f"{folder}/model",
    ...         network=dict(
    ...             hidden=16, heads=2, encoder_layers=1, latent_size=8, decoder_hidden=16
    ...         ),
    ...         train=cp.train.TrainConfig(steps=3)))
    >>> model.config.latent_size
    8
    """
    _check(config)
    network = build(config)
    training, held_out = _sources(config, network.config.genes)
    if network.config.latent == "mixture" and "latent" not in config.frozen:
        place_components(network, training, config)
    validate = partial(validation_loss, sources=held_out, config=config) if held_out else None
    fit(
        network,
        partial(bound, sources=training, config=config, panels={}),
        config.train,
        validate=validate,
        folder=Path(config.out + ".run"),
    )
    provenance = {"tool": "cellplm_tl.train.pretrain", "run": _plain(config)}
    path = _weights.save(network, config.out, provenance=provenance, dtype=config.dtype)
    return _weights.load(path)


def build(config: PretrainConfig) -> CellPLM:
    """Make the network of a run, from its start model where it has one, and from its seed."""
    values: dict[str, Any] = {}
    start = None if config.start is None else _weights.load(config.start).network
    if start is None:
        genes = tuple(_union_of_genes(config))
    else:
        genes, factors = start.config.genes, start.config.factors
        values = {"embedder": "spectrum", "factors": factors, "latent_size": factors}
        values["noise"] = start.config.noise
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        network = CellPLM(CellPLMConfig(genes=genes, **(values | config.network)))
    if start is not None:
        own = network.state_dict()
        same = {n: t for n, t in start.state_dict().items() if n in own and t.shape == own[n].shape}
        network.load_state_dict(same, strict=False)
    for module in _frozen(network, config):
        module.requires_grad_(False)
    return network


def _frozen(network: CellPLM, config: PretrainConfig) -> list[nn.Module]:
    return [getattr(network, name) for part in config.frozen for name in PARTS[part]]


def place_components(network: CellPLM, sources: Sequence[Source], config: PretrainConfig) -> None:
    """Start the mixture from k-means clusters of the latent means of cells drawn from the pool."""
    from sklearn.cluster import KMeans

    whole = replace(config.corruption, thin=1.0, panel=0.0, depth=0.0)
    network.eval()
    with torch.no_grad():
        examples = [
            draw_example(sources, whole, config.train.seed, FIRST_OF_START + number)
            for number in range(START_EXAMPLES)
        ]
        means = torch.cat(
            [network(e.counts, e.genes, e.coordinates).posterior.mean for e in examples]
        )
    seed = config.train.seed % 2**32
    clusters = KMeans(network.config.components, n_init=3, random_state=seed).fit(means.numpy())
    centres = torch.from_numpy(clusters.cluster_centers_)
    variance = (means - centres[clusters.labels_]).square().mean(0).clamp(min=0.05)
    network.latent.place_components(centres, variance)


def bound(
    network: CellPLM,
    step: int,
    *,
    sources: Sequence[Source],
    config: PretrainConfig,
    panels: dict[int, Any] | None = None,
) -> Terms:
    """Return the weighted negative bound of one step's example, and its parts.

    `panels` keeps what the embedder computes once per data set.
    """
    example = draw_example(sources, config.corruption, config.train.seed, step)
    for module in _frozen(network, config):
        module.eval()  # without dropout, as it is used later
    warm = min(1.0, (step + 1) / config.kl_warmup) if config.kl_warmup else 1.0
    whole = _whole_panel(network, example, panels)
    sample = "latent" not in config.frozen
    return _terms(network, example, config, warm, sample=sample, whole=whole)


def _whole_panel(network: CellPLM, example: Example, panels: dict[int, Any] | None) -> Any:
    """Return the embedder's view of all genes of the set, from `panels` where it is there."""
    if panels is None or network.config.embedder != "spectrum":
        return None
    if example.source not in panels:
        panels[example.source] = network.embedder.panel(example.other_genes)
    return panels[example.source]


def validation_loss(
    network: CellPLM, *, sources: Sequence[Source], config: PretrainConfig, n_examples: int = 8
) -> float:
    """Return the mean loss over examples of each source that no run has trained on.

    That is minus the likelihood gained over the context's mean, in nats per hidden count, whatever
    the depth, and the weighted disagreement.
    """
    losses = []
    for source in sources:
        for number in range(n_examples):
            seed = config.train.seed + 1_000_000
            example = draw_example([source], config.corruption, seed, number)
            terms = _terms(network, example, config, 1.0, sample=False)
            apart = float(terms["disagreement"]) if "disagreement" in terms else 0.0
            losses.append(config.agreement * apart - float(terms["gain"]))
    return float(np.mean(losses))


def _terms(
    network: CellPLM,
    example: Example,
    config: PretrainConfig,
    warm: float,
    *,
    sample: bool,
    whole: Any = None,
) -> Terms:
    """Return the terms; `whole` is the embedder's view of all genes that the set measures."""
    panel = whole if len(example.genes) == len(example.other_genes) else None
    encoded = network(example.counts, example.genes, example.coordinates, panel)
    noise = torch.randn_like(encoded.posterior.mean) if sample else None
    z = network.latent.sample(encoded.posterior, noise)
    profile = network.background(encoded.profile, example.genes, example.target_genes)
    decoded = network.decode(z, example.target_genes, profile=profile)
    if decoded.theta is not None:
        decoded = decoded._replace(mean=decoded.mean.float())
    terms = {
        "reconstruction": reconstruction(
            decoded, example.target, example.weights, example.target_total
        )
    }
    if "latent" not in config.frozen:
        terms |= network.latent.terms(encoded.posterior, z)
    terms = {name: term.float() for name, term in terms.items()}
    hidden = (example.target * example.weights).sum(1)
    cell_weight = (hidden > 0) / (hidden + DEPTH_OFFSET)
    # Each term is logged in nats of a mean cell; the loss keeps the weights' own scale.
    total_weight = cell_weight.sum().clamp(min=1e-12)
    result = {name: (cell_weight * term).sum() / total_weight for name, term in terms.items()}
    kl_weight = {name: warm * config.kl_weight.get(name, 1.0) for name in KL_TERMS}
    bound_of_cell = sum(kl_weight.get(name, 1.0) * term for name, term in terms.items())
    result["loss"] = (cell_weight * bound_of_cell).mean()
    if config.agreement and example.other is not None:
        result["disagreement"] = disagreement(network, encoded.posterior.mean, example, whole)
        result["loss"] = result["loss"] + config.agreement * result["disagreement"]
    mean = decoded.mean if decoded.theta is not None else decoded.mean.expm1().clamp(min=0)
    baseline = profile if profile is not None else example.target.mean(0)
    result["gain"] = explained_likelihood(
        decoded._replace(mean=mean.detach()), example.target, example.weights, baseline
    )
    if "components" in terms and hasattr(network.latent, "components"):
        with torch.no_grad():
            usage = network.latent.components(z.float()).mean(0)
            result["components_in_use"] = (-(usage * (usage + 1e-12).log()).sum()).exp()
    return result


def disagreement(network: CellPLM, z: Tensor, example: Example, panel: Any = None) -> Tensor:
    """1 - cosine of latent means and the unit factors of the hidden half, mean over the cells."""
    assert example.other is not None
    with torch.no_grad():
        panel = network.embedder.panel(example.other_genes) if panel is None else panel
        other = network.embedder.read(example.other, panel)
    seen = (example.counts.library_size > 0) & (example.other.library_size > 0)
    return 1 - F.cosine_similarity(z.float(), other)[seen].mean() if seen.any() else z.sum() * 0


def _sources(config: PretrainConfig, genes: Sequence[str]) -> tuple[list[Source], list[Source]]:
    """Read the files, and tell those to train on from those held out."""
    sources = []
    for file in config.files:
        name, cells = Path(file).stem, read_file(file, genes, batch_key=config.batch_key)
        weight = config.weights.get(name, 1.0) * cells.n_cells**0.5
        sources.append(Source(name, cells, weight))
        logger.info(
            "%s: %d cells, %d genes, %d contexts",
            name,
            cells.n_cells,
            len(cells.genes),
            len(cells.contexts),
        )
    held_out = [source for source in sources if source.name in config.validation]
    return [source for source in sources if source.name not in config.validation], held_out


def _union_of_genes(config: PretrainConfig) -> list[str]:
    """Return the genes that enough files measure, sorted."""
    seen = Counter(gene for file in config.files for gene in read_gene_ids(file))
    return sorted(gene for gene, n_files in seen.items() if n_files >= config.min_files)


def _check(config: PretrainConfig) -> None:
    if not config.files:
        raise OptionError("files is empty: name the h5ad files of the pool.")
    missing = [file for file in config.files if not Path(file).is_file()]
    if missing:
        raise OptionError(
            f"{len(missing)} of {len(config.files)} files do not exist: {missing[:5]}."
        )
    unknown = set(config.validation) - {Path(file).stem for file in config.files}
    if unknown:
        raise OptionError(f"validation names files that are not in the pool: {sorted(unknown)}.")
    stems = {Path(file).stem for file in config.files}
    if stems <= set(config.validation):
        raise OptionError("validation names every file of the pool: leave some to train on.")
    fields = {field.name for field in dataclass_fields(CellPLMConfig)}
    for name, given, known in (
        ("weights", config.weights, stems),
        ("kl_weight", config.kl_weight, set(KL_TERMS)),
        ("network", config.network, fields - {"genes"}),
        ("frozen", config.frozen, set(PARTS)),
    ):
        if missing := sorted(set(given) - known):
            raise OptionError(f"{name} has {missing}, which is none of {sorted(known)}.")
    if set(config.frozen) == set(PARTS):
        raise OptionError("frozen names every part of the network: leave one to train.")
    if config.frozen and config.start is None:
        raise OptionError("frozen parts keep the weights of a model: name it in `start`.")
    if config.agreement and config.start is None:
        raise OptionError("agreement needs the factors of a spectrum: name a model in `start`.")
    if Path(config.out).exists():
        raise TrainingError(f"{config.out} exists; choose another `out`.")


def _plain(config: PretrainConfig) -> dict[str, Any]:
    """Return the run as values that JSON can hold, with file names instead of paths."""
    values = asdict(config)
    values["files"] = [Path(file).name for file in config.files]
    values["out"] = Path(config.out).name
    values["start"] = None if config.start is None else Path(config.start).name
    return values
