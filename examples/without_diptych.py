"""Use a published Diptych checkpoint where Diptych is not installed: only transformers, torch and jinja2.

    python without_diptych.py FOLDER "Translate English to Korean:" "I am a student." "Where is it?"

FOLDER may be any copy of a run's `final/`, or a Hub repository made of it. The model's code is read from the folder
(`trust_remote_code=True`: only for folders that you trust); the prompt's template from the tokenizer.
"""

import sys

sys.modules["diptych"] = None  # any attempt to import the package now fails, as it would elsewhere

from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()


def main(folder: str, instruction: str, *inputs: str) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # it looks at the config, too
    template = ImmutableSandboxedEnvironment().from_string(tokenizer.init_kwargs["diptych_template"]["source"])
    print(f"{type(model).__name__} from {type(model).__module__}")
    for text in inputs:
        prompt = template.render(instruction=instruction, input=text, history=())
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**batch, max_new_tokens=48)
        print(f"  {text}\n    → {tokenizer.decode(output[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
