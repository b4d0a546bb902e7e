"""From files to raw rows, in chunks of bounded size: a Row for each row that can be read, a Reject for each other one.

    rows.jsonl (.ndjson)  one object a line             rows.json     [{…}, {…}], or an object that holds one such list
    rows.csv              a header line, then records   rows.tsv      likewise, if its first line names columns
                          (without one, if columns are mapped by number: {"1": …, "2": …})
    rows.parquet, .arrow  columns; an Arrow file or stream; a folder saved by `datasets`
    pairs.tsv             first ⇥ second ⇥ …            → {"first": …, "second": …, "column 3": …}; nothing is quoted
    a.en+a.ko             two aligned files: line N with line N  → {"first": …, "second": …}
    memory.tmx            translation units             → {"translation": {"en": …, "ko": …}}
    hf:user/name[:split]  a data set of the Hub         tatoeba, cmudict, seed_tasks   ship with the project

Text files may end in .gz or .zst too; folders and globs stand for the files in them. A folder, a saved DatasetDict
and a Hub data set are read by their splits, which follow from the names of their parts (named_splits.py). Fields are
returned as they are found; what they mean is decided in rows/.

    for source in open_sources(["data", "more.jsonl.gz"]):
        for chunk in source.chunks():          # picklable: a worker process can do what follows
            for row in chunk.rows(): …

A bad row is one Reject, and all others are read. Broken JSON inside an array is skipped up to the next object that
begins like the other rows; a quote that is never closed in a csv rejects its own line. Only a file that is useless as
a whole is a UserError. On one core 100 MB of JSONL take 0.55 s (json.loads of the same lines alone 0.33 s), and 4 MB
of memory."""

import functools
import glob
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from diptych.data_prep.command_line.errors import UserError, counted, excerpt
from diptych.data_prep.reading.column_rows import hub_chunks
from diptych.data_prep.reading.file_layout import reader_of
from diptych.data_prep.reading.find_files import (
    DEFAULT_LIMITS,
    HEAD_BYTES,
    Content,
    EmptyFile,
    File,
    Found,
    Limits,
    find_files,
    identify,
)
from diptych.data_prep.reading.lines import line_chunks
from diptych.data_prep.reading.row_chunks import Chunk, Rows
from diptych.data_prep.reading.table_rows import aligned_chunks, text_row
from diptych.data_prep.reading.text_encoding import check_text
from diptych.data_prep.rows.language_names import languages_of_files
from diptych.data_prep.rows.named_splits import DOUBTFUL, HELD_OUT, KINDS, kind_in_name, kind_of, named

HUB_PREFIX = "hf:"
ALIGNED_BY = "+"
TRAIN = KINDS[0]
FILES_NAMED = 3
"""Of many with one split, in a note."""
SAMPLES_FOLDER = Path(__file__).with_name("samples")


@dataclass(frozen=True)
class Source:
    """One thing to read: it exists, and its kind is known."""

    name: str
    """Its name in messages; also the `file` of its rows' origins."""
    digest: str
    """Of its raw bytes (xxh3_128), or a data set's fingerprint: it changes if the content does."""
    bytes: int | None
    """Raw size; None if it is not known."""
    chunks: Callable[[], Iterator[Chunk]] = field(repr=False)
    entry: str = ""
    """The entry of the command line that it belongs to."""
    forward: str | None = None
    """The instruction of a shipped sample of parallel text for its first → second direction."""
    backward: str | None = None
    languages: tuple[str, ...] = ()
    """Of the first side and of the second: of such a sample, or of two aligned files if their names have them."""
    notes: tuple[str, ...] = ()
    """What is printed about it: files left out, an unusual delimiter, lines instead of an array."""
    split: str = ""
    """Which split its rows are for: train, validation, test/news. While sources are opened, the split that its name
    means; "" if it means none."""

    def rows(self) -> Rows:
        for chunk in self.chunks():
            yield from chunk.rows()


@dataclass(frozen=True)
class Sample:
    """A file that ships with the project; parallel text with an instruction for each direction."""

    file: str
    forward: str | None = None
    backward: str | None = None
    languages: tuple[str, ...] = ()


SAMPLES = {
    "tatoeba": Sample(
        "tatoeba_eng_kor.tsv", "Translate English to Korean:", "Translate Korean to English:", ("en", "ko")
    ),
    "cmudict": Sample("cmudict.tsv.zst", "Pronounce:"),
    "seed_tasks": Sample("self_instruct_seed_tasks.jsonl"),
}


# Opening


