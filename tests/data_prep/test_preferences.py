"""Answers that were judged: every way to write them is read, nothing faulty passes, and tables and packed rows hold
what training relies on: both answers of each example, as each would be prepared alone."""

import json

import datasets
import numpy
import pytest

from diptych.data_prep.packing.packed_row import MARKS_COLUMN, PACKED_COLUMNS, SHARED_COLUMN
from diptych.data_prep.prepare import main
from diptych.data_prep.rows.convert_rows import Directions
from diptych.data_prep.rows.format_table import FORMATS
from diptych.data_prep.rows.recognise_format import converter_for
from diptych.data_prep.rows.records import Languages, Origin, Record, Reject, Row

WORDS = "one two three four five six seven eight nine ten".split()
PAIRS = [
    {
        "instruction": "Say more of it.",
        "input": f"The {WORDS[n // 2 % 10]} of {n // 2}.",
        "output": "the reference, which is not read",
        "chosen": f"It is {WORDS[n % 10]}, {n}.",
        "rejected": f"No, {n} and {WORDS[n * 3 % 10]} it never was at all.",
        "chosen_score": 2.0,
        "rejected_score": 1.0,
    }
    for n in range(60)
]
MARKED = [
    {"prompt": f"Name {n // 2}.", "completion": f"This is {WORDS[n % 10]} {n}.", "label": n % 3 == 0}
    for n in range(80)
]


@pytest.fixture
def prepare(tmp_path, bpe_folder, write_rows, capsys):
    """prepare(rows, …) → exit code, standard output, standard error, the folder."""

    def run(rows, *arguments, out="prepared", tokenizer=bpe_folder):
        data = ["--data", write_rows(f"{out}.jsonl", rows)] if rows else []
        arguments = [*data, "--tokenizer", tokenizer, "--out", tmp_path / out, *arguments]
        code = main(list(map(str, arguments)))
        return (code, *capsys.readouterr(), tmp_path / out)

    return run


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def rejects_of(folder):
    return {(it["row"], it["kind"]) for it in map(json.loads, (folder / "rejects.jsonl").read_text().splitlines())}


def rows_of(folder):
    return [row for table in datasets.load_from_disk(folder).values() for row in table]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def results(fields, *first, **options):
    """What becomes of a row, after first ones that decide the format."""
    rows = [
        Row(it, Origin("rows.jsonl", number), json.dumps(it)) for number, it in enumerate([*first, fields], start=1)
    ]
    converter = converter_for(rows[: len(first) or 1], "rows.jsonl", **options)
    return converter.format.name, converter.records(rows[-1])


def pair(instruction, input, chosen, rejected, instance=0, **more):
    origin = Origin("rows.jsonl", 1, instance)
    return Record(instruction=instruction, input=input, output=chosen, rejected=rejected, origin=origin, **more)


def marked(instruction, output, mark, **more):
    origin = Origin("rows.jsonl", 1)
    return Record(instruction=instruction, input="", output=output, mark=mark, origin=origin, **more)


# Every way to write them

HISTORY = {"system": "Be brief.", "history": (("Hi.", "Hello."),)}
TURNS = [{"role": "system", "content": "Be brief."}, user("Hi."), assistant("Hello."), user("Who?")]
ANSWERS = {"chosen": "Ann.", "rejected": "Bob."}
AS_TURN = {"chosen": assistant("Ann."), "rejected": assistant("Bob.")}
WHOLE = {"chosen": [*TURNS, assistant("Ann.")], "rejected": [*TURNS, assistant("Bob.")]}
PLAIN = pair("Who?", "", "Ann.", "Bob.")
AFTER_TURNS = pair("Who?", "", "Ann.", "Bob.", **HISTORY)
LISTS = {"chosen": [assistant("Ann.")], "rejected": [assistant("Bob.")]}
RATED = [{"response": "Bob.", "score": 1}, {"response": "Ann.", "score": 5.5}, {"response": "Al.", "score": 3}]

