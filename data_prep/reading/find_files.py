"""From the name that a person gives to bytes: which files are meant, whether they are safe to open, and their content
in blocks of bounded size.

    find_files("data")                  → data/a.jsonl, data/more/b.csv.gz, and a note for each thing left out
    identify("a.jsonl.gz", …)           → File(suffix=".jsonl", packed="gzip", bytes=…, digest=xxh3_128 of its bytes)
    Content(file, limits).read(65_536)  → unpacked bytes, b"" at the end

No more than a block of a file is in memory. Only regular files are opened, so that a FIFO cannot block a run. A digest
is taken when a file is opened, and again of the bytes that were read: if the file changed in between, it is an error.
Packed files unpack to a stated multiple of their size and no further; archives are never unpacked.
"""

import errno
import glob
import gzip
import io
import itertools
import os
import shlex
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import xxhash

from diptych.data_prep.command_line.errors import UserError, check_encoding, nearest, nearest_file
from diptych.data_prep.rows.language_names import languages_of_files
from diptych.data_prep.rows.valid_text import listed

BLOCK_BYTES = 1 << 18

HEAD_BYTES = 1 << 20
"""Of the beginning of a text file, which is looked at when it is opened."""

KNOWN_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".tmx", ".parquet", ".arrow")
COLUMN_SUFFIXES = (".parquet", ".arrow")
PACKED_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
METADATA_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")
"""What `datasets` and the Hub write beside the rows. In a folder or a glob they are left out."""

REPOSITORY_MARKS = frozenset((".gitattributes", "dataset_infos.json"))
"""A folder with one of these is a clone of a Hub repository."""

REFUSED_SUFFIXES = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "an archive"),
    **dict.fromkeys((".bz2", ".xz"), "packed in a way that is not read"),
}
FIRST_BYTES = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "a zip archive (or an Excel or Word file)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
}
ZEROS_LOOKED_AT = 16
"""No gzip file ends in so many zero bytes by itself: an empty one has nine."""


@dataclass(frozen=True)
class Limits:
    """The largest row and packed file that are read, so that no input can use up the memory."""

    max_row_bytes: int = 10_000_000
    """A longer row is a Reject. Bounds the memory that reading takes, at about three times this."""
    max_object_bytes: int = 100_000_000
    """The same for a .json that is one task as a whole (Super-NaturalInstructions), whose row is the file."""
    max_unpacked_ratio: int = 200
    """A packed file may unpack to this many times its size; text takes 3 to 20 times."""
    min_unpacked_bytes: int = 64_000_000
    """Whatever the ratio, a packed file may unpack to this."""
    max_depth: int = 100
    """Lists and objects inside one another; deeper ones cannot be passed on between processes."""
    block_bytes: int = BLOCK_BYTES
    """Read at a time: some 500 to 2,500 rows of instruction data, and what a worker process is handed at once."""

    def unpacked_bytes(self, packed_bytes: int) -> int:
        return max(self.min_unpacked_bytes, self.max_unpacked_ratio * packed_bytes)


DEFAULT_LIMITS = Limits()


class EmptyFile(UserError):
    """A file with nothing or only blanks in it. Among other files, it is left out with a note."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is empty: there is nothing to prepare.")
        self.name = name


@dataclass(frozen=True)
class Found:
    """A path, and what messages call it; `entry` is what the person wrote."""

    path: str
    name: str
    entry: str
    inside: str = ""
    """Its path inside the folder that was named, or below the fixed part of a glob; "" if it was named itself."""


@dataclass(frozen=True)
class File:
    """A regular file that can be read. `suffix` is that of the unpacked content, `packed` is gzip, zstd or None."""

    path: str
    name: str
    entry: str
    suffix: str
    packed: str | None
    bytes: int
    digest: str
    state: tuple[int, int, int, int]
    """Device, inode, size and time of change in nanoseconds. If these stay the same, nothing wrote to it."""

    def notes(self) -> list[str]:
        """Tapes and some programs fill up blocks with zeros behind the end of gzip data."""
        if self.packed == "gzip" and self.bytes > ZEROS_LOOKED_AT:
            with OwnBytes(self) as raw:
                raw.seek(-ZEROS_LOOKED_AT, os.SEEK_END)
                if not any(raw.read(ZEROS_LOOKED_AT)):
                    return [f"{self.name}: zeros stand behind the end of its gzip data, and are passed over"]
        return []

    def check_unchanged(self) -> None:
        """UserError if the file of this name is no longer the one that was opened. If its time differs, the content
        decides."""
        try:
            if _state(os.stat(self.path)) == self.state:
                return
            same = digest_of(self.path, self.name) == self.digest
        except OSError:
            same = False
        if not same:
            raise UserError(changed(self.name))

    def check_content(self) -> None:
        """The same for content that was not read in order: it is digested once more, whatever the file's time is."""
        if digest_of(self.path, self.name) != self.digest:
            raise UserError(changed(self.name))