def check_entry(entry: str) -> None:
    """UserError if what is to be read is not there; nothing is opened."""
    if not (entry.startswith(HUB_PREFIX) or entry in SAMPLES or _aligned_pair(entry)):
        find_files(entry, SAMPLES)


def _aligned_pair(entry: str) -> list[str]:
    """The two files of `a.en+a.ko`; none if this is no pair of files."""
    pair = [os.path.expanduser(name) for name in entry.split(ALIGNED_BY)]
    is_pair = len(pair) == 2 and not os.path.lexists(entry) and all(map(os.path.isfile, pair))
    return pair if is_pair else []


def open_sources(
    entries: Sequence[str],
    aligned: Sequence[str] = (),
    limits: Limits = DEFAULT_LIMITS,
    columns: Collection[str] = (),
    held_out: Mapping[str, Sequence[str]] | None = None,
) -> list[Source]:
    """All that is to be read, each with its split: first train, then what is held out, in the order given. Mistakes
    that can be found without reading are errors here.

    `aligned` is empty or two files. `columns` are those that a person names: a tsv that has one of them in its first
    line has a header there; if all are numbers, csv and tsv have no header, and their columns are "1", "2" and so on.
    `held_out` are the entries that were named for validation and for test, as SOURCE or NAME=SOURCE. A file that comes
    up twice in a split is read once, with a note; empty files among others are left out with a note.
    """
    given = {
        kind: _open_held_out(kind, named_for, limits, columns)
        for kind, named_for in (held_out or {}).items()
        if named_for
    }
    read = _without_given(_by_splits(_open_entries(entries, limits, columns)), given)
    if aligned:
        read.append(replace(_open_aligned(aligned, limits), split=TRAIN))
    if entries and all(source.split != TRAIN for source in read):
        raise UserError(
            f"{' and '.join(entries)}: nothing is left to train on ({_parts(read) or 'no file'}, by the names). To"
            " train on it, name the files themselves in --data; to evaluate alone, give it as --test, not as --data."
        )
    order = [source for kind in KINDS for source in (*read, *given.get(kind, ())) if kind_of(source.split) == kind]
    return _each_once(order)


def _open_held_out(kind: str, entries: Sequence[str], limits: Limits, columns: Collection[str]) -> list[Source]:
    """What was named for validation or for test. If the names of its parts mean several splits, only this one is
    read."""
    sources: list[Source] = []
    for name, entry in map(named, entries):
        found = _open_entries([entry], limits, columns)
        others = [source for source in found if source.split not in ("", DOUBTFUL, kind)]
        own = [source for source in found if source.split == kind] if others else found
        if not own:
            raise UserError(
                f"--{kind} {entry}: nothing in it is called {kind} ({_parts(found)}, by their names). Name the file or"
                " the split that is meant."
            )
        if others:
            left_out = [source for source in found if source not in own]
            notes = [note for source in left_out for note in source.notes]
            notes.append(f"of {entry}, only what is called {kind} is read: not {_named_few(left_out)}")
            own[0] = _with_notes(own[0], notes)
        sources += [replace(source, split=f"{kind}/{name}" if name else kind) for source in own]
    names = {source.split for source in sources}
    if len(names) > 1 and kind in names:
        unnamed = next(source for source in sources if source.split == kind)
        raise UserError(
            f"--{kind} has sets with a name and {unnamed.entry} without one. Give each a name (--{kind} news=a.jsonl"
            " medical=b.jsonl), or none: then all are one set."
        )
    return sources


def _by_splits(sources: list[Source]) -> list[Source]:
    """What was named to train on: a part whose name does not mean that it is held out is train. UserError: a name may
    mean it or not."""
    for source in sources:
        if source.split == DOUBTFUL:
            raise UserError(
                f"{source.name}: its name does not say whether {source.entry} has it to train on, or to be held out."
                f" Name the files to train on themselves in --data, and what is held out in --validation and --test;"
                f" or rename the file to train…, validation… or test…."
            )
    kept = [replace(source, split=source.split or TRAIN) for source in sources]
    for entry in dict.fromkeys(source.entry for source in kept):
        own = [source for source in kept if source.entry == entry]
        if any(source.split != TRAIN for source in own):
            place = kept.index(next((source for source in own if source.split == TRAIN), own[0]))
            kept[place] = _with_notes(kept[place], [f"{entry} is read by the names in it: {_parts(own)}"])
    return kept


