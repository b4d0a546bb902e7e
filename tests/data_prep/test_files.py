"""Which files are meant, what is refused unopened, what unpacks how far, and what changes under the reader."""

import gzip
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pyarrow
import pyarrow.parquet
import pytest
import xxhash
import zstandard

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.find_files import DEFAULT_LIMITS, Limits, find_files
from diptych.data_prep.reading.sources import open_sources
from diptych.data_prep.rows.records import Reject

ROW = b'{"instruction": "a", "output": "b"}\n'
PACK = {".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to be in, so that names are as short as people write them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*entries):
    return [source.name for source in open_sources(entries)]


def refused(*entries, aligned=(), limits=DEFAULT_LIMITS):
    """What is said when these are opened and read."""
    with pytest.raises(UserError) as error:
        for source in open_sources(entries, aligned, limits):
            list(source.rows())
    return str(error.value)


# Which files


def test_a_pointer_of_git_lfs_and_a_folder_of_aligned_files_are_told_what_they_are(place):
    (place / "d").mkdir(exist_ok=True)
    for name in ("a.jsonl", "b.parquet", "c.tsv"):
        (place / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
        assert f"{name} is a pointer of Git LFS" in refused(name) and "git lfs pull" in refused(name)
    for name in ("train.en", "train.ko"):
        (place / "d" / name).write_bytes(b"a\n")
    assert refused("d").endswith("Aligned files are named together: d/train.en+d/train.ko")


def test_a_folder_stands_for_the_files_in_it_and_names_what_it_leaves_out(place):
    for name in ("b.jsonl", "a.csv", "sub/c.jsonl.gz", ".hidden.jsonl", "README.md", "old.zip"):
        (place / "d" / name).parent.mkdir(exist_ok=True, parents=True)
        (place / "d" / name).write_bytes(gzip.compress(ROW) if name.endswith(".gz") else b"text\nx\n")
    sources = open_sources(["d"])
    assert [source.name for source in sources] == ["d/a.csv", "d/b.jsonl", "d/sub/c.jsonl.gz"]
    assert {source.entry for source in sources} == {"d"}
    assert sources[0].notes == (
        "d/.hidden.jsonl is hidden and was not read",
        "d/README.md is of no kind that is known and was not read",
        "d/old.zip is an archive and was not read",
    )


def test_a_folder_linked_into_itself_is_read_once(place):
    (place / "d/sub").mkdir(parents=True)
    (place / "d/sub/a.jsonl").write_bytes(ROW)
    os.symlink(place / "d", place / "d/sub/loop")
    [source] = open_sources(["d"])
    assert source.name == "d/sub/a.jsonl"
    assert source.notes == ("d/sub/loop is a link to a folder that holds it, and was not read again",)


def test_a_folder_without_files_says_what_it_left_out(place):
    (place / "d").mkdir()
    (place / "d/notes.docx").write_bytes(b"x")
    assert "d has no file that can be read (.json, " in refused("d")
    assert "d/notes.docx is of no kind that is known" in refused("d")


def test_an_empty_file_among_others_is_a_note(place):
    for name, content in {"a.jsonl": b"", "b.jsonl": ROW, "c.csv": b" \n\n", "d.jsonl.gz": gzip.compress(b"")}.items():
        (place / "d" / name).parent.mkdir(exist_ok=True)
        (place / "d" / name).write_bytes(content)
    for entries in (["d"], ["d/*"], ["d/a.jsonl", "d/b.jsonl", "d/c.csv", "d/d.jsonl.gz"]):
        [source] = open_sources(entries)
        assert source.name == "d/b.jsonl"
        assert source.notes == tuple(
            f"d/{name} is empty and was not read" for name in ("a.jsonl", "c.csv", "d.jsonl.gz")
        )
    (place / "d/b.jsonl").unlink()
    assert "d/a.jsonl is empty: there is nothing to prepare" in refused("d")


def test_of_a_cloned_hub_repository_the_rows_are_read_and_the_metadata_are_not(place):
    for name in (
        "dataset_infos.json",
        "README.md",
        "stats.json",
        "data/train.jsonl",
        "plain/dataset_info.json",
        "plain/a.jsonl",
    ):
        (place / "repo" / name).parent.mkdir(exist_ok=True, parents=True)
        (place / "repo" / name).write_bytes(b"[" + ROW + b"]" if name.endswith(".json") else ROW)
    assert names("repo") == ["repo/data/train.jsonl"]
    [note] = open_sources(["repo"])[0].notes
    assert note == "of repo, a clone of a Hub repository, data/ is read, and not 'README.md', 'plain', 'stats.json'"
    [source] = open_sources(["repo/plain"])
    assert source.notes == ("repo/plain/dataset_info.json is metadata of a data set and was not read",)
    (place / "repo/data/train.jsonl").rename(place / "repo/train.jsonl")
    assert names("repo") == ["repo/plain/a.jsonl", "repo/stats.json", "repo/train.jsonl"]
    assert names("repo/dataset_infos.json") == ["repo/dataset_infos.json"]  # a name that a person writes is meant


def test_a_glob_stands_for_its_matches_in_order(place):
    for name in ("b.jsonl", "a.jsonl", "c.csv", "x/y/d.jsonl"):
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_bytes(ROW)
    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("[ab].jsonl", "c.csv") == ["a.jsonl", "b.jsonl", "c.csv"]
    assert sorted(names("**/*.jsonl")) == ["a.jsonl", "b.jsonl", "x/y/d.jsonl"]
    assert "matches no file" in refused("*.tsv")
    (place / "odd[1].jsonl").write_bytes(ROW)  # a name that is there is no pattern
    assert names("odd[1].jsonl") == ["odd[1].jsonl"]


def test_a_file_that_comes_up_twice_is_read_once_and_that_is_said(place):
    (place / "a.jsonl").write_bytes(ROW)
    os.symlink("a.jsonl", place / "b.jsonl")
    [source] = open_sources(["a.jsonl", "*.jsonl", "./a.jsonl"])
    assert source.notes[0] == "a.jsonl (by *.jsonl) is a.jsonl (by a.jsonl) once more, and is read once"
    assert len(source.notes) == 3


def test_a_name_that_is_not_there_names_the_nearest_that_is(place):
    (place / "my_rows.jsonl").write_bytes(ROW)
    assert "there is no such file. Did you mean 'my_rows.jsonl'" in refused("my_row.jsonl")
    assert "Did you mean 'tatoeba'" in refused("tateoba")
    assert "Shipped samples are tatoeba, cmudict, seed_tasks" in refused("elsewhere/x.jsonl")
    with pytest.raises(UserError, match="no such file"):
        find_files("~nobody/here")


@pytest.mark.parametrize(
    "name, words",
    [
        ("a.txt", "do not know how to read '.txt'. Known are .json, .jsonl, .ndjson, .csv, .tsv, .tmx, .parquet"),
        ("a", "do not know how to read 'a'"),
        ("a.zip", "a.zip is an archive, and nothing is unpacked"),
        ("a.tar.gz", "a.tar.gz is an archive"),
        ("a.tgz", "is an archive"),
        ("a.7z", "is an archive"),
        ("a.rar", "is an archive"),
        ("a.jsonl.xz", "packed in a way that is not read"),
        ("a.parquet.gz", "Unpack it first: gzip -dk a.parquet.gz"),
        ("a.arrow.zst", "Unpack it first: zstd -dk a.arrow.zst"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_name(name, words, place):
    (place / name).write_bytes(ROW)
    assert words in refused(name)


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "a.jsonl",
            gzip.compress(ROW, mtime=0),
            "is gzip by its first bytes, and its name says otherwise. Name it so that it",
        ),
        ("a.csv", zstandard.compress(ROW), "ends in .zst"),
        ("a.jsonl", b"PK\x03\x04 and more", "is a zip archive (or an Excel or Word file)"),
        ("a.jsonl.gz", ROW, "cannot be read as gzip: its first bytes are b'{\"in'"),
        ("a.parquet", ROW, "cannot be read as parquet"),
        ("a.json", b"PAR1....PAR1", "ends in .parquet"),
        (
            "a.jsonl.gz",
            gzip.compress(b"x.jsonl".ljust(257, b"\0") + b"ustar  \0" + ROW, mtime=0),
            "holds a tar archive",
        ),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl.gz", gzip.compress(b" \n", mtime=0), "a.jsonl.gz is empty"),
    ],
)
def test_a_file_whose_content_is_not_what_its_name_says_is_refused(name, content, words, place):
    (place / name).write_bytes(content)
    assert words in refused(name)


# What is no regular file


def test_what_is_no_regular_file_is_refused_at_once(place):
    os.mkfifo(place / "fifo.jsonl")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jsonl")
        os.symlink("/dev/zero", place / "zero.jsonl")
        began = time.perf_counter()
        assert "is a pipe (FIFO); a regular file is due" in refused("fifo.jsonl")
        assert "is a socket" in refused("socket.jsonl")
        assert "is a device" in refused("zero.jsonl")
        assert "is a pipe" in refused(aligned=["fifo.jsonl", "zero.jsonl"])
        assert "d/fifo.jsonl is a pipe" in in_a_folder_it_is_refused(place)
        assert time.perf_counter() - began < 60, "nobody writes into the pipe"


def in_a_folder_it_is_refused(place):
    (place / "d").mkdir()
    os.mkfifo(place / "d/fifo.jsonl")
    return refused("d")


def test_links_that_lead_nowhere_are_refused_with_what_they_say(place):
    os.symlink("b.jsonl", place / "a.jsonl")
    os.symlink("a.jsonl", place / "b.jsonl")
    os.symlink("gone.jsonl", place / "c.jsonl")
    assert "a.jsonl is a symbolic link that goes round in a circle" in refused("a.jsonl")
    assert "c.jsonl is a symbolic link that points to 'gone.jsonl', which is not there" in refused("c.jsonl")


def test_a_file_without_the_right_to_read_it_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "a.jsonl")
        with open(path, "wb") as file:
            file.write(ROW)
        os.chmod(path, 0)
        is_root = os.geteuid() == 0
        try:
            if is_root:  # who may read everything
                os.seteuid(65534)
            message = refused(path)
        finally:
            if is_root:
                os.seteuid(0)
    assert "a.jsonl cannot be read: Permission denied. Check the path and your rights to it" in message


# Packed files


@pytest.mark.parametrize("ending", PACK)
def test_packed_files_give_the_rows_of_the_plain_one(ending, place):
    content = b"".join(b'{"instruction": "%d", "output": "b"}\n' % number for number in range(3_000))
    (place / "a.jsonl").write_bytes(content)
    (place / f"p.jsonl{ending}").write_bytes(PACK[ending](content[:5_000]) + PACK[ending](content[5_000:]))
    plain, packed = ([row.fields for row in source.rows()] for source in open_sources(["a.jsonl", f"p.jsonl{ending}"]))
    assert len(plain) == 3_000
    assert plain == packed


def test_zeros_behind_the_end_of_a_gzip_are_passed_over_and_said(place):
    for name, zeros in {"a.jsonl.gz": 0, "b.jsonl.gz": 512, "c.jsonl.gz": 3}.items():
        (place / name).write_bytes(gzip.compress(ROW) + gzip.compress(ROW + ROW) + b"\0" * zeros)
        [source] = open_sources([name])
        assert [row.origin.row for row in source.rows()] == [1, 2, 3]
        said = (f"{name}: zeros stand behind the end of its gzip data, and are passed over",)
        assert source.notes == (said if zeros > 16 else ())


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("damage", ["cut", "changed", "followed"])
def test_a_broken_packed_file_is_an_error_that_says_where(ending, damage, place):
    content = b"".join(b'{"instruction": "%d", "output": "%d"}\n' % (n, n * n) for n in range(20_000))
    packed = PACK[ending](content)
    middle = len(packed) // 2
    broken = {
        "cut": packed[:middle],
        "changed": packed[:middle] + b"\xff\x00\xff\x00" * 5 + packed[middle + 20 :],
        "followed": packed + b"text",
    }[damage]
    (place / f"a.jsonl{ending}").write_bytes(broken)
    message = refused(f"a.jsonl{ending}")
    assert f"a.jsonl{ending} is broken {'gzip' if ending == '.gz' else 'zstd'}: " in message
    assert "unpacked bytes, at about byte " in message
    assert "nothing of it is used" in message


READ_AND_MEASURE = """
import sys, time
from diptych.data_prep.reading.sources import open_sources
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Reject
began, found = time.perf_counter(), []
try:
    for source in open_sources([sys.argv[1]]):
        for row in source.rows():
            found.append(f"{row.kind} {len(row.raw)}" if isinstance(row, Reject) else "row")
except UserError as error:
    found.append(str(error))
seconds = time.perf_counter() - began
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]  # ru_maxrss also knows the parent's
print(*found, seconds, peak.split()[1], sep="\\n")
"""


def read_and_measure(path):
    """What came of it, the seconds it took, and the most memory that the process had, in MB."""
    run = subprocess.run([sys.executable, "-c", READ_AND_MEASURE, path], capture_output=True, text=True, check=True)
    *found, seconds, kilobytes = run.stdout.splitlines()
    return found, float(seconds), int(kilobytes) / 1024


@pytest.mark.parametrize("ending", PACK)
def test_a_bomb_stops_at_the_stated_limit(ending, place):
    piece = PACK[ending](b'{"instruction": "' + b" " * 10_000_000 + b'"}\n')
    bomb = piece * 100
    bomb += PACK[ending](os.urandom(max(0, 1_000_000 - len(bomb))))  # of 1 MB, as a browser would show it
    (place / f"a.jsonl{ending}").write_bytes(bomb)
    (*_, message), seconds, megabytes = read_and_measure(f"a.jsonl{ending}")
    assert f"has {len(bomb):,} bytes and unpacks to more than {200 * len(bomb):,}" in message
    assert "raise max_unpacked_ratio" in message
    assert seconds < 60 and megabytes < 500, (seconds, megabytes)


def test_what_unpacks_to_a_multiple_below_the_limit_is_read(place):
    (place / "a.jsonl.gz").write_bytes(gzip.compress(ROW * 100_000))
    limits = Limits(max_unpacked_ratio=200, min_unpacked_bytes=1_000_000)
    assert "unpacks to more than" in refused("a.jsonl.gz", limits=limits)
    [source] = open_sources(["a.jsonl.gz"])
    assert sum(1 for _ in source.rows()) == 100_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "closed.json"])
