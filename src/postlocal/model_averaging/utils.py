"""Means of parameters over a process group, in place.

Example:
    >>> import torch
    >>> from postlocal.model_averaging.utils import get_params_to_average
    >>> model = torch.nn.Linear(2, 1)
    >>> _ = model.bias.requires_grad_(False)
    >>> [tuple(parameter.shape) for parameter in get_params_to_average(model.parameters())]
    [(1, 2)]
"""

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

from postlocal.comm.group import torch_group
from postlocal.model_averaging._averaging import Averaging

__all__ = [
    "Parameters",
    "average_parameters",
    "average_parameters_or_parameter_groups",
    "get_params_to_average",
]

Parameters = Iterable[nn.Parameter] | Iterable[Mapping[str, Any]]
"""The parameters of a model, or the parameter groups of an optimizer."""

_AVERAGINGS: WeakKeyDictionary[dist.ProcessGroup, Averaging] = WeakKeyDictionary()


def average_parameters(
    params: Iterable[nn.Parameter], process_group: dist.ProcessGroup | None
) -> None:
    """Replace parameters by their mean over a process group.

    They are written in place: storage, strides, views and ties stay. Sums are taken in fp32 (fp64
    for fp64 parameters), with at most 64 MiB of memory beside them. Of a DTensor the local part is
    averaged, with ranks that hold the same part. Infinities and NaN of a rank are left out: it
    takes the mean of the others there, with a warning.

    Args:
        params: the same on all ranks, in the same order.
        process_group: who takes part; None: torch's default group. On other ranks nothing is done.

    Raises:
        DisagreementError: on all ranks, if they do not have the same number of parameters with the
            same shapes, strides, dtypes and parts.
        NonFiniteError: on all ranks, if a value is finite on none.
        PeerError: if a rank does not come, within the timeout of the process group; names it.
    """
    if process_group is not None and dist.get_rank(process_group) < 0:
        return
    group = torch_group(process_group)
    averaging = _AVERAGINGS.get(group)
    if averaging is None:
        averaging = _AVERAGINGS[group] = Averaging(group)
    averaging.average_(list(params))


def get_params_to_average(params: Parameters) -> list[nn.Parameter]:
    """The parameters that require grad, whether or not they have a gradient at this moment.

    Torch's function of this name leaves out those without a gradient, each rank by itself.

    Args:
        params: the parameters of a model, or the parameter groups of an optimizer.

    Raises:
        TypeError: if they are something else.
    """
    found: list[nn.Parameter] = []
    for item in params:
        if isinstance(item, nn.Parameter):
            found.append(item)
        elif isinstance(item, Mapping):
            found.extend(item["params"])
        else:
            raise TypeError(
                "params must be parameters or parameter groups (model.parameters() or "
                f"optimizer.param_groups), got a {type(item).__name__}"
            )
    return [parameter for parameter in found if parameter.requires_grad]


def average_parameters_or_parameter_groups(
    params: Parameters, process_group: dist.ProcessGroup | None
) -> None:
    """Average those of `get_params_to_average`, as `average_parameters` does."""
    average_parameters(get_params_to_average(params), process_group)