def _without_given(sources: list[Source], given: Mapping[str, Sequence[Source]]) -> list[Source]:
    """What was named to train on, without what --validation and --test name or replace."""
    places = {_place(source): source for held_out in given.values() for source in held_out}
    kept, notes = [], []
    for source in sources:
        if other := places.get(_place(source)):
            kind = kind_of(other.split)
            if source.split == TRAIN and source.entry == source.name:
                raise UserError(f"{source.name} is in --data and in --{kind}. Take it out of one of them.")
            if source.split != kind:
                notes.append(f"{source.name} is {other.split}, as --{kind} says, and not {source.split}")
        elif source.split in given:
            notes.append(f"{source.name} is not read: --{source.split} names what is {source.split} instead")
        else:
            kept.append(source)
            continue
        notes += source.notes
    if kept:
        kept[0] = _with_notes(kept[0], notes)
    return kept


def _parts(sources: Sequence[Source]) -> str:
    """`train is a.jsonl; test is test.jsonl`."""
    of = {kind: [source for source in sources if source.split == kind] for kind in (*KINDS, "")}
    return "; ".join(f"{kind or 'of no split'} is {_named_few(own)}" for kind, own in of.items() if own)


def _named_few(sources: Sequence[Source]) -> str:
    names = ", ".join(source.name for source in sources[:FILES_NAMED])
    return names + (f" and {len(sources) - FILES_NAMED:,} more" if len(sources) > FILES_NAMED else "")


def open_evaluation(entries: Sequence[str], limits: Limits = DEFAULT_LIMITS) -> list[Source]:
    """What training is compared with: the same kinds of files, and plain ones with a text a line: {"text": …}."""
    sources: list[Source] = []
    for entry in entries:
        names = sorted(glob.glob(entry)) or [entry] if is_plain(entry) else [entry]
        for name in names:
            found = [open_plain(name, limits)] if is_plain(name) else _open_entries([name], limits)
            held_out = [source for source in found if source.split in HELD_OUT]
            if 0 < len(held_out) < len(found):  # without the train split: training would be compared with itself
                left_out = [source for source in found if source not in held_out]
                note = f"training is not compared with {_named_few(left_out)}"
                found = [_with_notes(held_out[0], [note]), *held_out[1:]]
            sources += found
    return _each_once(sources)


def is_plain(name: str) -> bool:
    """Whether a file has a text a line and nothing else, to judge by its name."""
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".txt")


def open_plain(entry: str, limits: Limits = DEFAULT_LIMITS) -> Source:
    """A file with a text a line, whatever it is called; blank lines are none."""
    [found], _ = find_files(entry, SAMPLES)
    file, mark = _open_texts(found, limits)
    chunks = functools.partial(line_chunks, file, limits, mark, text_row)
    return Source(file.name, file.digest, file.bytes, chunks, entry)


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
    """The sources of one entry, each with the split that its name inside of the entry means. Empty files are added to
    `empty`."""
    if entry.startswith(HUB_PREFIX):
        return _open_hub(entry, limits)
    if entry in SAMPLES:
        sample = SAMPLES[entry]
        file = identify(Found(str(SAMPLES_FOLDER / sample.file), sample.file, entry))
        brought = {"forward": sample.forward, "backward": sample.backward, "languages": sample.languages}
        return [replace(_open_file(file, limits), **brought, notes=())]
    if (Path(entry) / "dataset_dict.json").is_file() or (Path(entry) / "state.json").is_file():
        return _open_saved_dataset(entry, limits)
    if pair := _aligned_pair(entry):
        return [replace(_open_aligned(pair, limits), entry=entry)]
    found, notes = find_files(entry, SAMPLES)
    sources = []
    for file in found:
        try:
            sources.append(replace(_open_file(identify(file), limits, columns), split=kind_in_name(file.inside)))
        except EmptyFile as error:
            empty.append(error)
    if sources:
        sources[0] = _with_notes(sources[0], notes)
    return sources


def _with_notes(source: Source, notes: Iterable[str]) -> Source:
    return replace(source, notes=(*source.notes, *notes))


def _place(source: Source) -> str:
    """The same for the same file under any name."""
    if not os.path.exists(source.name):
        return source.name
    found = os.stat(source.name)
    return f"{found.st_dev}:{found.st_ino}"


def _each_once(sources: list[Source]) -> list[Source]:
    kept: dict[tuple[str, str], Source] = {}
    for source in sources:
        place = (_place(source), source.split)
        if place in kept:
            first = kept[place]
            note = f"{source.name} (by {source.entry}) is {first.name} (by {first.entry}) once more, and is read once"
            kept[place] = _with_notes(first, [note])
        else:
            kept[place] = source
    return list(kept.values())


