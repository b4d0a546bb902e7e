"""Small files of every kind, broken in every way that a seeded generator thinks of. What must hold for all of them: no
exception but a UserError, no hang, no row that nobody accounts for, and the same result whatever the block size.

    python tests/data_prep/test_fuzz.py 20000 [first seed]     reads that many, and prints what each kind came to
    python tests/data_prep/test_fuzz.py 20000 0 stages         and also checks, renders and encodes them

`fuzzed(seed)` is the file of a seed: Fuzzed(name="fuzz-7.jsonl.gz", content=b"…", limits=Limits(…)).
"""

import concurrent.futures
import contextlib
import csv
import functools
import gzip
import io
import json
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import zstandard

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.gather_rows import gather
from diptych.data_prep.pipeline.prepare_inputs import Inputs, make_converter, make_stages
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.reading.find_files import Limits
from diptych.data_prep.reading.sources import open_sources
from diptych.data_prep.rows.records import Reject, Rejects, Row
from diptych.data_prep.text_to_ids.templates import TEMPLATES
from diptych.data_prep.text_to_ids.train_tokenizer import train_tokenizer

SECONDS_FOR_A_FILE = 5
EMPTY_CELLS = b' \t\r",;|\xef\xbb\xbf'
"""What a line of a table has that holds nothing. Such lines are no rows."""

FILES_IN_THE_SUITE = 400
FILES_THROUGH_STAGES = 200

DEEP = '{"a":' * 120 + "1" + "}" * 120
TEXTS = [
    "Add.",
    "1 + 1",
    "가나다",
    'say "hi"',
    "a, b; c\td",
    "two\nlines",
    "}, {",
    "[x]",
    "\\",
    "{{7*7}}",
    "</s>",
    "",
    "é🙂",
]
ODD_JSON = [
    *("NaN", "-Infinity", "1e999", "null", "7", '"\\ud83d"', '"\\u0000"', "[" * 200, "{" * 150, DEEP, "1" * 5000),
    *('{"a": 1, "a": 2}', "{}", "[]", '{"a": {"b": 1, "b": 2}}', "tru", '"', "\\", "}", "{", "]", "[", ",", "}, {"),
    *("],", "\n", "\r", "\x00", "\ufeff", " " * 50, "x" * 3000),
]
ODD_TABLE = ['"', '""', '"""', ",", "\t", ";", "\n", "\r", "\r\n", "\x00", "\u2028", "x" * 3000, '"a', 'a"b', "\ufeff"]
ODD_TMX = [
    *("<tu>", "</tu>", "<tuv>", "</seg>", "&nbsp;", "&lt;", "&", "<!--", "<![CDATA[", "]]>", '<tu tuid="', "<seg>"),
    *("x" * 3000, "<!DOCTYPE a [<!ENTITY b 'c'>]>", "<hi>", "<ph>", "<tu/>", "\x00", "<?xml version='1.0'?>"),
    "<a>" * 150,
]


@dataclass(frozen=True)
class Fuzzed:
    """A file as it will lie on the disk."""

    name: str
    content: bytes
    limits: Limits


# Sound files


def some_rows(draw):
    names = draw.choice([("instruction", "input", "output"), ("prompt", "completion"), ("source", "target")])
    return [{name: draw.choice(TEXTS) for name in names} for _ in range(draw.randint(1, 8))]


def some_chats(draw):
    turns = lambda: [{"role": draw.choice(["user", "assistant"]), "content": draw.choice(TEXTS)} for _ in range(3)]  # noqa: E731
    return [{"messages": turns(), "id": number} for number in range(draw.randint(1, 6))]


def json_rows(draw):
    return draw.choice([some_rows, some_rows, some_chats])(draw)


def make_jsonl(draw):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in json_rows(draw)).encode()


def make_json(draw):
    return json.dumps(json_rows(draw), ensure_ascii=False, indent=draw.choice([None, 0, 1])).encode()


def make_object(draw):
    wrapped = {"version": "1", "meta": {"a": [1]}, "data": json_rows(draw), "end": True}
    task = {"Definition": ["Add."], "Positive Examples": [], "Instances": json_rows(draw)}
    return json.dumps(draw.choice([wrapped, task]), ensure_ascii=False, indent=draw.choice([None, 1])).encode()


def make_table(draw, delimiters, header=True):
    rows, out = some_rows(draw), io.StringIO(newline="")
    quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    table = csv.writer(
        out, delimiter=draw.choice(delimiters), quoting=quoting, lineterminator=draw.choice(["\n", "\r\n"])
    )
    table.writerows([list(rows[0])] if header else [])
    table.writerows(row.values() for row in rows)
    return out.getvalue().encode()


