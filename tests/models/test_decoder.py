from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cellplm_tl.models import CellPLMConfig
from cellplm_tl.models.decoder import DECODERS, Background, Head, PatientHead, _bounded_exp

COVARIATES = [
    ("gmvae", ""),
    ("gmvae", "batch"),
    ("gmvae", "dataset"),
    ("gmvae", "batch_dataset"),
    ("vae", ""),
    ("vae", "batch"),
    ("vae", "batch_dataset_platform"),
]
N_CELLS = 12  # that the golden files have decoded
ALL_GENES = torch.arange(150)


def named_covariates(arrays, names: str) -> dict[str, torch.Tensor]:
    cells = {name: arrays[name][:N_CELLS].astype(np.int64) for name in names.split("_") if name}
    return {name: torch.tensor(levels) for name, levels in cells.items()}


# --- the released decoder -------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "names"), COVARIATES)
def test_release_mean(layout, names, golden, golden_network, assert_close):
    arrays, network = golden(f"forward_{layout}"), golden_network(layout)
    z = torch.tensor(arrays["whole_latent"][:N_CELLS])
    decoded = network.decode(z, ALL_GENES, named_covariates(arrays, names))
    assert_close(decoded.mean, arrays[f"whole_mean_{names or 'none'}"], rtol=5e-6, atol=0)
    assert_close(decoded.theta, arrays["disp"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("layout", "names"), COVARIATES)
def test_release_imputation(layout, names, golden, golden_network, assert_close):
    """The mean of the data's genes, in their order, at the size of the cell."""
    arrays, network = golden(f"forward_{layout}"), golden_network(layout)
    z = torch.tensor(arrays["whole_latent"][:N_CELLS])
    genes = torch.tensor(arrays["gene_index"].astype(np.int64))
    decoded = network.decode(z, genes, named_covariates(arrays, names))
    library_size = arrays["counts"][:N_CELLS].sum(1, keepdims=True)
    imputed = decoded.mean * torch.tensor(library_size) / decoded.mean.sum(1, keepdim=True)
    assert_close(imputed, arrays[f"whole_imputed_{names or 'none'}"], rtol=5e-6, atol=0)


@pytest.mark.parametrize("layout", ["gmvae", "vae"])
def test_release_mean_per_context(layout, golden, golden_network, assert_close):
    arrays, network = golden(f"forward_{layout}"), golden_network(layout)
    z = torch.tensor(arrays["perbatch_latent"][:N_CELLS])
    decoded = network.decode(z, ALL_GENES, named_covariates(arrays, "batch"))
    assert_close(decoded.mean, arrays["perbatch_out_mean"], rtol=5e-6, atol=0)


def test_the_bounds_of_the_release_act_in_these_tests(golden):
    mean, disp = golden("forward_gmvae")["whole_mean_none"], golden("forward_gmvae")["disp"]
    assert mean.min() == np.float32(1e-5)
    assert (disp.min(), disp.max()) == (np.float32(1e-4), np.float32(1e4))


@pytest.mark.parametrize(("what", "bounds"), [("mean", (1e-5, 1e6)), ("disp", (1e-4, 1e4))])
def test_activation_has_the_releases_values_and_gradients_everywhere(
    what, bounds, golden, assert_close
):
    """Where the release has gradient 0 (outside the bounds) or NaN (overflow), ours goes on."""
    arrays = golden("activations")
    x = torch.tensor(arrays["x"], requires_grad=True)
    value = _bounded_exp(x, bounds)
    assert_close(value, arrays[f"{what}_out"], rtol=1e-6, atol=0)
    value.sum().backward()
    inside = arrays[f"{what}_grad"] > 0
    assert_close(x.grad[torch.tensor(inside)], arrays[f"{what}_grad"][inside], rtol=1e-6, atol=0)
    assert np.isnan(arrays[f"{what}_grad"]).any()
    assert x.grad.isfinite().all()
    assert (x.grad > 0).all()


# --- each decoder against its formula -------------------------------------------------------------

SMALL = {
    "hidden": 16,
    "heads": 4,
    "latent_size": 6,
    "decoder_hidden": 12,
    "dropout": 0.0,
    "genes": tuple("abcdefghij"),
    "covariates": (("batch", 3), ("site", 2)),
}


def random_decoder(kind: str, **fields):
    """Make a float64 decoder whose every weight is random."""
    torch.manual_seed(0)
    decoder = DECODERS[kind](CellPLMConfig(**{**SMALL, "decoder": kind, **fields})).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder.eval()


def norm(x, groups, weight, bias):
    parts = x.reshape(len(x), groups, -1)
    centred = parts - parts.mean(2, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-5)
    return scaled.reshape(x.shape) * weight + bias


def prelu(x, slope):
    return np.where(x > 0, x, slope * x)


def trunk(state, z, levels: dict, n_layers: int, groups: int):
    """Hidden layers with covariates; a covariate without levels gives the sum of its table."""
    for i in range(n_layers):
        layer = f"trunk.layers.{i}"
        z = prelu(
            z @ state[f"{layer}.linear.weight"].T + state[f"{layer}.linear.bias"],
            state[f"{layer}.activation.weight"],
        )
        z = norm(z, groups, state[f"{layer}.norm.weight"], state[f"{layer}.norm.bias"])
        for name in ("batch", "site"):
            table = state[f"{layer}.covariates.{name}.table.weight"]
            rows = table[levels[name]] if name in levels else table.sum(0, keepdims=True)
            rows = prelu(rows, state[f"{layer}.covariates.{name}.activation.weight"])
            weight = state[f"{layer}.covariates.{name}.norm.weight"]
            z = z + norm(rows, groups, weight, state[f"{layer}.covariates.{name}.norm.bias"])
    return z


@pytest.mark.parametrize("levels", [{}, {"site": [1, 0, 0, 1]}, {"batch": [2, 0, 1, 2]}])
@pytest.mark.parametrize(("decoder_layers", "norm_kind"), [(2, "groupnorm"), (3, "layernorm")])
@pytest.mark.parametrize("kind", ["negative_binomial", "gaussian"])
def test_decoder_against_numpy(kind, decoder_layers, norm_kind, levels, assert_close):
    decoder = random_decoder(kind, decoder_layers=decoder_layers, norm=norm_kind)
    state = {name: p.detach().numpy() for name, p in decoder.named_parameters()}
    z, genes = torch.randn(4, 6, dtype=torch.float64), [7, 0, 3]
    groups = 4 if norm_kind == "groupnorm" else 1
    t = trunk(state, z.numpy(), levels, decoder_layers - 1, groups)
    t = np.maximum(t @ state["bottleneck.weight"].T + state["bottleneck.bias"], 0)
    assert t.shape == (4, 128)
    expected = t @ state["genes.weight"][genes].T + state["genes.bias"][genes]

    covariates = {name: torch.tensor(level) for name, level in levels.items()}
    decoded = decoder(z, torch.tensor(genes), covariates)
    if kind == "gaussian":
        assert_close(decoded.mean, expected, rtol=1e-9)
        assert decoded.theta is None
    else:
        assert_close(decoded.mean, np.clip(np.exp(expected), 1e-5, 1e6), rtol=1e-9)
        assert_close(decoded.theta, np.exp(state["log_theta"][genes]), rtol=1e-9)


def random_background(n_genes: int, factors: int) -> Background:
    profile = torch.rand(n_genes, dtype=torch.float64)
    profile[0] = 0  # a gene that the context does not show
    profile = profile / profile.sum()
    loadings = 0.3 * torch.randn(n_genes, factors, dtype=torch.float64)
    return Background(profile, loadings, torch.linspace(3, 0.5, factors, dtype=torch.float64))


def test_profile_decoder_against_numpy(assert_close):
    decoder = random_decoder("profile", embedder="spectrum", factors=6)
    state = {name: p.detach().numpy() for name, p in decoder.named_parameters()}
    z, genes, background = (
        torch.randn(4, 6, dtype=torch.float64),
        [7, 0, 3],
        random_background(3, 6),
    )
    profile, loadings, eigenvalues = (t.numpy() for t in background)
    hidden = trunk(state, z.numpy(), {"batch": [2, 0, 1, 2]}, 1, 4)
    f = state["gain"] * np.sqrt(eigenvalues) * z.numpy()
    f = f + hidden @ state["correction.weight"].T + state["correction.bias"]
    change = f @ loadings.T + state["bias"][genes]
    expected = np.maximum(profile, 1e-7) * np.exp(change)

    covariates = {"batch": torch.tensor([2, 0, 1, 2])}
    decoded = decoder(z, torch.tensor(genes), covariates, background)
    assert_close(decoded.mean, expected, rtol=1e-9, atol=0)
    assert_close(decoded.theta, np.exp(state["log_theta"][genes]), rtol=1e-9)


def test_features_go_beyond_the_spectrum(assert_close):
    """The change gets u_g . relu(A [z of length sqrt(latent), trunk(z)]), whatever z's length."""
    fields = {"embedder": "spectrum", "factors": 6, "covariates": ()}
    decoder = random_decoder("profile", decoder_features=5, **fields)
    state = {name: p.detach().numpy() for name, p in decoder.named_parameters()}
    z, genes = torch.randn(4, 6, dtype=torch.float64), [7, 0, 3]
    background = random_background(3, 6)
    profile, loadings, eigenvalues = (t.numpy() for t in background)
    cells = z.numpy()
    hidden = prelu(
        cells @ state["trunk.layers.0.linear.weight"].T + state["trunk.layers.0.linear.bias"],
        state["trunk.layers.0.activation.weight"],
    )
    layer = "trunk.layers.0.norm"
    hidden = norm(hidden, 4, state[f"{layer}.weight"], state[f"{layer}.bias"])
    f = state["gain"] * np.sqrt(eigenvalues) * cells
    f = f + hidden @ state["correction.weight"].T + state["correction.bias"]
    direction = cells * np.sqrt(6) / np.linalg.norm(cells, axis=1, keepdims=True)
    a = np.concatenate([direction, hidden], 1) @ state["features.weight"].T
    a = np.maximum(a + state["features.bias"], 0)
    change = f @ loadings.T + state["bias"][genes] + a @ state["gene_features"][genes].T
    expected = np.maximum(profile, 1e-7) * np.exp(change)
    decoded = decoder(z, torch.tensor(genes), {}, background)
    assert (a > 0).any()
    assert_close(decoded.mean, expected, rtol=1e-9, atol=0)


def test_features_start_as_nothing():
    fields = {**SMALL, "decoder": "profile", "embedder": "spectrum", "factors": 6}
    torch.manual_seed(0)
    decoder = DECODERS["profile"](CellPLMConfig(**fields, decoder_features=5)).double().eval()
    without = DECODERS["profile"](CellPLMConfig(**fields)).double().eval()
    assert without.features is None
    without.load_state_dict(decoder.state_dict(), strict=False)
    z, background = torch.randn(4, 6, dtype=torch.float64), random_background(10, 6)
    found, expected = (d(z, torch.arange(10), {}, background).mean for d in (decoder, without))
    assert torch.equal(found, expected)
    found.sum().backward()
    assert decoder.gene_features.grad.abs().sum() > 0  # and learn from the first step on


def test_a_latent_of_0_has_features_too():
    decoder = random_decoder("profile", embedder="spectrum", factors=6, decoder_features=5)
    z = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    mean = decoder(z, torch.arange(10), {}, random_background(10, 6)).mean
    mean.sum().backward()
    assert mean.isfinite().all()
    assert z.grad.isfinite().all()


def test_before_training_the_profile_decoder_reads_the_latent_back(make_network, assert_close):
    """Without its correction it is the factor model: the profile, changed along the loadings."""
    network = make_network(embedder="spectrum", factors=8, decoder="profile", latent="linear")
    decoder = network.decoder
    with torch.no_grad():
        for zero in (decoder.correction.weight, decoder.correction.bias, decoder.bias):
            zero.zero_()
        decoder.gain.fill_(1.0)
    genes = torch.tensor([3, 30, 12, 5])
    profile, factors = torch.tensor([0.1, 0.3, 0.2, 0.4]), torch.randn(5, 8)
    z = network.embedder.unit_factors(factors)
    change = factors @ (network.embedder.loadings * network.embedder.scale[:, None])[genes].T
    decoded = network.decode(z, genes, profile=profile)
    assert_close(decoded.mean, profile * change.exp(), rtol=1e-4)


@pytest.mark.parametrize("kind", list(DECODERS))
def test_genes_are_decoded_alone(kind, assert_close):
    """Whatever other genes are asked for, in whatever order."""
    spectrum = {"embedder": "spectrum", "factors": 6} if kind == "profile" else {}
    decoder, z = random_decoder(kind, **spectrum), torch.randn(4, 6, dtype=torch.float64)
    background = random_background(10, 6)
    whole = decoder(z, torch.arange(10), {}, background)
    order = torch.tensor([9, 2, 5])
    part = Background(background.profile[order], background.loadings[order], background.eigenvalues)
    some = decoder(z, order, {}, part)
    assert_close(some.mean, whole.mean[:, order], rtol=1e-12)
    if whole.theta is not None:
        assert_close(some.theta, whole.theta[order], rtol=1e-12)


def test_only_named_levels_train_a_covariate_table():
    """Without levels the release sums all rows and detaches the sum."""
    decoder = random_decoder("negative_binomial")
    z = torch.randn(4, 6, dtype=torch.float64)
    decoded = decoder(z, torch.arange(10), {"batch": torch.tensor([1, 1, 2, 1])})
    decoded.mean.sum().backward()
    tables = decoder.trunk.layers[0].covariates
    assert (tables["batch"].table.weight.grad.abs().sum(1) > 0).tolist() == [False, True, True]
    assert tables["site"].table.weight.grad is None
    assert tables["site"].norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", list(DECODERS))
def test_gradients_reach_every_parameter(kind):
    spectrum = {"embedder": "spectrum", "factors": 6} if kind == "profile" else {}
    decoder = random_decoder(kind, decoder_layers=3, **spectrum)
    z = torch.randn(4, 6, dtype=torch.float64)
    levels = {"batch": torch.tensor([0, 1, 2, 0]), "site": torch.tensor([0, 1, 1, 0])}
    decoded = decoder(z, torch.arange(10), levels, random_background(10, 6))
    theta = 0 if decoded.theta is None else decoded.theta.sum()
    (decoded.mean.square().sum() + theta).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["negative_binomial", "profile"])
