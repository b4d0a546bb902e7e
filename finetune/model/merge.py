"""`diptych merge`: an adapter becomes a plain checkpoint, which needs neither the adapter nor peft.

    diptych merge runs/lora/final --out merged

    merged/  as save_pretrained writes it: weights, config, tokenizer with its template
             manifest.json, as checkpoints have it: size and XXH3-128 of each file

The base that adapter_config.json names is loaded in fp32, and the adapter added to its weights. Logits before and
after are compared (adapters.py has the tolerance); then `dtype` rounds. Tied weights stay tied, unless the adapter is
on the head or an input table: these become separate weights, and config.json says tie_word_embeddings: false.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, OUTPUT


@dataclass(frozen=True)
class MergeSettings:
    """Merge an adapter into its base: a plain checkpoint, which from_pretrained loads."""

    adapter: str = field(metadata=CHECKPOINT)
    """Adapter folder (after training: RUN/final) or Hub id."""
    out: str = field(default="", metadata=OUTPUT)
    """New folder for the checkpoint."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the saved weights. float32 is the type in training; the others need half the space, and round."""

    def __post_init__(self):
        if not self.out:
            raise UserError("out is not set. Name a new folder for the checkpoint: --out …")


def merge(settings: MergeSettings) -> Path:
    """UserError where `adapter` is none or `out` is taken; StorageError where the disk has no room for it."""
    import torch  # seconds, that --help need not wait for

    from diptych.finetune.model.loading import adapter_settings, check_folder, load_checkpoint
    from diptych.finetune.model.untrusted_files import rounded
    from diptych.finetune.run_files.atomic_folders import write_folder

    name, out = os.path.expanduser(settings.adapter), new_folder(settings.out)
    check_folder(name)
    if not adapter_settings(name):
        raise UserError(f"{name} is a whole model: there is no adapter to merge. Name a folder with an adapter.")
    loaded = load_checkpoint(name, dtype=torch.float32)
    model, tokenizer = loaded.model, loaded.tokenizer
    dtype = getattr(torch, settings.dtype)
    for key, weight in model.named_parameters():
        rounded(weight, dtype, key, name)
    model = model.to(dtype)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())  # a tied one counts once
    write_folder(out, write, needed)
    return out


def new_folder(out: str) -> Path:
    """UserError where something is there already."""
    path = Path(out).expanduser().resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already. Name a new folder: --out …")
    return path


def run(settings: MergeSettings) -> int:
    out = merge(settings)
    print(f"{settings.adapter}, merged into its base, is in {out} ({settings.dtype})")
    return 0
