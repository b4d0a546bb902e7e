"""What `diptych export` found, in words: the lines that it prints, and the card of the folder.

lines(facts)   runs/full: diptych, 60.5 M weights, to ctranslate2; compared on 12 rows of rows.jsonl
               float32  12 of 12 rows the same, 402 of 402 tokens; logits off by 2.1e-05 at most, of 14.2
               int8     10 of 12 rows the same …
card(facts)    the same as a README.md, and how the folder is used
"""

from collections.abc import Iterator, Mapping
from typing import Any

USES = {
    "ctranslate2": """```
diptych generate FOLDER --engine ctranslate2 --instruction "…" --input "…"
```

or, without Diptych, `ctranslate2.Translator("FOLDER").translate_batch([tokens])`, where `tokens` are
`tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)` or, where there is a `source_vocabulary.json`, what it
has at these ids.""",
    "onnx": """`encoder_model` reads the source, `decoder_model` the decoder's start token (see `export.json`) and what
is forced after it, `decoder_with_past_model` each further token, with the keys and values that came out before:
`present.…` goes in as `past_key_values.…`.""",
}


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    measured = _measured(facts)
    width = max(map(len, measured)) + 2
    yield (
        f"{facts['model']}: {facts['model_type']}, {facts['weights'] / 1e6:.1f} M weights, to {facts['to']}; compared "
        f"on {facts['rows']}"
    )
    for precision, figures in measured.items():
        yield f"{precision:{width}}{_same(figures)}; {_logits(figures)}"
        if precision != "float32" or figures["same_rows"] < figures["rows"]:
            yield f"{'':{width}}{_texts(figures)}"
    figures = measured[facts["precision"]]
    if figures["torch_figures"]:
        yield f"{'references':{width}} {_references(figures)}"
    yield f"{'size':{width}}{_megabytes(facts['torch_bytes'])} -> {_megabytes(figures['bytes'])}"
    yield f"{'speed':{width}}{_speed(facts, figures)}"


def card(facts: Mapping[str, Any]) -> str:
    figures = _measured(facts)[facts["precision"]]
    rows = [
        ("tokens", *(_same(each) for each in _measured(facts).values())),
        ("logits", *(_logits(each) for each in _measured(facts).values())),
        ("texts", *(_texts(each) for each in _measured(facts).values())),
    ]
    if figures["torch_figures"]:
        rows.append(("with the rows' references", *(_references(each) for each in _measured(facts).values())))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    head = "| | " + " | ".join(_measured(facts)) + " |\n|" + "---|" * (len(_measured(facts)) + 1)
    return f"""---
library_name: {facts["to"]}
tags: [diptych, {facts["to"]}]
---

# {facts["model"]} for {facts["to"]}

{facts["weights"] / 1e6:.1f} million weights ({facts["model_type"]}), stored in {facts["precision"]}. Made and
proven by `diptych export`: both models wrote greedily on {facts["rows"]}, torch in float32.

{head}
{table}

Size: {_megabytes(facts["torch_bytes"])} as a checkpoint, {_megabytes(figures["bytes"])} here. Speed:
{_speed(facts, figures)}. `export.json` has all figures.

## Use

{USES[facts["to"]]}
"""


def _measured(facts: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {precision: facts[precision] for precision in dict.fromkeys(("float32", facts["precision"]))}


def _same(figures: Mapping[str, Any]) -> str:
    tied = f" ({figures['tied_rows']} part at a tie)" if figures["tied_rows"] else ""
    rows = f"{figures['same_rows']} of {figures['rows']} rows the same{tied}"
    return f"{rows}, {figures['same_tokens']} of {figures['tokens']} tokens"


def _logits(figures: Mapping[str, Any]) -> str:
    return f"logits off by {figures['max_logit_difference']:.2g} at most, of {figures['largest_logit']:.3g}"


def _texts(figures: Mapping[str, Any]) -> str:
    return f"BLEU {figures['texts']['bleu']:.2f}, chrF {figures['texts']['chrf']:.2f} against torch's texts"


def _references(figures: Mapping[str, Any]) -> str:
    ours, theirs = figures["torch_figures"], figures["exported_figures"]
    return ", ".join(
        f"{label} {ours[name]:.2f} -> {theirs[name]:.2f}" for name, label in (("bleu", "BLEU"), ("chrf", "chrF"))
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _speed(facts: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['torch_tokens_per_second']:,.0f} -> {figures['exported_tokens_per_second']:,.0f} tokens/s on "
        f"{figures['device']} in batches of {facts['batch_size']}, computed in {figures['computed_in']}"
    )
