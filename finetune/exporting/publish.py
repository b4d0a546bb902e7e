"""A run folder in; its final model with a card on the Hub out, and nothing else of the run.

    diptych publish runs/full --to me/translate            private, unless --public
    diptych publish runs/full --to me/translate --dry_run  shows the files and the card, and connects to nothing

RUN/final is published if each of its files is what training wrote (final/manifest.json), so it is the model that was
measured. ALLOWED names every file that may leave this machine; model_card.py writes the card. Local paths in a config
are reduced to their last part. Nothing is sent if a file names another place on this machine or holds what looks like
a token of the Hub. hub_push.py does the sending.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.utils.sha import sha_fileobj

from diptych.data_prep.command_line.errors import UserError, message_line
from diptych.finetune.commands.exit_codes import CheckpointError, HubError
from diptych.finetune.exporting.hub_push import push, remote_hashes
from diptych.finetune.exporting.model_card import model_card, read_config
from diptych.finetune.exporting.publish_settings import PublishSettings
from diptych.finetune.inference.pipelines import TRAVELLING_CODE, travelling_pipeline
from diptych.finetune.model.loading import load_tokenizer
from diptych.finetune.run_files import atomic_folders
from diptych.finetune.run_files.run_folder import settings_of

ALLOWED = (
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "adapter_config.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "calibration.json",  # how `generate` computes the probability that an output is right
    *("chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
    *("source.spm", "target.spm", "target_vocab.json"),  # Marian
    *("vocab-src.json", "vocab-tgt.json"),  # FSMT
    *("spiece.model", "sentencepiece.bpe.model"),  # T5 and Pegasus, mBART and M2M100
    # The code that travels with every Diptych and, if asked for, with any checkpoint.
    *("configuration_diptych.py", "modeling_diptych.py", TRAVELLING_CODE, "README.md"),
)
"""Patterns of file names."""
CARD = "README.md"

CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
"""A local path in these, such as that of a template file, means nothing to others."""

VOCABULARIES = ("tokenizer.json", "vocab*.json", "vocab.txt", "merges.txt", "target_vocab.json", "*.spm", "*.model")
"""These are not searched for paths and tokens: any text may be in a vocabulary, and no path gets in."""

PATHS = ("model", "data", "out", "tokenizer", "teacher")
"""Settings of training that may name a folder."""
LOCAL_PATH = re.compile(r"(~?(/[^/\s{}<>]+){2,}/?)|([A-Za-z]:\\\S+)")
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[\w.-]+")


@dataclass(frozen=True)
class Publication:
    """What leaves this machine, and what does not."""

    files: dict[str, Path | bytes]
    left_out: list[str]
    """Names in final/ that are not in ALLOWED."""
    changed: list[str]
    """In words, which published files differ from those in final/, and how."""


def is_allowed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ALLOWED)


def publication(settings: PublishSettings) -> Publication:
    """The files and the card. UserError where RUN is no finished run, or a file names a place on this machine;
    CheckpointError where final/ is not what training wrote."""
    run = Path(settings.run).expanduser()
    final = run / "final"
    check_run(run)
    present = sorted(path.name + ("/" if path.is_dir() else "") for path in final.iterdir())
    names = [name for name in present if is_allowed(name) and name != CARD]  # the card is made anew
    check_measured(final, names)
    if settings.base and "adapter_config.json" not in names:
        raise UserError(f"base names the base of an adapter, and {final} is a whole model. Leave out --base.")
    files: dict[str, Path | bytes] = {name: final / name for name in names}
    changed = [change for name in names if name in CONFIGS for change in _without_local_paths(files, name, settings)]
    if settings.pipeline:
        changed.append(_add_pipeline(files, final))
    files[CARD] = model_card(run, settings.to, files, settings.license, settings.language).encode()
    check_private(files, run)
    left_out = [name for name in present if name not in files and name != atomic_folders.MANIFEST]
    return Publication(files, left_out, changed)


def check_run(run: Path) -> None:
    if not (run / "config.yaml").is_file():
        if run.name == "final" and (run.parent / "config.yaml").is_file():
            raise UserError(f"{run} is the model of a run. Name the run itself: diptych publish {run.parent} …")
        raise UserError(f"{run} is no run: it has no config.yaml. Name the folder that `diptych train` wrote.")
    if not (run / "final").is_dir():
        raise UserError(
            f"{run} has no final model yet: its training has not ended. Go on with it: diptych train --config "
            f"{run / 'config.yaml'} --resume true"
        )


def check_measured(final: Path, names: Sequence[str]) -> None:
    """CheckpointError unless each file is as training wrote it, and training wrote each of them."""
    again = (
        f"Move it away, and take it from its checkpoint again: diptych train --config {final.parent / 'config.yaml'} "
        f"--resume true"
    )
    if fault := atomic_folders.fault_of(final):
        raise CheckpointError(f"{final} is not what was measured: {fault}. {again}")
    recorded = atomic_folders.read_json(final / atomic_folders.MANIFEST)
    for name in names:
        if (final / name).is_symlink() or not (final / name).is_file():
            raise CheckpointError(f"{final / name} is a link or a folder, and training wrote a file. {again}")
        if name not in recorded:
            raise CheckpointError(
                f"{final / name} was not written by training: {atomic_folders.MANIFEST} does not name it."
                f" Move it away."
            )


def _without_local_paths(files: dict[str, Path | bytes], name: str, settings: PublishSettings) -> list[str]:
    """Replaces a config in `files` that names local paths; returns in words what has changed."""
    config = atomic_folders.read_json(files[name])
    changed = []
    if name == "adapter_config.json" and (base := public_base(config["base_model_name_or_path"], settings)):
        config["base_model_name_or_path"] = base
        changed.append(f"{name}: the base is {base}, where a folder was named")
    reduced = reduce_paths(config)
    if reduced != config:
        changed.append(f"{name}: local paths are reduced to their last part")
    if changed:
        files[name] = _as_json(reduced)
    return changed


def reduce_paths(value: Any) -> Any:
    """Every text that is a local path and nothing else becomes its last part."""
    if isinstance(value, str):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if LOCAL_PATH.fullmatch(value) else value
    if isinstance(value, Mapping):
        return {reduce_paths(key): reduce_paths(entry) for key, entry in value.items()}
    return [reduce_paths(entry) for entry in value] if isinstance(value, list) else value


def public_base(base: str, settings: PublishSettings) -> str:
    """The Hub id to publish for an adapter's base that is a folder here; "" if the base has its Hub id already."""
    if HUB_ID.fullmatch(base) and not Path(base).is_dir():
        if settings.base:
            raise UserError(f"the adapter in {settings.run} names its base, {base}, by its Hub id. Leave out --base.")
    elif not settings.base:
        raise UserError(
            f"the adapter in {settings.run} was trained on the folder {base}, which nobody else has. Publish that "
            f"base first, and say where it is: --base owner/name"
        )
    return settings.base


