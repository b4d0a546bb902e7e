"""Ids to text on real tokenizers of each kind: nothing raises, nothing is lost without a sign, nothing is made up."""

import copy
import json

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.data_prep.text_to_ids.encode import encode_targets
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.inference.target_tokens import UNKNOWN_ID, text_of
from diptych.finetune.model.loaded_model import LoadedModel

SENTENCES = ["I am a student.", "나는 학생이다.", "Hello , world !", "He is my friend, and a good one.", "가. 네."]
FAMILIES = ["bpe", "t5", "bert", "byt5", "m2m100"]


@pytest.fixture(scope="module")
def tokenizers_by_kind(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        SENTENCES, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    )
    pieces = [backend.id_to_token(id) for id in range(backend.get_vocab_size())]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({char for text in SENTENCES for char in text})]
    words += [f"##{word}" for word in words[5:]]
    prefix = str(folder / "pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=prefix, vocab_size=80, hard_vocab_limit=False, minloglevel=2
    )
    spm = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    pieces_of_spm = [spm.id_to_piece(id) for id in range(3, spm.get_piece_size())]
    vocabulary = {piece: id for id, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces_of_spm])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return {
        "bpe": tiny_tokenizer,
        "t5": transformers.T5Tokenizer(vocab=[(piece, -float(place)) for place, piece in enumerate(pieces)]),
        "bert": transformers.BertTokenizer(vocab={word: place for place, word in enumerate(words)}),
        "byt5": transformers.ByT5Tokenizer(),
        "m2m100": transformers.M2M100Tokenizer(
            vocab_file=str(folder / "vocab.json"), spm_file=f"{prefix}.model", src_lang="en", tgt_lang="ko"
        ),
    }


@pytest.fixture(params=FAMILIES)
def tokenizer(request, tokenizers_by_kind):
    return tokenizers_by_kind[request.param]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_padding_and_ignored_labels_are_no_text(tokenizer):
    ids = ids_of(tokenizer, "I am a student.")
    plain = text_of(tokenizer, ids)
    assert "student" in plain.replace(" ", "")
    pad = tokenizer.pad_token_id
    assert text_of(tokenizer, [IGNORE_INDEX, *ids, IGNORE_INDEX, pad, pad, IGNORE_INDEX]) == plain
    assert text_of(tokenizer, [*ids[:2], IGNORE_INDEX, *ids[2:]]) == plain
    assert text_of(tokenizer, []) == text_of(tokenizer, [IGNORE_INDEX, pad]) == ""


@pytest.mark.parametrize("unknown", [-1, -101, 10**6, 2**31, 2**63])
def test_an_id_that_the_tokenizer_does_not_know_is_seen_in_its_place(tokenizer, unknown):
    ids = ids_of(tokenizer, "I am a student.")
    before, after = text_of(tokenizer, ids[:3]), text_of(tokenizer, ids[3:])
    assert text_of(tokenizer, [*ids[:3], unknown, *ids[3:]]) == f"{before}{UNKNOWN_ID}{after}"
    assert text_of(tokenizer, [unknown, unknown, len(tokenizer) + 5]) == UNKNOWN_ID


def test_what_a_padded_vocabulary_has_too_many_is_seen(tokenizer):
    """T5's 28 embedding rows beyond its tokenizer, and any model whose table was rounded up to a multiple of 64."""
    first_beyond = 1 + max(tokenizer.get_vocab().values())
    assert text_of(tokenizer, [first_beyond]) == UNKNOWN_ID
    assert UNKNOWN_ID not in text_of(tokenizer, [first_beyond - 1])


def test_ids_of_labels_come_back_as_the_target_that_they_were_made_of(tokenizers_by_kind):
    for kind in ("bpe", "t5", "byt5"):
        tokenizer = tokenizers_by_kind[kind]
        (labels,) = encode_targets(tokenizer, ["I am a student."])
        assert text_of(tokenizer, [*labels, IGNORE_INDEX]) == "I am a student.", kind


def test_spaces_before_punctuation_stay_also_where_a_checkpoint_asks_to_clean_up(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["t5"]
    tokenizer.clean_up_tokenization_spaces = True
    ids = ids_of(tokenizer, "Hello , world !")
    assert tokenizer.decode(ids) == "Hello, world!"
    assert text_of(tokenizer, ids) == "Hello , world !"


def test_a_token_that_was_added_later_is_known(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = type(tiny_tokenizer).from_pretrained(tmp_path)
    new = len(tokenizer)
    assert text_of(tokenizer, [new]) == UNKNOWN_ID
    tokenizer.add_tokens(["낱말"])
    assert text_of(tokenizer, [new]) == "낱말"


def test_a_model_that_writes_an_id_beyond_its_tokenizer_is_found_out(learned_t5, tiny_tokenizer, eight_prepared_rows):
    """One embedding row too many, which outdoes the token for 2: where 2 was right, what comes out is no text."""
    model, row = copy.deepcopy(learned_t5), eight_prepared_rows[-1]
    assert row["target"] == "2"
    beyond = len(tiny_tokenizer)
    model.resize_token_embeddings(beyond + 1, mean_resizing=False)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[beyond] = 1.5 * table[row["labels"][0]]
    sources = [row["input_ids"], eight_prepared_rows[0]["input_ids"]]
    found, other = generate_outputs(LoadedModel.of(model, tiny_tokenizer), sources, batch_size=2, max_new_tokens=8)
    assert found.text.startswith(UNKNOWN_ID) and other.text == "가."
