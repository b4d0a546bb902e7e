"""A tokenizer of unknown origin, loaded from its files: they are checked before any library reads them.

    open_tokenizer("google-t5/t5-small")   → the tokenizer, or one message that says why there is none, by file and key

Small files may ask for much: 22 normalizers that each double a text make 4 million characters of each one, a regular
expression may search for years, and `"extra_ids": 1000000000` is a list of as many texts. So what costs time or memory
has a bound, far above what published tokenizers have. What passes loads in seconds.
"""

import base64
import contextlib
import importlib.util
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.data_prep.text_to_ids.checkpoint_config import check_bytes, check_config, check_place, file_of
from diptych.data_prep.text_to_ids.encode import PROBE
from diptych.data_prep.text_to_ids.regex_cost import RUN, regex_cost
from diptych.data_prep.text_to_ids.two_vocabularies import name_end_token

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "*.model", "*.spm", "vocab.*")
SAVE_IT = "Name the checkpoint whose tokenizer it is, or save that one there: tokenizer.save_pretrained({!r})."
CONFIG, BACKEND = "tokenizer_config.json", "tokenizer.json"
MOST_BYTES = 2**26
MOST_COMMAS = 4_000_000
"""In one file: Gemma's tokenizer.json, of 33 MB, has 1.5 million."""
MOST_ADDED = 20_000
"""Tokens beside those of the vocabulary: transformers takes time by their square."""
LARGEST_ID = 2**22
LONGEST_TOKEN, LONGEST_CHAT_TEMPLATE = 1_000, 200_000
MOST_VALUES, LONGEST_VALUE = 10_000, 10_000
"""Of a normalizer, or another part of tokenizer.json."""
MOST_GROWTH = 256
"""How many times longer normalizers may make a text. T5's table of characters makes 33 bytes of one."""
MOST_TRIES = 10 * RUN


def has_tokenizer(name: str) -> bool:
    """False for a folder without tokenizer files; a Hub id is assumed to have one."""
    folder = Path(name)
    return not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder or of a Hub id. Raises UserError where it cannot be loaded."""
    check_place(name)
    if not has_tokenizer(name):  # here transformers 5 would invent a T5 tokenizer of 104 tokens
        raise UserError(
            f"{name} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is in it. {SAVE_IT.format(name)}"
        )
    check_config(name)
    _check_files(name)
    remedy = "Correct it there, or copy its files again."
    if importlib.util.find_spec("sentencepiece") is None:  # transformers then asks for tiktoken
        remedy = "If its vocabulary is a sentencepiece model, that is missing: pip install 'diptych[sentencepiece]'."
    with library_errors(f"the tokenizer of {name} could not be loaded", remedy, lambda: f" ({_faulty_place(name)})"):
        # False has to be given: without it, transformers asks on the terminal whether to run the checkpoint's code.
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except ValueError as error:
            if "instantiate the backend" not in str(error):
                raise
            raise UserError(f"{name} has neither {BACKEND} nor another vocabulary. {SAVE_IT.format(name)}") from error
        tokenizer.decode(tokenizer(PROBE)["input_ids"])
    _check_values(name, "chat_template.jinja", {"chat_template": tokenizer.chat_template}, CONFIG_CHECKS)
    name_end_token(tokenizer)
    return tokenizer


def _faulty_place(name: str) -> str:
    """`"tokenizer.json: normalizer"`: the file, and the key without which `tokenizers` would load it."""
    backend = _read(name, BACKEND)

    def is_loaded(content: Mapping[str, Any]) -> bool:
        with contextlib.suppress(UserError), library_errors("", ""):
            Tokenizer.from_str(json.dumps(content)).encode(PROBE)
            return True
        return False

    if not backend:
        return f"it has no {BACKEND}"
    if is_loaded(backend):
        return CONFIG
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    return f"{BACKEND}: {next((key for key in parts if is_loaded(backend | {key: None})), 'model')}"


# The files

Checks = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""By key: what is needed there, and whether a value is that; a ValueError says why not."""


