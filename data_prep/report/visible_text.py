"""Text and tokens as a page shows them: invisible characters, and those that change the writing direction, by number.

token_chips(tokenizer, [3, 1])   [{"id": 3, "text": " Go", "special": False}, {"id": 1, "text": "</s>", …}]
prose("a\\u202eb")               Markup("a<s>U+202E</s>b"), escaped, and shortened where it is long
token_markup(" Go")              Markup("<u>␣</u>Go")
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATES = Path(__file__).parent / "templates"
"""Templates of pages; all use page.css."""

LONGEST_TEXT = 2_000
"""Characters of one text that the page shows; report.json has all of them."""

LONGEST_TOKEN = 60


HIDDEN = (
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufdd0-\ufdef\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U0001fffe\U0001ffff\U0010fffe\U0010ffff\U000e0000-\U000e0fff]"
)
"""Control characters, invisible ones, and those that change the writing direction. The joiners U+200C and U+200D are
not among them: Persian words and emoji families are spelled with them."""

IN_A_TOKEN = HIDDEN + "|[ \n\t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]|^[\u200c\u200d]|[\u200c\u200d]$"
"""In a token, blanks are shown too, and joiners that join nothing."""

BLANKS = {" ": "␣", "\n": "↵", "\t": "⇥"}


def token_chips(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[dict[str, Any]]:
    """[3, 1] → [{"id": 3, "text": " Go", "special": False}, {"id": 1, "text": "</s>", "special": True}].

    Spaces are spaces, whatever the tokenizer writes for them; bytes that are no whole character are `\\xEA`. A label
    that the loss leaves out (-100) has no text.
    """
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    is_byte_level = tokenizer.is_fast and '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
    # Byte-level tokenizers write each byte as one printable character.
    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
    chips = []
    for token_id in map(int, ids):
        token = tokenizer.convert_ids_to_tokens(token_id) if token_id >= 0 else ""
        text = str(token or "")
        if token_id not in special and not is_byte_level:
            text = text.replace("\u2581", " ")
        elif token_id not in special and all(character in bytes_of for character in text):  # else an added token
            raw = bytes(bytes_of[character] for character in text).decode("utf-8", "surrogateescape")
            text = "".join(f"\\x{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in raw)
        chips.append({"id": token_id, "text": text, "special": token_id in special})
    return chips


def visible(text: str) -> str:
    return re.sub(HIDDEN, lambda found: _name_of(found[0]), text)


def _name_of(character: str) -> str:
    return f"U+{ord(character):04X}"


def marked_up(text: str, hidden: str = HIDDEN) -> Markup:
    """Like `visible`, with a frame around each such character, so that it is not taken for text."""
    pieces, end = [], 0
    for found in re.finditer(hidden, text):
        blank = BLANKS.get(found[0])
        mark = Markup("<u>{}</u>").format(blank) if blank else Markup("<s>{}</s>").format(_name_of(found[0]))
        pieces += [escape(text[end : found.start()]), mark]
        end = found.end()
    return Markup("").join([*pieces, escape(text[end:])])


def prose(value: Any, characters: int = LONGEST_TEXT) -> Markup:
    """A text of the data, shortened to so many characters."""
    return Markup("") if value is None else marked_up(shortened(str(value), characters))


def token_markup(text: str | None) -> Markup:
    """One token: blanks have a sign, and a mark that sits on a letter gets a ring to sit on."""
    text = shortened(text or "", LONGEST_TOKEN)
    sits_on_a_letter = text[:1] and unicodedata.category(text[0]) in ("Mn", "Mc", "Me")
    return marked_up("\u25cc" + text if sits_on_a_letter else text, IN_A_TOKEN)


def token_text(text: str) -> str:
    """`token_markup` without markup, for places that take text alone: " Go" → "␣Go"."""
    text = re.sub(IN_A_TOKEN, lambda found: BLANKS.get(found[0]) or _name_of(found[0]), text)
    return shortened(text, LONGEST_TOKEN)


def shortened(text: Any, characters: int = LONGEST_TEXT) -> Any:
    if type(text) is not str or len(text) <= characters:
        return text
    return f"{text[:characters]} … ({len(text) - characters:,} more characters)"
