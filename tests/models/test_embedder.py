from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellplm_tl.models import CellPLM, CellPLMConfig
from cellplm_tl.models.embedder import Counts, TableEmbedder, sparse_product, with_length
from cellplm_tl.models.position import grid_positions

LAYOUTS = ["gmvae", "vae", "ae"]


def take(counts: Counts, start: int, stop: int) -> Counts:
    """Cut a block of cells out of a context."""
    first, last = counts.offsets[start], counts.offsets[stop]
    return Counts(
        counts.values[first:last],
        counts.columns[first:last],
        counts.offsets[start : stop + 1] - first,
        counts.library_size[start:stop],
    )


def drive(embedder, blocks, genes, positions=None):
    """Embed a context block by block, and give what `finish` gave for each."""
    panel = embedder.panel(genes)
    begun = [embedder.begin(block, panel) for block in blocks]
    context: tuple[torch.Tensor, ...] = ()
    for number in range(embedder.n_rounds):
        parts = [embedder.sums(number, block, panel) for block in begun]
        context = context + tuple(sum(part) for part in zip(*parts, strict=True))
    return [embedder.finish(block, panel, context, positions) for block in begun], context


# --- counts ---------------------------------------------------------------------------------------


def test_counts_against_numpy(random_counts, to_counts, assert_close):
    dense = random_counts(7, 9)
    dense[3] = 0
    library_size = dense.sum(1) + np.arange(7) * 2.0  # more was counted than these genes
    counts = to_counts(dense, library_size)
    rows, columns = np.nonzero(dense)
    assert counts.n_cells == 7
    assert counts.rows().tolist() == rows.tolist()
    assert_close(counts.log1p(), np.log1p(dense[rows, columns]), rtol=1e-6)
    scaled = dense[rows, columns] / library_size[rows] * 10_000
    assert_close(counts.lognorm(), np.log1p(scaled), rtol=1e-6)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_sparse_product_is_the_dense_one(index, random_counts, to_counts, assert_close):
    dense = random_counts(6, 5)
    dense[[0, 3]] = 0  # an empty cell at the start, and one in between
    counts = to_counts(dense, dtype=torch.float64)
    table = torch.randn(5, 4, dtype=torch.float64)
    product = sparse_product(
        counts.values, counts.columns.to(index), counts.offsets.to(index), table
    )
    assert_close(product, dense @ table.numpy(), rtol=1e-12)


def test_sparse_product_of_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    table = torch.randn(5, 4)
    no_entries = sparse_product(torch.zeros(0), nothing, torch.zeros(4, dtype=torch.int64), table)
    assert no_entries.tolist() == [[0.0] * 4] * 3
    assert sparse_product(torch.zeros(0), nothing, nothing.new_zeros(1), table).shape == (0, 4)


def test_gradients_of_the_sparse_product(random_counts, to_counts):
    counts = to_counts(random_counts(4, 5), dtype=torch.float64)
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    values = counts.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, t: sparse_product(v, counts.columns, counts.offsets, t), (values, table)
    )


# --- the gene table -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_release(layout, golden, golden_network, to_counts, assert_close):
    arrays, embedder = golden(f"forward_{layout}"), golden_network(layout).embedder
    panel = embedder.panel(torch.tensor(arrays["gene_index"].astype(np.int64)))
    e = embedder.begin(to_counts(arrays["counts"]), panel)
    assert_close(e, arrays["whole_expr_embed"], atol=2e-6)
    assert_close(embedder.finish(e, panel, (), None).hidden, arrays["whole_embedder"])


@pytest.mark.parametrize("norm", ["groupnorm", "layernorm"])
@pytest.mark.parametrize("positions", ["none", "sinusoidal"])
def test_table_embedder_against_numpy(
    norm, positions, make_network, random_counts, to_counts, assert_close
):
    embedder = make_network(norm=norm, positions=positions).embedder
    dense, genes = random_counts(9, 7), np.array([5, 30, 2, 8, 39, 0, 11])
    coordinates = torch.rand(9, 2, generator=torch.Generator().manual_seed(0))
    coordinates[4] = float("nan")
    grid = grid_positions(coordinates)

    state = {name: p.detach().double().numpy() for name, p in embedder.named_parameters()}
    e = np.log1p(dense) @ state["table"][genes]
    if positions == "sinusoidal":
        w = 10000.0 ** (-np.arange(4) / 4)
        for cell, (x, y) in enumerate(grid.tolist()):
            encoding = [f(c * w_i) for c in (x, y) for w_i in w for f in (np.sin, np.cos)]
            e[cell] += encoding if cell != 4 else state["mixing.positions.placeholder"]
    u = np.maximum(e @ state["mixing.linear.weight"].T + state["mixing.linear.bias"], 0)
    groups = u.reshape(9, 4 if norm == "groupnorm" else 1, -1)
    centred = groups - groups.mean(2, keepdims=True)
    u = (centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-5)).reshape(9, 16)
    expected = u * state["mixing.norm.weight"] + state["mixing.norm.bias"]

    [embedded], _ = drive(embedder, [to_counts(dense)], torch.tensor(genes), grid)
    assert_close(embedded.hidden, expected)