SPELLINGS = {
    "prompt": ({"prompt": "Who?", **ANSWERS}, [PLAIN]),
    "instruction": ({"instruction": "Who?", **ANSWERS}, [PLAIN]),
    "as rank writes": (
        {"instruction": "Add.", "input": "1", "output": "2", **ANSWERS}, [pair("Add.", "1", "Ann.", "Bob.")],
    ),
    "source": ({"source": "Who?", **ANSWERS}, [pair("", "Who?", "Ann.", "Bob.")]),
    "question": ({"question": "Who?", **ANSWERS}, [pair("Who?", "", "Ann.", "Bob.")]),
    "input alone": ({"input": "Who?", "output": "it", **ANSWERS}, [pair("", "Who?", "Ann.", "Bob.")]),
    "as rank writes conversations": ({"messages": [*TURNS, assistant("It.")], **ANSWERS}, [AFTER_TURNS]),
    "turns of a prompt": ({"prompt": TURNS, **ANSWERS}, [AFTER_TURNS]),
    "an answer as a turn": ({"prompt": "Who?", **AS_TURN}, [PLAIN]),
    "an answer as a list of one": ({"prompt": [user("Who?")], **LISTS}, [PLAIN]),
    "conversations that begin alike": (WHOLE, [AFTER_TURNS]),
    "as UltraFeedback binarized": ({"prompt": "Who?", **WHOLE, "messages": WHOLE["chosen"]}, [AFTER_TURNS]),
    "as JSON text": ({name: json.dumps(turns) for name, turns in WHOLE.items()}, [AFTER_TURNS]),
    "as hh-rlhf": (
        {
            "chosen": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: Ann.",
            "rejected": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: Bob.",
        },
        [pair("Who?", "", "Ann.", "Bob.", history=HISTORY["history"])],
    ),
    "as LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "Who?"}],
            "chosen": {"from": "gpt", "value": "Ann."},
            "rejected": {"from": "gpt", "value": "Bob."},
        },
        [PLAIN],
    ),
    "languages in columns": (
        {"input": "Go.", "chosen": "가.", "rejected": "가요", "source_language": "en", "target_language": "ko"},
        [pair("", "Go.", "가.", "가요", languages=Languages("en", "ko"))],
    ),
    "marked": ({"prompt": "Who?", "completion": "Ann.", "label": True}, [marked("Who?", "Ann.", 1)]),
    "marked by 0": ({"instruction": "Who?", "completion": "Ann.", "label": 0}, [marked("Who?", "Ann.", -1)]),
    "marked in a table": ({"prompt": "Who?", "completion": "Ann.", "label": "False"}, [marked("Who?", "Ann.", -1)]),
    "marked turns": (
        {"prompt": TURNS, "completion": [assistant("Ann.")], "label": "true"}, [marked("Who?", "Ann.", 1, **HISTORY)],
    ),
    "rated": ({"prompt": "Who?", "completions": RATED}, [PLAIN]),
    "ratings in a list": ({"instruction": "Who?", "responses": ["Bob.", "Ann."], "scores": [1, 2]}, [PLAIN]),
    "ratings of completions": ({"prompt": "Who?", "completions": ["Bob.", "Ann."], "ratings": [1, 2]}, [PLAIN]),
    "ratings in both places": ({"prompt": "Who?", "completions": RATED, "ratings": [3, 2, 1]}, [PLAIN]),
    "ratings of JSON": (
        {"prompt": "Who?", "responses": ["[1]", "{}"], "scores": [1, 2]}, [pair("Who?", "", "{}", "[1]")],
    ),
    "turns with ratings": ({"prompt": TURNS, "completions": RATED}, [AFTER_TURNS]),
    "edits": ({"src": "Go.", "mt": "가요", "pe": "가."}, [pair("To Korean:", "Go.", "가.", "가요")]),
}  # fmt: skip


