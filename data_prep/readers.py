"""From files to raw rows, in chunks of bounded size: a Row for each row that can be read, a Reject for each other one.

    rows.jsonl (.ndjson)  one object a line             rows.json     [{…}, {…}], or an object that holds one such list
    rows.csv              a header line, then records   rows.tsv      likewise, if its first line names columns
                          (without one, if columns are mapped by number: {"1": …, "2": …})
    rows.parquet, .arrow  columns; an Arrow file or stream; a folder saved by `datasets`
    pairs.tsv             first ⇥ second ⇥ …            → {"first": …, "second": …, "column 3": …}
    --aligned a.en a.ko   line N with line N            → {"first": …, "second": …}
    memory.tmx            translation units             → {"translation": {"en": …, "ko": …}}
    hf:user/name[:split]  a data set of the Hub         tatoeba, seed_tasks   ship with the project

Text files may end in .gz or .zst too; folders and globs stand for the files in them. What the fields mean is not
decided here: fields come as they are found.

    for source in open_sources(["data", "more.jsonl.gz"]):
        for chunk in source.chunks():          # picklable: a worker process can do what follows
            for row in chunk.rows(): …

One bad row never loses the others. Broken JSON inside an array is skipped up to the next `}, {` that begins like the
other rows; a quote that is never closed in a csv costs its own line. Only what makes a whole file useless is a
UserError. On one core 100 MB of JSONL take 0.55 s (json.loads of the same lines alone 0.33 s), and 4 MB of memory.
"""

from __future__ import annotations

import functools
import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from diptych.data_prep.chunks import Chunk, Rows, check_encoding
from diptych.data_prep.files import DEFAULT_LIMITS, HEAD_BYTES, File, Found, Limits, check_text, find_files, identify
from diptych.data_prep.read_columns import arrow_chunks, hub_chunks, parquet_chunks
from diptych.data_prep.read_json import SPACE, json_chunks, jsonl_chunks, object_chunks
from diptych.data_prep.read_tables import SEPARATOR_LINE, aligned_chunks, table_chunks, text_chunks, tsv_chunks
from diptych.data_prep.read_tmx import tmx_chunks
from diptych.data_prep.records import UserError

HUB_PREFIX = "hf:"
SAMPLES_FOLDER = Path(__file__).with_name("samples")

KNOWN_COLUMNS = frozenset(
    "instruction input output prompt completion context response source target text summary question answer answers"
    " system category id title document article dialogue query reply translation reference messages conversations"
    " instances history label language source_language target_language highlights src tgt chosen rejected score"
    " input_ids labels attention_mask domain license attribution".split()
)
"""A tsv whose first line has none but these in it begins with a header; any other is parallel text."""

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass(frozen=True)
class Source:
    """One thing to read, known to be there and of a kind that is known."""

    name: str
    """What messages say; also the `file` of its rows' origins."""

    digest: str
    """Of its raw bytes (xxh3_128), or a data set's fingerprint: changes when the content does."""

    bytes: int | None
    """Raw size; None where nobody knows it."""

    read: Callable[[], Iterator[Chunk]] = field(repr=False)
    entry: str = ""
    """What the person wrote, from which one or more sources came."""

    forward: str | None = None
    """The instruction that a shipped sample of parallel text brings along for its first → second direction."""

    backward: str | None = None
    notes: tuple[str, ...] = ()
    """What should be said aloud: files left out, an unusual delimiter, lines where an array was due."""

    def chunks(self) -> Iterator[Chunk]:
        return self.read()

    def rows(self) -> Rows:
        for chunk in self.chunks():
            yield from chunk.rows()


@dataclass(frozen=True)
class Sample:
    """A file that ships with the project; parallel text with an instruction for each direction."""

    file: str
    forward: str | None = None
    backward: str | None = None


SAMPLES = {
    "tatoeba": Sample("tatoeba_eng_kor.tsv", "Translate English to Korean:", "Translate Korean to English:"),
    "seed_tasks": Sample("self_instruct_seed_tasks.jsonl"),
}


# Opening


def open_sources(
    entries: Sequence[str],
    aligned: Sequence[str] = (),
    limits: Limits = DEFAULT_LIMITS,
    numbered: bool = False,
) -> list[Source]:
    """All that is to be read, in the order given; what can be known to be wrong is said here, before anything is read.

    `aligned` is empty or two files. With `numbered`, tables have no header: their columns are "1", "2" and so on. A
    file that comes up twice is read once, with a note.
    """
    sources: list[Source] = []
    for entry in entries:
        sources += _open_entry(entry, limits, numbered)
    sources = _each_once(sources)
    if aligned:
        sources.append(_open_aligned(aligned, limits))
    return sources


def open_evaluation(entries: Sequence[str], limits: Limits = DEFAULT_LIMITS) -> list[Source]:
    """What training is compared with: the same files, and plain ones of a text a line, whose rows are {"text": …}."""
    sources: list[Source] = []
    for entry in entries:
        names = sorted(glob.glob(entry)) or [entry] if is_plain(entry) else [entry]
        for name in names:
            sources += [_open_plain(name, limits)] if is_plain(name) else _open_entry(name, limits)
    return _each_once(sources)


