"""The only file that opens weights: ours, the released layouts, and where they are looked for.

A model of this package is a directory: `model.safetensors` (tensors, float32 or float16),
`config.json` (architecture, genes, provenance, sha256) and `card.md`. Its identity is the sha256 of
the weights. A model may leave tensors to another model of the package (`"shared"` in its config),
so that a spectrum that two models use is stored once; saved elsewhere it is whole.

A released checkpoint is `<prefix>.best.ckpt` with `<prefix>.config.json`. It is read with
`weights_only=True`: no code runs from the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cellplm_tl._errors import ModelNotFoundError, WeightsError, check_option
from cellplm_tl._settings import logger, settings
from cellplm_tl.models import CellPLM, CellPLMConfig
from cellplm_tl.models.network import count_parameters

FORMAT = 1  # of our directory
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "card.md"
CONTEXT = "context.safetensors"  # only of models that keep a context
NO_CARD = "No card was written for this model; what is known of it stands in config.json.\n"
RELEASE_WEIGHTS, RELEASE_CONFIG = ".best.ckpt", ".config.json"
PACKAGED = Path(__file__).parent / "data" / "models"


@dataclass(frozen=True)
class Model:
    """A network with its identity.

    Parameters
    ----------
    network : CellPLM
        In evaluation mode, on the CPU, float32.
    name : str
        Name it was asked for by, or of its file.
    sha256 : str
        Of the weights file; empty for a network that was never stored.
    provenance : dict
        What its maker recorded: data, licences, steps, seed, source.
    card : str
        Text of its model card; empty where it has none.
    context : dict of str to Tensor
        Sums over a stored context, and the frame of the embedding found on it, which can stand in
        for those of the data; empty where the model keeps none.
    outputs : dict
        What the outputs of its head mean: plain values, such as the labels in their order. Empty
        for models without a head of this package.

    Examples
    --------
    >>> import cellplm_tl as cp
    >>> model = cp.models.load("linear_transfer")
    >>> model.config.embedder, len(model.genes) == model.config.n_genes
    ('spectrum', True)
    """

    network: CellPLM
    name: str
    sha256: str = ""
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)
    card: str = field(default="", repr=False)
    context: dict[str, Tensor] = field(default_factory=dict, repr=False)
    outputs: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> CellPLMConfig:
        """Sizes and parts of the network."""
        return self.network.config

    @property
    def genes(self) -> tuple[str, ...]:
        """Ensembl ids that the model knows, in the order of its tables."""
        return self.network.config.genes


@dataclass(frozen=True)
class Known:
    """A model that exists elsewhere: what to place where."""

    source: str
    licence: str
    parameters: int
    n_genes: int
    files: tuple[str, ...]
    urls: tuple[str, ...] = ()  # one per file, with
    sha256: tuple[str, ...] = ()  # its hash: both, or the file has to be fetched by hand


_RELEASE = "OmicsML/CellPLM, the folder of checkpoints that its README links"
KNOWN: dict[str, Known] = {
    "20230926_85M": Known(
        _RELEASE,
        "BSD-2-Clause",
        82_402_543,
        19_374,
        ("20230926_85M" + RELEASE_WEIGHTS, "20230926_85M" + RELEASE_CONFIG),
    ),
    "20231027_85M": Known(
        _RELEASE,
        "BSD-2-Clause",
        82_360_031,
        19_374,
        ("20231027_85M" + RELEASE_WEIGHTS, "20231027_85M" + RELEASE_CONFIG),
    ),
}


def load(name_or_path: str | os.PathLike[str]) -> Model:
    """Load a model by path or name, and check every tensor.

    Looked for in this order: a path (our directory, a `.best.ckpt` file, or the prefix of one); a
    model inside the package; a name under `settings.weights_dir`; a known model with an address and
    a hash, which is downloaded there.

    Parameters
    ----------
    name_or_path : str or path
        Such as `"mini"`, `"path/to/model"` or `"ckpt/20230926_85M.best.ckpt"`.

    Returns
    -------
    Model
        Network in evaluation mode on the CPU in float32, with name, sha256 and provenance.

    Raises
    ------
    ModelNotFoundError
        Nothing of that name or path; the message says what to place where.
    WeightsError
        A file is damaged, a tensor is missing, unexpected or of the wrong shape (all are named).

    See Also
    --------
    available : what there is.

    Notes
    -----
    The released positional encoding has no effect in the release's own code, so its tensors (and
    the unused `norm0`) are known to be unused and left out; every other tensor must be used. The
    released mixture draws its component at random even when it predicts; here its expectation is
    taken.

    Examples
    --------
    >>> import cellplm_tl as cp
    >>> cp.models.load("linear_transfer").config.factors
    300
    """
    for candidate in _candidates(name_or_path):
        if (candidate / CONFIG).is_file():
            return _load_directory(candidate)
        for checkpoint in (candidate, Path(f"{candidate}{RELEASE_WEIGHTS}")):
            if checkpoint.is_file() and checkpoint.name.endswith(".ckpt"):
                return _load_release(checkpoint)
    name = os.fspath(name_or_path)
    if name in KNOWN and KNOWN[name].urls:
        _download(KNOWN[name])
        return load(name)
    raise ModelNotFoundError(_not_found(name))


def save(
    model: Model | CellPLM,
    path: str | os.PathLike[str],
    *,
    provenance: dict[str, Any] | None = None,
    card: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Write a model as a directory: weights as safetensors, config as JSON, card as Markdown.

    The directory appears when it is complete (written aside, flushed to disk, renamed).

    Parameters
    ----------
    model : Model or CellPLM
        What to write.
    path : str or path
        The directory; its last part becomes the model's name.
    provenance : dict, optional
        Plain values on how the model was made; by default those that the model came with.
    card : str, optional
        Text of `card.md`; by default that of the card that the model came with.
    dtype : {"float32", "float16"}, default "float32"
        Of the stored matrices; vectors are always float32.
    overwrite : bool, default False
        Replace the three files in a directory that exists. Other files there are left alone.

    Returns
    -------
    pathlib.Path
        The directory.

    Raises
    ------
    OptionError
        `dtype` is neither of the two.
    FileExistsError
        The path exists, and `overwrite` is False.
    WeightsError
        A value is too large for float16.

    Examples
    --------
    >>> import tempfile, cellplm_tl as cp
    >>> model = cp.models.load("linear_transfer")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = cp.models.save(model, f"{folder}/copy", dtype="float16")
    ...     cp.models.load(path).name
    'copy'
    """
    check_option("dtype", dtype, ("float32", "float16"))
    path = Path(path)
    network = model.network if isinstance(model, Model) else model
    if provenance is None:
        provenance = model.provenance if isinstance(model, Model) else {}
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another path or pass overwrite=True.")
    if card is None and isinstance(model, Model):
        card = model.card
    context, outputs = (model.context, model.outputs) if isinstance(model, Model) else ({}, {})
    return write_directory(
        path,
        network,
        provenance,
        card or NO_CARD,
        dtype,
        shared=None,
        context=context,
        outputs=outputs,
    )


