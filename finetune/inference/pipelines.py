"""transformers' pipelines for text to text, which version 5 has left out, for every AutoModelForSeq2SeqLM.

    from diptych.finetune.inference.pipelines import register_pipelines
    from transformers import pipeline

    register_pipelines()
    write = pipeline("text2text-generation", model="runs/full/final")
    write({"instruction": "Name the capital.", "input": "France"})     [{"generated_text": "Paris"}]
    pipeline("translation", model="nllb")("Good morning.", src_lang="eng_Latn", tgt_lang="kor_Hang")
    pipeline("summarization", model="bart")(texts, batch_size=8)       [{"summary_text": "…"}, …]

An input is a text, a row of instruction or input (and history, system, languages), or a list of messages. What the
checkpoint's own template makes of it is read, by data_prep's code, as in training; where no template travels with the
tokenizer, a text is read as it is. Greedy, and what `diptych generate` writes, unless told otherwise; generate_outputs
does the work, so that rows are batched by length and come back in order.
"""

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers.pipelines
from transformers import AutoModelForSeq2SeqLM, Pipeline, PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY

import diptych.modeling
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.conversations import Fault
from diptych.data_prep.rows.language_names import SOURCE_COLUMNS, TARGET_COLUMNS, languages_in
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.languages import codes_of, own_languages, resolved
from diptych.data_prep.text_to_ids.templates import Template, carried_template, stored_golden
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.inference.generation_config import DEFAULT_NEW_TOKENS
from diptych.finetune.inference.outputs import Output
from diptych.finetune.inference.prompts import Prompter, prompt_of, template_for
from diptych.finetune.inference.targets import given_tokens
from diptych.finetune.model.loading import position_limit
from diptych.modeling.pipeline_diptych import DiptychPipeline

NO_LANGUAGES = Languages()
STREAMED_BATCHES = 4
"""Of an iterator so many batches are taken at once, for the sake of batches of like lengths."""


class Text2TextPipeline(Pipeline):
    """`pipe(inputs, batch_size=1, max_new_tokens=256, template=None, src_lang=None, tgt_lang=None, **generate)`;
    `source_language` and `target_language` are the same two, also in rows.

    One input gives a list of dicts, one for each of `num_return_sequences`; a list gives a list of dicts, or of lists
    of them; an iterator or a dataset of inputs is answered by an iterator. `streamer` (transformers') gets the tokens
    of a single input as they come.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    task_name = "text2text-generation"
    output_key = "generated_text"

    def _sanitize_parameters(self, batch_size=None, template=None, **generate):
        named = {name: generate.pop(name) for name in (*SOURCE_COLUMNS, *TARGET_COLUMNS) if name in generate}
        reading = {"template": template, "languages": languages_in(named) if named else None}
        if batch_size is not None:
            generate["batch_size"] = batch_size
        return {name: value for name, value in reading.items() if value is not None}, generate, {}

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        reading, generating, _ = self._sanitize_parameters(**settings)
        reading, generating = self._preprocess_params | reading, self._forward_params | generating
        frame = self._template(reading.get("template"))
        if isinstance(inputs, str | Mapping) or _is_conversation(inputs):
            (outputs,) = self._forward([self.preprocess(inputs, **reading)], **generating, template=frame)
            return self.postprocess(outputs)
        if isinstance(inputs, list | tuple):
            sources = [self.preprocess(it, **reading) for it in inputs]
            return [_single(self.postprocess(it)) for it in self._forward(sources, **generating, template=frame)]
        return self._answers(_rows(inputs), reading, generating)

    def _answers(self, inputs: Iterator[Any], reading: dict, generating: dict) -> Iterator[Any]:
        size = STREAMED_BATCHES * generating.get("batch_size", 1)
        while some := list(itertools.islice(inputs, size)):
            yield from self(some, **reading, **generating)

    def preprocess(
        self, inputs: Any, template: str | None = None, languages: Languages = NO_LANGUAGES
    ) -> tuple[list[int], list[int]]:
        """One input → the token ids of its source, and those that the decoder is given first.

        Raises:
            ValueError: it is none, or the template has no place for what it has.
        """
        frame = self._template(template)
        try:
            if frame is None:
                text = self._bare_text(inputs, languages)
                languages = resolved(self.tokenizer, languages)
            else:
                row = {"instruction": inputs} if isinstance(inputs, str) else inputs
                prompt = prompt_of({"messages": row} if isinstance(row, list | tuple) else row)
                text, languages = Prompter(self.tokenizer, frame, None, languages).render(prompt)
            prompter = Prompter(self.tokenizer, frame, position_limit(self.model, of_source=True))
            (ids,), (is_cut,) = prompter.encode([text], [languages])
        except (UserError, Fault) as error:
            raise ValueError(f"an input of the pipeline cannot be read: {error}") from None
        if is_cut:
            warnings.warn(f"an input was cut to {len(ids)} tokens, for which the model was built.", stacklevel=2)
        return ids, given_tokens(self.model, self.tokenizer, frame, languages)

    def _template(self, name: str | None) -> Template | None:
        if name or codes_of(self.tokenizer).tokens:
            return template_for(name or "", self.tokenizer)
        return carried_template(self.tokenizer)

    def _bare_text(self, inputs: Any, languages: Languages) -> str:
        """A text as it is, after the words that a T5 checkpoint's config says its task begins with."""
        if not isinstance(inputs, str):
            raise UserError("the tokenizer carries no template for rows and messages: give texts, or a template")
        tasks = getattr(self.model.config, "task_specific_params", None) or {}
        source, target = languages
        name = f"{self.task_name}_{source}_to_{target}" if source and target else self.task_name
        if name not in tasks and (words := codes_of(self.tokenizer).instruction("", languages)):
            return f"{words} {inputs}"
        return tasks.get(name, {}).get("prefix", "") + inputs

    def _forward(
        self,
        sources: list[tuple[list[int], list[int]]],
        template: Template | None,
        batch_size: int = 1,
        **settings: Any,
    ) -> list[list[Output]]:
        """Source ids, and what the decoder is given first → for each the outputs."""
        limit = position_limit(self.model) or DEFAULT_NEW_TOKENS
        most = settings.pop("max_new_tokens", min(DEFAULT_NEW_TOKENS, limit))
        outputs = generate_outputs(
            self.model,
            self.tokenizer,
            [ids for ids, _ in sources],
            given=[given for _, given in sources],
            batch_size=batch_size,
            max_new_tokens=most,
            template=template,
            **settings,
        )
        each = settings.get("num_return_sequences", 1)
        return [outputs[place : place + each] for place in range(0, len(outputs), each)]

    def postprocess(self, outputs: list[Output]) -> list[dict[str, str]]:
        return [{self.output_key: output.text} for output in outputs]


