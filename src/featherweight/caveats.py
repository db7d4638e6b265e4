"""What to be told besides an accuracy: labels that look misspelt, an answer that needs no model, a loss too high to have learned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from .errors import nearest, shown
from .scoring import Score, majority
from .task import Task

RARE = 3
"""A label with fewer rows is looked at: it may be a slip of the pen."""


def of_labels(task: Task) -> list[str]:
    """Labels that hardly any row has, with the one that may have been meant."""
    counts = Counter(row.answer for row in (*task.train, *task.validation, *task.test))
    usual = [label for label in task.labels if counts[label] >= RARE]
    words = []
    for label in task.labels:
        if 0 < counts[label] < RARE:
            hint = nearest(label, usual)
            meant = f"; {hint}" if hint.startswith("did you mean") else ""
            words.append(f"the label {shown(label)} has {counts[label]} row{'s' * (counts[label] > 1)} in all{meant}")
    return words


def unlearned(losses: Sequence[float | None], labels: Sequence[str]) -> str | None:
    """Why a training was too short, where the loss of its last quarter is higher than drawing a label by lot gives: ln(number of labels).

    None where it is not. A step whose loss was not finite has none.
    """
    last = [loss for loss in losses[-max(1, len(losses) // 4) :] if loss is not None]
    if not last or not labels or (end := sum(last) / len(last)) <= (by_lot := math.log(len(labels))):
        return None
    return f"its loss at the end was {end:.2f}, and drawing a label by lot would give {by_lot:.2f}"


def of_result(score: Score, task: Task, losses: Sequence[float]) -> list[str]:
    """What to hold an accuracy against, and what to do where it is not better than that."""
    if score.metric != "labels":
        return []
    constant = majority(task)
    share, answer = constant.accuracy, shown(constant.predictions[0])
    words = [f"always answering {answer} would be right for {100 * share:.1f} %"]
    if why := unlearned(losses, task.labels):
        words.append(f"it has not learned enough yet: {why}; train longer (--steps)")
    elif score.accuracy <= share:
        words.append(
            "this adapter is not better than that: train longer (--steps), with more rows, or at another rate (--lr)"
        )
    elif score.interval[0] <= share:
        words.append("with so few test rows the two cannot be told apart")
    return words
