"""How many tokens a tokenizer makes of texts, and whether they come back, as a dict that JSON can hold.

    report = tokenizer_report(tokenizer, [("Latin", "Go now."), ("Hangul", "가."), …])
    report["languages"]["Hangul"]["tokens_per_word"]     2.19   fertility (Rust et al. 2021)
    report["hard_texts"][0]                              {"name": "Hangul composed", …, "exact": True}
    print(table_of(report))                              for people

Any tokenizer that `AutoTokenizer` loads. Text is encoded as `diptych prepare` does it, without special tokens. A word
is what white space separates; for Chinese, Japanese or Thai look at the tokens per character instead. "Comes back"
means that decoding gives the very same characters: a tokenizer that normalises, or drops spaces, loses some.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

HARD_TEXTS = {
    "Hangul composed": "안녕하세요, 값이 얼마예요?",
    "Hangul decomposed": unicodedata.normalize("NFD", "안녕하세요, 값이 얼마예요?"),
    "emoji joined": "👩‍👩‍👧‍👦 and 🏳️‍🌈 and 👍🏽 and 🇰🇷",
    "code with tabs": "def f(x):\n\tif x:\n\t\treturn {'a': [1, 2]}\n",
    "code with spaces": "for (;;) {\n    if (a  ==  b) {\n        break;  // done\n    }\n}\n",
    "combining marks": "re\u0301sume\u0301, a\u0323\u0302, x\u0336",
    "double spaces": "one  two   three",
    "leading and trailing spaces": "  begins and ends  ",
    "newlines": "one\ntwo\r\n\r\nthree\n",
    "right to left": "שלום עולם، مرحبا بالعالم",
    "punctuation": "don 't , n't . ! ? « » “ ” …",
    "compatibility forms": "ﬁne ① Ａ １ ㎏ x²",
    "rare characters": "𝔘𝔫𝔦 漢字 𠮷 ไทย",
}
"""What tokenizers tend to change."""

BATCH = 1000
LANGUAGES_SHOWN = 12


def tokenizer_report(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Of (language, text) pairs, which may come from an iterator: 1,000 are in memory at a time."""
    used: set[int] = set()
    # Mostly one; where a vocabulary holds `<unk>` twice, the model may give the one that the tokenizer does not.
    tokens = enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    unknown_ids = {it for it, token in tokens if token == tokenizer.unk_token} | {tokenizer.unk_token_id}
    counts: defaultdict[str, Counter] = defaultdict(Counter)
    pairs = iter(pairs)
    while batch := list(islice(pairs, BATCH)):
        for (language, text), ids in zip(batch, _encode(tokenizer, [text for _, text in batch]), strict=True):
            used.update(ids)
            counts[language] += Counter(
                texts=1,
                words=len(text.split()),
                characters=len(text),
                bytes=len(text.encode("utf-8", "surrogatepass")),
                tokens=len(ids),
                unknown=sum(map(unknown_ids.__contains__, ids)),
                exact=_decode(tokenizer, ids) == text,
            )
    hard_texts = []
    for name, text in HARD_TEXTS.items():
        (ids,) = _encode(tokenizer, [text])
        decoded, unknown = _decode(tokenizer, ids), sum(map(unknown_ids.__contains__, ids))
        found = {"name": name, "text": text, "tokens": len(ids), "unknown": unknown, "decoded": decoded}
        hard_texts.append(found | {"exact": decoded == text})
    return {
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "class": type(tokenizer).__name__,
            "model": type(tokenizer.backend_tokenizer.model).__name__ if tokenizer.is_fast else "Python",
            "tokens": len(tokenizer),
        },
        "languages": {language: _figures(count) for language, count in counts.items()},
        "total": _figures(sum(counts.values(), Counter())),
        "vocabulary_used": {"tokens": len(used), "share": len(used) / len(tokenizer)},
        "hard_texts": hard_texts,
    }


def _figures(count: Mapping[str, int]) -> dict[str, Any]:
    """Counts, and their ratios; a ratio of nothing is None."""
    figures: dict[str, Any] = {name: count[name] for name in ("texts", "words", "characters", "bytes", "tokens")}
    for name, above, below in (
        ("tokens_per_word", "tokens", "words"),
        ("tokens_per_character", "tokens", "characters"),
        ("bytes_per_token", "bytes", "tokens"),
        ("unknown_rate", "unknown", "tokens"),
        ("exact_rate", "exact", "texts"),
    ):
        figures[name] = count[above] / count[below] if count[below] else None
    return figures


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


COLUMNS = (
    ("texts", "{texts:,}"),
    ("tokens", "{tokens:,}"),
    ("tokens/word", "{tokens_per_word:.2f}"),
    ("tokens/character", "{tokens_per_character:.3f}"),
    ("bytes/token", "{bytes_per_token:.2f}"),
    ("unknown", "{unknown_rate:.2%}"),
    ("come back", "{exact_rate:.1%}"),
)


def table_of(report: Mapping[str, Any]) -> str:
    """The report as lines for a terminal."""
    facts = report["tokenizer"]
    rows = [["", *(title for title, _ in COLUMNS)]]
    languages = report["languages"]
    # A guesser finds dozens of languages that are not there.
    most = sorted(languages, key=lambda language: -languages[language]["texts"])[:LANGUAGES_SHOWN]
    rows += [[language, *_cells(figures)] for language, figures in languages.items() if language in most]
    if len(languages) > 1:
        rows.append(["all", *_cells(report["total"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{facts['name']}: {facts['class']}, {facts['model']}, {facts['tokens']:,} tokens", ""]
    lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    if len(most) < len(languages):
        lines.append(f"({len(languages) - len(most)} more have fewer texts.)")
    used = report["vocabulary_used"]
    lines += ["", f"{used['tokens']:,} of the {facts['tokens']:,} tokens are used ({used['share']:.1%})."]
    changed = [hard for hard in report["hard_texts"] if not hard["exact"]]
    lines.append(f"{len(report['hard_texts']) - len(changed)} of {len(report['hard_texts'])} hard texts come back.")
    for hard in changed:
        unknown = f", {hard['unknown']} unknown" if hard["unknown"] else ""
        lines.append(f"  {hard['name']}: {hard['text']!r} → {hard['decoded']!r}{unknown}")
    return "\n".join(lines)


def _cells(figures: Mapping[str, Any]) -> list[str]:
    known = {name: value for name, value in figures.items() if value is not None}
    return [cell.format(**known) if cell[1:].partition(":")[0] in known else "-" for _, cell in COLUMNS]
