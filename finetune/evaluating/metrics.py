"""Scores for generated text, computed without network access.

    compute_metrics(["exact_match", "chrf"], predictions=["학생이다."], references=[["학생이야.", "학생이다."]])
    -> {"exact_match": 100.0, "chrf": 100.0}

N predictions (strings) and for each a list of one or more references. Every figure is between 0 and 100 and higher is
better, except token_error_rate: lower is better, and it can exceed 100. A prediction gets the score of its best
reference; BLEU compares it with all of them together. Most counting is done by sacrebleu (Post 2018,
https://aclanthology.org/W18-6319) and rouge-score. Our own part is how text becomes tokens, because their defaults are
for English: rouge-score drops every letter outside a-z, and BLEU over Korean words counts a wrong particle as a wrong
word. `superni_rougeL` alone keeps the defaults, so that it is comparable with published results of
Super-NaturalInstructions.

A metric first counts per prediction (`Statistics`), and its figures follow from the sums. So confidence_intervals.py
computes the figures of a thousand resamples without reading a text again. Other metrics than these: own_metrics.py.
"""

import functools
import math
import os
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import regex
import sacrebleu
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
from sacrebleu.utils import SACREBLEU_DIR

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError, excerpt, in_short
from diptych.data_prep.rows.named_splits import name_in
from diptych.finetune.evaluating.confidence_intervals import MetricFault, Scored, Statistics, means, ratio
from diptych.finetune.evaluating.json_metric import count_json
from diptych.finetune.evaluating.own_metrics import BRIDGES, check_arguments, load_metric, parse_metric_name
from diptych.finetune.inference.generation_config import warn_once

# Hangul, Han and kana are tokens of one character: Korean joins particles and endings to the word, Chinese and
# Japanese write no spaces. KorQuAD's official F1 counts syllables, too. Thai, Lao, Khmer and Burmese (Complex_Context:
# lines are broken with a dictionary) write no spaces either; their tokens are one character with its marks. Tibetan
# marks its syllables, which are tokens here; BLEU's 13a does not split at these marks, so BLEU uses characters for it.
_CHARACTER_SCRIPTS = r"\p{Hangul}\p{Han}\p{Hiragana}\p{Katakana}\p{Line_Break=Complex_Context}"
_TOKEN = regex.compile(rf"(?=[{_CHARACTER_SCRIPTS}])\X|[[\p{{L}}\p{{M}}\p{{N}}]--[{_CHARACTER_SCRIPTS}]]+", regex.V1)
_LETTERS = {
    name: regex.compile(rf"[[{scripts}]&&\p{{L}}]", regex.V1)
    for name, scripts in {
        "": r"\p{L}",
        "ko-mecab": r"\p{Hangul}",
        "ja-mecab": r"\p{Hiragana}\p{Katakana}",
        "zh": r"\p{Han}",
        "flores200": r"\p{Line_Break=Complex_Context}\p{Tibetan}",
    }.items()
}
"""The letters for which sacrebleu has a tokenisation of its own: words of Korean and Japanese, by MeCab; characters of
Chinese; SentencePiece over 200 languages, which is all that it has for Thai, Lao, Khmer, Burmese and Tibetan."""
_ENGLISH_ARTICLES = {"a", "an", "the"}
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


References = Sequence[Sequence[str]]


