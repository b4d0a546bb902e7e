"""A file of prompts in, a JSONL file of outputs out; killed at any moment and started again, it goes on.

    {"id": 7, "instruction": "Translate to Korean.", "input": "Yes."}     one row of in_file, its first
    {"row": 1, "prediction": "네.", "finished": true, "source_cut": false, "id": 7, "instruction": …, "input": …}
    {"row": 2, "error": "broken JSON at column 9: …"}                     what a row that is no prompt gets

Rows without an instruction are for models that need none. A row may bring `source_language` and `target_language` (or
src_lang, tgt_lang), which go before those of the settings. A row may be a conversation instead, `messages` as in
training: its next answer is generated, or, if it ends in one, that answer anew. In a .txt file each line is an
instruction, or the input of the one that is given for all; a .csv or .tsv file is read as `diptych prepare` reads it.

Each line of in_file gets exactly one line, in its place; `row` counts from 1. A blank one asks nothing, and has an
empty prediction. `prediction` and `finished` (ended by the model, not by the cap) are lists where there are several
outputs for each prompt; with scores, so are `log_probability` and `log_probability_per_token`, in nats.

Rows are generated in chunks of CHUNK_BATCHES batches, sorted by length within a chunk only, and a chunk is written
and flushed to disk at once. Where a chunk starts does not depend on where a run was killed, and the sampling is
seeded anew for each, so that a file finished in several runs has the bytes of a file finished in one. Beside
out.jsonl lies out.jsonl.run.json: hashes of the weights and of the encoded prompts, and the settings. A run that does
not match it is refused; afterwards it says where the outputs came from. On several ranks each works on other chunks,
and the bytes are those of one.
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
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, set_seed

from diptych.data_prep.command_line.errors import UserError, nearest
from diptych.data_prep.rows.conversations import ROLES, SHAREGPT_ROLES, Fault, open_question, turns_of
from diptych.data_prep.rows.language_names import UnknownLanguage, languages_in
from diptych.data_prep.rows.records import Languages, Row
from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.commands.ranks import on_main_rank
from diptych.finetune.exporting.ctranslate2_engine import Translator
from diptych.finetune.inference.generation import (
    LINES_SUFFIX,
    GenerateSettings,
    GenerationBar,
    Output,
    Prompt,
    Prompter,
)
from diptych.finetune.inference.reranking import chosen_outputs
from diptych.finetune.inference.targets import given_tokens

# 8 batches: sorting among them already removes most of the padding, and a kill costs at most their time.
CHUNK_BATCHES = 8
TABLE_SUFFIXES = (".csv", ".tsv")
FORMATS = (
    "What is read: a JSON object on each line (.jsonl), a table whose first line names its columns (.csv, .tsv), or a "
    "text on each line (.txt)."
)
PROMPT_FIELDS = ("instruction", "input", "history", "system")
CONVERSATION_FIELDS = ("messages", "conversations")
OUR_FIELDS = ("row", "prediction", "finished", "source_cut", "error", "log_probability", "log_probability_per_token")


class PromptRow(NamedTuple):
    """One line of in_file: its fields as they are, and what it asks, or why it is no prompt."""

    fields: dict[str, Any]
    prompt: Prompt | None = None
    error: str = ""


BLANK = PromptRow({})


def read_prompts(
    in_file: str, instruction: str = "", system: str = "", has_languages: bool = False
) -> list[PromptRow]:
    """Every line of in_file, or row of a table; `instruction` and `system` are those of all lines of a .txt file. With
    `has_languages` these lines are inputs, also without an instruction.

    UserError where there is no file, no line, or no line that is a prompt.
    """
    if in_file.endswith(TABLE_SUFFIXES):
        rows = _table_rows(in_file)
    else:
        lines = Path(in_file).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        is_text = in_file.endswith(LINES_SUFFIX)
        rows = [_line_row(it, instruction, system, has_languages) if is_text else _json_row(it) for it in lines]
        if lines[-1] == b"":
            rows.pop()
    asked = [row for row in rows if row != BLANK]
    if not asked:
        raise UserError(f"{in_file} is empty. {FORMATS}")
    if all(row.error for row in asked):
        hint = "" if any(row.fields for row in asked) else f". {FORMATS}"
        first = rows.index(asked[0])
        raise UserError(f"{in_file} has no row that is a prompt; row {first + 1}: {rows[first].error}{hint}")
    return rows


def _table_rows(in_file: str) -> list[PromptRow]:
    from diptych.data_prep.reading.sources import open_sources  # here, for the time that pyarrow takes

    rows = [row for source in open_sources([in_file]) for chunk in source.chunks() for row in chunk.rows()]
    return [_row_of(row.fields) if isinstance(row, Row) else PromptRow({}, error=row.reason) for row in rows]


def _line_row(line: bytes, instruction: str, system: str, has_languages: bool) -> PromptRow:
    try:
        text = line.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        return PromptRow({}, error=_not_utf8(error))
    if not text.strip():
        return BLANK
    if instruction or has_languages:
        return PromptRow({"input": text}, Prompt(instruction, text, system=system))
    return PromptRow({"instruction": text}, Prompt(text, system=system))


def _json_row(line: bytes) -> PromptRow:
    if not line.strip():
        return BLANK
    try:
        fields = json.loads(line.decode("utf-8"))
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return PromptRow({}, error=_not_utf8(error))
    except UnicodeEncodeError:
        return PromptRow({}, error="half of a surrogate pair (\\ud800 to \\udfff) is no text")
    except json.JSONDecodeError as error:
        return PromptRow({}, error=f"broken JSON at column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets in a row
        return PromptRow({}, error=f"JSON that cannot be read: {error}")
    if not isinstance(fields, dict):
        return PromptRow({}, error=f"a JSON object is needed, got {type(fields).__name__}")
    return _row_of(fields)


def _row_of(fields: dict[str, Any]) -> PromptRow:
    try:
        return PromptRow(fields, prompt_of(fields))
    except (UserError, Fault) as error:
        return PromptRow(fields, error=str(error))


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8 at byte {error.start + 1} of the line"


def prompt_of(fields: dict[str, Any]) -> Prompt:
    """What these fields ask. UserError, or a Fault of a conversation, with what keeps them from being a prompt."""
    taken = [name for name in OUR_FIELDS if name in fields]
    if taken:
        raise UserError(f"field {taken[0]!r} is one that is written here; rename it")
    conversation = next((name for name in CONVERSATION_FIELDS if name in fields), None)
    for name in PROMPT_FIELDS:
        near = nearest(name, [other for other in fields if other not in PROMPT_FIELDS], cutoff=0.75)
        if name not in fields and near:
            raise UserError(f"{name!r} is missing; is {near!r} meant? Rename it to {name!r}")
    for name in ("input", "system"):
        if not isinstance(fields.get(name) or "", str):
            raise UserError(f"{name!r} must be a string, got {_shown(fields[name])}")
    if conversation is not None:
        return _conversation_prompt(fields, conversation)
    text, instruction = fields.get("input") or "", fields.get("instruction")
    if "instruction" not in fields and not text.strip():
        raise UserError(f"'instruction' is missing; the row has {', '.join(map(repr, fields)) or 'no fields'}")
    instruction = "" if instruction in (None, "") and text.strip() else instruction
    if not isinstance(instruction, str) or not (instruction.strip() or text.strip()):
        raise UserError(f"'instruction' must be a string that is not empty, got {_shown(fields['instruction'])}")
    history = fields.get("history") or []
    if not _is_history(history):
        raise UserError("'history' must be a list of [instruction, output] pairs of strings, oldest first")
    pairs = tuple((instruction, output) for instruction, output in history)
    return Prompt(instruction, text, pairs, fields.get("system") or "", languages_in(fields))


def _conversation_prompt(fields: dict[str, Any], name: str) -> Prompt:
    """Of a row with `messages`, as OpenAI or ShareGPT have them. A system prompt beside them stands before theirs."""
    for other in ("instruction", "input", "history"):
        if fields.get(other):
            raise UserError(f"the row has {name!r} and {other!r}, and either says what is asked; take one out")
    turns = fields[name]
    first = turns[0] if isinstance(turns, list) and turns else None
    is_sharegpt = isinstance(first, dict) and "role" not in first and "from" in first
    form = ("from", "value", SHAREGPT_ROLES) if is_sharegpt else ("role", "content", ROLES)
    system, question = open_question(turns_of(turns, name, *form, may_be_empty=True), name)
    system = [text for text in (fields.get("system"), *system) if text]
    languages = languages_in(fields)
    return Prompt(question.instruction, history=question.history, system="\n".join(system), languages=languages)


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def _is_history(history: Any) -> bool:
    return isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history
    )


def render_prompts(
    rows: list[PromptRow], prompter: Prompter
) -> tuple[list[PromptRow], dict[int, tuple[str, Languages]]]:
    """The rows, those with an error now that cannot be rendered, and of each good row's index its prompt with its
    languages."""
    judged, prompts = list(rows), {}
    for index, row in enumerate(rows):
        if row.prompt is None:
            continue
        try:
            prompts[index] = prompter.render(row.prompt)
        except UnknownLanguage as error:
            judged[index] = row._replace(error=error.fault)
        except UserError as error:
            judged[index] = row._replace(error=str(error))
    return judged, prompts


def generate_file(
    model: PreTrainedModel | Translator,
    prompter: Prompter,
    settings: GenerateSettings,
    rows: list[PromptRow],
    accelerator: Accelerator | None = None,
) -> int:
    """Write out_file, from its first row or from where a killed run left it. Returns the exit code. With an
    `accelerator` all its ranks call this, each works on other chunks, and the main one writes them in order."""
    out_file = Path(settings.out_file)
    if out_file.resolve() == Path(settings.in_file).resolve():
        raise UserError(f"--in_file and --out_file are the same file, {out_file}. Name another --out_file.")
    rows, prompts = render_prompts(rows, prompter)
    languages = [of_row for _, of_row in prompts.values()]
    ids, cut = prompter.encode([text for text, _ in prompts.values()], languages)
    given_of = {it: given_tokens(model, prompter.tokenizer, prompter.template, it) for it in set(languages)}
    sources = dict(zip(prompts, zip(ids, (given_of[it] for it in languages), strict=True), strict=True))
    was_cut = dict(zip(prompts, cut, strict=True))

    nothing = _predictions([Output("", finished=True)] * settings.num_return_sequences, settings)[0]
    chunk_rows = CHUNK_BATCHES * settings.batch_size
    identity = run_identity(model, prompter.template, settings, rows, list(sources.values()))
    done = on_main_rank(accelerator, lambda: open_run(out_file, identity, chunk_rows, len(rows), settings.overwrite))
    ranks, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    if done and rank == 0:
        print(f"{out_file} has {done} of {len(rows)} rows already; they are kept.", file=sys.stderr)

    def chunk_lines(start: int, bar: GenerationBar) -> str:
        chunk = range(start, min(start + chunk_rows, len(rows)))
        good = [row for row in chunk if row in sources]
        outputs = _generate_chunk(model, prompter, settings, [sources[row] for row in good], start, bar)
        bar.advance(len(chunk) - len(good), 0)
        predicted = dict(zip(good, outputs, strict=True))
        return "".join(
            _output_line(row, rows[row], predicted.get(row, nothing), was_cut.get(row, False)) for row in chunk
        )

    with GenerationBar(len(rows), done, shown=rank == 0) as bar:
        for first in range(done, len(rows), chunk_rows * ranks):
            start = first + rank * chunk_rows
            lines = [chunk_lines(start, bar) if start < len(rows) else ""]
            _append(out_file, gather_object(lines) if ranks > 1 else lines, is_writer=rank == 0)
            bar.catch_up(min(first + chunk_rows * ranks, len(rows)))
    if rank == 0:
        print(_summary(out_file, rows, sum(cut)), file=sys.stderr)
    return 0


def _append(out_file: Path, chunks: list[str], is_writer: bool) -> None:
    """Each chunk is on the disk before the next one."""
    if not is_writer:
        return
    with out_file.open("ab") as out:
        for lines in chunks:
            out.write(lines.encode("utf-8"))
            out.flush()
            os.fsync(out.fileno())


def _generate_chunk(
    model: PreTrainedModel | Translator,
    prompter: Prompter,
    settings: GenerateSettings,
    sources: list[tuple[list[int], list[int]]],
    start: int,
    bar: GenerationBar,
) -> list[dict[str, Any]]:
    """For each prompt of the chunk that starts at row `start`: its `prediction` and `finished`. `sources` are the ids
    of each, and what the decoder is given first."""
    set_seed(settings.seed + start)  # by the chunk's place, so that a resumed run samples what the first would have
    outputs = chosen_outputs(
        model,
        prompter.tokenizer,
        [ids for ids, _ in sources],
        given=[given for _, given in sources],
        seed=settings.seed + start,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        template=prompter.template,
        progress=bar,
        **settings.generation_kwargs(),
    )
    return _predictions(outputs, settings)


def _predictions(outputs: list[Output], settings: GenerateSettings) -> list[dict[str, Any]]:
    """What a line says of its outputs: of one, or lists of several."""
    each = settings.num_return_sequences
    said = [_said(output, settings.scores) for output in outputs]
    if each == 1:
        return said
    groups = [said[first : first + each] for first in range(0, len(said), each)]
    return [{name: [of_one[name] for of_one in group] for name in group[0]} for group in groups]


def _said(output: Output, scores: bool) -> dict[str, Any]:
    found = {"prediction": output.text, "finished": output.finished}
    if not scores:
        return found
    log_probability = output.log_probability
    per_token = None if log_probability is None else round(log_probability / max(1, len(output.ids)), 6)
    rounded = None if log_probability is None else round(log_probability, 6)
    return found | {"log_probability": rounded, "log_probability_per_token": per_token}


def _output_line(row: int, prompt: PromptRow, output: dict[str, Any], was_cut: bool) -> str:
    ours = {"error": prompt.error} if prompt.error else output | {"source_cut": was_cut}
    theirs = {name: value for name, value in prompt.fields.items() if name not in OUR_FIELDS}
    return json.dumps({"row": row + 1} | ours | theirs, ensure_ascii=False) + "\n"


def _summary(out_file: Path, rows: list[PromptRow], cut: int) -> str:
    errors, blank = sum(bool(row.error) for row in rows), rows.count(BLANK)
    parts = [f"{out_file}: {len(rows)} rows"]
    if errors:
        parts.append(f"{errors} with an error in place of a prediction")
    if blank:
        parts.append(f"{blank} blank, whose prediction is empty")
    if cut:
        parts.append(f"{cut} whose prompt was cut (source_cut)")
    return ", ".join(parts)


def run_identity(
    model: PreTrainedModel | Translator,
    template: Template,
    settings: GenerateSettings,
    rows: list[PromptRow],
    sources: list[tuple[list[int], list[int]]],
) -> dict[str, Any]:
    """All that decides the bytes of out_file. Prompts are hashed as encoded, with what the decoder is given: template,
    tokenizer and languages are in them."""
    own = ("batch_size", "max_new_tokens", "seed")
    rules = {"decoder_prefix": list(template.decoder_prefix), "stop": list(template.stop)}
    is_torch = not isinstance(model, Translator)
    engine = {"weights_sha256": weights_sha256(model), "torch": torch.__version__} if is_torch else model.identity()
    return engine | {
        "prompts_sha256": _sha256(json.dumps([[[row.fields, row.error] for row in rows], sources]).encode()),
        "generation_config": json.loads(model.generation_config.to_json_string(use_diff=False)),
        "settings": {name: getattr(settings, name) for name in own} | rules | settings.generation_kwargs(),
        "device": model.device.type,
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
