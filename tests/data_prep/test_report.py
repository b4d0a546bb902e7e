"""The report page, opened in a real browser: what it shows, what it does not let in, and what it never asks for."""

import json
import re
import socket
import string
import threading
from types import SimpleNamespace

import numpy
import pytest

from diptych.data_prep.report.report_facts import histogram, padded_fill
from diptych.data_prep.report.report_page import render_page, write_report
from diptych.data_prep.report.visible_text import HIDDEN, token_chips
from diptych.data_prep.text_to_ids.train_tokenizer import train_tokenizer

LOST = {"line breaks of the target": {"examples": 4, "such as": "a.tsv:3: two lines"}}
PHONE = {"viewport": {"width": 360, "height": 740}}


@pytest.fixture
def listener():
    """A server of this machine that a page could reach. Whoever connects is counted."""
    server = socket.create_server(("127.0.0.1", 0))
    calls = []

    def accept():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            calls.append(connection.recv(4096))
            connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            connection.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield SimpleNamespace(port=server.getsockname()[1], calls=calls)
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(timeout=5)


@pytest.fixture(scope="module")
def facts(pairs):
    """What a preparation of some Tatoeba sentences could say, with a value for everything."""
    tokenizer = train_tokenizer("bpe", [text for pair in pairs[:300] for text in pair], 800)
    sources, targets = ([tokenizer(text).input_ids for text in side] for side in zip(*pairs[:300], strict=True))
    samples = [
        {
            "origin": f"tatoeba_eng_kor.tsv:{row + 1}",
            "source": pairs[row][0],
            "target": pairs[row][1],
            "input_tokens": token_chips(tokenizer, sources[row]),
            "label_tokens": token_chips(tokenizer, [-100, *targets[row][1:]]),
            "decoder_input_tokens": token_chips(tokenizer, [0, *targets[row][:-1]]),
        }
        for row in (3, 250)
    ]
    source = {"format": "tsv", "split": "train"}
    example = {"origin": "tatoeba_eng_kor.tsv:9", "field": "output", "reason": "It is empty.", "raw": "Go.\t"}
    return {
        "name": "tatoeba",
        "rows": {"read": 1300, "examples": 1300, "kept": 1201, "rejected": 99},
        "splits": {"train": 1101, "validation": 60, "test": 40},
        "groups": 977,
        "own_sets": None,
        "inputs": [
            {**source, "name": "a.tsv", "read": 800, "kept": 777, "rejected": 23, "mixed": 901, "share": 0.75},
            {**source, "name": "b.tsv", "read": 500, "kept": 424, "rejected": 76, "mixed": 300, "share": 0.25},
        ],
        "removed": [
            {"stage": "checks", "kind": "empty output", "count": 34, "examples": [example] * 3},
            {"stage": "cleaning", "kind": "near duplicate", "count": 44, "examples": [example]},
            {"stage": "length limits", "kind": "target over the limit", "count": 21, "examples": []},
        ],
        "lengths": {
            "source": lengths_of(sources, 12, "cut"),
            "target": lengths_of(targets, 9, "error"),
        },
        "packing": {
            "max_source_tokens": 304,
            "max_target_tokens": 288,
            "rows": 61,
            "examples": 1102,
            "source_fill": 0.987,
            "target_fill": 0.954,
            "padded_source_fill": 0.412,
            "padded_target_fill": 0.333,
            "batch_size": 32,
        },
        "duplicates": {
            "exact": 14,
            "near": 31,
            "threshold": 0.85,
            "examples": [{"kept": "a:1", "removed": "a:2", "kept_text": "Go now.", "removed_text": "Go now!"}],
            "conflicts": 5,
            "conflict_examples": [{"source": "Go.", "targets": ["가.", "가세요."]}],
        },
        "contamination": {
            "removed": 7,
            "against": ["eval.jsonl"],
            "examples": [{"origin": "a:8", "ngram": "to be or not"}],
        },
        "sensitive": {
            "counts": {"e-mail address": 12, "API key": 3},
            "examples": [{"origin": "a:5", "field": "input", "kind": "e-mail address", "masked": "j***@e***"}],
        },
        "scripts": {"source": {"Latin": 1290}, "target": {"Hangul": 1203, "Latin": 87}},
        "categories": {"open_qa": 420, "closed_qa": 311},
        "template": {
            "name": "translate",
            "source": "{{ instruction }} {{ input }}",
            "target": "{{ output }}",
            "decoder_prefix": ["<ko>"],
            "stop": ["</s>"],
        },
        "golden": ["Translate: Go.  →  가."],
        "tokenizer": {"from": "bpe trained here", "class": "PreTrainedTokenizerFast", "tokens": 800, "lost": LOST},
        "samples": samples,
        "warnings": ["fields that are not used: id."],
        "settings": {"data": ["a.tsv", "b.tsv"], "seed": 3, "strict": False},
    }


