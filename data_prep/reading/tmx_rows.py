"""Translation memories (TMX): a row for each translation unit.

<tu><tuv xml:lang="en"><seg>Go.</seg></tuv><tuv xml:lang="ko"><seg>가.</seg></tuv></tu>
→ Row({"translation": {"en": "Go.", "ko": "가."}}, Origin("memory.tmx", 1), raw)

Each unit is cut out of the text and parsed alone, so a broken one is one Reject, and the file may be of any size. The
parser never sees a DTD: no entity can be declared, and none is fetched. (xml.etree's iterparse, also with defusedxml,
stops at the first broken unit.)
"""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.find_files import HEAD_BYTES, Content, File, Limits
from diptych.data_prep.reading.row_chunks import (
    LONG_ROW_CHARACTERS_KEPT,
    Chunk,
    Rows,
    in_chunks,
    size_if_too_large,
    too_large,
    unreadable,
)
from diptych.data_prep.reading.text_encoding import NOT_UTF8
from diptych.data_prep.reading.text_window import Window
from diptych.data_prep.rows.records import CUT_OFF, Origin, Reject, Row

UNIT_OR_COMMENT = re.compile(r"<tu(?=[\s>/])|<!--")
UNIT_END = re.compile(r"</tu\s*>|<tu(?=[\s>/])")
COMMENT_END = re.compile("-->")
EMPTY_UNIT = re.compile(r"<tu(?:\s[^<>]*)?/>")
ENTITY = re.compile(r"<!ENTITY\s+(?:%\s*)?([^\s>]*)")
ROOT = re.compile(r"<tmx(?:\s[^<>]*)?>")
FIRST_TAG = re.compile(r"<([^\s<>?!/]+)")
BODY = re.compile(r"<body(?:\s[^<>]*)?>")
NAMESPACE = re.compile(r"""\sxmlns\s*=\s*(?:"[^"]*"|'[^']*')""")
NO_TEXT = re.compile(r"</?body\s*>|</tmx\s*>|\s+")
"""What may stand between units, beside comments."""

DECLARED_ENCODING = re.compile(rb"""<\?xml[^>]*\sencoding\s*=\s*["']([\w.:-]+)["']""")
LANGUAGE = ("{http://www.w3.org/XML/1998/namespace}lang", "lang")
CODE_TAGS = frozenset(("bpt", "ept", "it", "ph", "ut"))
"""What stands in them is code of a document format, and is left out. Text in other tags, such as <hi>, is kept."""

UNDECODED = re.compile("\ufffd")
"""What a window makes of bytes that are no text in the file's encoding, if that is not UTF-8."""

LONGEST_MARK = 1024
"""Characters of a tag that may lie on both sides of a window's end."""


def tmx_chunks(file: File, limits: Limits) -> Iterator[Chunk]:
    with Content(file, limits) as content:
        head = content.peek(HEAD_BYTES)
        declared = DECLARED_ENCODING.search(head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1000])
        encoding = declared[1].decode().lower() if declared else "utf-8"
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            encoding = "utf-16"
        try:
            head.decode(encoding, "ignore")
        except (LookupError, UnicodeError) as error:
            raise UserError(f"{file.name}: its encoding cannot be read ({error}). Convert it to UTF-8.") from None
        encoding = "utf-8" if encoding in ("utf8", "us-ascii", "ascii") else encoding
        window = Window(content, 0, limits.block_bytes, encoding)
        yield from in_chunks(TmxRows(window, file.name, limits).rows(), lambda: content.position)


