"""A pipeline that travels with a checkpoint: text to text by the template that its tokenizer carries, where Diptych is
not installed.

    write = pipeline("text2text-generation", model="me/capitals", trust_remote_code=True)
    write({"instruction": "Name the capital.", "input": "France"})      [{"generated_text": "Paris"}]

An input is a text, which is an instruction, a row of instruction (and input, history, system), or a list of messages.
Models with language codes (NLLB, M2M100, mBART, MADLAD) take `src_lang` and `tgt_lang`, or `source_language` and
`target_language` in rows: codes as the tokenizer has them. What is not given is as the tokenizer says. Greedy unless
told otherwise. A text in which a control token is spelled is refused: here, unlike in Diptych, it would become one.
Where it travels, the code of template_sandbox.py stands in place of its import, so that it imports only torch,
transformers and what they need.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Pipeline

from diptych.data_prep.text_to_ids.template_sandbox import LimitedEnvironment, start_budget

TEMPLATE_KEY = "diptych_template"
"""Under which the template stands in tokenizer_config.json."""


class DiptychPipeline(Pipeline):
    """`pipe(inputs, batch_size=1, max_new_tokens=256, **generate)`; a list of inputs gives a list of results."""

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, src_lang=None, tgt_lang=None, **generate):
        named = {"source_language": src_lang, "target_language": tgt_lang}
        return {name: code for name, code in named.items() if code}, generate, {}

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        if is_conversation(inputs):
            inputs = fields_of(inputs)
        elif isinstance(inputs, list):
            inputs = [fields_of(it) if is_conversation(it) else it for it in inputs]
        return super().__call__(inputs, **settings)

    def preprocess(self, inputs: Any, **languages: str) -> dict[str, torch.Tensor]:
        row = languages | fields_of(inputs)
        history = [list(turn) for turn in row.get("history") or ()]
        texts = [row.get("instruction", ""), row.get("input", ""), row.get("system", "")]
        for text in [*texts, *(text for turn in history for text in turn)]:
            self._check_text(text)
        template = self.tokenizer.init_kwargs[TEMPLATE_KEY]
        instruction, text, system = (value or "" for value in texts)
        start_budget(sum(map(len, [instruction, text, system, *(text for turn in history for text in turn)])))
        prompt = LimitedEnvironment().from_string(template["source"])
        prompt = prompt.render(instruction=instruction, input=text, history=history, system=system)
        given, target = forced_prefix(template), row.get("target_language")
        if hasattr(self.tokenizer, "src_lang") and type(self.tokenizer).__name__ != "FSMTTokenizer":  # of one pair
            source = row.get("source_language") or self.tokenizer.src_lang
            self._code_token(source)
            self.tokenizer.src_lang = source
            given = given or [self._code_token(target or self.tokenizer.tgt_lang)]
        elif target:
            prompt = f"{self.tokenizer.convert_ids_to_tokens(self._code_token(target))} {prompt}"
        encoded = dict(self.tokenizer(prompt, return_tensors="pt"))
        return encoded | ({"given": torch.tensor([given])} if given else {})

    def _code_token(self, code: str | None) -> int:
        """NLLB and mBART: the code; M2M100: __ko__; MADLAD: <2ko>; Marian: >>kor<<."""
        for spelled in (code, f"__{code}__", f"<2{code}>", f">>{code}<<") if code else ():
            token = self.tokenizer.convert_tokens_to_ids(spelled)
            if token not in (None, self.tokenizer.unk_token_id):
                return token
        raise ValueError(f"{code!r} is no language code of this tokenizer. Give src_lang and tgt_lang as it has them.")

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
        if "given" in model_inputs:
            settings["decoder_input_ids"] = model_inputs["given"]
        if type(self.tokenizer).__name__ == "MBartTokenizer":  # its decoder starts with the code
            settings["decoder_start_token_id"] = model_inputs["given"][0, 0].item()
        if template.get("stop"):
            settings |= {"stop_strings": list(template["stop"]), "tokenizer": self.tokenizer}
        inputs = {name: model_inputs[name] for name in ("input_ids", "attention_mask")}
        output_ids = self.model.generate(**inputs, **settings)
        return {"output_ids": output_ids.reshape(rows, -1, output_ids.shape[-1])}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        stop = self.tokenizer.init_kwargs[TEMPLATE_KEY].get("stop") or ()
        found = []
        for _, *ids in model_outputs["output_ids"][0].tolist():  # without what the decoder starts with
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