def _add_pipeline(files: dict[str, Path | bytes], final: Path) -> str:
    """Adds the pipeline's code and its entry in config.json; returns in words what has changed."""
    if "config.json" not in files:
        raise UserError(f"{final} is an adapter, which brings no pipeline. Merge it first, or leave out --pipeline.")
    config, files[TRAVELLING_CODE] = travelling_pipeline(read_config(files, "config.json"), load_tokenizer(str(final)))
    files["config.json"] = _as_json(config)
    return f"config.json: names the pipeline in {TRAVELLING_CODE}"


def _as_json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def check_private(files: Mapping[str, Path | bytes], run: Path) -> None:
    """UserError if a file names a place on this machine, or holds what looks like a token of the Hub."""
    secret, places = get_token(), local_places(run)
    for name, content in files.items():
        text = _searchable(name, content)
        if TOKEN.search(text) or (secret and secret.encode() in text):
            raise UserError(f"{name} holds what looks like a token of the Hub. Nothing is published; remove it there.")
        if found := next((place for place in places if place.encode() in text), None):
            raise UserError(
                f"{name} names {found} on this machine. Nothing is published; take the path out of the template or "
                f"the settings that it comes from, and prepare and train again."
            )


def local_places(run: Path) -> list[str]:
    """Paths that no published file may hold: of the run, of what went into it, and of the home and working folder."""
    recipe = settings_of(run)
    recipes = [recipe, *(recipe.get("stages") or ())]
    named = [Path(it[name]) for it in recipes for name in PATHS if it.get(name)]
    folders = [str(place.resolve()) for place in (run, *named) if place.is_absolute() or place.exists()]
    around = [f"{folder}/" for folder in (Path.home(), Path.cwd()) if folder != Path("/")]
    return [*folders, *around]


