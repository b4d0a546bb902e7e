"""Raw text as (source, target) pairs, by which an encoder-decoder is pretrained.

    diptych denoise --data corpus.txt hf:user/pages --tokenizer paired --objective prefix_lm --out pairs
    diptych prepare --data pairs/pairs.parquet --tokenizer paired --out prepared

    prefix_lm        the beginning of a window is read, the rest is written
    span_corruption  spans are cut out and written (T5, arXiv 1910.10683):
                         source  Thank you <X> to your <Y> week      target  <X> for inviting me <Y> party last
    ul2              a mixture of both: short spans, long ones or many, and prefixes (UL2, arXiv 2205.05131)

It works on tokens: a document is cut into windows that fill source and target, and each token is in one window. What
is done to a window is drawn from the seed, the document and the window's number, so the order of documents does not
matter. Text that spells a control token stays text (encode.py). The end of a document that is shorter than MINIMUM
tokens is left out, and counted.
"""

import itertools
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import transformers
import xxhash
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.overwrite_checks import new_folder
from diptych.data_prep.text_to_ids.encode import split_sources, split_targets
from diptych.data_prep.text_to_ids.tokenizer_files import open_tokenizer
from diptych.data_prep.text_to_ids.two_vocabularies import check_one_vocabulary
from diptych.data_prep.tokenizer_tools.text_command_settings import DenoiseSettings
from diptych.data_prep.tokenizer_tools.tokenizer_texts import open_texts

MINIMUM = 8
"""The fewest tokens of a window."""
PAIRS_AT_ONCE = 2_000
DOCUMENTS_AT_ONCE = 256
SENTINEL = re.compile(r"<extra_id_(\d+)>")
SCHEMA = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32())), ("labels", pyarrow.list_(pyarrow.int32()))])


class Denoiser(NamedTuple):
    """What is done to a window. Without a span length it is a prefix that is read, the rest written."""

    mode: Literal["R", "S", "X"]
    """UL2's name of its kind: regular, sequential, extreme."""
    noise_density: float
    """Share of tokens that are written."""
    mean_span_length: float | None = None


UL2_MIXTURE = (
    Denoiser("R", 0.15, 3),
    Denoiser("R", 0.15, 8),
    Denoiser("S", 0.25),
    Denoiser("X", 0.5, 3),
    Denoiser("X", 0.5, 8),
    Denoiser("X", 0.15, 64),
    Denoiser("X", 0.5, 64),
)
"""Table 1 of the paper, each as often as the others."""


class SpecialTokens(NamedTuple):
    """Ids that stand around the text's tokens in every pair, and those that stand for its spans."""

    before_source: list[int]
    after_source: list[int]
    before_target: list[int]
    after_target: list[int]
    sentinels: list[int]
    modes: dict[str, int]

    def room(self, denoiser: Denoiser, max_source: int, max_target: int) -> tuple[int, int]:
        """Tokens that are left for the text and its sentinels."""
        source = max_source - len(self.before_source) - len(self.after_source) - (denoiser.mode in self.modes)
        return source, max_target - len(self.before_target) - len(self.after_target)


def window_length(denoiser: Denoiser, source: int, target: int, sentinels: int) -> int:
    """The most tokens with which neither side, sentinels included, is longer than its room. UserError where that is
    fewer than MINIMUM."""

    def fits(length: int) -> bool:
        noise, spans = noise_and_spans(length, denoiser)
        return length - noise + spans <= source and noise + spans <= target and spans <= sentinels

    length = source + target
    if denoiser.mean_span_length is not None:
        length = next(filter(fits, range(length, 1, -1)), 0)
    if length < MINIMUM:
        raise UserError(
            f"{source} source and {target} target tokens leave no room for text. Raise max_source_tokens and"
            f" max_target_tokens."
        )
    return length


def noise_and_spans(length: int, denoiser: Denoiser) -> tuple[int, int]:
    """How many tokens of a window are cut out, and in how many spans."""
    noise = min(max(round(length * denoiser.noise_density), 1), length - 1)
    return noise, min(max(round(noise / denoiser.mean_span_length), 1), noise, length - noise)


def corrupt_spans(
    tokens: Sequence[int], denoiser: Denoiser, sentinels: Sequence[int], generator: numpy.random.Generator
) -> tuple[list[int], list[int]]:
    """As T5 does it: kept and cut-out spans in turns, a kept one first, all lengths drawn; a sentinel stands for each
    cut-out span in the source, and before it in the target."""
    noise, spans = noise_and_spans(len(tokens), denoiser)
    kept = _parts(len(tokens) - noise, spans, generator)
    cut = _parts(noise, spans, generator)
    source, target, place = [], [], 0
    for sentinel, keep, drop in zip(sentinels, kept, cut, strict=False):
        source += [*tokens[place : place + keep], sentinel]
        target += [sentinel, *tokens[place + keep : place + keep + drop]]
        place += keep + drop
    return source, target


def _parts(total: int, count: int, generator: numpy.random.Generator) -> list[int]:
    """`total` in `count` parts of 1 or more; all ways to divide it are equally likely."""
    ends = generator.choice(total - 1, count - 1, replace=False) + 1 if count > 1 else []
    return numpy.diff([0, *sorted(ends), total]).tolist()


def split_prefix(
    tokens: Sequence[int], least: float, source: int, target: int, generator: numpy.random.Generator
) -> tuple[list[int], list[int]]:
    """Cut at a random place, such that neither side is shorter than the share `least`, nor longer than its room."""
    length, shortest = len(tokens), max(round(len(tokens) * least), 1)
    first = max(shortest, length - target)
    last = min(length - shortest, source)
    place = int(generator.integers(first, max(first, last) + 1))
    return list(tokens[:place]), list(tokens[place:])


