"""A pipeline that travels with a checkpoint: text to text by the template that its tokenizer carries, where Diptych is
not installed.

    write = pipeline("text2text-generation", model="me/capitals", trust_remote_code=True)
    write({"instruction": "Name the capital.", "input": "France"})      [{"generated_text": "Paris"}]

An input is a text, which is an instruction, a row of instruction (and input, history, system), or a list of messages.
Greedy unless told otherwise. A text in which a control token is spelled is refused: here, unlike in Diptych, it would
become one. This file imports nothing but torch's and transformers' own company.
"""

from collections.abc import Mapping
from typing import Any

import jinja2
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import Pipeline

TEMPLATE_KEY = "diptych_template"
"""Under which the template stands in tokenizer_config.json."""


class DiptychPipeline(Pipeline):
    """`pipe(inputs, batch_size=1, max_new_tokens=256, **generate)`; a list of inputs gives a list of results."""

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, **generate):
        return {}, generate, {}

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        if is_conversation(inputs):
            inputs = fields_of(inputs)
        elif isinstance(inputs, list):
            inputs = [fields_of(it) if is_conversation(it) else it for it in inputs]
        return super().__call__(inputs, **settings)

    def preprocess(self, inputs: Any) -> dict[str, torch.Tensor]:
        row = fields_of(inputs)
        history = [list(turn) for turn in row.get("history") or ()]
        texts = [row.get("instruction", ""), row.get("input", ""), row.get("system", "")]
        for text in [*texts, *(text for turn in history for text in turn)]:
            self._check_text(text)
        template = self.tokenizer.init_kwargs[TEMPLATE_KEY]
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        instruction, text, system = (value or "" for value in texts)
        prompt = environment.from_string(template["source"]).render(
            instruction=instruction, input=text, history=history, system=system
        )
        return dict(self.tokenizer(prompt, return_tensors="pt"))

    def _check_text(self, text: Any) -> None:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"a text is needed, and {type(text).__name__} was given")
        for token in self.tokenizer.all_special_tokens:
            if token in (text or ""):
                raise ValueError(f"the text spells the control token {token}, which it would become. Take it out.")

    def _forward(self, model_inputs: dict[str, torch.Tensor], **settings: Any) -> dict[str, torch.Tensor]:
        template = self.tokenizer.init_kwargs[TEMPLATE_KEY]
        settings = {"max_new_tokens": 256, "num_beams": 1, "do_sample": False} | settings
        rows = model_inputs["input_ids"].shape[0]
        if prefix := forced_prefix(template):
            settings["decoder_input_ids"] = torch.tensor([prefix] * rows, device=self.model.device)
        if template.get("stop"):
            settings |= {"stop_strings": list(template["stop"]), "tokenizer": self.tokenizer}
        inputs = {name: model_inputs[name] for name in ("input_ids", "attention_mask")}
        output_ids = self.model.generate(**inputs, **settings)
        return {"output_ids": output_ids.reshape(rows, -1, output_ids.shape[-1])}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        stop = self.tokenizer.init_kwargs[TEMPLATE_KEY].get("stop") or ()
        found = []
        for ids in model_outputs["output_ids"][0].tolist():
            text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            ends = [place for place in map(text.find, stop) if place >= 0]
            found.append({"generated_text": text[: min(ends, default=len(text))]})
        return found


def forced_prefix(template: Mapping[str, Any]) -> list[int]:
    """What the decoder is given first, as the golden examples that travel with the template have it."""
    if not template.get("decoder_prefix"):
        return []
    return next(example["labels"][0] for example in template["golden"] if example["labels"])


def is_conversation(inputs: Any) -> bool:
    turns = inputs if isinstance(inputs, list) else []
    return bool(turns) and all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in turns)


def fields_of(inputs: Any) -> dict[str, Any]:
    """A text, a row or messages as instruction, input, history and system."""
    if isinstance(inputs, str):
        return {"instruction": inputs}
    if isinstance(inputs, Mapping):
        return dict(inputs)
    system = "\n".join(turn["content"] for turn in inputs if turn["role"] in ("system", "developer"))
    turns = [turn["content"] for turn in inputs if turn["role"] in ("user", "assistant")]
    if len(turns) % 2 == 0 or inputs[-1]["role"] != "user":
        raise ValueError("messages take turns, user and assistant, and end with the user's")
    pairs = list(zip(turns[0:-1:2], turns[1::2], strict=True))
    return {"instruction": turns[-1], "history": pairs, "system": system}
