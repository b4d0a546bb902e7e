"""The model card of a run: README.md with the Hub's metadata, from what the run and its data have written.

    model_card(Path("runs/full"), "me/translate", files)  ->  "---\\nlibrary_name: transformers\\n…"

Nothing is made up: the recipe is config.yaml, the data are those of the manifest whose hash the run's checkpoint has,
the scores are validation's at the step of the final model, and those of each report in the run folder that `diptych
evaluate RUN/final --out RUN/test.json` wrote of these very files. What is not known is said to be. The same run gives
the same card, byte by byte, and of paths there are only the last parts in it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.named_splits import kind_of, named
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.finetune.model.loading import load_tokenizer
from diptych.finetune.run_files import checkpoints
from diptych.finetune.run_files.run_folder import last_training
from diptych.finetune.training.starting_model import is_named_size

FRAME = Path(__file__).with_name("frames") / "model_card.md.jinja"

NO_SCORES = {"rows", "sources", "target_tokens", "unfinished", "max_new_tokens", "step", "split"}
"""Figures of an evaluation that say how it was made."""

PATHS_OF_A_RECIPE = ("model", "data", "out", "tokenizer", "teacher")
PATHS_OF_PREPARATION = (
    *("data", "aligned", "validation", "test", "out", "template", "tokenizer", "decontaminate", "gathered"),
)
UNNAMED = "unknown"


class Score(NamedTuple):
    split: str
    dataset: str
    metric: str
    value: float
    bounds: tuple[float, float] | None
    note: str

    @property
    def shown(self) -> str:
        return f"{self.value:.{self._digits()}f}"

    @property
    def interval(self) -> str:
        return "" if self.bounds is None else " to ".join(f"{bound:.{self._digits()}f}" for bound in self.bounds)

    def _digits(self) -> int:
        return 3 if self.metric == "loss" else 2


class Spoken(NamedTuple):
    """The directions of the data; and of the most frequent one the codes, the argument of transformers' `generate` by
    which the target is told, and the token that it is given."""

    directions: list[str]
    source: str
    target: str
    argument: str
    token: str


def model_card(run: Path, repo: str, files: Mapping[str, Path | bytes], license: str = "", language: str = "") -> str:
    """`files` are those that are published with it, by name."""
    whole = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    last = last_training(run)
    recipe = yaml.safe_load((last / "config.yaml").read_text(encoding="utf-8"))
    step, facts = trained_steps(last)
    manifest, fingerprint = prepared_manifest(recipe, facts, run)
    config = read_config(files, "config.json") or read_config(files, "adapter_config.json")
    adapter_base = config.get("base_model_name_or_path") if "adapter_config.json" in files else None
    scores = [*validation_scores(last, step, recipe), *report_scores(run)]
    template = read_config(files, "tokenizer_config.json").get("diptych_template", {})
    has_code = any(name.endswith(".py") for name in files)
    card = ModelCard.from_template(
        metadata(repo, recipe, config, adapter_base, manifest, scores, license, language),
        template_path=str(FRAME),
        repo=repo,
        name=repo.split("/")[1],
        version=version("diptych"),
        what=summary(recipe, config, adapter_base, files),
        adapter_base=adapter_base,
        trust=", trust_remote_code=True" if has_code else "",
        languages=spoken(run / "final", manifest),
        prompt=json.dumps(prompt_of(template), ensure_ascii=False),
        decoder_prefix=" ".join(f"`{token}`" for token in template.get("decoder_prefix", ())),
        new_tokens=manifest["tokens"]["target"]["limit"] if manifest else 128,
        scores=scores,
        is_selected=recipe["final"] == "best" and any(kind_of(score.split) == "validation" for score in scores),
        data=manifest and data_facts(manifest, fingerprint, recipe),
        no_data=f"Prepared data `{last_part(recipe['data'])}`, of which nothing else is known here: "
        f"what was trained on was not found when this card was made.",
        training=training(recipe, step, whole.get("stages")),
        limits=limits(manifest, scores),
        prepare_yaml=manifest and dump(prepare_settings(manifest)),
        train_yaml=dump(train_settings(whole)),
    )
    return str(card)


# What the run has written


def trained_steps(run: Path) -> tuple[int | None, dict[str, Any]]:
    """The step whose checkpoint is the final model, and the facts of the run that it holds; None where it is gone."""
    final = checkpoints.read_json(run / "final" / checkpoints.MANIFEST)
    for path in reversed(checkpoints.complete_checkpoints(run / "checkpoints")):
        entries = checkpoints.read_json(path / checkpoints.MANIFEST)
        model = {name.removeprefix("model/"): entry for name, entry in entries.items() if name.startswith("model/")}
        if model == final:
            return checkpoints.checkpoint_step(path), checkpoints.read_json(path / "state.json")["run"]
    return None, {}


def prepared_manifest(
    recipe: Mapping[str, Any], facts: Mapping[str, Any], run: Path
) -> tuple[dict[str, Any] | None, str]:
    """What `diptych prepare` wrote of the data, and its hash; None, "" where that is not found.

    A folder that was named from where training ran is looked for from here, and from every folder that the run lies
    in: the hash, which is among the facts of the run (resuming.py), tells whether it is the one that was trained on.
    """
    for folder in (Path(), *run.resolve().parents):
        file = folder / recipe["data"] / checkpoints.MANIFEST
        fingerprint = sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        if fingerprint and fingerprint in facts.values() and "inputs" in (manifest := checkpoints.read_json(file)):
            return manifest, fingerprint
    return None, ""


def validation_scores(run: Path, step: int | None, recipe: Mapping[str, Any]) -> list[Score]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if kind_of(row["split"]) == "validation" and row["step"] == step]
    of_step = {row["split"]: row for row in rows}  # the last of each
    dataset, sample = last_part(recipe["data"]), f"in training, on up to {recipe['metrics_limit']:,} rows"
    return [
        Score(split, dataset, metric, value, None, "in training" if metric == "loss" else sample)
        for split, row in of_step.items()
        for metric, value in row.items()
        if metric not in NO_SCORES
    ]


def report_scores(run: Path) -> list[Score]:
    """Of every report in the run folder. UserError for one of another model, or of an earlier one of this run."""
    scores = []
    for file in sorted(run.glob("*.json")):
        try:
            report = checkpoints.read_json(file)
        except ValueError as error:
            raise UserError(
                f"{file} may be a report, and is no JSON: {error}. Mend it or move it elsewhere."
            ) from None
        if not isinstance(report, dict) or not {"figures", "settings"} <= report.keys():
            continue  # status.json, and whatever else lies there
        settings = report["settings"]
        if report.get("model") != checkpoints.read_json(run / "final" / checkpoints.MANIFEST):
            raise UserError(
                f"{file} is a report on {settings['model']}, and not on what is now in {run / 'final'}. Move it "
                f"elsewhere, or evaluate again: diptych evaluate {run / 'final'} --data {settings['data']} --split "
                f"{settings['split']} --out {file}"
            )
        intervals, signatures = report.get("intervals", {}), report.get("signatures", {})
        rows = f"{report['figures']['rows']:,} rows"
        scores += [
            Score(
                settings["split"],
                last_part(settings["data"]),
                metric,
                value,
                tuple(intervals[metric]) if metric in intervals else None,
                f"{rows}, {signatures[metric]}" if metric in signatures else rows,
            )
            for metric, value in report["figures"].items()
            if metric not in NO_SCORES
        ]
    return scores


def read_config(files: Mapping[str, Path | bytes], name: str) -> dict[str, Any]:
    content = files.get(name, b"{}")
    return json.loads(content if isinstance(content, bytes) else content.read_bytes())


def weights_count(files: Mapping[str, Path | bytes]) -> int:
    count = 0
    for name, file in files.items():
        if name.endswith(".safetensors"):
            with safe_open(file, framework="numpy") as tensors:
                shapes = (tensors.get_slice(key).get_shape() for key in tensors.keys())
                count += sum(math.prod(shape) for shape in shapes)
    return count


# What the card says of it


def metadata(
    repo: str,
    recipe: Mapping[str, Any],
    config: Mapping[str, Any],
    adapter_base: str | None,
    manifest: Mapping[str, Any] | None,
    scores: list[Score],
    license: str,
    language: str,
) -> ModelCardData:
    """The block between the two lines of dashes. `model-index` has every score; an interval is among its arguments."""
    base = adapter_base or (recipe["model"] if is_on_the_hub(recipe["model"]) else None)
    settings = manifest["settings"] if manifest else {}
    languages = [it.strip() for it in language.split(",") if it.strip()]
    languages = languages or [*settings.get("source_languages", ()), *settings.get("target_languages", ())]
    hub_sources = [source["name"].removeprefix("hf:").split(":")[0] for source in hub_inputs(manifest)]
    family = config.get("model_type")
    return ModelCardData(
        language=sorted(set(languages)) or None,
        license=license or None,
        library_name="peft" if adapter_base else "transformers",
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter_base else "finetune",
        datasets=sorted(set(hub_sources)) or None,
        tags=["diptych", "encoder-decoder", *([family] if family else []), *(["lora"] if adapter_base else [])],
        model_name=repo.split("/")[1],
        eval_results=[eval_result(score) for score in scores] or None,
    )


def eval_result(score: Score) -> EvalResult:
    return EvalResult(
        task_type="text2text-generation",
        dataset_type=score.dataset,
        dataset_name=score.dataset,
        dataset_split=score.split,
        metric_type=score.metric,
        metric_name=score.metric,
        metric_value=score.value,
        metric_args=None if score.bounds is None else {"interval": list(score.bounds)},
    )


def hub_inputs(manifest: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    return [source for source in (manifest["inputs"] if manifest else ()) if source["name"].startswith("hf:")]


def summary(
    recipe: Mapping[str, Any],
    config: Mapping[str, Any],
    adapter_base: str | None,
    files: Mapping[str, Path | bytes],
) -> str:
    count = f"{weights_count(files):,} weights"
    if adapter_base:
        kind = f"LoRA adapter ({count}, rank {config['r']})"
        if config["peft_type"] != "LORA":
            kind = f"{config['peft_type']} adapter ({count})"
        return f"A {kind} for the encoder-decoder `{adapter_base}`."
    if is_named_size(recipe["model"]):
        return f"A Diptych encoder-decoder ({count}), trained from scratch in the size {recipe['model']}."
    base = last_part(recipe["model"])
    return f"An encoder-decoder ({config['model_type']}, {count}), fine-tuned in full from `{base}`."


def prompt_of(template: Mapping[str, Any]) -> str:
    """What the template makes of a row that is nobody's: one of the golden rows that travel with it."""
    golden = template.get("golden", [])
    return golden[0]["source"] if golden else "…"


