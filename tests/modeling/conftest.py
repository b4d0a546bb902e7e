"""Small random models for the model's tests.

Weights are drawn wide and tables are untied, so that greedy outputs vary from step to step and from row to row: a
fresh model of the usual kind repeats one token, and then hardly any test of generation could fail.
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


def build_config(**fields) -> DiptychConfig:
    return DiptychConfig(**(SHAPE | fields))


def build_model(model_class=DiptychForConditionalGeneration, seed=5, **fields):
    torch.manual_seed(seed)
    return model_class(build_config(**fields)).eval()


def draw_tokens(*shape, seed=0) -> torch.Tensor:
    """Tokens that are no special ones."""
    return torch.randint(3, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(name="build_config", scope="session")
def build_config_fixture():
    return build_config


@pytest.fixture(name="build_model", scope="session")
def build_model_fixture():
    return build_model


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