@pytest.mark.parametrize("fields, expected", SPELLINGS.values(), ids=SPELLINGS)
def test_each_spelling_is_recognised_and_gives_exactly_these_records(fields, expected):
    name, found = results(fields, directions=Directions("To Korean:"))
    assert found == expected
    assert FORMATS[name].preferences == ("marks" if expected[0].mark else "pairs")


def test_a_text_that_looks_like_turns_is_a_text_where_most_rows_have_texts():
    looks = json.dumps([user("Ann.")])
    _, [found] = results({"prompt": "Who?", "chosen": looks, "rejected": "Bob."}, {"prompt": "Who?", **ANSWERS})
    assert found.output == looks and found.instruction == "Who?"


def test_all_pairs_of_ratings_are_made_if_asked_for_and_a_margin_leaves_some_out():
    fields = {
        "prompt": "Who?",
        "completions": [*RATED, {"response": "Eve.", "score": 3}, {"response": "Ann.", "score": 1}],
    }
    _, found = results(fields, rated_pairs="all")
    better = {("Ann.", "Al."), ("Ann.", "Eve."), ("Ann.", "Bob."), ("Al.", "Bob."), ("Eve.", "Bob.")}
    better |= {("Al.", "Ann."), ("Eve.", "Ann.")}
    assert {(it.output, it.rejected) for it in found} == better
    assert [it.origin.instance for it in found] == [1, 2, 3, 4, 5, 6, 7]
    many = {"prompt": "Who?", "responses": [f"{n}." for n in range(60)], "scores": list(range(60))}
    assert results(many, rated_pairs="all")[1][0].kind == "too many pairs" and len(results(many)[1]) == 1
    _, found = results(fields, rated_pairs="all", rated_margin=2.5)
    assert {(it.output, it.rejected) for it in found} == {("Ann.", "Al."), ("Ann.", "Eve."), ("Ann.", "Bob.")}


def test_a_row_is_no_pair_if_map_gives_its_chosen_answer_away_or_another_format_is_named():
    assert results({"instruction": "Who?", "output": "It.", **ANSWERS}, mapping={"output": "chosen"})[0] == "alpaca"
    assert results({"instruction": "Who?", "output": "It.", **ANSWERS}, name="alpaca")[0] == "alpaca"
    assert results({"prompt": "Who?", "completion": "It.", "label": "spam"})[0] == "prompt_completion"
    mapping = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert results({"q": "Who?", "good": "Ann.", "bad": "Bob."}, mapping=mapping) == ("preference", [PLAIN])


FAULTS = {
    "same text": ({"prompt": "Who?", "chosen": "Ann.", "rejected": "Ann."}, "same text in both answers"),
    "same turns": ({"chosen": WHOLE["chosen"], "rejected": WHOLE["chosen"]}, "same text in both answers"),
    "no chosen": ({"prompt": "Who?", "chosen": " ", "rejected": "Bob."}, "empty chosen"),
    "no rejected": ({"prompt": "Who?", "chosen": "Ann.", "rejected": ""}, "empty rejected"),
    "null": ({"prompt": "Who?", "chosen": "Ann.", "rejected": None}, "'rejected' is null"),
    "no turns": ({"prompt": "Who?", "chosen": "Ann.", "rejected": []}, "empty rejected"),
    "not text": ({"prompt": "Who?", "chosen": "Ann.", "rejected": 7}, "'rejected' is not a string"),
    "no prompt": (ANSWERS, "missing field 'prompt'"),
    "two turns": ({**WHOLE, "chosen": [*TURNS, assistant("A."), user("B."), assistant("C.")]}, "not one answer"),
    "not the assistant": ({"prompt": "Who?", "chosen": user("Ann."), "rejected": "Bob."}, "not one answer"),
    "nothing shared": ({**WHOLE, "chosen": [user("A."), assistant("B.")]}, "conversations without a shared beginning"),
    "another prompt": ({"prompt": "Where?", **WHOLE}, "answers to another prompt"),
    "no mark": ({"prompt": "Who?", "completion": "Ann.", "label": 0.5}, "'label' is neither true nor false"),
    "null mark": ({"prompt": "Who?", "completion": "Ann.", "label": None}, "'label' is neither true nor false"),
    "no answers": ({"prompt": "Who?", "responses": [], "scores": []}, "no completions"),
    "ties": ({"prompt": "Who?", "responses": ["A.", "B."], "scores": [1, 1.0]}, "no pair of ratings"),
    "one answer": ({"prompt": "Who?", "responses": ["A."], "scores": [1]}, "no pair of ratings"),
    "no number": ({"prompt": "Who?", "responses": ["A.", "B."], "scores": [1, "N/A"]}, "rating that is no number"),
    "NaN": ({"prompt": "Who?", "responses": ["A.", "B."], "scores": [1, float("nan")]}, "rating that is no number"),
    "fewer ratings": (
        {"prompt": "Who?", "responses": ["A.", "B."], "scores": [1]}, "answers and ratings differ in number",
    ),
    "nothing corrected": ({"src": "Go.", "mt": "가.", "pe": "가."}, "same text in both answers"),
}  # fmt: skip