def spoken(final: Path, manifest: Mapping[str, Any] | None) -> Spoken | None:
    """How the model is told languages; None where it is not by codes of its tokenizer, or they are not known here."""
    directions = list((manifest or {}).get("directions", {}))
    if not directions or not (codes := codes_of(load_tokenizer(str(final)))).is_around_texts:
        return None
    source, target = directions[0].split("-")
    name = "forced_bos_token_id" if codes.layout == "both" else "decoder_start_token_id"
    return Spoken(directions, source, target, name, codes.spellings[target])


def data_facts(manifest: Mapping[str, Any], fingerprint: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": last_part(recipe["data"]),
        "fingerprint": fingerprint,
        "counts": ", ".join(f"{rows:,} {split} rows" for split, rows in manifest["splits"].items()),
        "sources": [
            {
                "name": last_part(source["name"])
                + (f" ({split})" if (split := source.get("split", "train")) != "train" else ""),
                "kept": f"{source['kept']:,}",
                "read": f"{source['read']:,}",
                "share": f"{100 * source['share']:.1f} %",
                "format": source["format"],
                "digest": source["digest"],
                "licence": source.get("license") or UNNAMED,
            }
            for source in manifest["inputs"]
        ],
    }


def training(recipe: Mapping[str, Any], step: int | None, stages: Sequence[Mapping[str, Any]] | None = None) -> str:
    if stages:
        names = ", ".join(stage["name"] for stage in stages)
        return f"In {len(stages)} stages, one after the other: {names}. Of the last: {training(recipe, step)}"
    how = "LoRA on a frozen base" if recipe["method"] == "lora" else "All weights were trained"
    if step is None:
        return f"{how}, in {recipe['precision']}. Of which step this model is, is not known any more."
    which = f"the best by {recipe['best_metric']} in validation" if recipe["final"] == "best" else "the last"
    return f"{how}, in {recipe['precision']}. This is the model after step {step:,}, {which}."