def test_genes_without_counts_change_nothing(make_network, random_counts, to_counts, assert_close):
    """With a gene table a zero is as good as a gene that was not measured, in any order."""
    embedder = make_network().embedder
    dense, genes = random_counts(6, 8), torch.arange(10, 18)
    [expected], _ = drive(embedder, [to_counts(dense)], genes)
    wider = np.concatenate((np.zeros((6, 5)), dense[:, ::-1]), axis=1)
    [embedded], _ = drive(embedder, [to_counts(wider)], torch.cat((torch.arange(5), genes.flip(0))))
    assert_close(embedded.hidden, expected.hidden)


def test_a_wide_table_is_multiplied_in_slices(make_network, random_counts, to_counts, assert_close):
    embedder = make_network(hidden=160).embedder
    dense, genes = random_counts(6, 5), torch.tensor([7, 0, 3, 11, 2])
    panel = embedder.panel(genes)
    assert [part.shape for part in panel] == [(5, 64), (5, 64), (5, 32)]
    expected = np.log1p(dense) @ embedder.table[genes].detach().double().numpy()
    assert_close(embedder.begin(to_counts(dense), panel), expected)


def test_the_initial_gene_table(make_network):
    config = make_network(n_genes=2000, hidden=64).config
    table = TableEmbedder(config).table
    assert table.std().item() == pytest.approx(64**-0.5, rel=0.02)


# --- the spectrum ---------------------------------------------------------------------------------

SPECTRUM = {"embedder": "spectrum", "factors": 6, "latent_size": 6, "noise": 0.3}


def factor_model(embedder, dense, library_size, genes, target_sum=1e4):
    """Scaled expression and posterior factors, dense and in float64, one cell at a time."""
    loadings, scale, eigenvalues = (
        getattr(embedder, name).double().numpy() for name in ("loadings", "scale", "eigenvalues")
    )
    v, s = loadings[genes], scale[genes]
    measured = library_size > 0
    y = np.log1p(dense / np.maximum(library_size, 1)[:, None] * target_sum)
    mean = y[measured].mean(0)
    x = np.clip((y - mean) / s, -5, 10) * measured[:, None]
    factors = []
    for cell in x:  # the regularised least squares that the posterior mean solves
        design = np.concatenate((v / np.sqrt(0.3), np.diag(eigenvalues**-0.5)))
        target = np.concatenate((cell / np.sqrt(0.3), np.zeros(len(eigenvalues))))
        factors.append(np.linalg.lstsq(design, target, rcond=None)[0])
    return x, np.array(factors), v


@pytest.fixture
def spectrum(make_network, random_counts, to_counts):
    """Give an embedder, its input with one empty cell, and the dense float64 computation."""
    embedder = make_network(**SPECTRUM).embedder
    dense, genes = random_counts(25, 11), np.array([5, 30, 2, 8, 39, 0, 11, 12, 20, 31, 7])
    dense[3] = 0
    dense[:, 10] = 40 * (np.arange(25) == 7)  # a gene of one cell: far above the context's mean
    embedder.scale[genes[10]] = 0.3
    library_size = dense.sum(1) * 1.5
    expected = factor_model(embedder, dense, library_size, genes)
    return embedder, to_counts(dense, library_size), torch.tensor(genes), expected, dense


def test_spectrum_against_numpy(spectrum, assert_close):
    embedder, counts, genes, (x, factors, v), dense = spectrum
    [embedded], context = drive(embedder, [counts], genes)
    assert_close(embedded.factors, factors, rtol=1e-4)
    assert_close(embedded.total, (x**2).sum(1), rtol=1e-4)
    # What is left of a cell after its factors, and what they took.
    unexplained = ((x - factors @ v.T) ** 2).sum(1)
    assert_close(embedded.explained, (x**2).sum(1) - unexplained, rtol=1e-4, atol=1e-4)
    fractions = dense / np.maximum(dense.sum(1, keepdims=True) * 1.5, 1)
    assert_close(embedder.profile(context), fractions.sum(0) / 24)


