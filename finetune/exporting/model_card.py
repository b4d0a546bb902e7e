"""The model card of a run: README.md with the Hub's metadata, from what the run and its data have written.

    model_card(Path("runs/full"), "me/translate", files)  ->  "---\\nlibrary_name: transformers\\n…"

Every statement is read from a file: the recipe from config.yaml; the data from the manifest whose hash the run's
checkpoint holds; the scores from metrics.jsonl at the step of the final model, and from each report in the run folder
that `diptych evaluate RUN/final --out RUN/test.json` wrote on these very files. If something is not known, the card
says so. The same run gives the same card, byte by byte. Of absolute paths only the last part is shown.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.data_prep.rows.named_splits import kind_of
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.finetune.model.loading import load_tokenizer
from diptych.finetune.preferences.objective_settings import OF_PAIRS, OF_SAMPLES, checked_settings
from diptych.finetune.run_files import atomic_folders, checkpoints
from diptych.finetune.run_files.run_folder import last_training, settings_of
from diptych.finetune.training.starting_model import is_named_size

CARD_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.jinja"

NO_SCORES = {
    *("rows", "sources", "target_tokens", "unfinished", "max_new_tokens", "step", "split", "output_characters"),
    *("source_pieces", "terms"),
}
"""Figures of an evaluation that say how it was made."""

LOCAL_FOLDER = re.compile(r"(?<![:/\\\w])(?:~|[A-Za-z]:)?[/\\](?:[^/\\=+\s]+[/\\])+")
"""The folders of an absolute path, up to its last part."""


class CardScore(NamedTuple):
    split: str
    dataset: str
    metric: str
    value: float
    bounds: list[float] | None
    note: str

    def shown(self, value: float) -> str:
        return f"{value:.3f}" if self.metric == "loss" else f"{value:.2f}"


@dataclass(frozen=True)
class Facts:
    """What the files of a run say."""

    settings: dict[str, Any]
    """config.yaml of the run, with all of its stages."""
    recipe: dict[str, Any]
    """Of the training whose model is the final one: the run's own, or that of its last stage."""
    step: int | None
    """After which the final model was saved; None if that checkpoint is gone."""
    manifest: dict[str, Any] | None
    """What `diptych prepare` wrote; None if it is not found."""
    fingerprint: str
    config: dict[str, Any]
    adapter_base: str | None
    scores: list[CardScore]


def model_card(run: Path, repo: str, files: Mapping[str, Path | bytes], license: str = "", language: str = "") -> str:
    """`files` are those that are published with it, by name."""
    with library_errors(f"{run} is not as training wrote it", "Move what was changed elsewhere, or restore it."):
        facts = read_facts(run, files)
    manifest, recipe = facts.manifest, facts.recipe
    template = read_config(files, "tokenizer_config.json").get("diptych_template", {})
    golden = template.get("golden", [])
    evaluated = {kind_of(score.split) for score in facts.scores}
    codes = languages(run / "final", manifest)
    is_bare = bool(codes or manifest and manifest["settings"]["forward"] == "" and not manifest["directions"])
    card = ModelCard.from_template(
        metadata(facts, repo, license, language),
        template_path=str(CARD_TEMPLATE),
        repo=repo,
        name=repo.split("/")[1],
        version=version("diptych"),
        facts=facts,
        weights=f"{weights_count(files):,} weights",
        is_new_model=is_named_size(recipe["model"]),
        learned=learned(recipe),
        trust=", trust_remote_code=True" if any(name.endswith(".py") for name in files) else "",
        languages=codes,
        is_bare=is_bare,
        prompt=json.dumps(golden[0]["source"] if golden and not is_bare else "…", ensure_ascii=False),
        decoder_prefix=" ".join(f"`{token}`" for token in template.get("decoder_prefix", ())),
        new_tokens=manifest["tokens"]["target"]["limit"] if manifest else 128,
        is_selected=recipe["final"] == "best" and "validation" in evaluated,
        is_tested=bool(evaluated - {"train", "validation"}),
        last_part=last_part,
        prepare_yaml=manifest and dump(prepare_settings(manifest)),
        train_yaml=dump(train_settings(facts.settings)),
    )
    return str(card)


# What the run has written


