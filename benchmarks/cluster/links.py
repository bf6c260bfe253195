"""One rank that measures the links between hosts, as `postlocal plan --measure` does.

Started on every host by `measured_link`.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer

from benchmarks import cluster
from postlocal.comm import group
from postlocal.comm.groups import LevelGroups
from postlocal.planning import Link, measure_links
from postlocal.topology import WORLD, world

NUMEL = 2**20
"""fp32 values of the all-reduces that are timed: about as many as a model of size `tiny` has."""


def measured_link(hosts: int, rate: str) -> Link:
    """What joins hosts of one rank each, by all-reduces on an emulated cluster.

    Raises:
        RuntimeError: if a host failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "link.json"
        with cluster.cluster(hosts, rate, rate) as made:
            command = ["python", "-m", "benchmarks.cluster.links", "--out", str(out)]
            if any(code != 0 for code in cluster.run(made, command, ranks_a_host=1, grace=30)):
                raise RuntimeError(f"links of {rate}: a host failed, as said above")
        return Link(**json.loads(out.read_text()))


def main(
    out: Annotated[Path, typer.Option(help="file that rank 0 writes the link to, as JSON")],
) -> None:
    """Measure, together with the other ranks that a launcher started."""
    dist.init_process_group("gloo")
    everyone = group.resolve(None, None)
    links = measure_links(LevelGroups(everyone, world()), numel=NUMEL)
    if everyone.rank == 0:
        out.write_text(json.dumps(asdict(links[WORLD])))
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
