"""A context that is kept with a model, and frames that are kept with data, as tensors by name.

With sums over a stored context in the place of those over the data, and the frame that was found on
it, a cell's embedding depends on that cell alone (docs/design.md, "A context is a sum").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellplm_tl._anndata import Cells
from cellplm_tl._inference import ContextSums, Encoding, Sums, encode, read_block
from cellplm_tl._rotation import Frame, latent_scale, representation_blocks, residual_length
from cellplm_tl.models import CellPLM
from cellplm_tl.models.network import sums_over_context
from cellplm_tl.models.representation import (
    OVERSAMPLING,
    Columns,
    RepresentationBlock,
    Rotation,
    find_rotation,
)


def frame_to_tensors(frame: Frame) -> dict[str, Tensor]:
    """Give a frame as tensors by name."""
    (latent, directions), mean = frame.rotation
    return {
        "latent": latent,
        "directions": directions,
        "genes": torch.from_numpy(frame.genes),
        "mean": mean,
        "scales": torch.tensor([frame.latent_scale, frame.residual_length]),
    }


def frame_from_tensors(tensors: Mapping[str, Tensor]) -> Frame:
    """Make a frame of what :func:`frame_to_tensors` gave."""
    rotation = Rotation(Columns(tensors["latent"], tensors["directions"]), tensors["mean"])
    latent_scale, residual_length = map(float, tensors["scales"])
    return Frame(rotation, tensors["genes"].long().numpy(), latent_scale, residual_length)


def context_to_tensors(sums: ContextSums, frame: Frame) -> dict[str, Tensor]:
    """Give what a model keeps of a context as tensors by name: `Model.context`."""
    named = {f"embedder.{number}": total for number, total in enumerate(sums.embedder)}
    for layer, totals in enumerate(sums.layers):
        named |= {f"layers.{layer}.{number}": total for number, total in enumerate(totals)}
    return named | {f"frame.{name}": tensor for name, tensor in frame_to_tensors(frame).items()}


def context_from_tensors(tensors: Mapping[str, Tensor], n_layers: int) -> tuple[ContextSums, Frame]:
    """Make sums and frame of what :func:`context_to_tensors` gave."""

    def totals(prefix: str) -> Sums:
        names = [name for name in tensors if name.startswith(prefix)]
        return tuple(tensors[f"{prefix}{number}"] for number in range(len(names)))

    layers = tuple(totals(f"layers.{layer}.") for layer in range(n_layers))
    prefix = "frame."
    frame = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return ContextSums(totals("embedder."), layers), frame_from_tensors(frame)


def context_of_pool(
    network: CellPLM, sets: Sequence[Cells], n_components: int, rng: np.random.Generator
) -> tuple[ContextSums, Frame]:
    """Take the sums and the frame of a pool of data sets, each with genes of its own, as one.

    The mean of a gene is that over the sets that measure it, each weighing 1; all cells of all sets
    are one context of the encoder. Sets of like size should be given.
    """
    embedder_sums = _mean_of_sets(network, sets)
    hidden = torch.cat([_hidden(network, cells, embedder_sums) for cells in sets])
    encoder: Iterable[Any] = network.encoder
    layers: list[Sums] = []
    with torch.no_grad():
        for layer in encoder:
            block = layer.begin(hidden)
            layers.append(sums_over_context(layer, block))
            hidden = layer.finish(block, layers[-1])
    sums = ContextSums(embedder_sums, tuple(layers))
    encodings = [encode(network, cells, stored=sums) for cells in sets]
    return sums, _frame_of_pool(network, sets, encodings, n_components, rng)


def _mean_of_sets(network: CellPLM, sets: Sequence[Cells]) -> Sums:
    """Return the embedder's sums of a mean cell: 1, lognorm and fractions over all genes."""
    n_genes = network.config.n_genes
    n_sets, lognorm = torch.zeros(n_genes), torch.zeros(n_genes)
    for cells in sets:
        index = torch.from_numpy(cells.gene_index)
        panel = network.embedder.panel(index)
        block = network.embedder.begin(read_block(cells, np.arange(cells.n_cells)), panel)
        size, total, _ = network.embedder.sums(0, block, panel)
        n_sets[index] += 1
        lognorm[index] += total / size.clamp(min=1)
    return torch.tensor(1.0), lognorm / n_sets.clamp(min=1), network.embedder.pool_profile


def _hidden(network: CellPLM, cells: Cells, embedder_sums: Sums) -> Tensor:
    """Return the first hidden vectors of a set, (cells, hidden)."""
    index = torch.from_numpy(cells.gene_index)
    panel = network.embedder.panel(index)
    block = network.embedder.begin(read_block(cells, np.arange(cells.n_cells)), panel)
    size, *of_genes = embedder_sums
    context = (size, *(total[index] for total in of_genes))
    with torch.no_grad():
        return network.embedder.finish(block, panel, context, None).hidden


class _OnAllGenes(NamedTuple):
    """The representation of cells that measure some genes, as one over all genes of a model."""

    block: RepresentationBlock
    genes: Tensor  # (measured,)
    n_genes: int

    def times(self, columns: Columns) -> Tensor:
        return self.block.times(Columns(columns.latent, columns.genes[self.genes]))

    def transposed_times(self, cells: Tensor) -> Columns:
        of_latent, of_measured = self.block.transposed_times(cells)
        of_genes = torch.zeros(self.n_genes, of_measured.shape[1])
        return Columns(of_latent, of_genes.index_copy(0, self.genes, of_measured))


def _frame_of_pool(
    network: CellPLM,
    sets: Sequence[Cells],
    encodings: Sequence[Encoding],
    n_components: int,
    rng: np.random.Generator,
) -> Frame:
    """Find one frame for all sets."""
    n_latent, n_genes = network.config.latent_size, network.config.n_genes
    joined = Encoding(
        panel=None,
        context_sums=(),
        layer_sums=(),
        **{
            name: np.concatenate([getattr(encoding, name) for encoding in encodings])
            for name in ("latent", "factors", "explained", "total")
        },
    )
    scales = latent_scale(network, joined), residual_length(joined)

    def blocks() -> Iterator[_OnAllGenes]:
        for cells, encoding in zip(sets, encodings, strict=True):
            genes = torch.from_numpy(cells.gene_index)
            for _, block in representation_blocks(network, cells, encoding, *scales):
                yield _OnAllGenes(block, genes, n_genes)

    start = rng.standard_normal((n_latent + n_genes, n_components + OVERSAMPLING))
    columns = Columns(*torch.from_numpy(start).float().split((n_latent, n_genes)))
    n_cells = sum(cells.n_cells for cells in sets)
    rotation = find_rotation(blocks, columns, n_cells, n_components)
    return Frame(rotation, np.arange(n_genes), *scales)
