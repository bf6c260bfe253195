"""Synchronizations of other packages, to be measured beside ours where they are installed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging import utils as torch_utils
from torch.optim import SGD, Optimizer


@dataclass(frozen=True)
class Case:
    """A way to synchronize a module's parameters.

    Attributes:
        call: what a training loop calls once an iteration.
        calls: how many of them synchronize every parameter once.
        state: gives what is kept from one synchronization to the next.
    """

    call: Callable[[], object]
    calls: int = 1
    state: Callable[[], object] = dict

    def state_bytes(self) -> int:
        """Bytes of tensors in the state at this moment."""
        return _bytes_in(self.state())


def _bytes_in(state: object) -> int:
    match state:
        case Tensor():
            return state.nbytes
        case dict():
            return sum(map(_bytes_in, state.values()))
        case list() | tuple():
            return sum(map(_bytes_in, state))
    return 0


def torch_averager(module: nn.Module) -> Case:
    """The utility that torch's averagers call."""
    group = dist.group.WORLD
    assert group is not None
    parameters = list(module.parameters())
    for parameter in parameters:
        # It leaves out those without a gradient. This one takes no memory.
        parameter.grad = torch.zeros(()).expand_as(parameter)
    return Case(lambda: torch_utils.average_parameters_or_parameter_groups(parameters, group))


def torchft_local_sgd(module: nn.Module) -> Case:
    """torchft's ``LocalSGD``, which synchronizes in a hook of the inner optimizer."""
    from torchft.local_sgd import LocalSGD

    inner = _still(module)
    LocalSGD(_Manager(), module, inner, sync_every=1).__enter__()
    return Case(inner.step)


def torchft_diloco(module: nn.Module) -> Case:
    """torchft's ``DiLoCo`` with one fragment and no delay."""
    from torchft.local_sgd import DiLoCo

    inner = _still(module)
    outer = SGD(module.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    DiLoCo(_Manager(), [module], inner, outer, sync_every=1).__enter__()
    return Case(inner.step, state=outer.state_dict)


PEERS: Mapping[str, tuple[str, Callable[[nn.Module], Case]]] = {
    "averager, torch": ("torch", torch_averager),
    "LocalSGD, torchft": ("torchft", torchft_local_sgd),
    "DiLoCo, torchft": ("torchft", torchft_diloco),
}
"""Package and maker by name."""


def installed(peer: str) -> bool:
    """Whether the package that a peer needs is there."""
    return find_spec(PEERS[peer][0]) is not None


def _still(module: nn.Module) -> Optimizer:
    """An inner optimizer whose step does nothing: there are no gradients."""
    return SGD(module.parameters(), lr=0.1)


class _Manager:
    """As much of torchft's ``Manager`` as its algorithms call, over torch's default group.

    A mean is an asynchronous all-reduce and a division, as with the real one; quorums, votes on
    commits and their round trips are left out, in torchft's favour.
    """

    _use_async_quorum = False

    def start_quorum(self) -> None:
        return None

    def current_step(self) -> int:
        return 0

    def should_commit(self) -> bool:
        return True

    def allow_state_dict_read(self) -> None:
        return None

    def disallow_state_dict_read(self) -> None:
        return None

    def register_state_dict_fn(self, key: str, load: Any, save: Any) -> None:
        return None

    def allreduce(self, tensor: Tensor, should_quantize: bool = False) -> "_Mean":
        return _Mean(tensor.detach())


class _Mean:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._work = dist.all_reduce(tensor, async_op=True)

    def wait(self) -> None:
        assert self._work is not None
        self._work.wait()
        self._tensor.div_(dist.get_world_size())
