"""Schedules of rho, alpha and beta, by the schedulers that exist for the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from types import FunctionType
from typing import Any, NoReturn

from torch.optim import Optimizer

__all__ = ["Scheduled"]


class Scheduled(Optimizer):
    """An optimizer whose learning rate, as a scheduler sees it, is another of its options.

    So every scheduler of ``torch.optim.lr_scheduler``, and of timm, schedules that option; where it is a tensor, in
    place.

    Args:
        optimizer: any optimizer. Only the scheduler is given this view of it.
        option: name of a number in all its groups, such as "rho", "alpha" or "weight_decay".
    Raises:
        ValueError: if a group has no such option.

    Example::

        optimizer = CRSAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1)
        schedulers = [
            CosineAnnealingLR(optimizer, T_max=90),
            LinearLR(Scheduled(optimizer, "rho"), start_factor=0.1, total_iters=90),
        ]
    """

    # The scheduler of the learning rate warns where it comes before the optimizer; one warning is enough.
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
        """The optimizer's groups, as they are now."""
        return [_Group(group, self.option) for group in self.optimizer.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a function named ``step`` on the instance, which refers to that very instance.
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __repr__(self) -> str:
        return f"Scheduled({type(self.optimizer).__name__}, {self.option!r})"


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: Scheduled, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"this is a view for a scheduler: call {name}() of the optimizer itself")

    method.__name__, method.__doc__ = name, "Raise RuntimeError: this is the optimizer's own business."
    return method


# All that an optimizer does, whichever methods torch's has: step(), state_dict(), hooks and so on.
for _name, _member in vars(Optimizer).items():
    if not _name.startswith("_") and isinstance(_member, FunctionType):
        setattr(Scheduled, _name, _refusing(_name))


class _Group(MutableMapping[str, Any]):
    """The parameters and the option of a group; "lr" is the option, "initial_lr" its initial value, and so on."""

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