def read_facts(run: Path, files: Mapping[str, Path | bytes]) -> Facts:
    last = last_training(run)
    settings, recipe = settings_of(run), settings_of(last)
    step, hashes = trained_steps(last)
    manifest, fingerprint = prepared_manifest(recipe["data"], hashes, run)
    adapter = read_config(files, "adapter_config.json")
    scores = [*validation_scores(last, step, recipe), *report_scores(run)]
    config = read_config(files, "config.json") or adapter
    base = adapter.get("base_model_name_or_path")
    return Facts(settings, recipe, step, manifest, fingerprint, config, base, scores)


def trained_steps(run: Path) -> tuple[int | None, list[Any]]:
    """The step whose checkpoint is the final model, and the values by which resuming knows that run's data and model
    (resuming.py); None, [] if that checkpoint is gone."""
    final = atomic_folders.read_json(run / "final" / atomic_folders.MANIFEST)
    for path in reversed(checkpoints.complete_checkpoints(run / "checkpoints")):
        entries = atomic_folders.read_json(path / atomic_folders.MANIFEST)
        model = {name.removeprefix("model/"): entry for name, entry in entries.items() if name.startswith("model/")}
        if model == final:
            known = atomic_folders.read_json(path / "state.json")["run"]
            return checkpoints.checkpoint_step(path), list(known.values())
    return None, []


def prepared_manifest(data: str, hashes: list[Any], run: Path) -> tuple[dict[str, Any] | None, str]:
    """What `diptych prepare` wrote of the data, and its hash; None, "" if it is not found.

    A relative path may be relative to where training ran, so it is tried from here and from every folder above the
    run; the hash tells whether it is what was trained on.
    """
    for folder in (Path(), *run.resolve().parents):
        file = folder / data / atomic_folders.MANIFEST
        fingerprint = sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        if fingerprint and fingerprint in hashes and "inputs" in (manifest := atomic_folders.read_json(file)):
            return manifest, fingerprint
    return None, ""


def validation_scores(run: Path, step: int | None, recipe: Mapping[str, Any]) -> list[CardScore]:
    rows = atomic_folders.read_json_lines(run / "metrics.jsonl")
    rows = [row for row in rows if kind_of(row["split"]) == "validation" and row["step"] == step]
    of_step = {row["split"]: row for row in rows}  # the last of each
    dataset, sample = last_part(recipe["data"]), f"in training, on up to {recipe['metrics_limit']:,} rows"
    is_of_pairs = recipe.get("objective", "supervised") not in ("supervised", *OF_SAMPLES)
    left_out = NO_SCORES | (set(OF_PAIRS) if is_of_pairs else set())  # the Hub takes accuracy for that of a task
    return [
        CardScore(split, dataset, metric, value, None, "in training" if metric == "loss" else sample)
        for split, row in of_step.items()
        for metric, value in row.items()
        if metric not in left_out
    ]


def report_scores(run: Path) -> list[CardScore]:
    """Of every report in the run folder; once, if several say the same. UserError: a file is broken JSON, or a report
    on another model or on an earlier one of this run."""
    scores = {}
    for file in sorted(run.glob("*.json")):
        try:
            report = atomic_folders.read_json(file)
        except ValueError as error:
            raise UserError(f"{file} may be a report, and is no JSON: {error}. Move it elsewhere.") from None
        if not isinstance(report, dict) or not {"figures", "settings"} <= report.keys():
            continue  # status.json, and whatever else lies there
        settings, figures = report["settings"], report["figures"]
        if report.get("model") != atomic_folders.read_json(run / "final" / atomic_folders.MANIFEST):
            raise UserError(
                f"{file} is a report on {settings['model']}, and not on what is now in {run / 'final'}. Move it "
                f"elsewhere, or evaluate again: diptych evaluate {run / 'final'} --data {settings['data']} --split "
                f"{settings['split']} --out {file}"
            )
        split, data, rows = settings["split"], last_part(settings["data"]), f"{figures['rows']:,} rows"
        for metric in (name for name in figures if name not in NO_SCORES):
            bounds, signature = (report.get(kind, {}).get(metric) for kind in ("intervals", "signatures"))
            note = f"{rows}, {signature}" if signature else rows
            scores[split, data, metric, note] = CardScore(split, data, metric, figures[metric], bounds, note)
    return list(scores.values())


