"""An input in; `inspect.html` out: what an encoder-decoder makes of it, from the text to each next token.

    diptych inspect runs/full/final --instruction 'Translate to Korean:' --input 'I am a student.'
    diptych inspect t5-small --source 'translate English to German: Good morning.' --target 'Guten Morgen.'
    diptych inspect runs/full/final --instruction … --data test.jsonl       and over a file: what is left out, made up

Any AutoModelForSeq2SeqLM checkpoint, adapters too, whatever attention it runs on: the weights of attention are
computed anew for the page (attentions.py), the figures are inspection_facts.py's, the page inspection_page.py's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.encode import encode_sources
from diptych.data_prep.text_to_ids.languages import codes_of, resolved
from diptych.data_prep.text_to_ids.templates import BARE_TEMPLATE, TEMPLATES, Template, carried_template, load_template
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.commands import cli
from diptych.finetune.inference.detokenize import text_of
from diptych.finetune.inference.generation import generate_batch
from diptych.finetune.inference.prompt_files import PromptRow, read_prompts, render_prompts
from diptych.finetune.inference.prompts import Prompt, Prompter
from diptych.finetune.inference.targets import given_tokens, target_ids
from diptych.finetune.inspecting import inspection_facts as facts
from diptych.finetune.inspecting.inspect_settings import InspectSettings
from diptych.finetune.inspecting.inspection_page import check_page, write_page
from diptych.finetune.model.loading import load_checkpoint, pick_device, position_limit

WORDS = ("man", "woman", "king", "queen", "prince", "princess", "boy", "girl", "father", "mother")
LONGEST_SOURCE = 512
"""Tokens; a map of more cannot be read."""


class Reader(NamedTuple):
    """What every row goes through."""

    model: PreTrainedModel
    prompter: Prompter
    max_new_tokens: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.prompter.tokenizer

    @property
    def template(self) -> Template:
        return self.prompter.template

    def given(self, languages: Languages) -> list[int]:
        return given_tokens(self.model, self.tokenizer, self.template, languages)

    def passage(self, source: str, languages: Languages, target: str | None = None) -> facts.Passage:
        """What the model writes to a rendered source; or what it makes of a rendered target, which it is given."""
        (source_ids,) = encode_sources(self.tokenizer, [source], languages=[languages])
        limit = min(LONGEST_SOURCE, position_limit(self.model, of_source=True) or LONGEST_SOURCE)
        if len(source_ids) > limit:
            raise UserError(f"the source has {len(source_ids)} tokens, but no more than {limit} can be shown. Cut it.")
        if target is None:
            given = self.given(languages)
            decoder_ids = [*given, *self._written(source_ids, given)]
            return facts.read_and_write(self.model, source_ids, decoder_ids, len(given))
        ((start, labels),) = target_ids(self.model, self.tokenizer, [target], self.template, languages)
        decoder_ids = [start, *labels]
        return facts.read_and_write(self.model, source_ids, decoder_ids, len(decoder_ids))

    def _written(self, source_ids: list[int], given: list[int]) -> tuple[int, ...]:
        """What `diptych generate` would write, end included."""
        (output,), _ = generate_batch(
            self.model, self.tokenizer, [source_ids], self.max_new_tokens, self.template, {}, [given]
        )
        if not output.ids:
            raise UserError("the model writes nothing within max_new_tokens, so there is no step to show. Raise it.")
        return output.ids

    def text(self, passage: facts.Passage) -> str:
        return text_of(self.tokenizer, passage.decoder_ids[1:])


def run(settings: InspectSettings) -> int:
    check_page(Path(settings.out))
    rows = read_prompts(settings.data, "", "")[: settings.rows] if settings.data else []
    loaded = load_checkpoint(settings.model, settings.dtype, pick_device(settings.device), template=settings.template)
    model, tokenizer = loaded.model, loaded.tokenizer
    template = _template(settings, tokenizer)
    chosen = Languages(settings.source_language, settings.target_language)
    reader = Reader(model, Prompter(tokenizer, template, None, chosen), settings.max_new_tokens)
    source, target = settings.source, settings.target or None
    if source:
        languages = resolved(tokenizer, chosen, template.decoder_prefix)
    else:
        source, languages = reader.prompter.render(
            Prompt(settings.instruction, settings.input, system=settings.system)
        )
        target = None if target is None else template.render_target(target)
    found = _facts(settings, reader, source, languages, target)
    if rows:
        found["data"] = survey(reader, rows, settings.data)
    write_page(Path(settings.out), found)
    print(found["answer"])
    print(f"{settings.out}: {len(found['source'])} source tokens, {len(found['steps'])} steps. Open it in a browser.")
    return 0


def _template(settings: InspectSettings, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Given, or the tokenizer's own; a source that is read as it is needs none."""
    if settings.template:
        return load_template(settings.template)
    own = carried_template(tokenizer)
    if own is None and codes_of(tokenizer).tokens:
        return TEMPLATES[BARE_TEMPLATE]
    if own is None and (not settings.source or settings.data):
        raise UserError(
            f"the tokenizer of {settings.model} carries no template, so it is not known how an instruction is put. "
            f"Give --template ({', '.join(TEMPLATES)}, or a Jinja file), or --source, which is read as it is."
        )
    return own or Template(name="none", source="")


