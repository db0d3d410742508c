"""Run a network over cells of any number: contexts one after another, each in blocks.

A context is a sum (docs/design.md): every layer is a map per cell and a few sums over the context,
so a block of cells goes through alone, and the sums are added up in float64. Between the sweeps
over a context one hidden vector per cell is kept, in a file where the memory budget is too small;
and, as far as the budget goes, what a layer has begun (queries, keys, values), which else is
computed again. Neither the cut into blocks nor the budget changes a result beyond rounding.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from cellplm_tl._anndata import Cells
from cellplm_tl._errors import OptionError
from cellplm_tl._settings import logger, settings
from cellplm_tl.models import CellPLM, Counts
from cellplm_tl.models.embedder import TableEmbedder
from cellplm_tl.models.linear import Linear
from cellplm_tl.models.position import grid_positions

# Cells of a block. More are not faster on a CPU, and fall out of its cache; a GPU wants many.
BLOCK_CELLS = {"cpu": 1024, "cuda": 8192, "mps": 2048}
MIN_BLOCK_CELLS = 16
STATE_SHARE = 0.65  # of the budget, for what is kept of all cells
BLOCK_SHARE = 0.25  # of the budget, for what a block needs while it is computed: at most
BLOCK_VECTORS = 16  # vectors per cell,
ENTRY_BYTES = 24  # and bytes for each of its genes with counts
KEPT_VECTORS = 3  # that a layer begins for each cell: query, key, value
FLOAT_BYTES = 4
DEVICE_SHARE = 0.8  # of the free memory of a GPU

# glibc returns what a block has freed to the system, which then has to map it page by page for the
# next block (a tenth of the time), unless a request of up to 32 MiB has been freed before: from
# then on it keeps that size, and 64 MiB in all (mallopt(3), M_MMAP_THRESHOLD).
KEPT_HEAP_BYTES = 31 * 2**20

Sums = tuple[Tensor, ...]


class ContextSums(NamedTuple):
    """All that a cell needs to know of its context."""

    embedder: Sums
    layers: tuple[Sums, ...]  # of the encoder


@dataclass(frozen=True)
class Encoding:
    """What a network makes of cells; arrays in the order of the cells."""

    latent: NDArray[np.float32]  # (cells, latent): mean of the posterior
    panel: Any  # the embedder's view of the measured genes
    context_sums: tuple[Sums, ...]  # the embedder's sums over each context
    layer_sums: tuple[tuple[Sums, ...], ...]  # likewise the encoder's, where they were asked for
    factors: NDArray[np.float32] | None = None  # (cells, factors); models with a spectrum only,
    explained: NDArray[np.float32] | None = None  # (cells,); as are
    total: NDArray[np.float32] | None = None  # (cells,); these


def encode(
    network: CellPLM,
    cells: Cells,
    *,
    stored: ContextSums | None = None,
    keep_layer_sums: bool = False,
    device: torch.device | None = None,
    bar: tqdm | None = None,
    bar_share: float = 1.0,
) -> Encoding:
    """Encode all cells, context by context.

    Parameters
    ----------
    network
        Stays as it is, in its mode and on its device.
    cells
        Read block by block: once, and once more for each round of sums of the embedder.
    stored
        Sums that stand in for those of the data: each cell then depends on itself alone. The
        embedder's are over all genes of the model.
    keep_layer_sums
        Whether to return the encoder's sums over each context.
    device
        Where to compute; by default that of the settings.
    bar, bar_share
        Progress bar over the cells (:func:`progress_bar`) to advance, and by which share of it; by
        default one of this call's own.

    Returns
    -------
    Encoding
        In main memory.

    Raises
    ------
    OptionError
        Hidden states go past the memory budget, and the scratch directory has no room for them.
    """
    device = settings.torch_device() if device is None else device
    network = converted(network, device, settings.precision)
    parts = (network.embedder, *network.encoder)
    n_sweeps = 1 + sum(1 + (0 if stored else part.n_rounds) for part in parts)
    outputs: dict[str, NDArray[np.float32]] = {}
    sums = []
    if stored is not None:
        stored = moved(_on_genes(stored, cells.gene_index), device)
    own_bar = progress_bar(cells.n_cells) if bar is None else contextlib.nullcontext(bar)
    with torch.inference_mode(), own_bar as bar:
        workspace = _Workspace(network, cells, device)
        panel = network.embedder.panel(torch.from_numpy(cells.gene_index).to(device))
        for rows in cells.contexts or (np.empty(0, np.int64),):
            context = _Context(
                cells, rows, workspace, lambda n: bar.update(bar_share * n / n_sweeps)
            )
            of_context = _encode_context(network, panel, context, stored, outputs)
            sums.append(of_context if keep_layer_sums else of_context._replace(layers=()))
    sums = [moved(of_context, "cpu") for of_context in sums]
    return Encoding(
        panel=moved(panel, "cpu"),
        context_sums=tuple(of_context.embedder for of_context in sums),
        layer_sums=tuple(of_context.layers for of_context in sums),
        **outputs,
    )


def blocks(cells: Cells, network: CellPLM) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Give number of the context and row numbers of every block, in a size for main memory."""
    size = _block_cells(network, cells, "cpu", settings.budget_bytes())
    for number, rows in enumerate(cells.contexts):
        for span in _spans(len(rows), size):
            yield number, rows[span]


