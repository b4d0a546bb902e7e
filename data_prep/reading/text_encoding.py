"""In which encoding a text is, and what to do if that is not UTF-8.

    check_text(head, "a.csv")          → 3, the bytes of the UTF-8 mark; UserError with a command if all is CP949
    bad_byte(b"caf\\xe9", 100)          → "invalid UTF-8: byte 0xe9 at byte offset 103 of the file. Read as …"

A file in another encoding from beginning to end is one error; single bytes that are no UTF-8 cost their own row.
"""

import os
import re
import shlex
from pathlib import Path

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.find_files import HEAD_BYTES, EmptyFile, shell_command, suffixes

UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What "surrogateescape" makes of a byte that is no UTF-8."""

LETTERS = re.compile(rb"[A-Za-z\x80-\xff]+")
_SIGNS = "‘’‚“”„‹›«»–—…•·¡¿€£¥§©®™°±²³¹½¼¾×÷´\u00a0\u00ad"
_WORD = "[A-Za-zÀ-ÖØ-öø-þŠšŽžŒœƒªº]+"
WESTERN = re.compile(f"[{_SIGNS}]*(?:{_WORD}(?:[’\u00ad–—…«»\u00a0]+{_WORD})*[{_SIGNS}]*)?")
"""A word of Western Europe in Windows-1252: signs stand around it, few inside. Polish in 1250 would be 'za¿ó³æ'."""


def check_text(head: bytes, name: str, needs_line_feeds: bool = True) -> int:
    """Length of the UTF-8 mark at the beginning of a text. EmptyFile: only blanks are in it; UserError where it is in
    another encoding, a tar archive, or (with `needs_line_feeds`) its lines end in CR alone."""
    nuls = sorted(head[start:256:2].count(0) / max(1, len(head[start:256:2])) for start in (0, 1))
    if head.startswith(UTF16_MARKS) or (len(head) >= 4 and nuls[0] < 0.1 and nuls[1] > 0.4):
        raise UserError(f"{name} is UTF-16, and UTF-8 is due. Convert it: {_conversion(name, 'UTF-16')}")
    if head[257:262] == b"ustar":
        raise UserError(f"{name} holds a tar archive, and nothing is unpacked from it. Unpack it, and name the files.")
    mark = len(UTF8_MARK) if head.startswith(UTF8_MARK) else 0
    if len(head) < HEAD_BYTES and not head[mark:].strip():
        raise EmptyFile(name)
    text = head[: head.rfind(b"\n") + 1] if len(head) >= HEAD_BYTES else head
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding, words = _other_encoding(text, 4, 0.8)
        lines = (
            text.splitlines()
        )  # Western texts are ASCII for the most part: it is an error if many rows would be lost
        are_many = len(words) >= 4 and 10 * sum(not line.isascii() for line in lines) >= len(lines)
        if words and (are_many or encoding == "CP949"):
            shown = ", ".join(repr(word[:40]) for word in list(dict.fromkeys(words))[:3])
            raise UserError(
                f"{name} is not UTF-8 (byte 0x{text[error.start]:02x} at byte offset {error.start}). Read as"
                f" {encoding} its words are {shown} …: if that is right, convert it: {_conversion(name, encoding)}"
            ) from None
    if needs_line_feeds and b"\r" in head.rstrip(b"\r") and b"\n" not in head:
        result = shlex.quote(f"lf-{os.path.basename(name)}")
        raise UserError(
            f"{name}: its lines end in a carriage return (CR) alone, as on old Macs, and a line feed is due. Write it"
            f" so: tr '\\r' '\\n' < {shlex.quote(name)} > {result}"
        )
    return mark


def bad_byte(text: bytes, offset: int) -> str | None:
    """Which byte of a text that begins `offset` bytes into the file is no UTF-8, and what the text is instead."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{text[error.start]:02x} at byte offset {offset + error.start} of the file"
        encoding, words = _other_encoding(text, 2, 0.5)
        other = f" Read as {encoding} it is '{words[0][:12]}': iconv -f {encoding} -t UTF-8." if words else ""
        return f"invalid UTF-8: {where}.{other}"
    return None


def _other_encoding(text: bytes, least: int, share: float) -> tuple[str, list[str]]:
    """CP949 (EUC-KR) for a text with `least` Hangul syllables that are `share` of all that is not ASCII, else
    WINDOWS-1252 (or Latin-1, a part of it); and the words with other letters than ASCII's, none if it is neither.

    In Windows-1252, such letters are the lesser part of such words; if they are more, it is Greek or Russian in an
    encoding of its own. If there is UTF-8 as well ("É»" may look so by chance), no encoding is right for the whole.
    """
    runs = [run for run in LETTERS.findall(text) if not run.isascii()]
    try:
        others = [character for character in text.decode("cp949") if not character.isascii()]
        if sum("\uac00" <= character <= "\ud7a3" for character in others) >= max(least, share * len(others)):
            return "CP949", [run.decode("cp949", "replace") for run in runs]
    except UnicodeDecodeError:
        pass
    utf8 = sum(not character.isascii() for character in text.decode("utf-8", "ignore"))
    try:
        words = [run.decode("cp1252") for run in runs]
    except UnicodeDecodeError:
        return "", []
    letters = [character for word in words for character in word if character.isalpha()]
    is_western = 2 * sum(letter.isascii() for letter in letters) >= len(letters) and all(map(WESTERN.fullmatch, words))
    return "WINDOWS-1252", words if is_western and 20 * utf8 <= len(words) else []


def _conversion(name: str, encoding: str) -> str:
    """A command to paste, whose result has a name that can be read: `iconv -f CP949 -t UTF-8 a.csv > a.utf8.csv`."""
    suffix, packed = suffixes(name)
    stem = name[: -len(Path(name).suffix)] if packed else name
    return shell_command(f"iconv -f {encoding} -t UTF-8", name, f"{stem.removesuffix(Path(stem).suffix)}.utf8{suffix}")
