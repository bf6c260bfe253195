"""``postlocal sample``."""

from pathlib import Path
from typing import Annotated

import typer

from postlocal.train import sample as sampling


def sample(
    out: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    length: Annotated[int, typer.Option(help="Number of bytes to generate.")] = 400,
    temperature: Annotated[
        float, typer.Option(help="Temperature of sampling; 0 takes the most likely byte.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Random seed of the sampling.")] = 0,
) -> None:
    """Generate text with the trained model of a run."""
    model, context = sampling.load(out)
    typer.echo(sampling.sample(model, context, prompt, length, temperature, seed))