@pytest.mark.parametrize("fields, kind", FAULTS.values(), ids=FAULTS)
def test_a_row_with_a_fault_is_a_reject_of_its_kind(fields, kind):
    sound = {
        "label": SPELLINGS["marked"], "scores": SPELLINGS["ratings in a list"], "pe": SPELLINGS["edits"],
    }  # fmt: skip
    first, _ = next((it for name, it in sound.items() if name in fields), SPELLINGS["prompt"])
    _, [found] = results(fields, first, directions=Directions("To Korean:"))
    assert isinstance(found, Reject) and found.kind == kind and found.reason


def test_tables_of_judged_answers_are_read_by_their_header(prepare, write_rows):
    lines = ["src\tmt\tpe", *(f"Go {n}.\t가요 {n}.\t가 {n}." for n in range(30))]
    code, said, error, folder = prepare(None, "--data", write_rows("edits.tsv", lines), "--forward", "To Korean:")
    assert code == 0 and "edits, recognised" in said, error
    assert {(row["target"][0], row["rejected"][:2]) for row in rows_of(folder)} == {("가", "가요")}
    lines = ["prompt,completion,label", *(f"Say {n}.,It is {n}.,{n % 2 == 0}" for n in range(30))]
    code, said, error, folder = prepare(None, "--data", write_rows("marked.csv", lines), "--validation_fraction", 0.1)
    assert code == 0 and "Marks      15 answers liked, 15 not liked" in said, error


def test_corrected_translations_need_an_instruction_or_languages(prepare):
    rows = [{"src": f"Go {n}.", "mt": f"가요 {n}.", "pe": f"가 {n}."} for n in range(30)]
    code, _, error, _ = prepare(rows)
    assert code == 2 and "--forward 'Translate English to Korean:'" in error
    code, said, error, folder = prepare(
        rows, "--forward", "Translate:", "--backward", "Back:", "--template", "translate"
    )
    assert code == 0 and "edits, recognised" in said and "backward is not used" in said
    assert {row["source"].partition(" ")[0] for row in rows_of(folder)} == {"Translate:"}


# What training relies on