def changed(name: str) -> str:
    return (
        f"{name} changed while it was read: something writes to it or has replaced it. Wait until it is whole, or read"
        " a copy; then prepare again."
    )


def identify(found: Found, any_text: bool = False) -> File:
    """Open, check and digest a file. With `any_text`, any suffix is allowed except those of archives."""
    check_encoding(found.name)
    suffix, packed = suffixes(found.name)
    if suffix in REFUSED_SUFFIXES:
        raise UserError(
            f"{found.name} is {REFUSED_SUFFIXES[suffix]}, and nothing is unpacked from it. Unpack it yourself, look at"
            " what is in it, and name the files or their folder. Packed files are read if they end in"
            f" {' or '.join(PACKED_SUFFIXES)}."
        )
    if not any_text and suffix not in KNOWN_SUFFIXES:
        raise UserError(
            f"{found.name}: do not know how to read '{suffix or Path(found.name).name}'. Known are"
            f" {', '.join(KNOWN_SUFFIXES)}, those with text also as {' or '.join(PACKED_SUFFIXES)}. Two text files"
            " with a sentence a line are --aligned FIRST SECOND."
        )
    if packed and suffix in COLUMN_SUFFIXES:
        raise UserError(
            f"{found.name}: {suffix} is read as it is, not packed once more (it is packed inside). Unpack it first:"
            f" {'gzip' if packed == 'gzip' else 'zstd'} -dk {found.name}."
        )
    with os.fdopen(_open_regular(found.path, found.name), "rb", buffering=0) as raw:
        before = os.fstat(raw.fileno())
        head = raw.read(512)
        raw.seek(0)
        _check_first_bytes(head, found.name, suffix, packed)
        digest = _digest(raw, before.st_size, found.name)
    return File(found.path, found.name, found.entry, suffix, packed, before.st_size, digest, _state(before))


def suffixes(name: str) -> tuple[str, str | None]:
    """'a.jsonl.gz' → '.jsonl', 'gzip'. What is unknown inside a packed file is named whole: 'a.txt.gz' → '.txt'."""
    path = Path(name)
    last = path.suffix.lower()
    if last in PACKED_SUFFIXES:
        return Path(path.stem).suffix.lower(), PACKED_SUFFIXES[last]
    return last, None


def shell_command(command: str, name: str, result: str) -> str:
    """What `command` makes of a file, which may be packed, in a new file: `gzip -dc a.json.gz | jq . > rows.json`."""
    _, packed = suffixes(name)
    name, result = shlex.quote(name), shlex.quote(result)
    return f"{packed} -dc {name} | {command} > {result}" if packed else f"{command} {name} > {result}"


def _open_regular(path: str, name: str) -> int:
    """A descriptor. What is no regular file is refused before it is opened, and again after."""
    try:
        _check_regular(os.stat(path), name)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(_why_not(path, name, error)) from None
    try:
        _check_regular(os.fstat(descriptor), name)
    except UserError:
        os.close(descriptor)
        raise
    return descriptor


FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _check_regular(found: os.stat_result, name: str) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        what = FILE_KINDS.get(kind, "no regular file")
        raise UserError(
            f"{name} is {what}; a regular file is due. Write what comes out of it into a file, and name that."
        )


