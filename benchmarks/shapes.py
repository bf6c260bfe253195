"""Parameters in the shapes of language models, without the models."""

import torch
from torch import nn


def gpt(layers: int, width: int, vocabulary: int) -> nn.ParameterList:
    """Random parameters in the shapes of a GPT: one embedding, and blocks with biases and norms."""
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (width,), (width,)]
    for _ in range(layers):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width)]
        shapes += [(width,)]
    return nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)


def ten_million() -> nn.ParameterList:
    """10 M parameters: 5 layers of width 384."""
    return gpt(layers=5, width=384, vocabulary=3072)


def fifty_million() -> nn.ParameterList:
    """50 M parameters: 7 layers of width 768."""
    return gpt(layers=7, width=768, vocabulary=1024)
