"""Scores for generated text, computed without network access.

    compute_metrics(["exact_match", "chrf"], predictions=["학생이다."], references=[["학생이야.", "학생이다."]])
    -> {"exact_match": 100.0, "chrf": 100.0}
    TextMetric("chrf").compute(predictions=…, references=…)      the same as a metric of the `evaluate` library

N predictions (strings) and for each a list of one or more references. Every figure is between 0 and 100 and higher is
better, except token_error_rate: lower is better, and it can exceed 100. A prediction gets the score of its best
reference; BLEU compares it with all of them together. Most counting is done by sacrebleu (Post 2018,
https://aclanthology.org/W18-6319) and rouge-score. Our own part is how text becomes tokens, because their defaults are
for English: rouge-score drops every letter outside a-z, and BLEU over Korean words counts a wrong particle as a wrong
word. `superni_rougeL` alone keeps the defaults, so that it is comparable with published results of
Super-NaturalInstructions.

A metric first counts per prediction (`Statistics`), and its figures follow from the sums. So confidence_intervals.py
computes the figures of a thousand resamples without reading a text again.
"""

import math
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import NamedTuple

import datasets
import evaluate
import numpy as np
import regex
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.rows.named_splits import name_in

# Hangul, Han and kana are tokens of one character: Korean joins particles and endings to the word, Chinese and
# Japanese write no spaces. KorQuAD's official F1 counts syllables, too. Thai, Lao, Khmer and Burmese (Complex_Context:
# lines are broken with a dictionary) write no spaces either; their tokens are one character with its marks. Tibetan
# marks its syllables, which are tokens here; BLEU's 13a does not split at these marks, so BLEU uses characters for it.
_CHARACTER_SCRIPTS = r"\p{Hangul}\p{Han}\p{Hiragana}\p{Katakana}\p{Line_Break=Complex_Context}"
_TOKEN = regex.compile(rf"(?=[{_CHARACTER_SCRIPTS}])\X|[[\p{{L}}\p{{M}}\p{{N}}]--[{_CHARACTER_SCRIPTS}]]+", regex.V1)
_LETTER = regex.compile(r"\p{L}")
_CHARACTER_SCRIPT_LETTER = regex.compile(rf"[[{_CHARACTER_SCRIPTS}\p{{Tibetan}}]&&\p{{L}}]", regex.V1)
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
    """sacrebleu's `char` if at least a tenth of the references' letters are in a script without spaces or in Hangul;
    otherwise `13a`, the default of WMT.

    `13a` leaves Korean words whole, so short sentences rarely share four of them in a row; `ko-mecab` needs a
    dictionary that is not installed. A tenth, so that a split with both directions of English-Korean uses characters,
    and an English text with a Korean city name does not. The signature says which one was used.
    """
    text = "".join(reference for row in references for reference in row)
    letters = len(_LETTER.findall(text))
    return "char" if letters and len(_CHARACTER_SCRIPT_LETTER.findall(text)) >= letters / 10 else "13a"


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


class Statistics(NamedTuple):
    """Counts of each of N predictions, K numbers each, and the figures that their sums give."""

    counts: np.ndarray
    """(N, K), float64."""
    figures_of: Callable[[np.ndarray], dict[str, float]]
    """Sums over any selection of predictions (K,) -> the figures by name."""
    signature: str = ""
    """How it was computed, if there is a choice. Figures with different signatures are not comparable."""

    def figures(self) -> dict[str, float]:
        """Of all predictions. The sum is exact, so their order does not matter."""
        return self.figures_of(np.array([math.fsum(column) for column in self.counts.T]))


def mean_percentages(names: Sequence[str], scores: Sequence[Sequence[float]]) -> Statistics:
    """Scores between 0 and 1, (N, names) -> the mean of each name, times 100."""
    counts = np.column_stack([np.array(scores, dtype=np.float64), np.ones(len(scores))])

    def figures_of(sums: np.ndarray) -> dict[str, float]:
        return {name: 100 * float(total) / float(sums[-1]) for name, total in zip(names, sums[:-1], strict=True)}

    return Statistics(counts, figures_of)


def ratio(name: str, parts: Sequence[float], wholes: Sequence[float], scale: float = 1.0) -> Statistics:
    """Sum of the parts ÷ sum of the wholes: `ratio("loss", nats, target_tokens)`."""
    counts = np.column_stack([np.array(parts, dtype=np.float64), np.array(wholes, dtype=np.float64)])
    return Statistics(counts, lambda sums: {name: scale * float(sums[0]) / float(sums[1])})


def count_exact_match(predictions: Sequence[str], references: References) -> Statistics:
    """Percentage of predictions that equal one of their references, character by character."""
    hits = [[prediction in row] for prediction, row in zip(predictions, references, strict=True)]
    return mean_percentages(["exact_match"], hits)


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
    return mean_percentages(["token_f1"], scores)


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


class _RougeTokens:
    """The tokenizer object that RougeScorer needs."""

    def tokenize(self, text: str) -> list[str]:
        return split_tokens(text)


