"""Sizes and token templates of Moondream 2, read from and written to the Hub's own `config.json` layout."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# Ids around the user's text as in the checkpoint of 2025-06-21 with the tokenizer moondream/starmie-v1.
DEFAULT_TEMPLATES: dict[str, Any] = {
    "caption": {"short": [1, 32708, 2, 12492, 3], "normal": [1, 32708, 2, 6382, 3], "long": [1, 32708, 2, 4059, 3]},
    "query": {"prefix": [1, 15381, 2], "suffix": [3]},
    "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
    "point": {"prefix": [1, 2581, 2], "suffix": [3]},
}
DEFAULT_TOKENS: dict[str, int] = {
    "bos_id": 0,
    "eos_id": 0,
    "answer_id": 3,
    "thinking_id": 4,
    "coord_id": 5,
    "size_id": 6,
    "start_ground_points_id": 7,
    "end_ground_id": 9,
}


class MoondreamTextConfig(PreTrainedConfig):
    """Sizes of the language model; the defaults are those of the released weights.

    `n_kv_heads` None means as many as `n_heads`. Rotary positions act on the first half of each head.
    """

    model_type = "moondream1_text"
    base_config_key = "text_config"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "intermediate_size": "ff_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_context",
    }

    dim: int = 2048
    ff_dim: int = 8192
    n_layers: int = 24
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = 51200
    max_context: int = 2048
    rope_theta: float = 10_000.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        # The rotary base is a plain number here: taken out, so that the library does not rewrite it.
        kwargs.pop("rope_parameters", None)
        super().__post_init__(**kwargs)
        if self.dim % self.n_heads or self.head_dim % 4:
            raise ValueError(f"dim {self.dim} over {self.n_heads} heads must give a head size divisible by 4.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}.")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


class MoondreamVisionConfig(PreTrainedConfig):
    """Sizes of the vision tower and of the tiling; the defaults are those of the released weights.

    `proj_out_dim` None means the width of the language model.
    """

    model_type = "moondream1_vision"
    base_config_key = "vision_config"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "enc_dim",
        "intermediate_size": "enc_ff_dim",
        "num_hidden_layers": "enc_n_layers",
        "num_attention_heads": "enc_n_heads",
        "patch_size": "enc_patch_size",
        "image_size": "crop_size",
    }

    enc_dim: int = 1152
    enc_patch_size: int = 14
    enc_n_layers: int = 27
    enc_ff_dim: int = 4304
    enc_n_heads: int = 16
    proj_out_dim: int | None = None
    proj_inner_dim: int = 8192
    crop_size: int = 378
    in_channels: int = 3
    max_crops: int = 12
    overlap_margin: int = 4

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.crop_size // self.enc_patch_size

    @property
    def image_tokens(self) -> int:
        """Tokens that one image takes in the text, whatever its size."""
        return self.grid**2


class MoondreamRegionConfig(PreTrainedConfig):
    """Sizes of the coordinate and size heads. `dim` None means the width of the language model."""

    model_type = "moondream1_region"
    base_config_key = "region_config"

    dim: int | None = None
    coord_feat_dim: int = 256
    coord_out_dim: int = 1024
    size_feat_dim: int = 512
    size_out_dim: int = 2048
    inner_dim: int = 8192


SECTIONS: dict[str, type[PreTrainedConfig]] = {
    "text": MoondreamTextConfig,
    "vision": MoondreamVisionConfig,
    "region": MoondreamRegionConfig,
}


class MoondreamConfig(PreTrainedConfig):
    """Configuration of Moondream 2 in the Hub's layout.

    `config` is the nested dictionary of the Hub's `config.json` with the optional sections `text`, `vision`, `region`
    and `tokenizer`; whatever is missing has the size of the released weights. A section may also be given as
    `text_config=...` and so on (a dictionary or a config object), which wins over the nested one.

    `image_token_id` is the placeholder, repeated once per image token after BOS. It is `vocab_size`, one beyond the
    output head, so no model can ever write it.
    """

    model_type = "moondream1"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(MoondreamTextConfig),
        "vision_config": SubConfigSpec(MoondreamVisionConfig),
        "region_config": SubConfigSpec(MoondreamRegionConfig),
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    text_config: Any = None
    vision_config: Any = None
    region_config: Any = None
    tokenizer_config: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        nested = dict(kwargs.pop("config", None) or {})
        for name in SECTIONS:
            section = nested.pop(name, None)
            if getattr(self, f"{name}_config") is None:
                setattr(self, f"{name}_config", dict(section or {}))
        tokenizer = dict(nested.pop("tokenizer", None) or {}) | dict(self.tokenizer_config or {})
        self.tokenizer_config = {**DEFAULT_TOKENS, "templates": copy.deepcopy(DEFAULT_TEMPLATES), **tokenizer}
        self._other_sections = nested
        kwargs.pop("image_token_id", None)
        super().__post_init__(**kwargs)
        self.text_config.vocab_size  # noqa: B018  a section of the wrong type fails here, by name
        if self.vision_config.proj_out_dim is None:
            self.vision_config.proj_out_dim = self.text_config.dim
        if self.region_config.dim is None:
            self.region_config.dim = self.text_config.dim

    @property
    def image_token_id(self) -> int:
        return self.text_config.vocab_size

    @property
    def image_tokens(self) -> int:
        """Tokens that one image takes in the text."""
        return self.vision_config.image_tokens

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The nested `tokenizer` section: the ids of the marks, and the templates."""
        return self.tokenizer_config

    @property
    def templates(self) -> dict[str, Any]:
        """Ids around the user's text, by skill."""
        return self.tokenizer_config["templates"]

    @property
    def bos_id(self) -> int:
        return self.tokenizer_config["bos_id"]

    @property
    def eos_id(self) -> int:
        return self.tokenizer_config["eos_id"]

    def to_dict(self) -> dict[str, Any]:
        """This configuration in the Hub's layout, every size written out."""
        output = super().to_dict()
        for name in [*(f"{section}_config" for section in SECTIONS), "tokenizer_config", "_other_sections"]:
            output.pop(name, None)
        nested = {name: _section(getattr(self, f"{name}_config"), cls) for name, cls in SECTIONS.items()}
        output["config"] = {**nested, "tokenizer": copy.deepcopy(self.tokenizer_config), **self._other_sections}
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: the Hub's layout without the library's unset defaults."""
        unset = PreTrainedConfig().to_dict()
        output = {k: v for k, v in self.to_dict().items() if k in ("model_type", "config") or unset.get(k) != v}
        output.pop("_name_or_path", None)
        self.dict_dtype_to_str(output)
        return output


def _section(config: PreTrainedConfig, cls: type[PreTrainedConfig]) -> dict[str, Any]:
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return {field.name: getattr(config, field.name) for field in fields(cls) if field.name not in inherited}
