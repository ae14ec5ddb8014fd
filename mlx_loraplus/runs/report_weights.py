"""The part of a run's report about what changed in the model: norms, quantizing and fusing."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files import read_bounded
from ..pages.charts import Chart, heat_map
from ..pages.pages import HTMLTable, Section
from .history import FUSED, RESIDUALS, Run
from .state import Event

_NORMS = {"norm_a": "‖A‖", "norm_b": "‖B‖", "norm_change": "‖sBA‖ / ‖W‖"}
_MAX_BLOCK_LABELS = 8
_FUSED_LOSSES = {
    "base": "loss of the base",
    "base + adapter": "loss of base + adapter",
    "fused": "loss of the fused model",
    "kl": "KL(base + adapter ‖ fused)",
}


def change_section(run: Run) -> Section | None:
    """Answer what changed in the model: the adapters' norms, and what quantizing and fusing did."""
    tables: list[HTMLTable] = []
    charts: list[Chart] = []
    for name, label in _NORMS.items():
        # After a step that is not finite, no norm may be.
        norms = np.array([values for _, values in run.losses(name)], float)
        if np.isfinite(norms).any():
            charts.append(_norm_map(run, name, label))

    errors = _read_json(run, RESIDUALS)
    if errors:
        rows = [(path, f"{before:.3%}", f"{after:.3%}") for path, (before, after) in errors.items()]
        head = ("module", "without the start", "with it")
        tables.append(HTMLTable(rows, head, "What quantizing lost"))

    fused = _read_json(run, FUSED)
    if fused:
        charts += _fuse_maps(fused["layers"])
        tables += _fuse_tables(fused)
    if not (charts or tables):
        return None
    return Section("What changed in the model?", charts=charts, folded=tables, is_question=True)


@dataclass(frozen=True)
class _Layer:
    """A module's path, split into its kind and its place in the model."""

    kind: str  # the path without its numbers
    block: tuple[int, ...]  # the numbers

    @classmethod
    def of(cls, path: str) -> "_Layer":
        """Split a path such as ``layers.3.mlp.down_proj``."""
        parts = path.split(".")
        kind = ".".join(part for part in parts if not part.isdigit())
        return cls(kind, tuple(int(part) for part in parts if part.isdigit()))

    @staticmethod
    def short(kind: str) -> str:
        """Return the last part of a kind, e.g. ``down_proj``."""
        return kind.rpartition(".")[2]


def _norm_map(run: Run, name: str, label: str) -> Chart:
    """Return a map of a norm over steps, with a band for each kind of module, blocks upwards."""
    steps, values = zip(*run.losses(name), strict=True)

    # Modules are sorted by kind, and by block within a kind.
    layers = [_Layer.of(path) for path in run.start["modules"]]
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    order = sorted(
        range(len(layers)), key=lambda row: (kinds.index(layers[row].kind), layers[row].block)
    )
    norms = np.array(values, float)[:, order].T  # (modules, reports)

    counts = Counter(layer.kind for layer in layers)
    bands = [(_Layer.short(kind), counts[kind]) for kind in kinds]
    every = max(1, len(steps) // 5)
    ticks = [(place + 0.5, f"{steps[place]:,}") for place in range(0, len(steps), every)]
    return heat_map(f"{label} of each module, blocks upwards", norms, bands, ticks, "steps")


def _fuse_maps(layers: Mapping[str, Event]) -> list[Chart]:
    """Return maps of how well fusing kept each layer's change, over kinds and blocks."""
    places = [_Layer.of(path) for path in layers]
    kinds = list(dict.fromkeys(place.kind for place in places))
    blocks = sorted({place.block for place in places})
    bands = [(_Layer.short(kind), 1) for kind in kinds]
    every = -(-len(blocks) // _MAX_BLOCK_LABELS)
    names = [".".join(map(str, block)) for block in blocks]
    ticks = [(place + 0.5, names[place]) for place in range(0, len(blocks), every)]

    charts: list[Chart] = []
    for name, what in (("cosine", "Weights"), ("output_cosine", "Outputs")):
        # Cells without a layer, or whose number was not measured, stay empty.
        grid = np.full((len(kinds), len(blocks)), np.nan)
        for place, layer in zip(places, layers.values(), strict=True):
            if layer[name] is not None:
                grid[kinds.index(place.kind), blocks.index(place.block)] = layer[name]
        if np.isfinite(grid).any():
            caption = f"{what} after fusing: cosine between the intended and the actual change"
            charts.append(heat_map(caption, grid, bands, ticks, "blocks", limits=(0.0, 1.0)))
    return charts


def _fuse_tables(fused: Event) -> list[HTMLTable]:
    """Return what fusing did to the model as a whole, and layer by layer."""
    # export/fuse_quality.py describes the file.
    before, after = (f"{fused[name] / 1e9:.2f} GB" for name in ("bytes_before", "bytes_after"))
    adapters = ", ".join(f"{path} at {weight:g}" for path, weight in fused["adapters"].items())
    rows = [
        ("base", fused["model"]),
        ("adapters", adapters),
        ("fused model", fused["save_path"]),
        ("weights", f"{before} → {after}"),
    ]
    for name, label in _FUSED_LOSSES.items():
        if name in fused["answers"]:
            rows.append((label, f"{fused['answers'][name]:.4f}"))

    layers = [_fused_layer(path, layer) for path, layer in fused["layers"].items()]
    head = ("layer", "stored as", "change of the weight", "cosine", "outputs' cosine", "error")
    return [
        HTMLTable(rows, title="What fusing kept"),
        HTMLTable(layers, head, "What fusing kept, layer by layer"),
    ]


def _fused_layer(path: str, layer: Event) -> list[str]:
    """Return one row of the table of fused layers; a number that was not measured stays empty."""
    stored = layer["before"]
    if layer["after"] != layer["before"]:
        stored += f" → {layer['after']}"

    cells = [path, stored, f"{layer['ratio']:.2%}"]
    measured = [layer[name] for name in ("cosine", "output_cosine", "error")]
    return cells + ["" if value is None else f"{value:.3f}" for value in measured]


def _read_json(run: Run, name: str) -> dict[str, Any]:
    """Return the content of a file in the run's folder; an empty dictionary if it is missing."""
    path = run.folder / name
    return json.loads(read_bounded(path)) if path.is_file() else {}
