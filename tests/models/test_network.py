from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cellplm_tl.models import CellPLM, CellPLMConfig, Counts
from cellplm_tl.models.network import count_parameters

TABLE_GENES = 19_374  # of 20230926_85M and 20231027_85M
TABLE_COVARIATES = (("batch", 12_596), ("dataset", 484))

# --- the release, from counts to the latent -------------------------------------------------------


def encode(network, counts, genes, **noise):
    with torch.no_grad():
        return network(counts, genes, **noise).posterior


def golden_input(arrays, to_counts, cells=slice(None)):
    genes = torch.tensor(arrays["gene_index"].astype(np.int64))
    return to_counts(arrays["counts"][cells].astype(np.float64)), genes


@pytest.mark.parametrize(
    ("layout", "latent"),
    [
        ("gmvae", "derived_latent_expected"),
        ("vae", "whole_latent"),
        ("ae", "whole_latent"),
    ],
)
def test_release_whole(layout, latent, golden, golden_network, to_counts, assert_close):
    arrays = golden(f"forward_{layout}")
    posterior = encode(golden_network(layout), *golden_input(arrays, to_counts))
    assert_close(posterior.mean, arrays[latent], atol=5e-6)


@pytest.mark.parametrize("layout", ["gmvae", "vae"])
def test_release_per_context(layout, golden, golden_network, to_counts, assert_close):
    arrays, network = golden(f"forward_{layout}"), golden_network(layout)
    for batch in np.unique(arrays["batch"]):
        cells = arrays["batch"] == batch
        noise = {}
        if layout == "gmvae":
            noise["uniform"] = torch.tensor(arrays["perbatch_gm_uniform"][cells])
        posterior = encode(network, *golden_input(arrays, to_counts, cells), **noise)
        assert_close(posterior.mean, arrays["perbatch_latent"][cells], atol=5e-6)


def test_release_with_its_noise(golden, golden_network, to_counts, assert_close):
    arrays, network = golden("forward_gmvae"), golden_network("gmvae")
    for draw in ("whole", "second_draw"):
        uniform = torch.tensor(arrays[f"{draw}_gm_uniform"])
        posterior = encode(network, *golden_input(arrays, to_counts), uniform=uniform)
        assert posterior.component.tolist() == arrays[f"{draw}_gm_y"].tolist()
        assert_close(posterior.mean, arrays[f"{draw}_latent"], atol=5e-6)


@pytest.mark.parametrize(
    ("name", "per_batch", "size"),
    [
        ("embed_per_batch", True, 100),
        ("embed_per_batch_chunks_of_10", True, 10),
        ("embed_no_batch_column", False, 100),
        ("embed_no_batch_column_chunks_of_10", False, 10),
    ],
)
def test_release_pipeline(name, per_batch, size, golden, golden_network, to_counts, assert_close):
    """What the official pipeline calls a batch size cuts contexts, in the order of the cells."""
    arrays, network = golden("pipeline"), golden_network("vae")
    batch = arrays["batch"] if per_batch else np.zeros(72)
    for value in np.unique(batch):
        cells = np.flatnonzero(batch == value)
        for start in range(0, len(cells), size):
            rows = cells[start : start + size]
            posterior = encode(network, *golden_input(arrays, to_counts, rows))
            assert_close(posterior.mean, arrays[name][rows], atol=5e-6)


def test_release_annotation(golden, golden_network, to_counts, assert_close):
    arrays, network = golden("forward_ae"), golden_network("ae")
    logits = network.head(encode(network, *golden_input(arrays, to_counts)).mean)
    assert_close(logits, arrays["whole_logits"], atol=5e-6)
    mask = torch.tensor(arrays["loss_mask"])
    assert logits.argmax(1)[mask].tolist() == arrays["whole_out_pred"].tolist()
    truth = torch.tensor(arrays["label"].astype(np.int64))
    loss = F.cross_entropy(logits[mask], truth[mask])
    assert loss.item() == pytest.approx(arrays["whole_out_loss"].item(), rel=1e-5)


# --- the published size ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent", "published"), [("mixture_release", 82_402_543), ("gaussian", 82_360_031)]
)
def test_parameters_of_the_published_configuration(latent, published):
    """Table 5 counts 82,402,543, of which the release never uses three tensors.

    82,360,031 is the same count for the layout of 20231027_85M, whose latent is a Gaussian.
    """
    with torch.device("meta"):
        network = CellPLM(
            CellPLMConfig(
                genes=tuple(map(str, range(TABLE_GENES))),
                positions="none",
                latent=latent,
                covariates=TABLE_COVARIATES,
            )
        )
    norm0 = 2 * 1024
    missing_pe = 1024
    sinusoid_table = 10_000 * 1024
    assert count_parameters(network) + norm0 + missing_pe + sinusoid_table == published
    assert count_parameters(network) == count_parameters(network, trainable=True)


