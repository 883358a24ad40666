"""The audit as a page that a person walks through: one file, without a connection, whatever the texts hold."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np

from tsqlora_scale.audit.findings import Findings
from tsqlora_scale.audit.page_assets import SCRIPT, STYLE
from tsqlora_scale.common.printing import printable, shortened
from tsqlora_scale.tasks import Task

#: samples that are listed: the most suspect of all, and of every label
LISTED, LISTED_OF_LABEL = 1000, 50
#: labels of which that is done, and that the tables show
LABELS = 100
#: groups of copies that are shown, and samples of each
GROUPS, MEMBERS = 50, 4
#: samples off the query that are shown
STRANGERS = 100
#: characters of a text
TEXT = 2000
BINS = 20

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_page(path: Path, findings: Findings, task: Task, *, title: str, top: int = LISTED) -> None:
    """Write the page.

    Args:
        title: of the run.
        top: samples that are listed at most, beside :data:`LISTED_OF_LABEL` of every label.
    """
    with path.open("w", encoding="utf-8") as file:
        for part in page_parts(findings, task, title=title, top=top):
            file.write(part)


def page_parts(findings: Findings, task: Task, *, title: str, top: int) -> Iterator[str]:
    """The page, piece by piece."""
    key = hashlib.sha256(f"{title}\0{task.digest()}".encode()).hexdigest()[:16]
    yield (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Audit: {safe(title)}</title><style>{STYLE}</style></head>\n"
        f'<body data-key="{key}"><h1>Audit of {safe(title)}</h1>\n'
    )
    yield from overview(findings)
    yield from class_tables(findings)
    yield from suspects(findings, task, top=top)
    yield from copies(findings, task)
    yield from strangers(findings, task)
    yield f"<script>{SCRIPT}</script></body></html>\n"


def safe(text: str) -> str:
    """Text of others, for HTML: escaped, control characters as one reads them, line ends as they are."""
    lines = re.split(r"\r\n|\r|\n", text)
    return escape("\n".join(printable(line) for line in lines), quote=True).replace("\t", " ")


def exactly(text: str) -> str:
    """A value that the page hands on, for an attribute: what a reader could not see is written by its number, and comes
    out as it was; what HTML knows no number of, as one reads it."""
    return "".join(_numbered(letter) for letter in text)


def _numbered(letter: str) -> str:
    number = ord(letter)
    if letter.isprintable():
        return escape(letter, quote=True)
    if number == 0 or 0x80 <= number < 0xA0 or 0xD800 <= number < 0xE000:
        return safe(letter)
    return f"&#{number};"


def isolated(text: str, kind: str = "") -> str:
    """Text that may be written from right to left, without an effect on what is around it."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<bdi{attribute}>{safe(text)}</bdi>"


def overview(findings: Findings) -> Iterator[str]:
    """How much is wrong, and how far that can be trusted."""
    tiles = [("samples", f"{len(findings):,}")]
    if findings.share is not None:
        low, high = findings.share.interval()
        tiles.append((f"of the labels are wrong; with 90 % probability {low:.1%} to {high:.1%}",
                      f"{findings.share.share:.1%}"))  # fmt: skip
    if findings.wrong is not None:
        tiles.append(("labels more probably wrong than right", f"{int((findings.wrong >= 0.5).sum()):,}"))
    tiles.append(("copies or near-copies of another sample", f"{sum(len(g) - 1 for g in findings.copies()):,}"))
    if findings.off_query is not None:
        tiles.append(("samples that are probably off the query", f"{len(findings.strangers()):,}"))
    yield '<div class="tiles">'
    yield from (f'<div class="tile"><b>{safe(value)}</b><span>{safe(what)}</span></div>' for what, value in tiles)
    yield "</div>\n"
    if findings.strength.get("weak"):
        yield (
            '<p class="warning">What the samples were judged by hardly tells one label from another: neither the share '
            "nor the order below says much. A stronger base model, or judging by adapters (<code>scoring.audit: "
            "both</code>), may see more.</p>\n"
        )
    if findings.wrong is None:
        yield (
            '<p class="warning">The answers are texts: samples are ordered by their loss under a model that has not '
            "seen them. A large loss may be a wrong answer, or a rare or a long one; it is no probability.</p>\n"
        )
    judged = " and ".join(f"{name} (weight {weight:.2f})" for name, weight in findings.sources.items())
    yield f'<p class="dim">Judged by models that have seen neither the sample nor its copies: {safe(judged)}.</p>\n'
    if findings.wrong is not None:
        yield from histogram(findings.wrong)


