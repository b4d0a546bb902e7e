"""A text that a template rendered, which knows which of its pieces are the template's own and which are the row's.

    text = Rendered("⟨FRAME_MARK⟩Fill: ⟨FRAME_MARK⟩a </s> b")
    text == "Fill: a </s> b"              as a person reads it
    pieces(text)                          ["", "Fill: ", "a </s> b"]: field, frame, field, frame … field

Where the template's own piece spells a control token, it is that token; where the row's piece does, it is characters
(encode.py). A plain str is one piece of the row.
"""

from __future__ import annotations

from diptych.data_prep.command_line.errors import UserError, excerpt

FRAME_MARK = "\U0010fffe"
"""Stands before and after each piece of a rendered text that is the template's own, in `Rendered.marked`."""
UNSPELLABLE = "\U0010ffff"
"""The first character of each control token's other name, in encode.py. Both are noncharacters: Unicode promises that
they stand in no text, and a text that has one is refused."""


class Rendered(str):
    """It survives pickling, but not a file or a table: there, keep `marked(text)`, and make `from_marked` of it."""

    marked: str

    def __new__(cls, marked: str) -> Rendered:
        text = super().__new__(cls, marked.replace(FRAME_MARK, ""))
        text.marked = marked
        return text

    def __reduce__(self) -> tuple[type[Rendered], tuple[str]]:
        return Rendered, (self.marked,)


def marked(text: str) -> str:
    """The text with its marks, if it has any, for a file or a table."""
    return text.marked if isinstance(text, Rendered) else text


def from_marked(text: str) -> str:
    """The inverse of `marked`. Only for texts that Diptych wrote: marks that a stranger wrote would be believed."""
    return Rendered(text) if FRAME_MARK in text else text


def pieces(text: str) -> list[str]:
    """The row's pieces at even places, the template's at odd ones; a str that is not Rendered is one piece."""
    return text.marked.split(FRAME_MARK) if isinstance(text, Rendered) else [text]


def fields_in(text: str) -> list[str]:
    """The row's pieces that are not empty."""
    return [piece for piece in pieces(text)[::2] if piece]


def check_characters(text: str) -> None:
    """UserError where the text has one of the two characters that are used as marks."""
    if FRAME_MARK in text or UNSPELLABLE in text:
        raise UserError(
            f"a text holds U+10FFFE or U+10FFFF, which are no characters. Remove them. The text: {excerpt(text)}"
        )
