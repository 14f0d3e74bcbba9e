"""Configuration of Moondream 2, in the layout of the Hub's `config.json`."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# Token ids around the user's text, for the checkpoint of 2025-06-21 with the tokenizer moondream/starmie-v1.
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
    """Configuration of the language model. Defaults are those of the released weights.

    Rotary position embeddings apply to the first half of each head.

    Attributes:
        dim: Width D of the hidden states.
        ff_dim: Inner width of the MLPs.
        n_layers: Number of blocks.
        n_heads: Number of attention heads.
        n_kv_heads: Number of key-value heads. Default: `n_heads`.
        vocab_size: Size of the output head.
        max_context: Maximum number of tokens.
        rope_theta: Base of the rotary frequencies.
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
        # transformers would rewrite the rotary base, which is a plain number here.
        kwargs.pop("rope_parameters", None)
        super().__post_init__(**kwargs)
        if self.dim % self.n_heads or self.head_dim % 4:
            raise ValueError(f"dim {self.dim} over {self.n_heads} heads must give a head size divisible by 4.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}.")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.dim // self.n_heads


class MoondreamVisionConfig(PreTrainedConfig):
    """Configuration of the vision encoder and of the tiling. Defaults are those of the released weights.

    Attributes:
        enc_dim: Width of the encoder.
        enc_patch_size: Side of a patch in pixels.
        enc_n_layers: Number of blocks.
        enc_ff_dim: Inner width of the MLPs.
        enc_n_heads: Number of attention heads.
        proj_out_dim: Width of the image features. Default: the width of the language model.
        proj_inner_dim: Inner width of the projection.
        crop_size: Side of a crop in pixels.
        in_channels: Number of color channels.
        max_crops: Maximum number of tiles per image.
        overlap_margin: Overlap of neighboring tiles, in patches per side.
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
        """Number of tokens of an image of any size."""
        return self.grid**2


class MoondreamRegionConfig(PreTrainedConfig):
    """Configuration of the coordinate and size heads.

    Attributes:
        dim: Width of the hidden states. Default: the width of the language model.
        coord_feat_dim: Number of Fourier features of a coordinate.
        coord_out_dim: Number of bins of a coordinate.
        size_feat_dim: Number of Fourier features of a size.
        size_out_dim: Number of bins of width and height together.
        inner_dim: Inner width of the decoders.
    """

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

    Args:
        config: Nested dictionary of the Hub's `config.json` with the optional sections `text`, `vision`, `region` and
            `tokenizer`. Missing values are those of the released weights.
        text_config: Section `text` as a dictionary or config object; overrides the nested one.
        vision_config: Section `vision`, likewise.
        region_config: Section `region`, likewise.
        tokenizer_config: Section `tokenizer`, likewise.
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
        self.text_config.vocab_size  # noqa: B018  raises for a section of the wrong type
        if self.vision_config.proj_out_dim is None:
            self.vision_config.proj_out_dim = self.text_config.dim
        if self.region_config.dim is None:
            self.region_config.dim = self.text_config.dim

    @property
    def image_token_id(self) -> int:
        """Placeholder id, repeated once per image token. One beyond the output head, so it is never generated."""
        return self.text_config.vocab_size

    @property
    def image_tokens(self) -> int:
        """Number of tokens of an image."""
        return self.vision_config.image_tokens

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The nested `tokenizer` section: marker ids and templates."""
        return self.tokenizer_config

    @property
    def templates(self) -> dict[str, Any]:
        """Token ids around the user's text, by skill."""
        return self.tokenizer_config["templates"]

    @property
    def bos_id(self) -> int:
        """Id of the start token."""
        return self.tokenizer_config["bos_id"]

    @property
    def eos_id(self) -> int:
        """Id of the end token."""
        return self.tokenizer_config["eos_id"]

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration in the Hub's layout, with all values."""
        output = super().to_dict()
        for name in [*(f"{section}_config" for section in SECTIONS), "tokenizer_config", "_other_sections"]:
            output.pop(name, None)
        nested = {name: _section_to_dict(getattr(self, f"{name}_config"), cls) for name, cls in SECTIONS.items()}
        output["config"] = {**nested, "tokenizer": copy.deepcopy(self.tokenizer_config), **self._other_sections}
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `save_pretrained` writes: the Hub's layout without unset transformers defaults."""
        defaults = PreTrainedConfig().to_dict()
        output = {k: v for k, v in self.to_dict().items() if k in ("model_type", "config") or defaults.get(k) != v}
        output.pop("_name_or_path", None)
        self.dict_dtype_to_str(output)
        return output


def _section_to_dict(config: PreTrainedConfig, cls: type[PreTrainedConfig]) -> dict[str, Any]:
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return {field.name: getattr(config, field.name) for field in fields(cls) if field.name not in inherited}