def is_plain(name: str) -> bool:
    """Whether a file has a text a line and nothing else, to judge by its name."""
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".txt")


def _open_plain(entry: str, limits: Limits) -> Source:
    [found], _ = find_files(entry, SAMPLES)
    file = identify(found, any_text=True)
    with file.open(limits) as content:
        head = content.peek(HEAD_BYTES)
    mark = check_text(head, file.name)
    check_encoding(head, file.name)
    return Source(file.name, file.digest, file.bytes, functools.partial(text_chunks, file, limits, mark), entry)


def _open_entry(entry: str, limits: Limits, numbered: bool = False) -> list[Source]:
    if entry.startswith(HUB_PREFIX):
        return [_open_hub(entry, limits)]
    if entry in SAMPLES:
        sample = SAMPLES[entry]
        file = identify(Found(str(SAMPLES_FOLDER / sample.file), sample.file, entry))
        return [_open_file(file, limits, forward=sample.forward, backward=sample.backward)]
    if (Path(entry) / "dataset_dict.json").is_file() or (Path(entry) / "state.json").is_file():
        return _open_saved_dataset(entry, limits)
    found, notes = find_files(entry, SAMPLES)
    sources = [_open_file(identify(file), limits, numbered) for file in found]
    sources[0] = _with_notes(sources[0], notes)
    return sources


def _with_notes(source: Source, notes: Iterable[str]) -> Source:
    return Source(**{**vars(source), "notes": (*source.notes, *notes)})


def _each_once(sources: list[Source]) -> list[Source]:
    kept: dict[str, Source] = {}
    for source in sources:
        place = source.name
        if os.path.exists(source.name):
            found = os.stat(source.name)
            place = f"{found.st_dev}:{found.st_ino}"
        if place in kept:
            first = kept[place]
            note = f"{source.name} (by {source.entry}) is {first.name} (by {first.entry}) once more, and is read once"
            kept[place] = _with_notes(first, [note])
        else:
            kept[place] = source
    return list(kept.values())


def _open_file(file: File, limits: Limits, numbered: bool = False, **more: Any) -> Source:
    """The way to read a file, by its suffix and its beginning."""
    if file.suffix == ".parquet":
        read, notes = parquet_chunks, []
    elif file.suffix == ".arrow":
        read, notes = arrow_chunks, []
    else:
        with file.open(limits) as content:
            head = content.peek(HEAD_BYTES)
        if file.suffix == ".tmx":
            read, notes = tmx_chunks, []
        else:
            mark = check_text(head, file.name)
            check_encoding(head, file.name)
            read, notes = _by_beginning(file, head[mark:].decode("utf-8", "surrogateescape"), numbered)
            read = functools.partial(read, mark=mark)
    read = functools.partial(read, file, limits=limits)
    return Source(file.name, file.digest, file.bytes, read, file.entry, notes=tuple(notes), **more)


def _by_beginning(file: File, head: str, numbered: bool) -> tuple[Callable[..., Iterator[Chunk]], list[str]]:
    if file.suffix == ".csv" or (file.suffix == ".tsv" and numbered):
        delimiter = _delimiter(head) if file.suffix == ".csv" else "\t"
        notes = []
        if delimiter != "," and file.suffix == ".csv":
            notes.append(f"{file.name}: its columns are separated by {DELIMITERS.get(delimiter, repr(delimiter))}")
        if numbered:
            _check_no_header(_first_cells(head, delimiter), file.name)
            notes.append(f"{file.name}: its first line is data, since --map names columns by number")
        return functools.partial(table_chunks, delimiter=delimiter, numbered=numbered), notes
    if file.suffix == ".tsv":
        lines = [line for line in head.split("\n")[:1000] if line.strip()]
        names = [cell.strip().casefold() for cell in lines[0].split("\t")] if lines else []
        if len(names) > 1 and KNOWN_COLUMNS.issuperset(names):
            return functools.partial(table_chunks, delimiter="\t"), []
        return functools.partial(tsv_chunks, columns=_usual_columns(lines, file.name)), []
    layout = _json_layout(head, file)
    by_name = "array" if file.suffix == ".json" else "lines"
    notes = (
        [] if layout in (by_name, "object") else [f"{file.name}: read as {JSON_LAYOUTS[layout]}, in spite of its name"]
    )
    return {"lines": jsonl_chunks, "array": json_chunks, "object": object_chunks}[layout], notes


JSON_LAYOUTS = {"lines": "one JSON object a line", "array": "a JSON array", "object": "a JSON object"}


