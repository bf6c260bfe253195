"""A decoder-only transformer over bytes: rotary positions, RMSNorm, pre-norm blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    """Dimensions of a model.

    Attributes:
        layers: number of blocks.
        width: length of a position's vector.
        heads: number of attention heads; divides ``width``.
    """

    layers: int
    width: int
    heads: int


SIZES = {
    "tiny": Size(layers=4, width=128, heads=4),
    "small": Size(layers=4, width=256, heads=4),
    "base": Size(layers=8, width=512, heads=8),
}
"""Presets: about 0.9 M, 3.3 M and 25 M parameters."""


class Transformer(nn.Module):
    """Predicts the next byte at every position.

    Args:
        size: dimensions.

    Example:
        >>> model = Transformer(SIZES["tiny"])
        >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        self.head_width = size.width // size.heads
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("project.weight", "contract.weight"))
                deviation = 0.02 / (2 * size.layers) ** 0.5 if residual else 0.02
                nn.init.normal_(parameter, std=deviation)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, shape ``(batch, length, 256)``, for bytes of shape ``(batch, length)``."""
        rotation = rotary(tokens.shape[1], self.head_width, tokens.device)
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, rotation)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.RMSNorm(size.width)
        self.query_key_value = nn.Linear(size.width, 3 * size.width, bias=False)
        self.project = nn.Linear(size.width, size.width, bias=False)
        self.perceptron_norm = nn.RMSNorm(size.width)
        self.expand = nn.Linear(size.width, 4 * size.width, bias=False)
        self.contract = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        hidden = hidden + self._attend(self.attention_norm(hidden), rotation)
        expanded = F.gelu(self.expand(self.perceptron_norm(hidden)))
        added: Tensor = hidden + self.contract(expanded)
        return added

    def _attend(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.query_key_value(hidden).view(batch, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            rotate(query, rotation), rotate(key, rotation), value, is_causal=True
        )
        projected: Tensor = self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


def rotary(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each ``(length, width / 2)`` (arXiv 2104.09864)."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(torch.arange(length, device=device), rates)
    return angles.cos(), angles.sin()


def rotate(vectors: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of halves of ``(..., length, width)`` by its position's angles."""
    cosine, sine = rotation
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