def lengths_of(rows, limit, treatment):
    lengths = numpy.array([len(ids) for ids in rows])
    percentiles = {f"p{p}": int(numpy.percentile(lengths, p, method="higher")) for p in (50, 90, 99, 100)}
    over = {"over_limit": int((lengths > limit).sum()), "treatment": treatment}
    return {**histogram(lengths, limit), **percentiles, "total": int(lengths.sum()), "limit": limit, **over}


# What the page shows

NUMBERS = """() => [...document.querySelectorAll('[data-fact], [data-percent]')].map(element =>
    [element.dataset.fact ?? element.dataset.percent, element.innerText])"""


def test_numbers_on_the_page_are_those_of_the_facts(visit, facts):
    shown = visit(render_page(facts), NUMBERS).answer
    for path, text in shown:
        value = at(facts, path)
        assert text == (f"{value:,}" if isinstance(value, int) else f"{value:.1%}".replace("%", "\u00a0%")), path
    expected = {"rows.examples", "rows.kept", "rows.rejected", "splits.train", "splits.validation", "splits.test"}
    expected |= {"groups", "inputs.1.kept", "inputs.1.mixed", "removed.0.count", "removed.2.count"}
    expected |= {f"lengths.{side}.{name}" for side in ("source", "target") for name in ("p50", "p99", "total")}
    expected |= {"lengths.target.over_limit", "lengths.source.limit", "packing.rows", "packing.examples"}
    expected |= {"packing.padded_target_fill", "packing.source_fill", "tokenizer.tokens"}
    expected |= {"duplicates.exact", "duplicates.near", "duplicates.conflicts"}
    assert expected <= {path for path, _ in shown}


def test_bars_and_tables_say_how_many_rows(visit, facts):
    ask = "() => [...document.querySelectorAll('table tbody tr')].map(row => row.innerText.split('\\t'))"
    rows = [[cell.replace("\u00a0", " ").strip() for cell in row] for row in visit(render_page(facts), ask).answer]
    assert ["open_qa", "420", "57.5 %"] in [row[:3] for row in rows]
    assert ["Hangul", "1,203", "93.3 %"] in [row[:3] for row in rows]
    assert ["e-mail address", "12", "80.0 %"] in [row[:3] for row in rows]
    bins = sum(int(row[1].replace(",", "")) for row in rows if re.fullmatch(r"[\d,]+( to [\d,]+)?", row[0]))
    assert bins == sum(facts["lengths"]["source"]["counts"]) + sum(facts["lengths"]["target"]["counts"])


CHIPS = """() => [...document.querySelectorAll('.sample')].map(sample =>
    [...sample.querySelectorAll('.chips')].map(row => [...row.querySelectorAll('.c')].map(chip => {
        const box = chip.getBoundingClientRect();
        return {text: chip.querySelector('b').innerText, id: chip.querySelector('i').innerText,
                kind: chip.className, middle: box.left + box.width / 2, top: box.top}
    })))"""


