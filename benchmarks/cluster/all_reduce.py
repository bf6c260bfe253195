"""Time one all-reduce of 10 MB against what a rate allows; torchrun starts it on every rank.

torchrun --nproc-per-node 4 -m benchmarks.cluster.all_reduce 100000000
"""

import sys
import time

import torch
import torch.distributed as dist

from benchmarks.measure import slowest

BYTES = 10_000_000


def main(bits_a_second: float, times: int = 3) -> None:
    """Print the best of some, on rank 0.

    In a ring each rank sends, and receives, ``2 (W - 1) / W`` of the tensor.
    """
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    tensor = torch.ones(BYTES // 4)
    seconds = []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(slowest(time.perf_counter() - start))
    theory = 2 * (world - 1) / world * BYTES * 8 / bits_a_second
    if dist.get_rank() == 0:
        print(
            f"all-reduce of {BYTES / 1e6:g} MB on {world} ranks: {min(seconds):.3f} s, "
            f"by the rate {theory:.3f} s"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(float(sys.argv[1]))