def learned(recipe: Mapping[str, Any]) -> str:
    """`on pairs of answers, by dpo`; "" for supervised training."""
    objective = recipe.get("objective", "supervised")
    if objective == "supervised":
        return ""
    if objective not in OF_SAMPLES:
        return (
            f"on {'marked answers' if objective == 'kto' else 'pairs of a better and a worse answer'}, by {objective}"
        )
    reward = checked_settings(objective, recipe["objective_settings"])["reward"]
    return f"on answers of its own, by {objective} with the reward {last_part(reward)}"


def read_config(files: Mapping[str, Path | bytes], name: str) -> dict[str, Any]:
    content = files.get(name, b"{}")
    return json.loads(content if isinstance(content, bytes) else content.read_bytes())


def weights_count(files: Mapping[str, Path | bytes]) -> int:
    count = 0
    for name, file in files.items():
        if name.endswith(".safetensors"):
            with safe_open(file, framework="numpy") as tensors:
                count += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    return count


# What the card says of it


def metadata(facts: Facts, repo: str, license: str, language: str) -> ModelCardData:
    """The block between the two lines of dashes. `model-index` has every score, with its interval as an argument."""
    recipe, adapter_base, manifest = facts.recipe, facts.adapter_base, facts.manifest or {}
    base = adapter_base or (recipe["model"] if is_on_the_hub(recipe["model"]) else None)
    filtered = manifest.get("settings", {})
    languages = [it.strip() for it in language.split(",") if it.strip()]
    languages = languages or [*filtered.get("source_languages", ()), *filtered.get("target_languages", ())]
    sources = [source["name"] for source in manifest.get("inputs", ()) if source["name"].startswith("hf:")]
    family = facts.config.get("model_type")
    results = [
        EvalResult(
            task_type="text2text-generation",
            dataset_type=score.dataset,
            dataset_name=score.dataset,
            dataset_split=score.split,
            metric_type=score.metric,
            metric_name=score.metric,
            metric_value=score.value,
            metric_args=score.bounds and {"interval": score.bounds},
        )
        for score in facts.scores
    ]
    return ModelCardData(
        language=sorted(set(languages)) or None,
        license=license or None,
        library_name="peft" if adapter_base else "transformers",
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter_base else "finetune",
        datasets=sorted({name.removeprefix("hf:").split(":")[0] for name in sources}) or None,
        tags=["diptych", "encoder-decoder", *([family] if family else []), *(["lora"] if adapter_base else [])],
        model_name=repo.split("/")[1],
        eval_results=results or None,
    )


def languages(final: Path, manifest: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The directions of the data. Of the most frequent one the codes, the argument of transformers' `generate` that
    chooses the target language, and its token. None if the model is not told languages by codes, or none are known."""
    directions = list((manifest or {}).get("directions", {}))
    if not directions or not (codes := codes_of(load_tokenizer(str(final)))).is_around_texts:
        return None
    source, target = directions[0].split("-")
    argument = "forced_bos_token_id" if codes.layout == "both" else "decoder_start_token_id"
    token = codes.spellings[target]
    return {"directions": directions, "source": source, "target": target, "argument": argument, "token": token}


# Settings, without the paths of this machine


def is_on_the_hub(name: str) -> bool:
    """owner/name, or an old name without an owner, that is no folder here and no named size."""
    return not (is_named_size(name) or Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1)


def last_part(place: str) -> str:
    """runs/my-data -> my-data; what lies on the Hub keeps its owner."""
    if place.startswith("hf:") or (place.count("/") == 1 and is_on_the_hub(place)):
        return place
    return Path(place).name


def without_folders(value: Any) -> Any:
    """`news=/my/a.jsonl` → `news=a.jsonl`, `/my/a.en+/my/a.ko` → `a.en+a.ko`; also in lists and mappings."""
    if isinstance(value, str):
        return LOCAL_FOLDER.sub("", value)
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(entry) for key, entry in value.items()}
    return [without_folders(entry) for entry in value] if isinstance(value, list) else value


def train_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All of them, as `diptych train` reads them: defaults may change in later versions."""
    return without_folders({name: value for name, value in settings.items() if name != "resume"})


def prepare_settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """All that are set, as `diptych prepare` reads them."""
    return without_folders(
        {name: value for name, value in manifest["settings"].items() if value not in (None, [], {})}
    )


def dump(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).rstrip()
