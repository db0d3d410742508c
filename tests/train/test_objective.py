"""The objective's parts, put together as the release puts them, give the release's losses.

Where ours differ on purpose the tests do what the release does: its bounds take the gradient away
(`release_bounds`), and its thresholds on the divergences are applied by hand.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import NegativeBinomial

from cellplm_tl import _weights
from cellplm_tl.models import CellPLM, Counts, decoder, latent
from cellplm_tl.models.decoder import Decoded
from cellplm_tl.train.objective import (
    explained_likelihood,
    negative_binomial_nll,
    reconstruction,
    scale_to_total,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
ALL_GENES = torch.arange(150)


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def to_counts(dense: np.ndarray) -> Counts:
    rows, columns = np.nonzero(dense)
    return Counts(
        torch.tensor(dense[rows, columns], dtype=torch.float32),
        torch.tensor(columns),
        torch.tensor(np.searchsorted(rows, np.arange(len(dense) + 1))),
        torch.tensor(dense.sum(1), dtype=torch.float32),
    )


def network_to_train(layout: str) -> CellPLM:
    """Load a golden network in training mode, without dropout."""
    network = _weights.load(GOLDEN / f"golden_{layout}").network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return network


@pytest.fixture
def release_bounds(monkeypatch):
    """Bound as the release does: no gradient where a value lies outside."""

    def clamp(x, low, high):
        return x.clamp(low, high)

    monkeypatch.setattr(decoder, "clamp_through", clamp)
    monkeypatch.setattr(latent, "clamp_through", clamp)


def assert_gradients(network: CellPLM, arrays, prefix: str) -> None:
    """Compare the norm of every gradient, and which parameters got one.

    The release gives a zero gradient, or none, to what has no influence; the two are the same here.
    """
    norms = zip(arrays[f"{prefix}_grad_names"], arrays[f"{prefix}_grad_norms"], strict=True)
    released = {str(name): torch.tensor(norm) for name, norm in norms}
    expected = {
        name: norm.item() for name, norm in _weights.rename_release(released).items() if norm > 0
    }
    found = {
        name: parameter.grad.double().norm().item()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        assert found[name] == pytest.approx(norm, rel=2e-5, abs=1e-9), name


def pretraining_input(arrays):
    """Counts (72, 150) in the order of the model's genes, and the 0/1 mask of hidden entries."""
    dense = np.zeros((72, 150))
    dense[:, arrays["gene_index"]] = arrays["counts"]
    mask = np.unpackbits(arrays["input_mask_packed"], axis=1)[:, :150].astype(np.float64)
    return dense, mask


def pretraining_losses(network, arrays, z) -> tuple[torch.Tensor, torch.Tensor]:
    """Both parts of the release's objective: all genes, and the hidden ones once more.

    Cells of which nothing was hidden take no part.
    """
    dense, mask = pretraining_input(arrays)
    target, weights = (torch.tensor(a, dtype=torch.float32) for a in (dense, mask))
    names = [name for name in ("batch", "dataset", "platform") if name in arrays]
    covariates = {name: torch.tensor(arrays[name].astype(np.int64)) for name in names}
    decoded = network.decode(z, ALL_GENES, covariates)
    rows = weights.any(1)
    assert (rows.sum(), weights[rows].mean().round(decimals=2)) == (54, 0.25)
    everything = reconstruction(decoded, target, torch.ones_like(target))
    hidden = reconstruction(decoded, target, weights)
    return everything[rows].mean(), hidden[rows].mean()


# --- whole steps of the release -------------------------------------------------------------------


