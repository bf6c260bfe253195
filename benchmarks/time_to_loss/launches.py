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
        rate: of each host's link, up and down; None: no limit.
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
        """Everything that decides the reports."""
        fields = asdict(self) | {"config": self.config.model_dump(mode="json")}
        return json.dumps(fields, sort_keys=True)

    def run(self) -> list[Report]:
        """Train, and return the reports of all ranks together.

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
    """The methods of each launch: replica groups have their own, and all include `ALONE`."""
    parts = [
        [name for name in names if name != ALONE and named(name).replica_groups == grouped]
        for grouped in (False, True)
    ]
    return [(ALONE, *part) for part in parts if part]


@dataclass(frozen=True)
class LaunchReports:
    """The reports of a launch, as they are kept on disk.

    Attributes:
        key: the launch's.
        reports: of all ranks together.
    """

    key: str
    reports: list[Report]


class Results:
    """The reports of launches, on disk.

    Args:
        path: the file.
        resume: whether to use reports of an earlier call.
        console: shows the launch that is running.
    """

    def __init__(self, path: Path, resume: bool, console: Console) -> None:
        self._cache = Cache(path, _read_reports)
        self._console = console
        self._known = self._cache.read() if resume else {}

    def of(self, launch: Launch) -> list[Report]:
        """The reports of a launch, which runs unless they are known."""
        if launch.key not in self._known:
            what = "whole run" if launch.rounds == 0 else f"{launch.rounds} rounds"
            where = launch.rate or "no limit"
            with self._console.status(f"{where}, {what}: {' | '.join(launch.names)}"):
                self.keep(launch, launch.run())
        return self._known[launch.key].reports

    def keep(self, launch: Launch, reports: list[Report]) -> None:
        """Remember the reports of a launch, and write them to disk."""
        ran = LaunchReports(launch.key, reports)
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
        results: reports of earlier launches.
    """
    measured = Measurements(seeds)
    seeded = {seed: config.model_copy(update={"seed": seed}) for seed in seeds}
    for seed, name in product(seeds, names[1:]):  # the first one has no common model
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


def _read_reports(key: str, reports: Sequence[Mapping[str, Any]]) -> LaunchReports:
    return LaunchReports(key, [Report(**report) for report in reports])


def _read(path: Path) -> list[Report]:
    return [Report(**json.loads(line)) for line in path.read_text().splitlines()]