def test_extreme_latents_stay_finite(kind):
    spectrum = {"embedder": "spectrum", "factors": 6} if kind == "profile" else {}
    decoder = random_decoder(kind, **spectrum).float()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1e3)
    z = (1e4 * torch.randn(4, 6)).requires_grad_()
    background = Background(*(t.float() for t in random_background(10, 6)))
    mean = decoder(z, torch.arange(10), {}, background).mean
    mean.sum().backward()
    low, high = (1e-5, 1e6) if kind == "negative_binomial" else (1e-12, 1e3)
    assert mean.min().item() == pytest.approx(low)
    assert mean.max().item() == pytest.approx(high)
    assert z.grad.isfinite().all()


# --- heads ----------------------------------------------------------------------------------------


def make_head(arrays, prefix: str, kind: str) -> torch.nn.Module:
    """Build a head of ours with the weights of the release's."""
    weights = [arrays[name] for name in arrays if name.startswith(f"{prefix}_w_mlp")]
    n_layers = len(weights) // 2
    head = Head(
        CellPLMConfig(
            genes=("a",),
            latent_size=16,
            decoder_hidden=12,
            decoder_layers=n_layers,
            head=kind,
            head_outputs=weights[-1].shape[0],
        )
    )
    for layer, weight, bias in zip(head.layers, weights[::2], weights[1::2], strict=True):
        layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
    return head.eval()