def test_a_row_of_100_mb_is_one_reject_and_takes_little_memory(name, place):
    good = ROW.strip()
    if name == "a.csv":
        start, end, rows = b'instruction,output\na,b\nc,"', b"\n", 1
    elif name == "a.jsonl":
        start, end, rows = ROW + b'{"instruction": "', b'"}\n' + ROW, 2
    elif name == "a.json":  # a quote that is never closed
        start, end, rows = b"[" + good + b', {"instruction": "', b"}]", 1
    else:
        start, end, rows = b"[" + good + b', {"instruction": "', b'"},\n' + good + b"]", 2
    with open(place / name, "wb") as file:
        file.write(start)
        for _ in range(100):
            file.write(b"x" * 999_999 + (b"\n" if name == "a.csv" else b" "))
        file.write(end)
    found, seconds, megabytes = read_and_measure(name)
    if name == "a.csv":  # each of its lines is a row of its own then
        assert found[:2] == ["row", "broken csv 1000003"] and len(found) > 90
    else:
        assert found.count("row") == rows
        assert found[1] == "row too large 1000"
    assert megabytes < 250 and seconds < 20, (seconds, megabytes)


# Files that change


def write_rows(path, count=5_000, text=b"b"):
    rows = (b'{"instruction": "%06d", "output": "%s"}' % (number, text) for number in range(count))
    ends = (b"[", b",\n", b"]\n") if path.suffix == ".json" else (b"", b"\n", b"\n")
    content = ends[0] + ends[1].join(rows) + ends[2]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def grow(path):
    with path.open("ab") as file:
        file.write(b"\n" + ROW)


