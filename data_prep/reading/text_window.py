"""A part of a long text that moves over it, so that a file of any size is read in little memory.

window = Window(content, mark, block_bytes=262_144)
window.more()                → the next block is added to window.text
window.place(12)             → "line 3, column 4" of the file, wherever the window stands
window.forget(10)            → the first 10 characters leave the window
"""

import codecs
import re

from diptych.data_prep.reading.find_files import Content

SPACE = re.compile(r"[ \t\r\n]*")


class Window:
    """`text` is the part, and `at` the position in it up to which the text was read.

    Bytes that are no UTF-8 become surrogates (`has_bad_bytes`); in another encoding they become U+FFFD.
    """

    def __init__(self, content: Content, mark: int, block_bytes: int, encoding: str = "utf-8") -> None:
        content.read(mark)
        self.text, self.at, self.has_bad_bytes, self.ended = "", 0, False, False
        self._content, self._block_bytes, self.encoding = content, block_bytes, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._bytes_before, self._characters_before = mark, 0
        self._lines_before, self._column_before = 0, 0

    def more(self) -> bool:
        """Grow by a block, or double what is still needed; False at the end."""
        if self.ended:
            return False
        block = self._content.read(max(self._block_bytes, len(self.text) - self.at))
        self.ended = not block
        try:
            text = self._decoder.decode(block, self.ended)
        except UnicodeDecodeError:
            self._decoder.errors = "surrogateescape" if self.encoding == "utf-8" else "replace"
            self.has_bad_bytes = True
            text = self._decoder.decode(block, self.ended)
        self.text += text
        return bool(text) or self.more()

    def trim(self) -> None:
        """Forget what was read, if that is most of the window; for less, the copy costs more than it saves."""
        if 2 * self.at > len(self.text) and self.at:
            self.forget(self.at)

    def forget(self, position: int) -> None:
        gone = self.text[:position]
        self._bytes_before += self._bytes_of(gone)
        self._characters_before += position
        line_end = gone.rfind("\n")
        self._column_before = len(gone) - line_end - 1 if line_end >= 0 else self._column_before + len(gone)
        self._lines_before += gone.count("\n")
        self.text, self.at = self.text[position:], max(0, self.at - position)

    def characters_read(self) -> int:
        """Of the whole text, up to where reading stands."""
        return self._characters_before + self.at

    def next_character(self) -> str:
        """Go to the first character that is no blank, and return it; "" at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            self.trim()
            if not self.more():
                return ""

    def place(self, position: int) -> str:
        line = self._lines_before + self.text.count("\n", 0, position) + 1
        line_end = self.text.rfind("\n", 0, position)
        column = position - line_end if line_end >= 0 else self._column_before + position + 1
        return f"line {line}, column {column}"

    def offset(self, position: int) -> int:
        """The byte of the unpacked file."""
        return self._bytes_before + self._bytes_of(self.text[:position])

    def _bytes_of(self, text: str) -> int:
        if self.encoding != "utf-8":
            return 0  # nobody asks for offsets in other encodings
        return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))
