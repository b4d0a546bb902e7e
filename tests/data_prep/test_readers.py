"""Every format is read, every bad row is named with its place, and no bad row loses another."""

import gzip
import json
import pickle
import random
import re
import shutil
import subprocess
from pathlib import Path

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.find_files import DEFAULT_LIMITS, Limits
from diptych.data_prep.reading.sources import SAMPLES, SAMPLES_FOLDER, open_evaluation, open_sources
from diptych.data_prep.rows.records import Reject, Row

ROWS = [
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"instruction": "Say 안녕.", "input": "", "output": "안녕"},
    {"instruction": 'Two\nlines, and "quotes"', "input": "a,b\tc", "output": "{{ 7 * 7 }} </s>"},
]
GOOD = b'{"instruction": "a", "output": "b"}'
SMALL_BLOCKS = Limits(block_bytes=16)


def read(*entries, aligned=(), limits=DEFAULT_LIMITS):
    """Rows and rejects, in order; each chunk goes through pickle as it does to a worker."""
    found = []
    for source in open_sources(entries, aligned, limits):
        for chunk in source.chunks():
            found += pickle.loads(pickle.dumps(chunk)).rows()
    return [row for row in found if isinstance(row, Row)], [row for row in found if isinstance(row, Reject)]


def refused(*entries, aligned=(), limits=DEFAULT_LIMITS):
    with pytest.raises(UserError) as error:
        read(*entries, aligned=aligned, limits=limits)
    return str(error.value)


def values(rows):
    return [row.fields for row in rows]


def places(found):
    return [(row.origin.row, row.kind) for row in found]


def csv_line(row):
    return ",".join('"' + value.replace('"', '""') + '"' for value in row.values())


def write_columns(tmp_path, name, columns, **options):
    table, path = pyarrow.table(columns), tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, **options)
    else:
        new = pyarrow.ipc.new_stream if "stream" in name else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    return str(path)


# Formats


@pytest.mark.parametrize(
    "name",
    [
        "a.json",
        "a.jsonl",
        "a.ndjson",
        "A.JSONL",
        "a.csv",
        "a.parquet",
        "a.arrow",
        "stream.arrow",
        "saved",
        "data.json",
    ],
)
def test_the_same_rows_come_out_of_every_format(name, write_rows, tmp_path):
    columns = {field: [row[field] for row in ROWS] for field in ROWS[0]}
    if name.endswith((".parquet", ".arrow")):
        path = write_columns(tmp_path, name, columns)
    elif name == "saved":
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / name, num_shards=2)
        path = str(tmp_path / name)
    elif name.endswith(".csv"):
        path = write_rows(name, [",".join(ROWS[0]), *(csv_line(row) for row in ROWS)])
    elif name == "data.json":
        content = {"version": 1, "meta": {"list": [1, {"a": "]"}]}, "data": ROWS, "end": None}
        path = write_rows(name, json.dumps(content, indent=1).encode())
    elif name == "a.json":
        path = write_rows(name, ROWS)
    else:
        path = write_rows(name, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS))
    for limits in (DEFAULT_LIMITS, SMALL_BLOCKS):
        rows, rejects = read(path, limits=limits)
        assert values(rows) == ROWS
        assert rejects == []


def test_each_row_knows_its_file_and_place_and_keeps_its_text(write_rows, tmp_path):
    jsonl = write_rows("rows.jsonl", b'{"instruction": "a", "output": "b"}\n\n {"instruction": "c"}\r\n')
    rows, _ = read(jsonl)
    assert [str(row.origin) for row in rows] == [f"{jsonl}:1", f"{jsonl}:3"]
    assert [row.raw for row in rows] == ['{"instruction": "a", "output": "b"}', ' {"instruction": "c"}']
    array = write_rows("rows.json", b'[{"a": "b"} , \n{"a":  "c"}]')
    rows, _ = read(array)
    assert [(str(row.origin), row.raw) for row in rows] == [
        (f"{array}:1", '{"a": "b"}'),
        (f"{array}:2", '{"a":  "c"}'),
    ]
    table = write_rows("rows.csv", ["instruction,output", '"two', 'lines",b', "", "c,d"])
    rows, _ = read(table)
    assert [(str(row.origin), row.raw) for row in rows] == [
        (f"{table}:2", '"two\nlines",b\n'),
        (f"{table}:5", "c,d\n"),
    ]
    columns = write_columns(tmp_path, "rows.parquet", {"a": ["b", "c"]}, row_group_size=1)
    rows, _ = read(columns)
    assert [(str(row.origin), row.raw) for row in rows] == [
        (f"{columns}:1", '{"a": "b"}'),
        (f"{columns}:2", '{"a": "c"}'),
    ]


def test_parallel_lines_are_a_pair_and_what_comes_along(write_rows):
    path = write_rows("pairs.tsv", ["Go.\t가.\tCC-BY", '"Hi\t안녕"\tCC-BY', "\t\tx"])
    rows, rejects = read(path)
    assert rejects == []
    assert values(rows) == [
        {"first": "Go.", "second": "가.", "column 3": "CC-BY"},
        {"first": '"Hi', "second": '안녕"', "column 3": "CC-BY"},
        {"first": "", "second": "", "column 3": "x"},
    ]


QUOTE_MARKS = [
    ("Good morning.", "Guten Morgen."),
    ('"I saw him.', "„Ich sah ihn."),
    ('Then I ran."', '""Dann" lief ich.“'),
    ('"He said ""no""."', "'Nein'"),
]


@pytest.mark.parametrize("header", [["Source\ttarget"], []])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_tsv_has_no_quoting(header, end, write_rows):
    text = "".join(line + end for line in [*header, *map("\t".join, QUOTE_MARKS)]).encode()
    names = ("Source", "target") if header else ("first", "second")
    for name, content in (("a.tsv", text), ("a.tsv.gz", gzip.compress(text))):
        path = write_rows(name, content)
        for limits in (DEFAULT_LIMITS, SMALL_BLOCKS):
            rows, rejects = read(path, limits=limits)
            assert values(rows) == [dict(zip(names, pair, strict=True)) for pair in QUOTE_MARKS]
            assert rejects == []
        [source] = open_evaluation([path])
        assert [tuple(row.fields.values()) for row in source.rows()] == QUOTE_MARKS
        assert "some cells look quoted as in a csv. A tsv has no quoting" in source.notes[0]
    assert len(open_sources([write_rows("b.tsv", ['"Go.\tGeh.', 'Go."\tGeh.'])])[0].notes) == 1


