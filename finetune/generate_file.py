"""A JSONL file of prompts in, a JSONL file of outputs out; killed at any moment and started again, it goes on.

    {"id": 7, "instruction": "Translate to Korean.", "input": "Yes."}     one row of in_file, its first
    {"row": 1, "prediction": "네.", "finished": true, "source_cut": false, "id": 7, "instruction": …, "input": …}
    {"row": 2, "error": "broken JSON at column 9: …"}                     what a row that is no prompt gets

Each row of in_file gets exactly one line, in its place; `row` counts from 1. `prediction` and `finished` (ended by
the model, not by the cap) are lists where there are several outputs for each prompt.

Rows are generated in chunks of CHUNK_BATCHES batches, sorted by length within a chunk only, and a chunk is written
and flushed to disk at once. Where a chunk starts does not depend on where a run was killed, and the sampling is
seeded anew for each, so that a file finished in several runs has the bytes of a file finished in one. Beside
out.jsonl lies out.jsonl.run.json: hashes of the weights and of the encoded prompts, and the settings. A run that does
not match it is refused; afterwards it says where the outputs came from.
"""

import codecs
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel, set_seed

from diptych.data_prep.records import UserError, nearest
from diptych.data_prep.templates import Template
from diptych.finetune.generate import GenerateSettings, GenerationBar, Prompter, generate_outputs

# 8 batches: sorting among them already removes most of the padding, and a kill costs at most their time.
CHUNK_BATCHES = 8
PROMPT_FIELDS = ("instruction", "input", "history", "system")
OUR_FIELDS = ("row", "prediction", "finished", "source_cut", "error")


class PromptRow(NamedTuple):
    """One line of in_file: its fields as they are, or why it is no prompt."""

    fields: dict[str, Any]
    error: str = ""


def read_prompts(in_file: str) -> list[PromptRow]:
    """Every line of in_file; UserError where there is no file, no line, or no line that is a prompt."""
    lines = Path(in_file).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    rows = [_read_row(line) for line in lines]
    if not rows:
        raise UserError(f"{in_file} is empty. Write one JSON object for each prompt, one on each line.")
    if all(row.error for row in rows):
        raise UserError(f"{in_file} has no row that is a prompt; row 1: {rows[0].error}")
    return rows


def _read_row(line: bytes) -> PromptRow:
    try:
        fields = json.loads(line.decode("utf-8"))
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return PromptRow({}, f"invalid UTF-8 at byte {error.start + 1} of the line")
    except UnicodeEncodeError:
        return PromptRow({}, "half of a surrogate pair (\\ud800 to \\udfff) is no text")
    except json.JSONDecodeError as error:
        return PromptRow({}, f"broken JSON at column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets in a row
        return PromptRow({}, f"JSON that cannot be read: {error}")
    if not isinstance(fields, dict):
        return PromptRow({}, f"a JSON object is needed, got {type(fields).__name__}")
    return PromptRow(fields, _field_error(fields))


def _field_error(fields: dict[str, Any]) -> str:
    """What keeps these fields from being a prompt; "" where nothing does."""
    taken = [name for name in OUR_FIELDS if name in fields]
    if taken:
        return f"field {taken[0]!r} is one that is written here; rename it"
    for name in PROMPT_FIELDS:
        needed = name == "instruction"
        near = nearest(name, [other for other in fields if other not in PROMPT_FIELDS], cutoff=0.75)
        if name not in fields and near:
            return f"{name!r} is missing; is {near!r} meant? Rename it to {name!r}"
        if name not in fields and needed:
            return f"{name!r} is missing; the row has {', '.join(map(repr, fields)) or 'no fields'}"
    if not isinstance(fields["instruction"], str) or not fields["instruction"].strip():
        return f"'instruction' must be a string that is not empty, got {json.dumps(fields['instruction'])[:60]}"
    for name in ("input", "system"):
        if not isinstance(fields.get(name) or "", str):
            return f"{name!r} must be a string, got {json.dumps(fields[name])[:60]}"
    if not _is_history(fields.get("history") or []):
        return "'history' must be a list of [instruction, output] pairs of strings, oldest first"
    return ""


def _is_history(history: Any) -> bool:
    return isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history
    )


def render_prompts(rows: list[PromptRow], template: Template) -> tuple[list[PromptRow], dict[int, str]]:
    """The rows, those with an error now that the template cannot render, and the prompt of each good row's index."""
    judged, prompts = list(rows), {}
    for index, row in enumerate(rows):
        if row.error:
            continue
        try:
            history = tuple((instruction, output) for instruction, output in row.fields.get("history") or [])
            text, system = row.fields.get("input") or "", row.fields.get("system") or ""
            prompts[index] = template.render_source(row.fields["instruction"], text, history, system)
        except UserError as error:
            judged[index] = row._replace(error=str(error))
    return judged, prompts


