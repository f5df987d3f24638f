"""`torch.optim.SGD` that does not wait for PyTorch's compiler to be imported.

The methods of PyTorch's optimizers import it at their first call, to keep it away from themselves:
as long as all of torch takes to import, in a process that compiles nothing.
"""

from collections.abc import Callable
from typing import Any

import torch


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of PyTorch's without what is wrapped around it for the compiler."""
    inner: Callable[..., Any] = getattr(method, "__wrapped__", method)
    return inner


class SGD(torch.optim.SGD):
    """The same optimizer, state and bits; not for steps that are compiled or `differentiable`."""

    add_param_group = _itself(torch.optim.SGD.add_param_group)
    zero_grad = _itself(torch.optim.SGD.zero_grad)
    state_dict = _itself(torch.optim.SGD.state_dict)
    load_state_dict = _itself(torch.optim.SGD.load_state_dict)
    step = torch.no_grad()(_itself(torch.optim.SGD.step))
