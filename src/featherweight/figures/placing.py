"""Where the names of points go, so that none lies on another, on a mark or on a line: near is good, overlapping costs more.

Every name has some hundreds of possible places around its point. They are chosen one by one, again and again, each as good as the others
allow, until none moves. There is no chance in it: the same points have the same names at the same places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]
"""Left, lower, right, upper edge."""
RADII = (7.0, 12.0, 18.0, 26.0, 36.0, 48.0, 62.0, 80.0, 100.0, 125.0, 155.0)
DIRECTIONS = 32
ON_NAME, ON_MARK, OUTSIDE, CROSSING, NEARER = 80.0, 80.0, 400.0, 12.0, 4.0
"""What it costs to lie on something, to be cut off, to have another's line through it, or to be nearer to another point than to its own."""
ALONG = np.linspace(0.15, 0.95, 7)
"""Where on the line from a point to its name it is looked at whether something is in its way."""
SWEEPS = 30
MARGIN = 1.5


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], marks: Sequence[Box], frame: Box
) -> list[Box]:
    """A box for the name of each point, inside `frame` where there is room."""
    if not points:
        return []
    choices = [_around(point, size) for point, size in zip(points, sizes, strict=True)]
    alone = [_cost_alone(boxes, marks, frame) + NEARER * _nearer(boxes, points, i) for i, boxes in enumerate(choices)]
    lines = [_line(boxes, point) for boxes, point in zip(choices, points, strict=True)]
    chosen = [int(cost.argmin()) for cost in alone]
    for _ in range(SWEEPS):
        before = list(chosen)
        for i, boxes in enumerate(choices):
            cost = alone[i]
            if rest := [j for j in range(len(choices)) if j != i]:
                names = np.array([choices[j][chosen[j]] for j in rest])
                theirs = np.concatenate([lines[j][chosen[j]] for j in rest])
                crossing = _inside(lines[i], names).sum((1, 2)) + _inside(theirs[None], boxes).sum((0, 1))
                cost = cost + ON_NAME * _overlap(boxes, names) + CROSSING * crossing
            chosen[i] = int(cost.argmin())
        if chosen == before:
            break
    return [tuple(float(edge) for edge in choices[i][chosen[i]]) for i in range(len(points))]  # type: ignore[misc]


def _around(point: tuple[float, float], size: tuple[float, float]) -> np.ndarray:
    """All places of a name, (places, 4), the nearest first: right, then above, then the rest of the circle."""
    (x, y), (width, height) = point, size
    found = []
    for radius in RADII:
        for step in range(DIRECTIONS):
            angle = 2 * math.pi * step / DIRECTIONS
            across, up = math.cos(angle), math.sin(angle)
            left = x + radius * across - width * (1 - across) / 2
            below = y + radius * up - height * (1 - up) / 2
            found.append((left, below, left + width, below + height))
    return np.array(found)


def _cost_alone(boxes: np.ndarray, marks: Sequence[Box], frame: Box) -> np.ndarray:
    """What a place costs whatever the other names do."""
    distance = np.repeat(np.array(RADII), DIRECTIONS)
    tilt = np.tile(np.abs(np.sin(2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS)), len(RADII))
    inside = np.minimum(boxes, np.array(frame))
    inside = np.where([True, True, False, False], np.maximum(boxes, np.array(frame)), inside)
    out = np.abs(boxes - inside).sum(1)
    on_marks = ON_MARK * _overlap(boxes, np.array(marks)) if len(marks) else 0.0
    cost: np.ndarray = 0.05 * distance + 0.3 * tilt + OUTSIDE * (out > 0) + out + on_marks
    return cost


def _nearer(boxes: np.ndarray, points: Sequence[tuple[float, float]], own: int) -> np.ndarray:
    """How many other points each box is nearer to than to its own: whoever reads it would take it for theirs."""
    at = np.array(points)
    beside = np.maximum(np.maximum(boxes[:, None, :2] - at, at - boxes[:, None, 2:]), 0)
    distance = np.hypot(beside[..., 0], beside[..., 1])
    found: np.ndarray = (distance < distance[:, own : own + 1] - 0.5).sum(1)
    return found


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of the others each box lies on, those it covers more counting more."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2] - MARGIN)
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:] + MARGIN)
    both = np.clip(high - low, 0, None)
    area = both[..., 0] * both[..., 1]
    size = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    found: np.ndarray = ((area > 0) * 0.2 + area / size[:, None]).sum(1)
    return found


def _line(boxes: np.ndarray, point: tuple[float, float]) -> np.ndarray:
    """Places on the way from a point to each of its names, (places, along, 2)."""
    start = np.array(point)
    end = np.clip(start, boxes[:, :2], boxes[:, 2:])
    found: np.ndarray = start + ALONG[None, :, None] * (end - start)[:, None, :]
    return found


def _inside(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which (…, along) places are in which boxes: (…, along, boxes)."""
    at = places[..., None, :]
    return np.asarray(((at > boxes[:, :2]) & (at < boxes[:, 2:])).all(-1))


def freest(boxes: Sequence[Box], marks: Sequence[Box]) -> Box:
    """Of some places for one name, the first that lies on least."""
    return boxes[int(_overlap(np.array(boxes), np.array(marks)).argmin())] if marks else boxes[0]


def nearest(box: Box, point: tuple[float, float]) -> tuple[float, float]:
    """The place in a box that is nearest to a point."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])
