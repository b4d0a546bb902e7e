"""The sources of prepared rows as documents: cut into pieces, with terms, as `diptych generate` asks them.

    asked = source_documents(documents, rows, ids)     a Document for each different source
    document_figures(documents, asked, answers)        {"terms": 120, "terms_honoured": 83.3}

A prepared row has its instruction and input beside the rendered source, so its input can be cut and marked anew. A
source that these do not give again (earlier turns, a system prompt, placeholders) is asked as it was prepared.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from diptych.data_prep.command_line.errors import UserError, counted
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.rows.terms import Terms
from diptych.data_prep.text_to_ids.templates import BARE_TEMPLATE, TEMPLATES
from diptych.finetune.evaluating.evaluate_settings import EvaluateSettings
from diptych.finetune.generating.documents import WHOLE, Answered, Document, Documents, Promise
from diptych.finetune.inference.engine import EncodedPrompt, TorchEngine
from diptych.finetune.inference.prompts import Prompt, Prompter
from diptych.finetune.inference.target_tokens import TargetSide, given_tokens
from diptych.finetune.model.loaded_model import LoadedModel

MARK = re.compile(r" \[= [^\]\n]*\]")
"""What `diptych prepare --terms` wrote into a source (rows/terms.py)."""


def documents_to_evaluate(
    settings: EvaluateSettings, loaded: LoadedModel | Any, terms: Terms | None
) -> Documents | None:
    """None if the settings ask neither for pieces nor for terms. `loaded` may be a CTranslate2Engine."""
    if terms is None and settings.long == "cut":
        return None
    engine = TorchEngine(loaded) if isinstance(loaded, LoadedModel) else loaded
    limit = settings.max_source_tokens or engine.max_source_tokens
    prompter = Prompter(engine.tokenizer, engine.template or TEMPLATES[BARE_TEMPLATE], limit)
    return Documents(prompter, engine, settings.long, terms)


def source_documents(
    documents: Documents | None,
    rows: Dataset,
    keys: Sequence[tuple[str, Languages]],
    ids: Mapping[tuple[str, Languages], Sequence[int]],
    side: TargetSide,
) -> list[Document]:
    """Of each source in `ids`, in its order. `keys` are the sources of the rows. Without
    `documents` each is asked as it was prepared. UserError for a language that has no splitter."""
    given = {it: given_tokens(side, it if any(it) else None) for it in {languages for _, languages in ids}}
    found = {
        key: Document(Prompt(""), "", WHOLE, [EncodedPrompt(of_source, given[key[1]])], False, [Promise()])
        for key, of_source in ids.items()
    }
    if documents is None:
        return list(found.values())
    names = [name for name in ("instruction", "input") if name in rows.column_names]
    texts = rows.select_columns(names)
    prompts: dict[tuple[str, Languages], Prompt] = {}
    for key, row in zip(keys, texts if names else [{}] * len(keys), strict=True):
        if key in prompts:
            continue
        prompt = Prompt(row.get("instruction") or "", row.get("input") or "", languages=key[1])
        try:
            source = str(documents.prompter.render(prompt)[0])
        except UserError:
            continue
        if source in (key[0], MARK.sub("", key[0])):
            prompts[key] = prompt
    if documents.terms is not None:
        for key in found.keys() - prompts.keys():  # with the marks that it was prepared with
            terms = documents.terms.found(MARK.sub("", key[0]), key[1])
            promise = Promise([term for term in terms if f"{term.source} [= {term.target}]" in key[0]])
            found[key] = found[key]._replace(promises=[promise])
    encoded = documents.encode(list(prompts.values()))
    found |= {key: document for key, document in zip(prompts, encoded, strict=True) if not document.error}
    if left := len(found) - len([document for document in encoded if not document.error]):
        print(
            f"({counted(left, 'source')} cannot be made of instruction and input: asked as prepared)", file=sys.stderr
        )
    return list(found.values())


def document_figures(
    documents: Documents | None, asked: Sequence[Document], answers: Sequence[Answered]
) -> dict[str, float]:
    """How many pieces were generated, and with terms how many there were, and the percentage that outputs have."""
    if documents is None:
        return {}
    figures: dict[str, float] = (
        {} if documents.long == "cut" else {"source_pieces": sum(len(it.prompts) for it in asked)}
    )
    if documents.terms is not None:
        wanted = sum(len({term.target for term in promise.terms}) for it in asked for promise in it.promises)
        missed = sum(len(answer.missed[0]) for answer in answers)
        figures |= {"terms": wanted} | ({"terms_honoured": 100 * (1 - missed / wanted)} if wanted else {})
    return figures
