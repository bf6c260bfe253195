"""Options that several benchmarks take."""

from typing import Annotated

import typer

Seeds = Annotated[int, typer.Option(min=1, help="Runs of each setting.")]
FirstSeed = Annotated[
    int, typer.Option(min=0, help="The first seed; tune on others than those reported.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, a core each.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed stretches of each.")]
Resume = Annotated[bool, typer.Option(help="Take results that are there already.")]
Record = Annotated[bool, typer.Option(help="Write a record under benchmarks/records.")]
