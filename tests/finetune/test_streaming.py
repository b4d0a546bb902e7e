"""Streamed rows in a real DataLoader and a real model: every rank and worker its own, from any batch on, and the loss
of the examples alone."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.records import IGNORE_INDEX, UserError
from diptych.data_prep.settings import PrepareSettings
from diptych.data_prep.stream import open_stream
from diptych.finetune import streaming
from diptych.finetune.objectives import Seq2SeqObjective
from diptych.finetune.packed_rows import Packing, check_packed_rows
from diptych.finetune.streaming import StreamedRows

WORDS = "go stay yes no friend student good one".split()


@pytest.fixture(scope="module")
def settings(tiny_tokenizer, tmp_path_factory):
    """Eight files of forty rows."""
    folder = tmp_path_factory.mktemp("streamed")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "rows").mkdir()
    for file, word in enumerate(WORDS):
        rows = [{"instruction": f"{word} {n}", "output": f"{word}! " * (1 + n % 4)} for n in range(40)]
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / "rows" / f"{file}.jsonl").write_text(lines)
    return PrepareSettings(
        data=[str(folder / "rows")],
        tokenizer=str(folder / "tokenizer"),
        template="plain",
        max_source_tokens=48,
        max_target_tokens=40,
    )


@pytest.fixture(scope="module")
def stream(settings, tmp_path_factory):
    """With as many windows as files."""
    return replace(open_stream(settings, tmp_path_factory.mktemp("streamed") / "rejects"), window_chunks=1)


def examples_in(batches):
    for batch in batches:
        columns = {name: np.asarray(column).tolist() for name, column in batch.items()}
        for row in range(len(batch["labels"])):
            segments, targets = columns["segment_ids"][row], columns["decoder_segment_ids"][row]
            for segment in range(1, max(segments) + 1):
                source = [it for it, own in zip(columns["input_ids"][row], segments, strict=True) if own == segment]
                labels = [it for it, own in zip(columns["labels"][row], targets, strict=True) if own == segment]
                yield tuple(source), tuple(labels)


@pytest.fixture(scope="module")
def every_example(stream):
    """By the stages alone."""
    batches = [
        stream.stages.run(chunk, number).examples
        for number, source in enumerate(stream.sources)
        for chunk in source.chunks()
    ]
    rows = [row for batch in batches for row in batch.to_pylist()]
    return Counter((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)


def as_lists(batches):
    return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in batches]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_together_give_each_example_once(stream, every_example, ranks, workers):
    found = []
    for rank in range(ranks):
        batches = list(StreamedRows(stream, rank, ranks, workers).batches(3))
        assert {tensor.dtype for batch in batches for tensor in batch.values()} == {torch.int64}
        found.append(Counter(examples_in(batches)))
    assert sum(found, Counter()) == every_example
    assert all(found)
    assert every_example.total() == 320


@pytest.mark.parametrize("workers", [0, 2])
def test_from_any_batch_on_come_exactly_the_batches_that_were_left(stream, workers):
    """In the same order, whichever worker's turn it was; over the end of an epoch too."""
    stream = replace(stream, epochs=None)
    rows = StreamedRows(stream, 1, 2, workers)
    uninterrupted, states = [], []
    for batch in itertools.islice(rows.batches(3), 16):
        uninterrupted.append({name: tensor.tolist() for name, tensor in batch.items()})
        states.append(json.loads(json.dumps(rows.state_dict())))
    assert max(position[0] for position in states[-1]["positions"]) > 0  # in the second epoch
    taken = 0
    again = StreamedRows(stream, 1, 2, workers)
    for count in (5, 2, 9):
        assert as_lists(itertools.islice(again.batches(3), count)) == uninterrupted[taken : taken + count]
        taken += count
        assert again.state_dict() == states[taken - 1]
        again = StreamedRows(stream, 1, 2, workers)
        again.load_state_dict(states[taken - 1])


RANK = """
import itertools, json, sys
from dataclasses import replace
from pathlib import Path
from diptych.data_prep.settings import PrepareSettings
from diptych.data_prep.stream import open_stream
from diptych.finetune.streaming import StreamedRows
settings, rejects, rank, state, count = map(json.loads, sys.argv[1:])
stream = replace(open_stream(PrepareSettings(**settings), Path(rejects)), window_chunks=1)
rows = StreamedRows(stream, rank, 2, workers=1)
rows.load_state_dict(state)
taken = itertools.islice(rows.batches(2), count)
batches = [{name: tensor.tolist() for name, tensor in batch.items()} for batch in taken]
print(json.dumps([batches, rows.state_dict()]))
"""