def test_what_the_first_line_of_a_tsv_was_taken_for_is_said(write_rows):
    def first(*lines, columns=()):
        [source] = open_sources([write_rows("a.tsv", lines)], columns=columns)
        return next(source.rows()).fields, source.notes[-1].split("a.tsv: ")[1]

    header = "its first line names the columns: "
    assert first("Source\ttarget", "Go.\t가.") == ({"Source": "Go.", "target": "가."}, f"{header}Source, target")
    assert first("id\tmy_id\tsource\ttarget", "1\t2\tGo.\t가.")[0]["my_id"] == "2"  # one name is not known
    fields, note = first("source\tGo.", "Go.\t가.")
    assert (fields, note) == (
        {"first": "source", "second": "Go."},
        "its first line is taken for a pair, 'source' and 'Go.'",
    )
    fields, note = first("left\tright", "Go.\t가.")
    assert fields == {"first": "left", "second": "right"}
    assert note.endswith("if it names columns, --map first=left second=right makes it the header")
    assert first("a\tb", "Go.\t가.", columns=("a", "c")) == ({"a": "Go.", "b": "가."}, f"{header}a, b")
    for names in ("en\tko", "eng_Latn\tace_Arab", "Korean\tEnglish", "id\tko_KR\ten-GB"):
        assert list(first(names, "1" + "\t1" * names.count("\t"))[0]) == names.split("\t")
    assert first("text", "Go.", columns=("text",))[0] == {"text": "Go."}
    [source] = open_sources([write_rows("b.tsv", ["a title", "Go.\t가.", "Hi.\t안녕."])])  # no pair, and no header
    assert (source.notes, [type(row) for row in source.rows()]) == ((), [Reject, Row, Row])


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t")])
def test_cells_behind_the_last_name_of_a_header_are_columns_only_where_they_hold_something(
    suffix, delimiter, write_rows
):
    table = ["|instruction|output||", "0|a|b||", "1|c|d", "2|e|f||x", "3|g", "4|h|i|||", "5|j|k|||x", "||||"]
    rows, rejects = read(write_rows(f"a.{suffix}", [line.replace("|", delimiter) for line in table]))
    assert values(rows) == [
        {"column 1": "0", "instruction": "a", "output": "b"},
        {"column 1": "1", "instruction": "c", "output": "d"},
        {"column 1": "2", "instruction": "e", "output": "f", "column 5": "x"},
        {"column 1": "4", "instruction": "h", "output": "i"},
    ]
    assert places(rejects) == [(5, "wrong number of columns"), (7, "wrong number of columns")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_files_that_were_joined_with_their_byte_order_marks_and_headers_are_read_on(name, write_rows):
    lines = {"a.jsonl": [GOOD], "a.csv": [b"instruction,output", b'"a",b'], "a.tsv": [b"instruction\toutput", b"a\tb"]}
    part = b"\xef\xbb\xbf" + b"\r\n".join(lines[name]) + b"\r\n"
    rows, rejects = read(write_rows(name, part * 3))
    assert values(rows) == [{"instruction": "a", "output": "b"}] * 3
    assert [reject.kind for reject in rejects] == ["repeated header"] * (0 if name == "a.jsonl" else 2)
    bad = part + b"\xef\xbb\xbf" + lines[name][-1].replace(b"a", b"\xff")
    reject = read(write_rows(name, bad))[1][0]
    assert f"byte offset {bad.index(0xFF, 3)} " in reject.reason


def test_a_byte_order_mark_begins_no_text_of_joined_plain_files(write_rows):
    lines = b"\xef\xbb\xbfGo.\n" * 3
    first, second = write_rows("a.en", lines), write_rows("a.txt", lines)
    assert values(read(aligned=[first, second])[0]) == [{"first": "Go.", "second": "Go."}] * 3
    assert [row.fields["text"] for row in open_evaluation([second])[0].rows()] == ["Go."] * 3


@pytest.mark.parametrize("delimiter, word", [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_another_delimiter_of_a_csv_is_found_and_said(delimiter, word, write_rows):
    path = write_rows("a.csv", [f" instruction {delimiter}output", f"a, b{delimiter}c", f'"d{delimiter}"{delimiter}e'])
    rows, rejects = read(path)
    assert values(rows) == [{"instruction": "a, b", "output": "c"}, {"instruction": f"d{delimiter}", "output": "e"}]
    assert rejects == []
    [note] = open_sources([path])[0].notes
    assert note.startswith(f"{path}: its columns are separated by {word}")
    assert ("If nothing is quoted, name the file .tsv" in note) == (delimiter == "\t")
    assert open_sources([write_rows("b.csv", ["instruction,output", "a;b,c"])])[0].notes == ()
    assert values(read(write_rows("c.csv", ["text", "a;b"]))[0]) == [{"text": "a;b"}]


def test_lines_that_end_in_a_carriage_return_alone_are_read_or_refused_and_never_one_row(write_rows):
    assert values(read(write_rows("a.csv", b"a,b\rc,d\re,f\r"))[0]) == [{"a": "c", "b": "d"}, {"a": "e", "b": "f"}]
    for name in ("a.tsv", "a.jsonl"):
        assert "tr '\\r' '\\n' < " in refused(write_rows(name, b'{"a":\t1}\r{"b":\t2}\r'))
    first, second = write_rows("a.en", b"Go.\rHi."), write_rows("a.ko", b"a\n")
    with pytest.raises(UserError, match="a.en: its lines end in a carriage return"):
        read(aligned=[first, second])
    with pytest.raises(UserError, match="a.txt: its lines end in a carriage return"):
        open_evaluation([write_rows("a.txt", b"Go.\rHi.")])


def test_excels_word_on_the_separator_is_heard_and_is_no_row(write_rows):
    for first in ("sep=;", "SEP=;", '"sep=;"'):
        path = write_rows("a.csv", f"\ufeff{first}\r\ninstruction;output\r\na, b, c;d\r\n".encode())
        rows, rejects = read(path)
        assert (values(rows), rejects) == ([{"instruction": "a, b, c", "output": "d"}], [])
        assert str(rows[0].origin) == f"{path}:3"
        assert open_sources([path])[0].notes == (f"{path}: its columns are separated by semicolons",)
    assert values(read(write_rows("b.csv", ["sep=^", "a^b", "c^d"]))[0]) == [{"a": "c", "b": "d"}]


@pytest.mark.parametrize(
    "name, lines",
    [
        ("a.csv", ['"Add, please.",2', "Say.,3"]),
        ("a.csv", ["sep=;", "Add, please.;2", "", "Say.;3"]),
        ("a.tsv", ["Add, please.\t2", "Say.\t3"]),
    ],
)
def test_a_table_whose_columns_are_numbered_has_no_header(name, lines, write_rows):
    path = write_rows(name, lines)
    [source] = open_sources([path], columns=("1", "2"))
    assert [row.fields for row in source.rows()] == [{"1": "Add, please.", "2": "2"}, {"1": "Say.", "2": "3"}]
    assert source.notes[-1] == f"{path}: its first line is data, since --map names columns by number"


def test_a_numbered_table_loses_no_row_to_a_bad_one_and_a_header_is_not_taken_for_data(write_rows):
    [source] = open_sources([write_rows("a.csv", ['"never closed', "a,b", "c,d,e", "f,g"])], columns=("1", "2"))
    rows = list(source.rows())
    assert [row.fields["1"] for row in rows if isinstance(row, Row)] == ["a", "f"]
    bad = [row for row in rows if isinstance(row, Reject)]
    assert places(bad) == [(1, "broken csv"), (3, "wrong number of columns")]
    assert bad[0].reason == "broken csv: a quote is never closed."
    assert bad[1].reason == "wrong number of columns: 3, and this table has 2."
    with pytest.raises(UserError, match="the first line here names them: instruction, output. Map these names"):
        open_sources([write_rows("b.csv", ["Instruction,output", "a,b"])], columns=("1", "2"))


def test_plain_texts_are_read_to_compare_with_and_not_to_train_on(write_rows, tmp_path):
    path = write_rows("test.txt", b"\xef\xbb\xbfGo.\r\n\n  \nx\xffy\n" + "가.".encode())
    [source] = open_evaluation([str(tmp_path / "*.txt")])
    rows = list(source.rows())
    assert [(row.fields["text"], str(row.origin)) for row in (rows[0], rows[2])] == [
        ("Go.", f"{path}:1"),
        ("가.", f"{path}:5"),
    ]
    assert (rows[1].origin.row, rows[1].kind, len(rows)) == (4, "invalid UTF-8", 3)
    assert "do not know how to read '.txt'" in refused(path)
    with pytest.raises(UserError, match="there is no such file"):
        open_evaluation([str(tmp_path / "other.txt")])


def test_aligned_files_pair_line_with_line(write_rows):
    first = write_rows("a.en", [f"{n} Go." for n in range(500)])
    second = write_rows("a.ko", [f"{n} 가." * (n % 7) for n in range(500)])
    for limits in (DEFAULT_LIMITS, SMALL_BLOCKS):
        rows, rejects = read(aligned=[first, second], limits=limits)
        assert values(rows) == [{"first": f"{n} Go.", "second": f"{n} 가." * (n % 7)} for n in range(500)]
        assert rejects == []
    assert (rows[3].origin.file, rows[3].origin.row, rows[3].raw) == (first, 4, "3 Go.\t3 가.3 가.3 가.")


def test_aligned_files_of_unequal_length_are_refused(write_rows):
    first, second = write_rows("a.en", ["Go.", "Hi."]), write_rows("a.ko", ["가."])
    assert f"{first} has 2 lines and {second} has 1" in refused(aligned=[first, second])
    assert f"{second} has 1 lines and {first} has 2" in refused(aligned=[second, first])
    assert "are the same file" in refused(aligned=[first, first])


TMX = """<?xml version="1.0" encoding="{encoding}"?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4"><header srclang="en"/><body>
<tu tuid="1"><note>no text</note><tuv xml:lang="en"><seg>Go &amp; <hi>see</hi><ph>&lt;br&gt;</ph>.</seg></tuv>
  <tuv xml:lang="ko"><seg>가.</seg></tuv></tu>
{middle}
<tu><tuv lang="en"><seg>Hi.</seg></tuv><tuv lang="ko"><seg>안녕.</seg></tuv></tu>
</body></tmx>
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_translation_memory_gives_a_row_for_each_unit(encoding, write_rows):
    path = write_rows("a.tmx", TMX.format(encoding=encoding, middle="").encode(encoding))
    for limits in (DEFAULT_LIMITS, SMALL_BLOCKS):
        rows, rejects = read(path, limits=limits)
        assert rejects == []
        assert values(rows) == [
            {"translation": {"en": "Go & see.", "ko": "가."}},
            {"translation": {"en": "Hi.", "ko": "안녕."}},
        ]
        assert [row.origin.row for row in rows] == [1, 2]
    assert encoding != "utf-8" or rows[1].raw.startswith("<tu><tuv lang=") and rows[1].raw.endswith("</tuv></tu>")


@pytest.mark.parametrize(
    "middle, kind, words",
    [
        ("<tu><tuv xml:lang='en'><seg>a</tuv></tu>", "broken XML", "mismatched tag, line 6, column 32"),
        ("<tu><tuv lang='en'><seg>a & b</seg></tuv></tu>", "broken XML", "not well-formed (invalid token), line 6"),
        ("<tu><tuv xml:lang='en'><seg>a</seg></tuv>", "broken XML", "a <tu> begins inside another one, line 7"),
        ("<tu><tuv xml:lang='en'><seg>&nbsp;</seg></tuv></tu>", "unknown entity", "&nbsp; at line 6"),
        ("<tu><tuv><seg>a</seg></tuv></tu>", "unclear languages", "a <tuv> without xml:lang"),
        ("<tu>" + "<tuv lang='en'><seg>a</seg></tuv>" * 2 + "</tu>", "unclear languages", "two <tuv> of 'en'"),
        ("<tu><tuv lang='en'><seg>" + "a" * 3_000 + "</seg></tuv></tu>", "row too large", "max_row_bytes is 2,000"),
        ("<tu><tuv lang='en'><seg>\udcff</seg></tuv></tu>", "invalid UTF-8", "byte 0xff at byte offset"),
    ],
)  # fmt: skip
def test_a_bad_unit_is_one_reject_between_its_neighbours(middle, kind, words, write_rows):
    content = TMX.format(encoding="utf-8", middle=middle).encode("utf-8", "surrogateescape")
    path = write_rows("a.tmx", content)
    for block_bytes in (16, 262_144):
        rows, [reject] = read(path, limits=Limits(max_row_bytes=2_000, block_bytes=block_bytes))
        assert [row.fields["translation"]["en"] for row in rows] == ["Go & see.", "Hi."]
        assert (reject.origin.row, reject.kind) == (2, kind)
        assert words in reject.reason
    if kind == "invalid UTF-8":
        assert f"byte offset {content.index(0xFF)} " in reject.reason


def test_comments_and_an_empty_memory_are_no_units_and_an_early_end_is_told(write_rows):
    unit = "<tu><tuv lang='en'><seg>a</seg></tuv></tu>"
    path = write_rows("a.tmx", f"<tmx><header/><body><!-- {unit} -->{unit}<!-- x --></body></tmx>".encode())
    for limits in (DEFAULT_LIMITS, SMALL_BLOCKS):
        rows, rejects = read(path, limits=limits)
        assert (values(rows), rejects) == ([{"translation": {"en": "a"}}], [])
    assert read(write_rows("b.tmx", b"<tmx><header/><body></body></tmx>")) == ([], [])
    for cut in ("<tu><tuv", "<!-- x", ""):
        rows, [reject] = read(write_rows("c.tmx", f"<tmx><body>{unit}{cut}".encode()))
        assert (len(rows), reject.kind) == (1, "file cut off")


def test_xml_that_unpacks_itself_or_reads_other_files_is_refused(write_rows):
    laughs = "".join(f'<!ENTITY l{n} "{"&l" + str(n - 1) + ";" if n else "ha"}{"ha" * 9}">' for n in range(30))
    for subset in (laughs, '<!ENTITY file SYSTEM "secret.txt">', '<!ENTITY % p SYSTEM "x.dtd"> %p;'):
        head = f"<?xml version='1.0'?><!DOCTYPE tmx [{subset}]>"
        path = write_rows(
            "a.tmx", f"{head}<tmx><body><tu><tuv lang='en'><seg>&l29;</seg></tuv></tu></body></tmx>".encode()
        )
        message = refused(path)
        assert "declares the entity" in message and "encoding cannot be read" not in message
    assert "begins with <html>, and <tmx> is due" in refused(write_rows("b.tmx", b"<html><body/></html>"))
    assert "cannot be read as TMX: broken XML" in refused(write_rows("c.tmx", b"no xml at all"))
    assert "<tmx> has bytes that are no text" in refused(
        write_rows("d.tmx", b"<tmx \xf1='1'><body><tu></tu></body></tmx>")
    )


def test_a_task_of_super_natural_instructions_is_one_row(write_rows):
    task = {"Definition": ["Add."], "Positive Examples": [{"input": "1", "output": "1"}], "Instances": ROWS}
    path = write_rows("task1.json", json.dumps(task, indent=4).encode())
    [row], rejects = read(path)
    assert (row.fields, row.origin.row, rejects) == (task, 1, [])
    [reject] = read(path, limits=Limits(max_object_bytes=100))[1]
    assert reject.kind == "row too large"
    _, [reject] = read(write_rows("task2.json", json.dumps(task).encode().replace(b'"Add."', b"NaN")))
    assert reject.kind == "NaN or Infinity"


TWO = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": None}]
COLUMNS = {"instruction": ["a", "c"], "output": ["b", None]}
META_TOO = [{"meta": {"id": 1}, "output": "a", "input": "c"}, {"meta": {"id": 2}, "output": "b", "input": "d"}]
BY_PLACE = {name: dict(zip("01", column, strict=True)) for name, column in COLUMNS.items()}


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_one_list_of_objects_in_a_json_object_is_its_rows(is_packed, write_rows):
    content = {"schema": {"fields": [{"name": "index"}]}, "n": 12.5, "ids": [1], "data": TWO}
    content = b"\xef\xbb\xbf" + json.dumps(content, indent=1).encode()
    path = write_rows("a.json.gz" if is_packed else "a.json", gzip.compress(content) if is_packed else content)
    for limits in (DEFAULT_LIMITS, SMALL_BLOCKS):
        [source] = open_sources([path], limits=limits)
        assert [(row.fields, row.origin.row) for row in source.rows()] == [(TWO[0], 1), (TWO[1], 2)]
        assert not source.notes


@pytest.mark.parametrize(
    "row", [TWO[0], {"id": 7, "messages": [{"role": "user", "content": "Hi."}], "meta": {"a": 1}}]
)
def test_a_json_object_with_the_names_of_columns_is_one_row(row, write_rows):
    path = write_rows("a.json", row)
    assert values(read(path)[0]) == [row]
    assert open_sources([path])[0].notes == (f"{path}: read as one row",)


@pytest.mark.parametrize(
    "content, meant, rows",
    [
        ({"train": TWO, "te st'": TWO[:1]}, "the rows are those in 'te st''", TWO[:1]),
        ({"a": 1}, "it is one row", [{"a": 1}]),
        ({"version": 1, **COLUMNS}, "each key is a column", TWO),
        (BY_PLACE, "each key is a column", TWO),
        (dict(zip(("q1", "q2"), TWO, strict=True)), "each is a row", TWO),
        (
            {"meta": [{"id": 1}, {"id": 2}], "output": ["a", "b"], "input": ["c", "d"]},
            "each key is a column",
            META_TOO,
        ),
    ],
)
@pytest.mark.parametrize("name", ["my rows.json", "a.json.gz"])
def test_the_commands_that_are_advised_for_a_json_object_run_and_give_the_rows(
    content, meant, rows, name, write_rows, tmp_path
):
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    content = json.dumps(content).encode()
    message = refused(write_rows(name, gzip.compress(content) if name.endswith(".gz") else content))
    command = dict(part.split(": ", 1) for part in message.partition(" If ")[2].split("; if "))[meant]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert values(read(str(tmp_path / "rows.json"))[0]) == rows


@pytest.mark.parametrize("name", ["my rows.jsonl", "a.jsonl.gz"])
def test_the_command_that_is_advised_for_objects_over_several_lines_runs(name, write_rows, tmp_path):
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    content = "".join(json.dumps(row, indent=2) + "\n" for row in TWO).encode()
    message = refused(write_rows(name, gzip.compress(content) if name.endswith(".gz") else content))
    command = re.search(r"Write it so: (.*lines\.jsonl)\.", message)[1]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert values(read(str(tmp_path / "lines.jsonl"))[0]) == TWO


def test_a_data_set_of_the_hub_is_read_through_load_dataset(write_rows, tmp_path):
    """load_dataset takes a local folder where a Hub id is due; the rest of the way is the same."""
    write_rows("train.jsonl", ROWS)
    rows, rejects = read(f"hf:{tmp_path}")
    assert (values(rows), rejects) == (ROWS, [])
    assert str(rows[2].origin) == f"hf:{tmp_path}:3"
    assert "could not be loaded from the Hub" in refused(f"hf:{tmp_path}:no_such_split")


# Splits


def splits_of(*entries, **more):
    """The split of each source, by the last part of its name."""
    return {source.name.rpartition("/")[2]: source.split for source in open_sources(entries, **more)}


@pytest.mark.parametrize(
    "names",
    [
        {"train.jsonl": "train", "validation.jsonl": "validation", "test.jsonl": "test"},
        {"train-00000-of-00002.jsonl": "train", "dev.jsonl": "validation", "news.test.jsonl": "test"},
        {"Training.jsonl": "train", "valid_1.jsonl": "validation", "test2024.jsonl": "test", "more.jsonl": "train"},
        {"a.jsonl": "train", "eval/b.jsonl": "test", "val/c.jsonl": "validation", "test/train.jsonl": "train"},
        {"developers.jsonl": "train", "testimonies.jsonl": "train", "latest.jsonl": "train"},
        {"a.jsonl": "train", "dev.jsonl": "validation", "devtest.jsonl": "test"},
        {"a.jsonl": "train", "dev_test.jsonl": "test", "test-dev.jsonl": "test", "newsdev2015.jsonl": "validation"},
        {"a.jsonl": "train", "newstest2014.jsonl": "test", "tst2014.jsonl": "test", "dev2010.jsonl": "validation"},
        {"train_sft.jsonl": "train", "test_sft.jsonl": "test", "validation_matched.jsonl": "validation"},
        {"a.jsonl": "train", "valid_unseen.jsonl": "validation", "testA.jsonl": "test", "held_out.jsonl": "test"},
        {"trainset.jsonl": "train", "testset.jsonl": "test", "devset.jsonl": "validation", "heldout.jsonl": "test"},
    ],
)  # fmt: skip
def test_the_names_in_a_folder_say_their_splits(names, write_rows, tmp_path):
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(GOOD)
    found = {
        str(Path(source.name).relative_to(tmp_path / "data")): source.split
        for source in open_sources([str(tmp_path / "data")])
    }
    assert found == names
    notes = " ".join(note for source in open_sources([str(tmp_path / "data")]) for note in source.notes)
    assert ("is read by the names in it" in notes) == (set(names.values()) != {"train"})


@pytest.mark.parametrize(
    "name", ["train_test", "mytest", "testdata", "evaluated", "validated", "devdata", "my_holdout"]
)
def test_a_name_that_may_be_of_what_is_held_out_is_not_trained_on_unsaid(name, write_rows, tmp_path):
    (tmp_path / "data").mkdir()
    for file in ("a", name):
        (tmp_path / "data" / f"{file}.jsonl").write_bytes(GOOD)
    path = str(tmp_path / "data" / f"{name}.jsonl")
    assert f"{path}: its name does not say" in refused(str(tmp_path / "data"))
    assert splits_of(path) == {f"{name}.jsonl": "train"}
    assert set(splits_of(held_out={"test": [str(tmp_path / "data")]}).values()) == {"test"}


def test_a_glob_says_splits_below_its_pattern_and_a_file_named_itself_is_what_it_was_named_for(tmp_path, monkeypatch):
    folder = tmp_path / "test-data"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_bytes(GOOD)
    assert splits_of(f"{folder}/*.jsonl") == {"train.jsonl": "train", "test.jsonl": "test"}
    assert splits_of(str(folder / "test.jsonl")) == {"test.jsonl": "train"}


def test_a_saved_dict_and_a_data_set_of_the_hub_are_read_by_their_splits(write_rows, tmp_path):
    part = datasets.Dataset.from_dict({"a": ["b"]})
    parts = {"train": part, "validation/news": part, "test": part, "unsupervised": part}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    found = open_sources([str(tmp_path / "saved")])
    assert [source.split for source in found] == ["train", "validation", "test"]
    assert f"{tmp_path / 'saved'}: its 1 split unsupervised not read" in found[0].notes
    assert values(read(str(tmp_path / "saved" / "unsupervised"))[0]) == [{"a": "b"}]
    assert "is a data set saved by `datasets`, inside the folder" in refused(str(tmp_path))
    (tmp_path / "hub").mkdir()
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl"):
        (tmp_path / "hub" / name).write_bytes(GOOD)
    hub = f"hf:{tmp_path / 'hub'}"
    assert splits_of(hub) == {"hub:train": "train", "hub:validation": "validation", "hub:test": "test"}
    assert splits_of(f"{hub}:test") == {"hub:test": "train"}
    assert splits_of(held_out={"test": [f"a={hub}", f"b={hub}:train"]}) == {
        "hub:test": "test/a",
        "hub:train": "test/b",
    }


def test_splits_whose_names_say_nothing_are_refused_by_name(tmp_path):
    part = datasets.Dataset.from_dict({"a": ["b"]})
    datasets.DatasetDict({"en": part, "ko": part}).save_to_disk(tmp_path / "saved")
    assert f"has the splits en, ko, whose names do not say what they are for. Name the one to read: {tmp_path}" in (
        refused(str(tmp_path / "saved"))
    )


def test_what_is_named_to_be_held_out_is_never_train(write_rows, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl", "validation.jsonl"):
        (folder / name).write_bytes(GOOD)
    other = write_rows("other.jsonl", GOOD)
    held_out = {"test": [str(folder / "b.jsonl")], "validation": [other]}
    found = open_sources([str(folder)], held_out=held_out)
    assert [(Path(source.name).name, source.split) for source in found] == [
        ("a.jsonl", "train"),
        ("other.jsonl", "validation"),
        ("b.jsonl", "test"),
    ]
    assert f"{folder}/b.jsonl is test, as --test says, and not train" in found[0].notes
    assert f"{folder}/validation.jsonl is not read: --validation names what is validation instead" in found[0].notes
    with pytest.raises(UserError, match="is in --data and in --test. Take it out of one of them"):
        open_sources([other], held_out={"test": [other]})


def test_sets_have_names_all_or_none_and_a_file_may_be_called_like_one(write_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "news=c.jsonl"):
        write_rows(name, GOOD)
    named = {"validation": ["news=a.jsonl", "news=b.jsonl", "medical=b.jsonl"], "test": ["a.jsonl", "b.jsonl"]}
    assert [(source.name, source.split) for source in open_sources([], held_out=named)] == [
        ("a.jsonl", "validation/news"),
        ("b.jsonl", "validation/news"),
        ("b.jsonl", "validation/medical"),
        ("a.jsonl", "test"),
        ("b.jsonl", "test"),
    ]
    assert splits_of(held_out={"test": ["news=c.jsonl"]}) == {"news=c.jsonl": "test"}
    with pytest.raises(UserError, match="--test has sets with a name and b.jsonl without one. Give each a name"):
        open_sources([], held_out={"test": ["news=a.jsonl", "b.jsonl"]})


def test_of_what_has_splits_only_the_one_that_was_asked_for_is_read(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_bytes(GOOD)
    [source] = open_sources([], held_out={"test": [str(folder)]})
    assert (Path(source.name).name, source.split) == ("test.jsonl", "test")
    assert f"of {folder}, only what is called test is read: not {folder}/train.jsonl" in source.notes
    with pytest.raises(UserError, match="nothing in it is called validation .train is .*Name the file or the split"):
        open_sources([], held_out={"validation": [str(folder)]})
    (folder / "train.jsonl").unlink()
    assert "nothing is left to train on (test is" in refused(str(folder))
    [source] = open_evaluation([str(folder)])
    (folder / "train.jsonl").write_bytes(GOOD)
    assert [it.name for it in open_evaluation([str(folder)])] == [source.name]


def test_aligned_files_are_named_like_any_other_source(write_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows("train.en", b"Go.\nHi.\n")
    write_rows("train.ko", "가.\n안녕.\n".encode())
    rows, rejects = read("train.en+train.ko")
    assert (values(rows), rejects) == ([{"first": "Go.", "second": "가."}, {"first": "Hi.", "second": "안녕."}], [])
    assert splits_of(held_out={"test": ["wmt=train.en+train.ko"]}) == {"train.en + train.ko": "test/wmt"}


def test_the_samples_are_whole_and_bring_their_instructions():
    [source] = open_sources(["tatoeba"])
    assert (source.forward, source.backward) == ("Translate English to Korean:", "Translate Korean to English:")
    tatoeba, rejects = read("tatoeba")
    assert (len(tatoeba), rejects) == (3318, [])
    assert str(tatoeba[0].origin) == "tatoeba_eng_kor.tsv:1"
    tasks, rejects = read("seed_tasks")
    assert (len(tasks), rejects) == (175, [])
    assert all(row.fields["instances"] for row in tasks)
    words, rejects = read("cmudict")
    assert (len(words), rejects) == (133_973, [])
    assert {"first": "a b b e y", "second": "AE1 B IY0"} in [row.fields for row in words[:300]]
    assert set(SAMPLES) == {"tatoeba", "seed_tasks", "cmudict"}


def test_every_shipped_pair_keeps_its_attribution():
    lines = (SAMPLES_FOLDER / SAMPLES["tatoeba"].file).read_text(encoding="utf-8").splitlines()
    assert all(line.split("\t")[2].startswith("CC-BY 2.0 (France) Attribution: tatoeba.org #") for line in lines)
    licences = (SAMPLES_FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    assert all(sample.file in licences for sample in SAMPLES.values())
    notice = (SAMPLES_FOLDER / "cmudict.LICENSE").read_text(encoding="utf-8")
    assert "Copyright (C) 1993-2015 Carnegie Mellon University" in notice and "ANY EXPRESSED OR IMPLIED" in notice


# Odd but right


def test_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(write_rows):
    for name, content in {
        "a.jsonl": b'\xef\xbb\xbf{"instruction": "a", "output": "b"}\r\n{"instruction": "c", "output": "d"}\r\n',
        "a.json": b'\xef\xbb\xbf[{"instruction": "a", "output": "b"},\r\n{"instruction": "c", "output": "d"}]\r\n',
        "a.csv": b"\xef\xbb\xbfinstruction,output\r\na,b\r\nc,d\r\n",
        "a.tsv": b"\xef\xbb\xbfinstruction\toutput\r\na\tb\r\nc\td\r\n",
    }.items():
        rows, rejects = read(write_rows(name, content))
        assert values(rows) == [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}], name
        assert rejects == []
    rows, _ = read(write_rows("b.tsv", b"\xef\xbb\xbfGo.\tGa.\r\n"))
    assert values(rows) == [{"first": "Go.", "second": "Ga."}]


def test_only_a_newline_ends_a_line(write_rows):
    text = "a\u2028b\x0bc\x1cd\u0085e"
    assert values(read(write_rows("a.jsonl", [{"instruction": text}]))[0]) == [{"instruction": text}]
    assert values(read(write_rows("a.tsv", [f"{text}\tx"]))[0]) == [{"first": text, "second": "x"}]
    assert values(read(write_rows("a.csv", ["text,output", f"{text},x"]))[0]) == [{"text": text, "output": "x"}]
    rows, _ = read(aligned=[write_rows("a.en", [text]), write_rows("a.ko", ["x"])])
    assert values(rows) == [{"first": text, "second": "x"}]


def test_text_is_kept_exactly(write_rows):
    text = "  {{ 7*7 }} {% raw %} </s> <pad> \\n \t 가\u1100\u1161\u11a8 🙂 \u0000"
    assert values(read(write_rows("a.jsonl", [{"instruction": text}]))[0]) == [{"instruction": text}]
    assert values(read(write_rows("a.json", [{"instruction": text}]))[0]) == [{"instruction": text}]


def test_a_csv_field_may_be_very_long(write_rows):
    [row], _ = read(write_rows("a.csv", ["instruction,output", f"a,{'b' * 300_000}"]))
    assert len(row.fields["output"]) == 300_000


@pytest.mark.parametrize(
    "name, content, layout",
    [
        ("a.jsonl", b"[" + GOOD + b"]", "a JSON array"),
        ("a.jsonl", b"[\n " + GOOD + b",\n " + GOOD + b"\n]\n", "a JSON array"),
        ("a.jsonl", b"[" + GOOD + b",\n" + GOOD + b"]\n", "a JSON array"),
        ("a.json", GOOD + b"\n" + GOOD + b"\n", "one JSON object a line"),
        ("a.json", b'{"instruction": "a" "b"}\n' + GOOD + b"\n" + GOOD, "one JSON object a line"),
    ],
)
def test_arrays_and_lines_are_told_apart_by_what_is_in_the_file(name, content, layout, write_rows):
    path = write_rows(name, content)
    rows, _ = read(path)
    assert values(rows) == [json.loads(GOOD)] * content.count(GOOD)
    assert open_sources([path])[0].notes == (f"{path}: read as {layout}, in spite of its name",)


def test_lines_with_a_bracket_in_the_first_stay_lines(write_rows):
    path = write_rows("a.jsonl", b'["instruction": "a"}\n' + GOOD + b"\n" + GOOD + b"\n")
    rows, [reject] = read(path)
    assert [row.origin.row for row in rows] == [2, 3]
    assert reject.origin.row == 1


# Bad rows


@pytest.mark.parametrize(
    "row, kind, field, words",
    [
        ('{"a": NaN}', "NaN or Infinity", None, "NaN is no JSON"),
        ('{"a": {"b": [-Infinity]}}', "NaN or Infinity", None, "-Infinity is no JSON"),
        ('{"a": "b", "a": "c"}', "repeated field", "a", "'a' occurs twice in one object; keep the right one"),
        ('{"a": [{"role": "x", "role": "y"}]}', "repeated field", "role", "'role' occurs twice"),
        ('{"a": ' + "1" * 5_000 + "}", "number too long", None, "a number has too many digits"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply", None, "nested too deeply"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply", None, "nested deeper than 100"),
        ("7", "not an object", None, "the row is a number (7); an object {…} is due"),
        ('["a", {"b": 1}]', "not an object", None, "the row is a list"),
        ("null", "not an object", None, "the row is null"),
        ('{"a" "b"}', "broken JSON", None, "Expecting ':' delimiter, line 3, column 6."),
        ('{"a": b}', "broken JSON", None, "Expecting value, line 3, column 7."),
        ('{"a": "b\udcff"}', "invalid UTF-8", None, "byte 0xff at byte offset"),
        ('{"a": "' + "b" * 600_000 + '"}', "row too large", None, "and max_row_bytes is 500,000"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "data.json"])
def test_a_bad_row_is_one_reject_between_its_neighbours(name, row, kind, field, words, write_rows):
    before, between, after = {
        "a.jsonl": (b"", b"\n", b"\n"),
        "a.json": (b"[", b",\n", b"]"),
        "data.json": (b'{"version": 1, "data": [', b",\n", b'], "more": 1}'),
    }[name]
    good = [json.dumps({"a": f"good {number}"}).encode() for number in range(4)]
    content = before + between.join([*good[:2], row.encode("utf-8", "surrogateescape"), *good[2:]]) + after
    path = write_rows(name, content)
    for block_bytes in (64, 262_144):
        rows, [reject] = read(path, limits=Limits(max_row_bytes=500_000, block_bytes=block_bytes))
        assert [row.fields["a"] for row in rows] == [f"good {number}" for number in range(4)]
        assert [row.origin.row for row in rows] == [1, 2, 4, 5]
        assert (reject.origin.row, reject.kind, reject.field) == (3, kind, field)
        assert words in reject.reason
        assert reject.raw == row[: len(reject.raw)] and len(reject.raw) >= min(len(row), 1_000)
    if kind == "invalid UTF-8":
        assert f"byte offset {content.index(0xFF)} " in reject.reason
        assert "\\udcff" in reject.as_json()["raw"]


@pytest.mark.parametrize(
    "array, kept, rejected",
    [
        ('[{G}, {"instruction": "a", "output": "b}, {G}]', 2, 1),  # a quote is missing
        ('[{G}, {"instruction": "a", "output": "b", {G}]', 2, 1),  # a brace is missing
        ("[{G} {G}, {G}]", 2, 1),  # a comma is missing
        ("[{G}, {G} {G}]", 2, 1),
        ("[{G},, {G}]", 2, 1),  # a comma too many
        ("[{G}, {G},]", 2, 0),  # as many editors leave it
        ("[{G}, x, {G}, {G}]", 3, 1),  # no value at all
        ("[{G}}, {G}, {G}]", 2, 1),  # a brace too many
        ("[{G}, {G}", 2, 1),  # cut off after a row
        ("[{G}, {G},", 2, 1),  # cut off after a comma
        ('[{G}, {"instruction": "a", "out', 1, 2),  # cut off inside a row
        ("[{G}] {G}", 1, 1),  # text after the end
        ("[{G}]\n[{G}, {G}]", 2, 1),  # two arrays
        ("[{G}, 7, null, {G}]", 2, 2),
        ("[" + "[" * 100_000, 0, 2),
        ('[{G}, {"instruction": [{"b": 1}, {"b": 2}], "output": c}, {G}, {G}]', 3, 1),  # objects inside the broken row
        ('[{"b": [{"c": 1}, {"c": 2}], "output": x}, {"b": 1}, {"b": 2}]', 2, 1),  # also in the first one
        ("[]", 0, 0),
    ],
)  # fmt: skip
def test_broken_arrays_keep_what_can_be_kept(array, kept, rejected, write_rows):
    path = write_rows("a.json", array.replace("{G}", GOOD.decode()).encode())
    for limits in (DEFAULT_LIMITS, SMALL_BLOCKS):
        rows, rejects = read(path, limits=limits)
        assert (len(rows), len(rejects)) == (kept, rejected), rejects
        assert all(row.fields in ({"instruction": "a", "output": "b"}, {"b": 1}, {"b": 2}) for row in rows)
        assert sorted(row.origin.row for row in [*rows, *rejects]) == list(range(1, kept + rejected + 1))


def test_line_and_column_are_those_of_the_file_wherever_the_window_stands(write_rows):
    lines = [b'{"a": "%d"},' % number for number in range(3_000)]
    lines[2_500] = b'  {"a" "broken"},'
    path = write_rows("a.json", b"[\n" + b"\n".join(lines).rstrip(b",") + b"\n]\n")
    for limits in (DEFAULT_LIMITS, SMALL_BLOCKS):
        _, [reject] = read(path, limits=limits)
        assert reject.reason == "broken JSON: Expecting ':' delimiter, line 2502, column 8."


def test_invalid_utf8_is_named_by_byte_offset_and_loses_no_other_row(write_rows):
    content = b"\xef\xbb\xbfGo.\tGa.\nx\xc3\ty\nHi.\tHo.\n"
    rows, [reject] = read(write_rows("a.tsv", content))
    assert [row.fields["first"] for row in rows] == ["Go.", "Hi."]
    assert f"byte 0xc3 at byte offset {content.index(0xC3)} " in reject.reason
    content = 'instruction,output\n가,"나\nb"\nc,"d\n\udcff"\ne,f\n'.encode("utf-8", "surrogateescape")
    path = write_rows("a.csv", content)
    for block_bytes in (1, 7, 16, 262_144):
        rows, [reject] = read(path, limits=Limits(block_bytes=block_bytes))
        assert [row.fields["output"] for row in rows] == ["나\nb", "f"]
        assert (reject.origin.row, f"byte offset {content.index(0xFF)} " in reject.reason) == (4, True)


def test_invalid_utf8_in_aligned_files_names_the_file_that_has_it(write_rows):
    first, second = write_rows("a.en", b"Go.\nHi.\n"), write_rows("a.ko", b"x\xffy\nAn\n")
    [row], [reject] = read(aligned=[first, second])
    assert row.fields["first"] == "Hi."
    assert (reject.origin.file, reject.origin.row) == (second, 1)


def test_korean_in_another_encoding_is_told_and_how_to_convert_it(write_rows):
    line = '{"instruction": "번역하세요", "output": "안녕하십니까"}\n'
    for name in ("a.jsonl", "a.tsv"):
        message = refused(write_rows(name, ("가나다라\t마바사" if name == "a.tsv" else line).encode("cp949")))
        assert "Read as CP949 its words are '" in message
        assert f"iconv -f CP949 -t UTF-8 {message.split(' is not')[0]}" in message
    rows, [reject] = read(write_rows("b.jsonl", line.encode() + line.encode("cp949") + line.encode()))
    assert len(rows) == 2
    assert reject.reason.endswith("Read as CP949 it is '번역하세요': iconv -f CP949 -t UTF-8.")
    _, [reject] = read(write_rows("c.jsonl", line.encode() + b'{"instruction": "caf\xe9 au lait"}\n'))
    assert "CP949" not in reject.reason


@pytest.mark.parametrize("name", ["my rows.csv", "a.jsonl", "a.csv.gz"])
def test_a_file_in_windows_1252_is_told_with_the_place_and_a_command_that_mends_it(name, write_rows, tmp_path):
    text = "instruction,output\nLe café à la crème,“Déjà vu” – 5 €\n"
    if name == "a.jsonl":
        text = '{"instruction": "L’été à Köln", "output": "Übersetzt: schön"}\n'
    content = text.encode("cp1252")
    path = write_rows(name, gzip.compress(content) if name.endswith(".gz") else content)
    message = refused(path)
    first = next(place for place, byte in enumerate(content) if byte > 127)
    assert f"(byte 0x{content[first]:02x} at byte offset {first})" in message
    assert "Read as WINDOWS-1252 its words are '" in message
    command = message.split("convert it: ")[1]
    subprocess.run(command, shell=True, check=True)
    mended = tmp_path / name.replace(".gz", "").replace(".", ".utf8.")
    assert mended.read_bytes() == text.encode() and len(read(str(mended))[0]) == 1


def test_what_is_no_windows_1252_is_not_called_so(write_rows):
    for text, encoding in [
        ("Привет, мир. Как твои дела сегодня?", "cp1251"),
        ("καλημέρα κόσμε, πώς είσαι σήμερα", "iso8859-7"),
        ("zażółć gęślą jaźń, proszę bardzo, cześć", "cp1250"),
        ("日本語のテキスト", "shift-jis"),
    ]:
        [reject] = read(write_rows("a.jsonl", f'{{"instruction": "{text}"}}\n'.encode(encoding)))[1]
        assert reject.kind == "invalid UTF-8" and "1252" not in reject.reason
    _, [reject] = read(write_rows("b.jsonl", GOOD + b'\n{"instruction": "caf\xe9 au lait"}\n'))
    assert reject.reason.endswith("Read as WINDOWS-1252 it is 'café': iconv -f WINDOWS-1252 -t UTF-8.")
    mixed = GOOD + '\n{"instruction": "안녕"}\n'.encode() + b'{"instruction": "caf\xe9 d\xe9j\xe0 \xe9t\xe9 \xe0"}\n'
    assert len(read(write_rows("c.jsonl", mixed))[0]) == 2  # two encodings: no command mends the whole
    few = (GOOD + b"\n") * 100 + b'{"instruction": "caf\xe9 d\xe9j\xe0"}\n' * 5
    assert len(read(write_rows("d.jsonl", few))[0]) == 100  # bad rows cost themselves


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_invalid_utf8_in_columns_loses_no_other_row(name, tmp_path):
    bad = pyarrow.array([b"ok", b"\xff", b"fine"]).view(pyarrow.string())
    path = write_columns(tmp_path, name, {"instruction": ["a", "b", "c"], "output": bad})
    rows, [reject] = read(path)
    assert [row.fields["output"] for row in rows] == ["ok", "fine"]
    assert (reject.origin.row, reject.field, reject.kind) == (2, "output", "invalid UTF-8")
    assert "byte 0xff at byte 0 of the value" in reject.reason


LABEL = datasets.ClassLabel(names=["negative", "positive"])
FEATURES = {
    "answer": (datasets.Json(), ['서울\n"특별시"', 42, None, {"a": [1]}]),
    "parts": (datasets.List(datasets.Json()), [["가", 1], [], None, [{"a": "b"}]]),
    "nested": (
        {"json": datasets.Json(), "label": LABEL},
        [{"json": ["x"], "label": 0}, None, *[{"json": None, "label": 1}] * 2],
    ),
    "label": (LABEL, [1, 0, -1, 1]),
    "labels": (datasets.List(LABEL), [[0, 1], [], [1], None]),
    "text": (datasets.Value("large_string"), ["a", "b", None, "d"]),
}


@pytest.mark.parametrize("name", ["a.parquet", "saved", "hf"])
def test_columns_of_datasets_have_the_values_that_are_meant(name, tmp_path):
    """JSON text and numbers of labels are how `datasets` stores them."""
    features = datasets.Features({column: feature for column, (feature, _) in FEATURES.items()})
    rows = datasets.Dataset.from_dict({column: stored for column, (_, stored) in FEATURES.items()}, features)
    path = str(tmp_path / name)
    rows.save_to_disk(path) if name == "saved" else rows.to_parquet(f"{path}/train.parquet" if name == "hf" else path)
    found, rejects = read(f"hf:{path}" if name == "hf" else path)
    assert rejects == []
    meant = {column: stored for column, (_, stored) in FEATURES.items()} | {
        "nested": [{"json": ["x"], "label": "negative"}, None, *[{"json": None, "label": "positive"}] * 2],
        "label": ["positive", "negative", None, "positive"],
        "labels": [["negative", "positive"], [], ["positive"], None],
    }
    assert values(found) == [dict(zip(meant, row, strict=True)) for row in zip(*meant.values(), strict=True)]


def test_a_value_of_columns_that_is_not_what_the_file_says_costs_its_own_row(tmp_path):
    features = {"json": {"_type": "Json"}, "label": {"_type": "ClassLabel", "names": ["no", "yes"]}}
    table = pyarrow.table({"json": ["1", "[1", '{"a": NaN}', "[" * 500 + "]" * 500, "2"], "label": [1, 0, 0, 0, 2]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    rows, rejects = read(str(tmp_path / "a.parquet"))
    assert values(rows) == [{"json": 1, "label": "yes"}]
    assert [reject.reason for reject in rejects] == [
        "broken JSON in 'json': Expecting ',' delimiter, character 3.",
        "NaN or Infinity in 'json': NaN is no JSON; write null, a number, or a string, in the row at character 1.",
        "nested too deeply in 'json': lists and objects nested too deeply, in the row at character 1.",
        "unknown label in 'label': 2, and the file names 0 to 1.",
    ]
    for metadata in (b"no JSON", b"[]", b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}'):
        pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
        assert len(read(str(tmp_path / "a.parquet"))[0]) == 5


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_large_row_of_columns_is_one_reject_that_shows_its_beginning(name, tmp_path):
    path = write_columns(tmp_path, name, {"a": ["x", "y" * 5_000, "z"], "n": [1, 2, 3]})
    rows, [reject] = read(path, limits=Limits(max_row_bytes=1_000))
    assert [row.fields["a"] for row in rows] == ["x", "z"]
    assert (reject.origin.row, reject.kind) == (2, "row too large")
    assert reject.raw.startswith('{"a": "yyyy') and len(reject.raw) <= 1_000


def test_a_value_stored_once_and_used_often_is_not_written_out_for_all_rows(tmp_path):
    words = pyarrow.DictionaryArray.from_arrays([0, 1, 1, 1], ["x", "y" * 5_000])
    path = write_columns(tmp_path, "a.arrow", {"a": words})
    rows, rejects = read(path, limits=Limits(max_row_bytes=1_000))
    assert (values(rows), [reject.origin.row for reject in rejects]) == ([{"a": "x"}], [2, 3, 4])


def test_a_parquet_file_that_unpacks_too_far_is_refused(tmp_path):
    columns = {"a": [" " * 1_000_000 + str(number) for number in range(30)]}
    path = write_columns(tmp_path, "a.parquet", columns, compression="zstd", use_dictionary=False)
    message = refused(path, limits=Limits(min_unpacked_bytes=1_000_000))
    assert "and it unpacks to 30," in message and "raise max_unpacked_ratio" in message
    assert len(read(path)[0]) == 30


def test_arrow_offsets_that_lead_out_of_the_file_are_refused_and_not_followed(tmp_path):
    """Found by fuzzing: to ask such a batch for its size ended the process."""
    texts = pyarrow.array(["one", "two", "three"])
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2, 3], pyarrow.int32()), texts)
    path = tmp_path / "a.arrow"
    for array in (texts, lists):
        write_columns(tmp_path, "a.arrow", {"a": array})
        content, offsets = bytearray(path.read_bytes()), array.buffers()[1].to_pybytes()[:16]
        place = content.rindex(offsets)
        content[place + 4 : place + 8] = (2**30).to_bytes(4, "little")
        path.write_bytes(content)
        assert "cannot be read as Arrow" in refused(str(path))


def test_ragged_csv_records_and_stray_quotes_lose_only_themselves(write_rows):
    lines = ["instruction,input,output", "a,,b", "c,d", "e,f,g,h", 'i,"stray,k', "l,,m", 'n,"o"p,q', "r,,s"]
    path = write_rows("a.csv", lines)
    for limits in (DEFAULT_LIMITS, SMALL_BLOCKS):
        rows, rejects = read(path, limits=limits)
        assert [row.fields["instruction"] for row in rows] == ["a", "l", "r"]
        assert places(rejects) == [
            (3, "wrong number of columns"),
            (4, "wrong number of columns"),
            (5, "broken csv"),
            (7, "broken csv"),
        ]


def test_tsv_lines_with_other_columns_are_rejected(write_rows):
    path = write_rows("a.tsv", ["a\tb\tc", "d", "e\t \tf", "i\tj\tk\tl", "", "m\tn\to"])
    rows, rejects = read(path)
    assert [row.fields["first"] for row in rows] == ["a", "e", "m"]
    assert places(rejects) == [(2, "wrong number of columns"), (4, "wrong number of columns")]


# Useless files


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b" \n\n ", "is empty"),
        ("a.csv", b"\xef\xbb\xbf", "is empty"),
        ("a.json", b'"text"', "line 1, column 1: '\"' stands here, and an array of objects is due"),
        ("a.json", b'\n {"a": 1}', "the keys of this one are 'a'. If it is one row: jq '[.]'"),
        ("a.json", b'{"train": [{}], "test": [{"a": 1}]}', "the keys of this one are 'train', 'test'. If each key is"),
        ("a.json", b'{\n"a": 1\n}\n{\n"a": 2\n}', "line 4, column 1: text after the end of the object"),
        ("a.json", b'{"data": [{"a": "]}', "the end of the file stands where ',' or '}' is due"),
        ("a.jsonl", b'{\n "a": 1\n}\n', "its first object goes over several lines, and one object a line is due"),
        ("a.json", "[{}]".encode("utf-16"), "is UTF-16, and UTF-8 is due. Convert it: iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", '{"a": "b"}'.encode("utf-16-le"), "is UTF-16"),
        ("a.csv", b'"instruction,output\na,b\n', "the header"),
        ("a.csv", b"output, output\na,b\n", "names a column twice"),
        ("a.csv", b"output,b\xff\na,b\n", "invalid UTF-8: byte 0xff at byte offset 8 of the file"),
        ("a.tsv", b"no tab\nhere\n", "no tabs"),
        ("a.parquet", b"PAR1 but not really", "cannot be read as parquet"),
        ("a.arrow", b"ARROW1\0\0 but not really", "cannot be read as Arrow"),
    ],
)
def test_a_useless_file_is_one_clear_error(name, content, words, write_rows):
    message = refused(write_rows(name, content))
    assert words in message
    assert name in message


def test_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["a", "a"])
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert "has the column 'a' twice" in refused(str(tmp_path / "a.arrow"))


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_a_field_in_a_field_whose_name_is_no_utf8_is_an_error(name, tmp_path):
    path = Path(write_columns(tmp_path, name, {"a": [{"qqqq": "x"}]}))
    path.write_bytes(path.read_bytes().replace(b"qqqq", b"\xea\xeaqq"))
    assert f"{name} cannot be read as" in refused(str(path))


# Properties


def corrupted(line, draw):
    """One to five bytes of a row changed, taken out or put in, never a line end."""
    content = bytearray(line)
    for _ in range(draw.randint(1, 5)):
        place = draw.randrange(1, len(content) - 1)
        byte = draw.choice([draw.randrange(256), *b'"\\{}[],:\x00'])
        if byte in b"\r\n":
            continue
        draw.choice(
            [
                lambda place=place, byte=byte: content.__setitem__(place, byte),
                lambda place=place, byte=byte: content.insert(place, byte),
                lambda place=place: content.pop(place),
            ]
        )()
    return bytes(content)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_corrupted_rows_never_lose_or_change_a_sound_one(suffix, write_rows):
    draw = random.Random(suffix)
    for _ in range(60):
        rows = [
            {"instruction": f"task {n}: {{x}}, [y]", "input": '가나 "q" }, {', "output": f"answer {n}"}
            for n in range(8)
        ]
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        bad = set(draw.sample(range(8), draw.randint(1, 3)))
        lines = [corrupted(line, draw) if n in bad else line for n, line in enumerate(lines)]
        content = b"\n".join(lines) if suffix == "jsonl" else b"[" + b",\n".join(lines) + b"]"
        found, rejects = read(write_rows(f"a.{suffix}", content))
        kept = values(found)
        for n, row in enumerate(rows):
            assert n in bad or row in kept, (n, content)
        numbers = sorted(row.origin.row for row in [*found, *rejects])
        assert numbers == list(range(1, len(numbers) + 1))
        assert suffix == "json" or len(numbers) == 8  # in an array, two broken neighbours may be one reject
        for reject in rejects:
            json.dumps(reject.as_json(), ensure_ascii=False).encode("utf-8")


def test_corrupted_table_lines_never_lose_a_sound_one(write_rows):
    draw = random.Random(3)
    for name, header in (("a.csv", [b"instruction,output"]), ("a.tsv", [])):
        for _ in range(60):
            delimiter = b"," if header else b"\t"
            lines = [b"task %d" % n + delimiter + b"answer %d" % n for n in range(10)]
            bad = set(draw.sample(range(10), 3))
            broken = [corrupted(line, draw) if n in bad else line for n, line in enumerate(lines)]
            rows, _ = read(write_rows(name, b"\n".join(header + broken) + b"\n"))
            kept = [list(row.fields.values())[:2] for row in rows]
            for n in set(range(10)) - bad:
                assert [f"task {n}", f"answer {n}"] in kept, (n, broken)
