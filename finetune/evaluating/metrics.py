"""Scores for generated text: `evaluate.Metric` classes that are instantiated directly and need no network.

    compute_metrics(["exact_match", "chrf"], predictions=["학생이다."], references=[["학생이야.", "학생이다."]])
    -> {"exact_match": 100.0, "chrf": 100.0}

N predictions (strings) and, for each, a list of one or more references; every figure lies between 0 and 100, and more
is better, except for token_error_rate: of it less is better, and it can exceed 100.
A prediction earns what its best reference gives it (exact_match, token_f1, rouge, chrf, token_error_rate) or is
matched against all of them together (bleu). Most counting is done by sacrebleu (Post 2018,
https://aclanthology.org/W18-6319) and rouge-score; what is decided here is how text becomes tokens, because their
defaults were made for English: rouge-score drops every letter outside a-z ("나는 학생이다" has no tokens at all), and
BLEU over Korean words punishes a wrong particle like a wrong word. `superni_rougeL` alone keeps those defaults, to be
comparable with the figures that are published for Super-NaturalInstructions.

Each metric first counts, prediction by prediction (`Statistics`), and its figures follow from the sums. So
confidence.py has them for a thousand resamples of the predictions without reading a text again.
"""

import math
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import datasets
import evaluate
import numpy as np
import regex
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError

# Hangul, Han and kana are read one character at a time: Korean glues particles and endings to the word, Chinese and
# Japanese write no spaces. Counting overlap by syllable is also what KorQuAD's official F1 does. Thai, Lao, Khmer and
# Burmese write no spaces, either (breaking their lines takes a dictionary: that is what the property says): they
# are read one character with its marks at a time. Tibetan marks its syllables, which are tokens here; BLEU's 13a does
# not cut at these marks, so that it takes the characters of Tibetan.
_CHARACTER_SCRIPTS = r"\p{Hangul}\p{Han}\p{Hiragana}\p{Katakana}\p{Line_Break=Complex_Context}"
_TOKEN = regex.compile(rf"(?=[{_CHARACTER_SCRIPTS}])\X|[[\p{{L}}\p{{M}}\p{{N}}]--[{_CHARACTER_SCRIPTS}]]+", regex.V1)
_LETTER = regex.compile(r"\p{L}")
_CHARACTER_SCRIPT_LETTER = regex.compile(rf"[[{_CHARACTER_SCRIPTS}\p{{Tibetan}}]&&\p{{L}}]", regex.V1)
_ENGLISH_ARTICLES = {"a", "an", "the"}
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def split_tokens(text: str) -> list[str]:
    """`"The NBA를 봤다!"` -> `["the", "nba", "를", "봤", "다"]`: words, and syllables where a script asks for it.

    NFKC first, so that Hangul decomposed by macOS equals Hangul as it is typed; case folded; punctuation dropped,
    unless there is nothing else: `"?!"` -> `["?", "!"]`. On other ASCII text these are the tokens of rouge-score's own
    default tokenizer.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return _TOKEN.findall(text) or regex.findall(r"\X", "".join(text.split()))


def choose_bleu_tokenize(references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's `char` where at least a tenth of the references' letters are of a script without spaces, or Hangul;
    otherwise `13a`.

    `13a` is the WMT default. It leaves Korean words whole, so that short sentences seldom share four of them in a
    row; sacrebleu's own choice for Korean, `ko-mecab`, needs a dictionary that is not installed here. A tenth, not a
    half: a split with both directions of English-Korean is then scored by characters throughout, while an English
    text that names a Korean city is not. Figures with different tokenisations cannot be compared; the signature
    says which one was used.
    """
    text = "".join(reference for row in references for reference in row)
    letters = len(_LETTER.findall(text))
    return "char" if letters and len(_CHARACTER_SCRIPT_LETTER.findall(text)) >= letters / 10 else "13a"


