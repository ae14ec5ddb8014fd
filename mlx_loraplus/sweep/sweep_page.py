"""The page of a sweep: the verdict, the losses of the trials, and the settings that were swept."""

import math
import time
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np

from ..errors import counted
from ..pages.charts import Chart, Curve, line_chart
from ..pages.pages import Headline, HTMLTable, Section, Tile, render_page
from ..runs.report import REFRESH, plain
from ..runs.report_headline import sentence
from ..settings import settings_of
from ..userpaths import public_name
from .heatmap import Heatmap, loss_text
from .sweep_result import PREFERRED, Sweep, resume_sweep_command, train_best_command

_MAX_CURVES = 5  # that a chart can tell apart


def sweep_page(sweep: Sweep, *, live: bool = False) -> bytes:
    """Return a sweep as an HTML page, which loads itself again if the sweep is live."""
    head = sweep_headline(sweep, live=live)
    refresh = REFRESH if live else None
    now = round(time.time())
    return render_page(
        f"sweep: {head.state}", head, sweep_sections(sweep), refresh=refresh, wall_time=now
    )


def sweep_headline(sweep: Sweep, *, live: bool = False) -> Headline:
    """Return what a reader should know first: which rates to train with, and why."""
    # The best settings so far.
    finalists = sweep.finalists()
    tiles: list[Tile] = []
    if finalists:
        best = sweep.best
        loss = f"{fmean(finalists[best]):.4f}" if best in finalists else ""
        tiles = [
            Tile("Learning rate", f"{best.learning_rate:.3g}", "η, of A"),
            Tile("Ratio", f"{best.lr_ratio:.3g}", "λ, of B's rate to A's"),
            Tile("Validation loss", loss, f"after {counted(sweep.config.iters, 'step')}"),
        ]

    # What to do next, and why.
    commands = [("resume", resume_sweep_command(sweep.config))]
    if sweep.outcome == "finished":
        commands = [("train", train_best_command(sweep.config))]
        if wider := sweep.widen_command():
            commands.insert(0, ("try wider", wider))
    return Headline(
        title=f"{public_name(sweep.config.model)}: which rates?",
        state="running" if live else sweep.outcome,
        text=sweep.cost(),
        lead=sentence(sweep.verdict()),
        next_step=" ".join(map(sentence, sweep.advice())),
        commands=commands,
        tiles=tiles,
        is_live=live,
    )


def sweep_sections(sweep: Sweep) -> list[Section]:
    """Return the parts of a sweep's page: the last round, the first one, settings."""
    sections: list[Section] = []
    finalists = _finalists(sweep)
    if finalists.rows:
        heading = f"The best settings, trained for {counted(sweep.config.iters, 'step')}"
        sections.append(Section(heading, table=finalists))

    for heatmap in sweep.heatmaps():
        heading = f"{heatmap.title[0].upper()}{heatmap.title[1:]}"
        sections.append(Section(heading, table=_grid_of(heatmap), charts=_charts_of(heatmap)))

    settings = [(name, plain(value)) for name, value in settings_of(sweep.config).items()]
    sections.append(Section(folded=[HTMLTable(settings, title="Settings of the sweep")]))
    return sections


def _finalists(sweep: Sweep) -> HTMLTable:
    """Return the points of the last round with their losses; those to train with are marked.

    Their loss is not always the lowest one: a gain within the noise is no reason to change.
    """
    is_finished = sweep.outcome == "finished"
    head = ["settings", "validation loss", "seeds", ""]
    has_preferences = sweep.config.objective.has_preferences
    if has_preferences:
        head.insert(2, PREFERRED)

    rows: list[list[str]] = []
    for point, losses in sweep.finalists().items():
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        remarks = ["the defaults"] if point == sweep.default else []
        remarks += ["chosen"] if is_finished and point == sweep.best else []
        row = [str(point), f"{fmean(losses):.4f}{spread}", str(len(losses)), ", ".join(remarks)]
        if has_preferences:
            row.insert(2, sweep.preferred(point))
        rows.append(row)

    chosen = frozenset({str(sweep.best)} if is_finished else ())
    return HTMLTable(rows, head, marked=chosen)


def _grid_of(heatmap: Heatmap) -> HTMLTable:
    """Return the losses as a table with a row for each lambda; the lowest loss is marked."""
    rows = [
        (f"{heatmap.y_name} {value:.3g}", *map(loss_text, losses))
        for value, losses in zip(heatmap.y, heatmap.losses, strict=True)
    ]
    head = ("", *(f"{heatmap.x_name} {value:.3g}" for value in heatmap.x))

    best: set[tuple[str, int]] = set()
    if np.isfinite(heatmap.losses).any():
        row, column = divmod(int(np.nanargmin(heatmap.losses)), len(heatmap.x))
        best.add((rows[row][0], column + 1))
    return HTMLTable(rows, head, best=frozenset(best))


def _charts_of(heatmap: Heatmap) -> Sequence[Chart]:
    """Return a chart of the losses over eta with a curve for each lambda, or no chart.

    A curve needs at least two finite losses. A chart has at most ``_MAX_CURVES`` curves.
    """
    curves: list[Curve] = []
    for value, losses in zip(heatmap.y, heatmap.losses, strict=True):
        points = list(zip(heatmap.x, losses.tolist(), strict=True))
        if sum(math.isfinite(loss) for _, loss in points) > 1:
            curves.append(Curve(f"{heatmap.y_name} {value:.3g}", points))
    if not curves:
        return ()
    caption = "Loss by learning rate"
    chart = line_chart(caption, curves[:_MAX_CURVES], heatmap.x_name, log=True, log_x=True)
    return (chart,)
