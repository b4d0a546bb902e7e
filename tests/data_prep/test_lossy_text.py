"""What a tokenizer loses is named by its kind, in `prepare`'s summary and report, and can be refused."""

import json
from pathlib import Path

import pytest
import transformers
from sentencepiece import sentencepiece_model_pb2

from diptych.data_prep.prepare import main
from diptych.data_prep.text_to_ids.encode import split_sources, split_targets
from diptych.data_prep.text_to_ids.rendered_text import Rendered
from diptych.data_prep.text_to_ids.tokenizer_losses import LOOKED_AT, Loss, kinds_lost, source_losses, target_losses

CODE = "if 나:\n    나는 학생이다."
FORMS = "forms of characters (Unicode's NFKC)"


def lost(tokenizer, text, all_of_them=True):
    [loss] = target_losses(tokenizer, [text], split_targets(tokenizer, [text]), [0], all_of_them).values()
    return loss


@pytest.mark.parametrize(
    "text, written, kinds",
    [
        ("Go.", "Go.", ()),
        ("a\n  b", "a b", ("line breaks",)),
        ("a  b ", "a b", ("spaces",)),
        ("½ …", "1⁄2 ...", (FORMS,)),
        ("\u1100\u1161", "가", (FORMS,)),
        ("É.", "é.", ("capital letters",)),
        ("É…\n", "e...", ("accents", "line breaks")),
        ("a\u200bb", "ab", ("characters",)),
    ],
)
def test_what_is_lost_has_a_name(text, written, kinds):
    assert kinds_lost(text, written) == kinds


def test_tokenizers_that_write_bytes_lose_nothing(tokenizers_by_family):
    for family in ("diptych-bpe", "diptych-unigram", "bart", "byt5"):
        for text in (CODE, "  ½É\u200b🙂\t\u1100\u1161 </s> ", "Go."):
            assert lost(tokenizers_by_family[family], text) is None, family


def test_each_family_loses_what_it_is_known_to_lose(tokenizers_by_family):
    t5, bert, m2m = (tokenizers_by_family[name] for name in ("t5", "bert", "m2m100"))
    loss = lost(t5, CODE)
    assert (loss.kinds, loss.written) == (("line breaks",), "if 나: 나는 학생이다.")
    assert loss.example == "'if 나:\\n    나는 학생이다.' becomes 'if 나: 나는 학생이다.'"
    assert lost(t5, "Go 🙂.") == Loss(("unknown characters",), "Go 🙂.", "Go <unk>.")
    assert lost(t5, "Go.") is None
    assert lost(bert, "I go.").kinds == ("capital letters",)
    assert lost(m2m, "나는 🙂").kinds == ("unknown characters",)
    assert lost(m2m, "나는  학생").kinds == ("spaces",)
    pieces = sentencepiece_model_pb2.ModelProto.FromString(Path(m2m.spm_file).read_bytes())
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((it.piece, it.score) for it in pieces.pieces[4:])]
    as_published = transformers.T5Tokenizer(
        vocab=vocab, _spm_precompiled_charsmap=pieces.normalizer_spec.precompiled_charsmap
    )
    assert lost(as_published, "Go…") == Loss((FORMS,), "Go…", "Go...")


def test_blanks_beside_a_control_token_of_the_template_are_no_loss(tokenizers_by_family):
    t5 = tokenizers_by_family["t5"]
    answer = Rendered("\U0010fffeDo <extra_id_0> \U0010fffeit.")
    assert lost(t5, answer) is None
    assert lost(t5, "I go  now.").kinds == ("spaces",)


def test_of_a_source_the_unknown_characters_of_the_row_count_and_no_others(tokenizers_by_family):
    t5 = tokenizers_by_family["t5"]
    texts = [Rendered(f"\U0010fffe🙂 Go:\n\U0010fffe{field}") for field in ("I am\nhere.", "I am 🙃.")]
    encoded = split_sources(t5, texts)
    assert all(t5.unk_token_id in it.content for it in encoded)
    assert source_losses(t5, texts, encoded, [0, 1]) == {1: Loss(("unknown characters",), "I am 🙃.", "I am <unk>.")}


def test_tokenizers_in_python_look_at_a_share_of_a_large_batch(tokenizers_by_family):
    m2m, t5 = tokenizers_by_family["m2m100"], tokenizers_by_family["t5"]
    texts = ["나는 학생이다."] * (3 * LOOKED_AT)
    places = range(len(texts))
    looked_at = {
        (name, whole): len(target_losses(it, texts, split_targets(it, texts), places, whole))
        for name, it in (("m2m", m2m), ("t5", t5))
        for whole in (True, False)
    }
    whole = 3 * LOOKED_AT
    assert looked_at == {("m2m", True): whole, ("m2m", False): LOOKED_AT, ("t5", True): whole, ("t5", False): whole}


def prepare(folder, rows, tokenizer, *arguments):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer.save_pretrained(folder / "tokenizer")
    return main(
        [
            *("--data", str(folder / "rows.jsonl"), "--tokenizer", str(folder / "tokenizer"), "--template", "plain"),
            *("--validation_fraction", "0", "--test_fraction", "0", "--out", str(folder / "out"), *arguments),
        ]
    )


ROWS = [
    {"instruction": "Go.", "output": "나는 학생이다."},
    {"instruction": "Go now.", "output": CODE},
    {"instruction": "Go home.", "output": "좋아 🙂"},
    {"instruction": "Go 🙃.", "output": "안녕."},
]


def test_prepare_says_what_is_lost_with_an_example(tokenizers_by_family, tmp_path, capsys):
    assert prepare(tmp_path, ROWS, tokenizers_by_family["t5"]) == 0
    said = capsys.readouterr().err
    place = tmp_path / "rows.jsonl"
    for share in (
        f"the tokenizer loses line breaks of the target in 25.0 % of examples (1 of 4 looked at), such as {place}:2:"
        " 'if 나:\\n    나는 학생이다.' becomes 'if 나: 나는 학생이다.'.",
        "the tokenizer loses unknown characters of the source in 25.0 % of examples (1 of 4 looked at), such as"
        f" {place}:4: 'Go 🙃.' becomes 'Go <unk>.'.",
    ):
        assert f"warning: {share}" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["tokenizer"]["lost"]["unknown characters of the target"] == {
        "examples": 1,
        "such as": f"{place}:3: '좋아 🙂' becomes '좋아 <unk>'",
    }
    assert "line breaks of the target" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_rows_that_lose_text_are_left_out_or_refused_if_so_told(tokenizers_by_family, tmp_path, capsys):
    t5 = tokenizers_by_family["t5"]
    assert prepare(tmp_path, ROWS, t5, "--lossy_text", "drop") == 0
    said = capsys.readouterr()
    assert "3 × text that the tokenizer cannot write" in said.out and "the tokenizer loses" not in said.err
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [it["row"] for it in rejects] == [2, 3, 4]
    assert prepare(tmp_path, ROWS, t5, "--lossy_text", "error") == 2
    assert "rows.jsonl:2: the tokenizer loses line breaks of the target: 'if 나:" in capsys.readouterr().err