def histogram(wrong: np.ndarray) -> Iterator[str]:
    """How many samples have which probability of a wrong label; heights by the root, so that few are seen, too."""
    counts, _ = np.histogram(wrong, bins=BINS, range=(0, 1))
    yield '<h2>Probability that the label is wrong</h2><svg viewBox="0 0 420 120" role="img">'
    for number, count in enumerate(counts.tolist()):
        height = 90 * (count / max(counts.max(), 1)) ** 0.5
        yield (
            f'<rect x="{10 + number * 20}" y="{100 - height:.1f}" width="18" height="{height:.1f}">'
            f"<title>{number / BINS:.2f} to {(number + 1) / BINS:.2f}: {count:,} samples</title></rect>"
        )
    yield '<text x="10" y="115">0</text><text x="205" y="115">0.5</text><text x="403" y="115">1</text></svg>\n'


def class_tables(findings: Findings) -> Iterator[str]:
    """By label; and which label stands where another belongs."""
    classes = findings.classes()
    if not classes or findings.flows is None or findings.names is None:
        return
    yield "<h2>By label</h2><table><tr><th>label</th>"
    for name in ("samples", "expected wrong", "share", "listed as fixes"):
        yield f'<th class="number">{name}</th>'
    yield "<th>most often instead</th></tr>"
    for entry in sorted(classes, key=lambda entry: -entry["share"])[:LABELS]:
        numbers = [f"{entry['samples']:,}", f"{entry['expected wrong']:,}", f"{entry['share']:.1%}", entry["listed"]]
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        yield f"<tr><td>{isolated(entry['label'], 'label')}</td>{cells}<td>{isolated(entry['most often'])}</td></tr>"
    yield "</table>\n<h2>Labels that stand for another</h2><table><tr><th>label given</th><th>probably is</th>"
    yield '<th class="number">expected samples</th></tr>'
    flows = findings.flows * (1 - np.eye(len(findings.flows)))
    for place in np.argsort(-flows, axis=None, kind="stable")[:20].tolist():
        given, right = divmod(place, len(flows))
        if flows[given, right] >= 0.5:
            names = f"<td>{isolated(findings.names[given])}</td><td>{isolated(findings.names[right])}</td>"
            yield f'<tr>{names}<td class="number">{flows[given, right]:.1f}</td></tr>'
    yield "</table>\n"


def listed(findings: Findings, top: int) -> np.ndarray:
    """Places of the samples that the page lists, the most suspect first."""
    order = findings.order()
    chosen = set(order[:top].tolist())
    if findings.names is not None and findings.labels is not None and len(findings.names) <= LABELS:
        ranks = findings.ranks()
        chosen.update(np.flatnonzero(ranks <= min(LISTED_OF_LABEL, top)).tolist())
    return np.array([place for place in order.tolist() if place in chosen], dtype=np.int64)


def suspects(findings: Findings, task: Task, *, top: int) -> Iterator[str]:
    """The list that one walks through."""
    places, reasons = listed(findings, top), dict(findings.fixes())
    yield f"<h2>Suspects</h2><p class='dim'>The {len(places):,} most suspect of {len(findings):,}; audit.csv has all."
    yield (
        '<span class="scripted"> Keys: j next, l previous, r relabel, d drop, k keep. Decisions stay in this browser; '
        "decisions.csv is a file for <code>task.dataset.exclude</code>.</span></p>\n"
    )
    yield from filters(findings)
    yield '<table id="suspects"><thead><tr><th class="number">#</th><th>probability</th><th>text</th><th>label</th>'
    yield '<th>probably</th><th class="scripted">decide</th></tr></thead><tbody>\n'
    ranks = findings.ranks()
    for number, place in enumerate(places.tolist(), 1):
        yield suspect(findings, task, place, number=number, rank=int(ranks[place]), reason=reasons.get(place, ""))
    yield "</tbody></table>\n"


