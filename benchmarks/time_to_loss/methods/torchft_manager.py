"""torchft's manager, as `torchft_local_sgd` and `torchft_diloco` need it.

Set up as the README of torchft (0.2.0), its ``examples/localsgd`` and ``examples/diloco``, and the
``local_sgd_integ_test`` that the README points to. What differs:

- All hosts train all the time, so that every manager wants all of them in its quorum.
- ``init_sync=False``, as its documentation asks for where all start from the same weights.
- Time limits are far above what a slow link needs: the examples' 5 s would drop synchronizations.
- One that fails ends the run, where torchft would go on without it, and be timed for that.
- ``hostname`` is the host's address: hosts of an emulated cluster have one name between them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torchft import Manager

_PATIENCE = timedelta(minutes=10)


@contextmanager
def managed(model: nn.Module, rank: int) -> Iterator["Manager"]:
    """A manager that talks to the lighthouse in the ``with`` block.

    Args:
        model: what a replica that comes late would get.
        rank: number of this replica group.
    """
    from torchft import Manager, ProcessGroupGloo
    from torchft.checkpointing.pg_transport import PGTransport

    group = ProcessGroupGloo(timeout=_PATIENCE)
    manager = Manager(
        pg=group,
        load_state_dict=model.load_state_dict,
        state_dict=model.state_dict,
        min_replica_size=int(os.environ["NUM_REPLICA_GROUPS"]),
        use_async_quorum=False,
        timeout=_PATIENCE,
        quorum_timeout=_PATIENCE,
        replica_id=f"host_{rank}",
        hostname=os.environ["MASTER_ADDR"],
        checkpoint_transport=PGTransport(group, timeout=_PATIENCE, device="cpu"),
        init_sync=False,
        max_retries=0,
    )
    try:
        yield manager
    finally:
        manager.shutdown()
        group.shutdown()