def test_first_hidden_vector_of_the_spectrum(spectrum, assert_close):
    embedder, counts, genes, (x, factors, v), _ = spectrum
    state = {name: t.double().numpy() for name, t in embedder.state_dict().items()}
    taken = (x**2).sum(1) - ((x - factors @ v.T) ** 2).sum(1)
    descriptors = np.stack(
        (
            np.log10(np.maximum(counts.library_size.numpy(), 1)),
            np.full(25, np.log10(11)),
            taken / np.maximum((x**2).sum(1), 1e-12),
        ),
        axis=1,
    )
    read = np.concatenate((factors / np.sqrt(state["eigenvalues"]), descriptors), axis=1)
    e = read @ state["reader.linear.weight"].T + state["reader.linear.bias"]
    expected = embedder.reader.mixing(torch.tensor(e).float(), None)
    [embedded], _ = drive(embedder, [counts], genes)
    assert_close(embedded.hidden, expected, rtol=1e-4, atol=1e-4)


def test_scaled_expression_is_never_dense_but_multiplies_like_it(spectrum, assert_close):
    embedder, counts, genes, (x, _, _), _ = spectrum
    panel = embedder.panel(genes)
    block = embedder.begin(counts, panel)
    scaled = embedder.scaled(block, panel, embedder.sums(0, block, panel))
    right, left = torch.randn(11, 3), torch.randn(25, 3)
    assert_close(scaled.times(right), x @ right.double().numpy(), rtol=1e-4, atol=1e-4)
    assert_close(scaled.transposed_times(left), x.T @ left.double().numpy(), rtol=1e-4, atol=1e-4)
    assert_close(scaled.squared_length(), (x**2).sum(1), rtol=1e-5)


def test_the_bounds_of_scaled_expression_act_in_these_tests(spectrum):
    x = spectrum[3][0]
    assert ((x == 10).any(), (x == -5).any()) == (True, True)


def test_a_gene_that_was_not_measured_is_no_zero(make_network, random_counts, to_counts):
    """The factors are those of the measured genes alone: a column of zeros says something else."""
    embedder = make_network(**SPECTRUM).embedder
    dense, genes = random_counts(12, 8), torch.arange(8)
    dense[:, 7] = np.arange(12)  # a gene that differs between cells
    library_size = dense.sum(1)
    [all_of_them], _ = drive(embedder, [to_counts(dense, library_size)], genes)
    [without], _ = drive(embedder, [to_counts(dense[:, :7], library_size)], genes[:7])
    as_zero = dense * (np.arange(8) < 7)
    [zeroed], _ = drive(embedder, [to_counts(as_zero, library_size)], genes)
    assert (without.factors - all_of_them.factors).abs().max() > 0.01
    assert (without.factors - zeroed.factors).abs().max() > 0.01


def test_an_empty_cell_is_the_mean_of_its_context(spectrum):
    embedder, counts, genes, _, _ = spectrum
    [embedded], _ = drive(embedder, [counts], genes)
    assert embedded.factors[3].tolist() == [0.0] * 6
    assert embedded.total[3] == 0
    assert embedded.hidden.isfinite().all()


def test_a_context_of_empty_cells_is_finite(make_network, to_counts):
    embedder = make_network(**SPECTRUM).embedder
    [embedded], context = drive(embedder, [to_counts(np.zeros((3, 4)))], torch.arange(4))
    assert embedded.hidden.isfinite().all()
    assert embedder.profile(context).tolist() == [0.0] * 4


def test_background_of_genes_that_were_not_measured(make_network, assert_close):
    """The pool's mean fractions, of which the context's panel shares out its own part."""
    embedder = make_network(**SPECTRUM).embedder
    pool = embedder.pool_profile.double().numpy()
    profile, measured = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([7, 2, 11])
    actual = embedder.background(profile, measured, torch.tensor([2, 3, 11]))
    part = pool[[7, 2, 11]].sum()
    assert_close(actual, np.array([0.2 * part, pool[3], 0.3 * part]), rtol=1e-5, atol=0)
    assert_close(embedder.pool_profile, pool)  # unchanged


# --- what a library is scaled to ------------------------------------------------------------------


