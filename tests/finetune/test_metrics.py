"""Each metric gives its backend's own figure, and what is ours, the tokens and the references, is as written."""

import json
import re
from collections import Counter

import nltk
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.evaluating.metrics import (
    METRICS,
    choose_bleu_tokenize,
    compute_metrics,
    edit_distance,
    is_improvement,
    score_texts,
    split_tokens,
)

pytestmark = pytest.mark.usefixtures("no_mecab")

ENGLISH = ["I am a student at the old school.", "The cat sat on the mat!", "He bought two dogs, and a cat."]
ENGLISH_REFERENCES = [
    ["I am a student of the old school.", "I study at an old school."],
    ["A cat sat on the mat.", "The cat was sitting on the mat.", "On the mat sat the cat."],
    ["He bought two dogs and one cat."],
]
KOREAN = ["나는 오래된 학교의 학생이다.", "고양이가 매트 위에 앉았다.", "그는 개 두 마리와 고양이를 샀다."]
KOREAN_REFERENCES = [
    ["나는 오래된 학교의 학생입니다."],
    ["고양이가 매트 위에 앉아 있었다.", "매트 위에 고양이가 앉았다."],
    ["그는 개 두 마리와 고양이 한 마리를 샀다."],
]


def test_tokens_are_words_or_syllables_without_case_or_punctuation():
    assert split_tokens("The NBA를 봤다!") == ["the", "nba", "를", "봤", "다"]
    assert split_tokens("naïve café, x_y, 1+1") == ["naïve", "café", "x", "y", "1", "1"]
    assert split_tokens("हिन्दी 東京タワー") == ["हिन्दी", "東", "京", "タ", "ワ", "ー"]
    assert split_tokens("\u1112\u1161\u11ab") == split_tokens("한") == ["한"]  # decomposed as macOS does it


