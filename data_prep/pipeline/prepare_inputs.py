"""What the settings say to read: the sources, the format of each, and the stages that their rows go through.

    inputs = open_inputs(settings)                               UserError for all that is wrong before rows are read
    stages = make_stages(settings, inputs, tokenizer, template)
    fingerprint_of(settings, inputs, tokenizer, template)        equal for two runs that would write the same dataset

`diptych prepare` and datatrove both begin with these.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from diptych.data_prep.cleaning.decontaminate import Decontaminate, PlainText
from diptych.data_prep.cleaning.filters import LanguageFilter, SchemaFilter
from diptych.data_prep.cleaning.mixture import check_mixture
from diptych.data_prep.cleaning.sensitive import secret_detectors
from diptych.data_prep.command_line.errors import UserError, counted
from diptych.data_prep.packing.unpacked_families import why_not_packed
from diptych.data_prep.pipeline.gather_rows import first_rows
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.pipeline.prepared_folder import code_version, tokenizer_digest
from diptych.data_prep.pipeline.row_stages import (
    LOSSY,
    OVER_THE_LIMIT,
    OWN_COLUMNS,
    PREFERENCE_COLUMNS,
    Check,
    Stages,
)
from diptych.data_prep.pipeline.rows_in_memory import RowsInMemory, open_rows
from diptych.data_prep.reading.sources import (
    HUB_PREFIX,
    TRAIN,
    Limits,
    Source,
    is_plain,
    open_evaluation,
    open_sources,
)
from diptych.data_prep.rows.convert_rows import Converter, Directions
from diptych.data_prep.rows.json_schema import read_schema, why_not_forced
from diptych.data_prep.rows.language_names import is_swapped
from diptych.data_prep.rows.named_splits import HELD_OUT, KINDS, kind_in_name, kind_of, splits_of
from diptych.data_prep.rows.recognise_format import converter_for, named, parse_mapping
from diptych.data_prep.rows.records import Languages, Preferences, Record, Reject, Row
from diptych.data_prep.rows.terms import read_terms
from diptych.data_prep.text_to_ids.decoder_start import decoder_start_of
from diptych.data_prep.text_to_ids.languages import codes_of, own_languages, resolved
from diptych.data_prep.text_to_ids.templates import BARE_TEMPLATE, Template

FORMAT_UNKNOWN = Converter(named("alpaca"))
"""The converter of a source without a row that can be read: all its rows are rejects, whatever the format."""


@dataclass(frozen=True)
class Inputs:
    """What will be read."""

    sources: list[Source]
    evaluation: list[Source]
    """Evaluation sets whose texts must not be in the train split."""
    converters: list[Converter]
    """For each source, what turns its rows into records."""
    warnings: list[str]
    """About names that look like a mistake, and evaluation rows that cannot be compared."""

    @property
    def entries(self) -> list[str]:
        """For each source, the entry of `data` that it belongs to: a folder is one entry and several sources."""
        return [source.entry or source.name for source in self.sources]

    @property
    def splits(self) -> list[str]:
        """The splits that the sources belong to, in their order."""
        return list(dict.fromkeys(source.split for source in self.sources))

    @property
    def default_template(self) -> str:
        """`chat` if there are conversations, as it has a place for earlier turns; the template that adds nothing if
        rows have no instruction; else `alpaca`."""
        has_no_instruction = any("" in (it.directions.forward, it.directions.backward) for it in self.converters)
        has_turns = any(it.conversational for it in self.converters)
        return "chat" if has_turns else BARE_TEMPLATE if has_no_instruction else "alpaca"


def open_inputs(settings: PrepareSettings, rows: RowsInMemory | None = None) -> Inputs:
    max_row_bytes = int(settings.max_row_megabytes * 1_000_000)
    limits = Limits(max_row_bytes=max_row_bytes, max_unpacked_ratio=settings.max_unpacked_ratio)
    columns = tuple(parse_mapping(settings.map).values()) or tuple(settings.languages)
    held_out = {kind: getattr(settings, kind) for kind in HELD_OUT}
    sources = open_sources(settings.data, settings.aligned, limits, columns, held_out)
    if rows is not None:
        sources = sorted([*sources, *open_rows(rows, limits)], key=lambda source: KINDS.index(kind_of(source.split)))
    if settings.mixture is not None:
        mixed = [source.entry or source.name for source in sources if source.split == TRAIN]
        check_mixture(settings.mixture, list(dict.fromkeys(mixed)))
    evaluation = open_evaluation(settings.decontaminate, limits)
    converters, warnings = [make_converter(settings, source) for source in sources], []
    own_columns = OWN_COLUMNS | (PREFERENCE_COLUMNS if _check_of_one_kind(sources, converters) else set())
    for name in own_columns.intersection(settings.kept):
        raise UserError(
            f"keep_columns {name}: a prepared dataset has a column {name} of its own. Give yours another name: "
            f"--keep_columns my_{name}={settings.kept[name]}"
        )
    for source in sources:
        name = f"{Path(source.entry).name}/{Path(source.name).name}"
        if source.name.startswith(HUB_PREFIX):  # of its name, only a split says something
            name = source.name.removeprefix(HUB_PREFIX).partition(":")[2]
        if source.split == TRAIN and (kind := kind_in_name(name)) in HELD_OUT:
            why = f"is trained on, as --data says, and its name says {kind}. --{kind} holds it out."
            warnings.append(f"{source.name} {why}")
    inputs = Inputs(sources, evaluation, converters, warnings)
    for kind in HELD_OUT:
        if splits_of(kind, inputs.splits) and getattr(settings, f"{kind}_fraction"):
            own = next(source.name for source in sources if kind_of(source.split) == kind)
            raise UserError(
                f"{kind}_fraction holds out a part of train, and {own} is {kind} already. Drop {kind}_fraction; or, to"
                f" train on {own} as well, name it in --data itself."
            )
    return inputs


WHAT_ROWS_ARE = {None: "plain rows", "pairs": "pairs of answers", "marks": "marked answers"}


def _check_of_one_kind(sources: Sequence[Source], converters: Sequence[Converter]) -> Preferences | None:
    """What the data says of its answers. UserError where sources differ in that; a test set may be plain."""
    kinds = [
        (source, converter.format.preferences)
        for source, converter in zip(sources, converters, strict=True)
        if converter is not FORMAT_UNKNOWN
    ]
    named: dict[Preferences | None, Source] = {}
    for source, kind in kinds:
        if kind or kind_of(source.split) != KINDS[-1]:
            named.setdefault(kind, source)
    for split in {source.split for source, _ in kinds} if len(named) < 2 else ():  # and the sources of a split agree
        of_split = {kind: source for source, kind in kinds if source.split == split}
        named = of_split if len(of_split) > 1 else named
    if len(named) > 1:
        shown = " and ".join(f"{source.name} has {WHAT_ROWS_ARE[kind]}" for kind, source in named.items())
        raise UserError(
            f"{shown}, and all that is trained on is of one kind. Prepare them one by one; or name the columns to read"
            f" with --map or --format, which count for all of them."
        )
    return next(iter(named), None)


def make_stages(
    settings: PrepareSettings,
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase | None,
    template: Template,
    say: Callable[[str], Any] = print,
) -> Stages:
    """All that happens to a row. `say` is given a line for how each source is read."""
    for note in (note for source in inputs.evaluation for note in source.notes):
        say(f"Note       {note}")
    for source, converter in zip(inputs.sources, inputs.converters, strict=True):
        for note in source.notes:
            say(f"Note       {note}")
        split = f"{source.split}, " if source.split != TRAIN else ""
        how = "given" if settings.format else "recognised"
        format_name = "no row tells it" if converter is FORMAT_UNKNOWN else f"{converter.format.name}, {how}"
        say(f"Format     {source.name}: {split}{format_name}")
        if converter.is_swapped:
            side = f"its second side, which is in {converter.sides.source}, is the source"
            say(f"Note       {source.name}: {side}, as the settings say")
        if converter.format.name == "edits" and settings.backward is not None:
            say(f"Note       {source.name}: translations with corrections go forward alone; backward is not used")
    if settings.sensitive:
        secret_detectors()
    checks = tuple(_checks(settings, inputs))
    checked = tuple(source.split == TRAIN for source in inputs.sources)
    converters = tuple(_with_languages(inputs, tokenizer, template, say))
    terms = read_terms(settings.terms) if settings.terms else None
    return Stages(converters, template, tokenizer, settings, checks, checked, terms)


def _with_languages(
    inputs: Inputs, tokenizer: PreTrainedTokenizerBase | None, template: Template, say: Callable[[str], Any]
) -> Iterator[Converter]:
    """The converters, with the languages that are set in the tokenizer where the settings name none."""
    codes = codes_of(tokenizer)
    for source, converter in zip(inputs.sources, inputs.converters, strict=True):
        directions = converter.directions
        if tokenizer is not None and codes.is_around_texts:
            own, named = own_languages(tokenizer), codes.named_by(template.decoder_prefix)
            languages = directions.languages.filled_from(Languages(own.source, named or own.target))
            directions = replace(directions, languages=codes.checked(languages))
            if not converter.has_language_columns and converter.format.name != "tokenised":
                resolved(tokenizer, languages, template.decoder_prefix)
        is_known = converter.has_language_columns or (directions.languages.direction and codes.layout != "none")
        if directions.forward == directions.backward == "" and not is_known:
            raise UserError(
                f"{source.name}: forward and backward are '', and nothing else says which language is to be written. "
                f"Give --source_language and --target_language if the model has language codes, else instructions."
            )
        if directions.languages.direction and not converter.has_language_columns:
            is_both = directions.forward is not None and directions.backward is not None
            is_back = directions.backward is not None and not is_both
            first, second = directions.languages.swapped() if is_back else directions.languages
            say(f"Languages  {source.name}: {first} to {second}{' and back' if is_both else ''}")
        yield replace(converter, directions=directions)


def make_converter(settings: PrepareSettings, source: Source) -> Converter:
    """The converter for the format that is given, or that the source's first rows have."""
    rows = first_rows(source)
    if not rows:
        return Converter(named(settings.format)) if settings.format else FORMAT_UNKNOWN
    mapping = parse_mapping(settings.map)
    third = [row.fields["column 3"] for row in rows if row.fields.keys() >= {"first", "second", "column 3"}]
    if not mapping and any(third) and not all(text.startswith("CC") for text in third):  # which is no licence
        shown = ", ".join(f"'{text[:40]}'" for text in rows[0].fields.values())
        raise UserError(
            f"{source.name} has {len(rows[0].fields)} columns and no header, so that nothing says which two are the"
            f" pair; its first row is {shown}. Say it by their numbers, for example --map first=1 second=2."
        )
    given = Languages(settings.source_language or "", settings.target_language or "")
    directions = Directions(settings.forward, settings.backward, given)
    if directions.are_none:  # a shipped sample brings its own
        sample = (source.forward, source.backward)
        directions = Directions(*(sample[::-1] if is_swapped(Languages(*source.languages), given) else sample), given)
    try:
        return converter_for(
            rows,
            source.name,
            settings.format,
            mapping,
            directions,
            settings.languages,
            settings.summary_instruction,
            settings.positive_examples,
            settings.negative_examples,
            source.languages,
            settings.rated_pairs,
            settings.rated_margin,
        )
    except UserError as error:
        if source.split == TRAIN or source.name == source.entry:
            raise
        others = "To leave it out, name the files to train on themselves in --data."
        raise UserError(f"{error} By its name it is taken for {source.split}. {others}") from None


