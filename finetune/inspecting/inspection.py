"""An input in; `inspect.html` out: what an encoder-decoder makes of it, from the text to each next token.

    diptych inspect runs/full/final --instruction 'Translate to Korean:' --input 'I am a student.'
    diptych inspect t5-small --source 'translate English to German: Good morning.' --target 'Guten Morgen.'
    diptych inspect runs/full/final --instruction … --data test.jsonl      over a file: what is left out or made up

Any AutoModelForSeq2SeqLM checkpoint, adapters too, whatever attention kernel it runs on: attention_weights.py computes
the weights anew, and inspection_facts.py the figures. The page loads nothing and runs no script but its own. Texts of
prompts and vocabularies are escaped, and the script, whose hash is in the page's Content-Security-Policy, writes them
as text only. Without scripts, and on paper, everything but the maps is there.
"""

import base64
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from tqdm import tqdm

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.report.visible_text import TEMPLATES as SHARED_TEMPLATES
from diptych.data_prep.report.visible_text import prose
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.encode import encode_sources
from diptych.data_prep.text_to_ids.languages import resolved
from diptych.data_prep.text_to_ids.templates import BARE_TEMPLATE, TEMPLATES, Template
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.generating.prompt_files import PromptRow, read_prompts, render_prompts
from diptych.finetune.inference.generation import generate_batch
from diptych.finetune.inference.prompts import Prompt, Prompter
from diptych.finetune.inference.target_tokens import given_tokens, target_ids, text_of
from diptych.finetune.inspecting import inspection_facts as facts
from diptych.finetune.inspecting.inspect_settings import InspectSettings
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, pick_device, position_limit
from diptych.finetune.run_files.atomic_folders import write_text

PAGE = Path(__file__).parent / "templates"
MARK = '<meta name="generator" content="diptych inspect">'
"""In every page of ours, so that no other file is overwritten."""
WORST_ROWS = 12
LONGEST_SOURCE = 512
"""Tokens; a map of more cannot be read."""


class Reader(NamedTuple):
    """What every row goes through."""

    loaded: LoadedModel
    prompter: Prompter
    max_new_tokens: int

    def passage(self, source: str, languages: Languages, target: str | None = None) -> facts.Passage:
        """What the model writes to a rendered source; or, with a rendered target, how it predicts that one."""
        (source_ids,) = encode_sources(self.loaded.tokenizer, [source], languages=[languages])
        limit = min(LONGEST_SOURCE, position_limit(self.loaded.model, of_source=True) or LONGEST_SOURCE)
        self._check_length("source", source_ids, limit)
        positions = position_limit(self.loaded.model)
        if target is not None:
            ((start, labels),) = target_ids(self.loaded, [target], languages)
            self._check_length("target", labels, positions or len(labels))
            return facts.read_and_write(self.loaded, source_ids, [start, *labels], 1 + len(labels))
        given = given_tokens(self.loaded, languages)
        most = min(self.max_new_tokens, positions - len(given) + 1) if positions else self.max_new_tokens
        (output,) = generate_batch(self.loaded, [source_ids], most, {}, [given])
        if not output.ids:
            raise UserError("the model writes nothing within max_new_tokens, so there is no step to show. Raise it.")
        return facts.read_and_write(self.loaded, source_ids, [*given, *output.ids], len(given))

    def _check_length(self, side: str, ids: Sequence[int], limit: int) -> None:
        if len(ids) > limit:
            raise UserError(f"the {side} has {len(ids)} tokens, but no more than {limit} can be shown. Cut it.")

    def text(self, passage: facts.Passage) -> str:
        return text_of(self.loaded.tokenizer, passage.decoder_ids[1:])


def run(settings: InspectSettings) -> int:
    out = Path(settings.out).expanduser()
    if out.is_dir():
        raise UserError(f"--out {out} is a folder. Name a file in it, {out / 'inspect.html'}.")
    if out.is_file() and MARK not in out.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UserError(f"--out {out} exists and is no page of `diptych inspect`. Name another file.")
    rows = read_prompts(settings.data, "", "")[: settings.rows] if settings.data else []
    loaded = load_checkpoint(settings.model, settings.dtype, pick_device(settings.device), template=settings.template)
    if loaded.template is None and loaded.language_codes.tokens:
        loaded = replace(loaded, template=TEMPLATES[BARE_TEMPLATE])
    elif loaded.template is None and settings.source and not settings.data:  # it is read as it is
        loaded = replace(loaded, template=Template(name="none", source=""))
    elif loaded.template is None:
        raise UserError(
            f"the tokenizer of {settings.model} carries no template, so it is not known how an instruction is put. "
            f"Give --template ({', '.join(TEMPLATES)}, or a Jinja file), or --source, which is read as it is."
        )
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
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render_page(found))
    print(found["answer"])
    print(f"{out}: {len(found['source'])} source tokens, {len(found['steps'])} steps. Open it in a browser.")
    return 0


def _facts(
    settings: InspectSettings, reader: Reader, source: str, languages: Languages, target: str | None
) -> dict[str, Any]:
    loaded, passage = reader.loaded, reader.passage(source, languages)
    model = loaded.model
    vocabulary, width = model.get_input_embeddings().weight.shape
    found = {
        "name": Path(settings.model).name,
        "model": {
            "type": model.config.model_type,
            "weights": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "width": width,
            "vocabulary": vocabulary,
            "is_merged": model.config.model_type == "diptych" and model.config.decoder.cross_attention == "merged",
        },
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
        steps, forced = facts.steps(loaded, reader.passage(source, languages, target)), passage.given - 1
        # the first place where the model would have written another token
        astray = next((place for place, step in enumerate(steps) if step["rank"] > 1 and place >= forced), None)
        found["target"] = {"text": str(target), "steps": steps, "loss": _mean_loss(steps), "astray": astray}
    return found


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
        left_words = sum(last - first + 1 for first, last in unread["source"])
        source_chips = facts.chips(source_side(loaded.tokenizer), passage.source_ids)
        target_chips = facts.chips(target_side(loaded.tokenizer), passage.decoder_ids[1:])
        found.append(
            {
                "row": place + 1,
                "is_given": target is not None,
                "source": [chip["text"] for chip in source_chips],
                "target": [chip["text"] for chip in target_chips],
                "unread": unread,
                "left_words": left_words,
                "left": left_words / max(1, unread["words"]),
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
        "left_words": sum(row["left_words"] for row in found),
        "made_up_tokens": sum(len(row["unread"]["target"]) for row in found),
    }


def render_page(facts: Mapping[str, Any]) -> str:
    script = (PAGE / "inspection.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = ("source", "decoder", "steps", "lens", "attention", "embeddings", "unread", "given")
    return (
        _environment()
        .get_template("inspection.html.jinja")
        .render(
            **facts | {"facts": facts, "mark": Markup(MARK), "worst_rows": WORST_ROWS},
            script=Markup(script),
            script_hash=digest,
            payload=_as_json({name: facts[name] for name in shown}),
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([PAGE, SHARED_TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"prose": prose, "percent": _percent, "log_of": math.log}
    return environment


def _percent(share: float) -> str:
    """0.9612 → "96.1 %"; a small share is not shown as 0."""
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def _as_json(facts: Mapping[str, Any]) -> Markup:
    """For a script element, which ends at `</script` wherever that stands."""
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