def make_csv(draw):
    return make_table(draw, ",,,;\t")


def make_tsv(draw):
    if draw.random() < 0.5:
        return make_table(draw, "\t")
    cells = [[draw.choice(TEXTS).replace("\t", " ").replace("\n", " ") or "x" for _ in "ab"] for _ in range(6)]
    return "".join("\t".join(pair) + "\n" for pair in cells).encode()


def make_tmx(draw):
    units = "".join(
        f'<tu tuid="{number}"><tuv xml:lang="en"><seg>Go <hi>on</hi> &amp; {number}</seg></tuv>'
        '<tuv xml:lang="ko"><seg>가 <ph>x</ph></seg></tuv></tu>\n'
        for number in range(draw.randint(1, 6))
    )
    doctype = draw.choice(["", '<!DOCTYPE tmx SYSTEM "tmx14.dtd">\n'])
    text = f'<?xml version="1.0"?>\n{doctype}<tmx version="1.4"><header srclang="en"/><body>\n{units}</body></tmx>\n'
    return text.encode(draw.choice(["utf-8", "utf-8", "utf-8", "utf-16"]))


def some_table(draw):
    return pyarrow.Table.from_pylist(json_rows(draw))


def make_parquet(draw):
    sink = io.BytesIO()
    compression = draw.choice(["snappy", "zstd", "gzip", "none"])
    pyarrow.parquet.write_table(
        some_table(draw), sink, compression=compression, use_dictionary=draw.random() < 0.5, row_group_size=3
    )
    return sink.getvalue()


def make_arrow(draw):
    table, sink = some_table(draw), io.BytesIO()
    new = draw.choice([pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
    options = pyarrow.ipc.IpcWriteOptions(compression=draw.choice([None, "lz4", "zstd"]))
    with new(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


SUFFIXES = {
    ".jsonl": (make_jsonl, ODD_JSON),
    ".json": (make_json, ODD_JSON),
    ".object.json": (make_object, ODD_JSON),
    ".csv": (make_csv, ODD_TABLE),
    ".tsv": (make_tsv, ODD_TABLE),
    ".tmx": (make_tmx, ODD_TMX),
    ".parquet": (make_parquet, []),
    ".arrow": (make_arrow, []),
}


# What breaks them


def flip(content, draw):
    place = draw.randrange(len(content))
    return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]


def insert(content, draw):
    place = draw.randrange(len(content) + 1)
    return content[:place] + bytes([draw.choice([draw.randrange(256), *b'"\\{}[],:\n\r\t\x00<>&'])]) + content[place:]


def delete(content, draw):
    place = draw.randrange(len(content))
    return content[:place] + content[place + draw.choice([1, 1, 1, draw.randint(1, 30)]) :]


def cut(content, draw):
    return content[: draw.randrange(1, len(content) + 1)]


def copy_piece(content, draw):
    start = draw.randrange(len(content))
    end, place = start + draw.randint(1, 40), draw.randrange(len(content) + 1)
    return content[:place] + content[start:end] + content[place:]


def swap_pieces(content, draw):
    first, second, third = sorted(draw.randrange(len(content) + 1) for _ in range(3))
    return content[:first] + content[second:third] + content[first:second] + content[third:]


def zero_piece(content, draw):
    place, length = draw.randrange(len(content)), draw.randint(1, 20)
    return content[:place] + b"\x00" * length + content[place + length :]


def drop_line(content, draw):
    lines = content.split(b"\n")
    lines.pop(draw.randrange(len(lines)))
    return b"\n".join(lines)


def repeat_line(content, draw):
    lines = content.split(b"\n")
    lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    return b"\n".join(lines)


def twice(content, draw):
    return content + content


def with_mark(content, draw):
    return b"\xef\xbb\xbf" + content


def windows_lines(content, draw):
    return content.replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n"]))


def other_encoding(content, draw):
    return content.decode("utf-8", "ignore").encode(
        draw.choice(["utf-16", "utf-16-le", "cp949", "latin-1"]), "replace"
    )


BYTE_MUTATIONS = [flip, flip, insert, insert, delete, delete, cut, copy_piece, swap_pieces, zero_piece]
TEXT_MUTATIONS = [drop_line, repeat_line, twice, with_mark, windows_lines, other_encoding]


def put_odd_token(content, draw, odd):
    """Between two bytes that are marks of the format, where a token may stand."""
    marks = [place for place, byte in enumerate(content) if byte in b'"{}[],:\n\t<>'] or [0]
    first = draw.choice(marks)
    last = draw.choice([first, min([mark for mark in marks if mark > first], default=first)])
    return content[:first] + draw.choice(odd).encode() + content[last:]


def fuzzed(seed):
    draw = random.Random(seed)
    suffix = draw.choice(list(SUFFIXES))
    make, odd = SUFFIXES[suffix]
    content = make(draw)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3, 8])):
        if not content:
            break
        if odd and draw.random() < 0.5:
            content = put_odd_token(content, draw, odd)
        else:
            content = draw.choice(BYTE_MUTATIONS + (TEXT_MUTATIONS if odd else []))(content, draw)
    name = f"fuzz-{seed}{suffix}"
    if odd and draw.random() < 0.25:
        ending, pack = draw.choice([(".gz", gzip.compress), (".zst", zstandard.compress)])
        name, content = name + ending, pack(content)
        if draw.random() < 0.5:
            content = draw.choice(BYTE_MUTATIONS)(content, draw)
    limits = Limits(max_row_bytes=draw.choice([100, 2_000, 10_000_000]), block_bytes=draw.choice([7, 64, 1_000]))
    return Fuzzed(name, content, limits)