def _facts(
    settings: InspectSettings, reader: Reader, source: str, languages: Languages, target: str | None
) -> dict[str, Any]:
    model, tokenizer = reader.model, reader.tokenizer
    passage = reader.passage(source, languages)
    found = {
        "name": Path(settings.model).name,
        "model": _about(model),
        "asked": {"instruction": settings.instruction, "input": settings.input, "system": settings.system},
        "template": None if settings.source else reader.template.name,
        "source_text": str(source),
        "answer": reader.text(passage),
        "source": facts.chips(source_side(tokenizer), passage.source_ids),
        "decoder": facts.chips(target_side(tokenizer), passage.decoder_ids),
        "given": passage.given,
        "embeddings": facts.embeddings(model, tokenizer, passage.source_ids),
        "words": facts.word_map(model, tokenizer, settings.words),
        "attention": facts.attention_maps(passage),
        "unread": facts.unread(passage, tokenizer),
        "steps": facts.steps(model, tokenizer, passage),
        "lens": facts.lens(model, tokenizer, passage),
    }
    if target is not None:
        found["target"] = _teacher_forced(reader, source, languages, target)
    return found


def _about(model: PreTrainedModel) -> dict[str, Any]:
    is_merged = model.config.model_type == "diptych" and model.config.decoder.cross_attention == "merged"
    return {
        "type": model.config.model_type,
        "weights": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "width": model.get_input_embeddings().weight.shape[1],
        "vocabulary": model.get_input_embeddings().weight.shape[0],
        "is_merged": is_merged,
    }


def _teacher_forced(reader: Reader, source: str, languages: Languages, target: str) -> dict[str, Any]:
    """What each token of the target costs, and the first place where the model would have written another."""
    passage = reader.passage(source, languages, target)
    steps = facts.steps(reader.model, reader.tokenizer, passage)
    forced = len(reader.given(languages)) - 1
    astray = next((place for place, step in enumerate(steps) if step["rank"] > 1 and place >= forced), None)
    losses = [step["loss"] for step in steps]
    return {"text": str(target), "steps": steps, "loss": sum(losses) / len(losses), "astray": astray}


def survey(reader: Reader, rows: Sequence[PromptRow], name: str) -> dict[str, Any]:
    """Over a file's rows: what their outputs left unread, and which tokens looked at nothing. A row that has an
    `output` is read with it as target, others with what the model writes. Rows that are no prompts are counted."""
    judged, prompts = render_prompts(list(rows), reader.prompter)
    found, skipped = [], len(judged) - len(prompts)
    for place, (source, languages) in tqdm(prompts.items(), desc="inspect", unit="rows"):
        output = judged[place].fields.get("output")
        target = reader.template.render_target(output) if isinstance(output, str) and output.strip() else None
        try:
            passage = reader.passage(source, languages, target)
        except UserError:  # longer than can be shown
            skipped += 1
            continue
        unread = facts.unread(passage, reader.tokenizer)
        source_chips = facts.chips(source_side(reader.tokenizer), passage.source_ids)
        target_chips = facts.chips(target_side(reader.tokenizer), passage.decoder_ids[1:])
        left = sum(last - first + 1 for first, last in unread["source"])
        losses = [step["loss"] for step in facts.steps(reader.model, reader.tokenizer, passage)]
        found.append(
            {
                "row": place + 1,
                "is_given": target is not None,
                "source": [chip["text"] for chip in source_chips],
                "target": [chip["text"] for chip in target_chips],
                "unread": unread,
                "left": left / max(1, unread["words"]),
                "made_up": len(unread["target"]) / max(1, unread["steps"]),
                "loss": sum(losses) / len(losses),
            }
        )
    if not found:
        raise UserError(f"{name} has no row that could be read within {LONGEST_SOURCE} tokens. Give another --data.")
    found.sort(key=lambda row: (-row["left"] - row["made_up"], row["row"]))
    left = sum(last - first + 1 for row in found for first, last in row["unread"]["source"])
    made_up = sum(len(row["unread"]["target"]) for row in found)
    return {
        "name": Path(name).name,
        "rows": found,
        "skipped": skipped,
        "left_words": left,
        "made_up_tokens": made_up,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("inspect", argv)


if __name__ == "__main__":
    raise SystemExit(main())