def available() -> pd.DataFrame:
    """List the models that can be loaded by name, and those that are known.

    Returns
    -------
    pandas.DataFrame
        One row per model, indexed by name: `parameters` (stored values), `genes`, `source`,
        `licence`, `sha256` (of the weights; empty where no file is here), `where` (`"package"`, a
        path, or what is to be done).

    Examples
    --------
    >>> import cellplm_tl as cp
    >>> cp.models.available().loc["linear_transfer", "where"]
    'package'
    """
    rows: dict[str, dict[str, Any]] = {}
    for folder, where in ((PACKAGED, "package"), (settings.weights_dir, None)):
        for path in sorted(Path(folder).glob(f"*/{CONFIG}")):
            try:
                config = _read_config(path)
            except WeightsError:
                continue  # not a model of ours; `load` says what is wrong with it
            rows.setdefault(path.parent.name, _row(config, where or str(path.parent)))
    for name, known in KNOWN.items():
        path = Path(settings.weights_dir) / known.files[0]
        here = path.is_file()
        rows[name] = {
            "parameters": known.parameters,
            "genes": known.n_genes,
            "source": known.source,
            "licence": known.licence,
            "sha256": _sha256(path) if here else "",
            "where": str(path) if here else f"place it under {settings.weights_dir}",
        }
    columns = ["parameters", "genes", "source", "licence", "sha256", "where"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("name")


def _row(config: dict[str, Any], where: str) -> dict[str, Any]:
    provenance = config.get("provenance", {})
    return {
        "parameters": config["parameters"],
        "genes": len(config["architecture"]["genes"]),
        "source": provenance.get("source", ""),
        "licence": provenance.get("licence", ""),
        "sha256": config["sha256"],
        "where": where,
    }


# --- our directory --------------------------------------------------------------------------------


def write_directory(
    path: Path,
    network: CellPLM,
    provenance: dict[str, Any],
    card: str,
    dtype: str,
    shared: dict[str, Any] | None,
    context: dict[str, Tensor] | None = None,
    outputs: dict[str, Any] | None = None,
) -> Path:
    """Write a model's files aside and move them into place.

    `shared` names the model of the package that holds some of the tensors, and those tensors.
    """
    left_out = set(shared["tensors"]) if shared else set()
    own = {name: t for name, t in network.state_dict().items() if name not in left_out}
    tensors, kept = _in_dtype(own, dtype), _in_dtype(context or {}, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        save_file(tensors, aside / WEIGHTS)
        hashes = {"sha256": _sha256(aside / WEIGHTS)}
        if kept:
            save_file(kept, aside / CONTEXT)
            hashes["context_sha256"] = _sha256(aside / CONTEXT)
        config = {
            "format": FORMAT,
            **hashes,
            "parameters": count_parameters(network),
            "shared": shared,
            "provenance": provenance,
            **({"outputs": outputs} if outputs else {}),
            "architecture": network.config.to_dict(),
        }
        (aside / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        (aside / CARD).write_text(card)
        for file in aside.iterdir():
            file.chmod(0o644)
            _flush(file)
        if path.exists():
            for file in sorted(aside.iterdir(), key=lambda f: f.name == CONFIG):
                os.replace(file, path / file.name)
        else:
            aside.chmod(0o755)
            os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def _in_dtype(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Return tensors as they are stored: matrices in `dtype`, vectors and numbers as float32."""
    stored, lost = {}, []
    for name, tensor in tensors.items():
        is_half = dtype == "float16" and tensor.ndim > 1
        stored[name] = tensor.detach().to("cpu", torch.float16 if is_half else torch.float32)
        stored[name] = stored[name].contiguous()
        if not torch.equal(tensor.isfinite().cpu(), stored[name].isfinite()):
            lost.append(name)
    if lost:
        raise WeightsError(f"{', '.join(lost)}: values too large for {dtype}. Save as float32.")
    return stored


def _load_directory(path: Path) -> Model:
    config = _read_config(path / CONFIG)
    tensors = _checked(path / WEIGHTS, config["sha256"])
    context = {}
    if "context_sha256" in config:
        stored = _checked(path / CONTEXT, config["context_sha256"])
        context = {name: tensor.float() for name, tensor in stored.items()}
    if config["shared"]:
        tensors |= _shared_tensors(config["shared"], path)
    network = _build(partial(CellPLMConfig.from_dict, config["architecture"]), path)
    _fill(network, tensors, path / WEIGHTS)
    card = (path / CARD).read_text() if (path / CARD).is_file() else ""
    name = path.resolve().name
    identity = config["sha256"], config["provenance"]
    return Model(network.eval(), name, *identity, card, context, config.get("outputs", {}))


def _checked(file: Path, expected: str) -> dict[str, Tensor]:
    """Read a safetensors file whose sha256 its config states."""
    if not file.is_file():
        raise ModelNotFoundError(f"{file.parent} has a {CONFIG} but no {file.name}.")
    sha256 = _sha256(file)
    if sha256 != expected:
        raise WeightsError(
            f"{file} has sha256 {sha256[:12]}…, its config says {expected[:12]}…: "
            "the file is damaged or belongs to another config. Copy both files again."
        )
    return dict(_tensors(file))


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if config.get("format") != FORMAT:
        raise WeightsError(
            f"{path} has format {config.get('format')!r}; this version reads {FORMAT}."
        )
    expected = ("sha256", "parameters", "shared", "provenance", "architecture")
    missing = [key for key in expected if key not in config]
    if not missing and "genes" not in config["architecture"]:
        missing = ["architecture.genes"]
    if missing:
        raise WeightsError(f"{path} is not whole: it lacks {', '.join(missing)}.")
    return config


def _shared_tensors(shared: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Read the tensors that a model of the package keeps in another one."""
    weights = PACKAGED / shared["model"] / WEIGHTS
    if not weights.is_file() or _sha256(weights) != shared["sha256"]:
        raise WeightsError(
            f"{path} shares tensors with the model {shared['model']!r} of another version of this "
            "package. Install that version, load the model there and save it: what is saved is "
            "whole."
        )
    return {name: tensor for name, tensor in _tensors(weights) if name in shared["tensors"]}


def _tensors(weights: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(weights, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{weights} is not a readable safetensors file: {error}") from error
    except Exception as error:  # safetensors raises a class of its own, outside this hierarchy
        if type(error).__name__ != "SafetensorError":
            raise
        raise WeightsError(f"{weights} is not a readable safetensors file: {error}") from error


def write_state(path: Path, tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
    """Write the state of a run aside, flush it, and move it into place."""
    aside = path.with_name(f".{path.name}")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, aside, {"scalars": json.dumps(scalars)})
    _flush(aside)
    os.replace(aside, path)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read what :func:`write_state` wrote."""
    tensors = dict(_tensors(path))
    with safe_open(path, framework="pt") as file:
        return tensors, json.loads(file.metadata()["scalars"])


# --- the official release -------------------------------------------------------------------------

# Name in the release → name here. Linear, norm and embedding tensors end in .weight or .bias.
RELEASE_NAMES: tuple[tuple[str, str], ...] = (
    (r"embedder\.feat_enc\.emb", r"embedder.table"),
    (r"embedder\.extra_linear\.0\.(\w+)", r"embedder.mixing.linear.\1"),
    (r"embedder\.extra_linear\.3\.(\w+)", r"embedder.mixing.norm.\1"),
    (
        r"encoder\.layers\.(\d+)\.self_attn\.(query|key|value|out)_projection\.(\w+)",
        r"encoder.\1.attention.\2.\3",
    ),
    (r"encoder\.layers\.(\d+)\._ff_block\.0\.(\w+)", r"encoder.\1.widen.\2"),
    (r"encoder\.layers\.(\d+)\._ff_block\.3\.(\w+)", r"encoder.\1.narrow.\2"),
    (r"encoder\.layers\.(\d+)\.(norm1|norm2)\.(\w+)", r"encoder.\1.\2.\3"),
    (r"pre_latent_norm\.norm\.(\w+)", r"pre_latent_norm.\1"),
    (r"latent\.layers\.1\.inference\.inference_qyx\.0\.logits\.(\w+)", r"latent.logits.\1"),
    (r"latent\.layers\.1\.inference\.inference_qzyx\.0\.(\w+)", r"latent.join.\1"),
    (r"latent\.layers\.1\.inference\.inference_qzyx\.2\.mu\.(\w+)", r"latent.mean.\1"),
    (r"latent\.layers\.1\.inference\.inference_qzyx\.2\.var\.(\w+)", r"latent.variance.\1"),
    (r"latent\.layers\.1\.inference\.y_mu\.(\w+)", r"latent.prior_mean.\1"),
    (r"latent\.layers\.1\.inference\.y_var\.(\w+)", r"latent.prior_variance.\1"),
    (r"latent\.layers\.1\.hid_2mu\.(\w+)", r"latent.mean.\1"),
    (r"latent\.layers\.1\.hid_2sigma\.(\w+)", r"latent.log_variance.\1"),
    (r"latent\.layers\.1\.lat_2lat\.0\.(\w+)", r"latent.linear.\1"),
    (r"decoder\.layers\.(\d+)\.0\.(\w+)", r"decoder.trunk.layers.\1.linear.\2"),
    (r"decoder\.layers\.(\d+)\.1\.weight", r"decoder.trunk.layers.\1.activation.weight"),
    (r"decoder\.layers\.(\d+)\.3\.(\w+)", r"decoder.trunk.layers.\1.norm.\2"),
    (
        r"decoder\.covariate_layers\.(\d+)\.(\w+)\.0\.weight",
        r"decoder.trunk.layers.\1.covariates.\2.table.weight",
    ),
    (
        r"decoder\.covariate_layers\.(\d+)\.(\w+)\.1\.weight",
        r"decoder.trunk.layers.\1.covariates.\2.activation.weight",
    ),
    (
        r"decoder\.covariate_layers\.(\d+)\.(\w+)\.2\.(\w+)",
        r"decoder.trunk.layers.\1.covariates.\2.norm.\3",
    ),
    (r"decoder\.out_layer\.dec_1\.(\w+)", r"decoder.bottleneck.\1"),
    (r"decoder\.out_layer\.dec_mean\.0\.(\w+)", r"decoder.genes.\1"),
    (r"decoder\.out_layer\.dec_disp", r"decoder.log_theta"),
    (r"head\.output_layer\.(\w+)", r"head.linear.\1"),
)
# Tensors that the release stores and never uses when it predicts.
RELEASE_UNUSED = (
    r"embedder\.norm0\.\w+",
    r"embedder\.pe_enc\.missing_pe",
    r"embedder\.pe_enc\.pe_enc\.weight",
    r"head\.cls",
)
_RELEASE_LATENTS = {"gmvae": "mixture_release", "vae": "gaussian", "ae": "linear", "none": "none"}
_RELEASE_COVARIATES = ("batch", "dataset", "platform")


def _load_release(checkpoint: Path) -> Model:
    prefix = re.sub(r"(\.best)?\.ckpt$", "", checkpoint.name)
    config_path = checkpoint.with_name(prefix + RELEASE_CONFIG)
    if not config_path.is_file():
        raise ModelNotFoundError(
            f"{checkpoint} needs its configuration beside it: {config_path} does not exist."
        )
    values = _read_json(config_path)
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways; none of them may run code
        raise WeightsError(
            f"{checkpoint} cannot be read as plain tensors ({type(error).__name__}: {error}). "
            "A released checkpoint is a dict of tensors; anything else is not opened."
        ) from error
    stored = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(stored, dict):
        raise WeightsError(f"{checkpoint} has no entry 'model_state_dict'.")
    no_tensors = [str(name) for name, value in stored.items() if not isinstance(value, Tensor)]
    if no_tensors:
        raise WeightsError(f"{checkpoint}: no tensors are {', '.join(no_tensors)}.")
    network = _build(partial(release_config, values, config_path), config_path)
    tensors = rename_release(stored)
    _fill(network, tensors, checkpoint)
    provenance = {"source": "OmicsML/CellPLM", "licence": "BSD-2-Clause", "format": "release"}
    return Model(network.eval(), prefix, _sha256(checkpoint), provenance)


def _numpy_scalars() -> list[Any]:
    """Return what a pickled numpy number needs: checkpoints may hold losses beside weights."""
    names = ("bool", "int32", "int64", "float32", "float64")
    dtypes: list[Any] = [type(np.dtype(name)) for name in names]
    reconstruct = np.float64(0).__reduce__()[0]
    # numpy 1 pickles under another module name than numpy 2.
    return [*dtypes, np.dtype, reconstruct, (reconstruct, "numpy.core.multiarray.scalar")]


def release_config(values: dict[str, Any], path: Path) -> CellPLMConfig:
    """Translate the release's keyword arguments; what this package does not build is an error."""

    def option(key: str, allowed: dict[Any, str], default: Any) -> str:
        found = values.get(key, default)
        if not isinstance(found, Hashable) or found not in allowed:
            raise WeightsError(
                f"{path}: {key}={found!r} is not supported; known are "
                f"{', '.join(map(repr, allowed))}."
            )
        return allowed[found]

    option("cat_pe", {False: ""}, False)
    option("input_covariate", {False: ""}, False)
    option("dsbn", {False: ""}, False)
    head = values.get("head_type") or "none"
    decoder = "none" if head != "none" else option("dec_mod", {"nbmlp": "negative_binomial"}, None)
    covariates = (
        ()
        if head != "none"
        else tuple(
            (name, values[f"{name}_num"])
            for name in _RELEASE_COVARIATES
            if values.get(f"{name}_num")
        )
    )
    return CellPLMConfig(
        genes=tuple(values["gene_list"]),
        positions="none",  # the release's code adds 0
        encoder=option("enc_mod", {"flowformer": "flow", "mlp": "mlp"}, None),
        hidden=values["enc_hid"],
        encoder_layers=values["enc_layers"],
        heads=values.get("enc_head", 8),
        dropout=values["model_dropout"],
        norm=option("norm", {"groupnorm": "groupnorm", "layernorm": "layernorm"}, None),
        latent=option("latent_mod", _RELEASE_LATENTS, None),
        latent_size=values["post_latent_dim"],
        components=values.get("num_clusters", 16),
        decoder=decoder,
        decoder_hidden=values["dec_hid"],
        decoder_layers=values["dec_layers"],
        covariates=covariates,
        head=head,
        head_outputs=values["out_dim"] if head != "none" else 0,
    )


def rename_release(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the release's tensors our names; unused ones are dropped, unknown ones keep theirs."""
    tensors = {}
    head_indices = sorted(
        {int(m[1]) for name in stored if (m := re.match(r"head\.mlp\.(\d+)", name))}
    )
    for name, tensor in stored.items():
        if any(re.fullmatch(pattern, name) for pattern in RELEASE_UNUSED):
            continue
        if match := re.fullmatch(r"head\.mlp\.(\d+)\.(\w+)", name):
            name = f"head.layers.{head_indices.index(int(match[1]))}.{match[2]}"
        for pattern, replacement in RELEASE_NAMES:
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, replacement, name)
                break
        tensors[name] = tensor
    return tensors


# --- shared steps ---------------------------------------------------------------------------------


def _build(make_config: Callable[[], CellPLMConfig], path: Path) -> CellPLM:
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and overwritten
            return CellPLM(make_config())
    except WeightsError:
        raise
    except KeyError as error:
        raise WeightsError(f"{path} does not describe a CellPLM network: no {error}.") from error
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path} does not describe a CellPLM network: {error}") from error


def _fill(network: CellPLM, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into a network; anything missing, unexpected or misshapen is one error."""
    wanted = network.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    unexpected = sorted(set(tensors) - set(wanted))
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(tensors))
        if tensors[name].shape != wanted[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{path} does not fit its config. {'; '.join(problems)}.")
    network.load_state_dict(tensors)


def _candidates(name_or_path: str | os.PathLike[str]) -> list[Path]:
    name = os.fspath(name_or_path)
    candidates = [Path(name)]
    if isinstance(name_or_path, str) and os.sep not in name:
        candidates += [PACKAGED / name, Path(settings.weights_dir) / name]
    return candidates


def _not_found(name: str) -> str:
    if name in KNOWN:
        files = " and ".join(KNOWN[name].files)
        return (
            f"The weights of {name!r} are not here. Fetch {files} from {KNOWN[name].source} and "
            f"place them under {settings.weights_dir} (cp.settings.weights_dir), or pass the path."
        )
    names = ", ".join(map(repr, available().index))
    return (
        f"There is no model {name!r}: not a path, not in the package and not under "
        f"{settings.weights_dir}. Known names: {names}. A path must lead to a directory with "
        f"{CONFIG} and {WEIGHTS}, or to a released {RELEASE_WEIGHTS} file."
    )


def _download(known: Known) -> None:
    import pooch

    for file, url, sha256 in zip(known.files, known.urls, known.sha256, strict=True):
        logger.info("downloading %s to %s", url, settings.weights_dir)
        try:
            pooch.retrieve(url, f"sha256:{sha256}", fname=file, path=settings.weights_dir)
        except OSError as error:
            raise ModelNotFoundError(
                f"{url} cannot be reached ({error}). Place the file as {file} under "
                f"{settings.weights_dir} (cp.settings.weights_dir)."
            ) from error
        except ValueError as error:  # the hash
            raise WeightsError(
                f"{url} is not the file that was published: {error} Nothing of it was kept."
            ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object.")
    return values


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