def test_two_processes_go_on_where_two_others_stopped(settings, stream, every_example, tmp_path):
    """Ranks as processes of their own, each with a worker process, from the saved state of another process on."""
    running, taken = [], []
    for rank in range(2):
        rows = StreamedRows(stream, rank, 2, workers=1)
        taken += as_lists(itertools.islice(rows.batches(2), 3))
        values = (asdict(settings), str(tmp_path / "rejects"), rank, rows.state_dict(), 1000)
        command = [sys.executable, "-c", RANK, *map(json.dumps, values)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for process in running:
        said, complained = process.communicate(timeout=120)
        assert process.returncode == 0, complained
        taken += json.loads(said.splitlines()[-1])[0]
    assert (
        Counter(examples_in([{name: torch.tensor(it) for name, it in batch.items()} for batch in taken]))
        == every_example
    )


def test_a_state_of_other_ranks_workers_or_data_is_refused(stream):
    state = StreamedRows(stream, 0, 2, 2).state_dict()
    for name, *place in (("rank", 1, 2, 2), ("ranks", 0, 3, 2), ("workers", 0, 2, 0)):
        with pytest.raises(UserError, match=f"saved with {name} "):
            StreamedRows(stream, *place).load_state_dict(state)
    with pytest.raises(UserError, match="in other data"):
        StreamedRows(replace(stream, fingerprint="another"), 0, 2, 2).load_state_dict(state)
    with pytest.raises(UserError, match="rank 2 of 2"):
        StreamedRows(stream, 2, 2)


def test_a_loader_with_other_workers_is_refused(stream):
    with pytest.raises(UserError, match="for 2 workers"):
        next(iter(torch.utils.data.DataLoader(StreamedRows(stream, workers=2), num_workers=0)))


def test_what_is_wrong_in_a_worker_is_said_as_it_is(stream):
    endless = replace(stream, sources=stream.sources[:1], window_chunks=8, epochs=None)
    with pytest.raises(UserError, match="has no rows: there are too few"):
        list(itertools.islice(StreamedRows(endless, workers=2).batches(2), 4))


# With a model


def test_every_row_passes_the_check_of_prepared_rows(stream, new_model):
    model = new_model("diptych")
    names = [name for name in next(iter(stream)) if name != "position"]
    rows = [{name: row[name].tolist() for name in names} for row in stream]
    packing = Packing(*stream.budget, False, stream.pad_token_id, stream.decoder_start_token_id, stream.vocabulary, 48)
    table = datasets.Dataset.from_list(rows).with_format("numpy")
    check_packed_rows(table, packing, model, "the stream")
    rows[3]["decoder_input_ids"][0] = 5
    with pytest.raises(UserError, match="row 3"):
        check_packed_rows(datasets.Dataset.from_list(rows).with_format("numpy"), packing, model, "the stream")


def test_loss_and_gradients_are_those_of_the_examples_alone(stream, new_model):
    [batch] = itertools.islice(StreamedRows(stream).batches(3), 1)
    tokens = int((batch["labels"] != IGNORE_INDEX).sum())
    model = new_model("diptych")
    loss = Seq2SeqObjective(model)(batch, tokens)
    loss.backward()
    packed = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    alone = 0.0
    examples = list(examples_in([batch]))
    for source, labels in examples:
        labels = torch.tensor([labels])
        logits = model(input_ids=torch.tensor([source]), labels=labels).logits
        part = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum") / tokens
        part.backward()
        alone += part.item()
    assert len(examples) > 6
    assert loss.item() == pytest.approx(alone, abs=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(packed[name], weight.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_rows_for_another_model_are_refused(stream, settings, new_model, tmp_path):
    StreamedRows(stream).check_fits(new_model("diptych"))
    with pytest.raises(UserError, match="packed for a decoder that starts with token 0"):
        StreamedRows(stream).check_fits(new_model("m2m_100"))
    with pytest.raises(UserError, match="100 embedding rows"):
        StreamedRows(stream).check_fits(new_model("t5", vocab_size=100))


def test_the_example_of_the_docstring_learns(settings, checkpoint_of, tiny_tokenizer, tmp_path):
    """The lines from `accelerator = Accelerator()` on, as they stand there."""
    lines = itertools.dropwhile(lambda line: "Accelerator()" not in line, streaming.__doc__.splitlines())
    code = list(itertools.takewhile(lambda line: line.startswith("    "), lines))
    assert len(code) > 15
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint_of("diptych"))
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
    imports = "import itertools, torch\nfrom pathlib import Path\nfrom accelerate import Accelerator\n"
    imports += "from transformers import AutoModelForSeq2SeqLM\n"
    imports += "from diptych.data_prep.records import IGNORE_INDEX\n"
    imports += "from diptych.data_prep.settings import parse_settings\n"
    imports += "from diptych.data_prep.stream import open_stream\n"
    imports += "from diptych.finetune.objectives import Seq2SeqObjective\n"
    imports += "from diptych.finetune.streaming import StreamedRows\n"
    names = {"checkpoint": str(tmp_path / "checkpoint"), "data": settings.data[0], "out": str(tmp_path / "out")}
    names["steps"] = 12
    exec(imports + "\n".join(line.removeprefix("    ") for line in code), names)  # noqa: S102
    assert len(names["losses"]) == 12
    assert np.mean(names["losses"][-3:]) < 0.8 * np.mean(names["losses"][:3])
