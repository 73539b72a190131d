"""Sizes and switches of the network, and the presets that have names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one checkpoint; everything that tensor shapes alone cannot tell.

    Defaults are those of the released 512-DPT checkpoint (specification, section 1).
    """

    enc_embed_dim: int = 1024
    enc_depth: int = 24
    enc_num_heads: int = 16
    dec_embed_dim: int = 768
    dec_depth: int = 12
    dec_num_heads: int = 12
    state_dec_num_heads: int = 16
    state_size: int = 768
    local_mem_size: int = 256
    head_type: Literal["dpt", "linear"] = "dpt"
    patch_size: int = 16
    image_size: int = 512  # long side after preprocessing; 224 means a square crop
    mlp_ratio: float = 4.0
    rope_base: float = 100.0
    encoder_rope_fp16: bool = True  # round q and k as the reference does (section 3)
    ray_map_encoder: bool = True  # released checkpoints hold one; images never use it

    def __post_init__(self) -> None:
        for width, heads in (
            (self.enc_embed_dim, self.enc_num_heads),
            (self.dec_embed_dim, self.dec_num_heads),
            (self.dec_embed_dim, self.state_dec_num_heads),
        ):
            if heads < 1:
                raise ValueError(f"{heads} attention heads; expected one or more")
            if width % heads or (width // heads) % 4:
                raise ValueError(
                    f"a width of {width} over {heads} heads gives a head of {width / heads:g} "
                    "channels; the rotary embedding needs a whole multiple of 4"
                )
        if self.head_type not in ("dpt", "linear"):
            raise ValueError(f"head_type is {self.head_type!r}; expected 'dpt' or 'linear'")
        if self.head_type == "dpt" and self.patch_size != 16:
            raise ValueError(
                f"patch_size is {self.patch_size}; the DPT head upsamples by exactly 16"
            )
        if self.head_type == "dpt" and self.dec_depth < 3:
            raise ValueError(
                f"dec_depth is {self.dec_depth}; the DPT head reads four levels: 3 blocks or more"
            )


RELEASED_512_DPT = ModelConfig()
RELEASED_224_LINEAR = ModelConfig(head_type="linear", image_size=224)
# The smallest network with every part: for tests.
TINY = ModelConfig(
    enc_embed_dim=32,
    enc_depth=2,
    enc_num_heads=2,
    dec_embed_dim=32,
    dec_depth=4,
    dec_num_heads=2,
    state_dec_num_heads=4,
    state_size=12,
    local_mem_size=8,
    head_type="linear",
    patch_size=8,
    image_size=64,
    mlp_ratio=2.0,
    ray_map_encoder=False,
)
# Small enough to be trained on a CPU; the bundled checkpoint has channels for depth beside these.
COMPACT = ModelConfig(
    enc_embed_dim=96,
    enc_depth=2,
    enc_num_heads=4,
    dec_embed_dim=96,
    dec_depth=4,
    dec_num_heads=4,
    state_dec_num_heads=4,
    state_size=36,
    local_mem_size=4,
    head_type="linear",
    patch_size=8,
    image_size=80,
    mlp_ratio=2.0,
    encoder_rope_fp16=False,
    ray_map_encoder=False,
)
