"""`diptych distil TEACHER STUDENT`: from rows and a teacher to a small model in int8, by the other commands.

    diptych distil runs/teacher/final small --data pairs.tsv --out runs/small

    runs/small/  recipes/      what each of the other commands was told: `diptych train --config recipes/student.yaml`
                 real/         the rows, prepared                prompts.jsonl, samples.jsonl   what the teacher wrote
                 written.jsonl, written.report.json              what the student learns from
                 data/         that, prepared for the student    student/    its run, with final/
                 int8/         the CTranslate2 folder            evaluation/, table.md, table.json

How long it will take is printed first. Each step is skipped where what it makes is there, so the same command goes on
after an interruption; the teacher's file and the training go on where they were cut.
"""

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.overwrite_checks import take_lock
from diptych.data_prep.rows.language_names import languages_in
from diptych.data_prep.rows.named_splits import kind_of, name_in, splits_of
from diptych.data_prep.text_to_ids.decoder_start import decoder_start_of
from diptych.data_prep.text_to_ids.templates import carried_template
from diptych.data_prep.text_to_ids.two_vocabularies import all_tokens
from diptych.finetune.batches.padded_rows import open_splits
from diptych.finetune.commands import cli
from diptych.finetune.commands.exit_codes import DONE, INTERRUPTED, STOPPED
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.evaluating.evaluate_rows import CAP_OVER_LONGEST_TARGET
from diptych.finetune.evaluating.metrics import find_metrics
from diptych.finetune.exporting.ctranslate2_engine import import_ctranslate2
from diptych.finetune.model.donor_llm import tokenizers_differ
from diptych.finetune.model.loading import load_tokenizer
from diptych.finetune.run_files.atomic_folders import read_json, read_json_lines, write_json, write_text
from diptych.finetune.run_files.run_folder import LOCK, holds_nothing, read_status
from diptych.finetune.several_runs.distil_settings import LOG_PROBABILITY, STUDENTS, DistilSettings
from diptych.finetune.several_runs.hours_ahead import Hours, training_pace, writing_pace
from diptych.finetune.several_runs.stage_table import export_settings, measure, write_table
from diptych.finetune.several_runs.written_rows import (
    Row,
    distinct,
    prompts_of,
    real_rows,
    said,
    without_languages,
    write_jsonl,
    write_rows,
)
from diptych.finetune.training.starting_model import is_named_size
from diptych.finetune.training.stop_signals import SIGNALS

SETTINGS = "distil.json"
FREE = {"out", "device", "hours_only"}
"""Settings that may change when it is continued."""
CARRIED = (
    *("max_source_tokens", "max_target_tokens", "too_long", "lossy_text", "packing", "workers"),
    *("packed_source_tokens", "packed_target_tokens"),
)
"""Settings of the real rows' preparation that the student's has, too."""
AS_PARALLEL = {"format": "parallel", "map": ["first=input", "second=output"], "forward": ""}
"""How `prepare` reads rows without an instruction, which are for models with language codes."""
FOR_NEW = {"learning_rate": 1e-3, "schedule": "linear", "warmup_ratio": 0.05, "betas": [0.9, 0.98]}
EPOCHS_OF_NEW, EPOCHS_OF_CHECKPOINT = 10, 3


class StepFailed(UserError):
    """Another command ended, and has said why."""

    def __init__(self, command: str, code: int, recipe: Path):
        self.exit_code = code
        is_stopped = code in (STOPPED, INTERRUPTED)
        remedy = (
            "The same command goes on." if is_stopped else "Correct what it says, and give the same command again."
        )
        super().__init__(f"`diptych {command}` of {recipe} ended with exit code {code}. {remedy}")


def run(settings: DistilSettings) -> int:
    out = Path(settings.out).expanduser()
    check(settings)
    begin(out, settings)
    lock = take_lock(out / LOCK, lambda holder: f"{out} is in use by {holder}. Wait for it, or name another folder.")
    try:
        work = Distillation(settings, out)
        if not (out / "samples.jsonl").is_file() or settings.hours_only:
            print(f"{out}: {work.hours()}", flush=True)
        if settings.hours_only:
            return DONE
        work.write()
        work.prepare_student()
        found = write_table(list(work.stages()), out)
    finally:
        os.close(lock)
    print(f"\n{found}\n\nmodel for `diptych generate --engine ctranslate2`: {work.precision_folder}")
    return DONE


