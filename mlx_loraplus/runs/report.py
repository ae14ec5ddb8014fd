"""``report.html``: one page about a run, for a browser or a phone, without external resources.

This file selects the content of the page. ``report.html.jinja`` defines the layout and escapes the
content.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..files import read_bounded, write_atomically
from ..settings import settings_of
from .history import FUSED, REPORT, RESIDUALS, Run
from .plots import Picture, as_svg, draw_losses, fuse_pictures, run_pictures
from .progress import card
from .state import Event

TEMPLATE = "report.html.jinja"
_FRAGMENT = ("steps", "validation loss", "training loss", "spent")  # what a notebook shows
_RESUMABLE = ("interrupted", "out of time")
_FUSED_LOSSES = {
    "base": "loss of the base",
    "base + adapter": "loss of base + adapter",
    "fused": "loss of the fused model",
    "kl": "KL(base + adapter ‖ fused)",
}


@dataclass(frozen=True)
class HTMLTable:
    """Cells to show as text; ``title`` labels the table where it is folded away."""

    rows: Sequence[Sequence[Any]]
    head: Sequence[str] = ()
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page: an optional heading, table, pictures and folded table, in this order."""

    heading: str = ""
    table: HTMLTable | None = None
    pictures: Sequence[Picture] = ()
    folded: HTMLTable | None = None


def write_report(run: Run) -> None:
    """Write a run's report into its folder: when it ends, and again after its adapter is fused."""
    write_atomically(run.folder / REPORT, report_page(run))


def report_page(run: Run) -> bytes:
    """Return a run's report as HTML."""
    title = f"{run.name}: {run.outcome}"
    sections = [
        Section(table=HTMLTable(summary(run))),
        Section("How it learned", pictures=run_pictures(run)),
        _answers_section(run),
        _skipped_section(run),
        _quantizing_section(run),
        _fusing_section(run),
        _settings_section(run),
    ]
    return render_page(title, title, [section for section in sections if section])


def fragment(run: Run) -> str:
    """Return a run as HTML for a notebook: the loss curves and a few numbers."""
    # How the run ended, and how to continue it.
    line = f"{run.folder}: {run.outcome}"
    if run.outcome in _RESUMABLE:
        line += "; resume=True continues it"

    picture = as_svg(draw_losses, run, size=(7, 4))
    rows = [(name, text) for name, text in summary(run) if name in _FRAGMENT]
    return str(_template().render_card(line, picture, HTMLTable(rows)))


def render_page(title: str, heading: str, sections: Iterable[Section]) -> bytes:
    """Return a whole HTML page; ``title`` names the browser's tab."""
    return str(_template().render_page(title, heading, list(sections))).encode()


def render_sections(sections: Iterable[Section]) -> str:
    """Return sections as HTML without a page around them."""
    return str(_template().render_sections(list(sections)))


@cache
def _template() -> Any:
    """Return the template's macros."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).module


def summary(run: Run) -> list[tuple[str, str]]:
    """Return a description of the training and its results, as (name, text)."""
    rows = card(run)
    for split in ("train", "valid"):
        rows.append((split, _describe_split(run.start[split])))
    rows.append(("steps", f"{run.progress.step:,} of {run.steps:,}"))

    # The best validation has the lowest loss. A loss that is not finite is never the best.
    if valid := run.losses("valid_loss"):
        first = valid[0][1]
        step, best = min(valid, key=_finite_loss)
        text = f"{first:.4f} before, {best:.4f} at best (step {step:,})"
        rows.append(("validation loss", text))

    # The results of training itself.
    if reports := run.losses("loss"):
        (_, first), (step, last) = reports[0], reports[-1]
        tokens = run.spent([step], "useful_tokens")[0]
        minutes = run.spent([step], "seconds")[0] / 60
        peak = max(value for _, value in run.losses("peak_memory_gb"))
        rows.append(("training loss", f"{first:.4f} at first, {last:.4f} at last"))
        rows.append(("spent", f"{tokens:,.0f} tokens, {minutes:.1f} minutes in steps"))
        rows.append(("peak memory", f"{peak:.2f} GB"))
    return rows


def plain(value: Any) -> str:
    """Return a setting's value as text."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _describe_split(counts: Event) -> str:
    share = "none"
    if counts["examples"]:
        share = f"{counts['supervised'] / max(1, counts['tokens']):.0%}"
    return f"{counts['examples']:,} examples, {counts['tokens']:,} tokens, {share} supervised"


