"""transformers' text-to-text pipelines, which version 5 removed, for every AutoModelForSeq2SeqLM.

    from diptych.finetune.inference.pipelines import register_pipelines
    from transformers import pipeline

    register_pipelines()
    write = pipeline("text2text-generation", model="runs/full/final")
    write({"instruction": "Name the capital.", "input": "France"})     [{"generated_text": "Paris"}]
    pipeline("translation", model="nllb")("Good morning.", src_lang="eng_Latn", tgt_lang="kor_Hang")
    pipeline("summarization", model="bart")(texts, batch_size=8)       [{"summary_text": "…"}, …]

An input is a text, a row of instruction or input (and history, system, languages), or a list of messages. It is
rendered with the checkpoint's own template by the code that made the training rows; without a template a text is read
as it is. Outputs are those of `diptych generate`, greedy by default.
"""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers.pipelines
from transformers import AutoModelForSeq2SeqLM, Pipeline, PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.conversations import Fault
from diptych.data_prep.rows.language_names import SOURCE_COLUMNS, TARGET_COLUMNS, languages_in
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids import template_sandbox
from diptych.data_prep.text_to_ids.languages import codes_of, own_languages, resolved
from diptych.data_prep.text_to_ids.templates import carried_template, stored_golden
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.inference import pipeline_diptych
from diptych.finetune.inference.constraints import grammar_of
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.inference.generation_config import DEFAULT_NEW_TOKENS
from diptych.finetune.inference.outputs import Output
from diptych.finetune.inference.pipeline_diptych import DiptychPipeline
from diptych.finetune.inference.prompts import Prompter, prompt_of, template_for
from diptych.finetune.inference.target_tokens import given_tokens
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import position_limit

NO_LANGUAGES = Languages()
TRAVELLING_CODE = "pipeline_diptych.py"
SANDBOX_IMPORT = "from diptych.data_prep.text_to_ids.template_sandbox import LimitedEnvironment, start_budget\n"
TRAVELLING_ENTRY = {
    "text2text-generation": {
        "impl": "pipeline_diptych.DiptychPipeline",
        "pt": ["AutoModelForSeq2SeqLM"],
        "type": "text",
    }
}