def check_pairs(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """UserError unless there is at least one prediction, and one non-empty list of strings for each."""
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
            raise UserError(f"references[{row}] must hold one string or more, got {row_references!r}.")


def reference_streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Rows of references -> sacrebleu's streams, as many as the longest row, `None` where a row has fewer.

    `[["a", "b"], ["c"]]` -> `[["a", "c"], ["b", None]]`. A stream cut to the shortest row would lose references;
    one filled with `""` would add an empty reference, which BLEU's brevity penalty takes as the closest length.
    """
    return [list(stream) for stream in zip_longest(*references)]


class Statistics(NamedTuple):
    """What was counted for each of N predictions, K numbers each, and what figures their sums give."""

    counts: np.ndarray
    """(N, K), float64."""
    figures_of: Callable[[np.ndarray], dict[str, float]]
    """Sums over any choice of rows (K,) -> name and value of each figure."""
    signature: str = ""
    """With what it was computed, where that is a choice: figures with different signatures cannot be compared."""

    def figures(self) -> dict[str, float]:
        """Those of all rows. Their sum is exact, so that it does not matter in which order they came."""
        return self.figures_of(np.array([math.fsum(column) for column in self.counts.T]))


def mean_percentages(names: Sequence[str], scores: Sequence[Sequence[float]]) -> Statistics:
    """Scores between 0 and 1, for each prediction one of each name -> the means of the names, times 100."""
    counts = np.column_stack([np.array(scores, dtype=np.float64), np.ones(len(scores))])

    def figures_of(sums: np.ndarray) -> dict[str, float]:
        return {name: 100 * float(total) / float(sums[-1]) for name, total in zip(names, sums[:-1], strict=True)}

    return Statistics(counts, figures_of)


def ratio(name: str, parts: Sequence[float], wholes: Sequence[float], scale: float = 1.0) -> Statistics:
    """Sum of the parts ÷ sum of the wholes: `ratio("loss", nats, target_tokens)`."""
    counts = np.column_stack([np.array(parts, dtype=np.float64), np.array(wholes, dtype=np.float64)])
    return Statistics(counts, lambda sums: {name: scale * float(sums[0]) / float(sums[1])})


class TextMetric(evaluate.Metric):
    """What the metrics share: string features, checked pairs, and nothing written to the metrics cache."""

    description = ""
    citation = ""

    def __init__(self, **settings):
        super().__init__(keep_in_memory=True, **settings)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions: list[str]; references: list[list[str]], one or more for each prediction.",
            features=datasets.Features(features),
        )

    def add_batch(self, *, predictions: list[str], references: list[list[str]]) -> None:
        """Collect predictions and their references; `compute` calls it too, so that every row is checked."""
        check_pairs(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def count(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        raise NotImplementedError

    def _compute(self, predictions, references, **settings) -> dict[str, float | str]:
        statistics = self.count(predictions, references, **settings)
        figures = statistics.figures()
        signed = {f"{name}_signature": statistics.signature for name in figures if statistics.signature}
        return figures | signed


class ExactMatch(TextMetric):
    description = "Percentage of predictions that equal one of their references, character by character."

    def count(self, predictions, references) -> Statistics:
        hits = [[prediction in row] for prediction, row in zip(predictions, references, strict=True)]
        return mean_percentages(["exact_match"], hits)


class TokenF1(TextMetric):
    """SQuAD's F1 (Rajpurkar et al. 2016): bags of tokens, articles and punctuation dropped, best reference counts."""

    description = (
        "Mean F1 of token overlap. Tokens are words, or characters in Hangul, Han, kana, Thai and other scripts \
without spaces; English articles, case and punctuation do not count."
    )

    def count(self, predictions, references) -> Statistics:
        scores = [
            [max(_token_f1(prediction, reference) for reference in row)]
            for prediction, row in zip(predictions, references, strict=True)
        ]
        return mean_percentages(["token_f1"], scores)


def _token_f1(prediction: str, reference: str) -> float:
    predicted, expected = _without_articles(split_tokens(prediction)), _without_articles(split_tokens(reference))
    if not predicted or not expected:
        return float(predicted == expected)  # nothing to say and nothing said is right, as in SQuAD 2.0
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def _without_articles(tokens: list[str]) -> list[str]:
    """Unless there is nothing else: "a" as an answer is not "the"."""
    return [token for token in tokens if token not in _ENGLISH_ARTICLES] or tokens


class TokenErrorRate(TextMetric):
    """Of phonemes it is the phoneme error rate, of words the word error rate of speech recognition."""

    description = "Insertions, deletions and substitutions per 100 tokens of the nearest reference. Tokens are what \
stands between spaces, as it is written."

    def count(self, predictions, references) -> Statistics:
        nearest = [
            min((edit_distance(prediction.split(), reference.split()), -len(reference.split())) for reference in row)
            for prediction, row in zip(predictions, references, strict=True)
        ]
        edits, tokens = zip(*nearest, strict=True)
        return ratio("token_error_rate", edits, [max(1, -count) for count in tokens], scale=100)


def edit_distance(predicted: Sequence[str], expected: Sequence[str]) -> int:
    """Levenshtein's: the fewest insertions, deletions and substitutions that make one sequence the other."""
    columns = np.arange(len(expected) + 1)
    tokens, row = np.array(expected, dtype=object), columns
    for number, token in enumerate(predicted, start=1):
        substituted, deleted = row[:-1] + (tokens != token), row[1:] + 1
        row = np.concatenate([[number], np.minimum(substituted, deleted)])
        row = np.minimum.accumulate(row - columns) + columns  # insertions, from left to right
    return int(row[-1])


class _RougeTokens:
    """The tokenizer object that RougeScorer asks for."""

    def tokenize(self, text: str) -> list[str]:
        return split_tokens(text)


class Rouge(TextMetric):
    description = "Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L without stemming, over words, or over characters \
in Hangul, Han, kana, Thai and other scripts without spaces."

    def count(self, predictions, references) -> Statistics:
        names = ["rouge1", "rouge2", "rougeL"]
        scorer = RougeScorer(names, tokenizer=_RougeTokens())
        rows = [scorer.score_multi(row, guess) for guess, row in zip(predictions, references, strict=True)]
        return mean_percentages(names, [[row[name].fmeasure for name in names] for row in rows])


class SuperNiRougeL(TextMetric):
    """As compute_metrics.py of Tk-Instruct (Wang et al. 2022, arXiv 2204.07705) has them for its English tracks.

    ROUGE-L with rouge-score's own tokens, stemmed: letters a-z and digits, in lower case. Text in any other script has
    no tokens and scores 0 even where it is right; the signature says how many predictions that touches. Exact match is
    without case, ASCII punctuation and surplus spaces. Both take the best reference.
    """

    description = "ROUGE-L with Porter stemming and exact match without case and punctuation, as \
Super-NaturalInstructions computes them. For text in Latin letters without accents only."

    def count(self, predictions, references) -> Statistics:
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        scores, unseen = [], 0
        for prediction, row in zip(predictions, references, strict=True):
            said, wanted = _superni_normalised(prediction), [_superni_normalised(reference) for reference in row]
            scores.append([scorer.score_multi(row, prediction)["rougeL"].fmeasure, said in wanted])
            unseen += not any(regex.search("[a-z0-9]", text) for text in wanted)
        signature = "tok:rouge-score|stem:porter"
        if unseen:
            signature += f"|{unseen} of {len(scores)} score 0 whatever they say: their references have no letter a-z"
        return mean_percentages(["superni_rougeL", "superni_exact_match"], scores)._replace(signature=signature)


def _superni_normalised(text: str) -> str:
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


class Bleu(TextMetric):
    description = "Corpus BLEU of sacrebleu; `tokenize` is chosen by the references' script unless it is given."

    def count(self, predictions, references, tokenize: str | None = None) -> Statistics:
        scorer = _sacrebleu_scorer(tokenize or choose_bleu_tokenize(references))
        return _sacrebleu_statistics("bleu", scorer, predictions, references)


def _sacrebleu_scorer(tokenize: str) -> sacrebleu.BLEU:
    known = sorted(name for name in sacrebleu.BLEU.TOKENIZERS)
    if tokenize not in known:
        raise UserError(f"bleu has no tokenisation {tokenize!r}. {choose_from(tokenize, known)}")
    try:
        # force: sacrebleu's warning about text that looks tokenised already is about system outputs of shared tasks
        return sacrebleu.BLEU(tokenize=tokenize, force=True)
    except (RuntimeError, OSError) as error:  # a tokenisation's own package is not installed, or its model not found
        raise UserError(f"bleu with tokenize={tokenize!r} cannot start: {' '.join(str(error).split())}") from error


class Chrf(TextMetric):
    description = "Corpus chrF2 of sacrebleu: character n-grams up to 6, so that no tokenisation is needed."

    def count(self, predictions, references) -> Statistics:
        return _sacrebleu_statistics("chrf", sacrebleu.CHRF(), predictions, references)


def _sacrebleu_statistics(
    name: str, scorer: sacrebleu.BLEU | sacrebleu.CHRF, predictions: list[str], references: list[list[str]]
) -> Statistics:
    """n-grams in the prediction, in the reference and in both, and lengths, from which sacrebleu makes corpus scores.

    Its own significance tests start from these two functions; its corpus_score is nothing but both in a row.
    """
    counts = scorer._extract_corpus_statistics(predictions, reference_streams(references))

    def figures_of(sums: np.ndarray) -> dict[str, float]:
        return {name: scorer._compute_score_from_stats(sums.tolist()).score}

    return Statistics(np.array(counts, dtype=np.float64), figures_of, str(scorer.get_signature()))


def check_metric_names(names: Sequence[str]) -> None:
    """UserError that names the nearest metric, so that a typing error is found before hours of generation."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"there is no metric {name!r}. {choose_from(name, list(METRICS))}")


def count_texts(
    names: Sequence[str],
    predictions: list[str],
    references: list[list[str]],
    bleu_tokenize: str | None = None,
) -> dict[str, Statistics]:
    """For each named metric what it counted, prediction by prediction."""
    check_metric_names(names)
    check_pairs(predictions, references)
    settings = {"bleu": {"tokenize": bleu_tokenize}}
    return {
        name: METRICS[name]().count(predictions, references, **settings.get(name, {})) for name in dict.fromkeys(names)
    }


def figures_and_signatures(counted: Sequence[Statistics]) -> tuple[dict[str, float], dict[str, str]]:
    """What the statistics give, and the signatures, by the name of the figure, without which none can be compared."""
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
    """`["rouge", "chrf"]` -> `{"rouge1": …, "rouge2": …, "rougeL": …, "chrf": …}`, all between 0 and 100."""
    return score_texts(names, predictions, references)[0]


METRICS: dict[str, type[evaluate.Metric]] = {
    "exact_match": ExactMatch,
    "token_f1": TokenF1,
    "token_error_rate": TokenErrorRate,
    "rouge": Rouge,
    "bleu": Bleu,
    "chrf": Chrf,
    "superni_rougeL": SuperNiRougeL,
}