def test_counts_of_a_panel_are_scaled_to_its_part_of_the_pool(
    make_network, random_counts, to_counts, assert_close
):
    embedder = make_network(**SPECTRUM, target_sum="panel").embedder
    dense, genes = random_counts(25, 11), np.array([5, 30, 2, 8, 39, 0, 11, 12, 20, 31, 7])
    dense[3] = 0
    library_size = dense.sum(1) * 1.5
    share = embedder.pool_profile.double().numpy()[genes].sum()
    assert 0.1 < share < 0.5
    counts, panel = to_counts(dense, library_size), embedder.panel(torch.tensor(genes))
    rows, columns = np.nonzero(dense)
    y = np.log1p(1e4 * share * dense[rows, columns] / library_size[rows])
    assert_close(embedder.begin(counts, panel).lognorm, y)

    x, factors, v = factor_model(embedder, dense, library_size, genes, 1e4 * share)
    [embedded], context = drive(embedder, [counts], torch.tensor(genes))
    assert_close(embedded.factors, factors, rtol=1e-4)
    assert_close(embedded.total, (x**2).sum(1), rtol=1e-4)
    left = ((x - factors @ v.T) ** 2).sum(1)
    assert_close(embedded.explained, (x**2).sum(1) - left, rtol=1e-4, atol=1e-4)
    # The sums: cells with counts, their y, and their fractions, which no scaling touches.
    y_sum = np.zeros(11)
    np.add.at(y_sum, columns, y)
    fractions = dense / np.maximum(library_size, 1)[:, None]
    assert context[0] == 24
    assert_close(context[1], y_sum)
    assert_close(context[2], fractions.sum(0))
    assert_close(embedder.profile(context), fractions.sum(0) / 24)


def test_the_whole_list_is_scaled_as_a_library_is(make_network, random_counts, to_counts):
    library, panel = (
        make_network(**SPECTRUM, target_sum=target_sum).embedder
        for target_sum in ("library", "panel")
    )
    counts, everything = to_counts(random_counts(9, 40)), torch.arange(40)
    assert library.panel(everything).target_sum == 1e4
    [one], sums = drive(library, [counts], everything)
    [other], again = drive(panel, [counts], everything)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, sums)
    [few], _ = drive(panel, [counts], everything.flip(0))  # other genes than those counted
    assert (few.factors - one.factors).abs().max() > 0.01


def test_values_of_a_cell_like_the_pool_mean_the_same_on_a_panel(make_network, to_counts):
    """On any panel: y = log1p(1e4 p) for a cell whose counts go with the pool's profile p."""
    embedder = make_network(**SPECTRUM, target_sum="panel").embedder
    pool = embedder.pool_profile.double().numpy()
    for genes in (np.arange(40), np.arange(40)[::3], np.array([7, 2, 11])):
        counts = to_counts(500 * pool[None, genes])
        lognorm = embedder.begin(counts, embedder.panel(torch.tensor(genes))).lognorm
        np.testing.assert_allclose(lognorm, np.log1p(1e4 * pool[genes]), rtol=1e-5)


def test_a_panel_that_the_pool_does_not_count_is_finite(make_network, random_counts, to_counts):
    embedder = make_network(**SPECTRUM, target_sum="panel").embedder
    embedder.pool_profile[:11] = 0
    [embedded], context = drive(embedder, [to_counts(random_counts(9, 11))], torch.arange(11))
    assert all(sums.isfinite().all() for sums in context)
    assert embedded.hidden.isfinite().all()
    assert float(embedder.profile(context).sum()) == pytest.approx(1, rel=1e-3)


# --- one length -----------------------------------------------------------------------------------

UNIT = SPECTRUM | {"unit_length": True}


@pytest.mark.parametrize("unit_length", [False, True])
def test_unit_factors_keep_their_lengths(unit_length, make_network, assert_close):
    embedder = make_network(**SPECTRUM, unit_length=unit_length).embedder
    factors = np.random.default_rng(0).normal(size=(5, 6)) * np.logspace(-3, 3, 5)[:, None]
    factors[2] = 0
    actual = embedder.unit_factors(torch.tensor(factors).float())
    assert_close(actual, factors / np.sqrt(np.linspace(3.0, 0.5, 6)))


def test_rows_of_one_length(assert_close):
    rows = np.random.default_rng(0).normal(size=(5, 6)) * np.logspace(-3, 3, 5)[:, None]
    rows[2] = 0
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    expected = 2.5 * np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    assert_close(with_length(torch.tensor(rows).float(), 2.5), expected)