def test_release_annotation_head(golden, assert_close):
    arrays = golden("heads")
    h, loss_mask = torch.tensor(arrays["h"]), torch.tensor(arrays["loss_mask"])
    truth = torch.tensor(arrays["class_label"].astype(np.int64))
    for prefix in ("annotation_1layers", "annotation_2layers"):
        logits = make_head(arrays, prefix, "annotation")(h)
        assert_close(logits, arrays[f"{prefix}_logits"], atol=1e-6)
        assert logits.argmax(1)[loss_mask].tolist() == arrays[f"{prefix}_pred"].tolist()
        loss = F.cross_entropy(logits[loss_mask], truth[loss_mask])
        assert loss.item() == pytest.approx(arrays[f"{prefix}_loss"].item(), rel=1e-6)


def test_release_denoising_head(golden, assert_close):
    arrays = golden("heads")
    pred = make_head(arrays, "denoising_2layers", "denoising")(torch.tensor(arrays["h"]))
    assert_close(pred, arrays["denoising_2layers_pred"], atol=1e-6)
    counts, mask = arrays["counts"].astype(np.float64), arrays["mask"]
    y = torch.tensor(np.log1p(1e4 * counts / counts.sum(1, keepdims=True)))
    m = torch.tensor(mask.astype(np.float64))
    loss = F.mse_loss(pred * m, y * m) + F.mse_loss(pred.double(), y)
    assert loss.item() == pytest.approx(arrays["denoising_2layers_loss"].item(), rel=1e-6)