def limits(manifest: Mapping[str, Any] | None, scores: list[Score]) -> list[str]:
    said = ["It knows the kind of text that it was trained on; what it makes of other text was not looked at."]
    if not any(kind_of(score.split) not in ("train", "validation") for score in scores):
        said.append("It was not evaluated on a split that had no part in choosing it.")
    if scores and not any(score.bounds for score in scores):
        said.append("How far its scores would be off on other rows was not computed.")
    if manifest:
        source, target = manifest["tokens"]["source"], manifest["tokens"]["target"]
        said.append(
            f"In training, sources had up to {source['p100']:,} tokens and targets up to {target['p100']:,}; longer "
            f"ones are unknown to it."
        )
        if manifest["sensitive"] is None:
            said.append("Its data were not searched for addresses, numbers and keys, of which it may repeat some.")
    said.append("Nothing was done to keep it from repeating what is wrong or harmful in its data, or in its base.")
    return said


# Settings, without the places of this machine


def is_on_the_hub(name: str) -> bool:
    """owner/name, or an old name without an owner, that is no folder here and no named size."""
    return not (is_named_size(name) or Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1)


def last_part_of_entry(entry: str) -> str:
    """`news=my/a.jsonl` → `news=a.jsonl`; `my/a.en+my/a.ko` → `a.en+a.ko`."""
    name, place = named(entry)
    return (f"{name}=" if name else "") + "+".join(map(last_part, place.split("+")))


