"""A small residual network with BatchNorm (He et al. 2015, arXiv 1512.03385, section 4.2)."""

from torch import Tensor, nn
from torch.nn import functional


class ResNet(nn.Module):
    """Three stages, each with half the resolution and twice the channels of the one before.

    Images are ``(n, 1, height, width)``. The first convolution has a stride of 2, unlike the
    paper's, which makes a step four times as cheap.

    Args:
        channels: of the first stage.
        blocks: residual blocks a stage; the network has ``6 * blocks + 2`` layers.
        classes: number of scores an image gets.
    """

    def __init__(self, channels: int = 16, blocks: int = 1, classes: int = 10) -> None:
        super().__init__()
        widths = [channels] * blocks + [2 * channels] * blocks + [4 * channels] * blocks
        self.stem = _Normalised(1, channels, stride=2)
        self.blocks = nn.Sequential(
            *(_Block(a, b) for a, b in zip([channels, *widths], widths, strict=False))
        )
        self.scores = nn.Linear(4 * channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(functional.relu(self.stem(images)))
        scores: Tensor = self.scores(features.mean((2, 3)))
        return scores


class _Normalised(nn.Sequential):
    """A convolution without bias, and its BatchNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, size: int = 3) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
            nn.BatchNorm2d(outputs),
        )


class _Block(nn.Module):
    """Two convolutions and a way past them; more channels come with half the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.first = _Normalised(inputs, outputs, stride)
        self.second = _Normalised(outputs, outputs)
        self.past = nn.Identity() if stride == 1 else _Normalised(inputs, outputs, stride, size=1)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.second(functional.relu(self.first(features)))
        return functional.relu(inner + self.past(features))
