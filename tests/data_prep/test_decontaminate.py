"""A copy of an evaluation text is found however it is written; what is no copy is let through."""

import pickle
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.data_prep.cleaning.decontaminate import ALONE, Decontaminate, PlainText, words_of
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Origin, Record

PARIS = "What is the capital of France, the country in Europe whose flag is blue, white and red?"


def record(source, output, instruction="Do it.", history=(), row=1):
    return Record(
        instruction=instruction, input=source, output=output, history=history, origin=Origin("test.jsonl", row)
    )


def records_of(pairs):
    return [record(*pair, row=row) for row, pair in enumerate(pairs, start=1)]


def long_texts(pairs, words=20):
    """Real sentences put together to texts of at least so many words."""
    texts, text = [], []
    for english, _ in pairs:
        text += english.split()
        if len(text) >= words:
            texts.append(" ".join(text))
            text = []
    return texts


def disguised(text, draw):
    """The same words in another case, with other spaces and signs."""
    words = [draw.choice([word.upper(), word.lower(), word.title()]) for word in words_of(text)]
    return "".join(word + draw.choice([" ", "  ", ", ", "\n", " — ", "! ", " \t"]) for word in words)


def index_of(texts, **settings):
    return Decontaminate.from_records([PlainText(text, Origin("t.txt", 1)) for text in texts], **settings)


def overlap(index, text):
    words = words_of(text)
    return index.equal([ALONE, *words]) or index.shared_run(words)


def test_what_is_found_is_shown_with_its_text():
    question = "Q: WHAT is the capital   of France, the country in Europe whose flag is blue, white, red?"
    found = overlap(index_of(["Something else.", PARIS]), question)
    assert found == ("what is the capital of france the country in europe whose flag is", 1)


def test_words_are_those_of_unicode():
    assert words_of("The NBA, 어제 봤다! 東京 Ｔｏｋｙｏ") == ["the", "nba", "어제", "봤다", "東", "京", "tokyo"]
    assert words_of("x_1 += f(é); カタカナ です") == ["x", "1", "f", "é", "カタカナ", "で", "す"]
    assert words_of("가") == words_of("\u1100\u1161")
    assert words_of(" …!? ") == []


def test_every_eval_text_is_found_whatever_its_case_spaces_and_signs(pairs):
    draw = random.Random(0)
    texts = [*long_texts(pairs), *(side for pair in pairs for side in pair)]
    index = index_of(texts)
    for text in texts:
        assert overlap(index, text), text
        assert overlap(index, disguised(text, draw)), text


