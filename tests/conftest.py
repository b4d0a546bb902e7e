"""What tests of all rooms share: processes that start at once, a real browser without a network, and a visit that
tells what a page showed and tried; and tokenizers of many families, trained on the shipped Tatoeba sentences, each
saved and loaded again as a user's checkpoint folder would be."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import transformers
from nursery import Nursery
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from diptych.data_prep.reading.sources import SAMPLES_FOLDER
from diptych.data_prep.text_to_ids.train_tokenizer import train_tokenizer

VOCAB_SIZE = 1500
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


def pytest_collection_modifyitems(items):
    """What a slow fixture is made for is slow, too. Long tests come first: as the last one, each would run alone."""
    for item in items:
        if "aftermath" in item.fixturenames:  # a day of commands, in test_trust.py
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def nursery():
    with Nursery() as started:
        yield started


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("there is no chromium, chromium-browser or google-chrome on PATH")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found[0], args=[*QUIET, "--disable-sync"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, tmp_path):
    """visit(html) opens it as a file, with all <details> open, and tells what it showed and what it tried."""

    def open_page(html, ask="() => null", media=None, **context):
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        with browser.new_context(**context) as window:
            page = window.new_page()
            page.emulate_media(media=media)
            seen = SimpleNamespace(requests=[], dialogs=[], errors=[])
            page.on("request", lambda request: seen.requests.append(request.url))
            page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
            page.on("pageerror", lambda error: seen.errors.append(str(error)))
            page.on("console", lambda message: seen.errors.append(message.text))
            page.goto(file.as_uri(), wait_until="load")
            page.evaluate("document.querySelectorAll('details').forEach(d => d.setAttribute('open', ''))")
            page.wait_for_timeout(60)  # for what a page may do after it has loaded
            seen.requests = [url for url in seen.requests if url != file.as_uri() and not url.startswith("data:")]
            seen.text = page.evaluate("document.body.innerText")
            seen.ran = page.evaluate("window.ran === true")
            seen.too_wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            seen.answer = page.evaluate(ask)
        return seen

    return open_page


@pytest.fixture(scope="session")
def pairs():
    lines = (SAMPLES_FOLDER / "tatoeba_eng_kor.tsv").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")[:2]) for line in lines]


@pytest.fixture(scope="session")
def sentences(pairs):
    return [text for pair in pairs[:600] for text in pair]


@pytest.fixture(scope="session")
def tokenizers_by_family(sentences, tmp_path_factory):
    """Name → tokenizer, one for each way to make one: Unigram, byte-level BPE, BPE with byte fallback, WordPiece,
    bytes, sentencepiece in Python; with language codes before, after, and not at all."""
    folder = tmp_path_factory.mktemp("tokenizers")
    unigram, byte_bpe = _unigram(sentences), _byte_level_bpe(sentences)
    fallback_bpe, wordpiece = _fallback_bpe(sentences), _wordpiece(sentences)
    pieces_file, vocab_file = _sentencepiece(sentences, folder)
    made = {
        "diptych-bpe": train_tokenizer("bpe", sentences, VOCAB_SIZE),
        "diptych-unigram": train_tokenizer("unigram", sentences, VOCAB_SIZE),
        "t5": transformers.T5Tokenizer(vocab=unigram, extra_ids=5),
        "mbart": transformers.MBartTokenizer(vocab=[("<s>", 0.0), *unigram], src_lang="en_XX", tgt_lang="ko_KR"),
        "mbart50": transformers.MBart50Tokenizer(vocab=[("<s>", 0.0), *unigram], src_lang="en_XX", tgt_lang="ko_KR"),
        "bart": transformers.BartTokenizer(**byte_bpe),
        "nllb": transformers.NllbTokenizer(**fallback_bpe, src_lang="eng_Latn", tgt_lang="kor_Hang"),
        "gemma": transformers.GemmaTokenizer(**fallback_bpe),
        "bert": transformers.BertTokenizer(vocab=wordpiece, eos_token="[SEP]"),
        "byt5": transformers.ByT5Tokenizer(),
        "m2m100": transformers.M2M100Tokenizer(
            vocab_file=vocab_file, spm_file=pieces_file, src_lang="en", tgt_lang="ko"
        ),
    }
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(folder / name)
    return {name: transformers.AutoTokenizer.from_pretrained(folder / name) for name in made}


@pytest.fixture(scope="session")
def language_folders(sentences, tmp_path_factory):
    """With a folder for the tokenizer of each family that has language codes, and T5: none of them says a target."""
    place = tmp_path_factory.mktemp("families")
    unigram, bpe = _unigram(sentences), _fallback_bpe(sentences)
    pieces, vocabulary = _sentencepiece(sentences, place)
    words = json.loads(Path(vocabulary).read_text(encoding="utf-8"))
    words |= {word: len(words) + place for place, word in enumerate((">>kor<<", ">>eng<<", "<pad>"))}
    (place / "marian.json").write_text(json.dumps(words), encoding="utf-8")
    marian = {"source_spm": pieces, "target_spm": pieces, "vocab": str(place / "marian.json")}
    before = [(f"<2{code}>", 0.0) for code in ("en", "ko", "zh", "zh_Hant")]
    made = {
        "nllb": transformers.NllbTokenizer(**bpe),
        "legacy": transformers.NllbTokenizer(**bpe, legacy_behaviour=True),
        "m2m100": transformers.M2M100Tokenizer(vocab_file=vocabulary, spm_file=pieces),
        "mbart50": transformers.MBart50Tokenizer(vocab=[("<s>", 0.0), *unigram]),
        "mbart": transformers.MBartTokenizer(vocab=[("<s>", 0.0), *unigram]),
        "madlad": transformers.T5Tokenizer(vocab=[*unigram, *before], extra_ids=0),
        "marian": transformers.MarianTokenizer(**marian),
        "t5": transformers.T5Tokenizer(vocab=unigram, extra_ids=5),
    }
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(place / name)
    return place


@pytest.fixture(scope="session")
def bpe_folder(sentences, tmp_path_factory):
    """A trained tokenizer without a template, as a folder."""
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer("bpe", sentences, VOCAB_SIZE).save_pretrained(folder)
    return folder


def _unigram(sentences):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return [tuple(word) for word in json.loads(tokenizer.to_str())["model"]["vocab"]]


def _byte_level_bpe(sentences):
    return _bpe(
        sentences,
        models.BPE(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def _fallback_bpe(sentences):
    special = ["<s>", "<pad>", "</s>", "<unk>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(byte_fallback=True, unk_token="<unk>")
    return _bpe(sentences, model, pre_tokenizers.Metaspace(), special_tokens=special)


def _bpe(sentences, model, pre_tokenizer, **training):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, show_progress=False, **training)
    tokenizer.train_from_iterator(sentences, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return {"vocab": trained["vocab"], "merges": [tuple(merge) for merge in trained["merges"]]}


def _wordpiece(sentences):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer.get_vocab()


def _sentencepiece(sentences, folder):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "pieces"),
        vocab_size=1000,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    pieces = [line.split("\t")[0] for line in (folder / "pieces.vocab").read_text(encoding="utf-8").splitlines()]
    vocab_file = folder / "vocab.json"
    vocab_file.write_text(json.dumps({piece: token_id for token_id, piece in enumerate(pieces)}), encoding="utf-8")
    return str(folder / "pieces.model"), str(vocab_file)