def split_tokens(text: str) -> list[str]:
    """`"The NBA를 봤다!"` -> `["the", "nba", "를", "봤", "다"]`: words, or characters in scripts without spaces.

    NFKC makes Hangul as macOS decomposes it equal to typed Hangul. Case is folded. Punctuation is dropped unless there
    is nothing else: `"?!"` -> `["?", "!"]`. On other ASCII text these are the tokens of rouge-score's own tokenizer.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return _TOKEN.findall(text) or regex.findall(r"\X", "".join(text.split()))


def choose_bleu_tokenize(references: References) -> str:
    """sacrebleu's tokenisation for the script that at least a tenth of the references' letters are in, `13a` (the
    default of WMT) if none of _LETTERS is, and `char` if several are, or if the package or model of the one is
    missing, which is printed.

    A tenth, so that a split with both directions of English-Korean uses that for Korean, and an English text with a
    Korean city name does not. `13a` leaves Korean words whole, so short sentences rarely share four of them in a row.
    The signature says which one was used.
    """
    text = "".join(reference for row in references for reference in row)
    letters = {name: len(of_script.findall(text)) for name, of_script in _LETTERS.items()}
    least = letters.pop("") / 10
    if letters["ja-mecab"] >= letters["zh"] / 10:  # Han beside kana is Japanese
        letters["ja-mecab"] += letters.pop("zh")
    if not sum(letters.values()) or sum(letters.values()) < least:
        return "13a"
    found = [name for name, count in letters.items() if count and count >= least]
    if len(found) != 1:
        return "char"
    if not (missing := _missing_for(found[0])):
        return found[0]
    warn_once(f"(bleu is computed over characters: for {found[0]}, sacrebleu's tokens for this script, {missing})")
    return "char"


@functools.cache
def _missing_for(tokenize: str) -> str:
    """What the tokenisation needs and is not there; "" if nothing. Nothing is downloaded."""
    if tokenize == "flores200":
        model = os.path.join(SACREBLEU_DIR, "models", os.path.basename(SPM_MODELS[tokenize]["url"]))
        if not os.path.exists(model):
            return f"its model has to be in {model}; --bleu_tokenize flores200 loads it from the network once"
    try:
        sacrebleu.BLEU(tokenize=tokenize)
    except (RuntimeError, OSError, ImportError) as error:
        return f"install its packages: pip install 'diptych[mecab]' ({in_short(error)})"
    return ""


def bleu_tokenize_in(signature: str) -> str:
    """`nrefs:1|…|tok:ko-mecab-0.996/ko-0.9.2-KO|…` -> `ko-mecab`."""
    written = regex.search(r"tok:([^|]+)", signature)[1]
    return next((it for it in sacrebleu.BLEU.TOKENIZERS if written.startswith(f"{it}-")), written)


def check_pairs(predictions: Sequence[str], references: References) -> None:
    """UserError unless there is a prediction, and one non-empty list of strings for each."""
    if len(predictions) != len(references):
        raise UserError(
            f"metrics need one list of references for each prediction, got {len(predictions)} predictions and "
            f"{len(references)} lists of references. Check that both come from the same rows."
        )
    if not predictions:
        raise UserError("metrics need at least one prediction, got none. Check that the split has rows.")
    for row, (prediction, row_references) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise UserError(f"predictions[{row}] must be a string, got {type(prediction).__name__}.")
        if isinstance(row_references, str):
            raise UserError(f"references[{row}] must be a list of strings, got a string. Wrap it: [reference].")
        if not row_references or not all(isinstance(reference, str) for reference in row_references):
            raise UserError(f"references[{row}] must hold one string or more, got {excerpt(row_references)}.")


def count_exact_match(predictions: Sequence[str], references: References) -> Statistics:
    """Percentage of predictions that equal one of their references, character by character."""
    hits = [[prediction in row] for prediction, row in zip(predictions, references, strict=True)]
    return means(["exact_match"], hits)


def count_token_f1(predictions: Sequence[str], references: References) -> Statistics:
    """SQuAD's F1 (Rajpurkar et al. 2016): overlap of tokens without English articles; the best reference counts."""

    def words_of(text: str) -> list[str]:
        tokens = split_tokens(text)  # all of them if there are only articles: the answer "a" is not "the"
        return [token for token in tokens if token not in _ENGLISH_ARTICLES] or tokens

    def f1(predicted: list[str], expected: list[str]) -> float:
        if not predicted or not expected:
            return float(predicted == expected)  # an empty prediction for an empty reference is right, as in SQuAD 2.0
        return 2 * (Counter(predicted) & Counter(expected)).total() / (len(predicted) + len(expected))

    pairs = zip(predictions, references, strict=True)
    scores = [[max(f1(words_of(guess), words_of(reference)) for reference in row)] for guess, row in pairs]
    return means(["token_f1"], scores)


