"""Spoiled files of a tokenizer, of a prepared folder and of a checkpoint's manifest."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from spoiled_files import Kind, spoil_json, spoil_text, write
from spoiled_model_files import make_tokenizer

from diptych.data_prep.text_to_ids.encode import split_sources, split_targets
from diptych.data_prep.text_to_ids.templates import TEMPLATES, attach_template, carried_template
from diptych.data_prep.text_to_ids.tokenizer_files import open_tokenizer
from diptych.finetune.batches.packed_rows import Packing
from diptych.finetune.batches.padded_rows import load_prepared, row_lengths
from diptych.finetune.run_files import atomic_folders

SPLIT = {"type": "Split", "pattern": {"Regex": r"(\w+\s?)+x"}, "behavior": "Isolated", "invert": False}
DOUBLING = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
BACKEND: dict[str, Any] = {
    "normalizer": {"type": "Sequence", "normalizers": [DOUBLING] * 24},
    "pre_tokenizer": SPLIT,
    "decoder": {"type": "Sequence", "decoders": [DOUBLING] * 24},
    "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
    "padding": None,
    "added_tokens": [],
}
CONFIG: dict[str, Any] = {
    "extra_ids": 100,
    "tokenizer_class": "T5Tokenizer",
    "model_max_length": 512,
    "chat_template": "{{ messages }}",
    "added_tokens_decoder": {"0": {"content": "<pad>", "special": True}},
    "extra_special_tokens": ["<a>"],
    "src_lang": "en",
}


def make_folder(folder: Path) -> None:
    tokenizer = make_tokenizer()
    attach_template(tokenizer, TEMPLATES["plain"])
    tokenizer.save_pretrained(folder)
    write(folder / "special_tokens_map.json", b'{"eos_token": "</s>"}')


def load_folder(folder: Path) -> None:
    tokenizer = open_tokenizer(str(folder))
    carried_template(tokenizer, check=True)
    split_sources(tokenizer, ["Name the capitals, please: " * 20])
    split_targets(tokenizer, ["Paris, Seoul"])


def make_prepared(folder: Path) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 1], [6, 1]], "labels": [[7, 1], [8, 1]]})
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(folder)
    packing = dict.fromkeys(Packing._fields, 1) | {"language_starts": []}
    write(folder / "manifest.json", json.dumps({"packing": packing, "files": {}, "splits": {}}).encode())


def load_rows(folder: Path) -> None:
    prepared = load_prepared(str(folder))
    if prepared.packing is not None:
        Packing.from_manifest(prepared.packing)
    for split in prepared.splits.values():
        row_lengths(split)


def spoil_bytes(file: str) -> Callable[[Path, random.Random], str]:
    def spoil(folder: Path, dice: random.Random) -> str:
        text, what = spoil_text((folder / file).read_bytes(), dice)
        write(folder / file, text)
        return what

    return spoil


def make_manifest(folder: Path) -> None:
    folder.mkdir(parents=True)
    write(folder / "state.json", b"{}")
    atomic_folders.write_manifest(folder)


OF_THE_TOKENIZER = {
    "tokenizer.json": Kind(make_folder, spoil_json("tokenizer.json", BACKEND), load_folder),
    "tokenizer_config.json": Kind(make_folder, spoil_json("tokenizer_config.json", CONFIG), load_folder),
    "special_tokens_map.json": Kind(make_folder, spoil_json("special_tokens_map.json", {"unk_token": 1}), load_folder),
    "dataset_dict.json": Kind(make_prepared, spoil_json("dataset_dict.json", {}), load_rows),
    "dataset state.json": Kind(make_prepared, spoil_json("train/state.json", {}), load_rows),
    "dataset_info.json": Kind(make_prepared, spoil_json("train/dataset_info.json", {}), load_rows),
    "prepared manifest.json": Kind(make_prepared, spoil_json("manifest.json", {}), load_rows),
    "arrow": Kind(make_prepared, spoil_bytes("train/data-00000-of-00001.arrow"), load_rows),
    "checkpoint manifest.json": Kind(make_manifest, spoil_json("manifest.json", {}), atomic_folders.fault_of),
}
