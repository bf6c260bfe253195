"""Parameters in the shapes of language models, without the models."""

import torch
from torch import nn


class Gpt(nn.Module):
    """Random parameters of a GPT: one embedding, and blocks with biases and norms.

    Args:
        layers: number of blocks.
        width: length of a position's vector.
        vocabulary: number of rows of the embedding.
    """

    def __init__(self, layers: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.ends = _parameters((vocabulary, width), (width,), (width,))
        self.blocks = nn.ModuleList(
            _parameters(
                (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
                (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
            )
            for _ in range(layers)
        )  # fmt: skip


def _parameters(*shapes: tuple[int, ...]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)


def small() -> Gpt:
    """0.3 M parameters, to try things with."""
    return Gpt(layers=5, width=64, vocabulary=1024)


def ten_million() -> Gpt:
    """10 M parameters."""
    return Gpt(layers=5, width=384, vocabulary=3072)


def fifty_million() -> Gpt:
    """50 M parameters."""
    return Gpt(layers=7, width=768, vocabulary=1024)
