"""Near duplicates by MinHash against brute-force Jaccard: which rows each removes, and in what time.

    python benchmarks/near_duplicates.py                         the shipped Tatoeba sample
    python benchmarks/near_duplicates.py rows.json pairs.tsv     Alpaca rows, or source ⇥ target, of a file

Half of the rows are the file's, half are copies with one to six seeded edits (a letter, a word, a sign). Brute force
compares each row with every earlier row that stays, by the true Jaccard similarity of their shingles. Recall: of the
rows that it removes, how many MinHash removes as well; precision: the other way round.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy

from diptych.data_prep.cleaning.duplicates import SHINGLE_SIZE, near_duplicates, shingles_of, signatures
from diptych.data_prep.cleaning.splits import normalise
from diptych.data_prep.reading.sources import SAMPLES_FOLDER

THRESHOLDS = (0.7, 0.8, 0.9)
MOST_EDITS = 6


def texts_of(path: Path) -> list[str]:
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        texts = [f"{row['input'] or row['instruction']}\n{row['output']}" for row in rows]
    else:
        texts = ["\n".join(line.split("\t")[:2]) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({normalise(text): text for text in texts}.values())  # exact duplicates are another stage's


def with_edits(texts: list[str], rows: int) -> list[str]:
    """`rows` texts, of which every second one is an edited copy of another."""
    draw = random.Random(0)
    texts = draw.sample(texts, min(len(texts), rows // 2))
    words = " ".join(texts).split()
    return draw.sample([*texts, *(edited(text, words, draw) for text in texts)], 2 * len(texts))


def edited(text: str, words: list[str], draw: random.Random) -> str:
    for _ in range(draw.randint(1, MOST_EDITS)):
        place = draw.randrange(len(text) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            text = text[:place] + text[place + 1 :]
        elif kind == 1:
            text = text[:place] + draw.choice("aeiouのに는이") + text[place:]
        elif kind == 2:
            text = f"{text} {draw.choice(words)}"
        else:
            text = text[:place] + draw.choice([".", "!", " "]) + text[place:]
    return text


def brute_force(texts: list[str], size: int, threshold: float) -> list[int]:
    """The slow twin of `near_duplicates`."""
    sets = [shingles_of(text, size) for text in texts]
    kept, found = [], []
    for row, own in enumerate(sets):
        alike = next((other for other in kept if jaccard(own, sets[other]) >= threshold), -1)
        found.append(alike)
        if alike < 0:
            kept.append(row)
    return found


def jaccard(first: set[str], second: set[str]) -> float:
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def measure(name: str, texts: list[str], size: int) -> list[dict]:
    started = time.perf_counter()
    marks = signatures(texts, size)
    marked = time.perf_counter() - started
    results = []
    for threshold in THRESHOLDS:
        started = time.perf_counter()
        true = numpy.array(brute_force(texts, size, threshold)) >= 0
        slow = time.perf_counter() - started
        started = time.perf_counter()
        found = near_duplicates(marks, threshold, texts.__getitem__, size) >= 0
        results.append(
            {
                "data": name,
                "shingles": f"{size} characters",
                "rows": len(texts),
                "threshold": threshold,
                "removed": int(found.sum()),
                "removed_by_brute_force": int(true.sum()),
                "recall": round(float((found & true).sum() / max(1, true.sum())), 4),
                "precision": round(float((found & true).sum() / max(1, found.sum())), 4),
                "seconds": round(marked + time.perf_counter() - started, 3),
                "seconds_of_brute_force": round(slow, 3),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=[SAMPLES_FOLDER / "tatoeba_eng_kor.tsv"])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--shingle_size", type=int, default=SHINGLE_SIZE, help="characters")
    arguments = parser.parse_args()
    results = []
    print(f"{'':24}{'rows':>6}{'threshold':>11}{'recall':>8}{'precision':>11}{'time':>9}{'brute force':>13}")
    for path in arguments.files:
        for found in measure(path.stem, with_edits(texts_of(path), arguments.rows), arguments.shingle_size):
            results.append(found)
            case = f"{found['data']:24}{found['rows']:>6,}{found['threshold']:>11}"
            quality = f"{found['recall']:>8.1%}{found['precision']:>11.1%}"
            time_taken = f"{found['seconds']:>7.2f} s{found['seconds_of_brute_force']:>11.1f} s"
            print(case + quality + time_taken, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