def _open_file(file: File, limits: Limits, columns: Collection[str] = ()) -> Source:
    read, notes = reader_of(file, limits, columns)
    return Source(file.name, file.digest, file.bytes, read, file.entry, notes=(*file.notes(), *notes))


def _open_texts(found: Found, limits: Limits) -> tuple[File, int]:
    """A file with a text a line, whatever it is called, and the length of its UTF-8 mark."""
    file = identify(found, any_text=True)
    with Content(file, limits) as content:
        return file, check_text(content.peek(HEAD_BYTES), file.name)


def _open_aligned(names: Sequence[str], limits: Limits) -> Source:
    if len(names) != 2:
        raise UserError(f"--aligned takes two files, and got {len(names)}.")
    opened = []
    for name in names:
        found, _ = find_files(name)
        if len(found) != 1:
            raise UserError(f"--aligned takes two files, and {name} stands for {len(found)}.")
        opened.append(_open_texts(found[0], limits))
    files, marks = map(list, zip(*opened, strict=True))
    if files[0].state[:2] == files[1].state[:2]:
        raise UserError(f"{names[0]} and {names[1]} are the same file: a text is no translation of itself.")
    digest = xxhash.xxh3_128_hexdigest("".join(file.digest for file in files).encode())
    read = functools.partial(aligned_chunks, files, marks, limits)
    size, name = sum(file.bytes for file in files), " + ".join(names)
    return Source(name, digest, size, read, name, languages=languages_of_files(*names))


def _open_saved_dataset(entry: str, limits: Limits) -> list[Source]:
    """A folder that `save_to_disk` wrote: its splits, and their shards in the order that it names them."""
    folder = Path(entry)
    if (folder / "dataset_dict.json").is_file():
        try:
            splits = list(json.loads((folder / "dataset_dict.json").read_bytes())["splits"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / 'dataset_dict.json'} does not say which splits there are: {error!r}."
            ) from None
        kinds, notes = _kinds_of(entry, splits, str(folder / (splits or KINDS)[0]))
        sources = [
            replace(source, split=kind, entry=entry)
            for split, kind in kinds.items()
            for source in _open_saved_dataset(str(folder / split), limits)
        ]
        return [_with_notes(sources[0], notes), *sources[1:]]
    try:
        shards = [shard["filename"] for shard in json.loads((folder / "state.json").read_bytes())["_data_files"]]
        paths = [str(folder / Path(shard).name) for shard in shards]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} does not say which files the data set has: {error!r}.") from None
    return [_open_file(identify(Found(path, path, entry)), limits) for path in paths]


def _kinds_of(entry: str, splits: Sequence[str], example: str) -> tuple[dict[str, str], list[str]]:
    """The splits of a data set to read, with the kind that each name means, and a note on those left out. A single
    split is read under any name."""
    kinds = {split: kind_in_name(split) for split in splits}
    if len(splits) == 1:
        return {split: kind.removesuffix(DOUBTFUL) for split, kind in kinds.items()}, []
    known = {split: kind for split, kind in kinds.items() if kind in KINDS}
    if not known:
        raise UserError(
            f"{entry} has the splits {', '.join(splits) or 'none'}, whose names do not say what they are for. Name the"
            f" one to read: {example}."
        )
    others = [split for split in splits if split not in known]
    return known, [f"{entry}: its {counted(len(others), 'split')} {', '.join(others)} not read"] if others else []


def _open_hub(entry: str, limits: Limits) -> list[Source]:
    import datasets  # takes a second, which only those who read from the Hub should wait

    name, _, split = entry.removeprefix(HUB_PREFIX).partition(":")
    faults = (OSError, ValueError, RuntimeError, RecursionError, datasets.exceptions.DatasetsError)
    try:
        found = datasets.load_dataset(name, split=split or None)
    except faults as error:
        raise UserError(f"{entry} could not be loaded from the Hub: {excerpt(error)}") from error
    if split:
        return [hub_source(found, entry, entry, limits)]
    kinds, notes = _kinds_of(entry, list(found), f"{entry}:{next(iter(found), 'train')}")
    sources = [
        hub_source(found[split], f"{entry}:{split}" if len(found) > 1 else entry, entry, limits, kind)
        for split, kind in kinds.items()
    ]
    return [_with_notes(sources[0], notes), *sources[1:]]


def hub_source(dataset: Any, name: str, entry: str, limits: Limits, split: str = "") -> Source:
    """Of a `datasets.Dataset`."""
    chunks = functools.partial(hub_chunks, dataset, name, limits)
    return Source(name, dataset._fingerprint, None, chunks, entry, split=split)
