"""``task.prompt``: a text with places for the columns and one slot, at which the base says a word for the class."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

#: Places of a template that stand for the class: a masked token, or the word that follows.
MASK, ANSWER = "mask", "answer"


@dataclass(frozen=True)
class Piece:
    """A stretch of text, and what follows it: a column's text, a slot, or nothing (None)."""

    text: str
    place: str | None


def pieces_of(template: str) -> list[Piece]:
    """The pieces of a template, ``{{`` and ``}}`` in it read as braces.

    Raises:
        ValueError: a brace without its other half.
    """
    pieces = []
    for text, name, spec, conversion in Formatter().parse(template):
        whole = name and name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        pieces.append(Piece(text, None if name is None else str(whole or "")))
    return pieces


def slot_of(template: str) -> str:
    """:data:`MASK` or :data:`ANSWER`, of a template that has been checked."""
    return next(piece.place for piece in pieces_of(template) if piece.place in (MASK, ANSWER))


def check_template(template: str, columns: Sequence[str]) -> None:
    """See that a template has one slot, and a place for each of ``task.text`` and for nothing else.

    Raises:
        ValueError: naming what is wrong, and the remedy.
    """
    try:
        pieces = pieces_of(template)
    except ValueError as error:
        raise ValueError(f"'prompt' {template!r}: {error}; write a brace that is none of a place's twice") from None
    places = [piece.place for piece in pieces if piece.place is not None]
    slots = [place for place in places if place in (MASK, ANSWER)]
    if not slots:
        raise ValueError(
            f"'prompt' {template!r} has no slot; put {{{MASK}}} (of a masked language model) or, at its end, "
            f"{{{ANSWER}}} where the word for the class stands"
        )
    if len(slots) > 1:
        raise ValueError(f"'prompt' {template!r} has {len(slots)} slots, and an answer is one word; leave one")
    taken = next((name for name in columns if name in (MASK, ANSWER)), None)
    if taken is not None:
        raise ValueError(f"'text' names the column {taken!r}, which is what 'prompt' calls its slot; rename the column")
    _check_places([place for place in places if place not in (MASK, ANSWER)], columns)
    at = places.index(slots[0])
    rest = [piece for piece in pieces if piece.place is None][-1:] if pieces[-1].place is None else []
    if slots == [ANSWER] and (at != len(places) - 1 or any(piece.text.strip() for piece in rest)):
        raise ValueError(f"'prompt' {template!r}: {{{ANSWER}}} is what the model writes next, so it stands at the end")


def _check_places(places: Sequence[str], columns: Sequence[str]) -> None:
    unknown = next((place for place in places if place not in columns), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, [*columns, MASK, ANSWER], 1, 0.6)
        hint = f"did you mean {{{near[0]}}}? It" if near else "It"
        known = ", ".join(f"{{{name}}}" for name in (*columns, MASK, ANSWER))
        raise ValueError(f"'prompt' has a place {{{unknown}}}, which is no column of 'text'; {hint} may have {known}")
    lacks = next((name for name in columns if name not in places), None)
    if lacks is not None:
        raise ValueError(f"'prompt' has no place {{{lacks}}} for that column of 'text'; put it there, or name another")


def check_prompt_keys(cfg: Any) -> None:
    """The keys of a prompt in a task's section, as far as they can be checked without data and model.

    Raises:
        ValueError: naming the key.
    """
    if cfg.prompt is None:
        given = [key for key in ("prompt_base", "label_words", "demonstrations", "demonstrated") if getattr(cfg, key)]
        if given:
            raise ValueError(f"'{given[0]}' is of a task with a 'prompt', which is not set; set it, or remove this")
        return
    if cfg.type != "classification":
        raise ValueError(f"'prompt' asks for classes, and 'type' is {cfg.type!r}; remove it, or set classification")
    if cfg.objective is not None:
        raise ValueError("'prompt' and 'objective' both say how the model is asked; remove one")
    check_template(cfg.prompt, cfg.text)
    if (cfg.prompt_base == "masked") != (slot_of(cfg.prompt) == MASK) and cfg.prompt_base is not None:
        wanted = MASK if cfg.prompt_base == "masked" else ANSWER
        raise ValueError(f"'prompt_base: {cfg.prompt_base}' goes with a slot {{{wanted}}}; change 'prompt', or this")
    if cfg.label_words is None:
        raise ValueError("'label_words' must give a word for every class, or 'auto', which finds them; set it")
    if isinstance(cfg.label_words, str) and cfg.label_words != "auto":
        raise ValueError(f"'label_words: {cfg.label_words}' is one word; give one for every class, or 'auto'")
    if isinstance(cfg.label_words, list | dict):
        _check_words(cfg.label_words, cfg.labels)


def words_by_class(words: list[str] | dict[str, str], labels: list[str] | int | None) -> list[str]:
    """The label words in the order of the classes.

    Args:
        words: a list of them, or a mapping of classes, which then have names, to them.

    Raises:
        ValueError: a class has no word, or a word no class.
    """
    if labels is None:
        return list(words) if isinstance(words, list) else list(words.values())
    names = [str(number) for number in range(labels)] if isinstance(labels, int) else labels
    if isinstance(words, list):
        if len(words) < len(names):
            raise ValueError(f"'label_words' has no word for the class {names[len(words)]!r}; give one for every class")
        if len(words) > len(names):
            raise ValueError(f"'label_words' has {len(words)} words for {len(names)} classes; give one for every class")
        return list(words)
    lacks = next((name for name in names if name not in words), None)
    if lacks is not None:
        raise ValueError(f"'label_words' has no word for the class {lacks!r}; give one for every class")
    odd = next((name for name in words if name not in names), None)
    if odd is not None:
        raise ValueError(f"'label_words' has a word for {odd!r}, and the classes are {', '.join(names)}; remove it")
    return [words[name] for name in names]


def _check_words(words: list[str] | dict[str, str], labels: list[str] | int | None) -> None:
    _check_distinct(words_by_class(words, labels))


def _check_distinct(words: Collection[str]) -> None:
    seen: set[str] = set()
    for word in words:
        if not word.strip():
            raise ValueError("'label_words' has an empty word; give one for every class")
        if word.strip() in seen:
            raise ValueError(f"'label_words' gives {word!r} to two classes; give each its own")
        seen.add(word.strip())
