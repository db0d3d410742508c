"""Speed and memory of inference with the 85M network, beside a plain PyTorch baseline.

    ./dev bench embed_speed
    ./dev bench embed_speed --cells 2000 --runs 2 --out build/bench

The network of the released configuration (82.4M parameters, `gmvae` latent) with random weights, on
random counts of 2,000 and of 13,000 genes, 10 % filled, in memory. The baseline is what its
description says, written down in the obvious way: counts as a COO tensor times the gene table, the
whole context at once. Both get the same weights and a CSR matrix, and give latents in main memory;
they take turns in one process.

The share of the machine's rate is the network's multiply-adds over the time, divided by the rate of
matrix products of the network's own shapes. Those are timed inside the run, in between the blocks
(the time they take is taken off), so that both see the same machine. Of PyTorch's two float32
products, `torch.nn.functional.linear` and oneDNN's, the faster counts.

Memory is the peak of what a fresh process holds beyond what it held when counts and network were in
place. Written: ``embed_speed.csv`` (every run) and ``embed_speed.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cellplm_tl as cp
from cellplm_tl import _genes, _inference
from cellplm_tl._anndata import Cells, read_cells
from cellplm_tl.models.linear import linear

HERE = Path(__file__).parent
GENE_TABLE = HERE.parents[1] / "cellplm_tl" / "data" / "genes.tsv.xz"
MODEL_GENES = 19_374
GENES = (2_000, 13_000)
FILLED = 0.1
HIDDEN, LAYERS, HEADS, COMPONENTS, JOINED, LATENT = 1024, 4, 8, 16, 512, 512
EPSILON = 1e-6

# (in, out) of the products of one encoder layer: query, key, value, output, and the feed-forward.
LAYER_SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, 2 * HIDDEN), (2 * HIDDEN, HIDDEN)]
PROBE_ROWS = 1_000
PROBE_EVERY = 7  # blocks: seldom, for the products push the network out of the cache


# --------------------------------------------------------------------------------------- baseline


class BaselineAttention(nn.Module):
    """Flow attention over all cells."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        q = torch.sigmoid(self.query(x)).view(n, HEADS, -1).transpose(0, 1)  # (heads, cells, dim)
        k = torch.sigmoid(self.key(x)).view(n, HEADS, -1).transpose(0, 1)
        v = self.value(x).view(n, HEADS, -1).transpose(0, 1)
        inflow = ((q + EPSILON) * (k.sum(1, keepdim=True) + EPSILON)).sum(-1)  # (heads, cells)
        outflow = ((k + EPSILON) * (q.sum(1, keepdim=True) + EPSILON)).sum(-1)
        kept_keys = (k / outflow[..., None]).sum(1, keepdim=True)
        kept_queries = (q / inflow[..., None]).sum(1, keepdim=True)
        sink = ((q + EPSILON) * (kept_keys + EPSILON)).sum(-1)
        source = ((k + EPSILON) * (kept_queries + EPSILON)).sum(-1).clamp(-1, 1)
        competition = torch.softmax(source, -1) * n
        memory = k.transpose(1, 2) @ (v * competition[..., None])  # (heads, dim, dim)
        heads = (q / inflow[..., None]) @ memory * torch.sigmoid(sink)[..., None]
        return self.out(heads.transpose(0, 1).reshape(n, HIDDEN))