def last_part(place: str) -> str:
    """runs/my-data -> my-data; what lies on the Hub keeps its owner."""
    if place.startswith("hf:") or (place.count("/") == 1 and is_on_the_hub(place)):
        return place
    return Path(place).name


def without_places(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    def reduced(value: Any) -> Any:
        return [last_part_of_entry(it) for it in value] if isinstance(value, list) else last_part(value)

    return {name: reduced(value) if name in names and value else value for name, value in settings.items()}


def train_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """All of them, as YAML that `diptych train` reads: what is usual may change."""
    settings = {name: value for name, value in recipe.items() if name != "resume"}
    if settings.get("stages"):
        settings["stages"] = [without_places(stage, PATHS_OF_A_RECIPE) for stage in settings["stages"]]
    return without_places(settings, PATHS_OF_A_RECIPE)


def prepare_settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """All that are set, as YAML that `diptych prepare` reads."""
    settings = {name: value for name, value in manifest["settings"].items() if value not in (None, [], {})}
    settings = without_places(settings, PATHS_OF_PREPARATION)
    mixture = settings.get("mixture")
    if mixture and mixture.get("weights"):
        weights = {last_part(name): weight for name, weight in mixture["weights"].items()}
        settings["mixture"] = mixture | {"weights": weights}
    return settings


def dump(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).rstrip()