@pytest.mark.usefixtures("release_bounds")
@pytest.mark.parametrize(("case", "threshold"), [("lamda5", 5.0), ("lamda0", 0.0)])
def test_release_pretraining_with_a_mixture(case, threshold):
    """At the released threshold of 5 both divergences are constants, without any gradient."""
    arrays, network = golden("loss_gmvae_pretrain"), network_to_train("gmvae")
    dense, mask = pretraining_input(arrays)
    uniform = torch.tensor(arrays["gm_uniform"])
    posterior = network(to_counts(dense * (1 - mask)), ALL_GENES, uniform=uniform).posterior
    z = network.latent.sample(posterior, torch.tensor(arrays["gm_normal"]))
    everything, hidden = pretraining_losses(network, arrays, z)
    terms = {name: term.mean() for name, term in network.latent.terms(posterior, z).items()}

    entropy = math.log(16) - terms["components"].item()
    assert terms["latent"].item() == pytest.approx(arrays[f"{case}_kl_gauss_raw"].item(), rel=1e-5)
    assert entropy == pytest.approx(arrays[f"{case}_entropy"].item(), rel=1e-5)
    assert everything.item() == pytest.approx(arrays[f"{case}_nb_all"].item(), rel=1e-5)
    assert hidden.item() == pytest.approx(arrays[f"{case}_nb_masked"].item(), rel=1e-5)

    divergence = sum(5.0 * term.clamp(min=threshold) for term in terms.values())
    loss = everything + hidden + divergence
    assert divergence.item() == pytest.approx(arrays[f"{case}_latent_loss"].item(), rel=1e-5)
    assert loss.item() == pytest.approx(arrays[f"{case}_loss"].item(), rel=1e-5)
    loss.backward()
    assert_gradients(network, arrays, case)
    assert (network.latent.prior_mean.weight.grad.abs().sum() > 0) == (case == "lamda0")


@pytest.mark.usefixtures("release_bounds")
@pytest.mark.parametrize("case", ["kl_below", "kl_above"])
def test_release_pretraining_with_a_gaussian(case):
    """Below 1 the weighted divergence counts nothing, above in full."""
    arrays, network = golden("loss_vae_pretrain"), network_to_train("vae")
    dense, mask = pretraining_input(arrays)
    posterior = network(to_counts(dense * (1 - mask)), ALL_GENES).posterior
    z = network.latent.sample(posterior, torch.tensor(arrays["vae_normal"]))
    np.testing.assert_allclose(z.detach(), arrays["latent_sample"], rtol=1e-5, atol=2e-5)
    everything, hidden = pretraining_losses(network, arrays, z)
    assert everything.item() == pytest.approx(arrays[f"{case}_nb_all"].item(), rel=1e-5)
    assert hidden.item() == pytest.approx(arrays[f"{case}_nb_masked"].item(), rel=1e-5)

    weight = arrays[f"{case}_kl_weight"].item()
    divergence = weight * network.latent.terms(posterior, z)["latent"].mean()
    if divergence < 1.0:
        divergence = 0.0 * divergence
    expected = arrays[f"{case}_latent_loss"].item()
    assert divergence.item() == pytest.approx(expected, rel=1e-5)
    assert (expected > 0) == (case == "kl_above")
    loss = everything + hidden + divergence
    assert loss.item() == pytest.approx(arrays[f"{case}_loss"].item(), rel=1e-5)
    loss.backward()
    assert_gradients(network, arrays, case)


def imputation_step(network: CellPLM, hide: bool):
    """Decode the cells of `loss_imputation`; gives its arrays, the true counts, the decoded."""
    arrays, forward = golden("loss_imputation"), golden("forward_vae")
    cells = arrays["cells"]
    dense = forward["counts"][cells].astype(np.float64)
    mask = np.unpackbits(arrays["input_mask_packed"], axis=1)[:, :120] if hide else 0
    genes = torch.tensor(forward["gene_index"].astype(np.int64))
    posterior = network(to_counts(dense * (1 - mask)), genes).posterior
    noise = torch.tensor(arrays["vae_normal"]) if network.training else None
    z = network.latent.sample(posterior, noise)
    decoded = network.decode(z, genes)
    return arrays, torch.tensor(dense, dtype=torch.float32), decoded


