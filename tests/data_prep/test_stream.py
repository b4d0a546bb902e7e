"""Rows that are prepared while they are read: the same examples as `diptych prepare` gives, over whatever shards, and
from any position on."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from diptych.data_prep.packing import PACKED_COLUMNS
from diptych.data_prep.prepare import prepare
from diptych.data_prep.records import UserError
from diptych.data_prep.settings import PrepareSettings
from diptych.data_prep.stream import POSITION, open_stream

FILES, ROWS = 12, 60
LAYOUTS = {"one part of many windows": {"window_chunks": 1}, "parts of their own": {"part_bytes": 1}}


def row_of(file, number):
    word = f"{file}-{number}"
    return {"instruction": f"Say {word}.", "input": f"it is {word} " * (number % 7), "output": f"{word}! " * 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve files; in each, a row that is no JSON and one without an output."""
    folder = tmp_path_factory.mktemp("rows")
    for file in range(FILES):
        lines = [json.dumps(row_of(file, number)) for number in range(ROWS)]
        lines[7], lines[20] = "{broken", json.dumps({"instruction": f"Nothing, {file}.", "output": ""})
        (folder / f"{file:02d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def settings(folder, bpe_folder):
    return PrepareSettings(
        data=[str(folder)], tokenizer=str(bpe_folder), template="plain", max_source_tokens=90, max_target_tokens=60
    )


@pytest.fixture
def stream(settings, tmp_path):
    return open_stream(settings, tmp_path / "rejects")


def examples_in(rows):
    """The examples of packed rows, cut out by their segments, as (source ids, labels)."""
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            source = row["input_ids"][row["segment_ids"] == segment]
            yield tuple(source.tolist()), tuple(row["labels"][row["decoder_segment_ids"] == segment].tolist())


def prepared(settings, out, **changes):
    """What `diptych prepare` makes of the same rows if none is left out or held out: its examples, and its folder."""
    alone = {"deduplicate": False, "packing": False, "validation_fraction": 0.0, "test_fraction": 0.0}
    folder = prepare(replace(settings, out=str(out), **alone, **changes))
    table = datasets.load_from_disk(folder)["train"]
    return Counter((tuple(row["input_ids"]), tuple(row["labels"])) for row in table), folder


@pytest.fixture(scope="module")
def kept(folder, bpe_folder, tmp_path_factory):
    settings = PrepareSettings(
        data=[str(folder)], tokenizer=str(bpe_folder), template="plain", max_source_tokens=90, max_target_tokens=60
    )
    return prepared(settings, tmp_path_factory.mktemp("kept") / "prepared")


def as_lists(rows):
    return [{name: column.tolist() for name, column in row.items()} for row in rows]


# Which rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_all_shards_together_are_what_prepare_keeps_each_example_once(stream, kept, layout, shards):
    stream = replace(stream, **LAYOUTS[layout])
    found = [Counter(examples_in(stream.shard(index, shards))) for index in range(shards)]
    assert sum(found, Counter()) == kept[0]
    assert kept[0].total() == FILES * (ROWS - 2)
    assert all(found)  # every shard has its share
    if shards > 1:
        assert max(part.total() for part in found) <= 2 * kept[0].total() / shards


def test_every_format_streams_the_rows_that_prepare_keeps(settings, tmp_path):
    """A file of each reader that finds its chunks in a way of its own; the parquet file is one row group."""
    rows = [row_of("z", number) for number in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10_000)
    (tmp_path / "b.json").write_text(json.dumps(rows[:300]))
    lines = [f'"{row["instruction"]}","{row["input"]}","{row["output"]}"' for row in rows[:300]]
    (tmp_path / "c.csv").write_text("\n".join(["instruction,input,output", *lines]))
    datasets.Dataset.from_list(rows[:300]).save_to_disk(tmp_path / "saved")
    data = [str(tmp_path / name) for name in ("a.parquet", "b.json", "c.csv", "saved")]
    settings = replace(settings, data=data)
    expected, _ = prepared(settings, tmp_path / "prepared")
    stream = replace(open_stream(settings, tmp_path / "rejects"), window_chunks=1)
    found = [Counter(examples_in(stream.shard(index, 2))) for index in range(2)]
    assert sum(found, Counter()) == expected
    assert all(found)


def test_a_data_set_of_the_hub_is_streamed_file_by_file(settings, folder, tmp_path, kept, monkeypatch):
    """A folder stands for it, which `datasets` opens in the same way."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub = tmp_path / "hub"
    hub.mkdir()
    for path in sorted(folder.iterdir()):  # its reader takes no file with a broken line
        sound = [line for line in path.read_text().splitlines() if line != "{broken"]
        (hub / path.name).write_text("\n".join(sound) + "\n")
    settings = replace(settings, data=[f"hf:{hub}"])
    stream = open_stream(settings, tmp_path / "rejects")
    assert len(stream.sources) == FILES
    assert not [path for path in (tmp_path / "cache").rglob("*.arrow")]  # no tables were made of it
    found = [Counter(examples_in(stream.shard(index, 3))) for index in range(3)]
    assert sum(found, Counter()) == kept[0]
    assert stream.rejected() == {"empty output": FILES}
    state = stream.state_dict()
    (hub / "00.jsonl").write_text((hub / "01.jsonl").read_text() * 2)
    with pytest.raises(UserError, match="in other data"):
        open_stream(settings, tmp_path / "rejects").load_state_dict(state)


def test_rows_are_laid_out_as_packing_shows_them(settings, write_rows, tmp_path, tokenizers_by_family):
    tokenizer = tokenizers_by_family["diptych-bpe"]
    path = write_rows(
        "two.jsonl", [{"instruction": "Go.", "output": "Gone!"}, {"instruction": "Stay.", "output": "No"}]
    )
    settings = replace(settings, data=[path], packed_source_tokens=100, packed_target_tokens=70)
    [row] = open_stream(settings, tmp_path / "rejects")
    first, second = (tokenizer(text)["input_ids"] for text in ("Go.", "Stay."))
    gone, no = (tokenizer(text)["input_ids"] for text in ("Gone!", "No"))
    if row["input_ids"][: len(first)].tolist() != first:  # the seed decides which comes first
        first, second, gone, no = second, first, no, gone
    pad = tokenizer.pad_token_id

    def padded(values, tokens, padding):
        return values + [padding] * (tokens - len(values))

    ones, twos = [1] * len(first), [2] * len(second)
    expected = {
        "input_ids": padded(first + second, 100, pad),
        "segment_ids": padded(ones + twos, 100, 0),
        "position_ids": padded([*range(len(first)), *range(len(second))], 100, 0),
        "labels": padded(gone + no, 70, -100),
        "decoder_input_ids": padded([pad, *gone[:-1], pad, *no[:-1]], 70, pad),
        "decoder_segment_ids": padded([1] * len(gone) + [2] * len(no), 70, 0),
        "decoder_position_ids": padded([*range(len(gone)), *range(len(no))], 70, 0),
    }
    assert {name: row[name].tolist() for name in PACKED_COLUMNS} == expected


def test_a_target_does_not_begin_with_the_token_that_the_decoder_starts_with(settings, tokenizers_by_family, tmp_path):
    """BART's tokenizer puts bos before every text, and prepare leaves it out likewise."""
    tokenizer = tokenizers_by_family["bart"]
    tokenizer.save_pretrained(tmp_path / "bart")
    changes = {"tokenizer": str(tmp_path / "bart"), "max_source_tokens": 300, "max_target_tokens": 200}
    settings = replace(settings, **changes, decoder_start_token_id=tokenizer.bos_token_id)
    for row in islice(open_stream(settings, tmp_path / "rejects"), 3):
        for source, labels in examples_in([row]):
            assert source[0] == tokenizer.bos_token_id
            assert labels[0] != tokenizer.bos_token_id
        assert (row["decoder_input_ids"][row["decoder_position_ids"] == 0][0]) == tokenizer.bos_token_id


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_a_row_has_room_for_what_the_limits_let_in_and_more_is_as_prepare_has_it(settings, tmp_path, too_long):
    settings = replace(settings, max_source_tokens=30, max_target_tokens=18, too_long=too_long)
    expected, _ = prepared(settings, tmp_path / "prepared")
    stream = open_stream(settings, tmp_path / "rejects")
    assert stream.budget.source_tokens >= 30 and stream.budget.target_tokens >= 18
    assert Counter(examples_in(stream)) == expected
    assert (expected.total() == FILES * (ROWS - 2)) == (too_long == "cut")


# Positions


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("index", "shards"), [(0, 1), (1, 3)])
def test_from_any_position_on_come_exactly_the_rows_that_were_left(settings, tmp_path, layout, index, shards):
    stream = replace(open_stream(settings, tmp_path / "rejects"), epochs=2, **LAYOUTS[layout])
    everything = as_lists(stream.shard(index, shards))
    shard, states = stream.shard(index, shards), []
    states = [shard.state_dict(), *(shard.state_dict() for _ in shard)]
    assert len(states) == len(everything) + 1
    picked = [0, 1, *range(2, len(everything), len(everything) // 5), len(everything) - 1, len(everything)]
    for taken in picked:
        again = stream.shard(index, shards)
        again.load_state_dict(states[taken])
        assert as_lists(again) == everything[taken:]


def test_saved_and_restored_twice_in_an_epoch_once_in_a_new_process(settings, tmp_path):
    """Eleven rows here, the next eleven there, the others here again, by a stream that was opened anew each time."""
    script = """
import hashlib, itertools, json, sys
from pathlib import Path
from diptych.data_prep.settings import PrepareSettings
from diptych.data_prep.stream import open_stream
settings, rejects, state = map(json.loads, sys.argv[1:])
stream = open_stream(PrepareSettings(**settings), Path(rejects)).shard(1, 2)
stream.load_state_dict(state)
rows = [[column.tolist() for column in row.values()] for row in itertools.islice(stream, 11)]
print(json.dumps([rows, stream.state_dict()]))
"""
    shard = open_stream(settings, tmp_path / "rejects").shard(1, 2)
    whole = [[column.tolist() for column in row.values()] for row in shard]
    shard = shard.shard(1, 2)
    taken = [[column.tolist() for column in row.values()] for row in islice(shard, 11)]
    words = map(json.dumps, (asdict(settings), str(tmp_path / "rejects"), shard.state_dict()))
    run = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    taken_there, state = json.loads(run.stdout.splitlines()[-1])
    last = open_stream(settings, tmp_path / "rejects").shard(1, 2)
    last.load_state_dict(state)
    rest = [[column.tolist() for column in row.values()] for row in last]
    assert taken + taken_there + rest == whole
    assert len(rest) > 11


def test_each_epoch_has_the_same_examples_in_an_order_of_its_own(stream, kept):
    for layout in LAYOUTS.values():
        rows = list(replace(stream, epochs=2, **layout))
        first, second = ([row for row in rows if row[POSITION][1] == epoch] for epoch in (0, 1))
        assert Counter(examples_in(first)) == Counter(examples_in(second)) == kept[0]
        assert list(examples_in(first)) != list(examples_in(second))
        other_seed = list(replace(stream, seed=1, **layout))
        assert list(examples_in(other_seed)) != list(examples_in(first))


def test_to_go_on_reads_no_part_again_that_is_done(settings, folder, tmp_path):
    stream = replace(open_stream(settings, tmp_path / "rejects"), part_bytes=1)
    opened = []

    def counted(number, source):
        return replace(source, read=lambda: opened.append(number) or source.read())

    stream.sources = tuple(counted(number, source) for number, source in enumerate(stream.sources))
    rows = iter(stream)
    while stream.position.part < 8:
        next(rows)
    again = stream.shard(0, 1)
    again.load_state_dict(stream.state_dict())
    opened.clear()
    assert list(again)
    assert len(opened) == FILES - 8


# What is refused


def test_a_position_in_other_data_is_refused(settings, folder, tmp_path, write_rows):
    path = write_rows("rows.jsonl", [row_of("x", number) for number in range(50)])
    settings = replace(settings, data=[path])
    state = open_stream(settings, tmp_path / "rejects").state_dict()
    open_stream(settings, tmp_path / "rejects").load_state_dict(state)
    for changed in (replace(settings, template="alpaca"), replace(settings, max_source_tokens=80)):
        with pytest.raises(UserError, match="in other data"):
            open_stream(changed, tmp_path / "rejects").load_state_dict(state)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content.replace(b"Say x-3.", b"Say y-3."))
    with pytest.raises(UserError, match="in other data"):
        open_stream(settings, tmp_path / "rejects").load_state_dict(state)
    Path(path).write_bytes(content)
    open_stream(settings, tmp_path / "rejects").load_state_dict(state)


def test_a_file_that_changes_while_it_is_streamed_ends_the_stream(settings, tmp_path, write_rows):
    path = write_rows("rows.jsonl", [row_of("x", number) for number in range(50)])
    stream = open_stream(replace(settings, data=[path]), tmp_path / "rejects")
    Path(path).write_bytes(Path(path).read_bytes().replace(b"Say x-3.", b"Say y-3."))
    with pytest.raises(UserError, match="changed while it was read"):
        list(stream)


def test_a_position_of_another_shard_is_refused(stream):
    state = stream.shard(1, 3).state_dict()
    for index, shards in ((0, 3), (1, 2)):
        with pytest.raises(UserError, match=f"shard 1 of 3, and this is {index} of {shards}"):
            stream.shard(index, shards).load_state_dict(state)
    with pytest.raises(UserError, match="numbered from 0 to 2"):
        stream.shard(3, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"near_duplicates": 0.8}, "near_duplicates is for `diptych prepare`"),
        ({"share_sources": True}, "share_sources is for `diptych prepare`"),
        ({"tokenizer": None, "train_tokenizer": "bpe"}, "train_tokenizer is for `diptych prepare`"),
        ({"tokenizer": None}, "needs a tokenizer"),
        ({"packing": False}, "packed always"),
        ({"packed_source_tokens": 50}, "packed_source_tokens >= 90"),
        ({"data": ["hf:no/such/folder"]}, "could not be opened for streaming"),
    ],
)
def test_what_a_stream_cannot_do_is_said_before_the_first_row(settings, tmp_path, changes, said, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=said):
        open_stream(replace(settings, **changes), tmp_path / "rejects")