class BaselineLayer(nn.Module):
    """One encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attention = BaselineAttention()
        self.widen, self.narrow = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, u: Tensor) -> Tensor:
        u = u + self.attention(self.norm1(u))
        return u + self.narrow(F.gelu(self.widen(self.norm2(u))))


class Baseline(nn.Module):
    """The released network, from its description."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(MODEL_GENES, HIDDEN))
        self.mix, self.mix_norm = nn.Linear(HIDDEN, HIDDEN), nn.GroupNorm(4, HIDDEN)
        self.layers = nn.ModuleList(BaselineLayer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.logits = nn.Linear(HIDDEN, COMPONENTS)
        self.join, self.mean = nn.Linear(HIDDEN + COMPONENTS, JOINED), nn.Linear(JOINED, LATENT)

    def copy_weights(self, network: cp.models.CellPLM) -> None:
        """Take the weights of our network."""
        theirs = network.state_dict()
        names = {"table": "embedder.table", "norm": "pre_latent_norm"}
        names |= {"mix": "embedder.mixing.linear", "mix_norm": "embedder.mixing.norm"}
        names |= {name: f"latent.{name}" for name in ("logits", "join", "mean")}
        names["layers"] = "encoder"
        own = {}
        for name in self.state_dict():
            first, _, rest = name.partition(".")
            own[name] = theirs[".".join(part for part in (names[first], rest) if part)]
        self.load_state_dict(own)

    def forward(self, counts: Tensor, genes: Tensor, uniform: Tensor | None = None) -> Tensor:
        """(cells, genes) counts, COO → (cells, latent), with the release's random draw of y."""
        x = torch.sparse_coo_tensor(
            counts.indices(),
            counts.values().log1p(),
            counts.shape,
            is_coalesced=True,
            check_invariants=False,
        )
        u = torch.sparse.mm(x, self.table[genes])
        u = self.mix_norm(self.mix(u).relu())
        for layer in self.layers:
            u = layer(u)
        f = self.norm(u)
        logits = self.logits(f)
        uniform = torch.rand_like(logits) if uniform is None else uniform
        gumbel = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
        y = F.one_hot((logits + gumbel).argmax(1), COMPONENTS).to(f.dtype)
        return self.mean(self.join(torch.cat((f, y), 1)).relu())


def to_coo(matrix: sp.csr_matrix) -> Tensor:
    """Turn a CSR matrix into a COO tensor, as the release does."""
    coo = matrix.tocoo()
    indices = torch.from_numpy(np.stack((coo.row, coo.col)).astype(np.int64))
    values = torch.from_numpy(coo.data.astype(np.float32))
    return torch.sparse_coo_tensor(
        indices, values, coo.shape, is_coalesced=True, check_invariants=False
    )


# ------------------------------------------------------------------------------------------ input


def make_network() -> cp.models.CellPLM:
    """Make the released configuration with random weights."""
    table = pd.read_csv(GENE_TABLE, sep="\t", comment="#")
    coding = table.loc[table["locus_group"] == "protein_coding", "ensembl_id"].unique()
    coding = coding[_genes.resolve(coding).gene_ids == coding]
    torch.manual_seed(0)
    config = cp.models.CellPLMConfig(
        genes=tuple(coding[:MODEL_GENES]),
        positions="none",
        latent="mixture_release",
        covariates=(("batch", 12_596), ("dataset", 484)),
    )
    return cp.models.CellPLM(config).eval()


def make_counts(n_cells: int, genes: tuple[str, ...]) -> ad.AnnData:
    """Draw counts, a tenth of them positive, in every gene alike: no row of the table is rare."""
    rng = np.random.default_rng(0)
    filled = [
        np.flatnonzero(rng.random(len(genes)) < FILLED).astype(np.int32) for _ in range(n_cells)
    ]
    offsets = np.concatenate(([0], np.cumsum([len(columns) for columns in filled])))
    values = rng.geometric(0.5, offsets[-1]).astype(np.float32)
    shape = (n_cells, len(genes))
    matrix = sp.csr_matrix((values, np.concatenate(filled), offsets.astype(np.int32)), shape)
    return ad.AnnData(matrix, var=pd.DataFrame(index=list(genes)))


def multiply_adds(n_entries: int, n_cells: int) -> float:
    """Count the network's multiply-adds: sparse first layer, mixing, encoder layers, latent."""
    encoder = LAYERS * sum(a * b for a, b in LAYER_SHAPES)
    latent = HIDDEN * COMPONENTS + (HIDDEN + COMPONENTS) * JOINED + JOINED * LATENT
    return n_entries * HIDDEN + n_cells * (HIDDEN**2 + encoder + latent)


# ---------------------------------------------------------------------------------------- methods


def methods(
    network: cp.models.CellPLM, adata: ad.AnnData, cells: Cells
) -> dict[str, Callable[[], np.ndarray]]:
    """Return, by name, what turns the counts in memory into latents in memory."""
    baseline = Baseline().eval()
    baseline.copy_weights(network)
    genes = torch.from_numpy(cells.gene_index)

    def plain() -> np.ndarray:
        with torch.inference_mode():
            return baseline(to_coo(adata.X), genes).numpy()

    def ours(precision: str) -> np.ndarray:
        with cp.settings.override(precision=precision, progress=False, device="cpu"):
            return _inference.encode(network, cells).latent

    return {
        "baseline": plain,
        "fp32": lambda: ours("fp32"),
        "bf16": lambda: ours("bf16"),
    }


def deviation_of_baseline(network: cp.models.CellPLM, cells: Cells, adata: ad.AnnData) -> float:
    """Compare both networks on some cells, given the same draws: the work is the same."""
    rows = np.arange(min(300, adata.n_obs))
    baseline, genes = Baseline().eval(), torch.from_numpy(cells.gene_index)
    baseline.copy_weights(network)
    uniform = torch.rand(len(rows), COMPONENTS)
    with torch.inference_mode():
        expected = baseline(to_coo(adata.X[rows]), genes, uniform)
        counts = _inference.read_block(cells, rows)
        found = network(counts, genes, uniform=uniform).posterior.mean
    return deviation(found.numpy(), expected.numpy())


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, relative to the spread of the cells."""
    spread = np.sqrt(np.square(expected - expected.mean(0)).mean())
    return float(np.sqrt(np.square(found - expected).mean()) / spread)


# ------------------------------------------------------------------------------------------- time


class Probe:
    """Times products of the network's shapes; what it takes is no part of a run."""

    def __init__(self, precision: str):
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.operands = [
            (torch.randn(PROBE_ROWS, a).to(self.dtype), torch.randn(b, a).to(self.dtype))
            for a, b in LAYER_SHAPES
        ]
        self.products = {"onednn": linear, "mkl": F.linear}
        self.turns = itertools.cycle(itertools.product(self.operands, self.products))
        self.work = dict.fromkeys(self.products, 0.0)
        self.seconds = dict.fromkeys(self.products, 0.0)
        self.total = 0.0  # seconds
        for (x, weight), name in itertools.product(self.operands, self.products):
            self.products[name](x, weight)

    def __call__(self) -> None:
        """Time one product."""
        began = time.perf_counter()
        (x, weight), name = next(self.turns)
        start = time.perf_counter()
        self.products[name](x, weight)
        self.seconds[name] += time.perf_counter() - start
        self.work[name] += x.shape[0] * weight.numel()
        self.total += time.perf_counter() - began

    def rate(self, name: str) -> float:
        """Return multiply-adds per second."""
        return self.work[name] / self.seconds[name]


@contextlib.contextmanager
def between_blocks(probe: Callable[[], None]) -> Iterator[None]:
    """Run the probe in between the blocks of our inference."""
    sweep, number = _inference._Context.sweep, itertools.count()

    def probed(context: _inference._Context) -> Iterator[slice]:
        for span in sweep(context):
            yield span
            if next(number) % PROBE_EVERY == 0:
                probe()

    _inference._Context.sweep = probed
    try:
        yield
    finally:
        _inference._Context.sweep = sweep


def timed(name: str, method: Callable[[], np.ndarray], work: float) -> tuple[dict, np.ndarray]:
    """Run a method once; the baseline has no blocks, the products come before and after it."""
    probe = Probe(name)
    if name == "baseline":
        around = 6 * len(LAYER_SHAPES)
        for _ in range(around):
            probe()
    aside = probe.total
    with torch.inference_mode(), between_blocks(probe):
        start = time.perf_counter()
        result = method()
        seconds = time.perf_counter() - start - (probe.total - aside)
    if name == "baseline":
        for _ in range(around):
            probe()
    rates = {product: probe.rate(product) for product in probe.products}
    row = {
        "seconds": seconds,
        "gflops": 2e-9 * work / seconds,
        "gflops_onednn": 2e-9 * rates["onednn"],
        "gflops_linear": 2e-9 * rates["mkl"],
        "share": work / seconds / max(rates.values()),
        "share_of_linear": work / seconds / rates["mkl"],
    }
    return row, result


# ----------------------------------------------------------------------------------------- memory


def peak_memory(method: Callable[[], np.ndarray]) -> int:
    """Return the peak of this process's memory in a run beyond what it held before, in bytes."""
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    seen = [before]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = method()
    done.set()
    watcher.join()
    del result
    return max(seen) - before


def memory_in_a_fresh_process(name: str, n_cells: int, n_genes: int) -> int:
    """Measure one method in a process that has run nothing else."""
    command = [sys.executable, __file__, "--memory-of", name, "--cells", str(n_cells)]
    done = subprocess.run(
        [*command, "--genes", str(n_genes)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1])


# ------------------------------------------------------------------------------------------- page

TABLE_HEAD = """\
| genes | | seconds | times faster | GFLOP/s | share of the rate | of `F.linear`'s | peak MB |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def table(runs: pd.DataFrame) -> str:
    """Write a row per method and number of genes: median, and smallest to largest."""
    names = {"baseline": "plain PyTorch", "fp32": "this package", "bf16": "this package, bf16"}
    lines = [TABLE_HEAD]
    for n_genes, group in runs.groupby("genes"):
        baseline = group.loc[group["method"] == "baseline", "seconds"].median()
        for name, own in group.groupby("method", sort=False):
            seconds, share = own["seconds"], own["share"]
            columns = (
                f"{n_genes:,}",
                names[name],
                f"{seconds.median():.2f} ({seconds.min():.2f}–{seconds.max():.2f})",
                f"{baseline / seconds.median():.2f}",
                f"{own['gflops'].median():.0f}",
                f"{share.median():.0%} ({share.min():.0%}–{share.max():.0%})",
                f"{own['share_of_linear'].median():.0%}",
                f"{own['peak_bytes'].iloc[0] / 1e6:,.0f}",
            )
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def page(runs: pd.DataFrame, n_cells: int, n_runs: int) -> str:
    """Write the page."""
    single, half = runs[runs["method"] != "bf16"], runs[runs["method"] == "bf16"]
    rates = [single["gflops_onednn"], single["gflops_linear"]]
    rates.append(half[["gflops_onednn", "gflops_linear"]].max(axis=1))
    onednn, plain, in_bf16 = (f"{rate.median():.0f}" for rate in rates)
    deviations = half.groupby("genes")["deviation"].median()
    deviates = ", ".join(
        f"{value:.1%} at {n_genes:,} genes" for n_genes, value in deviations.items()
    )
    return f"""# Speed of inference

Made by `./dev bench embed_speed` ({machine()}); every run
is in `embed_speed.csv`. The network of the released configuration with random weights, {n_cells:,}
cells as one context, counts in memory, 10 % of them positive; {n_runs} runs of each, in turns:
median (smallest–largest).

{table(runs)}

**The rate.** What this machine does in products of the network's own shapes (blocks of
{PROBE_ROWS:,} cells), timed in between the blocks of the very runs, two operations per
multiply-add: {onednn} GFLOP/s by oneDNN in float32, {plain} by `torch.nn.functional.linear`,
{in_bf16} in bfloat16. The share is that of the faster product in the run's format; beside it
stands the share of `F.linear` in that format, which bounds what plain PyTorch code can reach.