def _checks(settings: PrepareSettings, inputs: Inputs) -> Iterator[Check]:
    if settings.lengths is not None:
        yield settings.lengths
    if settings.source_languages or settings.target_languages:
        languages = tuple(settings.source_languages), tuple(settings.target_languages)
        yield LanguageFilter(*languages, settings.language_confidence)
    if settings.json_schema:
        schema = read_schema(settings.json_schema)
        if why := why_not_forced(schema):
            inputs.warnings.append(
                f"`diptych generate --json_schema` refuses {settings.json_schema}: {why}. Change it before you train."
            )
        yield SchemaFilter(json.dumps(schema))
    if inputs.evaluation:
        yield Decontaminate.from_records(_evaluation_records(settings, inputs), settings.decontaminate_ngram)


def _evaluation_records(settings: PrepareSettings, inputs: Inputs) -> Iterator[Record | PlainText]:
    for source in inputs.evaluation:
        rows = first_rows(source)
        if not rows:
            raise UserError(f"{source.name} has no row that training could be compared with.")
        converter, bad = None, []
        if not is_plain(source.name):
            both = Directions("Translate:", "Translate:")  # so that both sides of a pair are looked at
            converter = converter_for(rows, source.name, directions=both, languages=settings.languages)
        for row in source.rows():
            if converter is None and isinstance(row, Row):
                yield PlainText(row.fields["text"], row.origin)
                continue
            for result in [row] if converter is None else converter.records(row):
                if isinstance(result, Record):
                    yield result
                elif isinstance(result, Reject):
                    bad.append(result)
        if bad:
            inputs.warnings.append(
                f"training is not compared with {counted(len(bad), 'row')} of {source.name}, which cannot be read; the"
                f" first, {bad[0].origin}: {bad[0].reason}"
            )


