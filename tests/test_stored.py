"""A context that is kept with a model: what is kept, and that a cell then depends on itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cellplm_tl as cp
from cellplm_tl import _inference
from cellplm_tl._inference import ContextSums, encode
from cellplm_tl._rotation import find_frame, project
from cellplm_tl._stored import (
    context_from_tensors,
    context_of_pool,
    context_to_tensors,
    frame_from_tensors,
    frame_to_tensors,
)

FIELDS = {
    "network": {},
    "unit length": {"unit_length": True, "factor_share": 0.5, "target_sum": "panel"},
    "no attention": {"encoder": "mlp"},
    "no network": {"encoder": "none", "encoder_layers": 0, "hidden": 12, "latent": "none"},
}
each_network = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
N_COMPONENTS = 6


def pool(network, *sets) -> tuple[ContextSums, object]:
    return context_of_pool(network, sets, N_COMPONENTS, np.random.default_rng(0))


def embed(network, cells, context, n_components=N_COMPONENTS) -> np.ndarray:
    sums, frame = context
    encoding = encode(network, cells, stored=sums)
    return project(network, cells, encoding, frame, n_components)


def assert_close(actual, expected, relative=1e-4) -> None:
    """Compare two arrays; the largest number of the second sets the scale."""
    atol = relative * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def assert_same_sums(actual, expected, relative=1e-4) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert_close(one.numpy(), other.numpy(), relative)


def lognorm(network, cells) -> np.ndarray:
    """log1p of counts per 10,000, or per the panel's part of them, in float64; NaN: no counts."""
    block = cells.counts(np.arange(cells.n_cells))
    y = np.zeros((cells.n_cells, len(cells.genes)))
    y[np.repeat(np.arange(cells.n_cells), np.diff(block.offsets)), block.columns] = block.values
    target = 1e4
    if network.config.target_sum == "panel":
        target *= network.embedder.pool_profile.double().numpy()[cells.gene_index].sum()
    library = np.where(block.library_size > 0, block.library_size, np.nan)
    return np.log1p(target * y / library[:, None])


# --- as tensors -----------------------------------------------------------------------------------


def test_a_frame_as_tensors(spectrum_network, spectrum_cells):
    network, cells = spectrum_network(unit_length=True), spectrum_cells(genes=slice(20, 200))
    encoding = encode(network, cells)
    frame = find_frame(network, cells, encoding, 5, np.random.default_rng(0))
    tensors = frame_to_tensors(frame)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "latent": (12, 5),
        "directions": (180, 5),
        "genes": (180,),
        "mean": (5,),
        "scales": (2,),
    }
    for stored in (tensors, {name: tensor.float() for name, tensor in tensors.items()}):
        again = frame_from_tensors(stored)
        assert again.genes.dtype == np.int64
        np.testing.assert_array_equal(again.genes, frame.genes)
        assert torch.equal(again.rotation.components.latent, frame.rotation.components.latent)
        assert torch.equal(again.rotation.components.genes, frame.rotation.components.genes)
        assert torch.equal(again.rotation.mean, frame.rotation.mean)
        assert again.latent_scale == pytest.approx(frame.latent_scale, rel=1e-6)
        assert again.residual_length == pytest.approx(frame.residual_length, rel=1e-6)
        assert frame.latent_scale != pytest.approx(frame.residual_length, rel=0.01)


@each_network
def test_a_context_as_tensors(fields, spectrum_network, spectrum_cells):
    network = spectrum_network(**fields)
    sums, frame = pool(network, spectrum_cells(genes=slice(0, 200)))
    tensors = context_to_tensors(sums, frame)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    n_layers = network.config.encoder_layers
    shuffled = dict(sorted(tensors.items(), reverse=True))  # a file keeps no order
    again, frame_again = context_from_tensors(shuffled, n_layers)
    assert len(again.layers) == n_layers
    for one, other in zip(
        (again.embedder, *again.layers), (sums.embedder, *sums.layers), strict=True
    ):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for name, tensor in frame_to_tensors(frame_again).items():
        assert torch.equal(tensor, frame_to_tensors(frame)[name])


def test_more_than_ten_layers_keep_their_order():
    sums = ContextSums(
        (torch.tensor(1.0), torch.arange(3.0)),
        tuple((torch.tensor(float(n)), torch.full((2,), -float(n))) for n in range(12)),
    )
    frame = frame_from_tensors(
        {
            "latent": torch.eye(2),
            "directions": torch.ones(3, 2),
            "genes": torch.arange(3.0),
            "mean": torch.zeros(2),
            "scales": torch.tensor([2.0, 3.0]),
        }
    )
    again, _ = context_from_tensors(context_to_tensors(sums, frame), 12)
    assert [float(layer[0]) for layer in again.layers] == list(range(12))
    assert [float(layer[1][0]) for layer in again.layers] == [-n for n in range(12)]


