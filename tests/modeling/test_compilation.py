"""The graph of the model is one graph: compiled and exported it computes what it computes eagerly.

`aot_eager` traces forward and backward as the real compiler does, and spares the minutes of writing kernels.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import EncoderDecoderCache, StaticCache

ONE = {"num_hidden_layers": 1}
SHALLOW = {"encoder": ONE, "decoder": ONE, "initializer_range": 0.2}
GEMMA = {"norm_placement": "around", "norm_offset": 1.0, "embedding_multiplier": 3.0, "attention_softcap": 5.0}
GEMMA |= {"attention_window": 3, "window_rope_theta": 10.0, "logits_softcap": 9.0, "initializer_range": 0.2}
GEMMA |= {"encoder": ONE | {"windowed_layers": [0]}, "decoder": ONE | {"windowed_layers": [0]}}


@pytest.fixture(params=[SHALLOW, GEMMA], ids=["plain", "gemma"])
def shape(request):
    return request.param


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def batch(draw_tokens):
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2]])
    return {
        "input_ids": draw_tokens(2, 7),
        "segment_ids": segments,
        "decoder_input_ids": draw_tokens(2, 7, seed=1),
        "decoder_segment_ids": segments.clone(),  # one object given twice would be another graph
        "labels": draw_tokens(2, 7, seed=2),
        "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1] * 7]),
    }


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_compiled_training_step_is_one_graph_and_matches_eager(build_model, shape, batch, draw_tokens):
    model = build_model(**shape).train()
    expected = model(**batch)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    outputs = compiled(**batch)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits, expected.logits)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-5, msg=name)
    compiled(**batch | {"labels": draw_tokens(2, 7, seed=3), "segment_ids": batch["segment_ids"].flip(0)})
    assert graphs.frame_count == 1, "other values of the same shapes must not compile anew"


@torch.no_grad()
def test_compiled_decoding_step_with_a_static_cache_is_one_graph_and_matches_eager(build_model, shape, draw_tokens):
    model = build_model(**shape)
    config, target = model.config.decoder, draw_tokens(2, 5, seed=1)
    encoded = model.get_encoder()(input_ids=draw_tokens(2, 7))
    expected = model(encoder_outputs=encoded, decoder_input_ids=target, use_cache=False).logits
    cache = EncoderDecoderCache(StaticCache(config, max_cache_len=8), StaticCache(config, max_cache_len=7))
    model(encoder_outputs=encoded, decoder_input_ids=target[:, :2], cache=cache)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for step in (2, 3, 4):
        position = torch.tensor([[step]])
        logits = compiled(
            encoder_outputs=encoded,
            decoder_input_ids=target[:, step : step + 1],
            decoder_position_ids=position,
            cache=cache,
        ).logits
        torch.testing.assert_close(logits[:, 0], expected[:, step], rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1


@torch.no_grad()
def test_exported_forward_matches_eager_for_other_batches_and_lengths(build_model, shape, draw_tokens):
    model = build_model(**shape)

    def inputs(rows, source_tokens, target_tokens):
        mask = torch.ones(rows, source_tokens, dtype=torch.long)
        mask[0, source_tokens - 2 :] = 0
        return {
            "input_ids": draw_tokens(rows, source_tokens),
            "attention_mask": mask,
            "decoder_input_ids": draw_tokens(rows, target_tokens, seed=1),
            "use_cache": False,
        }

    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": both, "attention_mask": both, "decoder_input_ids": both, "use_cache": None}
    exported = torch.export.export(model, (), inputs(3, 7, 5), dynamic_shapes=shapes, strict=False).module()
    for other in (inputs(3, 7, 5), inputs(2, 9, 4), inputs(5, 4, 6)):
        torch.testing.assert_close(exported(**other).logits, model(**other).logits, rtol=1e-5, atol=1e-5)