def _why_not(path: str, name: str, error: Exception) -> str:
    if os.path.islink(path):
        loops = isinstance(error, OSError) and error.errno == errno.ELOOP
        what = "goes round in a circle" if loops else f"points to '{os.readlink(path)}', which is not there"
        if loops or isinstance(error, FileNotFoundError):
            return f"{name} is a symbolic link that {what}. Correct the link, or name the file itself."
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{name} cannot be read: {reason.rstrip('.')}. Check the path and your rights to it (ls -l)."


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def _check_first_bytes(head: bytes, name: str, suffix: str, packed: str | None) -> None:
    """UserError if the first bytes of a file are of another kind than its name."""
    if not head:
        raise EmptyFile(name)
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"{name} is a pointer of Git LFS, and not the file itself, which was not downloaded. Run `git lfs pull` in"
            " the clone."
        )
    is_kind = next((kind for first, kind in FIRST_BYTES.items() if head.startswith(first)), None)
    expected = packed or {".parquet": "parquet", ".arrow": "arrow"}.get(suffix)
    if is_kind == expected or (suffix == ".arrow" and is_kind is None):  # arrow streams begin with no mark
        return
    if is_kind is None:
        raise UserError(f"{name} cannot be read as {expected}: its first bytes are {head[:4]!r}. Is it named rightly?")
    endings = {kind: ending for ending, kind in (*PACKED_SUFFIXES.items(), *((it, it[1:]) for it in COLUMN_SUFFIXES))}
    ending = endings.get(is_kind)
    advice = f"Name it so that it ends in {ending}." if ending else "Unpack or export it first, as .jsonl for example."
    raise UserError(f"{name} is {is_kind} by its first bytes, and its name says otherwise. {advice}")


def digest_of(path: str, name: str) -> str:
    with os.fdopen(_open_regular(path, name), "rb", buffering=0) as raw:
        return _digest(raw, os.fstat(raw.fileno()).st_size, name)


def _digest(raw: io.RawIOBase, size: int, name: str) -> str:
    """Of `size` bytes and no more: a file that grows as fast as it is read would have no end."""
    digest, read = xxhash.xxh3_128(), 0
    while read <= size and (block := raw.read(min(1 << 20, size - read + 1))):
        digest.update(block)
        read += len(block)
    if read != size:
        raise UserError(changed(name))
    return digest.hexdigest()


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class OwnBytes(io.FileIO):
    """A file's own bytes. They end where they ended when the file was opened; a broken file may say that 3 GB follow,
    and Python would make room for them. What is read from beginning to end is digested on the way; whoever reads in
    another order calls the file's check_content when done."""

    def __init__(self, file: File) -> None:
        super().__init__(_open_regular(file.path, file.name), "rb")
        self.file, self.digest = file, xxhash.xxh3_128()

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.file.bytes - self.tell())
        block = super().read(min(size, left) if size >= 0 else left)
        self.digest.update(block)
        return block

    def check_end(self) -> None:
        """UserError if what was read is not what was there when the file was opened."""
        while self.read(BLOCK_BYTES):
            pass
        if self.digest.hexdigest() != self.file.digest:
            raise UserError(changed(self.file.name))
        self.file.check_unchanged()


