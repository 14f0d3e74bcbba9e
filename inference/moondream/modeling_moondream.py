"""Moondream 2 as a transformers model: vision encoder, language model and region heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .checkpoint import HUB_ARGUMENTS, check_loading_info, load_compiled_state_dict
from .configuration_moondream import (
    MoondreamConfig,
    MoondreamRegionConfig,
    MoondreamTextConfig,
    MoondreamVisionConfig,
)
from .generation_moondream import MoondreamGenerationMixin, get_cache_length, unique_consecutive

LAYER_NORM_EPS = 1e-5


@dataclass
class MoondreamModelOutput(ModelOutput):
    """Output of the base model for B rows of L tokens and width D.

    Attributes:
        last_hidden_state: [B, L, D], after the final norm; input of the output head.
        past_key_values: The cache.
        hidden_states: If requested, the embeddings and the output of each block, the last one before the final norm.
        attentions: Always None.
        pre_norm_hidden_state: [B, L, D], before the final norm; input of the region heads.
        image_hidden_states: [N, T, D], features of the N images of this call.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    pre_norm_hidden_state: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None


@dataclass
class MoondreamOutput(ModelOutput):
    """`MoondreamModelOutput` with `logits` [B, kept, vocab_size] and, if labels were passed, the `loss`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    pre_norm_hidden_state: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None


class MoondreamMLP(nn.Module):
    """Two linear layers with the tanh approximation of GELU in between."""

    def __init__(self, dim: int, inner_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner_dim)
        self.fc2 = nn.Linear(inner_dim, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., dim] to [..., out_dim]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of queries [B, heads, L, d] with an additive mask. Returns [B, L, heads, d] and weights."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _attention(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    output, _ = interface(module, q, k, v, mask, dropout=0.0, scaling=module.head_dim**-0.5)
    return output.flatten(2)


# Vision


class MoondreamVisionAttention(nn.Module):
    """Bidirectional self-attention of the vision encoder."""

    def __init__(self, config: MoondreamVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.enc_dim // config.enc_n_heads
        self.num_key_value_groups = 1
        self.is_causal = False
        self.qkv = nn.Linear(config.enc_dim, 3 * config.enc_dim)
        self.proj = nn.Linear(config.enc_dim, config.enc_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map patches [M, T, enc_dim] to [M, T, enc_dim]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(_attention(self, q, k, v, None))


class MoondreamVisionBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block of the vision encoder."""

    def __init__(self, config: MoondreamVisionConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.enc_dim, eps=LAYER_NORM_EPS)
        self.attn = MoondreamVisionAttention(config)
        self.ln2 = nn.LayerNorm(config.enc_dim, eps=LAYER_NORM_EPS)
        self.mlp = MoondreamMLP(config.enc_dim, config.enc_ff_dim, config.enc_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map patches [M, T, enc_dim] to [M, T, enc_dim]."""
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class MoondreamPreTrainedModel(PreTrainedModel):
    """Base class: configuration, initialisation and capabilities."""

    config: MoondreamConfig
    config_class = MoondreamConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MoondreamTextBlock", "MoondreamVisionBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights from a normal distribution, without rescaling of residual branches."""
        std = 0.02
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, MoondreamVisionModel):
            nn.init.normal_(module.pos_emb, std=std)
        elif isinstance(module, MoondreamRegionModel):
            nn.init.normal_(module.coord_features)
            nn.init.normal_(module.size_features)


