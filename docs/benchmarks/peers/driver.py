"""Run one peer: the function called like the task, in the script given; time and memory noted.

    python -P driver.py SCRIPT FOLDER

FOLDER holds ``call.json`` and the inputs as h5ad; left there are ``outputs.npz`` and ``cost.json``.
Started by `peers.run` with the Python of the peer's environment.
"""

import json
import resource
import runpy
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np


def peak_mb():
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; there getrusage tells the peak of the parent, if that was larger
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


script, folder = sys.argv[1], Path(sys.argv[2])
call = json.loads((folder / "call.json").read_text())
inputs = {name: ad.read_h5ad(folder / f"{name}.h5ad") for name in call["inputs"]}
function = runpy.run_path(script)[call["task"]]

start = time.perf_counter()
arrays = function(call["method"], **inputs, **call["options"])
seconds = time.perf_counter() - start

np.savez(folder / "outputs.npz", **{name: np.asarray(array) for name, array in arrays.items()})
(folder / "cost.json").write_text(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))