def _check_files(name: str) -> None:
    """UserError, by file and key, for files that are no tokenizer's, or that ask for more than any tokenizer needs."""
    _check_values(name, CONFIG, config := _read(name, CONFIG), CONFIG_CHECKS)
    _check_values(name, file := "special_tokens_map.json", _read(name, file), CONFIG_CHECKS)
    _check_values(name, file := "added_tokens.json", {"it": _read(name, file)}, {"it": ADDED_BY_NAME})
    for file in dict.fromkeys((BACKEND, *config.get("fast_tokenizer_files", ()))):
        if backend := _read(name, file):
            needed = {key: 0 for key in ("added_tokens", "model") if backend.get(key) is None}
            _check_values(name, file, backend | needed, BACKEND_CHECKS)
    for path in [*Path(name).glob("*"), *Path(name).glob("additional_chat_templates/*")]:
        if any(path.match(pattern) for pattern in (*TOKENIZER_FILES, "*.jinja")):
            check_bytes(path, MOST_BYTES)


def _read(name: str, file: str) -> dict[str, Any]:
    """{} where there is no such file."""
    if (found := file_of(name, file)) is None:
        return {}
    check_bytes(found, MOST_BYTES)
    with library_errors(f"{file} of {name} cannot be read", "Copy it again."):
        content = found.read_bytes()
        if (commas := content.count(b",")) > MOST_COMMAS:
            raise ValueError(f"it has {commas:,} values, and {MOST_COMMAS:,} are allowed")
        value = json.loads(content.decode("utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"it holds {reprlib.repr(value)}, where settings by name are due")
    return value


def _check_values(name: str, file: str, found: Mapping[str, Any], checks: Checks) -> None:
    for key, value in found.items():
        due, is_right = checks.get(key) or checks.get("*" + key[-6:]) or ("", bool)
        if value is None or not due:
            continue
        fault = f"is {reprlib.repr(value)[:80]}, and {due} is needed"
        try:
            if is_right(value):
                continue
        except (TypeError, LookupError, AttributeError, RecursionError):
            pass  # a value that cannot even be looked at is of another type
        except ValueError as error:
            fault = str(error)
        raise UserError(f"{file} of {name}: {key} {fault}. Correct it there, or take another tokenizer.")


# The values


def _is_token(value: Any) -> bool:
    text = value["content"] if isinstance(value, dict) else value
    return isinstance(text, str) and len(text) <= LONGEST_TOKEN


def _are_tokens(values: Any) -> bool:
    if len(values) > MOST_ADDED:
        raise ValueError(f"has {len(values):,} tokens; {MOST_ADDED:,} are allowed")
    return all(map(_is_token, values.values() if isinstance(values, dict) else values))


def _is_chat_template(value: Any) -> bool:
    """Each is saved as a file of its name."""
    named = {"": value} if isinstance(value, str) else value
    for name, text in named.items() if isinstance(named, dict) else [(it["name"], it["template"]) for it in named]:
        if Path(name).name != name or name == "..":
            raise ValueError(f"has one named {name[:80]!r}, which is no file's name")
        if text is not None and len(text) > LONGEST_CHAT_TEMPLATE:
            raise ValueError(f"has {len(text):,} characters; {LONGEST_CHAT_TEMPLATE:,} are allowed")
    return True


def _are_ids(ids: Any, largest: int = LARGEST_ID) -> bool:
    if wrong := [it for it in ids if not isinstance(it, int) or not 0 <= it <= largest]:
        raise ValueError(f"holds the id {reprlib.repr(wrong[0])}; whole numbers up to {largest:,} are allowed")
    return True


def _number(key: str) -> int | str:
    return int(key) if key.isdigit() else key


def _is_model(model: Mapping[str, Any]) -> bool:
    vocab, longest_word = model["vocab"], model.get("max_input_chars_per_word", 0)
    if longest_word > LONGEST_TOKEN:  # each takes time by the square
        raise ValueError(f"has max_input_chars_per_word {longest_word}; {LONGEST_TOKEN:,} are allowed")
    if isinstance(vocab, dict):
        return _are_ids(vocab.values(), 4 * len(vocab) + 2**16)
    return all(isinstance(piece, str) and math.isfinite(score) for piece, score in vocab)


def _is_part(part: Any) -> bool:
    """A normalizer, pre-tokenizer, post-processor or decoder, with all in it."""
    values = list(islice(_inside(part), MOST_VALUES + 1))
    if len(values) > MOST_VALUES:
        raise ValueError(f"has more than {MOST_VALUES:,} values")
    if (longest := max((len(it) for it in values if isinstance(it, str)), default=0)) > LONGEST_VALUE:
        raise ValueError(f"holds a text of {longest:,} characters; {LONGEST_VALUE:,} are allowed")
    for it in values:
        if isinstance(it, dict) and it.get("type") == "TemplateProcessing":  # tokenizers panics at the first text
            pieces = [piece for piece in (*it["single"], *it["pair"]) if "SpecialToken" in piece]
            if unknown := {piece["SpecialToken"]["id"] for piece in pieces} - it["special_tokens"].keys():
                raise ValueError(f"inserts {min(unknown)[:80]!r}, which is not in its special_tokens")
    growth = math.prod(_growth(it) for it in values if isinstance(it, dict))
    if growth > MOST_GROWTH:
        raise ValueError(f"makes texts {growth:,.0f} times longer; {MOST_GROWTH} times are allowed")
    return True


def _inside(value: Any) -> Iterator[Any]:
    """All values, except the texts of tables, which `_growth` checks."""
    yield value
    for it in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if not (isinstance(value, dict) and it is value.get("precompiled_charsmap")):
            yield from _inside(it)


def _growth(part: Mapping[str, Any]) -> float:
    """The factor by which this part makes a text longer, at most."""
    if "Regex" in part:
        said = f"has the regular expression {part['Regex'][:80]!r},"
        try:
            cost = regex_cost(part["Regex"])
        except ValueError as error:
            raise ValueError(f"{said} in which {error}") from None
        if cost.tries > MOST_TRIES or cost.size > MOST_VALUES:
            raise ValueError(f"{said} which may search for years")
    if "precompiled_charsmap" in part:  # the length of a table, the table, and texts that end in 0
        table = base64.b64decode(part["precompiled_charsmap"], validate=True)
        start = 4 + int.from_bytes(table[:4], "little")
        if not 4 < start <= len(table):
            raise ValueError("has a precompiled_charsmap that is damaged")
        return max(map(len, table[start:].split(b"\0")))
    if part.get("type") == "Prepend":
        return 1 + len(part["prepend"]) / 10
    if part.get("type") != "Replace":
        return 1
    ((kind, pattern),) = part["pattern"].items()
    shortest = regex_cost(pattern).least if kind == "Regex" else len(pattern)
    if not shortest:
        raise ValueError(f"has a pattern that is found between any two characters: {pattern[:80]!r}")
    return max(1, len(part["content"]) / shortest)


_TEXT = ("a text", lambda it: isinstance(it, str))
_TOKENS = (f"a list of up to {MOST_ADDED:,} tokens, of up to {LONGEST_TOKEN:,} characters each,", _are_tokens)
_PART = ("a part of a tokenizer", _is_part)
CONFIG_CHECKS = {
    "*_token": (f"a text of up to {LONGEST_TOKEN:,} characters", lambda it: isinstance(it, bool) or _is_token(it)),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), _TOKENS),
    "added_tokens_decoder": (f"{_TOKENS[0]} by id", lambda it: _are_ids(map(_number, it)) and _are_tokens(it)),
    **dict.fromkeys(("model_max_length", "max_len", "max_length"), ("a number of tokens", lambda it: it > 0)),
    **dict.fromkeys(
        ("extra_ids", "num_madeup_words", "offset"),
        (f"a whole number up to {MOST_ADDED:,}", lambda it: isinstance(it, int) and 0 <= it <= MOST_ADDED),
    ),
    **dict.fromkeys(("tokenizer_class", "src_lang", "tgt_lang", "padding_side", "truncation_side"), _TEXT),
    **dict.fromkeys(
        ("model_input_names", "fast_tokenizer_files"),
        ("a list of texts", lambda it: isinstance(it, list) and all(isinstance(text, str) for text in it)),
    ),
    "chat_template": ("a text, or several by name,", _is_chat_template),
    **dict.fromkeys(("self", "tokenizer_object", "__class__", "init_inputs"), ("nothing", lambda it: not it)),
}
ADDED_BY_NAME = (_TOKENS[0], lambda it: _are_ids(it.values()) and _are_tokens(list(it)))
BACKEND_CHECKS = {
    "added_tokens": (_TOKENS[0], lambda it: _are_tokens(it) and _are_ids([token["id"] for token in it])),
    "model": ("a model with a vocabulary", _is_model),
    **dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"), _PART),
}
