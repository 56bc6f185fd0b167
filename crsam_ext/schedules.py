"""Schedules of rho, alpha and beta, with any scheduler of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from types import FunctionType
from typing import Any, NoReturn

from torch.optim import Optimizer

__all__ = ["Scheduled"]


class Scheduled(Optimizer):
    """A view of an optimizer for a scheduler, which presents another option as the learning rate.

    With it, every scheduler of ``torch.optim.lr_scheduler`` or timm can schedule that option. If the option is a
    tensor, it is changed in place.

    Args:
        optimizer: any optimizer. Pass this view only to the scheduler.
        option: name of a numeric option that all groups have, such as "rho", "alpha" or "weight_decay".
    Raises:
        ValueError: if a group does not have the option.

    Example::

        optimizer = CRSAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1)
        schedulers = [
            CosineAnnealingLR(optimizer, T_max=90),
            LinearLR(Scheduled(optimizer, "rho"), start_factor=0.1, total_iters=90),
        ]
    """

    # Silences the warning about calling the scheduler first, which the scheduler of the learning rate already gives.
    _opt_called = True

    def __init__(self, optimizer: Optimizer, option: str) -> None:
        for group in optimizer.param_groups:
            if option not in group:
                numbers = [k for k, v in group.items() if isinstance(v, float)]
                raise ValueError(f"{type(optimizer).__name__} has no option {option!r} to schedule; it has {numbers}")
        self.optimizer, self.option = optimizer, option
        self.defaults = {"lr": optimizer.defaults.get(option)}

    @property
    def param_groups(self) -> list[MutableMapping[str, Any]]:  # type: ignore[override]
        """Views of the current groups of the optimizer."""
        return [_Group(group, self.option) for group in self.optimizer.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler sets a function named ``step`` on the instance, which refers to that instance.
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __repr__(self) -> str:
        return f"Scheduled({type(self.optimizer).__name__}, {self.option!r})"


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: Scheduled, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"Scheduled is only a view for a scheduler: call {name}() of the optimizer itself")

    method.__name__, method.__doc__ = name, "Raise RuntimeError, because only the optimizer itself has this method."
    return method


# Refuse all public methods of torch's Optimizer: step(), state_dict(), hooks and so on.
for _name, _member in vars(Optimizer).items():
    if not _name.startswith("_") and isinstance(_member, FunctionType):
        setattr(Scheduled, _name, _refusing(_name))


class _Group(MutableMapping[str, Any]):
    """A view of a group with only the parameters and the option: "lr" is the option, "initial_lr" its initial value."""

    def __init__(self, group: dict[str, Any], option: str) -> None:
        self._group, self._option = group, option

    def _name(self, key: str) -> str:
        if key == "params":
            return key
        prefix, lr, rest = key.rpartition("lr")
        if not lr or rest:
            raise KeyError(key)
        return prefix + self._option

    def __getitem__(self, key: str) -> Any:
        return self._group[self._name(key)]

    def __setitem__(self, key: str, value: Any) -> None:
        self._group[self._name(key)] = value

    def __delitem__(self, key: str) -> None:
        del self._group[self._name(key)]

    def __iter__(self) -> Iterator[str]:
        yield "params"
        for key in self._group:
            if key == self._option or key.endswith(f"_{self._option}"):
                yield key.removesuffix(self._option) + "lr"

    def __len__(self) -> int:
        return sum(1 for _ in self)