@pytest.mark.parametrize("family", ["diptych-bpe", "t5", "bart", "gemma", "byt5", "nllb", "mbart"])
def test_both_answers_are_encoded_as_each_would_be_alone(family, prepare, tokenizers_by_family, tmp_path):
    tokenizers_by_family[family].save_pretrained(tmp_path / "tokenizer")
    common = ["--template", "plain", "--deduplicate", "false", "--validation_fraction", 0, "--test_fraction", 0]
    options = {"tokenizer": tmp_path / "tokenizer"}
    code, _, error, folder = prepare(PAIRS, *common, **options)
    assert code == 0, error
    alone = [
        prepare(PAIRS, *common, "--map", f"output={name}", out=name, **options)[3] for name in ("chosen", "rejected")
    ]
    columns = [("labels", "target"), ("other_labels", "rejected")]
    both = datasets.load_from_disk(folder)["train"]
    for (ids, text), plain in zip(columns, alone, strict=True):
        plain = datasets.load_from_disk(plain)["train"]
        assert both[ids] == plain["labels"] and both[text] == plain["target"]
        assert both["input_ids"] == plain["input_ids"]
    assert both.features["other_labels"] == both.features["labels"]
    assert manifest_of(folder)["preferences"] == "pairs"
    assert "preferences" not in manifest_of(alone[0]) and "rejected" not in plain.column_names
    check_packed(folder)


def check_packed(folder):
    """Every packed row is its examples, one after the other, each as two segments that read one source."""
    train, packed = datasets.load_from_disk(folder)["train"], datasets.load_from_disk(folder / "packed")
    entry = manifest_of(folder)["packing"]
    assert entry["share_sources"] and set(packed.features) == {
        "examples",
        *PACKED_COLUMNS,
        SHARED_COLUMN,
        MARKS_COLUMN,
    }
    assert sorted(place for row in packed for place in row["examples"]) == list(range(len(train)))
    filled, starts = 0, {entry["decoder_start_token_id"], *entry.get("language_starts", ())}
    for row in packed:
        row = {name: numpy.array(column) for name, column in row.items()}
        filled += (row["decoder_segment_ids"] > 0).sum()
        assert row["decoder_segment_ids"].max() == 2 * len(row["examples"])
        assert not row[MARKS_COLUMN][row["decoder_segment_ids"] == 0].any()
        assert len({tuple(train[int(it)]["input_ids"]) for it in row["examples"]}) == row["segment_ids"].max()
        for number, place in enumerate(row["examples"]):
            example = train[int(place)]
            marks = (example["mark"], 0) if "mark" in example else (1, -1)
            for segment, name, mark in zip(
                (2 * number + 1, 2 * number + 2), ("labels", "other_labels"), marks, strict=True
            ):
                there = row["decoder_segment_ids"] == segment
                [read], labels = set(row[SHARED_COLUMN][there].tolist()), row["labels"][there].tolist()
                assert row["input_ids"][row["segment_ids"] == read].tolist() == example["input_ids"]
                start, *shifted = row["decoder_input_ids"][there].tolist()
                assert example[name] in (labels, [start, *labels]) and shifted == labels[:-1] and start in starts
                assert example[name][0] != start or labels[0] != start
                assert row["decoder_position_ids"][there].tolist() == list(range(len(labels)))
                assert set(row[MARKS_COLUMN][there].tolist()) == {mark}
    assert entry["target_fill"] == pytest.approx(filled / len(packed) / entry["max_target_tokens"])
    assert entry["examples"] == len(train)


def test_a_start_that_the_tokenizer_writes_itself_is_left_out_of_each_answer(prepare, tokenizers_by_family, tmp_path):
    bart = tokenizers_by_family["bart"]
    bart.save_pretrained(tmp_path / "tokenizer")
    start = ["--decoder_start_token_id", bart.bos_token_id]
    for rows in (PAIRS, MARKED):
        code, _, error, folder = prepare(rows, *start, "--validation_fraction", 0.2, tokenizer=tmp_path / "tokenizer")
        assert code == 0, error
        first = {ids[0] for row in rows_of(folder) for ids in (row["labels"], row["other_labels"])}
        assert first == {bart.bos_token_id}
        check_packed(folder)