def test_parameters_of_the_papers_configuration():
    """Appendix D in full: positions with their placeholder, q(y|z), one Gaussian per component."""
    with torch.device("meta"):
        network = CellPLM(
            CellPLMConfig(genes=tuple(map(str, range(TABLE_GENES))), covariates=TABLE_COVARIATES)
        )
    gaussian = 82_360_031 - 2 * 1024 - 1024 - 10_000 * 1024
    placeholder = 1024
    components = (512 * 16 + 16) + 2 * 16 * 512  # logits of q(y|z); means and variances of p(z|y)
    assert count_parameters(network) == gaussian + placeholder + components


def test_a_spectrum_is_counted_but_not_trained(make_network):
    network = make_network(
        n_genes=10,
        embedder="spectrum",
        factors=8,
        encoder="none",
        latent="none",
        hidden=8,
        latent_size=8,
        decoder="none",
    )
    buffers = {"loadings": 10 * 8, "eigenvalues": 8, "scale": 10, "pool_profile": 10}
    assert count_parameters(network) == sum(buffers.values())
    assert count_parameters(network, trainable=True) == 0


# --- every variant --------------------------------------------------------------------------------

EMBEDDERS = {
    "table": {},
    "spectrum": {"embedder": "spectrum", "factors": 8},
}
COVARIATES = {"covariates": (("batch", 3), ("site", 2))}


def variants():
    """Every combination of parts that a config allows, by name."""
    for embedder, encoder, latent, decoder in itertools.product(
        EMBEDDERS,
        ("flow", "mlp"),
        ("mixture", "mixture_release", "gaussian", "linear", "none"),
        ("negative_binomial", "gaussian", "profile", "none"),
    ):
        fields = {**EMBEDDERS[embedder], **COVARIATES}
        fields |= {"encoder": encoder, "latent": latent, "decoder": decoder}
        if latent == "none":
            fields |= {"hidden": 8, "heads": 2}
        if embedder == "table" and decoder == "profile":
            continue  # there is no spectrum to go along
        if embedder == "spectrum" and latent == "mixture_release":
            continue  # the released layout has a gene table
        yield pytest.param(fields, id=f"{embedder}-{encoder}-{latent}-{decoder}")


VARIANTS = list(variants())
N_CELLS = 14
GENES = torch.tensor([5, 30, 2, 8, 39, 0, 11, 12, 20])


@pytest.fixture
def context(random_counts, to_counts):
    """Fourteen cells, one of them without coordinates, as Counts and coordinates."""
    coordinates = torch.rand(N_CELLS, 2, generator=torch.Generator().manual_seed(3))
    coordinates[4] = float("nan")
    return to_counts(random_counts(N_CELLS, len(GENES))), coordinates


def loss_of_everything(network, counts, coordinates) -> torch.Tensor:
    """Sum up whatever the network says about a context, with noise where it takes any."""
    config, generator = network.config, torch.Generator().manual_seed(7)
    noise = {}
    if config.latent == "mixture_release":
        noise["uniform"] = torch.rand(N_CELLS, config.components, generator=generator)
    encoded = network(counts, GENES, coordinates, **noise)
    z = encoded.posterior.mean
    z = network.latent.sample(encoded.posterior, torch.randn(z.shape, generator=generator))
    loss = z.square().sum()
    for term in network.latent.terms(encoded.posterior, z).values():
        loss = loss + term.sum()
    if network.decoder is not None:
        levels = {"batch": torch.arange(N_CELLS) % 3, "site": torch.arange(N_CELLS) % 2}
        decoded = network.decode(z, GENES, levels, encoded.profile)
        loss = loss + decoded.mean.square().sum()
        if decoded.theta is not None:
            loss = loss + decoded.theta.sum()
    return loss


@pytest.mark.parametrize("fields", VARIANTS)
def test_gradients_are_finite_and_reach_every_parameter(fields, make_network, context):
    network = make_network(**fields).train()
    loss_of_everything(network, *context).backward()
    unseen = torch.ones(network.config.n_genes, dtype=torch.bool)
    unseen[GENES] = False
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
        if parameter.shape[0] == network.config.n_genes:  # genes that were not asked for
            assert parameter.grad[unseen].abs().sum() == 0, name