def test_each_token_is_a_chip_and_the_decoder_reads_above_what_it_writes(visit, facts):
    for sample, (encoder, decoder) in zip(facts["samples"], visit(render_page(facts), CHIPS).answer, strict=True):
        assert [chip["id"] for chip in encoder] == [str(token["id"]) for token in sample["input_tokens"]]
        assert [chip["text"].replace("␣", " ") for chip in encoder] == [t["text"] for t in sample["input_tokens"]]
        assert "special" in encoder[-1]["kind"] and "special" not in encoder[0]["kind"]
        reads, labels = decoder[::2], decoder[1::2]
        assert [chip["id"] for chip in reads] == [str(token["id"]) for token in sample["decoder_input_tokens"]]
        assert (labels[0]["text"], labels[0]["id"]) == ("masked", "−100") and "masked" in labels[0]["kind"]
        assert [chip["id"] for chip in labels[1:]] == [str(token["id"]) for token in sample["label_tokens"][1:]]
        for read, label in zip(reads, labels, strict=True):
            assert abs(read["middle"] - label["middle"]) < 1 and read["top"] < label["top"]


def test_blanks_in_tokens_have_a_sign(visit, facts):
    texts = [" a", "\n\n  ", "\t", "\u00a0", "\u0301", "\u200d", ""]
    tokens = [{"id": place, "text": text, "special": False} for place, text in enumerate(texts)]
    page = render_page({**facts, "samples": [{**facts["samples"][0], "input_tokens": tokens}]})
    chips = visit(page, CHIPS).answer[0][0]
    assert [chip["text"] for chip in chips] == ["␣a", "↵↵␣␣", "⇥", "U+00A0", "◌\u0301", "U+200D", "∅"]


def test_what_is_drawn_are_the_counts(facts):
    page = render_page(facts)
    bars = re.findall(r'title="([\d,]+)(?: to [\d,]+)? tokens: ([\d,]+) rows"', page)
    source, target = facts["lengths"]["source"], facts["lengths"]["target"]
    bins = [pair for side in (source, target) for pair in zip(side["edges"], side["counts"], strict=False)]
    assert [(int(start), int(count)) for start, count in bars] == bins
    over = re.findall(r'class="over".*?tokens: (\d+) rows', page)
    assert sum(map(int, over)) == source["over_limit"] + target["over_limit"] > 0


def test_what_was_not_looked_for_is_said(visit, facts):
    text = visit(render_page({**facts, **dict.fromkeys(("packing", "contamination", "sensitive"))})).text
    assert "Not packed" in text and "no evaluation set was named" in text and "Not looked for." in text
    nothing = {"removed": [], "warnings": [], "categories": {}, "sensitive": {"counts": {}, "examples": []}}
    assert "Every row was kept." in visit(render_page({**facts, **nothing})).text


def at(facts, path):
    for key in path.split("."):
        facts = facts[int(key)] if isinstance(facts, list) else facts[key]
    return facts


# Hostile rows

MARKUP = [
    "<script>ran=true;alert(1)</script>",
    "<img src=x onerror='ran=true;alert(1)'>",
    "</style><script>ran=true</script>",
    "</pre></title><svg onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "&lt;b&gt; &amp; &#60;i&#62; &nbsp;",
    "{{7*7}} {% raw %} ${7*7} {{ facts }}",
    "\" onmouseover=\"alert(1)\" x=\"",
    "' autofocus onfocus='alert(1)",
    "body{display:none} *{color:red}",
    ";background:url(//example.org/x)",
    "<base href=//x><meta http-equiv=r>",
    "--><!--]]><![CDATA[<textarea>",
]  # fmt: skip
REACHING_OUT = [
    "<img src=http://127.0.0.1:PORT/i>",
    "<link rel=stylesheet href='http://127.0.0.1:PORT/l'>",
    "<style>@import url(http://127.0.0.1:PORT/s)</style>",
    "url(http://127.0.0.1:PORT/u)",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:PORT/m'>",
    "<iframe src=http://127.0.0.1:PORT/f></iframe>",
]
LETTERS = [
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽",
    "e\u0301 a\u0323\u0302 Z̸̢͈̮a̶͖̿l̵͙̾go",
    "각 ≠ 각, 日本語 中文",
    "مرحبا بالعالم עברית",
]