def test_the_other_answer_of_a_marked_one_is_of_another_source_and_the_same_every_time(prepare):
    shares = ["--validation_fraction", 0.2, "--test_fraction", 0.1]
    code, said, error, folder = prepare(MARKED, *shares)
    assert code == 0, error
    assert "marked, recognised" in said and "Marks      27 answers liked, 53 not liked" in said
    assert manifest_of(folder)["preferences"] == "marks"
    others = {}
    for split, table in datasets.load_from_disk(folder).items():
        sources_of = {}
        for row in table:
            sources_of.setdefault(tuple(row["labels"]), set()).add(row["source"])
        others[split] = table["other_labels"]
        for row in table:
            assert row["mark"] == (1 if int(row["origin"].partition(":")[2]) % 3 == 1 else -1)
            assert sources_of[tuple(row["other_labels"])].isdisjoint({row["source"]})
        assert len(set(map(tuple, others[split]))) > len(table) / 2
    assert table.features["mark"].dtype == "int8"
    check_packed(folder)
    again = datasets.load_from_disk(prepare(MARKED, *shares, "--packing", "false")[3])
    assert {split: table["other_labels"] for split, table in again.items()} == others
    seeded = datasets.load_from_disk(prepare(MARKED, *shares, "--seed", 1)[3])
    assert {split: table["other_labels"] for split, table in seeded.items()} != others


def test_a_split_of_marked_answers_with_one_source_is_refused_with_the_remedy(prepare, tmp_path):
    code, _, error, folder = prepare(MARKED[:6], "--validation_fraction", 0.34, "--test_fraction", 0)
    assert code == 2 and "all rows of validation have one source" in error and "--validation_fraction 0.2" in error
    assert not folder.exists()


def test_a_trained_tokenizer_learns_of_both_answers_and_encodes_both(prepare, write_rows, tmp_path, capsys):
    rows = [row | {"rejected": f"{row['rejected']} 꽃"} for row in PAIRS]
    arguments = ["--data", write_rows("rows.jsonl", rows), "--train_tokenizer", "unigram", "--vocab_size", "400"]
    assert main([*arguments, "--out", str(tmp_path / "prepared"), "--lossy_text", "error"]) == 0
    check_packed(tmp_path / "prepared")


# What is left out, and kept apart


def test_an_answer_that_was_judged_is_never_cut(prepare):
    long = "word " * 40
    rows = [*PAIRS, {**PAIRS[0], "chosen": long}, {**PAIRS[0], "rejected": long}, {**PAIRS[0], "input": long}]
    limits = ["--max_target_tokens", 40, "--max_source_tokens", 60, "--too_long"]
    code, said, error, folder = prepare(rows, *limits, "cut", "--template", "plain")
    assert code == 0, error
    assert rejects_of(folder) == {(61, "chosen answer over the limit"), (62, "rejected answer over the limit")}
    assert "1 cut at 60" in said and said.count("1 dropped, over 40") == 2
    code, _, error, _ = prepare(rows, *limits, "error", "--template", "plain")
    assert code == 2 and ":61: the chosen answer has" in error
    rows = [*MARKED, {**MARKED[0], "completion": long}]
    *_, folder = prepare(rows, *limits, "cut", "--validation_fraction", 0.2, "--template", "plain")
    assert rejects_of(folder) == {(81, "marked answer over the limit")}


def test_repeated_pairs_go_contradictions_stay_and_are_said(prepare):
    first = PAIRS[0]
    turned = {**first, "chosen": first["rejected"], "rejected": first["chosen"]}
    other = {**first, "rejected": "Something else."}
    code, said, error, folder = prepare([*PAIRS, first, turned, other], "--template", "plain")
    assert code == 0, error
    assert rejects_of(folder) == {(61, "exact duplicate")}
    assert "Conflicts  1 × one source with answers that are judged both ways" in said
    [conflict] = map(json.loads, (folder / "conflicts.jsonl").read_text().splitlines())
    assert [row["chosen" if "chosen" in row else "target"] for row in conflict["rows"]] == [
        first["chosen"], first["rejected"],
    ]  # fmt: skip
    assert [row["rejected"] for row in conflict["rows"]] == [first["rejected"], first["chosen"]]
    again = {**MARKED[0], "label": False}
    code, said, _, folder = prepare([*MARKED, MARKED[0], again], "--validation_fraction", 0.2)
    assert rejects_of(folder) == {(81, "exact duplicate")} and "Conflicts  1 ×" in said