def read_block(cells: Cells, rows: NDArray[np.int64]) -> Counts:
    """Read the counts of some cells."""
    block = cells.counts(rows)
    library_size = np.asarray(block.library_size, np.float32)
    arrays = (block.values, block.columns, block.offsets, library_size)
    # The arrays may be the user's own, and read-only, which PyTorch does not know.
    return Counts(*(torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays))


def _on_genes(stored: ContextSums, genes: NDArray[np.int64]) -> ContextSums:
    """Return stored sums with those over genes cut to the measured ones."""
    index = torch.from_numpy(genes)
    embedder = tuple(total[index] if total.ndim else total for total in stored.embedder)
    return stored._replace(embedder=embedder)


def _encode_context(
    network: CellPLM,
    panel: Any,
    context: _Context,
    stored: ContextSums | None,
    outputs: dict[str, NDArray[np.float32]],
) -> ContextSums:
    """Take one context through embedder, layers and latent; return the sums that were used."""
    embedder = network.embedder

    def expression() -> Iterator[tuple[slice, Any]]:
        for span in context.sweep():
            yield span, embedder.begin(context.counts(span), panel)

    if stored is None:
        sums = _add_up(
            embedder.n_rounds,
            expression,
            lambda number, block, _: embedder.sums(number, block, panel),
        )
    else:
        sums = stored.embedder
    for span, block in expression():
        embedded = embedder.finish(block, panel, sums, context.positions(span))
        context.hidden[span] = embedded.hidden
        for name in ("factors", "explained", "total"):
            context.write(outputs, name, span, getattr(embedded, name))
    layers = tuple(
        _pass_layer(layer, context, None if stored is None else stored.layers[number])
        for number, layer in enumerate(network.encoder)
    )
    for span in context.sweep():
        factors = context.read(outputs, "factors", span)
        posterior = network.to_latent(context.hidden[span].to(context.device), factors)
        context.write(outputs, "latent", span, posterior.mean)
    return ContextSums(sums, layers)


def _pass_layer(layer: Any, context: _Context, stored: Sums | None) -> Sums:
    """Take the hidden vectors of a context through one layer; return the sums that were used."""
    context.kept.clear()

    def begun() -> Iterator[tuple[slice, Any]]:
        for span in context.sweep():
            u = context.hidden[span].to(context.device)
            kept = context.kept.read(span)
            block = layer.begin(u) if kept is None else (u, *kept)
            if kept is None and layer.n_rounds:
                context.kept.write(span, block[1:])
            yield span, block

    sums = stored
    if sums is None:
        sums = _add_up(
            layer.n_rounds, begun, lambda number, block, before: layer.sums(number, block, before)
        )
    for span, block in begun():
        context.hidden[span] = layer.finish(block, sums)
    return sums


