"""A file of prompts in, a JSONL file of outputs out. A run that was killed can be started again and continues.

    {"id": 7, "instruction": "Translate to Korean.", "input": "Yes."}     a row of in_file
    {"row": 1, "prediction": "네.", "finished": true, "source_cut": false, "id": 7, "instruction": …, "input": …}
    {"row": 2, "error": "broken JSON at column 9: …"}                     for a row that is no prompt

Each line of in_file gives exactly one line, in its place; `row` counts from 1, and a blank line gets an empty
prediction, as does a row whose only text is an empty `input`. With several outputs per prompt `prediction` and
`finished` are lists; with scores there are also `log_probability` and `log_probability_per_token`, in nats. Languages
named in a row override those of the settings.

Rows are generated in chunks of CHUNK_BATCHES batches, sorted by length within a chunk; each chunk is flushed to disk
before the next one. With --long (documents.py) it is the pieces of rows that are batched, and there are also
`source_pieces`, `sentences_cut` and `source_rounds`. The chunks do not depend on where a run was killed, and sampling
is seeded per chunk, so a resumed run writes the same bytes as an uninterrupted one. out.jsonl.run.json holds hashes of
the weights and prompts, and the settings; a run that does not match them is refused. With several ranks each rank
generates other chunks, and the bytes are those of one rank.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import set_seed

from diptych.data_prep.command_line.errors import UserError, message_line
from diptych.finetune.commands.ranks import on_main_rank
from diptych.finetune.generating.documents import WHOLE, Answered, Document, counts_of, documents_for
from diptych.finetune.generating.prompt_files import PromptRow, render_prompts
from diptych.finetune.inference.engine import TorchEngine
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.output_confidence import Calibration, facts_of
from diptych.finetune.inference.outputs import GenerationBar, Output
from diptych.finetune.inference.prompts import OUTPUT_FIELDS, Prompt, Prompter

CHUNK_BATCHES = 8
"""Sorting 8 batches together already removes most of the padding, and a kill loses at most their time."""
NOTHING = Document(Prompt(""), "", WHOLE, [])
"""What is asked of a blank row."""


def generate_file(
    engine: TorchEngine,
    prompter: Prompter,
    settings: GenerateSettings,
    rows: list[PromptRow],
    accelerator: Accelerator | None = None,
) -> None:
    """Writes out_file from its first row, or from where a killed run stopped. With an `accelerator` all ranks must
    call this; the main rank writes."""
    out_file = Path(settings.out_file)
    if out_file.resolve() == Path(settings.in_file).resolve():
        raise UserError(f"the file of prompts and the one to write are the same, {out_file}. Name another.")
    rows, rendered = render_prompts(rows, prompter)
    documents = documents_for(settings, prompter, engine)
    places = [f"{settings.in_file} row {row + 1}" for row in rendered]
    encoded = documents.encode([rows[row].prompt for row in rendered], list(rendered.values()), places)
    prompts = {row: document for row, document in zip(rendered, encoded, strict=True) if not document.error}
    for row, document in zip(rendered, encoded, strict=True):
        rows[row] = rows[row]._replace(error=document.error)
    chunks = chunks_of(rows, prompts, CHUNK_BATCHES * settings.batch_size)
    identity = run_identity(engine, settings, rows, list(prompts.values()))
    done = on_main_rank(accelerator, lambda: open_run(out_file, identity, chunks, settings.overwrite))
    calibration = getattr(engine, "calibration", None)
    ranks, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    if done and rank == 0:
        print(f"{out_file} has {done} of {len(rows)} rows already; they are kept.", file=sys.stderr)

    def chunk_lines(chunk: range, bar: GenerationBar) -> str:
        good = [row for row in chunk if row in prompts]
        seed = settings.seed + chunk.start  # by the chunk's place, so that a resumed run draws the same samples
        set_seed(seed)
        by_row = dict(zip(good, documents.generate([prompts[row] for row in good], settings, seed, bar), strict=True))
        bar.advance(len(chunk) - len(good), [])
        each = settings.num_return_sequences
        nothing = Answered([Output("", finished=True)] * each, [[]] * each, [[]] * each)
        return "".join(
            _output_line(row, rows[row], by_row.get(row, nothing), prompts.get(row, NOTHING), settings, calibration)
            for row in chunk
        )

    written = out_file.open("ab") if rank == 0 else contextlib.nullcontext()
    with _says_how_to_go_on(settings), written as out, GenerationBar(len(rows), done, shown=rank == 0) as bar:
        left = [chunk for chunk in chunks if chunk.start >= done]
        for first in range(0, len(left), ranks):
            together = left[first : first + ranks]
            lines = [chunk_lines(together[rank], bar) if rank < len(together) else ""]
            if ranks > 1:
                lines = gather_object(lines)
            if rank == 0:
                for of_chunk in lines:
                    out.write(of_chunk.encode("utf-8"))
                    out.flush()
                    if out_file.is_file():  # a pipe or a device has no disk
                        os.fsync(out.fileno())
            bar.update(together[-1].stop - bar.n)  # it counted this rank's rows only
    counts = {
        "with an error in place of a prediction": sum(bool(row.error) for row in rows),
        "blank, whose prediction is empty": sum(not row.prompt and not row.error for row in rows),
        "whose prompt was cut (source_cut)": sum(document.is_cut_off for document in prompts.values()),
    } | counts_of(prompts.values())
    if rank == 0:
        if (settings.terms or settings.placeholders) and out_file.is_file():
            counts |= _broken_promises(out_file)
        found = [f"{out_file}: {len(rows)} rows", *(f"{number} {what}" for what, number in counts.items() if number)]
        print(message_line(", ".join(found)), file=sys.stderr)


@contextlib.contextmanager
def _says_how_to_go_on(settings: GenerateSettings) -> Iterator[None]:
    """Adds to a Ctrl-C that the same command goes on, where out_file holds rows."""
    try:
        yield
    except KeyboardInterrupt:
        out_file = Path(settings.out_file)
        finished = out_file.read_bytes().count(b"\n") if out_file.is_file() else 0
        if not finished:
            raise
        command = "the same command without --overwrite" if settings.overwrite else "the same command"
        raise KeyboardInterrupt(f"{out_file} has {finished} rows; {command} goes on after them") from None


def chunks_of(rows: Sequence[PromptRow], prompts: Mapping[int, Document], most: int) -> list[range]:
    """Rows in order, in chunks that end with the row in which they reach `most` pieces; what is no prompt counts as
    one."""
    chunks, start, pieces = [], 0, 0
    for row in range(len(rows)):
        pieces += max(1, len(prompts[row].prompts)) if row in prompts else 1
        if pieces >= most or row == len(rows) - 1:
            chunks.append(range(start, row + 1))
            start, pieces = row + 1, 0
    return chunks


def _broken_promises(out_file: Path) -> dict[str, int]:
    """How many rows, also of earlier runs, miss terms or lost values of placeholders in an output."""
    names = {"terms_missed": "that miss a term (terms_missed)", "placeholders_lost": "that lost a placeholder's value"}
    found = dict.fromkeys(names.values(), 0)
    with out_file.open(encoding="utf-8") as opened:
        for row in map(json.loads, opened):
            for name, what in names.items():
                found[what] += any(row.get(name, []))
    return found


def _output_line(
    row: int,
    prompt: PromptRow,
    answered: Answered,
    document: Document,
    settings: GenerateSettings,
    calibration: Calibration | None,
) -> str:
    if prompt.error:
        ours = {"error": prompt.error}
    else:
        found = []
        for output, missed, lost in zip(answered.outputs, answered.missed, answered.lost, strict=True):
            found.append({"prediction": output.text, "finished": output.finished})
            found[-1] |= ({"terms_missed": missed} if settings.terms else {}) | (
                {"placeholders_lost": lost} if settings.placeholders else {}
            )
            if settings.scores:
                nats, tokens = output.log_probability, max(1, len(output.ids))
                found[-1]["log_probability"] = None if nats is None else round(nats, 6)
                found[-1]["log_probability_per_token"] = None if nats is None else round(nats / tokens, 6)
            if settings.trusts:
                is_scored = output.log_probability is not None
                threshold = settings.abstain_below
                found[-1]["confidence"] = facts_of(output, calibration, threshold) if is_scored else None
        lists = {name: [of_one[name] for of_one in found] for name in found[0]}
        ours = (lists if len(found) > 1 else found[0]) | {"source_cut": document.is_cut_off}
        if settings.long != "cut":
            ours |= {"source_pieces": len(document.prompts), "sentences_cut": document.pieces.cut_sentences}
        if settings.long == "reduce":
            ours["source_rounds"] = answered.rounds
    theirs = {name: value for name, value in prompt.fields.items() if name not in OUTPUT_FIELDS}
    return json.dumps({"row": row + 1} | ours | theirs, ensure_ascii=False) + "\n"


def run_identity(
    engine: TorchEngine, settings: GenerateSettings, rows: list[PromptRow], documents: list[Document]
) -> dict[str, Any]:
    """Everything that decides the bytes of out_file. Prompts are hashed as encoded, so template, tokenizer and
    languages are in the hash."""
    own = {name: getattr(settings, name) for name in ("batch_size", "max_new_tokens", "seed")}
    prompts = [prompt for document in documents for prompt in document.prompts]
    if settings.long != "cut" or settings.terms or settings.placeholders:
        own |= {"long": settings.long, "placeholders": settings.placeholders}
        prompts = [prompts, [(document.pieces, document.promises) for document in documents]]
    rules = {"decoder_prefix": list(engine.template.decoder_prefix), "stop": list(engine.template.stop)}
    trust = {"abstain_below": settings.abstain_below, "calibration": engine.calibration} if settings.trusts else {}
    hashed = json.dumps([[[row.fields, row.error] for row in rows], prompts]).encode()
    return engine.identity() | {
        "prompts_sha256": hashlib.sha256(hashed).hexdigest(),
        "generation_config": json.loads(engine.generation_config.to_json_string(use_diff=False)),
        "settings": own | rules | json.loads(json.dumps(settings.generation_kwargs() | trust)),
        "device": engine.device.type,
        "transformers": transformers.__version__,
    }


def open_run(out_file: Path, identity: dict[str, Any], chunks: list[range], overwrite: bool) -> int:
    """Prepares out_file and its .run.json; returns how many rows out_file keeps, a whole number of chunks. A pipe or
    device is written to, and keeps none.

    Raises:
        UserError: out_file exists and another run wrote it, or it was changed since.
    """
    run_file = out_file.with_name(out_file.name + ".run.json")
    if out_file.exists() and not out_file.is_file() and not out_file.is_dir():
        return 0
    if out_file.exists() and not overwrite:
        if not run_file.exists():
            raise UserError(
                f"{out_file} exists and has no {run_file.name} beside it, so it is not known what wrote it. "
                f"Name another file to write, or replace it with --overwrite true."
            )
        _check_same_run(out_file, json.loads(run_file.read_text(encoding="utf-8")), identity)
        return _cut_to_whole_chunks(out_file, chunks)
    out_file.unlink(missing_ok=True)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    written = run_file.with_name(run_file.name + ".part")
    written.write_text(json.dumps(identity, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    written.replace(run_file)
    return 0


def _check_same_run(out_file: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differences = [
        f"{name} was {str(before.get(name))[:12]}, is now {str(now[name])[:12]}"
        for name in now
        if name not in ("settings", "generation_config") and before.get(name) != now[name]
    ]
    for group in ("settings", "generation_config"):
        old, new = before.get(group, {}), now[group]
        names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        differences += [f"{name} was {old.get(name)}, is now {new.get(name)}" for name in names]
    if differences:
        raise UserError(
            f"{out_file} was started by a run that differs: {'; '.join(differences)}. Start with what it was started "
            f"with to finish it, name another file to write, or replace it with --overwrite true."
        )


def _cut_to_whole_chunks(out_file: Path, chunks: list[range]) -> int:
    """Removes an incomplete last line and the unfinished chunk around it; returns the rows that stay. UserError if a
    line that stays is not that of its row."""
    lines = out_file.read_bytes().split(b"\n")
    lines.pop()  # empty, or a line without its end
    kept = max((chunk.stop for chunk in chunks if chunk.stop <= len(lines)), default=0)
    for row, line in enumerate(lines[:kept], start=1):
        try:
            found = json.loads(line)["row"]
        except (ValueError, KeyError, TypeError):
            found = None
        if found != row:
            raise UserError(
                f"{out_file} line {row} is not the output of row {row}; the file was changed after it was written. "
                f"Restore it, name another file to write, or replace it with --overwrite true."
            )
    with out_file.open("r+b") as out:
        out.truncate(sum(len(line) + 1 for line in lines[:kept]))
    return kept