SHOWN_CHARACTERS = 36
"""Of a name; the longest of these texts are shortened in the narrowest places."""
FIXED = {"treatment", "stage"}
"""Facts that choose among words of the page."""


TURNS = 4


@pytest.mark.parametrize("turn", range(TURNS))
def test_hostile_texts_are_shown_as_they_are_and_do_nothing(visit, facts, listener, turn):
    """Texts take turns: on each page all of them stand somewhere, each in other places than on the page before."""
    hostile = [text.replace("PORT", str(listener.port)) for text in MARKUP + REACHING_OUT + LETTERS]
    first = turn * len(hostile) // TURNS
    changed, put = with_texts(facts, hostile[first:] + hostile[:first])
    seen = visit(render_page(changed), **PHONE)
    assert (seen.ran, seen.dialogs, seen.requests, listener.calls, seen.errors) == (False, [], [], [], [])
    assert seen.too_wide <= 0
    shown = re.sub(r"[\s␣]+", " ", seen.text)
    missing = [text for text in put if re.sub(r"\s+", " ", text[:SHOWN_CHARACTERS]) not in shown]
    assert len(put) > 60 and not missing


def test_controls_and_bidi_overrides_are_shown_by_their_number(visit, facts):
    hidden = "\x00\x08\x1b\r\x7f\x85\u202e\u202a\u2066\u2069\u200e\u061c\u200b\ufeff\u2028\udcff\U000e0041\uffff"
    changed, put = with_texts(facts, ["a" + "b".join(hidden) + "c"])
    page = render_page(changed)
    assert not re.search(HIDDEN, page)
    shown = visit(page).text
    numbers = "a" + "b".join(f"U+{ord(character):04X}" for character in hidden) + "c"
    # Marks stand in frames of their own, which innerText does not show.
    assert sum(f"{text[: text.index('a')]}{numbers}"[:30] in shown for text in put) > 60


SCROLLING = """() => [...document.querySelectorAll('.scroll, #template pre')].filter(
    box => box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight).map(box => box.innerText)"""


def test_tables_and_templates_are_whole_on_a_phone(visit, facts):
    lines = "\n".join(f"line {number}" for number in range(60))
    facts = {**facts, "template": {**facts["template"], "source": lines}}
    for width in (420, 1200):
        seen = visit(render_page(facts), SCROLLING, viewport={"width": width, "height": 900})
        assert seen.answer == [] and seen.too_wide <= 0
        assert all(f"{source['rejected']:,}" in seen.text for source in facts["inputs"])


def test_a_word_of_100_000_characters_fits_a_phone(visit, facts):
    changed, _ = with_texts(facts, ["W" * 100_000])
    page = render_page(changed)
    assert len(page) < 400_000
    seen = visit(page, **PHONE)
    assert seen.too_wide <= 0 and re.search(r"W{500} … \(9\d,\d\d\d more characters\)", seen.text)


def test_the_watch_sees_what_an_unescaped_page_would_do(visit, facts, listener):
    """And that the policy would hold if a text did get through: the proof that the tests above can fail."""
    attack = f"<script>ran=true;alert(1)</script><img src=http://127.0.0.1:{listener.port}/i onerror='ran=true'>"
    page = render_page(facts).replace("tatoeba_eng_kor.tsv:4", attack)
    guarded = visit(page)
    assert (guarded.ran, guarded.dialogs, listener.calls) == (False, [], []) and guarded.errors
    open_page = re.sub(r"<meta http-equiv[^>]*>", "", page)
    unguarded = visit(open_page)
    assert unguarded.ran and unguarded.dialogs and unguarded.requests and listener.calls