def check(settings: DistilSettings) -> None:
    """UserError for what would otherwise end the work hours later."""
    import_ctranslate2()
    export_settings(Path("student"), Path(settings.out), settings)
    chosen_by = [] if settings.by == LOG_PROBABILITY else split_names(settings.by)
    find_metrics(dict.fromkeys([*split_names(settings.metrics), *chosen_by]), settings.metric_settings)


def begin(out: Path, settings: DistilSettings) -> None:
    """Makes the folder, or finds it as this command left it. UserError where other settings made it."""
    own = json.loads(json.dumps({name: value for name, value in asdict(settings).items() if name not in FREE}))
    file = out / SETTINGS
    if not file.is_file():
        if not holds_nothing(out):
            raise UserError(f"{out} is there already, and is of no distillation. Name another folder: --out FOLDER")
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, own)
    before = read_json(file)
    if changed := [name for name, value in own.items() if before.get(name) != value]:
        raise UserError(
            f"{out} was begun with {changed[0]}: {before.get(changed[0])}, and it is {own[changed[0]]} now. Set it"
            f" back to go on, or begin in another folder: --out FOLDER"
        )


@dataclass(frozen=True)
class Distillation:
    settings: DistilSettings
    out: Path

    def carry_out(self, command: str, settings: Mapping[str, Any], recipe: Path) -> None:
        """Another command, with its settings in a file of their own. StepFailed if it does not succeed."""
        recipe.parent.mkdir(exist_ok=True)
        write_text(recipe, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
        with _signals_kept():
            code = cli.run(command, ["--config", str(recipe)])
        if code != DONE:
            raise StepFailed(command, code, recipe)

    def step(self, name: str, command: str, settings: Mapping[str, Any]) -> None:
        print(f"\n{name}: diptych {command} --config {self.out}/recipes/{name}.yaml", flush=True)
        self.carry_out(command, settings, self.out / "recipes" / f"{name}.yaml")

    # The real rows

    @cached_property
    def real(self) -> Path:
        """The real rows, prepared with the teacher's tokenizer."""
        given, own = self.settings.data, self.out / "real"
        if len(given) == 1 and (Path(given[0]).expanduser() / "dataset_dict.json").is_file():
            own = Path(given[0]).expanduser()
        elif not own.is_dir():
            tokenizer = {"tokenizer": self.settings.teacher}
            self.step("real", "prepare", tokenizer | self.settings.prepare | {"data": given, "out": str(own)})
        found, teacher = load_tokenizer(str(own / "tokenizer")), load_tokenizer(self.settings.teacher)
        if self.settings.direction == "forward" and (it := tokenizers_differ(all_tokens(found), all_tokens(teacher))):
            raise UserError(
                f"{own} was prepared for another tokenizer than the teacher's ({it}). Give --data the rows."
            )
        return own

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Of each split."""
        tokenizer = load_tokenizer(str(self.real / "tokenizer"))
        found = {name: real_rows(split, tokenizer) for name, split in open_splits(self.real).items()}
        if not splits_of("test", found):
            raise UserError(f"{self.real} has no test split, which the table is of. Hold one out: --prepare.test …")
        return found

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.real / "manifest.json")

    @cached_property
    def test_rows(self) -> list[Row]:
        """Its different sources, each with `references`."""
        rows = distinct([row for name in splits_of("test", self.rows) for row in self.rows[name]])
        limit = self.settings.limit or len(rows)
        return random.Random(0).sample(rows, min(limit, len(rows)))

    # What the teacher writes

    @cached_property
    def prompts(self) -> list[Row]:
        return prompts_of(self.rows["train"], self.settings)

    @property
    def writing(self) -> dict[str, Any]:
        """Settings of `diptych generate`."""
        its, longest = self.settings, self.manifest["tokens"]["target" if self.is_forward else "source"]["p100"]
        drawn = {} if its.beams or not its.temperature else {"top_k": 0}
        return {
            **{name: getattr(its, name) for name in ("batch_size", "device", "seed")},
            "model": its.teacher,
            "in_file": str(self.out / "prompts.jsonl"),
            "out_file": str(self.out / "samples.jsonl"),
            "num_return_sequences": its.samples,
            "num_beams": its.samples if its.beams else 1,
            "temperature": 0.0 if its.beams else its.temperature,
            "max_new_tokens": its.max_new_tokens or int(CAP_OVER_LONGEST_TARGET * longest) + 1,
            "scores": True,
            "generation": drawn,
        }

    def write(self) -> None:
        out, report = self.out / "written.jsonl", self.out / "written.report.json"
        if report.is_file():
            return
        write_jsonl(self.out / "prompts.jsonl", self.prompts)
        self.step("samples", "generate", self.writing)
        found = write_rows(self.out / "samples.jsonl", self.rows["train"], self.settings, out)
        if self.needs_no_codes:
            write_jsonl(out, without_languages(read_json_lines(out)))
        write_json(report, found)
        print(f"{out}: {said(Counter(found['counts']))}")

    @property
    def is_forward(self) -> bool:
        return self.settings.direction == "forward"

    def hours(self) -> Hours:
        rows = self.for_student(self.rows["train"])
        all_rows = len(self.prompts) + len(rows) * self.settings.real
        tokens, pace = training_pace(rows, self.settings, self.recipe, self.preparing, self.carry_out, all_rows)
        written = writing_pace(self.prompts, self.settings, self.writing)
        return Hours(len(self.prompts), self.settings.samples, written, tokens, pace)

    # The student

    @cached_property
    def is_new(self) -> bool:
        return self.settings.student in STUDENTS or is_named_size(self.settings.student)

    @cached_property
    def no_word_level(self) -> str:
        """Why the teacher's predictions are not in the loss; "" if they are."""
        its = self.settings
        for is_so, why in (
            (not its.word_level, "word_level is 0"),
            (its.is_self_training, "teacher and student are one model"),
            (not self.is_forward, "the teacher writes the other direction"),
        ):
            if is_so:
                return why
        if self.is_new:
            return "the student has a tokenizer of its own" if its.vocab_size else ""
        if differ := tokenizers_differ(*(all_tokens(load_tokenizer(it)) for it in (its.teacher, its.student))):
            return f"the student has another tokenizer ({differ})"
        starts = [decoder_start_of(it) for it in (its.teacher, its.student)]
        return "" if starts[0][0] == starts[1][0] else "their decoders start with different tokens"

    @property
    def preparing(self) -> dict[str, Any]:
        """Settings of `diptych prepare` for the student's rows."""
        made = self.manifest["settings"]
        template = {"template": made["template"] or self.manifest["template"]["name"]}
        if self.settings.vocab_size and self.is_new:
            own = {"train_tokenizer": "bpe", "vocab_size": self.settings.vocab_size, **template}
        elif self.is_new:
            start = {} if (found := decoder_start_of(self.settings.teacher)) is None else found
            own = {"tokenizer": str(self.real / "tokenizer"), "decoder_start_token_id": start[0] if start else None}
        else:
            has_template = carried_template(load_tokenizer(self.settings.student), check=False) is not None
            own = {"tokenizer": self.settings.student, **({} if has_template else template)}
        return {
            "data": [str(self.out / "written.jsonl")],
            **(AS_PARALLEL if self.rows["train"][0]["instruction"] == "" else {"format": "alpaca"}),
            **own,
            **{name: made[name] for name in CARRIED},
            **{kind: self._held_out(kind) for kind in ("validation", "test")},
            "seed": self.settings.seed,
            "out": str(self.out / "data"),
        }

    @cached_property
    def needs_no_codes(self) -> bool:
        """Whether the student has one direction, and a tokenizer of its own, without codes. Its rows are bare texts,
        and not `translate English to …`, as a tokenizer without codes has it for several directions."""
        return bool(self.is_new and self.settings.vocab_size) and len(set(map(languages_in, self.rows["train"]))) == 1

    def for_student(self, rows: list[Row]) -> list[Row]:
        return without_languages(rows) if self.needs_no_codes else rows

    def _held_out(self, kind: str) -> list[str]:
        """Files of the real rows of a kind of split, written if they are not there."""
        files = []
        for name in splits_of(kind, self.rows):
            file = self.out / f"real.{name.replace('/', '.')}.jsonl"
            if not file.is_file():
                write_jsonl(file, self.for_student(self.rows[name]))
            files.append(f"{name_in(name)}={file}" if name != kind_of(name) else str(file))
        return files

    def prepare_student(self) -> None:
        if not (self.out / "data").is_dir():
            self.step("data", "prepare", self.preparing)

    @property
    def recipe(self) -> dict[str, Any]:
        """Of the student's training."""
        its = self.settings
        name, overrides = STUDENTS.get(its.student, (its.student, {}))
        found: dict[str, Any] = {"model": name, "seed": its.seed}
        if self.is_new:
            start = None if its.vocab_size else self.preparing["decoder_start_token_id"]
            overrides = overrides | ({} if start is None else {"decoder_start_token_id": start})
            found |= FOR_NEW
        overrides = overrides | its.train.get("model_overrides", {})
        if not {"epochs", "max_steps"} & its.train.keys():
            found["epochs"] = EPOCHS_OF_NEW if self.is_new else EPOCHS_OF_CHECKPOINT
        if not self.no_word_level:
            found |= {"teacher": its.teacher, "distill_weight": its.word_level}
        found |= its.train | ({"model_overrides": overrides} if overrides else {})
        own = self.out / "student"
        return found | {"data": str(self.out / "data"), "out": str(own), "resume": own.exists()}

    def train(self, name: str, recipe: Mapping[str, Any]) -> Path:
        """The final model of a run, which is begun, continued, or there already."""
        folder = Path(recipe["out"])
        if (read_status(folder) or {}).get("state") != "done":
            self.step(name, "train", recipe)
        return folder / "final"

    def baseline(self) -> Path:
        """The same student, trained as long on the real rows alone."""
        data, out = self.out / "baseline-data", self.out / "baseline"
        if not data.is_dir():
            write_jsonl(self.out / "real.train.jsonl", self.for_student(self.rows["train"]))
            own = {"data": [str(self.out / "real.train.jsonl")], "out": str(data)}
            same = {"tokenizer": str(self.out / "data" / "tokenizer"), "train_tokenizer": None}
            start = self.read_manifest("data")["packing"]
            same |= {"decoder_start_token_id": start["decoder_start_token_id"]} if start else {}
            self.step("baseline-data", "prepare", {**self.preparing, **same, **own})
        alone = {name: value for name, value in self.recipe.items() if name not in ("teacher", "distill_weight")}
        steps = {"max_steps": read_status(self.out / "student")["total_steps"], "epochs": None}
        own = {"data": str(data), "out": str(out), "resume": out.exists()}
        return self.train("baseline", {**alone, **steps, **own})

    def read_manifest(self, folder: str) -> dict[str, Any]:
        return read_json(self.out / folder / "manifest.json")

    @property
    def precision_folder(self) -> Path:
        return self.out / self.settings.precision

    def stages(self) -> Iterator[dict[str, Any]]:
        """Figures of each model, which is made if it is not there."""
        its, out = self.settings, self.out / "evaluation"

        def measured(name: str, model: Path | str, rows: list[Row]) -> dict[str, Any]:
            return measure(name, str(model), rows, its, out)

        for_student = self.for_student(self.test_rows)

        if self.is_forward:
            yield measured("teacher", its.teacher, self.test_rows)
        elif not self.is_new:
            yield measured("student before", its.student, for_student)
        if self.no_word_level:
            print(f"the student learns from texts alone: {self.no_word_level}")
        student = self.train("student", self.recipe)
        if its.baseline:
            yield measured("student without teacher", self.baseline(), for_student)
        yield measured("student", student, for_student)
        if not self.precision_folder.is_dir():
            self.step("export", "export", export_settings(student, self.precision_folder, its))
        yield measured(f"student {its.precision}", self.precision_folder, for_student)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Training says what signals do; after it, they do what they did before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