# What must hold


def outcome(path, limits):
    """Rows and rejects, each chunk pickled on its way as to a worker; or the error."""
    found = []
    try:
        for source in open_sources([str(path)], limits=limits):
            for chunk in source.chunks():
                assert 0 <= chunk.bytes_done <= source.bytes
                found += pickle.loads(pickle.dumps(chunk)).rows()
    except UserError as error:
        assert path.name in str(error)
        return found, str(error)
    return found, None


def unpacked(case):
    if case.name.endswith(".gz"):
        return gzip.decompress(case.content)
    if not case.name.endswith(".zst"):
        return case.content
    return zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(case.content)


def check_accounts(case, found):
    """Every line that is not blank is a row or a reject, once; rows of other formats are numbered without a gap."""
    numbers = [(row.origin.row, row.origin.instance) for row in found]
    assert numbers == sorted(set(numbers))
    for row in found:
        if isinstance(row, Reject):
            assert row.kind and row.reason and len(row.kind) < 60
            json.dumps(row.as_json(), ensure_ascii=False).encode("utf-8")
        else:
            assert isinstance(row, Row) and isinstance(row.fields, dict)
            assert isinstance(row.raw, str)
    text = unpacked(case).removeprefix(b"\xef\xbb\xbf")
    suffix = case.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    is_cut = any(row.kind == "row too large" for row in found if isinstance(row, Reject))
    is_pairs = suffix == "tsv" and any("first" in getattr(row, "fields", {}) for row in found)
    if is_pairs or (suffix == "jsonl" and not text.lstrip().startswith(b"[")):
        lines = enumerate(text.split(b"\n"), start=1)
        assert [row for row, _ in numbers] == [number for number, line in lines if line.strip(b" \t\r\xef\xbb\xbf")]
    elif (
        suffix in ("csv", "tsv")
        and not is_cut
        and any("first" not in getattr(row, "fields", ["first"]) for row in found)
    ):
        lines = [line for line in text.splitlines() if line.strip(EMPTY_CELLS)]
        raw = "".join(row.raw if row.raw.endswith(("\n", "\r")) else row.raw + "\n" for row in found)
        kept = [line for line in raw.encode("utf-8", "surrogateescape").splitlines() if line.strip(EMPTY_CELLS)]
        assert kept == lines[len(lines) - len(kept) :]
    elif suffix not in ("csv", "tsv", "jsonl"):
        assert [row for row, _ in numbers] == list(range(1, len(found) + 1))


def told(found):
    return [
        (type(row).__name__, row.origin, getattr(row, "kind", None), getattr(row, "fields", None)) for row in found
    ]


@contextlib.contextmanager
def written(case, folder):
    """The file of a case, for as long as it may take."""

    def hang(*_):
        raise TimeoutError(f"{case.name} takes more than {SECONDS_FOR_A_FILE} s")

    path = folder / case.name
    path.write_bytes(case.content)
    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_FOR_A_FILE)
    try:
        yield path
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        path.unlink()


def check(case, folder):
    """Rows, rejects and error of a case that holds what must hold."""
    with written(case, folder) as path:
        found, error = outcome(path, case.limits)
        if error is None:
            check_accounts(case, found)
        if case.limits.max_row_bytes < 1_000_000:  # how far a broken row goes may then depend on what was seen of it
            return found, error
        again, error_again = outcome(path, replace(case.limits, block_bytes=1 << 18))
        assert (error is None) == (error_again is None), (error, error_again)
        if error is None:
            assert repr(told(found)) == repr(told(again))
    return found, error


