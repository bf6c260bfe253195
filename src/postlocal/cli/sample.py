"""``postlocal sample``."""

from pathlib import Path
from typing import Annotated

import typer

from postlocal.train import sample as sampling


def sample(
    out: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    length: Annotated[int, typer.Option(help="Number of bytes to write.")] = 400,
    temperature: Annotated[
        float, typer.Option(help="Temperature of sampling; 0 takes the likeliest byte.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Write text with the weights that a run left."""
    model, context = sampling.load(out)
    typer.echo(sampling.sample(model, context, prompt, length, temperature, seed))
