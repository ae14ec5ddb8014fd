"""Charts as SVG: axes, thinned curves, maps."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from mlx_loraplus.pages.axes import Axis, linear_axis, log_ticks, tick_labels
from mlx_loraplus.pages.charts import Chart, Curve, Mark, heat_map, line_chart


def labels(chart: Chart, anchor: str) -> list[str]:
    """Return the texts with this anchor; the labels of the y axis have "end"."""
    return re.findall(rf'text-anchor="{anchor}">([^<]*)<', chart.svg)


@pytest.mark.parametrize("highest", [0.5, 1.4, 4.9, 20.0, 100.0, 1e5, 1e12])
def test_a_log_axis_has_a_few_plain_numbers(highest: float):
    chart = line_chart(
        "loss", [Curve("a", [(1, 0.041), (2, 0.2), (3, highest)])], "steps", log=True
    )
    ticks = labels(chart, "end")
    assert 3 <= len(ticks) <= 7
    assert all(re.fullmatch(r"[\d,.]+(e-?\d+)?", tick) for tick in ticks)
    values = [float(tick.replace(",", "")) for tick in ticks]
    assert values == sorted(values)
    assert all(0.03 < value <= 1.2 * highest for value in values)


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [5.7], [-1.0, 1.0], [1e-9, 2e-9], [3.0, 3.0, 3.0], [1e300, -1e300]]
)
def test_any_finite_values_can_be_drawn(values: list[float]):
    chart = line_chart("x", [Curve("a", list(enumerate(values)))], "steps", log=True)
    numbers = re.findall(r' (?:cx|cy|x|y)="([^"]+)"', chart.svg)
    assert all(-1 <= float(number) <= 401 for number in numbers)
    assert len(labels(chart, "end")) >= 2
    if min(values) >= 0:
        assert not any(tick.startswith("-") for tick in labels(chart, "end"))


def test_values_that_are_not_finite_are_left_out():
    points = [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0)]
    chart = line_chart("loss", [Curve("a", points)], "steps")
    assert chart.svg.count("<circle") == 2
    assert "nan" not in chart.svg


def test_a_long_curve_keeps_its_extremes():
    points = [(step, 1.0) for step in range(30_000)]
    points[12_345] = (12_345, 9.0)
    chart = line_chart("loss", [Curve("a", points)], "steps")
    path = re.findall(r'class="curve-1 thin" d="M([^"]+)"', chart.svg)[0].split("L")
    assert len(path) <= 400
    heights = [float(each.split()[1]) for each in path]
    assert min(heights) < 50 < max(heights), "the peak is drawn, near the top"


def test_a_legend_names_several_curves_and_labels_are_escaped():
    curves = [Curve("<b>", [(1, 1.0), (2, 2.0)]), Curve("other", [(1, 2.0), (2, 3.0)])]
    chart = line_chart("<i>", curves, "steps")
    assert [label for _, label in chart.samples()] == ["<b>", "other"]
    assert "<b>" not in chart.svg
    assert "<i>" not in chart.svg
    ElementTree.fromstring(chart.svg)
    assert line_chart("x", curves[:1], "steps").samples() == []


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(0.11, ["0", "0.02", "0.04", "0.06", "0.08", "0.1"]), (3, ["0", "1", "2", "3"])],
)
def test_steps_have_whole_ticks_and_a_part_of_a_minute_has_some(last: float, ticks: list[str]):
    chart = line_chart("loss", [Curve("a", [(0, 1.0), (last, 2.0)])], "minutes")
    assert labels(chart, "middle") == [*ticks, "minutes"]


def test_numbers_that_would_touch_are_left_out():
    curve = Curve("a", [(0.0012, 1.0), (0.0021, 2.0)])
    chart = line_chart("loss", [curve], "minutes")
    found = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([\d.]+)<', chart.svg)
    ends = [(float(x) - 3.8 * len(text), float(x) + 3.8 * len(text)) for x, text in found]
    assert len(ends) >= 2
    assert all(one[1] < other[0] for one, other in itertools.pairwise(ends))


def test_the_numbers_of_a_colour_scale_fit_the_picture():
    chart = heat_map("norms", np.array([[-0.00566, 0.00123]]), [("q", 1)], [(0.5, "1")], "steps")
    found = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="start">([^<]+)<', chart.svg)
    assert len(found) == 2
    assert all(float(x) + 7.5 * len(label) <= 400 for x, label in found)


def test_a_map_has_a_label_for_each_band_and_empty_cells():
    values = np.array([[0.0, 1.0], [np.nan, 0.5], [0.25, 0.75]])
    chart = heat_map(
        "norms", values, [("q_proj", 2), ("k_proj", 1)], [(0.5, "10"), (1.5, "20")], "steps"
    )
    assert labels(chart, "end") == ["q_proj", "k_proj"]
    assert labels(chart, "middle") == ["10", "20", "steps"]
    assert labels(chart, "start") == ["1", "0"]
    assert chart.svg.count("<image") == 2
    ElementTree.fromstring(chart.svg)


def test_marks_have_lines_and_labels_that_do_not_overlap():
    curve = Curve("change", [(1e-4, 0.0), (1e-3, -1.0), (1e-2, 0.5)])
    marks = [Mark(1e-3, "used"), Mark(1.1e-3, "default"), Mark(1.0, "outside")]
    chart = line_chart("Loss", [curve], "rate", log_x=True, marks=marks)
    assert chart.svg.count('class="limit"') == 2
    heights = re.findall(r'<g class="label"><text x="[\d.]+" y="([\d.]+)"', chart.svg)
    assert float(heights[1]) - float(heights[0]) > 13
    assert "; used; default" in chart.svg
    assert "outside" not in chart.svg


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 148_400, "0 20k 40k 60k 80k 100k 120k 140k"),
        (0, 2_300_000, "0 0.5M 1M 1.5M 2M"),
        (0, 90_000, "0 20,000 40,000 60,000 80,000"),
        (0.0002, 0.0034, "0.0005 0.001 0.0015 0.002 0.0025 0.003"),
        (-1e-7, 3e-7, "-1e-7 0 1e-7 2e-7 3e-7"),
        (0, 1e12, "0 2e11 4e11 6e11 8e11 1e12"),
        (4.99999, 5.00001, "4.99999 4.999995 5 5.000005 5.00001"),
    ],
)
def test_the_numbers_of_an_axis_have_one_form(low: float, high: float, labels: str):
    assert tick_labels(linear_axis(low, high, 0, 1, tight=True)) == labels.split()


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1e-7, 3e-3, "1e-7 1e-6 1e-5 1e-4 1e-3"),
        (1e-4, 8e-3, "1e-4 3e-4 1e-3 3e-3"),
        (0.004, 3.0, "0.01 0.03 0.1 0.3 1 3"),
    ],
)
def test_the_numbers_of_a_log_axis_have_one_form(low: float, high: float, labels: str):
    ticks = log_ticks(low, high)
    assert tick_labels(Axis(low, high, 0, 1, ticks, log=True)) == labels.split()


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([999.5, 1000, 1000.5, 1001], "999.5 1,000 1,000.5 1,001"),
        ([1234.1, 1234.2], "1,234.1 1,234.2"),
        ([1233, 1233.5], "1,233 1,233.5"),
        ([1e-4, 1.02e-4, 1.04e-4], "1e-4 1.02e-4 1.04e-4"),
        ([2e10, 2.01e10, 2.02e10], "2e10 2.01e10 2.02e10"),
    ],
)
def test_ticks_that_are_close_have_more_digits(ticks: list[float], labels: str):
    assert tick_labels(Axis(ticks[0], ticks[-1], 0, 1, ticks)) == labels.split()


@pytest.mark.parametrize("power", range(-12, 16))
@pytest.mark.parametrize("share", [1e-9, 1e-6, 3e-4, 2e-3, 0.02, 0.4, 7.0])
@pytest.mark.parametrize("start", [1.0, 1.234, 9.995, -3.7])
def test_the_label_of_a_tick_is_its_value(power: int, share: float, start: float):
    low = start * 10.0**power
    axis = linear_axis(low, low + abs(low) * share, 0, 1)
    units = {"k": "e3", "M": "e6"}
    labels = tick_labels(axis)
    assert len(set(labels)) == len(labels) >= 3
    for tick, label in zip(axis.ticks, labels, strict=True):
        number = label.replace(",", "").replace(label[-1], units.get(label[-1], label[-1]))
        assert abs(float(number) - tick) <= (axis.high - axis.low) / 50