def filters(findings: Findings) -> Iterator[str]:
    """What narrows the list down."""
    names = [] if findings.names is None else findings.names
    options = "".join(f'<option value="={exactly(name)}">{safe(shortened(name, 60))}</option>' for name in names)
    yield '<div class="filters scripted">'
    for key, text in (("label", "label"), ("suggested", "probably")):
        yield f'<label>{text} <select id="{key}"><option value="">any</option>{options}</select></label>'
    yield (
        '<label>at least <input id="least" type="range" min="0" max="100" value="0"> <span id="leastshown"></span>'
        '</label><label>text <input id="search" type="search"></label>'
        '<label><input id="open" type="checkbox"> undecided only</label>'
        '<label>sort by <select id="sort"><option value="number">suspicion</option>'
        '<option value="rank">rank in its label</option><option value="text">text</option></select></label>'
        '<button id="save" type="button">decisions.csv</button> <span id="count" class="dim"></span></div>\n'
    )


def suspect(findings: Findings, task: Task, place: int, *, number: int, rank: int, reason: str) -> str:
    """A row of the list."""
    wrong = None if findings.wrong is None else float(findings.wrong[place])
    label = findings.label(place) or task.answer(place)
    suggested = findings.suggestion(place)
    identity = str(findings.ids[place])
    odds = f"{findings.suspicion[place]:.3f}" if wrong is None else f"{wrong:.0%}"
    bar = "" if wrong is None else f'<span class="bar"><i style="width:{100 * wrong:.0f}%"></i></span>'
    text = task.preview(place)
    choices = "".join(
        f'<button type="button" class="{choice}">{choice}</button> '
        for choice in ("relabel", "drop", "keep")
        if choice != "relabel" or suggested
    )
    return (
        f'<tr data-id="{exactly(identity)}" data-label="{exactly(label)}" data-suggested="{exactly(suggested)}" '
        f'data-p="{"" if wrong is None else f"{wrong:.4f}"}" data-number="{number}" data-rank="{rank}">'
        f'<td class="number">{number}</td><td>{odds}{bar}</td>'
        f'<td class="text" dir="auto">{isolated(shortened(text, TEXT), "whole")}'
        f'<span class="reason">{safe(f"id {identity}" + (f"; {reason}" if reason else ""))}</span></td>'
        f"<td>{isolated(shortened(label, TEXT), 'label')}</td><td>{isolated(suggested, 'label suggested')}</td>"
        f'<td class="choices scripted">{choices}</td></tr>\n'
    )


def copies(findings: Findings, task: Task) -> Iterator[str]:
    """Samples that are the same or nearly so."""
    groups = findings.copies()
    if not groups:
        return
    yield f"<h2>Copies and near-copies</h2><p class='dim'>{min(len(groups), GROUPS):,} of {len(groups):,} groups.</p>"
    yield '<table><tr><th class="number">samples</th><th>text</th><th>labels</th></tr>\n'
    for members in groups[:GROUPS]:
        texts = "<br>".join(member(findings, task, place) for place in members[:MEMBERS].tolist())
        labels = sorted({findings.label(place) or task.answer(place) for place in members[:MEMBERS].tolist()})
        shown = " ".join(isolated(shortened(label, 200), "label") for label in labels)
        yield f'<tr><td class="number">{len(members)}</td><td class="text">{texts}</td><td>{shown}</td></tr>\n'
    yield "</table>\n"


def member(findings: Findings, task: Task, place: int) -> str:
    """A sample of a group of copies."""
    text = isolated(shortened(task.preview(place), TEXT // 4))
    return f'{text} <span class="reason">id {safe(str(findings.ids[place]))}</span>'


def strangers(findings: Findings, task: Task) -> Iterator[str]:
    """Samples that are surest to be off the query."""
    off = findings.off_query
    if off is None:
        return
    places = findings.strangers()[:STRANGERS].tolist()
    yield f"<h2>Off the query</h2><p class='dim'>The {len(places):,} surest; audit.csv has all.</p>"
    yield '<table><tr><th class="number">probability</th><th>text</th><th>label</th></tr>\n'
    for place in places:
        label = isolated(shortened(findings.label(place) or task.answer(place), 200), "label")
        odds = f'<td class="number">{off[place]:.0%}</td>'
        yield f'<tr>{odds}<td class="text">{member(findings, task, place)}</td><td>{label}</td></tr>\n'
    yield "</table>\n"