**The work** is what the network needs: one multiply-add per positive count and hidden channel,
33 h² per cell for mixing and encoder (h = {HIDDEN}), and the latent's mean. Norms, sigmoids,
activations and the sums over the context count as nothing.

**Plain PyTorch** is the network as described for the released checkpoints, written down in the
obvious way: counts as a COO tensor, the whole context at once, evaluation mode, same weights. Given
the same random draws both agree to {runs["agreement"].max():.0e} of the cells' spread.

**Peak memory** of a fresh process beyond what it held with counts and network in place. Ours is
one hidden vector, query, key and value per cell as far as the budget allows
({16 * HIDDEN * n_cells / 1e6:,.0f} MB here), a block at work, the measured genes' rows of the
table, and the latents: it does not grow with cells × genes. With bf16 the network's weights are
held once more. A smaller `cp.settings.memory_budget` makes it smaller.

**bf16** (`cp.settings.precision = "bf16"`): products of matrices in bfloat16, all else in float32.
Root mean square of the difference to float32, relative to the spread of the cells:
{deviates}.
"""


def machine() -> str:
    """Describe where this ran."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        info = Path("/proc/cpuinfo").read_text()
        name = info.partition("model name")[2].partition("\n")[0].strip("\t :") or name
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} cores, {cpu}, PyTorch {torch.__version__}"


