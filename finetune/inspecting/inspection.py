"""An input in; `inspect.html` out: what an encoder-decoder makes of it, from the text to each next token.

    diptych inspect runs/full/final --instruction 'Translate to Korean:' --input 'I am a student.'
    diptych inspect t5-small --source 'translate English to German: Good morning.' --target 'Guten Morgen.'
    diptych inspect runs/full/final --instruction … --data test.jsonl      over a file: what is left out or made up

Any AutoModelForSeq2SeqLM checkpoint, adapters too, whatever attention kernel it runs on: attention_weights.py computes
the weights anew, inspection_facts.py the figures, and inspection_page.py writes the page.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.encode import encode_sources
from diptych.data_prep.text_to_ids.languages import resolved
from diptych.data_prep.text_to_ids.templates import BARE_TEMPLATE, TEMPLATES, Template
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.commands import cli
from diptych.finetune.inference.detokenize import text_of
from diptych.finetune.inference.generation import generate_batch
from diptych.finetune.inference.prompt_files import PromptRow, read_prompts, render_prompts
from diptych.finetune.inference.prompts import Prompt, Prompter
from diptych.finetune.inference.target_tokens import given_tokens, target_ids
from diptych.finetune.inspecting import inspection_facts as facts
from diptych.finetune.inspecting.inspect_settings import InspectSettings
from diptych.finetune.inspecting.inspection_page import check_page, write_page
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, pick_device, position_limit

LONGEST_SOURCE = 512
"""Tokens; a map of more cannot be read."""


class Reader(NamedTuple):
    """What every row goes through."""

    loaded: LoadedModel
    prompter: Prompter
    max_new_tokens: int

    def given(self, languages: Languages) -> list[int]:
        return given_tokens(self.loaded, languages)

    def passage(self, source: str, languages: Languages, target: str | None = None) -> facts.Passage:
        """What the model writes to a rendered source; or, with a rendered target, how it predicts that one."""
        (source_ids,) = encode_sources(self.loaded.tokenizer, [source], languages=[languages])
        limit = min(LONGEST_SOURCE, position_limit(self.loaded.model, of_source=True) or LONGEST_SOURCE)
        if len(source_ids) > limit:
            raise UserError(f"the source has {len(source_ids)} tokens, but no more than {limit} can be shown. Cut it.")
        if target is not None:
            ((start, labels),) = target_ids(self.loaded, [target], languages)
            return facts.read_and_write(self.loaded, source_ids, [start, *labels], 1 + len(labels))
        given = self.given(languages)
        (output,) = generate_batch(self.loaded, [source_ids], self.max_new_tokens, {}, [given])
        if not output.ids:
            raise UserError("the model writes nothing within max_new_tokens, so there is no step to show. Raise it.")
        return facts.read_and_write(self.loaded, source_ids, [*given, *output.ids], len(given))

    def text(self, passage: facts.Passage) -> str:
        return text_of(self.loaded.tokenizer, passage.decoder_ids[1:])


def run(settings: InspectSettings) -> int:
    out = Path(settings.out)
    check_page(out)
    rows = read_prompts(settings.data, "", "")[: settings.rows] if settings.data else []
    loaded = load_checkpoint(settings.model, settings.dtype, pick_device(settings.device), template=settings.template)
    loaded = replace(loaded, template=_template(settings, loaded))
    chosen = Languages(settings.source_language, settings.target_language)
    prompter = Prompter(loaded.tokenizer, loaded.template, None, chosen)
    reader = Reader(loaded, prompter, settings.max_new_tokens)
    target = settings.target or None
    if settings.source:
        source = settings.source
        languages = resolved(loaded.tokenizer, chosen, loaded.template.decoder_prefix)
    else:
        source, languages = prompter.render(Prompt(settings.instruction, settings.input, system=settings.system))
        target = target and loaded.template.render_target(target)
    found = _facts(settings, reader, source, languages, target)
    if rows:
        found["data"] = survey(reader, rows, settings.data)
    write_page(out, found)
    print(found["answer"])
    print(f"{out}: {len(found['source'])} source tokens, {len(found['steps'])} steps. Open it in a browser.")
    return 0


def _template(settings: InspectSettings, loaded: LoadedModel) -> Template:
    """The one that is loaded; a source that is read as it is needs none."""
    if loaded.template:
        return loaded.template
    if loaded.language_codes.tokens:
        return TEMPLATES[BARE_TEMPLATE]
    if settings.source and not settings.data:
        return Template(name="none", source="")
    raise UserError(
        f"the tokenizer of {settings.model} carries no template, so it is not known how an instruction is put. "
        f"Give --template ({', '.join(TEMPLATES)}, or a Jinja file), or --source, which is read as it is."
    )


def _facts(
    settings: InspectSettings, reader: Reader, source: str, languages: Languages, target: str | None
) -> dict[str, Any]:
    loaded, passage = reader.loaded, reader.passage(source, languages)
    found = {
        "name": Path(settings.model).name,
        "model": _about(loaded),
        "asked": {"instruction": settings.instruction, "input": settings.input, "system": settings.system},
        "template": None if settings.source else loaded.template.name,
        "source_text": str(source),
        "answer": reader.text(passage),
        "source": facts.chips(source_side(loaded.tokenizer), passage.source_ids),
        "decoder": facts.chips(target_side(loaded.tokenizer), passage.decoder_ids),
        "given": passage.given,
        "embeddings": facts.embeddings(loaded, passage.source_ids),
        "attention": facts.attention_maps(passage),
        "unread": facts.unread(loaded, passage),
        "steps": facts.steps(loaded, passage),
        "lens": facts.lens(loaded, passage),
    }
    if target is not None:
        found["target"] = _teacher_forced(reader, source, languages, target)
    return found


def _about(loaded: LoadedModel) -> dict[str, Any]:
    model = loaded.model
    vocabulary, width = model.get_input_embeddings().weight.shape
    return {
        "type": model.config.model_type,
        "weights": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "width": width,
        "vocabulary": vocabulary,
        "is_merged": model.config.model_type == "diptych" and model.config.decoder.cross_attention == "merged",
    }


def _teacher_forced(reader: Reader, source: str, languages: Languages, target: str) -> dict[str, Any]:
    """The loss of each target token, and the first place where the model would have written another one."""
    steps = facts.steps(reader.loaded, reader.passage(source, languages, target))
    forced = len(reader.given(languages)) - 1
    astray = next((place for place, step in enumerate(steps) if step["rank"] > 1 and place >= forced), None)
    return {"text": str(target), "steps": steps, "loss": _mean_loss(steps), "astray": astray}


def _mean_loss(steps: Sequence[dict[str, Any]]) -> float:
    return sum(step["loss"] for step in steps) / len(steps)


def survey(reader: Reader, rows: Sequence[PromptRow], name: str) -> dict[str, Any]:
    """Over a file's rows: what their outputs left unread, and which tokens looked at nothing. A row that has an
    `output` is read with it as target, others with what the model writes. Rows that are no prompts are counted."""
    loaded = reader.loaded
    judged, prompts = render_prompts(list(rows), reader.prompter)
    found, skipped = [], len(judged) - len(prompts)
    for place, (source, languages) in tqdm(prompts.items(), desc="inspect", unit="rows"):
        output = judged[place].fields.get("output")
        target = loaded.template.render_target(output) if isinstance(output, str) and output.strip() else None
        try:
            passage = reader.passage(source, languages, target)
        except UserError:  # longer than can be shown
            skipped += 1
            continue
        unread = facts.unread(loaded, passage)
        source_chips = facts.chips(source_side(loaded.tokenizer), passage.source_ids)
        target_chips = facts.chips(target_side(loaded.tokenizer), passage.decoder_ids[1:])
        found.append(
            {
                "row": place + 1,
                "is_given": target is not None,
                "source": [chip["text"] for chip in source_chips],
                "target": [chip["text"] for chip in target_chips],
                "unread": unread,
                "left": _left_words(unread) / max(1, unread["words"]),
                "made_up": len(unread["target"]) / max(1, unread["steps"]),
                "loss": _mean_loss(facts.steps(loaded, passage)),
            }
        )
    if not found:
        raise UserError(f"{name} has no row that could be read within {LONGEST_SOURCE} tokens. Give another --data.")
    found.sort(key=lambda row: (-row["left"] - row["made_up"], row["row"]))
    return {
        "name": Path(name).name,
        "rows": found,
        "skipped": skipped,
        "left_words": sum(_left_words(row["unread"]) for row in found),
        "made_up_tokens": sum(len(row["unread"]["target"]) for row in found),
    }


def _left_words(unread: dict[str, Any]) -> int:
    return sum(last - first + 1 for first, last in unread["source"])


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("inspect", argv)


if __name__ == "__main__":
    raise SystemExit(main())