class MoondreamVisionModel(MoondreamPreTrainedModel):
    """Vision encoder: encodes N images to T = grid**2 features of the language model's width each."""

    config: MoondreamVisionConfig
    config_class = MoondreamVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: MoondreamVisionConfig) -> None:
        super().__init__(config)
        patch = config.in_channels * config.enc_patch_size**2
        self.patch_emb = nn.Linear(patch, config.enc_dim)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.image_tokens, config.enc_dim))
        self.blocks = nn.ModuleList([MoondreamVisionBlock(config) for _ in range(config.enc_n_layers)])
        self.post_ln = nn.LayerNorm(config.enc_dim, eps=LAYER_NORM_EPS)
        self.proj_mlp = MoondreamMLP(2 * config.enc_dim, config.proj_inner_dim, config.proj_out_dim)
        self.post_init()

    def encode_crops(self, crops: torch.Tensor) -> torch.Tensor:
        """Encode crops uint8 [M, 3, S, S] to [M, T, enc_dim].

        Pixels are normalised in the model's precision, as in training of the released weights.
        """
        p, g = self.config.enc_patch_size, self.config.grid
        x = crops.to(self.patch_emb.weight.dtype).div(255.0).sub(0.5).div(0.5)
        x = x.unflatten(3, (g, p)).unflatten(2, (g, p))  # M, C, gy, py, gx, px
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = self.patch_emb(x) + self.pos_emb
        for block in self.blocks:
            x = block(x)
        return self.post_ln(x)

    def stitch(self, tiles: torch.Tensor) -> torch.Tensor:
        """Stitch tile features [n, rows, columns, T, D] and pool them to the grid of one crop, [n, T, D].

        The overlapping margins are dropped at inner edges and kept at outer edges.
        """
        g, m = self.config.grid, self.config.overlap_margin
        th, tw = tiles.shape[1:3]
        tiles = tiles.unflatten(3, (g, g))
        rows = []
        for i in range(th):
            top, bottom = (0 if i == 0 else m), (g if i == th - 1 else g - m)
            row = [tiles[:, i, j, top:bottom, (0 if j == 0 else m) : (g if j == tw - 1 else g - m)] for j in range(tw)]
            rows.append(torch.cat(row, dim=2))
        whole = torch.cat(rows, dim=1).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(whole, (g, g)).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Padding crops are skipped, and consecutive equal images (as in GRPO training) are encoded once. For the tiling
        (1, 1) the only tile equals the whole image, so its features are computed once and used twice.

        Args:
            pixel_values: Crops, uint8 [N, max_crops + 1, 3, S, S].
            image_sizes: Tilings [N, 2].

        Returns:
            Features [N, T, proj_out_dim].

        Raises:
            ValueError: If there are fewer crops than the tilings need.
        """
        unique, inverse = unique_consecutive(
            len(pixel_values), lambda i, j: _same_image(pixel_values, image_sizes, i, j)
        )
        if len(unique) < len(pixel_values):
            return self(pixel_values[unique], image_sizes[unique])[inverse]
        tilings = [tuple(tiling) for tiling in image_sizes.tolist()]
        needed = [1 if tiling == (1, 1) else 1 + tiling[0] * tiling[1] for tiling in tilings]
        if max(needed, default=0) > pixel_values.shape[1]:
            raise ValueError(f"image_sizes needs {max(needed)} crops, but pixel_values has {pixel_values.shape[1]}.")
        if all(n == 1 for n in needed):
            whole = self.encode_crops(pixel_values[:, 0])
            return self.proj_mlp(torch.cat([whole, whole], dim=-1))
        crops = self.encode_crops(torch.cat([image[:n] for image, n in zip(pixel_values, needed)]))
        image_features = []
        for features, tiling in zip(crops.split(needed), tilings):
            whole = features[0]
            tiles = whole if tiling == (1, 1) else self.stitch(features[1:].unflatten(0, tiling)[None])[0]
            image_features.append(torch.cat([whole, tiles], dim=-1))
        return self.proj_mlp(torch.stack(image_features))


def _same_image(pixel_values: torch.Tensor, image_sizes: torch.Tensor, i: int, j: int) -> bool:
    """Whether two images of a batch are equal. Compares the first crops first, which nearly always decides."""
    return (
        torch.equal(image_sizes[i], image_sizes[j])
        and torch.equal(pixel_values[i, 0], pixel_values[j, 0])
        and torch.equal(pixel_values[i], pixel_values[j])
    )


# Text


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embeddings to the first r dims of [B, heads, L, d]; cos and sin are float32 [B, 1, L, r/2]."""
    half = cos.shape[-1]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    return torch.cat([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype), x[..., 2 * half :]], dim=-1)


