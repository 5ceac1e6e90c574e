"""Where the names of points go, so that none covers another: geometry in pixels, knows no plot."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # left, bottom, right, top
Point = tuple[float, float]
RINGS = (5, 9, 15, 23, 33, 45, 60, 78, 100, 126, 156)  # gap between a point and its name
ANGLES = tuple(math.pi * k / 12 for k in range(24))
PASSES = 6
COVERED, CROSSED = 60.0, 40.0  # what an overlap and a crossing cost, in pixels of distance


def place(points: Sequence[Point], sizes: Sequence[Point], obstacles: Sequence[Box], frame: Box) -> list[Box]:
    """A box for each name (width, height), near its point and clear of the others, of the obstacles and of the lines
    that lead to the names; inside the frame. The first obstacles are the points' markers, in order. Names are placed
    one by one, then each again given the others until nothing moves."""
    boxes: list[Box | None] = [None] * len(points)
    order = sorted(range(len(points)), key=lambda i: (-points[i][1], points[i][0]))
    for _ in range(PASSES):
        before = list(boxes)
        for i in order:
            others = [(points[j], box) for j, box in enumerate(boxes) if j != i and box is not None]
            markers = [box for j, box in enumerate(obstacles[: len(points)]) if j != i]
            boxes[i] = _cheapest(points[i], sizes[i], others, markers, obstacles, frame)
        if boxes == before:
            break
    return [box for box in boxes if box is not None]


def _cheapest(point: Point, size: Point, others: list[tuple[Point, Box]], markers: Sequence[Box],
              obstacles: Sequence[Box], frame: Box) -> Box:  # fmt: skip
    best, least = None, math.inf
    for box in sorted(_around(point, size), key=lambda box: math.dist(point, nearest(point, box))):
        if math.dist(point, nearest(point, box)) >= least:
            break  # the rest is farther away, and nothing costs less than its distance
        cost = _cost(point, box, others, markers, obstacles, frame)
        if cost < least:
            best, least = box, cost
    assert best is not None
    return best


def nearest(point: Point, box: Box) -> Point:
    """The end of the leading line: the point of the box that is closest."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def _around(point: Point, size: Point) -> list[Box]:
    boxes = []
    for gap in RINGS:
        for angle in ANGLES:
            across, up = math.cos(angle), math.sin(angle)
            x = point[0] + across * (gap + size[0] / 2)
            y = point[1] + up * (gap + size[1] / 2)
            boxes.append((x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2))
    return boxes


def _cost(point: Point, box: Box, others: list[tuple[Point, Box]], markers: Sequence[Box], obstacles: Sequence[Box],
          frame: Box) -> float:  # fmt: skip
    end = nearest(point, box)
    cost = math.dist(point, end)
    if box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]:
        return 1e6 + cost
    cost += COVERED * sum(_covers(box, obstacle, 1) for obstacle in obstacles)
    cost += CROSSED / 2 * sum(_through(point, end, marker) for marker in markers)
    for origin, other in others:
        tip = nearest(origin, other)
        cost += 4 * COVERED * _covers(box, other, 2)
        cost += CROSSED * (_crosses(point, end, origin, tip) + _through(origin, tip, box) + _through(point, end, other))
    return cost


def _covers(one: Box, other: Box, margin: float) -> bool:
    apart = one[2] + margin <= other[0] or other[2] + margin <= one[0]
    return not (apart or one[3] + margin <= other[1] or other[3] + margin <= one[1])


def _through(start: Point, end: Point, box: Box) -> bool:
    """Whether a line passes over a box; its ends may touch it."""
    steps = max(2, int(math.dist(start, end) / 4))
    for k in range(1, steps):
        x = start[0] + (end[0] - start[0]) * k / steps
        y = start[1] + (end[1] - start[1]) * k / steps
        if box[0] < x < box[2] and box[1] < y < box[3]:
            return True
    return False


def _crosses(a: Point, b: Point, c: Point, d: Point) -> bool:
    def side(p: Point, q: Point, r: Point) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