class TmxRows:
    """The units of a TMX file, read through a window."""

    def __init__(self, window: Window, name: str, limits: Limits) -> None:
        self.window, self.name, self.limits, self.row = window, name, limits, 0
        self.root = ""
        """The <tmx …> tag, which may declare prefixes that units use."""

    def rows(self) -> Rows:
        window = self.window
        self._read_prologue()
        while True:
            found = self._find(UNIT_OR_COMMENT)
            end = found.start() if found else len(window.text)
            between, begin, window.at = window.text[window.at : end], window.at, end
            if NO_TEXT.sub("", between):
                yield self._broken(between, begin, "text outside of any unit", begin)
            if found is None:
                if "</tmx" not in between:
                    yield self._cut_off("")
                return
            if found[0] == "<!--":
                window.at = found.end()
                window.at = end.end() if (end := self._find(COMMENT_END)) else len(window.text)
            else:
                unit = self._unit()
                yield unit
                if isinstance(unit, Reject) and unit.kind == CUT_OFF:
                    return
            window.trim()

    def _read_prologue(self) -> None:
        """What stands before <body>."""
        window = self.window
        root = self._find(ROOT)
        head = window.text[: root.start()] if root else window.text
        if entity := ENTITY.search(head):
            raise UserError(
                f"{self.name}, {window.place(entity.start())}: it declares the entity '{entity[1]}', which is how XML"
                " is made to unpack without end or to read other files. Entities are not read: write their text in"
                " their place."
            )
        if root is None and (first := FIRST_TAG.search(head)):
            where = window.place(first.start())
            raise UserError(f"{self.name}, {where}: it begins with <{first[1][:40]}>, and <tmx> is due.")
        if root is None or NOT_UTF8.search(root[0]):
            what = "its tag <tmx> has bytes that are no text" if root else "it has no tag <tmx>"
            raise UserError(f"{self.name} cannot be read as TMX: broken XML: {what}. Correct the file.")
        self.root, window.at = " ".join(NAMESPACE.sub("", root[0]).split()), root.end()
        if body := self._find(BODY):
            window.at = body.end()

    def _find(self, pattern: re.Pattern) -> re.Match | None:
        """The next match; the window grows until there is one."""
        window, search_from = self.window, self.window.at
        while (found := pattern.search(window.text, search_from)) is None:
            search_from = max(search_from, len(window.text) - LONGEST_MARK)
            if len(window.text) - window.at > self.limits.max_row_bytes:
                most = f"{self.limits.max_row_bytes:,} bytes"
                raise UserError(
                    f"{self.name}, {window.place(window.at)}: more than {most} without a <tu>. It is no TMX."
                )
            if not window.more():
                return None
        return found

    def _unit(self) -> Row | Reject:
        """The unit that begins where the window stands; the window goes on to its end."""
        window, head = self.window, ""
        position = window.at + 3
        while True:
            if empty := EMPTY_UNIT.match(window.text, window.at):
                window.at = empty.end()
                return Row({"translation": {}}, self._next_origin(), empty[0])
            if found := UNIT_END.search(window.text, position):
                break
            position = max(position, len(window.text) - LONGEST_MARK)
            if len(window.text) - window.at > self.limits.max_row_bytes:
                head = head or window.text[window.at : window.at + LONG_ROW_CHARACTERS_KEPT]
                window.forget(position)
                window.at = position = 0
            if not window.more():
                raw, window.at = head or window.text[window.at :], len(window.text)
                return self._cut_off(raw[:LONG_ROW_CHARACTERS_KEPT])
        begin, is_nested = window.at, found[0].startswith("<tu")
        window.at = found.start() if is_nested else found.end()
        raw = window.text[begin : window.at]
        if head or size_if_too_large(raw, self.limits):
            return too_large(self._next_origin(), head or raw, None, self.limits)
        if is_nested:
            return self._broken(raw, begin, "a <tu> begins inside another one", window.at)
        return self._parsed(raw, begin)

    def _parsed(self, raw: str, begin: int) -> Row | Reject:
        window = self.window
        if window.has_bad_bytes and (NOT_UTF8 if window.encoding == "utf-8" else UNDECODED).search(raw):
            return self._broken(raw, begin, "bytes that are no text in its encoding", begin)
        try:
            [unit] = ElementTree.fromstring(f"{self.root}{raw}</tmx>")
        except ElementTree.ParseError as error:
            line, column = error.position
            before = sum(len(text) + 1 for text in raw.split("\n")[: line - 1])
            position = begin + before + column - (len(self.root) if line == 1 else 0)
            what = str(error).partition(": line")[0]
            if what.startswith("undefined entity"):
                name = window.text[position:].partition(";")[0][:40] + ";"
                line = window.place(position).partition(",")[0]
                reason = f"{name} at {line} is an entity that is not known; write its text in its place."
                return Reject(self._next_origin(), None, "unknown entity", reason, raw)
            return self._broken(raw, begin, what, position)
        texts: dict[str, str] = {}
        for variant in unit.iter("tuv"):
            language = next((variant.get(name) for name in LANGUAGE if variant.get(name)), "")
            for segment in variant.iter("seg"):
                if not language or language in texts:
                    what = f"has two <tuv> of '{language}'" if language else "has a <tuv> without xml:lang"
                    reason = f"the unit {what}. ({self.window.place(begin).partition(',')[0]})"
                    return Reject(self._next_origin(), language or None, "unclear languages", reason, raw)
                for code in [element for element in segment.iter() if element.tag in CODE_TAGS]:
                    tail = code.tail
                    code.clear()
                    code.tail = tail
                texts[language] = "".join(segment.itertext())
        return Row({"translation": texts}, self._next_origin(), raw)

    def _broken(self, raw: str, begin: int, what: str, position: int) -> Reject:
        offset = self.window.offset(begin) if self.window.has_bad_bytes else None
        fault = f"broken XML: {what}, {self.window.place(position)}."
        return unreadable(self._next_origin(), raw, offset, fault)

    def _cut_off(self, raw: str) -> Reject:
        fault = f"the file ends before </tmx>, {self.window.place(self.window.at)}."
        return Reject(self._next_origin(), None, CUT_OFF, fault, raw)

    def _next_origin(self) -> Origin:
        self.row += 1
        return Origin(self.name, self.row)
