"""The rows that the methods disagree on: where a table of accuracies says little, these say what they are about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..merged import contender
from ..results import Entry, Line, entries
from .tags import Html, foreign, joined, tag

MOST = 20
LONGEST_TEXT, LONGEST_ANSWER = 420, 160


@dataclass(frozen=True)
class Vote:
    """What one row of the table answers, by the majority of its seeds."""

    title: str
    answer: str
    right: bool
    share: str
    """`2 of 3`; nothing where all seeds agree."""


@dataclass(frozen=True)
class Example:
    """One test row with everyone's answer."""

    text: str
    answer: str
    place: str
    votes: list[Vote]

    @property
    def split(self) -> float:
        """How differently it is answered, 0 where all agree: many answers count, and so does right beside wrong."""
        return _impurity([vote.answer for vote in self.votes]) + _impurity([str(vote.right) for vote in self.votes])


def _impurity(of: Sequence[str]) -> float:
    """The chance that two of them are not the same."""
    return 1 - sum((n / len(of)) ** 2 for n in Counter(of).values())


def disagreements(lines: Sequence[Line], tested: Mapping[str, Sequence[Mapping[str, str]]]) -> list[Example]:
    """The rows answered most differently, most of all first; of rows alike, the first. What answers always the same has no vote."""
    found: list[Example] = []
    for name in dict.fromkeys(line.tested for line in lines):
        rows = tested.get(name, ())
        voters = [e for e in entries([x for x in lines if x.tested == name]) if _votes(e, len(rows))]
        if len(voters) > 1:
            votes = [[_vote(e, i) for e in voters] for i in range(len(rows))]
            found += [
                Example(row["text"], row["answer"], row.get("place", ""), v) for row, v in zip(rows, votes, strict=True)
            ]
    split = sorted((e for e in found if e.split > 0), key=lambda e: -e.split)
    return split[:MOST]


def _votes(entry: Entry, n: int) -> bool:
    whole = all(len(run.predictions) == len(run.right) == n > 0 for run in entry.runs)
    return whole and contender(entry.first.name) != "majority"


def _vote(entry: Entry, i: int) -> Vote:
    given = Counter(run.predictions[i] for run in entry.runs)
    answer, n = given.most_common(1)[0]
    right = next(run.right[i] for run in entry.runs if run.predictions[i] == answer)
    return Vote(entry.first.method, answer, right, f"{n} of {len(entry.runs)}" if n < len(entry.runs) else "")


def section(lines: Sequence[Line], tested: Mapping[str, Sequence[Mapping[str, str]]]) -> Html | None:
    """The examples as a part of the page; None where nobody disagrees or the rows are not known."""
    found = disagreements(lines, tested)
    if not found:
        return None
    lead = (
        f"The {len(found)} test rows that the rows of the table answer most differently. Where seeds of a method disagree, the answer is "
        "the majority’s, with its share."
        if len(found) > 1
        else "The one test row that the rows of the table answer differently."
    )
    return joined(tag("p", lead, class_="lead"), tag("ol", *map(_example, found), class_="examples"))


def _example(example: Example) -> Html:
    answers: dict[tuple[str, bool], list[Vote]] = {}
    for vote in sorted(example.votes, key=lambda vote: not vote.right):
        answers.setdefault((vote.answer, vote.right), []).append(vote)
    told = [_answer(answer, right, votes) for (answer, right), votes in answers.items()]
    return tag(
        "li",
        tag("blockquote", foreign(example.text, LONGEST_TEXT), dir="auto"),
        tag("p", "Right answer: ", tag("b", foreign(example.answer, LONGEST_ANSWER)), class_="truth"),
        tag("ul", *told),
    )


def _answer(answer: str, right: bool, votes: Sequence[Vote]) -> Html:
    mark = tag("span", "✓" if right else "✗", class_="mark", aria_hidden="true")
    names = ", ".join(vote.title + (f" ({vote.share})" if vote.share else "") for vote in votes)
    said = foreign(answer, LONGEST_ANSWER) if answer.strip() else tag("i", "nothing")
    word = tag("span", "right" if right else "wrong", class_="verdict")
    return tag("li", mark, tag("span", tag("b", said), " ", word, ": ", names), class_="right" if right else "wrong")