def count_token_error_rate(predictions: Sequence[str], references: References) -> Statistics:
    """Insertions, deletions and substitutions per 100 tokens of the nearest reference; tokens are separated by spaces.
    Over phonemes this is the phoneme error rate, over words the word error rate."""
    nearest = [
        min((edit_distance(prediction.split(), reference.split()), -len(reference.split())) for reference in row)
        for prediction, row in zip(predictions, references, strict=True)
    ]
    edits, tokens = zip(*nearest, strict=True)
    return ratio("token_error_rate", edits, [max(1, -count) for count in tokens], scale=100)


def edit_distance(predicted: Sequence[str], expected: Sequence[str]) -> int:
    """Levenshtein distance, by numpy over rows of the table (nltk's is 25 times slower on 200 tokens)."""
    columns = np.arange(len(expected) + 1)
    tokens, row = np.array(expected, dtype=object), columns
    for number, token in enumerate(predicted, start=1):
        substituted, deleted = row[:-1] + (tokens != token), row[1:] + 1
        row = np.concatenate([[number], np.minimum(substituted, deleted)])
        row = np.minimum.accumulate(row - columns) + columns  # insertions, from left to right
    return int(row[-1])


def count_rouge(predictions: Sequence[str], references: References) -> Statistics:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L over `split_tokens`, without stemming."""
    names = ["rouge1", "rouge2", "rougeL"]
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(names, tokenizer=SimpleNamespace(tokenize=split_tokens))
    rows = [scorer.score_multi(row, guess) for guess, row in zip(predictions, references, strict=True)]
    return means(names, [[row[name].fmeasure for name in names] for row in rows])


def count_superni(predictions: Sequence[str], references: References) -> Statistics:
    """As compute_metrics.py of Tk-Instruct (Wang et al. 2022, arXiv 2204.07705) for its English tracks.

    ROUGE-L with rouge-score's own tokens, stemmed: letters a-z and digits. Text in any other script has no tokens and
    scores 0 even if it is right; the signature says for how many predictions. Exact match ignores case, ASCII
    punctuation and surplus spaces. Both take the best reference.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores, unseen = [], 0
    for prediction, row in zip(predictions, references, strict=True):
        expected = [_superni_normalised(reference) for reference in row]
        rouge = scorer.score_multi(row, prediction)["rougeL"].fmeasure
        scores.append([rouge, _superni_normalised(prediction) in expected])
        unseen += not any(regex.search("[a-z0-9]", text) for text in expected)
    signature = "tok:rouge-score|stem:porter"
    if unseen:
        signature += f"|{unseen} of {len(scores)} score 0 whatever they say: their references have no letter a-z"
    return means(["superni_rougeL", "superni_exact_match"], scores)._replace(signature=signature)


def _superni_normalised(text: str) -> str:
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def count_bleu(
    predictions: Sequence[str], references: References, tokenize: str | None = None, effective_order: bool = False
) -> Statistics:
    """Corpus BLEU of sacrebleu; the references' script decides `tokenize` unless it is given. With effective_order,
    n-grams longer than a text do not count: BLEU of single sentences."""
    tokenize, known = tokenize or choose_bleu_tokenize(references), sorted(sacrebleu.BLEU.TOKENIZERS)
    if tokenize not in known:
        raise UserError(f"bleu has no tokenisation {tokenize!r}. {choose_from(tokenize, known)}")
    try:
        # force: no warning about text that looks tokenised, which is for the outputs of shared tasks
        scorer = sacrebleu.BLEU(tokenize=tokenize, force=True, effective_order=effective_order)
    except (RuntimeError, OSError, ImportError) as error:  # the tokenisation's package or model is missing
        raise UserError(f"bleu with tokenize={tokenize!r} cannot start: {excerpt(error)}") from error
    return _sacrebleu_statistics("bleu", scorer, predictions, references)