@pytest.mark.usefixtures("release_bounds")
def test_release_imputation_step():
    network = network_to_train("vae")
    arrays, target, decoded = imputation_step(network, hide=True)
    measured = torch.tensor(arrays["gene_measured"], dtype=torch.float32)
    predicted = scale_to_total(decoded.mean, target, measured)
    np.testing.assert_allclose(predicted.detach(), arrays["pred"], rtol=1e-5)
    loss = reconstruction(decoded, target, measured.expand_as(target)).mean()
    assert loss.item() == pytest.approx(arrays["train_loss"].item(), rel=1e-5)
    loss.backward()
    assert_gradients(network, arrays, "train")


@pytest.mark.parametrize("which", ["with", "without"])
def test_release_imputation_in_evaluation(which):
    """With the factor of each cell over the measured genes; or, its fault F4, over all of them."""
    network = network_to_train("vae").eval()
    arrays, target, decoded = imputation_step(network, hide=False)
    measured = torch.tensor(arrays["gene_measured"], dtype=torch.float32)
    weights = measured if which == "with" else torch.ones(120)
    predicted = scale_to_total(decoded.mean, target, weights)
    name = f"{which}_gene_mask"
    np.testing.assert_allclose(predicted.detach(), arrays[f"eval_pred_{name}"], rtol=1e-5)
    loss = reconstruction(decoded, target, weights.expand_as(target)).mean()
    assert loss.item() == pytest.approx(arrays[f"eval_loss_{name}"].item(), rel=1e-5)


def test_release_annotation_step():
    arrays, forward = golden("loss_annotation"), golden("forward_ae")
    network = network_to_train("ae")
    mask = np.unpackbits(arrays["input_mask_packed"], axis=1)[:, :120]
    genes = torch.tensor(forward["gene_index"].astype(np.int64))
    posterior = network(to_counts(forward["counts"] * (1.0 - mask)), genes).posterior
    seen = torch.tensor(arrays["loss_mask"])
    truth = torch.tensor(arrays["label"].astype(np.int64))
    loss = F.cross_entropy(network.head(posterior.mean)[seen], truth[seen])
    assert loss.item() == pytest.approx(arrays["train_loss"].item(), rel=1e-5)
    loss.backward()
    assert_gradients(network, arrays, "train")


def test_release_objectives_alone():
    arrays = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in golden("loss_objectives").items()
    }
    mean, theta, counts, mask = (arrays[name] for name in ("mean", "disp", "counts", "mask"))
    decoded, everywhere = Decoded(mean, theta), torch.ones_like(mask)
    everything = reconstruction(decoded, counts, everywhere)
    hidden = reconstruction(decoded, counts, mask)
    rows = mask.any(1)
    assert 0 < rows.sum() < len(rows)
    both = (everything + hidden)[rows].mean()
    assert both.item() == pytest.approx(arrays["nb_dae_train"].item(), rel=1e-6)
    assert everything[rows].mean().item() == pytest.approx(arrays["nb_eval"].item(), rel=1e-6)
    for name in ("imputation", "denoise"):
        assert everything.mean().item() == pytest.approx(arrays[name].item(), rel=1e-6)
        predicted = scale_to_total(mean, counts)
        np.testing.assert_allclose(predicted, arrays[f"{name}_pred"], rtol=1e-6)


# --- each part against its formula ----------------------------------------------------------------


def random_decoded(n_cells=7, n_genes=5):
    torch.manual_seed(0)
    mean = torch.rand(n_cells, n_genes, dtype=torch.float64) * 5 + 0.1
    theta = torch.rand(n_genes, dtype=torch.float64) * 3 + 0.2
    counts = torch.poisson(2 * torch.ones(n_cells, n_genes, dtype=torch.float64))
    weights = (torch.rand(n_cells, n_genes) < 0.6).double()
    return mean, theta, counts, weights


