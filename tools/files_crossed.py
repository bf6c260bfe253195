"""Count the files of postlocal that one synchronization enters.

Two workers, threads of this process, train a small model for one round under a strategy. The call
of ``sync.step()`` that ends the round is traced with `sys.setprofile`, on rank 0 and on the
background threads that it starts, and the distinct files under ``src/postlocal`` are listed::

    $ python tools/files_crossed.py            # the counts
    $ python tools/files_crossed.py --files    # the files as well

The count says how many files a reader opens to follow one synchronization from end to end.
"""

import argparse
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import postlocal
from postlocal import strategies, virtual, wire
from postlocal.comm.group import Group

SOURCE = Path(postlocal.__file__).parent
STRATEGIES = {
    "local_sgd over fp32": strategies.local_sgd(period=2),
    "diloco over error_feedback(int4)": replace(strategies.diloco(period=2), wire=wire.int4()),
}


def files_crossed(strategy: postlocal.Strategy) -> set[str]:
    """The files that the synchronizing step of a strategy enters on rank 0."""
    crossed: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and SOURCE in file.parents:
            crossed.add(str(file.relative_to(SOURCE)))

    def train(group: Group) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sync = postlocal.attach(model, optimizer, strategy, process_group=group)
        for step in range(2):
            model(torch.randn(16, 64) + group.rank).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            traced = step == 1 and group.rank == 0
            if traced:
                threading.setprofile(note)
                sys.setprofile(note)
            sync.step()
            if traced:
                sys.setprofile(None)
                threading.setprofile(None)
        sync.finish()

    virtual.run(2, train)
    return crossed


def main() -> None:
    """Print the counts, and with ``--files`` the files."""
    parser = argparse.ArgumentParser(description="Count the files that one synchronization enters.")
    parser.add_argument("--files", action="store_true", help="list the files as well")
    listing = parser.parse_args().files
    for name, strategy in STRATEGIES.items():
        crossed = files_crossed(strategy)
        print(f"{len(crossed):3} files: {name}")
        for file in sorted(crossed) if listing else ():
            print(f"      {file}")


if __name__ == "__main__":
    main()