def test_strict_and_too_long_error_end_a_stream_at_the_row(settings, tmp_path, write_rows):
    with pytest.raises(UserError, match=r"00\.jsonl:8: .*--strict"):
        list(replace(open_stream(settings, tmp_path / "rejects"), strict=True))
    path = write_rows("long.jsonl", [{"instruction": "long " * 200, "output": "b"}])
    settings = replace(settings, data=[path], too_long="error")
    with pytest.raises(UserError, match=r"long\.jsonl:1: the source has"):
        list(open_stream(settings, tmp_path / "rejects"))


def test_a_shard_without_rows_ends_at_once_but_never_waits_for_ever(settings, tmp_path, write_rows):
    path = write_rows("few.jsonl", [{"instruction": "Go.", "output": "Gone!"}])
    stream = open_stream(replace(settings, data=[path]), tmp_path / "rejects")
    assert [len(list(stream.shard(index, 3))) for index in range(3)].count(0) == 2
    endless = replace(stream, epochs=None)
    assert len(list(islice(endless.shard(0, 1), 5))) == 5
    with pytest.raises(UserError, match="has no rows"):
        for index in range(3):
            next(iter(endless.shard(index, 3)))


# Rows that are not kept


def test_rejects_are_written_down_once_and_counted(settings, kept, tmp_path):
    """By three shards, one of which is restored in the middle, one from the beginning, in two epochs."""
    stream = replace(open_stream(settings, tmp_path / "rejects"), window_chunks=1, epochs=2)
    for index in range(3):
        shard = stream.shard(index, 3)
        list(islice(shard, 4))
        state = shard.state_dict()
        list(islice(shard, 8))  # goes on after it was saved, and is killed
        again = stream.shard(index, 3)
        if index != 2:
            again.load_state_dict(state)
        list(again)
    expected = [json.loads(line) for line in (kept[1] / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for path in (tmp_path / "rejects").rglob("*.jsonl") for line in path.open(encoding="utf-8")]
    found = sorted((json.loads(line) for line in lines), key=lambda reject: (reject["file"], reject["row"]))
    assert found == sorted(expected, key=lambda reject: (reject["file"], reject["row"]))
    assert len(found) == 2 * FILES
    assert stream.rejected() == {"broken JSON": FILES, "empty output": FILES}
    assert not [path for path in (tmp_path / "rejects").rglob(".*")]


def test_ids_are_int32_and_positions_grow(stream):
    rows = list(stream)
    assert {row[name].dtype for row in rows for name in PACKED_COLUMNS} == {np.dtype(np.int32)}
    positions = [tuple(row[POSITION].tolist()) for row in rows]
    assert positions == sorted(set(positions))