def _add_up(
    n_rounds: int,
    blocks: Callable[[], Iterator[tuple[slice, Any]]],
    part: Callable[[int, Any, Sums], Sums],
) -> Sums:
    """Add up what the blocks contribute to each round; a round sees the sums of those before."""
    context: Sums = ()
    for number in range(n_rounds):
        total: list[Tensor] = []
        for _, block in blocks():
            added = [_exact(tensor) for tensor in part(number, block, context)]
            total = [a + b for a, b in zip(total, added, strict=True)] if total else added
        context += tuple(tensor.float() for tensor in total)
    return context


class _Context:
    """One context, in blocks."""

    def __init__(
        self,
        cells: Cells,
        rows: NDArray[np.int64],
        workspace: _Workspace,
        advance: Callable[[int], Any],
    ):
        self.device = workspace.device
        self.hidden = workspace.hidden[: len(rows)]  # (cells, hidden)
        self.kept = workspace.kept
        self._cells, self._rows, self._advance = cells, rows, advance
        self._spans = _spans(len(rows), workspace.block_cells)
        self._positions = None
        if cells.coordinates is not None:
            self._positions = grid_positions(torch.from_numpy(cells.coordinates[rows]))

    def sweep(self) -> Iterator[slice]:
        """Give each block in turn, as positions in the context."""
        for span in self._spans:
            yield span
            self._advance(span.stop - span.start)

    def counts(self, span: slice) -> Counts:
        """Read a block's counts."""
        return moved(read_block(self._cells, self._rows[span]), self.device)

    def positions(self, span: slice) -> Tensor | None:
        """Return a block's positions on the grid, (cells, 2)."""
        return None if self._positions is None else self._positions[span].to(self.device)

    def write(
        self, outputs: dict[str, NDArray[np.float32]], name: str, span: slice, block: Tensor | None
    ) -> None:
        """Put a block's rows into the output of that name, over all cells."""
        if block is None:
            return
        if name not in outputs:
            outputs[name] = np.empty((self._cells.n_cells, *block.shape[1:]), np.float32)
        outputs[name][self._rows[span]] = block.cpu().numpy()

    def read(
        self, outputs: dict[str, NDArray[np.float32]], name: str, span: slice
    ) -> Tensor | None:
        """Return a block's rows of the output of that name."""
        if name not in outputs:
            return None
        return torch.from_numpy(outputs[name][self._rows[span]]).to(self.device)


class _Kept:
    """What a layer has begun for the first cells of a context, as many as there is room for."""

    def __init__(self, capacity: int, device: torch.device):
        self._capacity, self._device = capacity, device
        self._buffers: list[Tensor] = []  # each (capacity, ...); made once, used by all layers
        self._n_cells = 0

    def clear(self) -> None:
        """Forget the layer before."""
        self._n_cells = 0

    def write(self, span: slice, tensors: tuple[Tensor, ...]) -> None:
        """Keep a block, if it fits; blocks come in order."""
        if span.stop > self._capacity:
            return
        if not self._buffers:
            self._buffers = [
                _allocate((self._capacity, *tensor.shape[1:]), self._device) for tensor in tensors
            ]
        for buffer, tensor in zip(self._buffers, tensors, strict=True):
            buffer[span] = tensor
        self._n_cells = span.stop

    def read(self, span: slice) -> tuple[Tensor, ...] | None:
        """Return a block, if it was kept."""
        if span.start >= self._n_cells:
            return None
        return tuple(buffer[span] for buffer in self._buffers)