def test_answers_that_become_the_same_tokens_are_a_reject(prepare, tokenizers_by_family, tmp_path):
    tokenizers_by_family["bert"].save_pretrained(tmp_path / "tokenizer")
    rows = [*PAIRS, {**PAIRS[0], "chosen": "It is ONE.", "rejected": "it is one."}]
    *_, folder = prepare(rows, "--template", "plain", tokenizer=tmp_path / "tokenizer")
    assert rejects_of(folder) == {(61, "same tokens in both answers")}


def test_no_text_of_a_pair_is_in_two_splits(prepare):
    rows = [{**row, "rejected": f"No {n // 6}."} for n, row in enumerate(PAIRS)]
    *_, folder = prepare(rows, "--validation_fraction", 0.2, "--test_fraction", 0.2)
    tables = datasets.load_from_disk(folder)
    for column in ("input", "target", "rejected"):
        seen = [set(table[column]) for table in tables.values()]
        assert len(seen) == 3 and sum(map(len, seen)) == len(set.union(*seen))
    *_, folder = prepare(rows, "--validation_fraction", 0.2, "--split_by", "source", out="by-source")
    seen = [set(table["input"]) for table in datasets.load_from_disk(folder).values()]
    assert sum(map(len, seen)) == len(set.union(*seen))
    seen = [set(table["rejected"]) for table in datasets.load_from_disk(folder).values()]
    assert sum(map(len, seen)) > len(set.union(*seen))


def test_the_rejected_answer_is_looked_at_wherever_texts_are(prepare, write_rows, tokenizers_by_family, tmp_path):
    held_out = "a quick brown fox jumps over the lazy dog and then sleeps for a very long while"
    row = {**PAIRS[0], "input": "Tell of it."}
    rows = [*PAIRS, {**row, "rejected": f"Now {held_out}."}, {**row, "rejected": "Mail jane.roe@example.com now."}]
    evaluation = write_rows("test.jsonl", [{"instruction": "Say.", "output": held_out}])
    code, said, error, folder = prepare(rows, "--decontaminate", evaluation, "--sensitive", "--template", "plain")
    assert code == 0, error
    assert rejects_of(folder) == {(61, "overlaps the evaluation data")}
    assert "Sensitive  1 × e-mail address" in said
    near = [
        *PAIRS,
        {**PAIRS[0], "rejected": f"{PAIRS[0]['rejected']}!"},
        {**PAIRS[0], "rejected": "By no means, my dear sir."},
    ]
    *_, folder = prepare(near, "--near_duplicates", 0.8, "--template", "plain")
    assert (61, "near duplicate") in rejects_of(folder) and (62, "near duplicate") not in rejects_of(folder)
    tokenizers_by_family["t5"].save_pretrained(tmp_path / "tokenizer")
    words = [(first, second) for first in WORDS[:8] for second in WORDS[:8]]  # T5's here has no digits
    lossy = [{"prompt": f"Say {one} {two}.", "chosen": f"It is {two} {one}.", "rejected": "No."} for one, two in words]
    lossy[60]["rejected"] = "It was\nnever."
    _, _, error, _ = prepare(lossy, "--template", "plain", tokenizer=tmp_path / "tokenizer")
    assert "loses line breaks of the rejected answer in 1.6 % of examples (1 of 64" in error
    code, said, error, folder = prepare(
        lossy, "--lossy_text", "drop", "--template", "plain", tokenizer=tmp_path / "tokenizer"
    )
    assert code == 0, error
    assert rejects_of(folder) == {(61, "text that the tokenizer cannot write")}


