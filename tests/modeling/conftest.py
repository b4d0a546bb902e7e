"""Small random models for the model's tests.

Weights are drawn wide and tables are untied, so that greedy outputs vary from step to step and from row to row: a
fresh model of the usual kind repeats one token, and then hardly any test of generation could fail.

Every test that builds a model runs for both hinges. One that is about what only the separate hinge has says so:
`@pytest.mark.separate_hinge`; panels of unequal width exist there alone, too.
"""

import contextlib
import warnings

import pytest
import torch

from diptych.modeling import DiptychConfig, DiptychForConditionalGeneration

PAD, EOS, START = 0, 1, 2
SHAPE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 4 heads × 16 is not the width
    "encoder": {"num_hidden_layers": 2},
    "decoder": {"num_hidden_layers": 3},
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": START,
}


def pytest_configure(config):
    config.addinivalue_line("markers", "separate_hinge: about what the merged hinge does not have")


def pytest_collection_modifyitems(config, items):
    """A test that cannot be asked of the merged hinge is not collected for it."""
    kept, left = [], []
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params or {}
        is_merged = parameters.get("hinge") == "merged"
        shapes = [str(value) for value in parameters.values()]
        is_of_widths = any(word in shape for shape in shapes for word in ("wide", "unequal"))
        alone = item.get_closest_marker("separate_hinge") or is_of_widths
        (left if is_merged and alone else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.fixture(scope="session", params=["separate", "merged"])
def hinge(request) -> str:
    return request.param


@pytest.fixture(name="build_config", scope="session")
def build_config_fixture(hinge):
    """`build_config(**fields)`; a merged decoder that is deeper than its encoder reads some of its layers twice."""

    def build_config(**fields) -> DiptychConfig:
        fields = SHAPE | {"cross_attention": hinge} | fields
        read, written = (fields[panel].get("num_hidden_layers", 2) for panel in ("encoder", "decoder"))
        if hinge == "merged" and read < written - 1:
            fields["encoder_layer_map"] = [round(layer * read / (written - 1)) for layer in range(written)]
        return DiptychConfig(**fields)

    return build_config


@pytest.fixture(name="build_model", scope="session")
def build_model_fixture(build_config):
    def build_model(model_class=DiptychForConditionalGeneration, seed=5, **fields):
        torch.manual_seed(seed)
        return model_class(build_config(**fields)).eval()

    return build_model


def draw_tokens(*shape, seed=0) -> torch.Tensor:
    """Tokens that are no special ones."""
    return torch.randint(3, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(name="draw_tokens", scope="session")
def draw_tokens_fixture():
    return draw_tokens


@pytest.fixture(scope="session")
def uncompiled_flex():
    """`with uncompiled_flex(implementation)`: flex_attention with its masks, but without a compiler and a backward."""

    @contextlib.contextmanager
    def run(implementation):
        if implementation != "flex_attention":
            yield
            return
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield

    return run