def fatal_kinds(settings: PrepareSettings) -> tuple[str, ...]:
    """The kinds of rejects that end the run."""
    too_long = OVER_THE_LIMIT if settings.too_long == "error" else ()
    return (*too_long, LOSSY) if settings.lossy_text == "error" else too_long


def fingerprint_of(
    settings: PrepareSettings, inputs: Inputs, tokenizer: PreTrainedTokenizerBase | None, template: Template
) -> str:
    """One hash of everything that decides the result, including the code of data_prep. Inputs, template and tokenizer
    are hashed by content, so their paths do not matter."""
    no_decision = {"data", "aligned", "validation", "test", "decontaminate", "out", "template", "tokenizer", "strict"}
    no_decision |= {"workers", "engine", "tasks", "gathered", "terms", "json_schema"}
    files = {name: Path(file).read_bytes() for name in ("terms", "json_schema") if (file := getattr(settings, name))}
    start = decoder_start_of(settings.tokenizer, settings.decoder_start_token_id) if settings.packing else None
    facts = {
        "inputs": [(source.name, source.digest, source.split) for source in inputs.sources],
        "entries": inputs.entries,
        "evaluation": [(source.name, source.digest) for source in inputs.evaluation],
        "template": asdict(template),
        "tokenizer": tokenizer_digest(tokenizer) if tokenizer else None,
        "settings": {name: value for name, value in asdict(settings).items() if name not in no_decision},
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "decoder_start": start,
        "not_packed": why_not_packed(settings.tokenizer) if settings.packing else "",
        "code": code_version(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
