"""Diptych: fine-tuning for encoder-decoders. The three top-level folders install under one namespace, `diptych`."""

from pathlib import Path

from setuptools import find_packages, setup

# Lower bounds are versions that the tests were run on; exact versions of our own runs are in constraints.txt.
REQUIREMENTS = [
    "torch>=2.13",
    "transformers>=5.20,<6",
    "accelerate>=1.15",
    "peft>=0.21.2",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "sacrebleu>=2.6",  # BLEU and chrF behind our evaluate.Metric classes
    "rouge-score>=0.1.2",  # ROUGE behind ours
    "tokenizers>=0.23.3",
    "safetensors>=0.8",
    "huggingface_hub>=2.4",  # publishing, by its client of httpx2
    "jinja2>=3.1.6",  # templates
    "docstring-parser>=0.16",  # the docstrings of dataclass fields
    "jsonargparse[signatures]>=4.53",  # command lines as dataclasses; YAML with overrides
    "pyyaml>=6.0.3",
    "matplotlib>=3.10",  # loss.png
    "tqdm>=4.70",
    "regex>=2026.1.14",  # words and syllables of every script, in the metrics
    "numpy>=2.2",
    "pyarrow>=24.0",
    "scipy>=1.15",  # connected components: which rows share a text
    "xxhash>=3.5",  # keys of texts and files
    "psutil>=6.0",  # the launcher that a rank watches; memory that a model would take
    "datasketch>=2.0",  # MinHash
]

EXTRAS = {
    # Tokenizers that come as a spiece.model without a tokenizer.json (older T5, mT5, Marian, Pegasus folders).
    "sentencepiece": ["sentencepiece>=0.2.3", "protobuf>=7.36"],
    # The demo's run in TensorBoard; any other tracker that accelerate knows can be named in a recipe and installed.
    "demo": ["tensorboard>=2.21"],
    # Filters by language, and the report of keys and passwords.
    "clean": ["py3langid>=0.4", "detect-secrets>=1.5"],
    # --long: the ends of sentences.
    "documents": ["sentencex>=1.0.32"],
    "thai": ["pythainlp>=5.4", "python-crfsuite>=0.9.12"],
    # `diptych serve`.
    "serve": ["starlette>=1.0.1", "uvicorn>=0.40", "prometheus-client>=0.22"],
    # examples/ray_serve.py: `diptych serve` in several processes. tests/finetune/test_ray_serve.py: why not in `test`.
    "ray": ["ray[serve]>=2.60"],
    # `diptych demo`.
    "gradio": ["gradio>=6.31"],
    # BLEU over words of Korean and Japanese.
    "mecab": ["sacrebleu[ja,ko]>=2.6"],
    # The metric bertscore. (unbabel-comet needs transformers below 5, and cannot be installed beside Diptych.)
    "bertscore": ["bert-score>=0.3.13"],
    # Export to CTranslate2, and generation with it.
    "ctranslate2": ["ctranslate2>=4.8.3"],
    # Outputs of a given form: JSON of a schema, a regular expression.
    "structured": ["llguidance>=1.9", "jsonschema>=4.25"],
    # Export to ONNX, and its proof.
    "onnx": ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"],
    # The recipe's `optimizer` and `weights`.
    "optimizers": ["bitsandbytes>=0.50", "schedulefree>=1.4.1", "torch-optimi>=0.3.3"],
    # `diptych sweep`.
    "sweep": ["optuna>=5.0"],
    # Preparation on many machines.
    "datatrove": ["datatrove>=0.10"],
    # The site of docs/: `make docs`.
    "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
    "test": [
        "diptych[sentencepiece,demo,clean,documents,thai,datatrove,serve,gradio,ctranslate2,structured,onnx,sweep]",
        # optimizers without bitsandbytes, which prints a line wherever peft is imported; .ci/run tests it by itself
        *("schedulefree>=1.4.1", "torch-optimi>=0.3.3"),
        "openai>=3.0",  # the client that serve is tested with
        "pytest>=9.2",
        "pytest-xdist>=3.8",
        "hypothesis>=6.150",
        "zstandard>=0.23",  # writes the .zst files that tests read
        "playwright>=1.60",  # drives the Chromium that is installed
        "ruff>=0.17",
        "pre-commit>=4.7",
    ],
}

FOLDERS = ("modeling", "data_prep", "finetune")
PACKAGES = [
    f"diptych.{folder}{name}" for folder in FOLDERS for name in ("", *(f".{n}" for n in find_packages(folder)))
]
PACKAGES.remove("diptych.finetune.from_python")  # which is `diptych` itself

setup(
    name="diptych",
    version="0.1.0",
    description="Fine-tuning for encoder-decoders: a modern model, data preparation, and a correct training loop.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.10",
    packages=["diptych", *PACKAGES],
    package_dir={"diptych": "finetune/from_python", **{f"diptych.{name}": name for name in FOLDERS}},
    package_data={
        "diptych.data_prep.reading": ["samples/*"],
        "diptych.data_prep.text_to_ids": ["shipped_templates/*"],
        "diptych.data_prep.report": ["templates/*"],
        "diptych.finetune": ["recipes/*.yaml"],
        "diptych.finetune.inspecting": ["templates/*"],
        "diptych.finetune.serving": ["templates/*"],
        "diptych.finetune.exporting": ["templates/*"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["diptych=diptych.__main__:main"]},
)