def count_chrf(predictions: Sequence[str], references: References) -> Statistics:
    """Corpus chrF2 of sacrebleu: character n-grams up to 6, without tokenisation."""
    return _sacrebleu_statistics("chrf", sacrebleu.CHRF(), predictions, references)


def _sacrebleu_statistics(
    name: str, scorer: sacrebleu.BLEU | sacrebleu.CHRF, predictions: Sequence[str], references: References
) -> Statistics:
    """n-grams of prediction, reference and both, and lengths. sacrebleu's corpus_score and its significance tests are
    these two functions one after the other."""
    # `[["a", "b"], ["c"]]` -> `[["a", "c"], ["b", None]]`. An empty string instead of `None` would be a reference of
    # length 0, which BLEU's brevity penalty would take as the closest length.
    streams = [list(stream) for stream in zip_longest(*references)]
    counts = scorer._extract_corpus_statistics(predictions, streams)

    def figures_of(sums: np.ndarray) -> dict[str, float]:
        return {name: scorer._compute_score_from_stats(sums.tolist()).score}

    return Statistics(np.array(counts, dtype=np.float64), figures_of, str(scorer.get_signature()))


def find_metrics(
    names: Iterable[str], settings: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Callable[..., Scored]]:
    """For each name what counts `(predictions, references, sources)`. `settings`: further arguments, by metric.

    UserError for a name or an argument that is not known, and for two metrics whose figures have one name: it is
    found before hours of generation.
    """
    found, figures, unused = {}, {}, dict(settings or {})
    if wrong := [name for name, own in unused.items() if not isinstance(own, Mapping)]:
        raise UserError(f"metric_settings.{wrong[0]} has to be values by name, as in {{{wrong[0]}: {{model: PATH}}}}.")
    for written in dict.fromkeys(names):
        name = parse_metric_name(written)
        own = unused.pop(written, {}) | (unused.pop(name.figure, {}) if name else {})
        if written in METRICS:
            check_arguments(METRICS[written], 2, written, own)
            count = functools.partial(METRICS[written], **own)
            found[written] = lambda texts, references, _, count=count: count(texts, references)
            continue
        if name is None or name.place in METRICS:
            known = [*METRICS, *BRIDGES]
            raise UserError(
                f"there is no metric {written!r}. {choose_from(written.partition(':')[0], known)} A function of yours "
                f"is module:function, and a metric of the library evaluate evaluate:NAME or ./script.py."
            )
        if (other := figures.setdefault(name.figure, written)) != written or name.figure in FIGURES:
            other = f"that of {other}" if other != written else "a built-in one"
            raise UserError(f"metric {written}: its figure {name.figure!r} would be called as {other}. Rename it.")
        found[written] = load_metric(name, own)
    if unused:
        listed = ", ".join(found) or "none"
        raise UserError(f"metric_settings are given for {', '.join(unused)}, and the metrics are: {listed}.")
    return found


