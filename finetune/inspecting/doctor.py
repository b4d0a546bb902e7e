"""Whether a checkpoint's training is right: one command, for any AutoModelForSeq2SeqLM folder or Hub id.

    $ diptych doctor my-checkpoint --data my-rows.jsonl
    my-checkpoint: t5, 60.5 M weights, rows of my-rows.jsonl, on cpu

    ✓ 8 micro-batches = 1 batch   loss × 1.000000, gradient × 1.000000, cosine 1.000000
    ✓ 2 ranks = 1 rank            loss × 1.000000, gradient × 1.000000, cosine 1.000000
    ! HF Trainer: 8 = 1           loss × 8.081, gradient × 8.512, cosine 0.896
        Train with `diptych train`, which is right (above), or put diptych.PackedSeq2SeqTrainer …
    18 green, 0 red, 2 notes, 0 do not apply, in 10 s

The exit code is 1 if something is red, 2 for a mistake such as a folder that is not there, and else 0. A note is about
transformers' own Trainer, which is wrong for many families; it says nothing against the checkpoint.
Nothing is written, nothing is changed, and no code from the checkpoint is run. The checks with two processes or with a
Trainer are made on the CPU whatever --device says.
"""

import copy
import json
import logging
import math
import os
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm
from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.batches.padded_rows import check_same_tokenizer
from diptych.finetune.inspecting.doctor_checks import CHECKS, CheckResult, Patient, examine
from diptych.finetune.inspecting.doctor_rows import rows_from
from diptych.finetune.inspecting.doctor_settings import DoctorSettings
from diptych.finetune.model.loading import (
    ADAPTER_CONFIG,
    check_folder,
    has_tokenizer,
    load_config,
    load_model,
    load_parts,
    load_tokenizer,
    pick_device,
)

COLUMNS = 100
NAME_COLUMNS = max(map(len, CHECKS)) + 2
MARKS = {"green": "✓", "red": "✗", "note": "!", "not_applicable": "–"}


@contextmanager
def quiet() -> Iterator[None]:
    """Turns off the logs and progress bars of other libraries; the checks report what they would warn of."""
    had_bars = transformers.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        datasets.enable_progress_bars()
        if had_bars:
            transformers.logging.enable_progress_bar()


def admit(settings: DoctorSettings, folder: Path) -> Patient:
    """The checkpoint with what can be read of it. What is wrong with a whole one is for the checks to say."""
    name = os.path.expanduser(settings.model)
    check_folder(name)
    device = pick_device(settings.device)
    if (Path(name) / ADAPTER_CONFIG).is_file():
        merged, tokenizer = load_parts(name)
        config = copy.deepcopy(merged.config)
        merged.save_pretrained(folder / "merged")  # and loaded, because peft leaves all weights frozen
        model = load_model(str(folder / "merged"), torch.float32)
    else:
        config = load_config(name)
        try:
            model = load_model(name, torch.float32)
        except UserError:  # no model where there are pickles alone
            place = Path(name)
            has_pickles = not any(place.glob("*.safetensors")) and any(place.glob("*.bin"))
            if not has_pickles or type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
                raise
            model = None
        tokenizer = load_tokenizer(name) if has_tokenizer(name) else None
    if model is not None:
        model = model.to(device).eval()
    given = rows_from(settings.data, tokenizer) if settings.data else None
    of_the_data = Path(settings.data) / "tokenizer"
    if settings.data and tokenizer is not None and of_the_data.is_dir():
        check_same_tokenizer(settings.data, load_tokenizer(str(of_the_data)), name, tokenizer, may_grow=True)
    return Patient(name, model, tokenizer, given, config, folder)


def format_table(results: Mapping[str, CheckResult]) -> str:
    """One line for each check, within 100 columns, and below each red one and each note what to do."""
    lines = []
    for name, result in results.items():
        first, *others = textwrap.wrap(result.message, COLUMNS - NAME_COLUMNS - 2)
        lines.append(f"{MARKS[result.status]} {name:{NAME_COLUMNS}}{first}")
        lines += [" " * (NAME_COLUMNS + 2) + line for line in others]
        indents = {"initial_indent": " " * 4, "subsequent_indent": " " * 4}
        lines += textwrap.wrap(result.remedy, COLUMNS, **indents, break_on_hyphens=False)
    return "\n".join(lines)


def count(results: Mapping[str, CheckResult], status: str) -> int:
    return sum(finding.status == status for finding in results.values())


def to_json(patient: Patient, results: Mapping[str, CheckResult], seconds: float) -> str:
    checks = []
    for name, result in results.items():
        is_lost = {key for key, it in result.measured.items() if isinstance(it, float) and not math.isfinite(it)}
        measured = result.measured | dict.fromkeys(is_lost)  # JSON has neither NaN nor infinity
        checks.append({"name": name} | result._asdict() | {"measured": measured})
    report = {"model": patient.name, "examined": describe(patient), "model_type": patient.config.model_type}
    report |= {"checks": checks, "seconds": round(seconds, 1)}
    report |= {status: count(results, status) for status in MARKS}
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)


def describe(patient: Patient) -> str:
    if patient.model is None:
        return f"{patient.name}: {patient.config.model_type}, its weights were not read"
    weights = sum(weight.numel() for weight in patient.model.parameters()) / 1e6
    return (
        f"{patient.name}: {patient.model.config.model_type}, {weights:,.1f} M weights, {patient.all_rows.described}, "
        f"on {patient.model.device}"
    )


def run(settings: DoctorSettings) -> int:
    started = time.perf_counter()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, quiet():
        patient = admit(settings, Path(folder))
        with tqdm(CHECKS, desc="doctor", leave=False, disable=not sys.stderr.isatty()) as bar:
            results = {}
            for name in bar:
                bar.set_postfix_str(name)
                results[name] = examine(name, patient)
        seconds = time.perf_counter() - started
        if settings.json:
            print(to_json(patient, results, seconds))
        else:
            print(*textwrap.wrap(describe(patient), COLUMNS), "", sep="\n")
            print(format_table(results))
            green, red, notes, other = (count(results, status) for status in MARKS)
            print(f"\n{green} green, {red} red, {notes} notes, {other} do not apply, in {seconds:.0f} s")
    return 1 if count(results, "red") else 0
