"""Fine-tuning of a denoiser: what changes, what does not, and what it never reads."""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch

from cellplm_tl._denoising import Denoiser
from cellplm_tl._errors import TrainingError
from cellplm_tl.train.denoising import fine_tune, held_out_loss, with_features
from cellplm_tl.train.fit import TrainConfig
from cellplm_tl.train.held_out import Part, divide

module = sys.modules["cellplm_tl.train.denoising"]
SHARES = (0.8, 0.1, 0.1)
CPU = torch.device("cpu")
SHORT = TrainConfig(strategy="head", steps=20, warmup=3, validate_every=10, average=0.5)


@pytest.fixture
def network(spectrum_network):
    return spectrum_network(decoder="profile", decoder_hidden=16, encoder_layers=1)


def state(network) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def tune(network, cells, config=SHORT):
    return fine_tune(network, cells, config, shares=SHARES, device=CPU)


def test_the_network_given_stays_and_the_loss_falls(network, spectrum_cells):
    cells, before = spectrum_cells(batch_key="sample"), state(network)
    needed_gradients = [p.requires_grad for p in network.parameters()]
    tuned, strategy, loss = tune(network, cells)
    assert not changed(before, network.state_dict())
    assert [p.requires_grad for p in network.parameters()] == needed_gradients
    assert strategy == "head"
    parts = divide(cells, SHARES, SHORT.seed)[:2]
    with torch.no_grad():
        first, last = (held_out_loss(n, *parts) for n in (network, tuned))
    assert last < first - 0.05
    assert loss == pytest.approx(last, rel=1e-5)
    assert not tuned.training


def test_head_changes_the_decoder_alone_and_full_all_but_the_spectrum(network, spectrum_cells):
    cells = spectrum_cells()
    start = state(with_features(network, SHORT.seed))
    head = changed(start, tune(network, cells)[0].state_dict())
    assert head
    assert {name.split(".")[0] for name in head} == {"decoder"}
    config = dataclasses.replace(SHORT, strategy="full")
    full = changed(start, tune(network, cells, config)[0].state_dict())
    assert {"encoder", "latent", "decoder"} <= {name.split(".")[0] for name in full}
    spectrum = {"loadings", "eigenvalues", "scale", "pool_profile"}
    assert not {f"embedder.{name}" for name in spectrum} & full


def test_auto_is_full(network, spectrum_cells):
    cells, found = spectrum_cells(slice(0, 80)), {}
    for strategy in ("auto", "full"):
        config = dataclasses.replace(SHORT, strategy=strategy, steps=4)
        tuned, taken, _ = tune(network, cells, config)
        assert taken == "full"
        found[strategy] = state(tuned)
    assert not changed(found["auto"], found["full"])


def test_counts_that_are_kept_to_judge_by_change_nothing(monkeypatch, network, spectrum_cells):
    """The third part of the counts is scrambled: the weights are the same to the bit."""
    cells = spectrum_cells(slice(0, 80))
    config = dataclasses.replace(SHORT, strategy="full", steps=6, validate_every=3)
    expected = state(tune(network, cells, config)[0])
    divided = Part._divide

    def without(number):
        def spoiled(self, counts, row):
            return divided(self, counts, row) * (7 if self.number == number else 1)

        return spoiled

    monkeypatch.setattr(Part, "_divide", without(2))
    assert not changed(expected, tune(network, cells, config)[0].state_dict())
    monkeypatch.setattr(Part, "_divide", without(0))
    assert changed(expected, tune(network, cells, config)[0].state_dict())


def test_the_cells_whole_counts_are_never_read(monkeypatch, network, spectrum_cells):
    """Training reads the first part, validation the second; nothing reads the third."""
    cells = spectrum_cells(slice(0, 60))
    read: list[int] = []
    counts = Part.counts

    def noted(self, rows):
        read.append(self.number)
        return counts(self, rows)

    monkeypatch.setattr(Part, "counts", noted)
    tune(network, cells, dataclasses.replace(SHORT, steps=4, validate_every=2))
    assert set(read) == {0, 1}
    assert read.count(1) == 3  # validations: after steps 2 and 4, and of the best at the end


def test_the_seed_decides(network, spectrum_cells):
    cells = spectrum_cells(slice(0, 60))
    config = dataclasses.replace(SHORT, steps=3)
    first, again = (state(tune(network, cells, config)[0]) for _ in range(2))
    assert not changed(first, again)
    other = state(tune(network, cells, dataclasses.replace(config, seed=1))[0])
    assert changed(first, other)


def test_a_loss_that_is_no_number_stops(monkeypatch, network, spectrum_cells):
    before = state(network)
    whole = module._loss
    monkeypatch.setattr(module, "_loss", lambda *a: whole(*a) * math.nan)
    with pytest.raises(TrainingError, match="became nan"):
        tune(network, spectrum_cells(slice(0, 60)))
    assert not changed(before, network.state_dict())


def test_new_features_start_as_nothing(network, spectrum_cells):
    wider = with_features(network, 0)
    assert wider.config.decoder_features == 32
    parts = divide(spectrum_cells(), SHARES, 0)[:2]
    with torch.no_grad():
        assert held_out_loss(wider.eval(), *parts) == pytest.approx(held_out_loss(network, *parts))
    assert not changed(network.state_dict(), wider.state_dict())


def test_features_that_are_there_stay(spectrum_network):
    network = spectrum_network(decoder="profile", decoder_hidden=16, decoder_features=8)
    copied = with_features(network, 0)
    assert copied is not network
    assert copied.config == network.config
    assert not changed(network.state_dict(), copied.state_dict())


def test_the_loss_is_that_of_where_counts_fall(network, spectrum_cells):
    """- sum of counts × log of the decoded share, over the counts."""
    cells = spectrum_cells(batch_key="sample")
    read, held_out, _ = divide(cells, SHARES, 0)
    denoiser = Denoiser(network, read, device=CPU, rng=np.random.default_rng(0))
    decoded = denoiser.fractions(np.arange(160))[0].double().numpy()
    block = held_out.counts(np.arange(160))
    of_entry = np.repeat(np.arange(160), np.diff(block.offsets))
    nats = -(block.values * np.log(decoded[of_entry, block.columns])).sum()
    with torch.no_grad():
        found = held_out_loss(network, read, held_out)
    assert found == pytest.approx(nats / block.values.sum(), rel=1e-4)


@pytest.mark.parametrize("n", [1, 3])
def test_few_cells(network, spectrum_cells, n):
    config = dataclasses.replace(SHORT, steps=2)
    tuned, _, loss = tune(network, spectrum_cells(slice(1, 1 + n)), config)
    assert all(tensor.isfinite().all() for tensor in tuned.state_dict().values())
    assert math.isfinite(loss)


def test_cells_without_counts_train_nothing_to_nan(network, spectrum_cells):
    config = dataclasses.replace(SHORT, steps=2)
    cells = spectrum_cells(slice(0, 30))
    object.__setattr__(cells, "contexts", (np.array([0]), np.arange(1, 30)))
    tuned, _, loss = tune(network, cells, config)
    assert all(tensor.isfinite().all() for tensor in tuned.state_dict().values())
    assert math.isfinite(loss)