def count_texts(
    names: Iterable[str],
    predictions: list[str],
    references: list[list[str]],
    sources: Sequence[str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    faults: dict[str, str] | None = None,
) -> dict[str, Scored]:
    """The counts of each named metric. `faults` gets the message of each metric that fails; without it, MetricFault
    is raised. Only metrics that are not built in read `sources`."""
    metrics, counted = find_metrics(names, settings), {}
    check_pairs(predictions, references)
    for name, count in metrics.items():
        try:
            counted[name] = count(predictions, references, sources or [""] * len(predictions))
        except MetricFault as fault:
            if faults is None:
                raise
            faults[name] = str(fault)
    return counted


def figures_and_signatures(counted: Iterable[Scored]) -> tuple[dict[str, float], dict[str, str]]:
    """All figures of the statistics, and the signatures of those that have one."""
    figures, signatures = {}, {}
    for scored in counted:
        found = scored.figures()
        figures |= found
        if scored.signature:
            signatures |= dict.fromkeys(found, scored.signature)
    return figures, signatures


def score_texts(
    names: Sequence[str], predictions: list[str], references: list[list[str]], sources: Sequence[str] | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """The figures of the named metrics, and their signatures."""
    return figures_and_signatures(count_texts(names, predictions, references, sources).values())


def compute_metrics(
    names: Sequence[str], predictions: list[str], references: list[list[str]], sources: Sequence[str] | None = None
) -> dict[str, float]:
    """`["rouge", "chrf"]` -> `{"rouge1": …, "rouge2": …, "rougeL": …, "chrf": …}`."""
    return score_texts(names, predictions, references, sources)[0]


FIGURES = frozenset(
    "loss rows sources target_tokens unfinished max_new_tokens exact_match_rows exact_match token_f1 chosen_likelier "
    "token_error_rate rouge rouge1 rouge2 rougeL bleu chrf superni_rougeL superni_exact_match json "
    "json_valid json_exact json_f1 terms terms_honoured source_pieces".split()
)
"""Names that no metric of a user's own can have."""
LOWER_IS_BETTER = frozenset("loss unfinished error errors error_rate wer cer ter perplexity distance".split())
"""Figures with one of these names, or one that ends in it (token_error_rate, judge.loss)."""


def lower_is_better(figure: str, metrics: Iterable[str] = ()) -> bool:
    """`metrics` may say it: my_metrics:misses:min."""
    figure = figure.rpartition("/")[2]
    for name in filter(None, map(parse_metric_name, metrics)):
        if name.lower_is_better is not None and f"{figure}.".startswith(f"{name.figure}."):
            return name.lower_is_better
    return any(f"_{figure}".endswith((f"_{known}", f".{known}")) for known in LOWER_IS_BETTER)


def selectable_figures(
    metrics: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    texts: Sequence[str] = ("a",),
    sources: Sequence[str] = ("a",),
    faults: dict[str, str] | None = None,
) -> list[str]:
    """The figures that an evaluation with these metrics has and a checkpoint can be selected by. Metrics are tried on
    outputs that equal their references, `texts`; `faults` as in `count_texts`."""
    if not metrics:
        return ["loss"]
    counted = count_texts(metrics, list(texts), [[text] for text in texts], sources, settings, faults)
    return ["loss", *figures_and_signatures(counted.values())[0], "exact_match_rows", "unfinished"]


def selected_figure(best_metric: str, figures: Mapping[str, Mapping[str, float]]) -> float:
    """The value of `best_metric` in the figures of each validation split: `medical/chrf` is that of
    validation/medical, `chrf` is the mean over the splits. NaN if it is missing in one."""
    name, _, figure = best_metric.rpartition("/")
    chosen = [of_split for split, of_split in figures.items() if not name or name_in(split) == name]
    return fmean(of_split.get(figure, math.nan) for of_split in chosen)


def is_improvement(figure: str, value: float, best: float | None, metrics: Iterable[str] = ()) -> bool:
    """Whether `value` is better than the best so far. NaN never is."""
    if math.isnan(value):
        return False
    return best is None or (value < best if lower_is_better(figure, metrics) else value > best)


METRICS: dict[str, Callable[..., Statistics]] = {
    "exact_match": count_exact_match,
    "token_f1": count_token_f1,
    "token_error_rate": count_token_error_rate,
    "rouge": count_rouge,
    "bleu": count_bleu,
    "chrf": count_chrf,
    "superni_rougeL": count_superni,
    "json": count_json,
}
