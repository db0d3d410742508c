from __future__ import annotations

import dataclasses
import json

import pytest

from cellplm_tl.models import CellPLMConfig

GENES = ("ENSG00000000003", "ENSG00000000419", "ENSG00000000457")


def test_defaults_are_the_papers_table_5():
    config = CellPLMConfig(genes=GENES)
    table_5 = {
        "hidden": 1024,
        "encoder_layers": 4,
        "latent_size": 512,
        "decoder_hidden": 1024,
        "decoder_layers": 2,
        "dropout": 0.2,
        "components": 16,
    }
    assert {name: getattr(config, name) for name in table_5} == table_5
    assert config.latent == "mixture"
    assert config.positions == "sinusoidal"


SPECTRUM = {"embedder": "spectrum", "factors": 8, "latent_size": 8}
UNIT = SPECTRUM | {"unit_length": True}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"embedder": "scalar"}, "embedder='scalar' is not one of 'table', 'spectrum'."),
        ({"positions": "learned"}, "positions='learned' is not one of"),
        ({"encoder": "performer"}, "encoder='performer' is not one of"),
        ({"norm": "batchnorm"}, "norm='batchnorm' is not one of"),
        ({"latent": "vae"}, "latent='vae' is not one of"),
        ({"decoder": "zinb"}, "decoder='zinb' is not one of"),
        ({"head": "embedder"}, "head='embedder' is not one of"),
        ({"genes": ()}, "genes must be a non-empty tuple of distinct ids"),
        ({"genes": (*GENES, GENES[0])}, "genes must be a non-empty tuple of distinct ids"),
        ({"hidden": 20}, "hidden=20 is not a multiple of heads=8"),
        ({"hidden": 18, "heads": 2, "norm": "layernorm"}, "needs hidden % 4 == 0, not 18"),
        (
            {"hidden": 18, "heads": 2, "positions": "none"},
            "norm='groupnorm' needs hidden=18 to be a multiple of 4",
        ),
        ({"decoder_hidden": 18}, "norm='groupnorm' needs decoder_hidden=18 to be a multiple of 4"),
        ({"embedder": "spectrum"}, "factors must be positive"),
        ({"factors": 8}, "factors must be positive with embedder='spectrum', and 0 without"),
        ({"decoder": "profile"}, "decoder='profile' needs embedder='spectrum'"),
        ({"target_sum": "cell"}, "target_sum='cell' is not one of 'library', 'panel'."),
        ({"target_sum": "panel"}, "target_sum='panel' and unit_length need embedder='spectrum'"),
        ({"unit_length": True}, "target_sum='panel' and unit_length need embedder='spectrum'"),
        ({"factor_share": 0.5}, "factor_share must be in [0, 1], and 0 without unit_length"),
        (SPECTRUM | {"factor_share": 0.5}, "and 0 without unit_length"),
        (UNIT | {"factor_share": 1.1}, "factor_share must be in [0, 1]"),
        (UNIT | {"factor_share": -0.1}, "factor_share must be in [0, 1]"),
        (UNIT | {"factor_share": float("nan")}, "factor_share must be in [0, 1]"),
        (SPECTRUM | {"latent_size": 4}, "latent_size must equal factors"),
        ({"decoder_features": 4}, "decoder_features must not be negative, and 0 but in 'profile'"),
        (
            SPECTRUM | {"decoder": "profile", "decoder_features": -1},
            "decoder_features must not be negative",
        ),
        (SPECTRUM | {"latent": "mixture_release"}, "has no latent='mixture_release'"),
        ({"encoder": "none"}, "encoder='none' needs embedder='spectrum'"),
        (SPECTRUM | {"encoder": "none", "latent": "none"}, "and hidden=factors"),
        (SPECTRUM | {"encoder": "none", "hidden": 8}, "encoder='none' needs"),
        ({"latent": "none"}, "with latent='none' latent_size must equal hidden"),
        ({"head": "annotation"}, "head_outputs must be positive with a head, and 0 without"),
        ({"residual_inputs": 3}, "residual_inputs needs embedder='spectrum' and head='types'"),
        ({"head_outputs": 3}, "head_outputs must be positive with a head, and 0 without"),
        ({"decoder_layers": 1}, "decoder_layers=1 is less than the 2 of a decoder"),
        (
            {"head": "annotation", "head_outputs": 3, "decoder_layers": 0},
            "decoder_layers=0 is less than the 1 of a head",
        ),
        ({"encoder_layers": -1}, "encoder_layers=-1 must not be negative"),
        ({"components": 0}, "components=0 must be positive"),
        ({"heads": 0}, "heads=0 must be positive"),
        ({"dropout": 1.0}, "dropout=1.0 must be in [0, 1)"),
        (SPECTRUM | {"noise": 0.0}, "noise=0.0 must be positive"),
        (
            {"covariates": (("batch", 0),)},
            "covariates need distinct names, and one level or more each",
        ),
        ({"covariates": (("batch", 2), ("batch", 3))}, "covariates need distinct names"),
    ],
)
def test_a_config_that_fits_no_network_is_refused(fields, sentence):
    with pytest.raises(ValueError) as error:
        CellPLMConfig(**{"genes": GENES, **fields})
    assert sentence in str(error.value)


def test_without_a_decoder_its_sizes_do_not_matter():
    fields = {"genes": GENES, "decoder_hidden": 18, "decoder_layers": 1}
    assert not CellPLMConfig(**fields, decoder="none").has_decoder
    assert not CellPLMConfig(**fields, head="annotation", head_outputs=2).has_decoder


def test_a_config_survives_json():
    config = CellPLMConfig(
        genes=GENES, covariates=(("batch", 5), ("dataset", 2)), hidden=64, norm="layernorm"
    )
    again = CellPLMConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize("factor_share", [0.0, 0.5, 1.0])
def test_options_of_a_spectrum_go_together(factor_share):
    fields = UNIT | {"target_sum": "panel", "factor_share": factor_share}
    config = CellPLMConfig(genes=GENES, **fields)
    assert {name: getattr(config, name) for name in fields} == fields
    assert CellPLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_of_before_has_none_of_them():
    """Models that were stored without these fields stay what they were."""
    stored = CellPLMConfig(genes=GENES, **SPECTRUM).to_dict()
    new = {name: stored.pop(name) for name in ("target_sum", "unit_length", "factor_share")}
    assert new == {"target_sum": "library", "unit_length": False, "factor_share": 0.0}
    assert CellPLMConfig.from_dict(stored) == CellPLMConfig(genes=GENES, **SPECTRUM)


def test_a_head_for_types_reads_the_residual_of_a_spectrum():
    fields = SPECTRUM | {"head": "types", "head_outputs": 3, "residual_inputs": 5}
    config = CellPLMConfig(genes=GENES, **fields)
    assert not config.has_decoder
    stored = json.loads(json.dumps(config.to_dict()))
    assert CellPLMConfig.from_dict(stored) == config
    del (
        stored["head"],
        stored["head_outputs"],
        stored["residual_inputs"],
    )  # as before there were any
    assert CellPLMConfig.from_dict(stored).residual_inputs == 0


def test_sequences_become_tuples():
    config = CellPLMConfig(genes=list(GENES), covariates=[["batch", 5]])
    assert config.genes == GENES
    assert config.covariates == (("batch", 5),)
    assert config.n_genes == 3


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="unknown fields in a CellPLM config: depth, width"):
        CellPLMConfig.from_dict({"genes": GENES, "width": 3, "depth": 2})


def test_a_config_cannot_be_changed():
    config = CellPLMConfig(genes=GENES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden = 3