# --- one set --------------------------------------------------------------------------------------


@each_network
def test_one_set_is_a_context_of_its_own(fields, spectrum_network, spectrum_cells):
    """Of the embedder the mean cell is kept, of the encoder the sums themselves."""
    network, cells = spectrum_network(**fields), spectrum_cells(genes=slice(30, 230))
    own = encode(network, cells, keep_layer_sums=True)
    sums, frame = pool(network, cells)
    [(size, total, _)] = own.context_sums
    assert size == 159  # the first cell has no counts
    assert sums.embedder[0] == 1
    assert_close(sums.embedder[1][30:230].numpy(), (total / size).numpy())
    assert_close(sums.embedder[1][30:230].numpy(), np.nanmean(lognorm(network, cells), axis=0))
    assert sums.embedder[1].isfinite().all()
    assert torch.equal(sums.embedder[2], network.embedder.pool_profile)
    [layers] = own.layer_sums
    assert len(sums.layers) == len(layers) == len(network.encoder)
    for stored, of_layer in zip(sums.layers, layers, strict=True):
        assert_same_sums(stored, of_layer)

    encoding = encode(network, cells, stored=sums)
    for name in ("latent", "factors", "explained", "total"):
        assert_close(getattr(encoding, name), getattr(own, name))
    np.testing.assert_array_equal(frame.genes, np.arange(300))
    expected = project(
        network,
        cells,
        own,
        find_frame(network, cells, own, N_COMPONENTS, np.random.default_rng(0)),
        N_COMPONENTS,
    )
    actual = embed(network, cells, (sums, frame))
    # Both start from columns of their own, and the last components converge last.
    expected *= np.sign((expected * actual).sum(0))
    assert_close(actual[:, :3], expected[:, :3], 2e-3)
    assert (actual**2).sum() == pytest.approx((expected**2).sum(), rel=2e-3)


@each_network
def test_one_set_of_all_genes_gives_what_its_own_context_gives(
    fields, spectrum_network, spectrum_cells
):
    network, cells = spectrum_network(**fields), spectrum_cells()
    own = encode(network, cells)
    frame = find_frame(network, cells, own, N_COMPONENTS, np.random.default_rng(0))
    expected = project(network, cells, own, frame, N_COMPONENTS)
    assert_close(embed(network, cells, pool(network, cells)), expected)


# --- several sets ---------------------------------------------------------------------------------


def two_sets(spectrum_cells):
    """Two sets of different sizes with different genes; some genes are measured by neither."""
    return (
        spectrum_cells(slice(0, 100), slice(0, 200)),
        spectrum_cells(slice(100, 160), slice(120, 280)),
    )


@each_network
def test_the_mean_is_over_the_sets_that_measure_a_gene(fields, spectrum_network, spectrum_cells):
    network, sets = spectrum_network(**fields), two_sets(spectrum_cells)
    means = np.full((2, 300), np.nan)
    means[0, :200], means[1, 120:280] = (np.nanmean(lognorm(network, s), axis=0) for s in sets)
    (size, mean, profile), _ = pool(network, *sets)[0]
    assert size == 1
    assert_close(mean[:280].numpy(), np.nanmean(means[:, :280], axis=0))
    assert mean.isfinite().all()
    assert torch.equal(profile, network.embedder.pool_profile)


def test_all_cells_are_one_context_of_the_encoder(spectrum_network, spectrum_cells):
    """Layer after layer, over the joined hidden vectors; the first round written out."""
    network, sets = spectrum_network(), two_sets(spectrum_cells)
    sums, _ = pool(network, *sets)
    hidden, starts, latents = [], [], []
    with torch.no_grad():
        for cells in sets:
            index = torch.from_numpy(cells.gene_index)
            panel = network.embedder.panel(index)
            counts = _inference.read_block(cells, np.arange(cells.n_cells))
            own = (sums.embedder[0], sums.embedder[1][index], sums.embedder[2][index])
            block = network.embedder.begin(counts, panel)
            embedded = network.embedder.finish(block, panel, own, None)
            hidden.append(embedded.hidden)
            starts.append(network.embedder.unit_factors(embedded.factors))
            latents.append(encode(network, cells, stored=sums).latent)
        u = torch.cat(hidden)
        for layer, of_layer in zip(network.encoder, sums.layers, strict=True):
            q, k, _ = (part.double() for part in layer.begin(u)[1:])
            assert of_layer[0] == len(u) == 160
            assert_same_sums(of_layer[1:3], (k.sum(0), q.sum(0)))
            u = layer.finish(layer.begin(u), of_layer)
        z = torch.cat(starts) + network.latent.mean(network.pre_latent_norm(u))
    assert_close(np.concatenate(latents), z.numpy())