@pytest.mark.parametrize("fields", VARIANTS)
def test_evaluation_is_deterministic_and_training_is_not(fields, make_network, context):
    counts, coordinates = context
    network = make_network(**fields, dropout=0.3)
    first = encode(network, counts, GENES, coordinates=coordinates).mean
    assert torch.equal(first, encode(network, counts, GENES, coordinates=coordinates).mean)
    network.train()
    assert not torch.equal(first, encode(network, counts, GENES, coordinates=coordinates).mean)


HEADS = ["annotation", "denoising", "imputation", "perturbation", "patient_classification"]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_takes_the_place_of_the_decoder(head, make_network, context):
    network = make_network(head=head, head_outputs=3, decoder_layers=3)
    counts, coordinates = context
    z = network(counts, GENES, coordinates).posterior.mean
    out = network.head(z)
    assert network.decoder is None
    assert out.shape == (1 if head == "patient_classification" else N_CELLS, 3)
    out.square().sum().backward()
    for name, parameter in network.head.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# --- what a context is ----------------------------------------------------------------------------

SOME = [
    pytest.param({}, id="paper"),
    pytest.param({"latent": "mixture_release", "positions": "none"}, id="release"),
    pytest.param({**EMBEDDERS["spectrum"], "decoder": "profile"}, id="spectrum"),
    pytest.param(
        {**EMBEDDERS["spectrum"], "target_sum": "panel", "unit_length": True}, id="unit length"
    ),
    pytest.param({"encoder": "mlp", "norm": "layernorm", "latent": "linear"}, id="mlp"),
]


def of_rows(dense, coordinates, rows, to_counts):
    return to_counts(dense[rows]), coordinates[torch.as_tensor(rows)]


@pytest.mark.parametrize("fields", SOME)
def test_cells_in_another_order(fields, make_network, random_counts, to_counts, assert_close):
    network, dense = make_network(**fields), random_counts(N_CELLS, len(GENES))
    coordinates = torch.rand(N_CELLS, 2)
    order = np.random.default_rng(0).permutation(N_CELLS)
    counts, moved = of_rows(dense, coordinates, order, to_counts)
    expected = encode(network, to_counts(dense), GENES, coordinates=coordinates).mean
    assert_close(encode(network, counts, GENES, coordinates=moved).mean, expected[order], atol=1e-4)


@pytest.mark.parametrize("fields", SOME)
def test_genes_in_another_order(fields, make_network, random_counts, to_counts, assert_close):
    network, dense = make_network(**fields), random_counts(N_CELLS, len(GENES))
    order = np.random.default_rng(0).permutation(len(GENES))
    expected = encode(network, to_counts(dense), GENES).mean
    assert_close(
        encode(network, to_counts(dense[:, order]), GENES[order]).mean, expected, atol=1e-4
    )


@pytest.mark.parametrize("fields", SOME)
def test_a_repeated_context_gives_the_same(
    fields, make_network, random_counts, to_counts, assert_close
):
    network, dense = make_network(**fields), random_counts(N_CELLS, len(GENES))
    coordinates = torch.rand(N_CELLS, 2)
    rows = np.tile(np.arange(N_CELLS), 3)
    counts, repeated = of_rows(dense, coordinates, rows, to_counts)
    expected = encode(network, to_counts(dense), GENES, coordinates=coordinates).mean
    actual = encode(network, counts, GENES, coordinates=repeated).mean
    assert_close(actual, expected[rows], atol=1e-4)


def test_coordinates_matter_to_models_with_positions_alone(make_network, context):
    counts, coordinates = context
    with_positions, without = make_network(), make_network(positions="none")
    a = encode(with_positions, counts, GENES, coordinates=coordinates).mean
    assert (a - encode(with_positions, counts, GENES).mean).abs().max() > 0.01
    b = encode(without, counts, GENES, coordinates=coordinates).mean
    assert torch.equal(b, encode(without, counts, GENES).mean)
    # Equation (8) has x and y in different channels.
    swapped = encode(with_positions, counts, GENES, coordinates=coordinates.flip(1)).mean
    assert (a - swapped).abs().max() > 0.01


@pytest.mark.parametrize("fields", SOME)
def test_few_and_empty_cells(fields, make_network, to_counts):
    network = make_network(**fields)
    for dense in (np.ones((1, 9)), np.zeros((1, 9)), np.zeros((3, 9)), np.zeros((0, 9))):
        mean = encode(network, to_counts(dense), GENES).mean
        assert mean.shape == (len(dense), 8)
        assert mean.isfinite().all()