class Content:
    """The unpacked bytes of a file, once, from beginning to end; `position` is how many of its own bytes that took."""

    def __init__(self, file: File, limits: Limits) -> None:
        self.file, self._raw, self._head = file, OwnBytes(file), b""
        self._unpacked, self._most = 0, limits.unpacked_bytes(file.bytes)
        self._stream = self._raw
        if file.packed == "gzip":  # Python's passes over zeros behind the end, as gzip does; Arrow's does not
            self._stream = gzip.GzipFile(fileobj=self._raw)
        elif file.packed:
            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._raw, "r"), file.packed)

    def __enter__(self) -> "Content":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    @property
    def position(self) -> int:
        return self._raw.tell()

    def peek(self, size: int) -> bytes:
        """The next bytes, which `read` returns again."""
        while len(self._head) < size and (block := self._read(size - len(self._head))):
            self._head += block
        return self._head[:size]

    def read(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end. UserError at the end if the file has changed."""
        if self._head or not size:
            block, self._head = self._head[:size], self._head[size:]
            return block
        block = self._read(size)
        if not block:
            self._raw.check_end()
        return block

    def _read(self, size: int) -> bytes:
        try:
            block = self._stream.read(size)
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            self.file.check_unchanged()
            if self.file.packed is None:
                raise UserError(f"{self.file.name} cannot be read on from byte {self.position:,}: {error}.") from None
            raise UserError(
                f"{self.file.name} is broken {self.file.packed}: {str(error).rstrip('.')}, after {self._unpacked:,}"
                f" unpacked bytes, at about byte {self.position:,} of its {self.file.bytes:,}. Rows would be missing,"
                " so nothing of it is used: fetch or pack it again."
            ) from None
        self._unpacked += len(block)
        if self.file.packed and self._unpacked > self._most:
            raise UserError(
                f"{self.file.name} has {self.file.bytes:,} bytes and unpacks to more than {self._most:,}, as no text"
                " does by chance. If you trust it, raise max_unpacked_ratio, or unpack it and name the unpacked file."
            )
        return block


# Which files are meant


def find_files(entry: str, samples: Iterable[str] = ()) -> tuple[list[Found], list[str]]:
    """The files that a path, a folder or a glob means, in order of their names, and a note on each thing left out."""
    path = Path(entry).expanduser()
    if os.path.lexists(path):
        if not path.is_dir():
            return [Found(str(path), entry, entry)], []
        found = list(_in_folder(str(path), entry))
    elif not glob.has_magic(entry):
        near = str(nearest_file(path) or nearest(entry, samples, cutoff=0.75) or "")
        hint = f"Shipped samples are {', '.join(samples)}; Hub ids start with hf:."
        raise UserError(f"{entry}: there is no such file. {f'Did you mean {near!r}?' if near else hint}")
    else:
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise UserError(f"{entry} matches no file. Put the pattern in quotes, and try it with ls.")
        found = []
        for match in matches:
            if not os.path.isdir(match):
                found.append(_file_or_note(match, entry))
            elif "**" not in entry:  # else its files are matches themselves
                found += _in_folder(match, entry)
    files = [it for it in found if isinstance(it, Found)]
    notes = [it for it in found if isinstance(it, str)]
    if not files:
        left_out = f" Left out: {'; '.join(notes[:5])}." if notes else ""
        names = [note.partition(" is of no kind")[0] for note in notes]
        aligned = next((pair for pair in itertools.combinations(names, 2) if any(languages_of_files(*pair))), ())
        hint = f" Aligned files are named together: {'+'.join(aligned)}" if aligned else ""
        raise UserError(f"{entry} has no file that can be read ({', '.join(KNOWN_SUFFIXES)}).{left_out}{hint}")
    return files, notes


def _in_folder(folder: str, entry: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Found | str]:
    """Files, and notes on what is left out. `above` are the folders that this one lies in."""
    try:
        here, names = os.stat(folder), sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(_why_not(folder, folder, error)) from None
    inner = (*above, (here.st_dev, here.st_ino))
    if inner[-1] in above:
        yield f"{folder} is a link to a folder that holds it, and was not read again"
        return
    if "state.json" in names and "dataset_info.json" in names or "dataset_dict.json" in names:
        raise UserError(f"{folder} is a data set saved by `datasets`, inside the folder {entry}. Name it by itself.")
    data = os.path.join(folder, "data")
    if REPOSITORY_MARKS & set(names) and os.path.isdir(data):
        rows = list(_in_folder(data, entry, inner))
        if any(isinstance(it, Found) for it in rows):  # the Hub reads only this folder of a repository
            others = [it for it in names if it != "data" and it not in METADATA_FILES and not it.startswith(".")]
            yield from rows
            if others:
                yield f"of {folder}, a clone of a Hub repository, data/ is read, and not {listed(others)}"
            return
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith("."):
            yield f"{path} is hidden and was not read"
        elif os.path.isdir(path):
            yield from _in_folder(path, entry, inner)
        else:
            yield _file_or_note(path, entry)


def _file_or_note(path: str, entry: str) -> Found | str:
    """In a folder or a glob, files of known kinds are read; others are left out with a note."""
    suffix, _ = suffixes(path)
    if os.path.basename(path) in METADATA_FILES:
        return f"{path} is metadata of a data set and was not read"
    if suffix in KNOWN_SUFFIXES:
        return Found(path, path, entry, os.path.relpath(path, fixed_part(entry)))
    return f"{path} is {REFUSED_SUFFIXES.get(suffix, 'of no kind that is known')} and was not read"


def fixed_part(entry: str) -> Path:
    """The folder itself; of a glob, what stands before its first pattern."""
    path = Path(entry).expanduser()
    return path if path.is_dir() else Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