def test_the_page_carries_its_policy_first_and_no_script(facts):
    page = render_page(facts)
    head = page[: page.index("<style>")]
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in head
    assert head.index("Content-Security-Policy") < head.index("<link")
    assert not re.search(r"<script|\son\w+=|javascript:", page)
    assert set(re.findall(r'(?:href|src)="([^"#][^"]*)"', page)) == {"data:,"}


def with_texts(facts, texts):
    """The facts with these texts, in turn, in the place of every text and free name, each with a number of its own."""
    put = []

    def numbered():
        put.append(f"q{len(put)}q{texts[len(put) % len(texts)]}")
        return put[-1]

    def changed(value, name=None):
        if isinstance(value, str):
            return value if name in FIXED or not value else numbered()  # a masked label has no text
        if isinstance(value, list):
            return [changed(entry) for entry in value]
        if isinstance(value, dict):
            is_free = name in ("categories", "counts", "settings") or name in ("source", "target") and is_count(value)
            return {(numbered() if is_free else key): changed(entry, key) for key, entry in value.items()}
        return value

    return changed(facts), put


def is_count(value):
    return all(isinstance(entry, int) for entry in value.values())


# Eyes, hands and paper


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit, facts, scheme):
    ask = """() => {
        const ground = getComputedStyle(document.body).backgroundColor
        return [...document.querySelectorAll('h1, .soft, .numbers dd, .origin, .lead')].map(element =>
            [getComputedStyle(element).color, ground])}"""
    answer = visit(render_page(facts), ask, color_scheme=scheme).answer
    assert len(answer) > 20 and min(contrast(*colours) for colours in answer) > 4.5
    assert (luminance(answer[0][1]) > 0.5) == (scheme == "light")