# ------------------------------------------------------------------------------------------- main


def main() -> None:
    """Run all methods in turns; write table and page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, nargs="+", default=GENES)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--memory-of", help="print the peak memory of one method, nothing else")
    options = parser.parse_args()

    network = make_network()
    rows = []
    for n_genes in options.genes:
        adata = make_counts(options.cells, network.config.genes[:n_genes])
        cells = read_cells(adata, network.config.genes)
        if options.memory_of:
            method = methods(network, adata, cells)[options.memory_of]
            print(peak_memory(method))
            return
        agreement = deviation_of_baseline(network, cells, adata)
        assert agreement < 1e-4, f"the baseline computes something else: {agreement:.1e}"
        work = multiply_adds(adata.X.nnz, options.cells)
        by_name = methods(network, adata, cells)
        peaks = {name: memory_in_a_fresh_process(name, options.cells, n_genes) for name in by_name}
        results = {}
        for run, (name, method) in itertools.product(range(-1, options.runs), by_name.items()):
            row, results[name] = timed(name, method, work)
            row |= {"genes": n_genes, "method": name, "run": run, "peak_bytes": peaks[name]}
            row["agreement"] = agreement
            if name == "bf16":
                row["deviation"] = deviation(results["bf16"], results["fp32"])
            print(
                f"{n_genes:6,} {name:9} {row['seconds']:6.2f} s  {row['gflops']:5.0f} GFLOP/s  "
                f"share {row['share']:.2f}  (oneDNN {row['gflops_onednn']:.0f}, F.linear "
                f"{row['gflops_linear']:.0f})  {row['peak_bytes'] / 1e6:,.0f} MB",
                flush=True,
            )
            if run >= 0:  # the first of each warms up
                rows.append(row)

    runs = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    runs.round(6).to_csv(options.out / "embed_speed.csv", index=False)
    text = page(runs, options.cells, options.runs)
    (options.out / "embed_speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
