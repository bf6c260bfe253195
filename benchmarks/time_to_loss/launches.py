"""Training on emulated clusters, kept on disk once it is done."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import cluster
from benchmarks.cache import Cache
from benchmarks.cluster.hosts import Host
from benchmarks.time_to_loss.analysis import Measurements, Pace, merged, paces
from benchmarks.time_to_loss.methods import ALONE, named
from benchmarks.time_to_loss.replica_groups import run_replica_groups
from benchmarks.time_to_loss.worker import Report
from postlocal.train import TrainConfig


@dataclass(frozen=True)
class Launch:
    """Training on all hosts of a cluster of its own.

    Args:
        names: of methods, one after the other.
        config: of the training; it has a rank for each worker, on a host of its own.
        rate: of each host's link, up and down; None: as fast as the machine is.
        rounds: of timed steps; 0: whole runs.
        evaluations: in a whole run.
    """

    names: tuple[str, ...]
    config: TrainConfig
    rate: str | None = None
    rounds: int = 0
    evaluations: int = 20

    @property
    def key(self) -> str:
        """All that decides what comes out."""
        fields = asdict(self) | {"config": self.config.model_dump(mode="json")}
        return json.dumps(fields, sort_keys=True)

    def run(self) -> list[Report]:
        """What came out, of all ranks together.

        Raises:
            RuntimeError: if a rank failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            command = [
                "python", "-m", "benchmarks.time_to_loss.worker",
                "--names", json.dumps(self.names), "--config", self.config.model_dump_json(),
                "--out", folder, "--rounds", str(self.rounds),
                "--evaluations", str(self.evaluations),
            ]  # fmt: skip
            with cluster.cluster(self.config.workers, self.rate, self.rate) as hosts:
                if any(code != 0 for code in self._start(hosts, command)):
                    raise RuntimeError(f"{', '.join(self.names)}: a host failed, as said above")
            ranks = [_read(Path(folder) / f"{rank}.jsonl") for rank in range(self.config.workers)]
        return [merged(reports) for reports in zip(*ranks, strict=True)]

    def _start(self, hosts: Sequence[Host], command: Sequence[str]) -> list[int | None]:
        if any(named(name).replica_groups for name in self.names):
            return run_replica_groups(hosts, command, grace=30)
        return cluster.run(hosts, command, ranks_a_host=1, grace=30)


def launch_groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """The methods of each launch: those with a lighthouse apart, and no communication in each."""
    parts = [
        [name for name in names if name != ALONE and named(name).replica_groups == grouped]
        for grouped in (False, True)
    ]
    return [(ALONE, *part) for part in parts if part]


@dataclass(frozen=True)
class Ran:
    """What came out of a launch.

    Attributes:
        key: the launch's.
        reports: of all ranks together.
    """

    key: str
    reports: list[Report]


class Results:
    """What came out of launches, on disk.

    Args:
        path: the file.
        resume: whether to take what is there already.
        console: where to say what is under way.
    """

    def __init__(self, path: Path, resume: bool, console: Console) -> None:
        self._cache = Cache(path, _read_ran)
        self._console = console
        self._known = self._cache.read() if resume else {}

    def of(self, launch: Launch) -> list[Report]:
        """What came out of a launch, which is run unless that is known."""
        if launch.key not in self._known:
            what = "whole run" if launch.rounds == 0 else f"{launch.rounds} rounds"
            where = launch.rate or "no limit"
            with self._console.status(f"{where}, {what}: {' | '.join(launch.names)}"):
                self.keep(launch, launch.run())
        return self._known[launch.key].reports

    def keep(self, launch: Launch, reports: list[Report]) -> None:
        """Know what came out of a launch from here on."""
        ran = Ran(launch.key, reports)
        self._known[ran.key] = ran
        self._cache.add(ran)


def measure(
    names: Sequence[str],
    config: TrainConfig,
    rates: Sequence[str],
    rounds: int,
    seeds: Sequence[int],
    whole: Sequence[str],
    results: Results,
) -> Measurements:
    """Measure all that the results do not hold yet.

    Args:
        names: of methods; the first one is that without communication.
        config: of the training.
        rates: of each host's link.
        rounds: of timed steps at each rate.
        seeds: of whole runs.
        whole: patterns of 'NAME @ RATE' that are also run to the end at that rate.
        results: what is there already.
    """
    measured = Measurements(seeds)
    seeded = {seed: config.model_copy(update={"seed": seed}) for seed in seeds}
    for seed, name in product(seeds, names[1:]):  # the first one trains nothing in common
        (measured.curves[name, seed],) = results.of(Launch((name,), seeded[seed]))
    for rate in rates:
        found: dict[str, Pace] = {}
        for part in launch_groups(names):
            found = paces(results.of(Launch(part, config, rate, rounds))) | found
        measured.paces[rate] = {name: found[name] for name in names}
    for seed, name, rate in product(seeds, names, rates):
        if any(fnmatch(f"{name} @ {rate}", pattern) for pattern in whole):
            (measured.wholes[name, seed, rate],) = results.of(Launch((name,), seeded[seed], rate))
    return measured


def _read_ran(key: str, reports: Sequence[Mapping[str, Any]]) -> Ran:
    return Ran(key, [Report(**report) for report in reports])


def _read(path: Path) -> list[Report]:
    return [Report(**json.loads(line)) for line in path.read_text().splitlines()]