@settings(deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_with_a_word_is_found_again(texts):
    index = index_of(texts)
    for text in texts:
        found = overlap(index, text)
        assert (found is not None) == bool(words_of(text))


def test_a_long_text_is_found_inside_others(pairs):
    draw = random.Random(1)
    evaluation = long_texts(pairs[1600:])
    index = index_of(evaluation)
    for number, text in enumerate(evaluation):
        around = f"{draw.choice(pairs[:800])[0]} {disguised(text, draw)} {draw.choice(pairs[:800])[0]}"
        found = overlap(index, around)
        assert found[0] in " ".join(words_of(text)) and len(found[0].split()) == 13
        assert evaluation[found[1]] == text or found[1] < number


def test_texts_of_eight_to_twelve_words_are_found_inside_others():
    nine = "Every green bottle on this wall may accidentally fall."
    assert len(words_of(nine)) == 9
    index = index_of([nine])
    assert overlap(index, f"He said: “{nine.upper()}” And then?")[0] == " ".join(words_of(nine))
    assert overlap(index, nine.replace("wall", "floor")) is None


def test_shorter_texts_are_found_only_as_a_whole():
    index = index_of(["How are you today?"])
    assert overlap(index, "how are you, today")
    assert overlap(index, "How are you today, my dear friend from far away?") is None


def test_twelve_words_of_a_long_text_are_no_overlap():
    words = words_of(PARIS)
    index = index_of([PARIS])
    assert overlap(index, " ".join(["so", *words[:13], "so"]))[0] == " ".join(words[:13])
    assert overlap(index, " ".join(["so", *words[:12], "so", *words[13:]])) is None


def test_unrelated_texts_are_let_through(pairs):
    """Tatoeba's halves share no long text; what is found are its sentences that stand in both."""
    evaluation, train = records_of(pairs[::2]), records_of(pairs[1::2])
    check = Decontaminate.from_records(evaluation).check
    wholes = {key for row in evaluation for key in (tuple(words_of(row.input)), tuple(words_of(row.output)))}
    for row in train:
        if check(row):
            assert tuple(words_of(row.input)) in wholes or tuple(words_of(row.output)) in wholes
    strangers = [record("def f(x): return x + 1", "It adds one to x, and returns what comes of it, a number.")]
    assert not any(map(check, strangers))


def test_a_row_is_the_evaluation_row_by_instruction_and_input_or_by_input_and_output():
    check = Decontaminate.from_records([record("n = 5", "120", instruction="Compute n!")]).check
    kind, reason = check(record("N = 5", "24", instruction="compute N"))
    assert kind == "overlaps the evaluation data"
    assert reason == "The row is the same as test.jsonl:1: “compute n n 5”."
    assert check(record("n = 5", "120", instruction="What is the factorial?"))
    assert check(record("120", "n = 5", instruction="The other direction."))
    assert check(record("n = 5", "15", instruction="Add up to n.")) is None
    assert check(record("n = 6", "120", instruction="Compute n/2 * 40.")) is None


def test_a_target_as_short_as_yes_is_no_overlap():
    check = Decontaminate.from_records([record("Is it raining?", "Yes.")]).check
    assert check(record("Do you like it here, in this old house?", "Yes.")) is None


def test_a_plain_text_is_a_whole_source_or_a_run_and_no_short_target():
    lines = ["How are you?", PARIS, "…"]
    index = Decontaminate.from_records([PlainText(line, Origin("t.txt", row)) for row, line in enumerate(lines, 1)])
    check = index.check
    assert check(record("HOW are you", "Fine."))[1] == "The source is the same as t.txt:1: “how are you”."
    assert check(record("", "Fine.", instruction="How are you?"))
    assert check(record("How are you, my friend?", "Fine.")) is None
    assert check(record("Say it.", "How are you?")) is None
    assert "The target shares a run of words with t.txt:2" in check(record("Ask me.", f"So: {PARIS}"))[1]
    assert check(record("!", "?", instruction="!")) is None
    rows = Decontaminate.from_records([record("", "Fine.", instruction="Greet me.")]).check
    assert rows(record("Greet me.", "Hi.", instruction="Do:")) is None  # a row is not a plain text


def test_targets_and_history_are_searched_as_well():
    check = Decontaminate.from_records([record("A question?", PARIS)]).check
    assert "The target shares a run of words with test.jsonl:1" in check(record("Ask me.", PARIS.upper()))[1]
    turn = record("And now?", "Well.", history=(("Ask me.", f"Here: {PARIS}"),))
    assert "The history shares a run of words with test.jsonl:1" in check(turn)[1]
    assert check(record("Ask me.", "No.")) is None


def test_an_instruction_with_inputs_is_not_compared_alone():
    instruction = "Translate the following sentence from English into Korean and keep the tone of the original."
    check = Decontaminate.from_records([record("Go.", "가.", instruction=instruction)]).check
    assert check(record("Stop.", "멈춰.", instruction=instruction)) is None
    assert check(record("Go.", "가라.", instruction=instruction))


def test_the_first_turn_alone_is_not_the_later_one():
    history = (("Tell me a joke.", "No."),)
    check = Decontaminate.from_records([record("", "Fine.", instruction="Thanks!", history=history)]).check
    assert check(record("", "Welcome.", instruction="Thanks!")) is None
    assert check(record("", "Other.", instruction="thanks", history=history))


def test_what_more_than_ten_eval_texts_share_is_boilerplate():
    frame = "Answer the following question as well as you can and explain why you think so:"
    ten = index_of([f"{frame} number {n} of all my many different questions" for n in range(10)])
    eleven = [f"{frame} number {n} of all my many different questions" for n in range(11)]
    assert overlap(ten, f"{frame} something new")
    assert overlap(index_of(eleven), f"{frame} something new") is None
    assert all(overlap(index_of(eleven), text) for text in eleven)


def test_a_text_that_is_repeated_in_the_eval_set_is_no_boilerplate():
    assert overlap(index_of([PARIS] * 50), f"Well: {PARIS}")


@pytest.mark.parametrize(
    "run", ["0 " * 20, "1 2 3 4 5 6 7 8 9 10 11 12 13 14", "arr j arr j 1 let temp arr j arr j arr k"]
)
def test_numbers_and_stammering_are_no_overlap(run):
    index = index_of([run])
    assert overlap(index, f"so {run} so") is None
    assert overlap(index, run)


def test_it_travels_to_workers_and_is_small(pairs):
    records = records_of(pairs)
    index = Decontaminate.from_records(records)
    there = pickle.loads(pickle.dumps(index))
    assert all(there.check(row) == index.check(row) for row in records[:50])
    assert index.runs.nbytes + index.run_texts.nbytes == 12 * len(index.runs)
    assert (index.runs[1:] > index.runs[:-1]).all() and (index.wholes[1:] > index.wholes[:-1]).all()


def test_an_empty_eval_set_finds_nothing():
    assert overlap(index_of([]), PARIS) is None
    assert overlap(index_of(["", "…"]), "…") is None
    assert Decontaminate.from_records([]).check(record("a", "b")) is None


def test_other_run_lengths():
    eight = index_of([PARIS], ngram=8)
    assert re.fullmatch(r"(\w+ ){7}\w+", overlap(eight, f"so {' '.join(words_of(PARIS)[2:10])} so")[0])
    with pytest.raises(UserError, match="8 to 13"):
        index_of([PARIS], ngram=1)
