"""Other tools, each in an environment and a process of its own, for the benchmarks beside this.

    ./dev bench peers               list the peers, and whether their environment is there
    ./dev bench peers magic scvi    make the environments of these

What a benchmark calls is `run`. Of a peer, three things are written down: in which script it is
(``peers/SCRIPT.py``), what that script needs (`PACKAGES`), and there its settings, which are those
of the shared folder's ``bench/README.md``, so that figures stand beside the stored ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp

SCRIPTS = Path(__file__).parent / "peers"
ENVIRONMENTS = Path(__file__).parents[2] / "build" / "peers"
DRIVER = SCRIPTS / "driver.py"

# What a script needs; nothing: it runs in the project's own environment.
PACKAGES: dict[str, tuple[str, ...]] = {
    "own": (),
    "classic": (),
    "celltypist": ("celltypist==1.7.1", "scanpy==1.11.5", "scikit-learn<1.7"),
    "magic": ("magic-impute==3.0.0", "anndata"),
    "scvi": ("scvi-tools==1.4.2", "scanpy==1.11.5", "torch==2.13.0"),
}
# The script of every peer, by task.
PEERS: dict[str, dict[str, str]] = {
    "annotate": {
        **dict.fromkeys(("cellplm", "linear_transfer"), "own"),
        **dict.fromkeys(("logreg", "logreg_genes", "svm", "knn"), "classic"),
        "celltypist": "celltypist",
        "scanvi": "scvi",
    },
    "denoise": {
        **dict.fromkeys(("gene_mean", "nonzero_gene_mean", "nothing", "svd", "knn"), "classic"),
        "magic": "magic",
        "scvi": "scvi",
    },
}


@dataclass(frozen=True)
class Outputs:
    """What a peer gave, and what it cost."""

    arrays: dict[str, np.ndarray]
    seconds: float  # of the method alone: no imports, no files
    peak_mb: float  # resident memory of the whole process at its largest


def run(
    peer: str,
    task: str,
    inputs: dict[str, ad.AnnData],
    seed: int,
    options: dict[str, object] | None = None,
) -> Outputs:
    """Run a peer on data, in a process of its own.

    Parameters
    ----------
    peer : str
        A name in ``PEERS[task]``. Its environment is made first, if it is not there: that takes
        minutes and the package index.
    task : {"annotate", "denoise"}
        ``"annotate"`` takes two inputs, ``"denoise"`` one.
    inputs : dict of str to AnnData
        Counts in `X`. Only these and the columns of `obs` named here reach the peer.

        * annotate: ``"reference"``, with the labels in ``obs["label"]``, and ``"query"``, which has
          none; both may have ``obs["batch"]``. The peer joins the genes by `var_names`.
        * denoise: ``"input"``.
    seed : int
        Of whatever the peer draws.
    options : dict, optional
        Keywords for the function of the script, such as ``{"max_epochs": 2}`` to try one out.

    Returns
    -------
    Outputs
        Its `arrays`:

        * annotate: ``predicted`` (cells of the query,) text; and where the peer has probabilities
          ``proba`` (cells, labels) float64 with ``labels`` (labels,) text.
        * denoise: ``denoised`` (cells, genes) float32, rows and columns as in the input, expected
          counts at the depth of the input's cell (a peer with a scale of its own is led back to
          it). ``nonzero_gene_mean`` alone predicts on another scale: it gives ``lognorm`` (cells,
          genes) instead, log1p of counts per 10,000, to be scored as it is; it has no meaning as
          expected counts (the thinned split), and none is given.

    Examples
    --------
    ::

        outputs = peers.run("magic", "denoise", {"input": adata}, seed=0)
        outputs.arrays["denoised"].shape  # (cells, genes)
    """
    script = PEERS[task][peer]
    python = environment(script)
    with tempfile.TemporaryDirectory() as folder:
        for name, adata in inputs.items():
            _plain(adata).write_h5ad(Path(folder, f"{name}.h5ad"))
        call = {
            "method": peer,
            "task": task,
            "inputs": list(inputs),
            "options": {"seed": seed} | (options or {}),
        }
        Path(folder, "call.json").write_text(json.dumps(call))
        # -P: a script may be called like the package that it imports
        done = subprocess.run(
            [python, "-P", DRIVER, SCRIPTS / f"{script}.py", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{peer} failed on {task}:\n{done.stdout[-3000:]}")
        with np.load(Path(folder, "outputs.npz")) as stored:
            arrays = dict(stored)
        cost = json.loads(Path(folder, "cost.json").read_text())
    return Outputs(arrays, cost["seconds"], cost["peak_mb"])


def environment(script: str) -> Path:
    """Return the Python of a script's environment; make it where it is not there."""
    packages = PACKAGES[script]
    if not packages:
        return Path(sys.executable)
    folder = ENVIRONMENTS / script / "venv"
    python, stamp = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(packages)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making {folder}: {', '.join(packages)} ...", file=sys.stderr, flush=True)
    # Without pip and then with ours, for Pythons that come without ensurepip.
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    install = [sys.executable, "-m", "pip", "--quiet", "--python", python, "install"]
    subprocess.run([*install, *packages], check=True)
    stamp.write_text(wanted)
    return python


def _plain(adata: ad.AnnData) -> ad.AnnData:
    """Return what a peer may see: counts, names, labels of a reference, batches."""
    plain = ad.AnnData(sp.csr_matrix(adata.X))
    plain.obs_names, plain.var_names = adata.obs_names, adata.var_names
    for column in {"label", "batch"} & set(adata.obs):
        plain.obs[column] = adata.obs[column].astype(str).to_numpy()
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", choices=[[], *PACKAGES])
    for script in parser.parse_args().scripts:
        environment(script)
    for task, scripts in PEERS.items():
        for peer, script in scripts.items():
            is_there = not PACKAGES[script] or (ENVIRONMENTS / script / "venv").is_dir()
            print(f"{task:10}{peer:20}{'ready' if is_there else 'no environment yet'}")


if __name__ == "__main__":
    main()
