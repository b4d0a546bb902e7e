"""Splitters of sentences on paragraphs of known sentences: which ends each finds, and whether it changes the text.

    python benchmarks/sentence_ends.py jhe-koen-dev.en en jhe-koen-dev.ko ko

Each file has a sentence on each line; paragraphs are 3 to 6 lines, joined by blanks. icu4py and pysbd are compared if
they are installed.
"""

import importlib.util
import random
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from diptych.data_prep.text_to_ids.sentences import sentences_of

PYSBD_HAS = ("en", "ar", "zh", "ja")
"""Of the languages that were compared; others are split by its English rules."""


def splitters(language: str) -> dict[str, Callable[[str], list[str]]]:
    found: dict[str, Callable[[str], list[str]]] = {"diptych": lambda text: sentences_of(text, language)}
    if importlib.util.find_spec("icu4py"):
        from icu4py.breakers import SentenceBreaker

        found["ICU"] = lambda text: list(SentenceBreaker(text, language))
        found["ICU, ss=standard"] = lambda text: list(SentenceBreaker(text, f"{language}@ss=standard"))
    if importlib.util.find_spec("pysbd"):
        import pysbd

        by = pysbd.Segmenter(language=language if language in PYSBD_HAS else "en", clean=False)
        found["pysbd"] = by.segment
    return found


def ends(parts: list[str]) -> set[int]:
    """Where sentences end, in characters without white space; the end of the paragraph is left out."""
    lengths = [len("".join(part.split())) for part in parts]
    return set(list(accumulate(lengths))[:-1])


def main() -> None:
    for file, language in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        draw, lines = random.Random(0), Path(file).read_text(encoding="utf-8").splitlines()
        paragraphs = [lines[start : start + draw.randint(3, 6)] for start in range(0, len(lines) - 20, 4)]
        for name, split in splitters(language).items():
            right = found = known = changed = 0
            began = time.perf_counter()
            for paragraph in paragraphs:
                text = " ".join(paragraph)
                parts = split(text)
                changed += "".join(parts) != text
                right += len(ends(parts) & ends(paragraph))
                found, known = found + len(ends(parts)), known + len(ends(paragraph))
            seconds = time.perf_counter() - began
            print(
                f"{language} {name:17} right {right / found:.1%} found {right / known:.1%} "
                f"changed {changed} of {len(paragraphs)} paragraphs, {seconds:.2f} s"
            )


if __name__ == "__main__":
    main()