def pairs_of(
    tokens: Sequence[int], settings: DenoiseSettings, special: SpecialTokens, key: int
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """(input_ids, labels) of each window of a document, and how many tokens are left over at its end."""
    mixture = {
        "ul2": UL2_MIXTURE,
        "prefix_lm": (Denoiser("S", settings.minimum_prefix),),
        "span_corruption": (Denoiser("R", settings.noise_density, settings.mean_noise_span_length),),
    }[settings.objective]
    pairs, place = [], 0
    while True:
        generator = numpy.random.default_rng([settings.seed, key, len(pairs)])
        denoiser = mixture[int(generator.integers(len(mixture)))]
        source_room, target_room = special.room(denoiser, settings.max_source_tokens, settings.max_target_tokens)
        window = tokens[place : place + window_length(denoiser, source_room, target_room, len(special.sentinels))]
        if len(window) < MINIMUM:
            return pairs, len(window)
        place += len(window)
        if denoiser.mean_span_length is None:
            least = settings.minimum_prefix if settings.objective == "prefix_lm" else denoiser.noise_density
            source, target = split_prefix(window, least, source_room, target_room, generator)
        else:
            source, target = corrupt_spans(window, denoiser, special.sentinels, generator)
        mode = [special.modes[denoiser.mode]] if special.modes else []
        input_ids = [*special.before_source, *mode, *source, *special.after_source]
        pairs.append((input_ids, [*special.before_target, *target, *special.after_target]))


def special_tokens(tokenizer: PreTrainedTokenizerBase, settings: DenoiseSettings) -> SpecialTokens:
    """UserError where the objective needs tokens that the tokenizer does not have."""
    vocabulary = tokenizer.get_vocab()
    numbered = {int(match[1]): token for name, token in vocabulary.items() if (match := SENTINEL.fullmatch(name))}
    sentinels = [numbered[number] for number in sorted(numbered)]
    if settings.objective != "prefix_lm" and not sentinels:
        raise UserError(
            f"{settings.tokenizer} has no sentinels (<extra_id_0> …), which {settings.objective} cuts text with. Add"
            f" some: --add_sentinels 100; training then takes --grow_vocabulary true. Or take prefix_lm."
        )
    for name in settings.mode_tokens:
        if name not in vocabulary:
            raise UserError(f"mode_tokens names {name!r}, which {settings.tokenizer} does not have. Name its tokens.")
    modes = dict(zip("RSX", (vocabulary[name] for name in settings.mode_tokens), strict=False))
    (source,), (target,) = split_sources(tokenizer, ["a"]), split_targets(tokenizer, ["a"])
    return SpecialTokens(source.prefix, source.suffix, target.prefix, target.suffix, sentinels, modes)


def denoise(settings: DenoiseSettings) -> Counter[str]:
    """Writes OUT/pairs.parquet; how many documents, pairs, tokens, and tokens left over there are."""
    from tokenizers import AddedToken

    tokenizer = open_tokenizer(settings.tokenizer)
    what = "both sides of these pairs are of one text. Take a checkpoint with one vocabulary."
    check_one_vocabulary(tokenizer, settings.tokenizer, what)
    out = new_folder(settings.out)
    if settings.add_sentinels:
        names = [f"<extra_id_{number}>" for number in range(settings.add_sentinels)]
        tokenizer.add_tokens([AddedToken(name, special=True) for name in names], special_tokens=True)
    special = special_tokens(tokenizer, settings)
    texts = open_texts(settings.data, settings.text_fields)
    if settings.add_sentinels:
        tokenizer.save_pretrained(out / "tokenizer")
    counts: Counter[str] = Counter()
    partial = out / "pairs.parquet.partial"
    with pyarrow.parquet.ParquetWriter(partial, SCHEMA) as writer, tqdm(unit=" documents", file=sys.stderr) as bar:
        pairs: list[tuple] = []
        stream = texts()
        if settings.documents == "file":
            files = itertools.groupby(texts.pairs(), key=lambda pair: pair[0])
            stream = ("\n".join(text for _, text in lines) for _, lines in files)
        while documents := list(itertools.islice(stream, DOCUMENTS_AT_ONCE)):
            for text, encoding in zip(documents, split_sources(tokenizer, documents), strict=True):
                counts["documents"] += 1
                found, left = pairs_of(encoding.content, settings, special, xxhash.xxh3_64_intdigest(text.encode()))
                pairs += found
                counts["pairs"] += len(found)
                counts["tokens"] += sum(len(source) + len(target) for source, target in found)
                counts["tokens left over"] += left
            bar.update(len(documents))
            if len(pairs) >= PAIRS_AT_ONCE:
                _write(writer, pairs)
        _write(writer, pairs)
    partial.replace(out / "pairs.parquet")
    texts.warn_of_rejects()
    return counts


def _write(writer: pyarrow.parquet.ParquetWriter, pairs: list[tuple]) -> None:
    if pairs:
        sources, targets = zip(*pairs, strict=True)
        writer.write_table(pyarrow.table([list(sources), list(targets)], schema=SCHEMA))
        pairs.clear()


def run(settings: DenoiseSettings) -> int:
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    counts = denoise(settings)
    tokenizer = f"{settings.out}/tokenizer" if settings.add_sentinels else settings.tokenizer
    print(
        f"{counts['pairs']:,} pairs of {counts['documents']:,} documents, {counts['tokens']:,} tokens; "
        f"{counts['tokens left over']:,} tokens were left over, in ends of fewer than {MINIMUM}"
    )
    print(f"Next: diptych prepare --data {settings.out}/pairs.parquet --tokenizer {tokenizer} --out prepared")
    return 0