class _Workspace:
    """Memory of one call, laid out within the budget for its largest context."""

    def __init__(self, network: CellPLM, cells: Cells, device: torch.device):
        self.device = device
        torch.empty(KEPT_HEAP_BYTES, dtype=torch.uint8)  # and freed
        budget = settings.budget_bytes()
        device_room = budget
        if device.type == "cuda":
            device_room = int(DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])
        self.block_cells = _block_cells(network, cells, device.type, min(budget, device_room))

        width = network.config.hidden
        largest = max((len(rows) for rows in cells.contexts), default=0)
        hidden_bytes = FLOAT_BYTES * width * largest
        output_width = network.config.latent_size + network.config.factors
        output_bytes = FLOAT_BYTES * cells.n_cells * output_width
        host_room = int(STATE_SHARE * budget) - output_bytes
        device_room = int(STATE_SHARE * device_room) if device.type == "cuda" else host_room
        shape = (largest, width)
        if hidden_bytes <= device_room:
            self.hidden = _allocate(shape, device)
            device_room -= hidden_bytes
        elif hidden_bytes <= host_room:
            self.hidden = _allocate(shape, torch.device("cpu"))
        else:
            self.hidden = _map_file(shape, budget)
        capacity = max(0, device_room) // (FLOAT_BYTES * KEPT_VECTORS * width)
        self.kept = _Kept(min(capacity, largest), device)


def _block_cells(network: CellPLM, cells: Cells, device_type: str, room: int) -> int:
    """Return how many cells a block has."""
    vectors = FLOAT_BYTES * BLOCK_VECTORS * network.config.hidden
    per_cell = vectors + ENTRY_BYTES * len(cells.genes)
    most = BLOCK_CELLS.get(device_type, BLOCK_CELLS["cpu"])
    return int(np.clip(BLOCK_SHARE * room / per_cell, MIN_BLOCK_CELLS, most))


def _spans(n_cells: int, block_cells: int) -> list[slice]:
    """Cut cells into blocks of even size; no cell is one empty block."""
    n_blocks = max(1, -(-n_cells // block_cells))
    edges = np.linspace(0, n_cells, n_blocks + 1).astype(int).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _allocate(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return an uninitialised tensor; numpy asks the system for large pages, PyTorch does not."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, dtype=torch.float32, device=device)


def _map_file(shape: tuple[int, int], budget: int) -> Tensor:
    """Return a tensor in a file without a name, which is gone with the tensor or the process."""
    n_bytes = FLOAT_BYTES * shape[0] * shape[1]
    free = shutil.disk_usage(settings.scratch_dir).free
    if n_bytes > free:
        raise OptionError(
            f"The hidden states of {shape[0]:,} cells need {n_bytes / 1e9:.1f} GB, past the "
            f"memory budget of {budget / 1e9:.1f} GB; settings.scratch_dir "
            f"({str(settings.scratch_dir)!r}) has {free / 1e9:.1f} GB. Name a directory on a "
            "larger disk, raise settings.memory_budget, or give smaller contexts by batch_key."
        )
    logger.info(
        "hidden states of %d cells go to %s (%.1f GB, memory budget %.1f GB)",
        shape[0],
        settings.scratch_dir,
        n_bytes / 1e9,
        budget / 1e9,
    )
    with tempfile.TemporaryFile(dir=settings.scratch_dir) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is to be an error here, no crash later
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))


def _exact(tensor: Tensor) -> Tensor:
    """Return a sum over a block as it is added to the others: in float64, which MPS lacks."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def moved(value: Any, device: torch.device | str) -> Any:
    """Return tensors, and tuples of them, on a device; what is neither stays as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not isinstance(value, tuple):
        return value
    parts = [moved(item, device) for item in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def converted(network: CellPLM, device: torch.device, precision: str) -> CellPLM:
    """Return the network for inference on a device; tensors that need no change are shared.

    With precision "bf16" matrix products take bfloat16; all else stays float32.
    """
    shared: dict[int, Any] = {id(network.config): network.config}
    for module in network.modules():
        in_products = isinstance(module, Linear | TableEmbedder)
        dtype = torch.bfloat16 if precision == "bf16" and in_products else None
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            converted = tensor.detach().to(device=device, dtype=dtype)
            if isinstance(tensor, nn.Parameter):
                converted = nn.Parameter(converted, requires_grad=False)
            shared[id(tensor)] = converted
    return copy.deepcopy(network, shared).eval()


def progress_bar(n_cells: int) -> tqdm:
    """Return the one bar of a call, over cells; quiet where the settings say so."""
    return tqdm(total=n_cells, unit=" cells", unit_scale=True, disable=not settings.show_progress())