def _finite_loss(point: tuple[int, float]) -> float:
    """Return the sort key of (step, loss): the loss; losses that are not finite come last."""
    _, loss = point
    return loss if math.isfinite(loss) else math.inf


def _answers_section(run: Run) -> Section | None:
    """Return the fixed prompts with the expected answer, the base's and the kept adapter's.

    The answers of other validations are folded away.
    """
    prompts = run.start.get("prompts", [])
    answers = dict(run.losses("answers"))
    if not prompts or not answers:
        return None

    # One column for the base, one for the adapter that is kept.
    kept = _kept_step(run, answers)
    heads = {step: f"step {step:,}" for step in answers}
    if 0 in heads:
        heads[0] = "base"
    if kept:
        heads[kept] += ", the best: kept" if kept == _best_step(run) else ", the last"
    columns = list(dict.fromkeys((min(answers), kept)))

    texts = [prompt["prompt"] for prompt in prompts]
    expected = [plain(prompt["expected"]) for prompt in prompts]
    shown = zip(texts, expected, *(answers[step] for step in columns), strict=False)
    table = HTMLTable(list(shown), ("prompt", "expected", *(heads[step] for step in columns)))

    # All other validations, one answer per row.
    others: list[tuple[str, str, str]] = []
    for step in answers:
        if step in columns:
            continue
        for text, answer in zip(texts, answers[step], strict=False):
            others.append((text[-80:], heads[step], answer))

    folded = HTMLTable(others, ("prompt", "step", "answer"), "Other answers") if others else None
    return Section("Answers to fixed prompts", table, folded=folded)


def _kept_step(run: Run, answers: dict[int, Any]) -> int:
    """Return the step whose adapter is kept: the best one once the run has finished."""
    best = _best_step(run)
    return best if best in answers else max(answers)


def _best_step(run: Run) -> int | None:
    return run.progress.best_step if run.finished else None


def _skipped_section(run: Run) -> Section | None:
    rows = [(event["step"], event["reason"]) for event in run.history if "reason" in event]
    if not rows:
        return None
    return Section("Skipped steps", HTMLTable(rows, ("step", "why")))


def _quantizing_section(run: Run) -> Section | None:
    errors = _read_json(run, RESIDUALS)
    if not errors:
        return None
    rows = [(path, f"{before:.3%}", f"{after:.3%}") for path, (before, after) in errors.items()]
    head = ("module", "without the start", "with it")
    return Section("What quantizing lost", HTMLTable(rows, head))


def _fusing_section(run: Run) -> Section | None:
    """Return the losses, maps of the layers and a table of the layers from fuse.json."""
    fused = _read_json(run, FUSED)
    if not fused:
        return None

    # The model as a whole; export/fuse_quality.py describes the file.
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

    # Every layer, folded away below the pictures.
    layers = [_fused_layer(path, layer) for path, layer in fused["layers"].items()]
    head = (
        "layer",
        "stored as",
        "change of the weight",
        "cosine",
        "outputs' cosine",
        "error",
    )
    return Section(
        "What fusing kept",
        HTMLTable(rows),
        fuse_pictures(fused["layers"]),
        HTMLTable(layers, head, "Layer by layer"),
    )


def _fused_layer(path: str, layer: Event) -> list[str]:
    """Return one row of the table of fused layers; a number that was not measured stays empty."""
    stored = layer["before"]
    if layer["after"] != layer["before"]:
        stored += f" → {layer['after']}"

    cells = [path, stored, f"{layer['ratio']:.2%}"]
    measured = [layer[name] for name in ("cosine", "output_cosine", "error")]
    return cells + ["" if value is None else f"{value:.3f}" for value in measured]


def _settings_section(run: Run) -> Section:
    versions: dict[str, str] = run.start.get("versions", {})
    rows = [(name, plain(value)) for name, value in settings_of(run.config).items()]
    rows += [(f"{name} version", value) for name, value in versions.items()]
    return Section(folded=HTMLTable(rows, title="Settings and versions"))


def _read_json(run: Run, name: str) -> dict[str, Any]:
    """Return the content of a file in the run's folder; an empty dictionary if it is missing."""
    path = run.folder / name
    return json.loads(read_bounded(path)) if path.is_file() else {}
