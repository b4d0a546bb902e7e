"""Every format is read, every bad row is named with its place, and no bad row loses another."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from diptych.data_prep.readers import SAMPLES, SAMPLES_FOLDER, Directions, open_aligned, open_source
from diptych.data_prep.records import Record, Reject, Row, UserError
from diptych.data_prep.validate import validate

BOTH = Directions("Translate English to Korean:", "Translate Korean to English:")
ROWS = [
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"instruction": "Say 안녕.", "input": "", "output": "안녕"},
    {"instruction": 'Two\nlines, and "quotes"', "input": "a,b\tc", "output": "{{ 7 * 7 }} </s>"},
]


def read(entry, directions=BOTH):
    """Records and rejects of a file, in order."""
    found = [row if isinstance(row, Reject) else validate(row) for row in open_source(entry, directions).read()]
    return [row for row in found if isinstance(row, Record)], [row for row in found if isinstance(row, Reject)]


def values(records):
    return [{"instruction": r.instruction, "input": r.input, "output": r.output} for r in records]


def csv_line(row):
    return ",".join('"' + value.replace('"', '""') + '"' for value in row.values())


def write_parquet(tmp_path, columns):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


# Formats


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "ROWS.JSONL"])
def test_the_same_rows_come_out_of_every_format(name, write_rows, tmp_path):
    if name == "rows.parquet":
        path = write_parquet(tmp_path, {field: [row[field] for row in ROWS] for field in ROWS[0]})
    elif name == "rows.csv":
        path = write_rows(name, ["instruction,input,output", *map(csv_line, ROWS)])
    else:
        path = write_rows(name.replace("ROWS.JSONL", "upper.jsonl"), ROWS)
    records, rejects = read(path)
    assert values(records) == ROWS
    assert rejects == []


def test_each_record_knows_its_file_and_row(write_rows):
    jsonl = write_rows("rows.jsonl", b'{"instruction": "a", "output": "b"}\n\n{"instruction": "c", "output": "d"}\n')
    assert [str(record.origin) for record in read(jsonl)[0]] == [f"{jsonl}:1", f"{jsonl}:3"]
    array = write_rows("rows.json", ROWS)
    assert [str(record.origin) for record in read(array)[0]] == [f"{array}:1", f"{array}:2", f"{array}:3"]
    table = write_rows("rows.csv", ["instruction,output", '"two', 'lines",b', "c,d"])
    assert [str(record.origin) for record in read(table)[0]] == [f"{table}:2", f"{table}:4"]


def test_parallel_lines_become_a_row_for_each_direction(write_rows):
    path = write_rows("pairs.tsv", ["Go.\t가.\tCC-BY", "Hi.\t안녕.\tCC-BY"])
    records, rejects = read(path)
    assert rejects == []
    assert values(records)[:2] == [
        {"instruction": BOTH.forward, "input": "Go.", "output": "가."},
        {"instruction": BOTH.backward, "input": "가.", "output": "Go."},
    ]
    forward, _ = read(path, Directions(forward="To Korean:"))
    assert [(r.instruction, r.input, str(r.origin)) for r in forward] == [
        ("To Korean:", "Go.", f"{path}:1"),
        ("To Korean:", "Hi.", f"{path}:2"),
    ]


def test_aligned_files_pair_line_with_line(write_rows):
    first, second = write_rows("a.en", ["Go.", "Hi."]), write_rows("a.ko", ["가.", "안녕."])
    rows = list(open_aligned(first, second, Directions(backward="To English:")).read())
    assert [(row.fields["input"], row.fields["output"]) for row in rows] == [("가.", "Go."), ("안녕.", "Hi.")]


def test_aligned_files_of_unequal_length_are_refused(write_rows):
    first, second = write_rows("a.en", ["Go.", "Hi."]), write_rows("a.ko", ["가."])
    with pytest.raises(UserError, match="a.en has 2 lines and .*a.ko has 1"):
        list(open_aligned(first, second, BOTH).read())


def test_a_self_instruct_task_becomes_a_row_for_each_instance(write_rows):
    task = {"instruction": "Add.", "instances": [{"input": "1+1", "output": "2"}, {"input": "2+2", "output": "4"}]}
    path = write_rows(
        "tasks.jsonl", [task, {"instruction": "x", "instances": []}, {"instruction": "x", "instances": [3]}]
    )
    records, rejects = read(path)
    assert values(records)[1] == {"instruction": "Add.", "input": "2+2", "output": "4"}
    assert [str(record.origin) for record in records] == [f"{path}:1.1", f"{path}:1.2"]
    assert [(reject.field, reject.origin.row) for reject in rejects] == [("instances", 2), ("instances", 3)]


def test_a_dataset_of_the_hub_is_read_through_load_dataset(write_rows, tmp_path):
    """load_dataset takes a local folder where a Hub id is due; the rest of the way is the same."""
    write_rows("train.jsonl", ROWS)
    records, rejects = read(f"hf:{tmp_path}")
    assert (values(records), rejects) == (ROWS, [])
    with pytest.raises(UserError, match="could not be loaded from the Hub"):
        read(f"hf:{tmp_path}:no_such_split")


def test_the_samples_are_whole_and_valid():
    tatoeba, rejects = read("tatoeba", Directions())
    assert (len(tatoeba), rejects) == (2 * 3318, [])
    assert str(tatoeba[0].origin) == "tatoeba_eng_kor.tsv:1"
    tasks, rejects = read("seed_tasks", Directions())
    assert (len(tasks), rejects) == (175, [])
    assert set(SAMPLES) == {"tatoeba", "seed_tasks"}


def test_every_shipped_pair_keeps_its_attribution():
    lines = (SAMPLES_FOLDER / SAMPLES["tatoeba"].file).read_text(encoding="utf-8").splitlines()
    assert all(line.split("\t")[2].startswith("CC-BY 2.0 (France) Attribution: tatoeba.org #") for line in lines)
    licences = (SAMPLES_FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    assert all(sample.file in licences for sample in SAMPLES.values())


# Odd but right


def test_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(write_rows):
    for name, content in {
        "a.jsonl": b'\xef\xbb\xbf{"instruction": "a", "output": "b"}\r\n{"instruction": "c", "output": "d"}\r\n',
        "a.json": b'\xef\xbb\xbf[{"instruction": "a", "output": "b"},\r\n{"instruction": "c", "output": "d"}]\r\n',
        "a.csv": b"\xef\xbb\xbfinstruction,output\r\na,b\r\nc,d\r\n",
    }.items():
        records, rejects = read(write_rows(name, content))
        assert [(record.instruction, record.output) for record in records] == [("a", "b"), ("c", "d")], name
        assert rejects == []
    records, _ = read(write_rows("a.tsv", b"\xef\xbb\xbfGo.\tGa.\r\n"), Directions(forward="t"))
    assert (records[0].input, records[0].output) == ("Go.", "Ga.")


def test_only_a_newline_ends_a_line(write_rows):
    text = "a\u2028b\x0bc\x1cd\u0085e"
    assert read(write_rows("a.jsonl", [{"instruction": text, "output": text}]))[0][0].instruction == text
    records, _ = read(write_rows("a.tsv", [f"{text}\tx"]), Directions(forward="t"))
    assert records[0].input == text


def test_text_is_kept_exactly(write_rows):
    text = "  {{ 7*7 }} {% raw %} </s> <pad> \\n \t 가\u1100\u1161\u11a8 🙂 "
    records, _ = read(write_rows("a.jsonl", [{"instruction": text, "input": text, "output": text}]))
    assert values(records) == [{"instruction": text, "input": text, "output": text}]


def test_a_null_or_absent_input_is_no_input(write_rows):
    path = write_rows(
        "a.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}]
    )
    records, rejects = read(path)
    assert ([record.input for record in records], rejects) == (["", ""], [])


def test_a_csv_field_may_be_very_long(write_rows):
    path = write_rows("a.csv", ["instruction,output", f"a,{'b' * 300_000}"])
    assert len(read(path)[0][0].output) == 300_000


# Bad rows


@pytest.mark.parametrize(
    "row, field, words",
    [
        ({"instrution": "a", "output": "b"}, "instruction", "is 'instrution' meant? Rename it to 'instruction'"),
        ({"Instruction": "a", "output": "b"}, "instruction", "is 'Instruction' meant?"),
        ({"instruction": "a", "inptu": "i", "output": "b"}, "input", "is 'inptu' meant?"),
        ({"instruction": "a", "ouput": "b"}, "output", "is 'ouput' meant?"),
        ({"prompt": "a", "output": "b"}, "instruction", "'instruction' is missing; the row has 'prompt', 'output'"),
        ({}, "instruction", "the row has no fields"),
        ({"instruction": "a", "output": ""}, "output", "'output' is empty"),
        ({"instruction": "a", "output": " \n\t"}, "output", "'output' is empty"),
        ({"instruction": " ", "output": "b"}, "instruction", "'instruction' is empty"),
        ({"instruction": "a", "output": 5}, "output", "'output' is a number (5), not a string"),
        ({"instruction": "a", "output": float("nan")}, "output", "a number (nan)"),
        ({"instruction": "a", "output": None}, "output", "'output' is null; a string is due"),
        ({"instruction": ["a"], "output": "b"}, "instruction", "a list (['a'])"),
        ({"instruction": "a", "input": {"b": 1}, "output": "b"}, "input", "an object"),
        ({"instruction": "a", "input": True, "output": "b"}, "input", "true or false (True)"),
    ],
)
def test_a_bad_row_is_rejected_with_field_and_reason(row, field, words, write_rows):
    good = {"instruction": "a", "output": "b"}
    path = write_rows("rows.jsonl", [good, row, good])
    records, rejects = read(path)
    assert [record.origin.row for record in records] == [1, 3]
    assert [(reject.origin.file, reject.origin.row, reject.field) for reject in rejects] == [(path, 2, field)]
    assert words in rejects[0].reason
    assert rejects[0].raw == json.dumps(row, ensure_ascii=False)


def test_half_a_surrogate_pair_is_rejected(write_rows):
    path = write_rows("a.jsonl", rb'{"instruction": "a", "output": "b\ud83d"}' + b"\n")
    _, [reject] = read(path)
    assert reject.field == "output"
    assert "U+D83D at character 2" in reject.reason
    json.dumps(reject.as_json(), ensure_ascii=False).encode("utf-8")


def test_a_key_twice_is_rejected(write_rows):
    for name, content in {"a.jsonl": b"%s\n", "a.json": b"[%s]"}.items():
        path = write_rows(name, content % b'{"instruction": "a", "output": "b", "output": "c"}')
        _, [reject] = read(path)
        assert (reject.field, reject.kind) == ("output", "repeated field")


def test_broken_json_is_named_by_line_and_column_and_loses_no_other_row(write_rows):
    good = b'{"instruction": "a", "output": "b"}'
    jsonl = write_rows("a.jsonl", good + b'\n{"instruction": "a" "output": "b"}\n' + good + b"\n[1]\n7\n")
    records, rejects = read(jsonl)
    assert [record.origin.row for record in records] == [1, 3]
    assert rejects[0].reason == "broken JSON: Expecting ',' delimiter, line 2, column 21."
    assert [reject.kind for reject in rejects] == ["broken JSON", "not an object", "not an object"]
    array = write_rows("a.json", b"[" + good + b',\n{"instruction": "a" "output": "b"},\n' + good + b"]")
    records, rejects = read(array)
    assert [record.origin.row for record in records] == [1, 3]
    assert rejects[0].reason == "broken JSON: Expecting ',' delimiter, line 2, column 21."


@pytest.mark.parametrize(
    "array, kept, rejected",
    [
        ('[{G}, {"instruction": "a", "output": "b}, {G}]', 2, 1),  # a quote is missing
        ('[{G}, {"instruction": "a", "output": "b", {G}]', 2, 1),  # a brace is missing
        ("[{G} {G}, {G}]", 2, 1),  # a comma is missing
        ("[{G},, {G}]", 2, 1),  # a comma too many
        ("[{G}, {G},]", 2, 0),  # as many editors leave it
        ("[{G}, {G}", 1, 1),  # cut off after a row
        ("[{G}, {G},", 2, 1),  # cut off after a comma
        ('[{G}, {"instruction": "a", "out', 1, 1),  # cut off inside a row
        ("[{G}] {G}", 1, 1),  # text after the end
        ("[{G}, 7, null, {G}]", 2, 2),
        ("[" + "[" * 100_000, 0, 1),
        ('[{"n": ' + "1" * 5000 + "}, {G}]", 1, 1),  # more digits than Python turns into a number
    ],
)  # fmt: skip
def test_broken_arrays_keep_what_can_be_kept(array, kept, rejected, write_rows):
    good = '{"instruction": "a", "output": "b"}'
    records, rejects = read(write_rows("a.json", array.replace("{G}", good).encode()))
    assert (len(records), len(rejects)) == (kept, rejected)
    assert all(record.output == "b" for record in records)


def test_invalid_utf8_is_named_by_byte_offset_and_loses_no_other_row(write_rows):
    row = b'{"instruction": "%s", "output": "b"}'
    for name, before, between, after in (("a.jsonl", b"", b"\n", b"\n"), ("a.json", b"[", b",", b"]")):
        content = before + row % "가".encode() + between + row % b"\xff" + between + row % b"c" + after
        records, [reject] = read(write_rows(name, content))
        assert [record.instruction for record in records] == ["가", "c"]
        offset = content.index(b"\xff")
        assert reject.reason == f"invalid UTF-8: byte 0xff at byte offset {offset} of the file."
        assert "\\udcff" in reject.as_json()["raw"]
    content = b"\xef\xbb\xbfGo.\tGa.\nx\xc3\ty\nHi.\tHo.\n"
    records, [reject] = read(write_rows("a.tsv", content), Directions(forward="t"))
    assert [record.input for record in records] == ["Go.", "Hi."]
    assert f"byte 0xc3 at byte offset {content.index(0xC3)}" in reject.reason
    content = b"instruction,output\na,b\nc,\xe9t\xe9\ne,f\n"
    records, [reject] = read(write_rows("a.csv", content))
    assert [record.output for record in records] == ["b", "f"]
    assert (reject.origin.row, f"byte offset {content.index(0xE9)}" in reject.reason) == (3, True)


def test_invalid_utf8_in_aligned_files_names_the_file_that_has_it(write_rows):
    first, second = write_rows("a.en", b"Go.\nHi.\n"), write_rows("a.ko", b"x\xffy\nAn\n")
    rows = list(open_aligned(first, second, Directions(forward="t")).read())
    assert isinstance(rows[0], Reject) and isinstance(rows[1], Row)
    assert (rows[0].origin.file, rows[0].origin.row) == (second, 1)


def test_invalid_utf8_in_parquet_loses_no_other_row(tmp_path):
    bad = pyarrow.array([b"ok", b"\xff", b"fine"]).view(pyarrow.string())
    path = write_parquet(tmp_path, {"instruction": ["a", "b", "c"], "output": bad})
    records, [reject] = read(path)
    assert [record.output for record in records] == ["ok", "fine"]
    assert (reject.origin.row, reject.kind) == (2, "broken Unicode")


def test_parquet_values_that_are_no_strings_are_rejected(tmp_path):
    path = write_parquet(tmp_path, {"instruction": ["a", "b", None], "output": [1, 2, 3]})
    _, rejects = read(path)
    assert [reject.field for reject in rejects] == ["output", "output", "instruction"]


def test_ragged_csv_records_and_stray_quotes_lose_only_themselves(write_rows):
    lines = ["instruction,input,output", "a,,b", "c,d", "e,f,g,h", 'i,"stray,k', "l,,m", 'n,"o"p,q', "r,,s"]
    records, rejects = read(write_rows("a.csv", lines))
    assert [record.instruction for record in records] == ["a", "l", "r"]
    assert [(reject.origin.row, reject.kind) for reject in rejects] == [
        (3, "wrong number of columns"),
        (4, "wrong number of columns"),
        (5, "broken csv"),
        (7, "broken csv"),
    ]


def test_tsv_lines_with_other_columns_or_an_empty_side_are_rejected(write_rows):
    path = write_rows("a.tsv", ["a\tb\tc", "d", "e\t \tf", "\tg\th", "i\tj\tk\tl", "", "m\tn\to"])
    records, rejects = read(path, Directions(forward="t"))
    assert [record.input for record in records] == ["a", "m"]
    assert [(reject.origin.row, reject.kind) for reject in rejects] == [
        (2, "wrong number of columns"),
        (3, "empty second side"),
        (4, "empty first side"),
        (5, "wrong number of columns"),
    ]


# Useless files


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.json", b"", "is empty"),
        ("a.jsonl", b" \n\n ", "is empty"),
        ("a.csv", b"\xef\xbb\xbf", "is empty"),
        ("a.tsv", b"", "is empty"),
        (
            "a.json",
            b'{"instruction": "a", "output": "b"}',
            "line 1, column 1: a JSON object stands here, and an array of objects is due",
        ),
        ("a.json", b'"text"', "an array of objects is due"),
        ("a.jsonl", b'[\n{"instruction": "a"}]', "Name it .json"),
        ("a.json", "[{}]".encode("utf-16"), "is UTF-16"),
        ("a.csv", b'"instruction,output\na,b\n', "the header"),
        ("a.csv", b"output,output\na,b\n", "names a column twice"),
        ("a.tsv", b"no tab\nhere\n", "no tabs"),
        ("a.parquet", b"PAR1 but not really", "cannot be read as parquet"),
        ("a.txt", b"x", "do not know how to read '.txt'. Known are .json, .jsonl, .csv, .parquet, .tsv"),
    ],
)
def test_a_useless_file_is_one_clear_error(name, content, words, write_rows):
    with pytest.raises(UserError) as error:
        read(write_rows(name, content))
    assert words in str(error.value)
    assert name in str(error.value)


def test_a_file_that_does_not_exist_names_the_nearest_that_does(write_rows, tmp_path):
    path = write_rows("my_rows.jsonl", ROWS)
    with pytest.raises(UserError, match=f"there is no such file. Did you mean '{path}'"):
        read(path.replace("my_rows", "my_row"))
    with pytest.raises(UserError, match="Did you mean 'tatoeba'"):
        read("tateoba")
    with pytest.raises(UserError, match="Shipped samples are tatoeba, seed_tasks"):
        read(str(tmp_path / "elsewhere" / "x.jsonl"))
    with pytest.raises(UserError, match="is a folder"):
        read(str(tmp_path))


def test_parallel_text_without_an_instruction_is_refused(write_rows):
    with pytest.raises(UserError, match="no direction has an instruction. Give one or both"):
        read(write_rows("a.tsv", ["a\tb"]), Directions())


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
        records, rejects = read(write_rows(f"a.{suffix}", content))
        kept = values(records)
        for n, row in enumerate(rows):
            assert n in bad or row in kept, (n, content)
        assert len(rejects) + len(records) >= 8
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
            records, rejects = read(write_rows(name, b"\n".join(header + broken) + b"\n"), Directions(forward="t"))
            outputs = {record.output for record in records}
            assert {f"answer {n}" for n in range(10) if n not in bad} <= outputs
            assert len(records) + len(rejects) <= 10