def generate_file(
    model: PreTrainedModel, prompter: Prompter, settings: GenerateSettings, rows: list[PromptRow]
) -> int:
    """Write out_file, from its first row or from where a killed run left it; the exit code."""
    out_file = Path(settings.out_file)
    if out_file.resolve() == Path(settings.in_file).resolve():
        raise UserError(f"--in_file and --out_file are the same file, {out_file}. Name another --out_file.")
    rows, prompts = render_prompts(rows, prompter.template)
    ids, cut = prompter.encode(list(prompts.values()))
    sources, was_cut = dict(zip(prompts, ids, strict=True)), dict(zip(prompts, cut, strict=True))

    chunk_rows = CHUNK_BATCHES * settings.batch_size
    identity = run_identity(model, prompter.template, settings, rows, ids)
    done = open_run(out_file, identity, chunk_rows, len(rows), settings.overwrite)
    if done:
        print(f"{out_file} has {done} of {len(rows)} rows already; they are kept.", file=sys.stderr)
    with out_file.open("ab") as out, GenerationBar(len(rows), done) as bar:
        for start in range(done, len(rows), chunk_rows):
            chunk = range(start, min(start + chunk_rows, len(rows)))
            good = [row for row in chunk if row in sources]
            outputs = _generate_chunk(model, prompter, settings, [sources[row] for row in good], start, bar)
            bar.advance(len(chunk) - len(good), 0)
            answers = dict(zip(good, outputs, strict=True))
            lines = [_output_line(row, rows[row], answers.get(row), was_cut.get(row)) for row in chunk]
            out.write("".join(lines).encode("utf-8"))
            out.flush()
            os.fsync(out.fileno())
    print(_summary(out_file, len(rows), len(rows) - len(sources), sum(cut)), file=sys.stderr)
    return 0


def _generate_chunk(
    model: PreTrainedModel,
    prompter: Prompter,
    settings: GenerateSettings,
    source_ids: list[list[int]],
    start: int,
    bar: GenerationBar,
) -> list[dict[str, Any]]:
    """For each prompt of the chunk that starts at row `start`: its `prediction` and `finished`."""
    set_seed(settings.seed + start)  # by the chunk's place, so that a resumed run samples what the first would have
    outputs = generate_outputs(
        model,
        prompter.tokenizer,
        source_ids,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        template=prompter.template,
        progress=bar,
        **settings.generation_kwargs(),
    )
    each = settings.num_return_sequences
    if each == 1:
        return [{"prediction": output.text, "finished": output.finished} for output in outputs]
    groups = [outputs[first : first + each] for first in range(0, len(outputs), each)]
    return [{"prediction": [o.text for o in group], "finished": [o.finished for o in group]} for group in groups]


def _output_line(row: int, prompt: PromptRow, output: dict[str, Any] | None, was_cut: bool | None) -> str:
    ours = {"error": prompt.error} if output is None else output | {"source_cut": was_cut}
    theirs = {name: value for name, value in prompt.fields.items() if name not in OUR_FIELDS}
    return json.dumps({"row": row + 1} | ours | theirs, ensure_ascii=False) + "\n"


def _summary(out_file: Path, rows: int, errors: int, cut: int) -> str:
    parts = [f"{out_file}: {rows} rows"]
    if errors:
        parts.append(f"{errors} with an error in place of a prediction")
    if cut:
        parts.append(f"{cut} whose prompt was cut (source_cut)")
    return ", ".join(parts)


def run_identity(
    model: PreTrainedModel,
    template: Template,
    settings: GenerateSettings,
    rows: list[PromptRow],
    source_ids: list[list[int]],
) -> dict[str, Any]:
    """All that decides the bytes of out_file. Prompts are hashed as encoded: template and tokenizer are in them."""
    own = ("batch_size", "max_new_tokens", "seed")
    rules = {"decoder_prefix": list(template.decoder_prefix), "stop": list(template.stop)}
    return {
        "prompts_sha256": _sha256(json.dumps([rows, source_ids]).encode()),
        "weights_sha256": weights_sha256(model),
        "generation_config": json.loads(model.generation_config.to_json_string(use_diff=False)),
        "settings": {name: getattr(settings, name) for name in own} | rules | settings.generation_kwargs(),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def weights_sha256(model: PreTrainedModel) -> str:
    """Of names, types and bytes as loaded, so that it does not matter where the checkpoint lies or how it is split."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def open_run(out_file: Path, identity: dict[str, Any], chunk_rows: int, rows: int, overwrite: bool) -> int:
    """Prepare out_file and its .run.json; how many rows out_file has, cut back to whole chunks.

    UserError where out_file exists and was not written by this very run.
    """
    run_file = out_file.with_name(out_file.name + ".run.json")
    if out_file.exists() and not overwrite:
        if not run_file.exists():
            raise UserError(
                f"{out_file} exists and has no {run_file.name} beside it, so it is not known what wrote it. "
                f"Name another --out_file, or replace it with --overwrite true."
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
        f"{name} was {_short(before.get(name))}, is now {_short(now[name])}"
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
            f"with to finish it, name another --out_file, or replace it with --overwrite true."
        )


def _short(value: Any) -> str:
    return str(value)[:12]


def _cut_to_whole_chunks(out_file: Path, chunk_rows: int, rows: int) -> int:
    """Cut away a torn last line and the unfinished chunk around it; the number of rows that stay.

    UserError where a line that stays is not the line of its row.
    """
    lines = out_file.read_bytes().split(b"\n")
    lines.pop()  # nothing, or a line without its end
    kept = len(lines) if len(lines) == rows else len(lines) - len(lines) % chunk_rows
    for row, line in enumerate(lines[:kept], start=1):
        try:
            found = json.loads(line)["row"]
        except (ValueError, KeyError, TypeError):
            found = None
        if found != row:
            raise UserError(
                f"{out_file} line {row} is not the output of row {row}; the file was changed after it was written. "
                f"Put it back, name another --out_file, or replace it with --overwrite true."
            )
    with out_file.open("r+b") as out:
        out.truncate(sum(len(line) + 1 for line in lines[:kept]))
    return kept
