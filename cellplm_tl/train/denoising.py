"""Fine-tuning of a denoiser on the data themselves, by counts that it may not read.

Each step hides a part of the counts of some cells of one context, by binomial division or by the
paper's masks (appendix F.1, D), and predicts it from the rest. As in pretraining, but without a
prior to keep to: the loss is the multinomial likelihood of what was hidden.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellplm_tl._anndata import Cells
from cellplm_tl._inference import moved, read_block
from cellplm_tl.models import CellPLM, Counts
from cellplm_tl.train.contexts import Corruption, Example, Source, draw_example
from cellplm_tl.train.fit import Terms, TrainConfig, fit
from cellplm_tl.train.held_out import Part, divide
from cellplm_tl.train.objective import multinomial_nll
from cellplm_tl.train.pretrain import DEPTH_OFFSET

# What a config leaves open; chosen on development sets (docs/methods/denoise.md).
DEFAULTS: dict[str, Any] = {
    "steps": 400,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "warmup": 30,
    "average": 0.98,
    "validate_every": 25,
    "patience": 3,
}
NEW_FEATURES = 32  # of a decoder that has none yet
N_CELLS = 384  # of a step
VALIDATION_CELLS = 1000
CORRUPTION = Corruption(
    thin=0.8,
    kept_share=(0.5, 0.9),
    panel=0.0,
    depth=0.0,
    n_cells=(N_CELLS, N_CELLS),
    n_targets=10**9,  # all that are measured
)


def fine_tune(
    network: CellPLM,
    cells: Cells,
    config: TrainConfig,
    *,
    shares: tuple[float, float, float],
    device: torch.device,
) -> tuple[CellPLM, str, float]:
    """Train a copy of a network on the first part of the cells' counts, choose by the second.

    Parameters
    ----------
    network
        With a decoder of counts; stays as it is.
    cells
        To be denoised.
    config
        With `strategy="head"` the decoder alone is trained; with `"full"`, which `"auto"` means
        here, all but the spectrum: it was better on all development sets.
    shares
        Of the counts in each part; the third is kept for judging.
    device
        Where to train.

    Returns
    -------
    CellPLM, str, float
        The network, on the CPU; the strategy taken; the loss on the second part, nats per count.
    """
    config = config.filled(**DEFAULTS)
    strategy = "full" if config.strategy == "auto" else config.strategy
    tuned = with_features(network, config.seed).to(device)
    loss = _train(tuned, cells, config, strategy, shares)
    return tuned.cpu(), strategy, loss


def with_features(network: CellPLM, seed: int) -> CellPLM:
    """Copy a network; a profile decoder without learned features gets some, which start at 0."""
    config = network.config
    if config.decoder != "profile" or config.decoder_features:
        return copy.deepcopy(network)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wider = CellPLM(replace(config, decoder_features=NEW_FEATURES))
    wider.load_state_dict(network.state_dict(), strict=False)
    return wider


def _train(
    network: CellPLM,
    cells: Cells,
    config: TrainConfig,
    strategy: str,
    shares: tuple[float, float, float],
) -> float:
    """Train in place; return the loss on the second part of the counts."""
    device = next(network.parameters()).device
    read, *_ = divide(cells, shares, config.seed)
    chosen, chosen_held_out, _ = divide(cells, shares, config.seed, VALIDATION_CELLS)
    network.requires_grad_(strategy == "full")
    network.decoder.requires_grad_(True)
    source = [Source("data", read, 1.0)]  # type: ignore[arg-type]
    genes = torch.from_numpy(cells.gene_index).to(device)
    # The spectrum is fixed, and its view of the genes with it; a table is trained.
    is_fixed = network.config.embedder == "spectrum"
    panel = network.embedder.panel(genes) if is_fixed else None

    def objective(network: CellPLM, step: int) -> Terms:
        if strategy == "head":
            network.eval()
            network.decoder.train()
        example = moved(draw_example(source, CORRUPTION, config.seed, step), device)
        return {"loss": _loss(network, example, panel)}

    def validate(network: CellPLM) -> float:
        return held_out_loss(network, chosen, chosen_held_out, panel)

    fit(network, objective, config, validate=validate)
    network.requires_grad_(False)
    with torch.no_grad():
        return validate(network)


def _loss(network: CellPLM, example: Example, panel: Any) -> Tensor:
    encoded = network(example.counts, example.genes, example.coordinates, panel)
    profile = network.background(encoded.profile, example.genes, example.target_genes)
    decoded = network.decode(encoded.posterior.mean, example.target_genes, profile=profile)
    nats = multinomial_nll(decoded.mean.float(), example.target, example.weights)
    hidden = (example.target * example.weights).sum(1)
    return (nats * (hidden > 0) / (hidden + DEPTH_OFFSET)).mean()


def held_out_loss(network: CellPLM, read: Part, held_out: Part, panel: Any = None) -> float:
    """Return the loss on one part of the counts, given another; nats per count."""
    device = next(network.parameters()).device
    genes = torch.from_numpy(read.gene_index).to(device)
    total, n_counts = 0.0, 0.0
    for rows in read.contexts:
        counts, target = (_counts(part, rows, device) for part in (read, held_out))
        coordinates = None if read.coordinates is None else read.coordinates[rows]
        positions = None if coordinates is None else torch.from_numpy(coordinates).to(device)
        encoded = network(counts, genes, positions, panel)
        profile = network.background(encoded.profile, genes, genes)
        mean = network.decode(encoded.posterior.mean, genes, profile=profile).mean.float()
        dense = torch.zeros_like(mean)
        dense[target.rows(), target.columns.long()] = target.values
        total += float(multinomial_nll(mean, dense, torch.ones_like(dense)).sum())
        n_counts += float(dense.sum())
    return total / max(1.0, n_counts)


def _counts(part: Part, rows: np.ndarray, device: torch.device) -> Counts:
    return moved(read_block(part, rows), device)  # type: ignore[arg-type]