def by_blocks(network, blocks: list[Counts], genes: torch.Tensor) -> torch.Tensor:
    """Encode a context that is cut into blocks, as inference does: sums in float64."""

    def rounds(part, begun, *between):
        context: tuple[torch.Tensor, ...] = ()
        for number in range(part.n_rounds):
            sums = [part.sums(number, block, *(between or (context,))) for block in begun]
            totals = (sum(t.double() for t in one).float() for one in zip(*sums, strict=True))
            context = (*context, *totals)
        return context

    panel = network.embedder.panel(genes)
    begun = [network.embedder.begin(counts, panel) for counts in blocks]
    context = rounds(network.embedder, begun, panel)
    embedded = [network.embedder.finish(block, panel, context, None) for block in begun]
    u = [e.hidden for e in embedded]
    for layer in network.encoder:
        begun = [layer.begin(block) for block in u]
        context = rounds(layer, begun)
        u = [layer.finish(block, context) for block in begun]
    pairs = zip(u, embedded, strict=True)
    return torch.cat([network.to_latent(hidden, e.factors).mean for hidden, e in pairs])


@settings(max_examples=15)
@given(
    cuts=st.lists(st.integers(0, 30), max_size=5),
    fields=st.sampled_from([value.values[0] for value in SOME]),
)
def test_blocks_do_not_matter(cuts, fields):
    rng = np.random.default_rng(0)
    values = torch.tensor(1.0 + rng.poisson(3.0, 30 * 4), dtype=torch.float32)
    columns = torch.tensor([c for _ in range(30) for c in rng.permutation(9)[:4]])
    whole = Counts(values, columns, torch.arange(31) * 4, values.view(30, 4).sum(1))
    torch.manual_seed(0)
    small = {"hidden": 16, "heads": 4, "latent_size": 8, "decoder_hidden": 12}
    config = CellPLMConfig(genes=tuple(map(str, range(40))), **{**small, **fields})
    network = CellPLM(config).eval()
    for buffer in network.embedder.buffers():
        if buffer.ndim == 2:
            buffer.normal_(std=0.3)
    edges = [0, *sorted(cuts), 30]
    blocks = [
        Counts(
            values[4 * a : 4 * b],
            columns[4 * a : 4 * b],
            torch.arange(b - a + 1) * 4,
            whole.library_size[a:b],
        )
        for a, b in itertools.pairwise(edges)
    ]
    with torch.no_grad():
        actual = by_blocks(network, blocks, GENES)
        expected = network(whole, GENES).posterior.mean
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- before training ------------------------------------------------------------------------------


def fresh(**fields) -> CellPLM:
    small = {"hidden": 16, "heads": 4, "latent_size": 8, "decoder_hidden": 64, "decoder": "none"}
    torch.manual_seed(0)
    return CellPLM(CellPLMConfig(genes=tuple(map(str, range(40))), **{**small, **fields})).eval()


def test_initial_covariate_tables():
    network = fresh(decoder="gaussian", covariates=(("batch", 500),))
    table = network.decoder.trunk.layers[0].covariates["batch"].table.weight
    assert table.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("unit_length", [False, True])
@pytest.mark.parametrize("latent", ["mixture", "gaussian", "linear"])
def test_a_spectrum_starts_from_its_factors(latent, unit_length, context, assert_close):
    """The latent is zero plus the factors at unit variance, whatever encoder is in between."""
    fields = EMBEDDERS["spectrum"] | {"latent": latent, "unit_length": unit_length}
    network = fresh(**fields, decoder="profile")
    network.embedder.loadings.normal_()
    network.embedder.eigenvalues.copy_(torch.linspace(4, 1, 8))
    with torch.no_grad():
        encoded = network(context[0], GENES)
    expected = encoded.factors / torch.linspace(4, 1, 8).sqrt()
    assert_close(encoded.posterior.mean, expected)
    assert expected.abs().max() > 0.1
    for name in ("weight", "bias"):
        assert (getattr(network.decoder.correction, name) == 0).all()


def test_a_gene_table_starts_from_a_drawn_latent(context):
    network = fresh(latent="linear")
    assert network.latent.linear.weight.abs().sum() > 0


def test_the_factors_alone(context, assert_close):
    """Without an encoder, the latent is the factors at unit variance, counted once."""
    network = fresh(
        embedder="spectrum", factors=8, encoder="none", latent="none", hidden=8, latent_size=8
    )
    network.embedder.loadings.normal_()
    network.embedder.eigenvalues.copy_(torch.linspace(4, 1, 8))
    with torch.no_grad():
        encoded = network(context[0], GENES)
    expected = encoded.factors / torch.linspace(4, 1, 8).sqrt()
    assert_close(encoded.posterior.mean, expected)
    assert encoded.factors.abs().max() > 0.1