def test_release_imputation_head(golden, assert_close):
    arrays = golden("heads")
    columns = arrays["gene_mask"].astype(np.int64)
    head = make_head(arrays, "imputation_3layers", "imputation")
    pred = head(torch.tensor(arrays["h"]))[:, columns]
    assert_close(pred, arrays["imputation_3layers_pred"], atol=1e-6)
    loss = F.mse_loss(pred, torch.tensor(arrays["target"][:, columns]))
    assert loss.item() == pytest.approx(arrays["imputation_3layers_loss"].item(), rel=1e-6)


def test_release_perturbation_head(golden, assert_close):
    arrays = golden("heads")
    name = "perturbation_prediction_2layers"
    mask = torch.tensor(arrays["mask"].astype(np.float32))
    pred = make_head(arrays, name, "perturbation")(torch.tensor(arrays["h"])) * mask
    assert_close(pred, arrays[f"{name}_pred"], atol=1e-6)
    loss = F.mse_loss(pred, torch.tensor(arrays["target"]) * mask)
    assert loss.item() == pytest.approx(arrays[f"{name}_loss"].item(), rel=1e-6)


def test_release_patient_head(golden):
    arrays = golden("heads")
    name = "patient_classification_1layers"
    weight = torch.tensor(arrays[f"{name}_w_output_layer.weight"])
    head = PatientHead(
        CellPLMConfig(
            genes=("a",), latent_size=16, head="patient_classification", head_outputs=len(weight)
        )
    )
    head.linear.weight.data = weight
    head.linear.bias.data = torch.tensor(arrays[f"{name}_w_output_layer.bias"])
    logits = head(torch.tensor(arrays["h"]))
    assert logits.shape == (1, 3)
    assert logits.argmax(1).tolist() == arrays[f"{name}_pred"].tolist()
    loss = F.cross_entropy(logits, torch.tensor([2]))
    assert loss.item() == pytest.approx(arrays[f"{name}_loss"].item(), rel=1e-6)


def test_dropout_comes_before_every_layer_of_a_head():
    config = CellPLMConfig(
        genes=("a",), latent_size=4, head="annotation", head_outputs=2, decoder_layers=1
    )
    head = Head(config)
    with torch.no_grad():
        head.layers[0].weight.fill_(1.0)
        head.layers[0].bias.zero_()
    torch.manual_seed(0)
    out = head.train()(torch.ones(4000, 4))[:, 0] * 0.8  # of four inputs, those kept
    assert sorted(set(out.round().tolist())) == [0, 1, 2, 3, 4]
    assert out.mean().item() == pytest.approx(4 * 0.8, rel=0.02)
