"""A file of prompts in, a JSONL file of outputs out. A run that was killed can be started again and continues.

    {"id": 7, "instruction": "Translate to Korean.", "input": "Yes."}     a row of in_file
    {"row": 1, "prediction": "네.", "finished": true, "source_cut": false, "id": 7, "instruction": …, "input": …}
    {"row": 2, "error": "broken JSON at column 9: …"}                     for a row that is no prompt

Each line of in_file gives exactly one line, in its place; `row` counts from 1, and a blank line gets an empty
prediction. With several outputs per prompt `prediction` and `finished` are lists; with scores there are also
`log_probability` and `log_probability_per_token`, in nats. Languages named in a row override those of the settings.

Rows are generated in chunks of CHUNK_BATCHES batches, sorted by length within a chunk; each chunk is flushed to disk
before the next one. The chunks do not depend on where a run was killed, and sampling is seeded per chunk, so a
resumed run writes the same bytes as an uninterrupted one. out.jsonl.run.json holds hashes of the weights and prompts,
and the settings; a run that does not match them is refused. With several ranks each rank generates other chunks, and
the bytes are those of one rank.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import set_seed

from diptych.data_prep.command_line.errors import UserError, message_line
from diptych.finetune.commands.ranks import on_main_rank
from diptych.finetune.inference.engine import EncodedPrompt, TorchEngine
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.outputs import GenerationBar, Output
from diptych.finetune.inference.prompt_files import BLANK, PromptRow, render_prompts
from diptych.finetune.inference.prompts import OUTPUT_FIELDS, Prompter
from diptych.finetune.inference.target_tokens import given_tokens

CHUNK_BATCHES = 8
"""Sorting 8 batches together already removes most of the padding, and a kill loses at most their time."""


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
    prompts, cut_rows = _encoded(engine, prompter, rendered)
    chunk_rows = CHUNK_BATCHES * settings.batch_size
    identity = run_identity(engine, settings, rows, list(prompts.values()))
    done = on_main_rank(accelerator, lambda: open_run(out_file, identity, chunk_rows, len(rows), settings.overwrite))
    ranks, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    if done and rank == 0:
        print(f"{out_file} has {done} of {len(rows)} rows already; they are kept.", file=sys.stderr)

    def chunk_lines(start: int, bar: GenerationBar) -> str:
        chunk = range(start, min(start + chunk_rows, len(rows)))
        good = [row for row in chunk if row in prompts]
        seed = settings.seed + start  # by the chunk's place, so that a resumed run draws the same samples
        set_seed(seed)
        outputs = engine.generate([prompts[row] for row in good], settings, seed, bar)
        bar.advance(len(chunk) - len(good), [])
        each = settings.num_return_sequences
        by_row = {row: outputs[place * each : (place + 1) * each] for place, row in enumerate(good)}
        nothing = [Output("", finished=True)] * each
        return "".join(
            _output_line(row, rows[row], by_row.get(row, nothing), row in cut_rows, settings) for row in chunk
        )

    written = out_file.open("ab") if rank == 0 else contextlib.nullcontext()
    with written as out, GenerationBar(len(rows), done, shown=rank == 0) as bar:
        for first in range(done, len(rows), chunk_rows * ranks):
            start = first + rank * chunk_rows
            lines = [chunk_lines(start, bar) if start < len(rows) else ""]
            chunks = gather_object(lines) if ranks > 1 else lines
            if rank == 0:
                for of_chunk in chunks:
                    out.write(of_chunk.encode("utf-8"))
                    out.flush()
                    if out_file.is_file():  # a pipe or a device has no disk
                        os.fsync(out.fileno())
            bar.update(min(first + chunk_rows * ranks, len(rows)) - bar.n)  # it counted this rank's rows only
    counts = {
        "with an error in place of a prediction": sum(bool(row.error) for row in rows),
        "blank, whose prediction is empty": rows.count(BLANK),
        "whose prompt was cut (source_cut)": len(cut_rows),
    }
    if rank == 0:
        found = [f"{out_file}: {len(rows)} rows", *(f"{number} {what}" for what, number in counts.items() if number)]
        print(message_line(", ".join(found)), file=sys.stderr)


def _encoded(
    engine: TorchEngine, prompter: Prompter, rendered: dict[int, tuple[str, Any]]
) -> tuple[dict[int, EncodedPrompt], set[int]]:
    """The encoded prompt of each row number, and the rows whose prompt was cut."""
    languages = [of_row for _, of_row in rendered.values()]
    ids, was_cut = prompter.encode([text for text, _ in rendered.values()], languages)
    given = {it: given_tokens(engine, it) for it in set(languages)}
    prompts = {row: EncodedPrompt(of_row, given[it]) for row, of_row, it in zip(rendered, ids, languages, strict=True)}
    return prompts, {row for row, cut in zip(rendered, was_cut, strict=True) if cut}


def _output_line(row: int, prompt: PromptRow, outputs: list[Output], was_cut: bool, settings: GenerateSettings) -> str:
    if prompt.error:
        ours = {"error": prompt.error}
    else:
        found = []
        for output in outputs:
            found.append({"prediction": output.text, "finished": output.finished})
            if settings.scores:
                nats, tokens = output.log_probability, max(1, len(output.ids))
                found[-1]["log_probability"] = None if nats is None else round(nats, 6)
                found[-1]["log_probability_per_token"] = None if nats is None else round(nats / tokens, 6)
        lists = {name: [of_one[name] for of_one in found] for name in found[0]}
        ours = (lists if len(found) > 1 else found[0]) | {"source_cut": was_cut}
    theirs = {name: value for name, value in prompt.fields.items() if name not in OUTPUT_FIELDS}
    return json.dumps({"row": row + 1} | ours | theirs, ensure_ascii=False) + "\n"


def run_identity(
    engine: TorchEngine, settings: GenerateSettings, rows: list[PromptRow], prompts: list[EncodedPrompt]
) -> dict[str, Any]:
    """Everything that decides the bytes of out_file. Prompts are hashed as encoded, so template, tokenizer and
    languages are in the hash."""
    own = {name: getattr(settings, name) for name in ("batch_size", "max_new_tokens", "seed")}
    rules = {"decoder_prefix": list(engine.template.decoder_prefix), "stop": list(engine.template.stop)}
    hashed = json.dumps([[[row.fields, row.error] for row in rows], prompts]).encode()
    return engine.identity() | {
        "prompts_sha256": hashlib.sha256(hashed).hexdigest(),
        "generation_config": json.loads(engine.generation_config.to_json_string(use_diff=False)),
        "settings": own | rules | settings.generation_kwargs(),
        "device": engine.device.type,
        "transformers": transformers.__version__,
    }


def open_run(out_file: Path, identity: dict[str, Any], chunk_rows: int, rows: int, overwrite: bool) -> int:
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
        return _cut_to_whole_chunks(out_file, chunk_rows, rows)
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


def _cut_to_whole_chunks(out_file: Path, chunk_rows: int, rows: int) -> int:
    """Removes an incomplete last line and the unfinished chunk around it; returns the rows that stay. UserError if a
    line that stays is not that of its row."""
    lines = out_file.read_bytes().split(b"\n")
    lines.pop()  # empty, or a line without its end
    kept = len(lines) if len(lines) == rows else len(lines) - len(lines) % chunk_rows
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