def test_first_hidden_vector_at_one_length(make_network, random_counts, to_counts, assert_close):
    """The reader sees the direction alone, and the length that it lost as a fourth descriptor."""
    embedder = make_network(**UNIT).embedder
    dense, genes = random_counts(25, 11), np.arange(11) * 3
    dense[3] = 0
    library_size = dense.sum(1) * 1.5
    x, factors, v = factor_model(embedder, dense, library_size, genes)
    state = {name: t.double().numpy() for name, t in embedder.state_dict().items()}
    assert state["reader.linear.weight"].shape == (16, 6 + 4)
    assert make_network(**SPECTRUM).embedder.reader.linear.weight.shape == (16, 6 + 3)
    unit = factors / np.sqrt(state["eigenvalues"])
    lengths = np.maximum(np.linalg.norm(unit, axis=1), 1e-6)
    taken = (x**2).sum(1) - ((x - factors @ v.T) ** 2).sum(1)
    descriptors = (
        np.log10(np.maximum(library_size, 1)),
        np.full(25, np.log10(11)),
        taken / np.maximum((x**2).sum(1), 1e-12),
        np.log10(lengths),
    )
    assert descriptors[3][3] == -6  # no counts, no factors
    read = np.concatenate((unit / lengths[:, None] * 6**0.5, np.stack(descriptors, 1)), axis=1)
    e = read @ state["reader.linear.weight"].T + state["reader.linear.bias"]
    expected = embedder.reader.mixing(torch.tensor(e).float(), None)
    [embedded], _ = drive(embedder, [to_counts(dense, library_size)], torch.tensor(genes))
    assert_close(embedded.hidden, expected, rtol=1e-4, atol=1e-4)
    assert_close(embedded.factors, factors, rtol=1e-4)  # these keep their lengths


@pytest.mark.parametrize("fields", [SPECTRUM, UNIT, UNIT | {"target_sum": "panel"}])
def test_reading_a_whole_context(fields, make_network, random_counts, to_counts, assert_close):
    embedder = make_network(**fields).embedder
    dense, genes = random_counts(25, 11), np.arange(11) * 3
    dense[3] = 0
    library_size = dense.sum(1) * 1.5
    share = 1.0
    if "target_sum" in fields:
        share = embedder.pool_profile.double().numpy()[genes].sum()
    _, factors, _ = factor_model(embedder, dense, library_size, genes, 1e4 * share)
    expected = factors / np.sqrt(np.linspace(3.0, 0.5, 6))
    counts, panel = to_counts(dense, library_size), embedder.panel(torch.tensor(genes))
    assert_close(embedder.read(counts, panel), expected, rtol=1e-4, atol=1e-4)


def test_vectors_of_genes(make_network, assert_close):
    genes = torch.tensor([7, 0, 3])
    spectrum = make_network(**SPECTRUM).embedder
    expected = spectrum.loadings.double().numpy()[[7, 0, 3]] * np.sqrt(np.linspace(3.0, 0.5, 6))
    assert_close(spectrum.gene_vectors(genes), expected)
    table = make_network().embedder
    assert torch.equal(table.gene_vectors(genes), table.table[[7, 0, 3]])


# --- blocks ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 25), max_size=5))
def test_blocks_do_not_matter(cuts):
    """Blocks of any size, empty ones among them, add up to the same context."""
    rng = np.random.default_rng(0)
    dense = rng.poisson(2.0, (25, 6)).astype(float)
    torch.manual_seed(0)
    config = CellPLMConfig(genes=tuple("abcdef"), hidden=8, decoder="none", **SPECTRUM)
    embedder = CellPLM(config).eval().embedder
    embedder.loadings.normal_()
    rows, columns = np.nonzero(dense)
    counts = Counts(
        torch.tensor(dense[rows, columns]).float(),
        torch.tensor(columns),
        torch.tensor(np.searchsorted(rows, np.arange(26))),
        torch.tensor(dense.sum(1)).float(),
    )
    edges = [0, *sorted(cuts), 25]
    blocks = [take(counts, a, b) for a, b in itertools.pairwise(edges)]
    [whole], _ = drive(embedder, [counts], torch.arange(6))
    parts, _ = drive(embedder, blocks, torch.arange(6))
    factors = torch.cat([part.factors for part in parts])
    torch.testing.assert_close(factors, whole.factors, rtol=1e-4, atol=1e-5)
    hidden = torch.cat([part.hidden for part in parts])
    torch.testing.assert_close(hidden, whole.hidden, rtol=1e-4, atol=1e-4)
