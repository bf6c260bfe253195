"""Text from trained weights."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from postlocal.errors import CheckpointError
from postlocal.train.model import SIZES, Transformer
from postlocal.train.preparation import WEIGHTS


def load(folder: Path) -> tuple[Transformer, int]:
    """The trained model of a run, and the sequence length it was trained with.

    Raises:
        CheckpointError: if the folder has no weights, or they cannot be read.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}: is it the --out of a finished run?", path=Path(folder)
        )
    try:
        with safe_open(path, framework="pt") as file:
            details = file.metadata()
            model = Transformer(SIZES[details["model"]])
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {str(error).splitlines()[0]}", path=path
        ) from error
    return model.eval(), int(details["sequence_length"])


@torch.no_grad()
def sample(
    model: Transformer, context: int, prompt: str, length: int, temperature: float, seed: int
) -> str:
    """Continue a prompt.

    Args:
        model: the model.
        context: number of last bytes that it is given.
        prompt: not empty.
        length: number of bytes to add.
        temperature: 0 takes the likeliest byte each time; 1 samples as the model predicts.
        seed: seed of the sampling.

    Returns:
        The prompt and the added text; bytes that are not UTF-8 become replacement characters.

    Raises:
        ValueError: if the prompt is empty, or length or temperature is negative.
    """
    if not prompt:
        raise ValueError("prompt must not be empty")
    if length < 0 or not temperature >= 0:
        raise ValueError(
            f"length and temperature must be at least 0, got {length} and {temperature}"
        )
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt.encode())
    for _ in range(length):
        logits = model(torch.tensor([text[-context:]]))[0, -1]
        text.append(_choose(logits, temperature, generator))
    return bytes(text).decode(errors="replace")


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