def _searchable(name: str, content: Path | bytes) -> bytes:
    """All of a file except the numbers of weights and the tokens of vocabularies."""
    if any(fnmatchcase(name, pattern) for pattern in VOCABULARIES):
        return b""
    if isinstance(content, bytes):
        return content
    if not name.endswith(".safetensors"):
        return content.read_bytes()
    with content.open("rb") as file:  # its header: 8 bytes of length, names of tensors, metadata
        return file.read(int.from_bytes(file.read(8), "little"))


def run(settings: PublishSettings) -> int:
    plan = publication(settings)
    print(file_list(plan))
    if settings.dry_run:
        print(f"\n{CARD}:\n\n{plan.files[CARD].decode()}\nNothing was sent: this was a dry run.")
        return 0
    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, so no connection is made. Unset it to publish, or look with --dry_run.")
    token = get_token()
    if token is None:
        raise HubError("there is no token of the Hub on this machine. Log in with one that may write: hf auth login")
    api = HfApi(token=token, library_name="diptych")
    if settings.base:
        check_base(api, settings)
    pushed = push(api, settings.to, plan.files, is_public=settings.public, is_ours=is_allowed)
    where = f"{api.endpoint}/{settings.to}, commit {pushed.commit}"
    if not pushed.is_new:
        print(f"nothing to do: it is there already, file by file: {where}")
        return 0
    for name in pushed.removed:
        print(message_line(f"removed there, from before: {name}"))
    if others := [name for name in pushed.others if name != ".gitattributes"]:
        print(message_line(f"left alone there: {', '.join(others)}"))
    print(f"published, {'public' if settings.public else 'private'}, and read back: {where}")
    return 0


def check_base(api: HfApi, settings: PublishSettings) -> None:
    """UserError unless the base on the Hub has the weights of the folder that the adapter was trained on."""
    adapter = atomic_folders.read_json(Path(settings.run).expanduser() / "final" / "adapter_config.json")
    folder = Path(adapter["base_model_name_or_path"])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"the base {folder} has no weights by which it could be compared with {settings.base}.")
    there = remote_hashes(api, settings.base)
    for file in files:
        with file.open("rb") as content:
            is_same = there.get(file.name) == sha_fileobj(content).hex()
        if not is_same:
            raise UserError(
                f"{settings.base} on the Hub has not the {file.name} of {folder}, which the adapter was trained on. "
                f"Publish that folder there, or name the repository that has it: --base owner/name"
            )


def file_list(plan: Publication) -> str:
    sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in plan.files.items()}
    lines = [f"{size:>15,} bytes  {name}" for name, size in sizes.items()]
    lines += [f"{sum(sizes.values()):>15,} bytes  in {len(sizes)} files"]
    lines += [f"changed: {change}" for change in plan.changed]
    if plan.left_out:
        lines.append(f"not published: {', '.join(plan.left_out)}")
    return "\n".join(lines)
