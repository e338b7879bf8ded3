"""A small vision transformer (Dosovitskiy et al., arXiv:2010.11929)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class ViT(nn.Module):
    """Patches of an image as tokens, through blocks of attention and of an MLP.

    As in "Better plain ViT baselines for ImageNet-1k" (Beyer et al., arXiv:2205.01580), positions are fixed sines and
    cosines and the head sees the mean of the tokens, in place of learned positions and a class token.

    Args:
        input_shape: (channels, height, width) of an image; patch_size divides height and width.
        num_classes: number of logits.
        patch_size: side of a patch in pixels; None chooses one, see `choose_patch_size`.
        width: numbers of a token, a multiple of 4 and of heads.
        depth: number of blocks.
        heads: of the attention.
        mlp_ratio: neurons of a block's hidden layer, as a multiple of width.
        dropout: share of activations set to zero while training, 0 to 1: of the tokens with their positions, and of
            what each linear layer but those of queries, keys and values gives, as the ViT paper has it (appendix B.1).

    Raises:
        ValueError: patch_size does not divide the image, or heads or 4 do not divide width.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        patch_size: int | None,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, width_in_pixels = input_shape
        size = patch_size or choose_patch_size(height, width_in_pixels)
        if height % size or width_in_pixels % size:
            raise ValueError(
                f"patch_size={size} does not divide images of {height}x{width_in_pixels} pixels; "
                "choose one that divides both sides, or Resize the images"
            )
        self.embed = nn.Conv2d(channels, width, size, stride=size)
        positions = sincos_positions(height // size, width_in_pixels // size, width)
        self.register_buffer("positions", positions, persistent=False)  # follows from the settings
        self.positions: Tensor
        self.dropout = nn.Dropout(dropout)
        hidden = max(1, round(mlp_ratio * width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[batch, num_classes]` of images `[batch, channels, height, width]`."""
        tokens = self.embed(images).flatten(2).transpose(1, 2)  # [batch, patches, width], row by row
        tokens = self.blocks(self.dropout(tokens + self.positions))
        return self.head(self.norm(tokens).mean(1))


class Block(nn.Module):
    """Attention, then an MLP, each behind a layer norm and added to what came in."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads), nn.Dropout(dropout))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, tokens, width]` of the same shape."""
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


class Attention(nn.Module):
    """Self-attention of several heads, as nn.MultiheadAttention has it (Vaswani et al., arXiv:1706.03762, 3.2).

    Raises:
        ValueError: heads do not divide width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} do not divide width={width}; each head takes an equal share of it")
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)  # queries, keys and values
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, tokens, width]` of the same shape."""
        queries, keys, values = self.in_proj(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values)  # [batch, heads, tokens, width / heads]
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def choose_patch_size(height: int, width: int) -> int:
    """The largest patch that divides an image of so many pixels and is no larger than suits its longer side.

    That is 2 pixels for images of up to 16, 4 of up to 64, 8 of up to 128 and 16 of larger ones (8x8 -> 2, 28x28 and
    32x32 -> 4, 224x224 -> 16).

    Raises:
        ValueError: only one of less than half of what suits divides it, which would make many times more tokens.
    """
    longer = max(height, width)
    suits = 2 if longer <= 16 else 4 if longer <= 64 else 8 if longer <= 128 else 16
    common = math.gcd(height, width)
    size = next(size for size in range(suits, 0, -1) if common % size == 0)
    if 2 * size < suits:
        raise ValueError(
            f"no patch_size from {suits // 2} to {suits} divides images of {height}x{width} pixels; "
            "Resize or Pad the images, or set patch_size"
        )
    return size


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of each place's column and row, `[rows * columns, width]`, row by row.

    Of each there are width / 4 frequencies from 1 down to 1 / 10,000 (Beyer et al., arXiv:2205.01580; in one dimension,
    Vaswani et al., arXiv:1706.03762, section 3.5).

    Raises:
        ValueError: width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width={width} is no multiple of 4; sines and cosines of rows and columns share it equally")
    frequencies = 10_000.0 ** -torch.linspace(0, 1, width // 4)
    row, column = (torch.arange(count)[:, None] * frequencies for count in (rows, columns))
    row = row[:, None].expand(-1, columns, -1)
    column = column[None].expand(rows, -1, -1)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 2).flatten(0, 1)
