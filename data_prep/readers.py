"""From files to raw rows, in chunks of bounded size: a Row for each row that can be read, a Reject for each other one.

    rows.jsonl (.ndjson)  one object a line             rows.json     [{…}, {…}], or an object that holds one such list
    rows.csv              a header line, then records   rows.tsv      likewise, if its first line names columns
                          (without one, if columns are mapped by number: {"1": …, "2": …})
    rows.parquet, .arrow  columns; an Arrow file or stream; a folder saved by `datasets`
    pairs.tsv             first ⇥ second ⇥ …            → {"first": …, "second": …, "column 3": …}; nothing is quoted
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
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from diptych.data_prep.chunks import Chunk, Rows, check_encoding
from diptych.data_prep.files import (
    DEFAULT_LIMITS,
    HEAD_BYTES,
    EmptyFile,
    File,
    Found,
    Limits,
    check_text,
    find_files,
    identify,
)
from diptych.data_prep.read_columns import arrow_chunks, hub_chunks, parquet_chunks
from diptych.data_prep.read_json import SPACE, json_chunks, jsonl_chunks, object_chunks
from diptych.data_prep.read_tables import (
    SEPARATOR_LINE,
    Header,
    aligned_chunks,
    check_header,
    csv_chunks,
    text_chunks,
    tsv_chunks,
)
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

NAME = re.compile(r"\w[\w:-]*(?:\.\w+)*")
QUOTED = re.compile(r'"(?:[^"]|"")*"')

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


def check_entry(entry: str) -> None:
    """UserError where what is to be read is not there; nothing is opened."""
    if not entry.startswith(HUB_PREFIX) and entry not in SAMPLES and not os.path.exists(entry):
        find_files(entry, SAMPLES)


def open_sources(
    entries: Sequence[str],
    aligned: Sequence[str] = (),
    limits: Limits = DEFAULT_LIMITS,
    columns: Collection[str] = (),
) -> list[Source]:
    """All that is to be read, in the order given; what can be known to be wrong is said here, before anything is read.

    `aligned` is empty or two files. `columns` are those that a person names: where a tsv has one in its first line,
    this is its header; where all are numbers, csv and tsv have no header, and their columns are "1", "2" and so on. A
    file that comes up twice is read once, with a note; so are the others where some are empty.
    """
    sources = _open_entries(entries, limits, columns)
    if aligned:
        sources.append(_open_aligned(aligned, limits))
    return sources


def open_evaluation(entries: Sequence[str], limits: Limits = DEFAULT_LIMITS) -> list[Source]:
    """What training is compared with: the same files, and plain ones of a text a line, whose rows are {"text": …}."""
    sources: list[Source] = []
    for entry in entries:
        names = sorted(glob.glob(entry)) or [entry] if is_plain(entry) else [entry]
        for name in names:
            sources += [_open_plain(name, limits)] if is_plain(name) else _open_entries([name], limits)
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


def _open_entries(entries: Sequence[str], limits: Limits, columns: Collection[str] = ()) -> list[Source]:
    """The sources of all entries. An empty file is a note of the first source, unless every file is empty."""
    sources: list[Source] = []
    empty: list[EmptyFile] = []
    for entry in entries:
        sources += _open_entry(entry, limits, columns, empty)
    if empty and not sources:
        raise empty[0]
    if empty:
        sources[0] = _with_notes(sources[0], [f"{file.name} is empty and was not read" for file in empty])
    return _each_once(sources)


def _open_entry(entry: str, limits: Limits, columns: Collection[str], empty: list[EmptyFile]) -> list[Source]:
    """The sources of one entry; its empty files are added to `empty`."""
    if entry.startswith(HUB_PREFIX):
        return [_open_hub(entry, limits)]
    if entry in SAMPLES:
        sample = SAMPLES[entry]
        file = identify(Found(str(SAMPLES_FOLDER / sample.file), sample.file, entry))
        return [replace(_open_file(file, limits), forward=sample.forward, backward=sample.backward, notes=())]
    if (Path(entry) / "dataset_dict.json").is_file() or (Path(entry) / "state.json").is_file():
        return _open_saved_dataset(entry, limits)
    found, notes = find_files(entry, SAMPLES)
    sources: list[Source] = []
    for file in found:
        try:
            sources.append(_open_file(identify(file), limits, columns))
        except EmptyFile as error:
            empty.append(error)
    if sources:
        sources[0] = _with_notes(sources[0], notes)
    return sources


def _with_notes(source: Source, notes: Iterable[str]) -> Source:
    return replace(source, notes=(*source.notes, *notes))


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


def _open_file(file: File, limits: Limits, columns: Collection[str] = ()) -> Source:
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
            read, notes = _by_beginning(file, head[mark:].decode("utf-8", "surrogateescape"), columns)
            read = functools.partial(read, mark=mark)
    read = functools.partial(read, file, limits=limits)
    return Source(file.name, file.digest, file.bytes, read, file.entry, notes=tuple(notes))


def _by_beginning(file: File, head: str, columns: Collection[str]) -> tuple[Callable[..., Iterator[Chunk]], list[str]]:
    if file.suffix == ".tsv":
        header, notes = _tsv_header(head, file.name, columns)
        return functools.partial(tsv_chunks, header=header), notes
    if file.suffix == ".csv":
        delimiter, notes, numbered = _delimiter(head), [], _are_numbers(columns)
        if delimiter != ",":
            notes.append(f"{file.name}: its columns are separated by {DELIMITERS.get(delimiter, repr(delimiter))}")
        if numbered:
            _check_no_header(_first_cells(head, delimiter), file.name)
            notes.append(f"{file.name}: {FIRST_LINE_IS_DATA}")
        return functools.partial(csv_chunks, delimiter=delimiter, numbered=numbered), notes
    layout = _json_layout(head, file)
    by_name = "array" if file.suffix == ".json" else "lines"
    notes = (
        [] if layout in (by_name, "object") else [f"{file.name}: read as {JSON_LAYOUTS[layout]}, in spite of its name"]
    )
    return {"lines": jsonl_chunks, "array": json_chunks, "object": object_chunks}[layout], notes


FIRST_LINE_IS_DATA = "its first line is data, since --map names columns by number"


def _are_numbers(columns: Collection[str]) -> bool:
    return bool(columns) and all(column.isdecimal() for column in columns)


def _tsv_header(head: str, name: str, columns: Collection[str]) -> tuple[Header, list[str]]:
    """A first line is a header if `columns`, which --map names, are in it, or if it has names that data sets give
    their columns. What it is taken for is said."""
    lines = [(number, line) for number, line in enumerate(head.split("\n")[:1000], 1) if line.strip()]
    if lines and SEPARATOR_LINE.fullmatch(f"{lines[0][1]}\n"):
        del lines[0]
    number, first = lines[0] if lines else (1, "")
    cells = [cell.strip() for cell in first.split("\t")]
    texts = [line for _, line in lines]
    notes = _quoting_note(texts, name)
    if _are_numbers(columns):
        _check_no_header([cell.casefold() for cell in cells], name)
        return Header.numbered(_usual_columns(texts, name)), [*notes, f"{name}: {FIRST_LINE_IS_DATA}"]
    if any(cell in columns for cell in cells) or _names_columns(cells):
        header = Header.of_cells(cells, number)
        check_header(header, first, name, None)
        return header, [*notes, f"{name}: its first line names the columns: {', '.join(header.names)}"]
    header = Header.of_pairs(_usual_columns(texts, name))
    note = f"{name}: its first line is taken for a pair, {cells[0][:40]!r} and {''.join(cells[1:2])[:40]!r}"
    if all(NAME.fullmatch(cell) for cell in cells[:2]):
        note += f"; if it names columns, --map first={cells[0]} second={cells[1]} makes it the header"
    return header, [*notes, note]


def _names_columns(cells: list[str]) -> bool:
    """Whether two cells are names that data sets give to columns, and the others look like names too."""
    names = {cell.casefold() for cell in cells if cell}
    return len(names & KNOWN_COLUMNS) >= 2 and all(map(NAME.fullmatch, names))


def _quoting_note(lines: list[str], name: str) -> list[str]:
    """Some programs quote in a tsv as in a csv. Whether that is so is for a person to say."""
    cells = [line.rstrip("\r").split("\t") for line in lines[:100]]
    is_first_quoted = bool(cells) and all(map(QUOTED.fullmatch, cells[0]))
    if is_first_quoted or any(QUOTED.fullmatch(cell) and '""' in cell[1:-1] for line in cells for cell in line):
        return [
            f"{name}: some cells look quoted as in a csv. A tsv has no quoting, so the quote marks are read as text."
            " If they quote, name the file .csv"
        ]
    return []


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
