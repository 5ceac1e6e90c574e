"""The picture: names clear of one another, zero on a log axis, one empty stretch left out."""

import pytest
from fabricate import collapsed, spec

from lorafactory.tables import build
from lorafactory.tables.axes import score_axis
from lorafactory.tables.labels import nearest, place
from lorafactory.tables.plot import _looks, draw

PNG = b"\x89PNG"


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


@pytest.mark.parametrize("count", [1, 8, 25])
def test_no_name_covers_another_or_leaves_the_frame(count):
    """All points within 30 pixels, as variants of equal size and like scores are."""
    points = [(300 + 7 * (i % 3), 200 + i * 30 / count) for i in range(count)]
    markers = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    boxes = place(points, [(60.0, 11.0)] * count, markers, (0, 0, 600, 450))
    assert len(boxes) == count
    assert not any(overlap(boxes[i], boxes[j]) for i in range(count) for j in range(i))
    assert not any(overlap(box, marker) for box in boxes for marker in markers)
    assert all(b[0] >= 0 and b[1] >= 0 and b[2] <= 600 and b[3] <= 450 for b in boxes)


def test_a_lone_name_stays_beside_its_point():
    (box,) = place([(300, 200)], [(60.0, 11.0)], [(296, 196, 304, 204)], (0, 0, 600, 450))
    x, y = nearest((300, 200), box)
    assert abs(x - 300) + abs(y - 200) < 15


def test_rows_look_different():
    looks = _looks([str(i) for i in range(39)]).values()
    assert len({(look["marker"], look["markerfacecolor"]) for look in looks}) == 39


def test_draw(results):
    """Without parameters, without spread, without a score, with several tasks."""
    results.row("head_only", [0.5, 0.51, 0.52], "cola", cost={"adapter_parameters": 0})
    results.row("lora", [0.9, 0.91, 0.92], "cola")
    results.row("full", [0.9], "cola", cost={"adapter_parameters": 10**7})
    for seed in range(3):
        results.add("vera", "cola", seed, **collapsed("matthews"))
    results.row("lora", [0.8, 0.8, 0.8], "mrpc")
    table = build(spec(tasks=["cola", "mrpc"], plot="adapter_parameters"), results.folder)
    drawn = draw(table)
    assert drawn[".png"].startswith(PNG) and drawn[".pdf"].startswith(b"%PDF")
    assert draw(table) == drawn


def test_one_point_alone(results):
    results.row("lora", [0.9], cost={"adapter_parameters": 0})
    assert draw(build(spec(plot="adapter_parameters"), results.folder))[".png"].startswith(PNG)


def test_only_a_stretch_worth_it_is_left_out():
    from matplotlib.figure import Figure

    def height(spans, low, high):
        ax = Figure().subplots()
        score_axis(ax, spans)
        at = ax.transAxes.inverted().transform(ax.transData.transform([(0.5, low), (0.5, high)]))[:, 1]
        assert at[0] < at[1]
        return at[1] - at[0]

    assert height([(50, 51), (90, 92), (94, 95)], 90, 95) > 0.4  # 5 of 45 points fill half of the axis
    assert height([(50, 51), (65, 70), (80, 82), (94, 95)], 80, 95) == pytest.approx(15 / (45 * 1.2))