class MoondreamTextAttention(nn.Module):
    """Causal self-attention with rotary embeddings and a cache."""

    def __init__(self, config: MoondreamTextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.is_causal = True
        self.qkv = nn.Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """Map hidden states [B, L, D] to [B, L, D]; updates the cache."""
        heads, kv_heads = self.config.n_heads, self.config.n_kv_heads
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        return self.proj(_attention(self, q, k, v, attention_mask))


class MoondreamTextBlock(GradientCheckpointingLayer):
    """Transformer block with attention and MLP in parallel after a shared norm."""

    def __init__(self, config: MoondreamTextConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.attn = MoondreamTextAttention(config, layer_idx)
        self.mlp = MoondreamMLP(config.dim, config.ff_dim, config.dim)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Map hidden states [B, L, D] to [B, L, D]; updates the cache."""
        h = self.ln(x)
        return x + self.attn(h, rotary, attention_mask, past_key_values) + self.mlp(h)


class MoondreamTextModel(MoondreamPreTrainedModel):
    """Decoder: embeddings [B, L, D] to hidden states before and after the final norm."""

    config: MoondreamTextConfig
    config_class = MoondreamTextConfig
    input_modalities = ("text",)

    def __init__(self, config: MoondreamTextConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList([MoondreamTextBlock(config, i) for i in range(config.n_layers)])
        self.post_ln = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.wte = value

    def rotary(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine, float32 [B, 1, L, head_dim/4], for positions [B, L]."""
        half = self.config.head_dim // 4
        steps = torch.arange(half, dtype=torch.float32, device=position_ids.device) / half
        angles = position_ids[:, None, :, None].float() * self.config.rope_theta**-steps
        return angles.cos(), angles.sin()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        output_hidden_states: bool = False,
    ) -> MoondreamModelOutput:
        """Run the decoder. `attention_mask` is None (causal) or a 4-D mask for the attention implementation."""
        if position_ids is None:
            start = get_cache_length(past_key_values)
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + start
        rotary = self.rotary(position_ids)
        x, states = inputs_embeds, [inputs_embeds]
        for block in self.blocks:
            x = block(x, rotary, attention_mask=attention_mask, past_key_values=past_key_values)
            states.append(x)
        return MoondreamModelOutput(
            last_hidden_state=self.post_ln(x),
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
            pre_norm_hidden_state=x,
        )


# Regions


class MoondreamRegionModel(nn.Module):
    """Region heads: encode coordinates and sizes (fractions of the image) to embeddings, and decode them to bins."""

    def __init__(self, config: MoondreamRegionConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("coord_features", torch.randn(1, config.coord_feat_dim // 2))
        self.register_buffer("size_features", torch.randn(2, config.size_feat_dim // 2))
        self.coord_encoder = nn.Linear(config.coord_feat_dim, config.dim)
        self.size_encoder = nn.Linear(config.size_feat_dim, config.dim)
        self.coord_decoder = MoondreamMLP(config.dim, config.inner_dim, config.coord_out_dim)
        self.size_decoder = MoondreamMLP(config.dim, config.inner_dim, config.size_out_dim)

    def encode_coordinate(self, x: torch.Tensor) -> torch.Tensor:
        """Encode a coordinate [..., 1] in 0..1 to an embedding [..., D]."""
        return self.coord_encoder(_fourier_features(x, self.coord_features))

    def encode_size(self, wh: torch.Tensor) -> torch.Tensor:
        """Encode width and height [..., 2] in 0..1 to an embedding [..., D]."""
        return self.size_encoder(_fourier_features(wh, self.size_features))

    def decode_coordinate(self, hidden: torch.Tensor) -> torch.Tensor:
        """Decode a hidden state [..., D] before the final norm to logits [..., bins] of the next coordinate."""
        return self.coord_decoder(hidden)

    def decode_size(self, hidden: torch.Tensor) -> torch.Tensor:
        """Decode a hidden state [..., D] before the final norm to logits [..., 2, bins] of width and height."""
        return self.size_decoder(hidden).unflatten(-1, (2, -1))

    def bin_to_coordinate(self, bins: torch.Tensor) -> torch.Tensor:
        """Convert bins to coordinates: bin / number of bins."""
        return bins.float() / self.config.coord_out_dim

    def bin_to_size(self, bins: torch.Tensor) -> torch.Tensor:
        """Convert bins to sizes on a logarithmic scale from 2^-10 to 1."""
        return torch.exp2(10.0 * bins.float() / (self.config.size_out_dim // 2 - 1) - 10.0)

    def coordinate_to_bin(self, value: torch.Tensor) -> torch.Tensor:
        """Return the bin nearest to a coordinate, as a training label. Clamped to 0..1."""
        return (value * self.config.coord_out_dim).round().long().clamp(0, self.config.coord_out_dim - 1)

    def size_to_bin(self, value: torch.Tensor) -> torch.Tensor:
        """Return the bin nearest to a size, as a training label. Clamped to 2^-10..1."""
        last = self.config.size_out_dim // 2 - 1
        return ((value.clamp(min=2.0**-10).log2() + 10.0) / 10.0 * last).round().long().clamp(0, last)


def _fourier_features(x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    angles = 2 * math.pi * x.to(features.dtype) @ features
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# Full model


class MoondreamModel(MoondreamPreTrainedModel):
    """Vision encoder, decoder and region heads, without the output head."""

    def __init__(self, config: MoondreamConfig) -> None:
        super().__init__(config)
        self.text = MoondreamTextModel._from_config(config.text_config)
        self.vision = MoondreamVisionModel._from_config(config.vision_config)
        self.region = MoondreamRegionModel(config.region_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.text.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.text.wte = value

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Encode crops uint8 [N, max_crops + 1, 3, S, S] with tilings [N, 2] to features [N, T, D]."""
        return self.vision(pixel_values, image_sizes)

    def embed(
        self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None, embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed token ids and replace the image placeholders by image features, in order.

        Args:
            input_ids: [B, L].
            image_features: [N, T, D].
            embeds: [B, L, D], used instead of the embeddings of `input_ids`.

        Returns:
            Embeddings [B, L, D].

        Raises:
            ValueError: If the numbers of placeholders and features differ.
        """
        is_image = input_ids == self.config.image_token_id
        if embeds is None:
            embeds = self.text.wte(input_ids.masked_fill(is_image, 0))
        if image_features is None:
            return embeds
        features = image_features.to(embeds).flatten(0, 1)
        if int(is_image.sum()) != features.shape[0]:
            raise ValueError(
                f"The text has {int(is_image.sum())} image placeholders, the images have {features.shape[0]} tokens. "
                f"Each image needs {self.config.image_tokens} times the id {self.config.image_token_id}."
            )
        return embeds.masked_scatter(is_image[..., None], features)

    def prefix_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return bool [B, L], True for the bidirectional prefix: all unpadded tokens up to the last image token."""
        is_image = input_ids == self.config.image_token_id
        prefix = is_image.flip(1).cumsum(1).flip(1) > 0
        return prefix if attention_mask is None else prefix & (attention_mask[:, -input_ids.shape[1] :] != 0)

    def _attention_mask(
        self,
        embeds: torch.Tensor,
        prefix: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor | None:
        blocks = None if prefix is None else torch.where(prefix, 0, -1)
        return create_causal_mask(
            config=self.config.text_config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            block_sequence_ids=blocks,
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoondreamModelOutput | tuple:
        """Run the model on B rows of L tokens.

        Args:
            input_ids: [B, L]. Next to `inputs_embeds` they only locate the image.
            attention_mask: [B, past + L], 0 on padding at the left; or a 4-D mask.
            position_ids: [B, L]. Default: derived from the mask.
            past_key_values: The cache.
            inputs_embeds: [B, L, D].
            pixel_values: Crops, uint8 [N, max_crops + 1, 3, S, S].
            image_sizes: Tilings [N, 2].
            image_features: [N, T, D], used instead of `pixel_values`.
            token_type_ids: [B, L], 1 on the bidirectional prefix. Only needed for `inputs_embeds` without `input_ids`.
            use_cache: Whether to create a cache.
            output_hidden_states: Whether to return all hidden states.
            return_dict: False for a tuple.
            **kwargs: Ignored.

        Raises:
            ValueError: If inputs are missing or inconsistent.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("Pass input_ids or inputs_embeds.")
        if pixel_values is not None and image_features is None:
            if image_sizes is None:
                raise ValueError("pixel_values require image_sizes, the tiling of each image.")
            image_features = self.get_image_features(pixel_values, image_sizes)
        embeds = inputs_embeds if input_ids is None else self.embed(input_ids, image_features, inputs_embeds)
        past = get_cache_length(past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        flat = attention_mask is None or attention_mask.ndim == 2
        if position_ids is None and attention_mask is not None and flat:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        prefix = self._bidirectional_prefix(input_ids, token_type_ids, attention_mask) if past == 0 and flat else None
        outputs = self.text(
            inputs_embeds=embeds,
            attention_mask=self._attention_mask(embeds, prefix, attention_mask, past_key_values),
            position_ids=position_ids,
            past_key_values=past_key_values,
            output_hidden_states=bool(output_hidden_states),
        )
        outputs.image_hidden_states = image_features
        return outputs if return_dict is not False else outputs.to_tuple()

    def _bidirectional_prefix(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        if token_type_ids is not None:
            return token_type_ids == 1
        if input_ids is None or not (input_ids == self.config.image_token_id).any():
            return None
        return self.prefix_mask(input_ids, attention_mask)


class MoondreamForConditionalGeneration(MoondreamPreTrainedModel, MoondreamGenerationMixin, GenerationMixin):
    """Moondream 2 with its output head: text by `generate`, boxes by `detect`, points by `point`."""

    def __init__(self, config: MoondreamConfig) -> None:
        super().__init__(config)
        self.model = MoondreamModel(config)
        self.lm_head = nn.Linear(config.text_config.dim, config.text_config.vocab_size)
        self.post_init()
        self._set_special_tokens()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or Hub repository in the original layout. See `PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: If weights are quantised, or keys are missing, unknown or of another shape.
        """
        return_info = kwargs.pop("output_loading_info", False)
        any_shape = kwargs.pop("ignore_mismatched_sizes", False)
        state_dict = load_compiled_state_dict(pretrained_model_name_or_path, kwargs)
        if state_dict is not None:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            if not isinstance(kwargs.get("config"), MoondreamConfig):
                kwargs["config"] = MoondreamConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            kwargs["state_dict"], pretrained_model_name_or_path = state_dict, None
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        check_loading_info(info, any_shape)
        model._set_special_tokens()
        return (model, info) if return_info else model

    def _set_special_tokens(self) -> None:
        """Set BOS, EOS and padding tokens of the generation config; they share one id and cannot be inferred."""
        for name, value in (("bos", self.config.bos_id), ("eos", self.config.eos_id), ("pad", self.config.eos_id)):
            if getattr(self.generation_config, f"{name}_token_id") is None:
                setattr(self.generation_config, f"{name}_token_id", value)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.text.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.text.wte = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output head."""
        self.lm_head = value

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """See `MoondreamModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoondreamOutput | tuple:
        """Run the model and compute logits [B, kept, vocab_size]. See `MoondreamModel.forward` for common arguments.

        `labels` [B, L], -100 to ignore, are compared with the logits of the previous position. `logits_to_keep` is the
        number of last positions, or a tensor of positions, to compute logits for; 0 for all. `num_items_in_batch`
        divides the summed loss (gradient accumulation).
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_features=image_features,
            token_type_ids=token_type_ids,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        result = MoondreamOutput(
            loss=None if labels is None else self._loss(logits, labels, kwargs.get("num_items_in_batch")),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            pre_norm_hidden_state=outputs.pre_norm_hidden_state,
            image_hidden_states=outputs.image_hidden_states,
        )
        return result if return_dict is not False else result.to_tuple()

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, count: int | torch.Tensor | None) -> torch.Tensor:
        """Compute the next-token cross-entropy: the mean, or the sum divided by `count`."""
        targets = labels.masked_fill(labels == self.config.image_token_id, -100)[:, 1:].flatten()
        scores = logits[:, :-1].flatten(0, 1).float()
        if count is None:
            return F.cross_entropy(scores, targets, ignore_index=-100)
        return F.cross_entropy(scores, targets, ignore_index=-100, reduction="sum") / count


def register_key_mapping(model: type[MoondreamForConditionalGeneration]) -> None:
    """Make a class load and save weights under their original names. Required for each subclass.

    The original files keep the output head inside `text` and the embedding as a bare parameter. The mapping is
    registered by class name: transformers silently ignores a mapping by model type here.
    """
    names = [WeightRenaming("model.text.lm_head", "lm_head"), WeightRenaming("text.wte", "text.wte.weight")]
    register_checkpoint_conversion_mapping(model.__name__, names, overwrite=True)


register_key_mapping(MoondreamForConditionalGeneration)
