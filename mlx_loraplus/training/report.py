"""``report.html``: a run on one page that fetches nothing, for a browser, a phone, light and dark."""

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ..places import read_bounded, write_atomically
from ..settings import settings_of
from .history import FUSED, REPORT, RESIDUALS, Run
from .plots import as_svg, draw_losses, fuse_pictures, run_pictures
from .progress import card

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>
:root {{ color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent) }}
body {{ font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 84rem; padding: 1rem }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem }}
.grid, details {{ margin: 1rem 0 }}
figure {{ margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; min-width: 0 }}
figure svg {{ width: 100%; height: auto; display: block }} figcaption {{ font-size: .85rem; opacity: .8 }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: .9rem }}
th, td {{ border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top }}
td {{ white-space: pre-wrap; overflow-wrap: anywhere; min-width: 4rem }} summary {{ cursor: pointer }}
</style></head><body>
"""
_ANSWERS = {
    "base": "loss of the base", "base + adapter": "loss of base + adapter", "fused": "loss of the fused model",
    "kl": "KL(base + adapter ‖ fused)",
}  # fmt: skip


def page(title: str, parts: Iterable[str]) -> bytes:
    """Return a whole page of HTML parts."""
    return (_HEAD.format(title=escape(title)) + "\n".join(parts) + "\n</body></html>\n").encode()


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Return an HTML table of plain text."""
    lines = [f"<tr>{''.join(f'<th>{escape(str(cell))}</th>' for cell in head)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def figures(pictures: Iterable[tuple[str, str]]) -> str:
    """Return (caption, SVG) pictures as a grid."""
    shown = (f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for caption, svg in pictures)
    return f'<div class="grid">{"".join(shown)}</div>'


def write_report(run: Run) -> None:
    """Write a run's report into its folder: at its end, and again when its adapter has been fused."""
    write_atomically(run.folder / REPORT, report_page(run))


def report_page(run: Run) -> bytes:
    """Return a run's report."""
    title = f"{run.name}: {run.outcome}"
    parts = [f"<h1>{escape(title)}</h1>", table(summary(run))]
    parts += ["<h2>How it learned</h2>", figures(run_pictures(run))]
    if answered := _answers(run):
        parts += ["<h2>Answers to fixed prompts</h2>", answered]
    if skipped := [(event["update"], event["reason"]) for event in run.history if "reason" in event]:
        parts += ["<h2>Skipped updates</h2>", table(skipped, ("update", "why"))]
    if lost := _read(run, RESIDUALS):
        rows = [(path, f"{before:.3%}", f"{after:.3%}") for path, (before, after) in lost.items()]
        parts += ["<h2>What quantizing lost</h2>", table(rows, ("module", "without the start", "with it"))]
    if fused := _read(run, FUSED):
        parts += ["<h2>What fusing kept</h2>", _fusing(fused)]
    settings = ((name, plain(value)) for name, value in settings_of(run.config).items())
    versions = ((f"{name} version", value) for name, value in run.start.get("versions", {}).items())
    parts.append(_folded("Settings and versions", table([*settings, *versions])))
    return page(title, parts)


def summary(run: Run) -> list[tuple[str, str]]:
    """Return what a run was and what came of it, as (name, text)."""
    last, rows = run.losses("loss"), card(run)
    for split in ("train", "valid"):
        data = run.start[split]
        share = f"{data['supervised'] / max(1, data['tokens']):.0%}" if data["examples"] else "none"
        rows.append((split, f"{data['examples']:,} examples, {data['tokens']:,} tokens, {share} supervised"))
    rows.append(("updates", f"{run.progress.update:,} of {run.updates:,}"))
    if valid := run.losses("valid_loss"):
        best = min(valid, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)
        rows.append(("validation loss", f"{valid[0][1]:.4f} before, {best[1]:.4f} at best (update {best[0]:,})"))
    if last:
        tokens, seconds = (run.spent([last[-1][0]], name)[0] for name in ("useful_tokens", "seconds"))
        rows.append(("training loss", f"{last[0][1]:.4f} at first, {last[-1][1]:.4f} at last"))
        rows.append(("spent", f"{tokens:,.0f} tokens, {seconds / 60:.1f} minutes in updates"))
        rows.append(("peak memory", f"{max(value for _, value in run.losses('peak_memory_gb')):.2f} GB"))
    return rows


def fragment(run: Run) -> str:
    """Return a run for a notebook: the losses' picture and a few numbers."""
    picture = as_svg(draw_losses, run, size=(7, 4))
    rows = [row for row in summary(run) if row[0] in ("updates", "validation loss", "training loss", "spent")]
    more = "; resume=True goes on" if run.outcome in ("interrupted", "out of time") else ""
    said = f"{escape(str(run.folder))}: {run.outcome}{more}"
    return f'<div style="max-width: 42rem"><p>{said}</p>{picture}{table(rows)}</div>'


def plain(value: Any) -> str:
    """Return a setting's value as text."""
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _answers(run: Run) -> str:
    """Return the fixed prompts with the wanted answer, the base's and the kept adapter's; others are folded away."""
    asked, given = run.start.get("prompts", []), dict(run.losses("answers"))
    if not asked or not given:
        return ""
    heads = {update: f"update {update:,}" if update else "base" for update in given}
    last, best = max(given), run.progress.best_update if run.finished else None
    kept = best if best in given else last
    if kept:
        heads[kept] += ", the best: kept" if kept == best else ", the last"
    shown = list(dict.fromkeys((min(given), kept)))
    prompts = [prompt["prompt"] for prompt in asked]
    rows = zip(
        prompts, (plain(prompt["wanted"]) for prompt in asked), *(given[update] for update in shown), strict=False
    )
    others = [
        (prompt[-80:], heads[update], text)
        for update in given
        if update not in shown
        for prompt, text in zip(prompts, given[update], strict=False)
    ]
    folded = _folded("Other answers", table(others, ("prompt", "update", "answer"))) if others else ""
    return table(rows, ("prompt", "wanted", *(heads[update] for update in shown))) + folded


def _fusing(fused: dict[str, Any]) -> str:
    """Return what fuse.json (see export/fidelity.py) tells: losses, maps of what is kept of each layer, and numbers."""
    sizes = " → ".join(f"{fused[name] / 1e9:.2f} GB" for name in ("bytes_before", "bytes_after"))
    adapters = ", ".join(f"{path} at {weight:g}" for path, weight in fused["adapters"].items())
    rows = [("base", fused["model"]), ("adapters", adapters), ("fused model", fused["save_path"]), ("weights", sizes)]
    rows += [(label, f"{fused['answers'][name]:.4f}") for name, label in _ANSWERS.items() if name in fused["answers"]]
    layers = []
    for path, layer in fused["layers"].items():
        stored = " → ".join(dict.fromkeys((layer["before"], layer["after"])))
        kept = ["" if layer[name] is None else f"{layer[name]:.3f}" for name in ("cosine", "output_cosine", "error")]
        layers.append((path, stored, f"{layer['ratio']:.2%}", *kept))
    head = ("layer", "stored as", "change of the weight", "cosine", "outputs' cosine", "error")
    return table(rows) + figures(fuse_pictures(fused["layers"])) + _folded("Layer by layer", table(layers, head))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _read(run: Run, name: str) -> dict[str, Any]:
    """Return what a file of the run's folder holds, or nothing where there is none."""
    return json.loads(read_bounded(run.folder / name)) if (run.folder / name).is_file() else {}