@pytest.mark.parametrize("text", [*ENGLISH, "it's 3.5% of GDP -- or_more", ""])
def test_tokens_of_ascii_text_are_those_of_rouge_score(text):
    assert split_tokens(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_rouge_on_english_is_rouge_scores_own_figure():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    rows = [scorer.score_multi(refs, text) for refs, text in zip(ENGLISH_REFERENCES, ENGLISH, strict=True)]
    scores = compute_metrics(["rouge"], ENGLISH, ENGLISH_REFERENCES)
    for name in ("rouge1", "rouge2", "rougeL"):
        assert scores[name] == pytest.approx(100 * sum(row[name].fmeasure for row in rows) / 3)


def test_rouge_sees_korean_where_the_default_tokenizer_sees_nothing():
    assert RougeScorer(["rouge1"]).score(KOREAN[0], KOREAN[0])["rouge1"].fmeasure == 0
    scores = compute_metrics(["rouge"], KOREAN, KOREAN_REFERENCES)
    assert 50 < scores["rouge2"] < scores["rouge1"] < 100
    same = compute_metrics(["rouge"], KOREAN, [[text] for text in KOREAN])
    assert same == {"rouge1": 100, "rouge2": 100, "rougeL": 100}


def squad_f1(prediction, reference):
    """The official SQuAD 1.1 figure, as the paper's appendix and its evaluation script define it."""

    def normalized(text):
        text = "".join(character for character in text.lower() if character.isalnum() or character.isspace())
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    predicted, expected = normalized(prediction), normalized(reference)
    same = sum((Counter(predicted) & Counter(expected)).values())
    if same == 0:
        return 0
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def test_token_f1_on_english_is_squads():
    best = [
        max(squad_f1(text, reference) for reference in refs)
        for text, refs in zip(ENGLISH, ENGLISH_REFERENCES, strict=True)
    ]
    scores = compute_metrics(["token_f1"], ENGLISH, ENGLISH_REFERENCES)
    assert scores["token_f1"] == pytest.approx(100 * sum(best) / 3)


def test_token_f1_of_a_wrong_korean_particle_is_small_harm_and_silence_is_right_only_when_due():
    assert compute_metrics(["token_f1"], ["학생이"], [["학생은"]])["token_f1"] == pytest.approx(200 / 3)
    silent = compute_metrics(["token_f1"], ["", "", "a"], [[""], ["말"], ["말"]])
    assert silent["token_f1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("one", "near", "other"),
    [
        ("ฉันเป็นนักเรียนที่โรงเรียนนี้", "ฉันเป็นนักเรียนที่โรงเรียนนั้น", "กรุงเทพ"),  # Thai
        ("ຂ້ອຍເປັນນັກຮຽນຢູ່ໂຮງຮຽນນີ້", "ຂ້ອຍເປັນນັກຮຽນຢູ່ໂຮງຮຽນນັ້ນ", "ວຽງຈັນ"),  # Lao
        ("ខ្ញុំជាសិស្សនៅសាលានេះ", "ខ្ញុំជាសិស្សនៅសាលានោះ", "ភ្នំពេញ"),  # Khmer
        ("ကျွန်တော်သည်ဒီကျောင်းမှကျောင်းသားဖြစ်သည်", "ကျွန်တော်သည်ဒီကျောင်းကကျောင်းသားဖြစ်သည်", "ရန်ကုန်"),  # Burmese
        ("ང་སློབ་གྲྭ་འདིའི་སློབ་མ་ཡིན།", "ང་སློབ་གྲྭ་དེའི་སློབ་མ་ཡིན།", "ལྷ་ས།"),  # Tibetan
    ],
)
def test_near_texts_of_scripts_without_spaces_score_near_100(one, near, other):
    assert 60 < compute_metrics(["token_f1"], [one], [[near]])["token_f1"] < 100
    assert compute_metrics(["token_f1"], [other], [[near]])["token_f1"] < 50
    figures = compute_metrics(["rouge", "bleu"], [one], [[near]])
    assert all(40 < figure < 100 for figure in figures.values())
    assert choose_bleu_tokenize([[one]]) == "char"


@pytest.mark.parametrize(
    ("one", "other"), [("?", "!"), ("👍👍", "👎"), ("…", "👍"), ("a", "the"), ("", "?"), ("", "the")]
)
def test_texts_without_words_score_100_against_themselves_alone(one, other):
    names = ["token_f1", "rouge", "bleu", "chrf", "exact_match"]
    assert not any(compute_metrics(names, [one, other], [[other], [one]]).values())
    assert compute_metrics(["token_f1"], [one], [[one]])["token_f1"] == 100


def test_exact_match_means_every_character_of_one_reference():
    scores = compute_metrics(
        ["exact_match"], ["Go.", "go.", "Go. ", "Go."], [["Run.", "Go."], ["Go."], ["Go."], ["Go.", "Go."]]
    )
    assert scores == {"exact_match": 50}


def test_bleu_and_chrf_with_one_reference_each_are_sacrebleus():
    for texts, rows, tokenize in ((ENGLISH, ENGLISH_REFERENCES, "13a"), (KOREAN, KOREAN_REFERENCES, "char")):
        first = [row[0] for row in rows]
        bleu, signatures = score_texts(["bleu"], texts, [[text] for text in first])
        assert bleu["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [first], tokenize=tokenize).score)
        assert f"tok:{tokenize}" in signatures["bleu"] and "nrefs:1" in signatures["bleu"]
        chrf = compute_metrics(["chrf"], texts, [[text] for text in first])
        assert chrf["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [first]).score)


def test_different_numbers_of_references_score_as_if_each_row_repeated_its_own():
    """Repeating a row's reference changes neither clipped counts nor the closest length; None must act the same."""
    widest = max(len(row) for row in ENGLISH_REFERENCES)
    repeated = [row + row[:1] * (widest - len(row)) for row in ENGLISH_REFERENCES]
    streams = [list(stream) for stream in zip(*repeated, strict=True)]
    ours = compute_metrics(["bleu", "chrf"], ENGLISH, ENGLISH_REFERENCES)
    assert ours["bleu"] == pytest.approx(sacrebleu.corpus_bleu(ENGLISH, streams, tokenize="13a").score)
    assert ours["chrf"] == pytest.approx(sacrebleu.corpus_chrf(ENGLISH, streams).score)
    only_first = compute_metrics(["bleu"], ENGLISH, [row[:1] for row in ENGLISH_REFERENCES])
    assert ours["bleu"] > only_first["bleu"]
    assert "nrefs:var" in score_texts(["bleu"], ENGLISH, ENGLISH_REFERENCES)[1]["bleu"]


def test_bleu_tokenisation_follows_the_script_of_the_references_unless_it_is_given():
    assert choose_bleu_tokenize(ENGLISH_REFERENCES) == "13a"
    assert choose_bleu_tokenize(KOREAN_REFERENCES) == "char"
    assert choose_bleu_tokenize(ENGLISH_REFERENCES + KOREAN_REFERENCES) == "char"
    assert choose_bleu_tokenize([["He moved from Busan (부산) to Seoul last year to work there."]]) == "13a"
    assert choose_bleu_tokenize([["123"], [""]]) == "13a"
    assert "tok:intl" in METRICS["bleu"](KOREAN, KOREAN_REFERENCES, tokenize="intl").signature


def test_a_tokenisation_that_is_unknown_or_not_installed_is_explained():
    with pytest.raises(UserError, match="Did you mean char"):
        METRICS["bleu"](["a"], [["a"]], tokenize="chars")


@given(st.lists(st.lists(st.sampled_from("ABC"), max_size=7), min_size=2, max_size=2))
def test_edit_distance_is_nltks(sequences):
    assert edit_distance(*sequences) == nltk.edit_distance(*sequences)


def test_token_error_rate_counts_edits_from_the_nearest_reference_over_its_tokens():
    references = [["AE1 B IY0"], ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"], ["DH AH0", "DH IY0"]]
    perfect = [row[-1] for row in references]
    assert compute_metrics(["token_error_rate"], perfect, references) == {"token_error_rate": 0}
    said = ["AE1 B B IY1", "T AH0 M AA1 T", ""]  # an insertion and a substitution; a deletion; two deletions
    rate = compute_metrics(["token_error_rate"], said, references)["token_error_rate"]
    assert rate == pytest.approx(100 * (2 + 1 + 2) / (3 + 6 + 2))
    assert not is_improvement("token_error_rate", rate, best=10.0) and is_improvement("token_error_rate", 9.0, 10.0)


def test_all_figures_lie_between_0_and_100_also_for_empty_texts():
    of_texts = [name for name in METRICS if name != "json"]  # which refuses references that are not JSON
    figures = compute_metrics(of_texts, ["", "나는"], [["나는"], [""]])
    assert figures.pop("token_error_rate") == 100
    superni = {"superni_rougeL", "superni_exact_match"}
    assert set(figures) == {"exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf"} | superni
    assert all(value == 0 for value in figures.values())
    for texts in (ENGLISH, KOREAN):
        perfect = compute_metrics(of_texts, texts, [[text] for text in texts])
        assert perfect.pop("token_error_rate") == 0
        if texts is KOREAN:
            assert perfect.pop("superni_rougeL") == 0
        assert all(value == pytest.approx(100) for value in perfect.values())


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "at least one prediction"),
        (["a"], [], "got 1 predictions and 0 lists of references"),
        (["a"], [[]], r"references\[0\] must hold one string or more"),
        (["a"], ["a"], r"references\[0\] must be a list of strings, got a string"),
        ([1], [["a"]], r"predictions\[0\] must be a string, got int"),
    ],
)
@pytest.mark.parametrize("name", METRICS)
def test_pairs_that_do_not_fit_are_refused(name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics([name], predictions, references)


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(UserError, match="no metric 'chrff'. Did you mean chrf[?] Choose from: exact_match, token_f1"):
        compute_metrics(["bleu", "chrff"], ["a"], [["a"]])


def superni_figures(predictions, references):
    """What the benchmark's script says it does: each pair by itself, the best reference, stemmed; 0 to 100."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def normalized(text):
        return " ".join(re.sub(r"[!-/:-@\[-`{-~]", "", text.lower()).split())

    pairs = list(zip(predictions, references, strict=True))
    best = [max(scorer.score(r, p)["rougeL"].fmeasure for r in refs) for p, refs in pairs]
    exact = [any(normalized(p) == normalized(r) for r in refs) for p, refs in pairs]
    return {"superni_rougeL": 100 * sum(best) / len(best), "superni_exact_match": 100 * sum(exact) / len(exact)}


def test_super_ni_figures_are_the_benchmarks():
    predictions = [*ENGLISH, "  the CAT  sat on the mat", "Running dogs.", "café!"]
    references = [*ENGLISH_REFERENCES, ["No.", "The cat sat, on the mat!"], ["He runs a dog"], ["Café"]]
    figures, signatures = score_texts(["superni_rougeL"], predictions, references)
    assert figures == pytest.approx(superni_figures(predictions, references))
    assert figures["superni_exact_match"] == pytest.approx(100 * 2 / 6)  # case and punctuation, but not letters
    assert figures["superni_rougeL"] > compute_metrics(["rouge"], predictions, references)["rougeL"], "it stems"
    assert signatures["superni_rougeL"] == "tok:rouge-score|stem:porter"


def test_super_ni_says_how_many_references_it_cannot_see():
    _, signatures = score_texts(["superni_rougeL"], [*ENGLISH, *KOREAN], [*ENGLISH_REFERENCES, *KOREAN_REFERENCES])
    assert "3 of 6 score 0 whatever they say" in signatures["superni_rougeL"]


@pytest.mark.parametrize("name", METRICS)
def test_what_was_counted_on_some_rows_gives_the_figures_of_these_rows(name):
    predictions, references = [*ENGLISH, *KOREAN], [*ENGLISH_REFERENCES, *KOREAN_REFERENCES]
    if name == "json":
        predictions, references = map(json.dumps, predictions), [[*map(json.dumps, row)] for row in references]
        predictions = list(predictions)
    counted = METRICS[name](predictions, references)
    settings = {"tokenize": "char"} if name == "bleu" else {}
    rows = [4, 0, 0, 3]
    drawn = METRICS[name]([predictions[row] for row in rows], [references[row] for row in rows], **settings)
    assert counted.figures_of(counted.counts[rows].sum(axis=0)) == pytest.approx(drawn.figures())