def test_negative_binomial_against_torch():
    mean, theta, counts, _ = random_decoded()
    reference = NegativeBinomial(theta, logits=mean.log() - theta.log())
    nll = negative_binomial_nll(counts, mean, theta)
    torch.testing.assert_close(nll, -reference.log_prob(counts), rtol=1e-7, atol=1e-7)


def test_negative_binomial_at_its_bounds():
    """Finite, with finite gradients, for every mean and dispersion that a decoder can give."""
    values = torch.tensor([1e-5, 1.0, 1e6])
    mean = values[:, None].clone().requires_grad_()
    theta = torch.tensor([1e-4, 1.0, 1e4], requires_grad=True)
    for count in (0.0, 1.0, 1e5):
        nll = negative_binomial_nll(torch.tensor(count), mean, theta)
        assert nll.isfinite().all()
        for gradient in torch.autograd.grad(nll.sum(), (mean, theta)):
            assert gradient.isfinite().all()


def test_scale_to_total():
    mean, _, counts, weights = random_decoded()
    scaled = scale_to_total(mean, counts)
    torch.testing.assert_close(scaled.sum(1), counts.sum(1))
    torch.testing.assert_close(scaled / scaled.sum(1, True), mean / mean.sum(1, True))
    scaled = scale_to_total(mean, counts, weights)
    torch.testing.assert_close((scaled * weights).sum(1), (counts * weights).sum(1))
    nothing = scale_to_total(mean, counts, torch.zeros_like(weights))
    assert nothing.isfinite().all()


def test_reconstruction_sees_hidden_entries_alone():
    mean, theta, counts, weights = random_decoded()
    loss = reconstruction(Decoded(mean, theta), counts, weights)
    for cell in range(len(counts)):
        at = weights[cell] > 0
        scaled = mean[cell, at] * counts[cell, at].sum() / mean[cell, at].sum()
        expected = negative_binomial_nll(counts[cell, at], scaled, theta[at]).sum()
        torch.testing.assert_close(loss[cell], expected, rtol=1e-7, atol=1e-7)
    elsewhere = torch.where(weights > 0, counts, 1000.0)
    torch.testing.assert_close(reconstruction(Decoded(mean, theta), elsewhere, weights), loss)


def test_reconstruction_of_the_gaussian():
    """Equation (9): half the squared distance to the lognorm expression, up to a constant."""
    mean, _, counts, weights = random_decoded()
    total = counts.sum(1) * 3
    lognorm = np.log1p(counts.numpy() / total.numpy()[:, None] * 1e4)
    expected = (0.5 * (mean.numpy() - lognorm) ** 2 * weights.numpy()).sum(1)
    loss = reconstruction(Decoded(mean, None), counts, weights, total)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)


def test_explained_likelihood():
    """0 for the context's profile at any depth, more for the truth, less for its opposite."""
    mean, theta, counts, weights = random_decoded()
    profile = counts.mean(0) / counts.sum(1).mean()

    def gain(prediction):
        return explained_likelihood(Decoded(prediction, theta), counts, weights, profile).item()

    depth = torch.arange(1.0, 8.0, dtype=torch.float64)[:, None]
    assert gain(profile * depth) == pytest.approx(0.0, abs=1e-12)
    assert gain(counts + 1e-9) > 0.1
    assert gain(1 / (counts + 0.1)) < 0
    # By hand: mean over the hidden counts of the log ratio of their shares.
    w = weights.numpy()
    p = mean.numpy() * w / (mean.numpy() * w).sum(1, keepdims=True)
    q = profile.numpy() * w / (profile.numpy() * w).sum(1, keepdims=True)
    hidden = counts.numpy() * w
    ratio = np.log(np.where(w > 0, p, 1) / np.where(w > 0, q, 1))
    assert gain(mean) == pytest.approx((hidden * ratio).sum() / hidden.sum(), rel=1e-10)