@functools.cache
def small_tokenizer():
    return train_tokenizer("bpe", TEXTS, 300)


def check_stages(case, folder):
    """The same file through formats, checks, template and tokenizer: each row that a reader yields has an end."""
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    file = io.StringIO()
    rejects = Rejects(file)
    silence = io.StringIO()
    with written(case, folder) as path, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        limits = {"max_source_tokens": 60, "max_target_tokens": 40}
        settings = PrepareSettings(data=[str(path)], forward="To Korean:", **limits)
        try:
            sources = open_sources(settings.data, (), case.limits)
            converters = [make_converter(settings, source) for source in sources]
            inputs = Inputs(sources, [], converters, [])
            stages = make_stages(settings, inputs, small_tokenizer(), TEMPLATES["chat"])
            gathered = gather(inputs.sources, stages, rejects, scratch, workers=1)
        except UserError as error:
            assert str(error).strip()
            return [], error
        read = [row for source in inputs.sources for row in source.rows()]
    kept = gathered.examples["origin"].to_pylist() if gathered.examples.num_columns else []
    told = [json.loads(line) for line in file.getvalue().split("\n") if line]
    assert len(kept) + len(told) == sum(gathered.examples_read) >= len(read)
    ends = {tuple(origin.rsplit(":", 1)) for origin in kept}
    ends = {(name, int(place.split(".")[0])) for name, place in ends} | {(it["file"], it["row"]) for it in told}
    assert ends == {(row.origin.file, row.origin.row) for row in read}
    assert all(reject["kind"] and reject["reason"] for reject in told)
    return read, None


def results_of(seeds, check=check):
    """Counts by kind of file and result, faults in words, and the slowest file."""
    results, faults, slowest = Counter(), [], (0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            case = fuzzed(seed)
            kind, began = case.name.split(".", 1)[1], time.perf_counter()
            try:
                found, error = check(case, Path(folder))
            except Exception as fault:
                faults.append(f"seed {seed} {case.name}: {type(fault).__name__}: {str(fault)[:300]}")
                continue
            slowest = max(slowest, (time.perf_counter() - began, case.name))
            results[kind, "files"] += 1
            results[kind, "errors"] += error is not None
            results[kind, "rows"] += sum(isinstance(row, Row) for row in found)
            results[kind, "rejects"] += sum(isinstance(row, Reject) for row in found)
    return results, faults, slowest


def test_no_broken_file_is_more_than_rows_rejects_or_one_error():
    results, faults, _ = results_of(range(FILES_IN_THE_SUITE))
    assert not faults
    reached = Counter()
    for (_, what), count in results.items():
        reached[what] += count
    assert min(reached[what] for what in ("errors", "rows", "rejects")) > 50  # the generator reaches all three


def test_no_broken_file_loses_a_row_on_its_way_to_token_ids():
    results, faults, _ = results_of(range(FILES_THROUGH_STAGES), check_stages)
    assert not faults
    assert sum(count for (_, what), count in results.items() if what == "rows") > 100


def main(count, first, check=check):
    """Each 500 in a process of their own: a library that ends the process is a fault too, and not the end of this."""
    results, faults, slowest = Counter(), [], (0.0, "")
    for start in range(first, first + count, 500):
        seeds = range(start, min(start + 500, first + count))
        new_faults = [f"seeds {seeds.start} to {seeds.stop - 1}: the process was ended"]
        with (
            concurrent.futures.ProcessPoolExecutor(1) as pool,
            contextlib.suppress(concurrent.futures.process.BrokenProcessPool),
        ):
            more, new_faults, slow = pool.submit(results_of, seeds, check).result()
            results.update(more)
            slowest = max(slowest, slow)
        faults += new_faults
        print(*new_faults, sep="\n", end="\n" if new_faults else "", flush=True)
    for kind in sorted({kind for kind, _ in results}):
        told = (f"{results[kind, what]:>8,} {what}" for what in ("files", "errors", "rows", "rejects"))
        print(kind.ljust(16), *told)
    print(f"{count:,} files, {len(faults)} faults; the slowest took {slowest[0]:.2f} s ({slowest[1]})")
    return 1 if faults else 0


if __name__ == "__main__":
    count, first, what = [*sys.argv[1:], *[str(FILES_IN_THE_SUITE), "0", "readers"][len(sys.argv) - 1 :]]
    sys.exit(main(int(count), int(first), {"readers": check, "stages": check_stages}[what]))
