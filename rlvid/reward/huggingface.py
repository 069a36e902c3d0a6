"""transformers' ``CLIPModel`` as an open_clip model: its configuration and the names of its weights."""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig


def open_clip_config(config: CLIPConfig, where: str = "config.json") -> dict[str, Any]:
    """Returns open_clip's configuration of a transformers one.

    Raises:
        ValueError: an activation that open_clip's class does not have.
    """
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act != text.hidden_act or vision.hidden_act not in ("gelu", "quick_gelu"):
        raise ValueError(
            f"{where}: activations {vision.hidden_act!r} and {text.hidden_act!r}; supported: 'gelu' or 'quick_gelu' in "
            "both towers"
        )
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size, "patch_size": vision.patch_size, "layers": vision.num_hidden_layers,
            "width": vision.hidden_size, "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
            "heads": text.num_attention_heads, "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }  # fmt: skip


_RENAMED = (
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
)


def open_clip_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of transformers' ``CLIPModel`` under open_clip's names; queries, keys and values become one.

    Names that are unknown stay, so that ``fill`` can name them.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if key.endswith(".position_ids"):  # older files hold these constants
            continue
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        if key in ("text_projection.weight", "visual_projection.weight"):
            key, tensor = {"t": "text_projection", "v": "visual.proj"}[key[0]], tensor.T.contiguous()
        renamed[key] = tensor
    for key in [key for key in renamed if ".self_attn.q_proj." in key]:
        three = [key.replace("q_proj", each) for each in ("q_proj", "k_proj", "v_proj")]
        parts = [renamed.pop(each) for each in three if each in renamed]
        renamed[key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    return renamed