class TranslationPipeline(Text2TextPipeline):
    """With `src_lang` and `tgt_lang` for models of several languages."""

    task_name = "translation"
    output_key = "translation_text"


class SummarizationPipeline(Text2TextPipeline):
    task_name = "summarization"
    output_key = "summary_text"


def _single(found: list[dict[str, str]]) -> Any:
    return found[0] if len(found) == 1 else found


def _is_conversation(inputs: Any) -> bool:
    return (
        isinstance(inputs, list | tuple)
        and bool(inputs)
        and all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in inputs)
    )


def _rows(inputs: Any) -> Iterator[Any]:
    """What is given one after another: a generator, a dataset, one column of it."""
    try:
        return iter(inputs)
    except TypeError:
        raise ValueError(
            f"a pipeline reads texts, rows, messages, or several of them, and was given a {type(inputs)}."
        ) from None


def register_pipelines() -> None:
    """Makes `pipeline("text2text-generation")`, "translation" and "summarization" known to transformers."""
    for kind in PIPELINES:
        # `pipeline` refuses, before it looks into its registry, what is listed here.
        transformers.pipelines.REMOVED_TASKS.pop(kind.task_name, None)
        if PIPELINE_REGISTRY.supported_tasks.get(kind.task_name, {}).get("impl") is not kind:
            PIPELINE_REGISTRY.register_pipeline(
                kind.task_name, pipeline_class=kind, pt_model=AutoModelForSeq2SeqLM, type="text"
            )


def travelling_pipeline(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], bytes]:
    """What a checkpoint needs to bring a pipeline of its own: its config with an entry more, and the code, a file that
    is called TRAVELLING_CODE (modeling/pipeline_diptych.py).

    Raises:
        UserError: no template travels with the tokenizer, or the code does not read and write as data_prep does.
    """
    template = carried_template(tokenizer)
    if template is None:
        raise UserError("the tokenizer carries no template, by which a pipeline of its own would read. Attach one.")
    sides = source_side(tokenizer), target_side(tokenizer)
    if len({tuple(side.all_special_ids) for side in sides}) > 1:
        raise UserError(
            "no pipeline can travel with this tokenizer: its control tokens have other ids in the target's vocabulary "
            "than in the source's, and transformers leaves out words of targets in their place."
        )
    reader = DiptychPipeline.__new__(DiptychPipeline)
    reader.tokenizer = tokenizer
    is_proven, own = False, own_languages(tokenizer)
    own = {"target_language": own.target or own.source} if any(own) else {}
    for example in stored_golden(tokenizer):
        with contextlib.suppress(ValueError):  # a row that spells control tokens, which this one refuses
            found = reader.preprocess(example["fields"], **own)["input_ids"][0].tolist()
            if found != [token for part in example["input_ids"] for token in part]:
                raise UserError(f"template '{template.name}' cannot travel: {TRAVELLING_CODE} renders it otherwise.")
            is_proven = True
    if not is_proven:
        raise UserError(f"template '{template.name}' cannot travel: {TRAVELLING_CODE} renders none of its examples.")
    code = Path(diptych.modeling.__file__).with_name(TRAVELLING_CODE).read_bytes()
    return dict(config) | {"custom_pipelines": TRAVELLING_ENTRY}, code


TRAVELLING_CODE = "pipeline_diptych.py"
TRAVELLING_ENTRY = {
    "text2text-generation": {
        "impl": "pipeline_diptych.DiptychPipeline",
        "pt": ["AutoModelForSeq2SeqLM"],
        "type": "text",
    }
}
PIPELINES = (Text2TextPipeline, TranslationPipeline, SummarizationPipeline)