class Text2TextPipeline(Pipeline):
    """`pipe(inputs, batch_size=1, max_new_tokens=256, template=None, src_lang=None, tgt_lang=None, **generate)`;
    `source_language` and `target_language` are other names of the same two, also in rows. `json_schema` (a dict) or
    `regex` is the form that every output has.

    One input gives a list of dicts, one for each of `num_return_sequences`. Several inputs (a list, an iterator, a
    dataset) give a list of dicts, or of lists of them. `streamer` (of transformers) gets the tokens of a single input.
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
        name, tokenizer = reading.pop("template", None) or "", self.tokenizer
        template = template_for(name, tokenizer) if name or codes_of(tokenizer).tokens else None
        loaded = LoadedModel.of(self.model, tokenizer, template)
        is_single = isinstance(inputs, str | Mapping)
        if isinstance(inputs, list | tuple) and inputs:  # a conversation is one input
            is_single = all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in inputs)
        try:
            rows = [inputs] if is_single else list(inputs)
        except TypeError:
            raise ValueError(
                f"a pipeline reads texts, rows, messages, or several of them, and was given a {type(inputs)}."
            ) from None
        sources = [self.preprocess(row, loaded, **reading) for row in rows]
        found = [self.postprocess(outputs) for outputs in self._forward(sources, loaded, **generating)]
        if is_single:
            return found[0]
        return [outputs[0] if len(outputs) == 1 else outputs for outputs in found]

    def preprocess(
        self, inputs: Any, loaded: LoadedModel, languages: Languages = NO_LANGUAGES
    ) -> tuple[list[int], list[int]]:
        """One input -> the token ids of its source, and the decoder's forced tokens. ValueError where the input is no
        prompt, or the template has no place for a field."""
        prompter = Prompter(self.tokenizer, loaded.template, position_limit(self.model, of_source=True), languages)
        try:
            if loaded.template is None:
                text, languages = self._bare_text(inputs, languages), resolved(self.tokenizer, languages)
            else:
                row = {"instruction": inputs} if isinstance(inputs, str) else inputs
                row = {"messages": row} if isinstance(row, list | tuple) else row
                text, languages = prompter.render(prompt_of(row))
            (ids,), (is_cut,) = prompter.encode([text], [languages])
        except (UserError, Fault) as error:
            raise ValueError(f"an input of the pipeline cannot be read: {error}") from None
        if is_cut:
            warnings.warn(f"an input was cut to {len(ids)} tokens, for which the model was built.", stacklevel=2)
        return ids, given_tokens(loaded, languages)

    def _bare_text(self, inputs: Any, languages: Languages) -> str:
        """A text as it is, after the prefix that a T5 checkpoint's config has for this task."""
        if not isinstance(inputs, str):
            raise UserError("the tokenizer carries no template for rows and messages: give texts, or a template")
        tasks = getattr(self.model.config, "task_specific_params", None) or {}
        source, target = languages
        name = f"{self.task_name}_{source}_to_{target}" if source and target else self.task_name
        if name not in tasks and (words := codes_of(self.tokenizer).instruction("", languages)):
            return f"{words} {inputs}"
        return tasks.get(name, {}).get("prefix", "") + inputs

    def _forward(
        self, sources: list[tuple[list[int], list[int]]], loaded: LoadedModel, batch_size: int = 1, **settings: Any
    ) -> list[list[Output]]:
        """The outputs of each source."""
        default = min(DEFAULT_NEW_TOKENS, position_limit(self.model) or DEFAULT_NEW_TOKENS)
        settings = {"max_new_tokens": default} | settings
        if form := grammar_of(settings.pop("json_schema", None), settings.pop("regex", None)):
            settings["grammar"] = form
        ids, given = [ids for ids, _ in sources], [forced for _, forced in sources]
        outputs = generate_outputs(loaded, ids, given=given, batch_size=batch_size, **settings)
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


def register_pipelines() -> None:
    """Makes `pipeline("text2text-generation")`, "translation" and "summarization" known to transformers."""
    for kind in (Text2TextPipeline, TranslationPipeline, SummarizationPipeline):
        # `pipeline` refuses these tasks before it looks into its registry
        transformers.pipelines.REMOVED_TASKS.pop(kind.task_name, None)
        if PIPELINE_REGISTRY.supported_tasks.get(kind.task_name, {}).get("impl") is not kind:
            PIPELINE_REGISTRY.register_pipeline(
                kind.task_name, pipeline_class=kind, pt_model=AutoModelForSeq2SeqLM, type="text"
            )


def travelling_pipeline(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], bytes]:
    """What a checkpoint needs to bring its own pipeline: its config with one more entry, and the code of the file
    TRAVELLING_CODE, in which that of template_sandbox.py stands in place of its import.

    Raises:
        UserError: the tokenizer has no template, or the code does not render and encode as data_prep does.
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
    target_language = {"target_language": own.target or own.source} if any(own) else {}
    for example in stored_golden(tokenizer):
        with contextlib.suppress(ValueError):  # the travelling code refuses rows that spell control tokens
            found = reader.preprocess(example["fields"], **target_language)["input_ids"][0].tolist()
            if found != [token for part in example["input_ids"] for token in part]:
                raise UserError(f"template '{template.name}' cannot travel: {TRAVELLING_CODE} renders it otherwise.")
            is_proven = True
    if not is_proven:
        raise UserError(f"template '{template.name}' cannot travel: {TRAVELLING_CODE} renders none of its examples.")
    files = (pipeline_diptych, template_sandbox)
    code, sandbox = (Path(file.__file__).read_text(encoding="utf-8") for file in files)
    code = code.replace(SANDBOX_IMPORT, sandbox.partition("annotations\n\n")[2])
    return dict(config) | {"custom_pipelines": TRAVELLING_ENTRY}, code.encode()