def contrast(text, ground):
    low, high = sorted((luminance(text), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    """WCAG 2, of "rgb(29, 32, 36)"."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_those_who_do_not_see_find_their_way(visit, facts):
    ask = """() => ({
        headings: [...document.querySelectorAll('h1,h2,h3,h4')].map(heading => +heading.tagName[1]),
        tables: [...document.querySelectorAll('table')].map(table => table.caption?.innerText ?? ''),
        drawings: [...document.querySelectorAll('[role=img]')].map(drawing => drawing.getAttribute('aria-label')),
        ids: [...document.querySelectorAll('[id]')].map(element => element.id),
        targets: [...document.querySelectorAll('a')].map(link => link.hash.slice(1)),
        language: document.documentElement.lang})"""
    answer = visit(render_page(facts), ask).answer
    steps = zip(answer["headings"], answer["headings"][1:], strict=False)
    assert answer["headings"][0] == 1 and all(below <= above + 1 for above, below in steps)
    assert len(answer["tables"]) > 8 and all(answer["tables"])
    assert len(answer["drawings"]) == 2 and all(answer["drawings"])
    assert len(set(answer["ids"])) == len(answer["ids"]) and set(answer["targets"]) <= set(answer["ids"])
    assert answer["language"] == "en"


def test_on_paper_everything_is_unfolded_and_light(visit, facts):
    page = render_page({**facts, "samples": facts["samples"][:1] * 5})
    closed = page.replace('class="sample" open', 'class="sample"')
    ask = """() => {
        document.querySelectorAll('details').forEach(details => details.removeAttribute('open'))
        const rows = [...document.querySelectorAll('.sample .chips')]
        return {shown: rows.map(row => row.checkVisibility({contentVisibilityAuto: true})),
                ground: getComputedStyle(document.body).backgroundColor}}"""
    paper = visit(closed, ask, media="print", color_scheme="dark").answer
    assert len(paper["shown"]) == 10 and all(paper["shown"])
    assert paper["ground"] == "rgb(255, 255, 255)"
    assert not any(visit(closed, ask).answer["shown"])


# Files


def test_files_are_written_and_the_same_each_time(tmp_path, facts):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, facts)
    first, second = (sorted(path for path in (tmp_path / n).rglob("*") if path.is_file()) for n in ("first", "second"))
    assert {path.name for path in first} == {"report.html", "report.json"}
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_report_json_gives_the_facts_back(tmp_path, facts):
    changed, _ = with_texts(facts, ['[\n 1,\n 2\n] 가 \udcb0 \x00 \u202e \\ "'])
    write_report(tmp_path, changed)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == changed and "가" in text
    assert re.search(r'"counts": \[\d+(, \d+)+\]', text)


# What the report counts itself


def test_each_length_is_in_its_bin_and_none_is_on_both_sides_of_the_limit():
    draw = numpy.random.default_rng(0)
    for size in (1, 2, 50, 3000):
        for spread in (0.0, 0.3, 1.0, 3.0):
            lengths = numpy.exp(draw.normal(4, spread, size)).astype(int)
            limit = int(draw.integers(1, 200))
            bins = histogram(lengths, limit)
            edges, counts = bins["edges"], bins["counts"]
            assert edges == sorted(set(edges)) and len(edges) <= 43 and all(type(edge) is int for edge in edges)
            brute = [sum(start <= n < end for n in lengths) for start, end in zip(edges, edges[1:], strict=False)]
            assert counts == brute and sum(counts) == size
            over = sum(count for start, count in zip(edges, counts, strict=False) if start > limit)
            assert over == (lengths > limit).sum()


def test_short_lengths_have_a_bin_each():
    assert histogram(numpy.array([1, 1, 2, 4]), 9) == {"edges": [1, 2, 3, 4, 5], "counts": [2, 1, 0, 1]}
    assert histogram(numpy.array([1, 1]), 9) == {"edges": [1, 2], "counts": [2]}


def test_a_long_tail_leaves_the_body_its_shape():
    lengths = numpy.append(numpy.random.default_rng(0).integers(20, 200, 5000), 100_000)
    counts = histogram(lengths, 512)["counts"]
    assert max(counts) < 2000 and sum(count > 0 for count in counts) > 8


def test_padded_fill_counts_each_batch_up_to_its_longest():
    assert padded_fill(numpy.array([2, 4]), 0, batch_size=2) == 0.75
    assert padded_fill(numpy.array([3, 3, 3]), 0, batch_size=2) == 1.0
    lengths = numpy.random.default_rng(2).integers(1, 90, 101)
    assert padded_fill(lengths, 0, 1) == 1.0
    assert padded_fill(lengths, 0, 101) == pytest.approx(lengths.sum() / (101 * lengths.max()))
    assert padded_fill(lengths, 0, 8) == padded_fill(lengths, 0, 8)


def test_chips_spell_the_text_of_their_tokens(tokenizers_by_family):
    text = "Tom  said: 'go'."
    for name in ("diptych-bpe", "diptych-unigram", "bart", "t5", "nllb", "gemma"):
        tokenizer = tokenizers_by_family[name]
        ids = tokenizer(text).input_ids
        chips = token_chips(tokenizer, ids)
        spelled = "".join(chip["text"] for chip in chips if not chip["special"])
        assert [chip["id"] for chip in chips] == ids
        assert [chip["id"] for chip in chips if chip["special"]] == [i for i in ids if i in tokenizer.all_special_ids]
        assert spelled.replace(" ", "") == text.replace(" ", ""), name
        assert " said" in spelled, name


def test_bytes_that_are_no_character_are_shown_as_bytes():
    tokenizer = train_tokenizer("bpe", [string.ascii_letters], 259)
    chips = token_chips(tokenizer, [*tokenizer("가 a").input_ids, -100])
    assert [chip["text"] for chip in chips] == ["\\xEA", "\\xB0", "\\x80", " ", "a", "</s>", ""]
    assert [chip["special"] for chip in chips] == [False, False, False, False, False, True, False]