def test_all_that_is_trained_on_is_of_one_kind(prepare, write_rows):
    plain = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(30)]
    path = write_rows("plain.jsonl", plain)
    marks = write_rows("marks.jsonl", MARKED)
    for other, words in ((path, "plain rows"), (marks, "marked answers")):
        for name in ("--data", "--validation"):
            data = ["--data", write_rows("pairs.jsonl", PAIRS)]
            arguments = [*data, other] if name == "--data" else [*data, name, other]
            code, _, error, folder = prepare(None, *arguments)
            assert code == 2 and f"pairs.jsonl has pairs of answers and {other} has {words}" in error
            assert not folder.exists()
    code, _, error, folder = prepare(PAIRS, "--test", path, "--validation_fraction", 0.1)
    assert code == 0, error
    tables = datasets.load_from_disk(folder)
    assert "rejected" in tables["validation"].column_names and len(tables["test"]) == 30
    assert not {"rejected", "other_labels"} & set(tables["test"].column_names)
    assert manifest_of(folder)["judged"]["pairs"] == 60


def test_decoder_prefix_and_target_text_of_a_template_stand_in_both_answers(prepare, tokenizers_by_family, tmp_path):
    text = "{# decoder_prefix: <extra_id_0> #}\n{{ instruction }} {{ input }}\n{# target #}\nAnswer: {{ output }}"
    (tmp_path / "mine.jinja").write_text(text, encoding="utf-8")
    t5 = tokenizers_by_family["t5"]
    t5.save_pretrained(tmp_path / "tokenizer")
    code, _, error, folder = prepare(PAIRS, "--template", tmp_path / "mine.jinja", tokenizer=tmp_path / "tokenizer")
    assert code == 0, error
    assert all(row[name].startswith("Answer: ") for row in rows_of(folder) for name in ("target", "rejected"))
    first = {row[name][0] for row in rows_of(folder) for name in ("labels", "other_labels")}
    assert first == {t5.convert_tokens_to_ids("<extra_id_0>")}


# What is said


def test_lengths_of_both_answers_are_said_and_that_the_chosen_one_is_mostly_longer(prepare):
    code, said, error, folder = prepare(PAIRS)
    assert code == 0 and "chosen answer longer in 0.0 %, rejected answer longer in 100.0 %" in said
    assert "Chosen     in all splits: median" in said and "Not chosen in all splits: median" in said
    assert "longer one" not in error
    longest = max(len(row["other_labels"]) for row in rows_of(folder))
    assert manifest_of(folder)["tokens"]["rejected"]["p100"] == longest
    page = (folder / "report.html").read_text(encoding="utf-8")
    row = rows_of(folder)[0]
    assert row["rejected"] in page and row["target"] in page and "Rejected answer" in page
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    *_, error, _ = prepare(turned)
    assert "in 100.0 % of pairs the chosen answer is the longer one" in error
    *_, error, folder = prepare([{**row, "label": 1} for row in MARKED], "--validation_fraction", 0.2)
    assert "all answers are liked, and none is not liked" in error
    assert "Target, liked" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_packed_row_too_short_for_both_answers_is_refused_by_name(prepare):
    code, _, error, _ = prepare(PAIRS, "--packed_target_tokens", 20)
    assert code == 2 and "its two answers have" in error and "max_target_tokens <= 10" in error


def test_columns_of_preferences_can_be_kept_of_plain_rows_alone(prepare):
    plain = [{"instruction": f"Say {n}.", "output": f"It is {n}.", "mark": str(n)} for n in range(30)]
    code, _, error, folder = prepare(plain, "--keep_columns", "mark")
    assert code == 0 and rows_of(folder)[0]["mark"]
    code, _, error, _ = prepare(PAIRS, "--keep_columns", "rejected")
    assert code == 2 and "a column rejected of its own" in error