def shrink(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    write_rows(path.with_name(f"new{path.suffix}"), text=b"c")
    os.replace(path.with_name(f"new{path.suffix}"), path)


def edit(path):
    """Of the same size and time."""
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"004999", b"999400"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(path):
    path.unlink()


CHANGES = [grow, shrink, replace, remove]


@pytest.mark.parametrize(
    "name, change",
    [(name, change) for name in ("a.jsonl", "a.json", "a.jsonl.gz") for change in CHANGES]
    + [("a.jsonl", edit), ("a.json", edit)],
)
def test_a_file_that_changes_while_it_is_read_is_an_error(name, change, place):
    write_rows(place / name)
    [source] = open_sources([name], limits=Limits(block_bytes=1_000))
    rows = source.rows()
    next(rows)
    change(place / name)
    with pytest.raises(UserError, match=f"{name} changed while it was read"):
        list(rows)


@pytest.mark.parametrize("change", [grow, shrink, replace, edit])
def test_a_file_that_changes_between_opening_and_reading_is_an_error(change, place):
    write_rows(place / "a.jsonl")
    [source] = open_sources(["a.jsonl"])
    change(place / "a.jsonl")
    with pytest.raises(UserError, match="a.jsonl changed while it was read"):
        list(source.rows())


def test_a_parquet_file_that_is_replaced_while_it_is_read_is_an_error(place):
    def write(path, text):
        pyarrow.parquet.write_table(pyarrow.table({"instruction": [text] * 9_000, "output": ["b"] * 9_000}), path)

    write("a.parquet", "a")
    [source] = open_sources(["a.parquet"])
    rows = source.rows()
    next(rows)
    write("new.parquet", "x")
    os.replace("new.parquet", "a.parquet")
    with pytest.raises(UserError, match="a.parquet changed while it was read"):
        list(rows)


def test_a_file_that_is_touched_and_not_changed_is_read(place):
    write_rows(place / "a.jsonl")
    [source] = open_sources(["a.jsonl"])
    rows = source.rows()
    next(rows)
    (place / "a.jsonl").write_bytes((place / "a.jsonl").read_bytes())
    os.utime(place / "a.jsonl", (1, 1))
    assert len(list(rows)) == 4_999


def test_a_file_that_never_stops_growing_does_not_keep_the_reader(place):
    write_rows(place / "a.jsonl")
    is_over = threading.Event()

    def go_on_writing():
        with (place / "a.jsonl").open("ab", buffering=0) as file:
            while not is_over.is_set():
                file.write(ROW * 1_000)
                time.sleep(0.001)

    writer = threading.Thread(target=go_on_writing)
    writer.start()
    try:
        began = time.perf_counter()
        assert "a.jsonl changed while it was read" in refused("a.jsonl")
        assert time.perf_counter() - began < 60, "the writer never ends"
    finally:
        is_over.set()
        writer.join()


# What a source says of itself


def test_the_digest_is_that_of_the_bytes_and_progress_ends_at_their_number(place):
    write_rows(place / "a.jsonl")
    write_rows(place / "b.jsonl.gz")
    for source in open_sources(["a.jsonl", "b.jsonl.gz"], limits=Limits(block_bytes=1_000)):
        content = (place / source.name).read_bytes()
        assert source.digest == xxhash.xxh3_128_hexdigest(content)
        assert source.bytes == len(content)
        done = [chunk.bytes_done for chunk in source.chunks()]
        assert done == sorted(done) and done[-1] == len(content) and len(done) > 10
    write_rows(place / "a.jsonl", text=b"c")
    assert open_sources(["a.jsonl"])[0].digest != xxhash.xxh3_128_hexdigest(content)


def test_rows_beyond_the_limit_are_rejects_whatever_their_place(place):
    long = b'{"instruction": "%s", "output": "b"}\n' % (b"x" * 500)
    (place / "a.jsonl").write_bytes(long + ROW + long + ROW + long.strip())
    for block_bytes in (10, 100, 1_000, 100_000):
        [source] = open_sources(["a.jsonl"], limits=Limits(max_row_bytes=300, block_bytes=block_bytes))
        found = list(source.rows())
        assert [row.origin.row for row in found] == [1, 2, 3, 4, 5]
        rejects = [row for row in found if isinstance(row, Reject)]
        assert [reject.origin.row for reject in rejects] == [1, 3, 5]
        assert {reject.kind for reject in rejects} == {"row too large"}
        assert "max_row_bytes is 300" in rejects[0].reason