@each_network
def test_halves_are_the_whole(fields, spectrum_network, spectrum_cells):
    """Two sets of one size and the same genes are as one."""
    network = spectrum_network(**fields)
    halves = spectrum_cells(slice(1, 81)), spectrum_cells(slice(81, 161))
    whole = spectrum_cells(slice(1, 161))
    (of_halves, frame), (of_whole, frame_of_whole) = pool(network, *halves), pool(network, whole)
    assert_same_sums(of_halves.embedder, of_whole.embedder)
    for layer, of_layer in zip(of_halves.layers, of_whole.layers, strict=True):
        assert_same_sums(layer, of_layer)
    expected = embed(network, whole, (of_whole, frame_of_whole))
    assert_close(embed(network, whole, (of_halves, frame)), expected)


@each_network
def test_the_frame_of_two_sets(fields, spectrum_network, spectrum_cells, representation):
    """Components of all cells over all genes; what a set does not measure is 0 there."""
    network, sets = spectrum_network(**fields), two_sets(spectrum_cells)
    sums, frame = pool(network, *sets)
    mean = sums.embedder[1].double().numpy()
    latents, residuals, factors, lefts = [], [], [], []
    for cells in sets:
        latent = encode(network, cells, stored=sums).latent
        parts = representation(network, cells, latent, mean[cells.gene_index])
        on_all = np.zeros((cells.n_cells, 300))
        on_all[:, cells.gene_index] = parts[1]
        latents.append(parts[0])
        residuals.append(on_all)
        factors.append(parts[2])
        lefts.append(parts[4])
    latent, residual, factors = map(np.concatenate, (latents, residuals, factors))
    c = np.sqrt(factors.var(0).sum() / latent.var(0).sum())
    length = np.sqrt(np.concatenate(lefts).mean())
    assert frame.latent_scale == pytest.approx(c, rel=1e-4)
    assert frame.residual_length == pytest.approx(length, rel=1e-4)
    scaled = residual * length if network.config.unit_length else residual
    matrix = np.hstack([c * latent, network.config.residual_weight * scaled])
    (of_latent, of_genes), mean = frame.rotation
    components = np.concatenate([of_latent, of_genes]).astype(float)
    np.testing.assert_allclose(components.T @ components, np.eye(N_COMPONENTS), atol=1e-4)
    assert_close(mean.numpy(), components.T @ matrix.mean(0))
    scores = np.concatenate([embed(network, cells, (sums, frame)) for cells in sets])
    assert_close(scores, (matrix - matrix.mean(0)) @ components)
    u, s, _ = np.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
    expected = u[:, :N_COMPONENTS] * s[:N_COMPONENTS]
    expected *= np.sign((expected * scores).sum(0))
    assert_close(scores[:, :2], expected[:, :2], 5e-3)
    assert 0.997 < (scores.astype(float) ** 2).sum() / (expected**2).sum() < 1.0001


# --- a cell depends on itself ---------------------------------------------------------------------


@each_network
def test_a_cell_does_not_depend_on_the_others(fields, spectrum_network, spectrum_cells):
    network = spectrum_network(**fields)
    context = pool(network, *two_sets(spectrum_cells))

    def embedding(rows, **parameters):
        return embed(network, spectrum_cells(rows, slice(50, 290), **parameters), context)

    expected = embedding(slice(0, 160))
    assert expected[1:].std(0).min() > 0.1
    assert_close(embedding(slice(0, 160, 3)), expected[::3])
    order = np.random.default_rng(0).permutation(160)
    assert_close(embedding(order), expected[order])
    assert_close(embedding(slice(0, 160), batch_key="sample"), expected)
    for row in (0, 1, 77, 159):
        alone = embedding(slice(row, row + 1))
        np.testing.assert_allclose(
            alone, expected[row : row + 1], atol=1e-4 * np.abs(expected).max()
        )


@each_network
def test_neither_blocks_nor_budget_matter(fields, spectrum_network, spectrum_cells, monkeypatch):
    network, cells = spectrum_network(**fields), spectrum_cells()
    context = pool(network, *two_sets(spectrum_cells))
    expected = embed(network, cells, context)
    for block_cells, budget in ((1, 10**9), (7, 1), (50, 40_000), (1000, 1)):
        with cp.settings.override(memory_budget=budget):
            monkeypatch.setattr(_inference, "_block_cells", lambda *_, n=block_cells: n)
            assert_close(embed(network, cells, context), expected)


def test_cells_without_counts_are_finite(spectrum_network, spectrum_cells):
    for fields in FIELDS.values():
        network = spectrum_network(**fields)
        sums, frame = pool(network, *two_sets(spectrum_cells))
        encoding = encode(network, spectrum_cells(slice(0, 1)), stored=sums)  # has no counts
        assert encoding.factors.tolist() == [[0.0] * 12]
        assert encoding.total.tolist() == [0.0]
        assert np.isfinite(encoding.latent).all()
        assert np.isfinite(embed(network, spectrum_cells(slice(0, 2)), (sums, frame))).all()
