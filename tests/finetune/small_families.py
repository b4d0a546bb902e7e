"""A config for each family of encoder-decoders, of small random models, by the names that tests call them.

Two layers, 64 wide, no dropout. Weights start large, so that LoRA on a frozen random head can be certain.
"""

from transformers import AutoConfig, PreTrainedConfig

import diptych.modeling  # noqa: F401  registers Diptych with AutoConfig
from diptych.finetune.model.families import FAMILIES

PACKED = [family for family, entry in FAMILIES.items() if entry.attentions]

TOKEN_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0}
WITHOUT_START = {name: TOKEN_IDS[name] for name in ("pad_token_id", "eos_token_id", "bos_token_id")}

T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
T5 |= {"dropout_rate": 0.0, "initializer_factor": 1.5}
BART = {"d_model": 64, "max_position_embeddings": 128, "init_std": 0.25}
BART |= {f"{panel}_layers": 2 for panel in ("encoder", "decoder")}
BART |= {f"{panel}_attention_heads": 4 for panel in ("encoder", "decoder")}
BART |= {f"{panel}_ffn_dim": 128 for panel in ("encoder", "decoder")}
BART |= {"dropout": 0.0, "attention_dropout": 0.0, "forced_eos_token_id": None}
BART |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.25}
PROPHETNET = {"hidden_size": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "init_std": 0.25}
PROPHETNET |= {f"num_{panel}_layers": 2 for panel in ("encoder", "decoder")}
PROPHETNET |= {f"num_{panel}_attention_heads": 4 for panel in ("encoder", "decoder")}
PROPHETNET |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "max_position_embeddings": 128}
BERT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128}
BERT |= {"initializer_range": 0.25, "model_type": "bert"}
SWITCH = T5 | {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
MOE = BART | {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "moe_token_dropout": 0.0}
LED = {name: value for name, value in BART.items() if name != "max_position_embeddings"} | {"attention_window": 4}
LED |= {"max_encoder_position_embeddings": 512, "max_decoder_position_embeddings": 128}
GEMMA2_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.25, "model_type": "gpt2"}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CROSS = {"add_cross_attention": True}


def family_configs(vocab_size: int) -> dict[str, PreTrainedConfig]:
    own = {"vocab_size": vocab_size} | TOKEN_IDS
    gemma = {"vocab_size": vocab_size, "dropout_rate": 0.0, "attention_dropout": 0.0} | WITHOUT_START
    panel = LLAMA | {"vocab_size": vocab_size} | WITHOUT_START
    bert = BERT | {"vocab_size": vocab_size, "pad_token_id": 0}
    gemma2_encoder = {"text_config": panel, "vision_config": GEMMA2_VISION, "image_token_index": vocab_size}
    gemma2_encoder |= {"boi_token_index": 3, "eoi_token_index": 4, "mm_tokens_per_image": 1}
    settings = {
        "diptych": LLAMA | own,
        "diptych_merged": LLAMA | own | {"cross_attention": "merged"},
        "t5": T5 | own,
        "flan_t5": T5 | own | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "mt5": T5 | own,
        "umt5": T5 | own,
        "bart": BART | own,
        "mbart": BART | own,
        "m2m_100": BART | own | {"decoder_start_token_id": 1},
        "marian": BART | own,
        "pegasus": BART | own,
        "t5gemma": gemma | {"encoder": panel, "decoder": panel},
        "blenderbot": BART | own,
        "blenderbot-small": BART | own,
        "mvp": BART | own,
        "plbart": BART | own,
        # Those that are not packed:
        "longt5": T5 | own | {"local_radius": 4},
        "led": LED | own,
        "bigbird_pegasus": BART | own | {"block_size": 4, "num_random_blocks": 1},
        "pegasus_x": BART | own | {"block_size": 4, "num_global_tokens": 2},
        "prophetnet": PROPHETNET | own,
        "switch_transformers": SWITCH | own | {"num_experts": 2, "router_jitter_noise": 0.0},
        "nllb-moe": MOE | own | {"num_experts": 2, "decoder_start_token_id": 1},
        "encoder-decoder": TOKEN_IDS | {"encoder": bert, "decoder": bert | {"is_decoder": True} | CROSS},
        "bert_gpt2": TOKEN_IDS | {"encoder": bert, "decoder": GPT2 | own | CROSS},
        "fsmt": BART
        | TOKEN_IDS
        | {
            "decoder_start_token_id": 1,
            "langs": ["en", "ko"],
            "src_vocab_size": vocab_size,
            "tgt_vocab_size": vocab_size,
        },
        "t5gemma2": gemma | {"encoder": gemma2_encoder, "decoder": panel},
    }
    model_types = {"diptych_merged": "diptych", "flan_t5": "t5", "bert_gpt2": "encoder-decoder"}
    return {name: AutoConfig.for_model(model_types.get(name, name), **given) for name, given in settings.items()}