def _json_layout(head: str, file: File) -> str:
    """lines, array or object: what is in a file counts, not whether it is called .json or .jsonl."""
    start = SPACE.match(head).end()
    whole_lines = [line.strip() for line in head[start:].split("\n")]
    first, others = whole_lines[0], [line for line in whole_lines[1:3] if line]
    second = others[0] if others else ""
    if file.suffix == ".json":
        if head.startswith("[", start):
            return "array"
        if not head.startswith("{", start):
            shown = head[start : start + 1]
            where = f"line {head.count(chr(10), 0, start) + 1}, column {start - head.rfind(chr(10), 0, start)}"
            raise UserError(
                f"{file.name}, {where}: {shown!r} stands here, and an array of objects is due: [{{…}}, {{…}}]. If it"
                " has one object a line, name it .jsonl."
            )
        several = second and (_is_object(first) or (first.endswith("}") and _is_object(second)))
        return "lines" if several else "object"
    if head.startswith("[", start) and not (first.endswith("}") and second.startswith("{")):
        return "array"
    if first == "{" and second and not second.startswith("{"):
        raise UserError(
            f"{file.name}: its first object goes over several lines, and one object a line is due. Write it so:"
            f" jq -c . {file.name} > lines.jsonl. If the file is one object or an array, name it .json."
        )
    return "lines"


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _delimiter(head: str) -> str:
    """The one that Excel's first line `sep=;` names, else the one that splits the header into most known names, then
    into most names; a comma if that decides nothing."""
    if named := SEPARATOR_LINE.match(head):
        return named[1]
    scores = {}
    for delimiter in DELIMITERS:
        cells = _first_cells(head, delimiter)
        known = sum(cell in KNOWN_COLUMNS for cell in cells)
        scores[delimiter] = (known, 1 if known else 0 if delimiter == "|" else len(cells))
    best = max(scores, key=lambda delimiter: (scores[delimiter], delimiter == ","))
    return best


def _first_cells(head: str, delimiter: str) -> list[str]:
    named = SEPARATOR_LINE.match(head)
    header = head[SPACE.match(head, named.end() if named else 0).end() :].split("\n", 1)[0]
    return [cell.strip().strip('"').strip().casefold() for cell in header.split(delimiter)]


def _check_no_header(cells: list[str], name: str) -> None:
    if KNOWN_COLUMNS.issuperset(cells):
        raise UserError(
            f"{name}: --map names columns by number, which is for tables without a header, and the first line here"
            f" names them: {', '.join(cells)}. Map these names."
        )


def _usual_columns(lines: list[str], name: str) -> int:
    [(columns, _)] = Counter(line.count("\t") + 1 for line in lines).most_common(1) or [(1, 0)]
    if columns < 2:
        raise UserError(f"{name} has no tabs between its columns: a line is first ⇥ second ⇥ anything else.")
    return columns


def _open_aligned(names: Sequence[str], limits: Limits) -> Source:
    if len(names) != 2:
        raise UserError(f"--aligned takes two files, and got {len(names)}.")
    files, marks = [], []
    for name in names:
        found, _ = find_files(name)
        if len(found) != 1:
            raise UserError(f"--aligned takes two files, and {name} stands for {len(found)}.")
        files.append(identify(found[0], any_text=True))
        with files[-1].open(limits) as content:
            head = content.peek(HEAD_BYTES)
        marks.append(check_text(head, name))
        check_encoding(head, name)
    if files[0].state[:2] == files[1].state[:2]:
        raise UserError(f"{names[0]} and {names[1]} are the same file: a text is no translation of itself.")
    digest = xxhash.xxh3_128_hexdigest("".join(file.digest for file in files).encode())
    read = functools.partial(aligned_chunks, files, marks, limits)
    name = f"{names[0]} + {names[1]}"
    return Source(name, digest, sum(file.bytes for file in files), read, name)


def _open_saved_dataset(entry: str, limits: Limits) -> list[Source]:
    """A folder that `save_to_disk` wrote: its shards, in the order that it names them."""
    folder = Path(entry)
    parts = sorted(part.parent.name for part in folder.glob("*/state.json"))
    if not (folder / "state.json").is_file():
        splits = ", ".join(str(folder / part) for part in parts) or "none"
        raise UserError(f"{entry} is a saved DatasetDict, with several data sets in it. Name those to read: {splits}.")
    try:
        shards = [shard["filename"] for shard in json.loads((folder / "state.json").read_bytes())["_data_files"]]
        paths = [str(folder / Path(shard).name) for shard in shards]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} does not say which files the data set has: {error!r}.") from None
    return [_open_file(identify(Found(path, path, entry)), limits) for path in paths]


def _open_hub(entry: str, limits: Limits) -> Source:
    import datasets  # takes a second, which only those who read from the Hub should wait

    name, _, split = entry.removeprefix(HUB_PREFIX).partition(":")
    faults = (OSError, ValueError, RuntimeError, RecursionError, datasets.exceptions.DatasetsError)
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except faults as error:
        raise UserError(f"{entry} could not be loaded from the Hub: {error}") from error
    return Source(entry, dataset._fingerprint, None, functools.partial(hub_chunks, dataset, entry, limits), entry)