def count_rouge(predictions: Sequence[str], references: References) -> Statistics:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L over `split_tokens`, without stemming."""
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=_RougeTokens())
    rows = [scorer.score_multi(row, guess) for guess, row in zip(predictions, references, strict=True)]
    return mean_percentages(names, [[row[name].fmeasure for name in names] for row in rows])


def count_superni(predictions: Sequence[str], references: References) -> Statistics:
    """As compute_metrics.py of Tk-Instruct (Wang et al. 2022, arXiv 2204.07705) for its English tracks.

    ROUGE-L with rouge-score's own tokens, stemmed: letters a-z and digits. Text in any other script has no tokens and
    scores 0 even if it is right; the signature says for how many predictions. Exact match ignores case, ASCII
    punctuation and surplus spaces. Both take the best reference.
    """
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
    return mean_percentages(["superni_rougeL", "superni_exact_match"], scores)._replace(signature=signature)


def _superni_normalised(text: str) -> str:
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def count_bleu(predictions: Sequence[str], references: References, tokenize: str | None = None) -> Statistics:
    """Corpus BLEU of sacrebleu; the references' script decides `tokenize` unless it is given."""
    tokenize, known = tokenize or choose_bleu_tokenize(references), sorted(sacrebleu.BLEU.TOKENIZERS)
    if tokenize not in known:
        raise UserError(f"bleu has no tokenisation {tokenize!r}. {choose_from(tokenize, known)}")
    try:
        # force: no warning about text that looks tokenised, which is for the outputs of shared tasks
        scorer = sacrebleu.BLEU(tokenize=tokenize, force=True)
    except (RuntimeError, OSError) as error:  # the tokenisation's package or model is missing
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


def check_metric_names(names: Sequence[str]) -> None:
    """UserError that names the nearest metric, so that a typing error is found before hours of generation."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"there is no metric {name!r}. {choose_from(name, list(METRICS))}")


def count_texts(
    names: Sequence[str], predictions: list[str], references: list[list[str]], bleu_tokenize: str | None = None
) -> dict[str, Statistics]:
    """The counts of each named metric."""
    check_metric_names(names)
    check_pairs(predictions, references)
    settings = {"bleu": {"tokenize": bleu_tokenize}}
    return {name: METRICS[name](predictions, references, **settings.get(name, {})) for name in dict.fromkeys(names)}


def figures_and_signatures(counted: Sequence[Statistics]) -> tuple[dict[str, float], dict[str, str]]:
    """All figures of the statistics, and the signatures of those that have one."""
    figures, signatures = {}, {}
    for statistics in counted:
        found = statistics.figures()
        figures |= found
        if statistics.signature:
            signatures |= dict.fromkeys(found, statistics.signature)
    return figures, signatures


def score_texts(
    names: Sequence[str], predictions: list[str], references: list[list[str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """The figures of the named metrics, and their signatures."""
    return figures_and_signatures(list(count_texts(names, predictions, references).values()))


def compute_metrics(names: Sequence[str], predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """`["rouge", "chrf"]` -> `{"rouge1": …, "rouge2": …, "rougeL": …, "chrf": …}`."""
    return score_texts(names, predictions, references)[0]


LOWER_IS_BETTER = frozenset({"loss", "unfinished", "token_error_rate"})


def selectable_figures(metrics: Sequence[str]) -> list[str]:
    """The figures that an evaluation with these metrics has and a checkpoint can be selected by."""
    if not metrics:
        return ["loss"]
    return ["loss", *score_texts(metrics, ["a"], [["a"]])[0], "exact_match_rows", "unfinished"]


def selected_figure(best_metric: str, figures: Mapping[str, Mapping[str, float]]) -> float:
    """The value of `best_metric` in the figures of each validation split: `medical/chrf` is that of
    validation/medical, `chrf` is the mean over the splits."""
    name, _, figure = best_metric.rpartition("/")
    return fmean(of_split[figure] for split, of_split in figures.items() if not name or name_in(split) == name)


def is_improvement(figure: str, value: float, best: float | None) -> bool:
    """Whether `value` is better than the best so far. NaN never is."""
    if math.isnan(value):
        return False
    return best is None or (value < best if figure.rpartition("/")[2] in LOWER_IS_BETTER else value > best)


METRICS: dict[str, Callable[..., Statistics]] = {
    "exact_match": count_exact_match,
    "token_f1": count_token_f1,
    "token_error_rate": count_token_error_rate,
    "rouge": count_rouge,
    "bleu": count_bleu,
    "chrf": count_chrf,
    "superni_rougeL": count_superni,
}


class TextMetric(evaluate.Metric):
    """One of METRICS for code that uses the `evaluate` library. Nothing is written to its cache."""

    def __init__(self, name: str):
        self.count = METRICS[name]
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=self.count.__doc__,
            citation="",
            inputs_description="predictions: list[str]; references: list[list[str]], one or more for each prediction.",
            features=datasets.Features(features),
        )

    def add_batch(self, *, predictions: list[str], references: list[list[str]]) -> None:
        """Collects predictions and references. `compute` calls it, too, so that every row is checked."""
        check_pairs(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def _compute(self, predictions, references, **settings) -> dict[str, float | str]:
        figures, signatures = figures_and_signatures([self.count(predictions, references, **settings)])
        return figures | {f"{name}_signature": signature for name, signature in signatures.items()}
