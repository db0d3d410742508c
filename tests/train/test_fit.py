"""The training loop: schedule, resume to the bit, best weights, errors."""

from __future__ import annotations

import math

import pytest
import torch

from cellplm_tl._errors import OptionError, TrainingError
from cellplm_tl._weights import read_state
from cellplm_tl.models import CellPLM, CellPLMConfig
from cellplm_tl.train.fit import TrainConfig, fit

GENES = tuple(f"G{i}" for i in range(12))


def small_network(seed: int = 0) -> CellPLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CellPLM(
            CellPLMConfig(
                genes=GENES, hidden=8, heads=2, encoder_layers=1, latent_size=4, decoder_hidden=8
            )
        )


def objective(network: CellPLM, step: int) -> dict[str, torch.Tensor]:
    """A loss with dropout and noise in it, so that a generator that is off by one draw shows."""
    hidden = torch.randn(20, 8)
    posterior = network.to_latent(
        network.encoder[0].finish(network.encoder[0].begin(hidden), _sums(network, hidden))
    )
    z = network.latent.sample(posterior, torch.randn_like(posterior.mean))
    return {"loss": z.square().mean() + 0.1 * network.latent.terms(posterior, z)["latent"].mean()}


def _sums(network: CellPLM, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    layer, context = network.encoder[0], ()
    block = layer.begin(hidden)
    for number in range(layer.n_rounds):
        context = context + layer.sums(number, block, context)
    return context


def weights(network: CellPLM) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def validate(network: CellPLM) -> float:
    return float(weights(network).square().sum())


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_a_run_that_was_cut_goes_on_to_the_same_weights(tmp_path, stop):
    config = TrainConfig(steps=9, warmup=2, save_every=1, validate_every=2, learning_rate=1e-2)
    whole = fit(small_network(), objective, config, validate=validate, folder=tmp_path / "whole")

    def interrupted(network, step):
        if step == stop:
            raise KeyboardInterrupt
        return objective(network, step)

    with pytest.raises(KeyboardInterrupt):
        fit(small_network(), interrupted, config, validate=validate, folder=tmp_path / "cut")
    again = fit(
        small_network(seed=5), objective, config, validate=validate, folder=tmp_path / "cut"
    )
    assert torch.equal(weights(again), weights(whole))
    assert (tmp_path / "cut/log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    config = TrainConfig(steps=3)
    first = weights(fit(small_network(), objective, config))
    second = weights(fit(small_network(), objective, config))
    other = weights(fit(small_network(), objective, TrainConfig(steps=3, seed=1)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_best_weights_are_kept():
    seen = []

    def worse_and_worse(network):
        seen.append(weights(network).clone())
        return float(len(seen) != 2)  # the second validation is the best

    config = TrainConfig(steps=6, validate_every=2, learning_rate=1e-2)
    network = fit(small_network(), objective, config, validate=worse_and_worse)
    assert torch.equal(weights(network), seen[1])


def test_patience_stops_a_run(tmp_path):
    config = TrainConfig(steps=100, validate_every=1, patience=3)
    fit(small_network(), objective, config, validate=lambda network: 1.0, folder=tmp_path)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 4  # one best, three stale
    assert (tmp_path / "log.csv").read_text().splitlines()[1].startswith("1,")


def test_a_loss_that_is_no_number_stops_and_leaves_the_last_state(tmp_path):
    config = TrainConfig(steps=9, save_every=2)

    def breaks(network, step):
        terms = objective(network, step)
        return {"loss": terms["loss"] * (math.nan if step == 5 else 1.0)}

    with pytest.raises(TrainingError, match=r"became nan at step 5 .*last good state is in"):
        fit(small_network(), breaks, config, folder=tmp_path)
    resumed = fit(small_network(), objective, config, folder=tmp_path)
    assert torch.equal(weights(resumed), weights(fit(small_network(), objective, config)))


@pytest.mark.parametrize("at", ["gradient", "validation"])
def test_a_gradient_or_validation_that_is_no_number_reaches_no_state(tmp_path, at):
    config = TrainConfig(steps=4, save_every=1, validate_every=1)

    class Breaks(torch.autograd.Function):
        """A finite value whose gradient is NaN."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    def breaks(network, step):
        loss = objective(network, step)["loss"]
        return {"loss": Breaks.apply(loss) if step == 2 and at == "gradient" else loss}

    validations = iter([1.0, 1.0, math.nan if at == "validation" else 1.0, 1.0])
    with pytest.raises(TrainingError, match=f"the {at}.* became nan"):
        fit(
            small_network(),
            breaks,
            config,
            validate=lambda network: next(validations),
            folder=tmp_path,
        )
    tensors, scalars = read_state(tmp_path / "state.safetensors")
    assert scalars["step"] == 2
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_state_of_another_network_is_refused(tmp_path):
    fit(small_network(), objective, TrainConfig(steps=1), folder=tmp_path)
    other = CellPLM(
        CellPLMConfig(
            genes=GENES, hidden=8, heads=2, encoder_layers=2, latent_size=4, decoder_hidden=8
        )
    )
    with pytest.raises(TrainingError, match="belongs to another network"):
        fit(other, objective, TrainConfig(steps=2), folder=tmp_path)


def test_schedule():
    config = TrainConfig(steps=110, warmup=10, learning_rate=1.0, final_rate=0.1)
    assert config.rate(0) == pytest.approx(0.1)
    assert config.rate(9) == pytest.approx(1.0)
    assert config.rate(60) == pytest.approx(0.55)
    assert config.rate(110) == pytest.approx(0.1)


OPEN = ("steps", "learning_rate", "weight_decay", "warmup", "average", "validate_every", "patience")


def test_what_is_left_open_is_for_the_tool_to_fill():
    config = TrainConfig(steps=7, average=0.0)
    assert [getattr(config, name) for name in OPEN] == [7, None, None, None, 0.0, None, None]
    values = dict.fromkeys(OPEN, 3)
    filled = config.filled(**values)
    assert [getattr(filled, name) for name in OPEN] == [7, 3, 3, 3, 0.0, 3, 3]
    assert filled.filled(**dict.fromkeys(OPEN, 9)) == filled
    assert config.learning_rate is None


def test_pretraining_fills_with_its_own():
    """Rate and decay are Table 5's."""
    table_5 = TrainConfig(
        steps=3,
        learning_rate=2e-4,
        weight_decay=1e-8,
        warmup=100,
        average=0.999,
        validate_every=200,
        patience=20,
    )
    left_open, written_out = (
        weights(fit(small_network(), objective, config))
        for config in (TrainConfig(steps=3), table_5)
    )
    assert torch.equal(left_open, written_out)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"average": 1.0}, r"average must lie in \[0, 1\)"),
        ({"strategy": "decoder"}, "strategy must be one of 'auto', 'head', 'full'; got 'decoder'"),
        ({"validation_share": 0.0}, r"validation_share must lie in \(0, 1\), not 0.0"),
        ({"validation_share": 1.0}, r"validation_share must lie in \(0, 1\), not 1.0"),
        ({"patience": 0}, "patience must be at least 1, not 0"),
        ({"precision": "fp8"}, "precision must be 'fp32' or 'bf16', not 'fp8'"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(OptionError, match=message):
        TrainConfig(**values)
