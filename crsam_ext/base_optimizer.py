"""The base optimizer: its construction, and the parameter groups that it shares with CRSAM."""

from __future__ import annotations

import inspect
from collections.abc import Set
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["SeparateGroups", "completed", "groups_of", "make_base"]


def make_base(
    params: Any, base: type[Optimizer] | Optimizer, kwargs: dict[str, Any], own: Set[str]
) -> tuple[Optimizer, list[dict[str, Any]] | None]:
    """Construct the base optimizer over ``params``, or check the instance that was given.

    Args:
        params: parameters or groups.
        base: class or instance of the base optimizer.
        kwargs: arguments of the class.
        own: names of CRSAM's options.
    Returns:
        The base optimizer, and None if CRSAM can share its groups. If the two have options of the same name (RMSprop
        has an ``alpha``, Adadelta a ``rho``), separate groups for CRSAM, which lack those options of the base.
    Raises:
        TypeError: if an argument is unknown, or if arguments are given with an instance.
        ValueError: if the instance has other parameters, or evaluates the loss within its step.
    """
    given: list[dict[str, Any]] = []
    if isinstance(base, type) and issubclass(base, Optimizer):
        accepted = inspect.signature(base.__init__).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
            for name in kwargs.keys() - accepted.keys():
                raise TypeError(f"unexpected keyword argument {name!r}: neither CRSAM nor {base.__name__} takes it")
        if not isinstance(params, (Tensor, str, set)):  # torch rejects these with its own errors
            params = given = groups_of(params, "gamma" in accepted)
            params = [{k: v for k, v in group.items() if k not in own & accepted.keys()} for group in given]
        made = base(params, **kwargs)
    elif isinstance(base, Optimizer):
        if kwargs:
            raise TypeError(
                f"{', '.join(kwargs)} given with an instance of {type(base).__name__}: pass them to its constructor"
            )
        wanted = {id(p) for group in base.param_groups for p in group["params"]}
        members = [p for group in groups_of(params, "gamma" in base.defaults) for p in group["params"]]
        if {id(p[1] if isinstance(p, tuple) else p) for p in members} != wanted:
            raise ValueError("params are not the parameters of the base optimizer: give the same parameters to both")
        made = base
    else:
        raise TypeError(f"base_optimizer must be a class or an instance of torch.optim.Optimizer, but is {base!r}")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{type(made).__name__} evaluates the loss within its step, so it cannot be a base optimizer")
    clash = own & made.defaults.keys()
    if not clash:
        return made, None
    groups = [{k: v for k, v in group.items() if k not in clash} for group in made.param_groups]
    for group, original in zip(groups, given, strict=False):
        group.update({k: original[k] for k in clash if k in original})
    return made, groups


def groups_of(params: Any, gamma_is_the_bases: bool) -> list[dict[str, Any]]:
    """Return ``params`` as a list of groups without duplicates: a tied parameter is one parameter.

    Args:
        params: parameters, named parameters or groups.
        gamma_is_the_bases: whether ``gamma`` in a group is the base optimizer's option, and not another name of alpha.
    """
    items = list(params)
    groups = [dict(group) for group in items] if items and isinstance(items[0], dict) else [{"params": items}]
    for group in groups if items else ():
        members = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        if not isinstance(members, set):
            group["params"] = list({id(p[1] if isinstance(p, tuple) else p): p for p in members}.values())
        if "gamma" in group and not gamma_is_the_bases:
            group["alpha"] = group.pop("gamma")
    return groups if items else []


class SeparateGroups:
    """Separate groups for CRSAM, if the base optimizer has options of the same names. Otherwise the two share groups.

    Args:
        groups: CRSAM's groups, with its options.
        base: the base optimizer.
        own: CRSAM's options and their defaults.
    """

    def __init__(self, groups: list[dict[str, Any]], base: Optimizer, own: dict[str, Any]) -> None:
        self.groups, self._base, self._own = groups, base, own
        self._synced: list[tuple[list[Tensor], dict[str, Any]]] = []  # parameters and options after the last sync()

    def sync(self) -> None:
        """Synchronize our groups and those of the base optimizer.

        Changes on either side since the last call (options, added groups, removed groups) are applied to the other. If
        both sides changed an option, ours wins. A group is identified by its list of parameters.
        """
        ours, base = self.groups, self._base
        theirs = base.param_groups
        if len(ours) != len(theirs):
            known = {id(params) for params, _ in self._synced}
            in_ours, in_theirs = ({id(group["params"]) for group in groups} for groups in (ours, theirs))
            ours[:] = [group for group in ours if id(group["params"]) in in_theirs or id(group["params"]) not in known]
            theirs[:] = [
                group for group in theirs if id(group["params"]) in in_ours or id(group["params"]) not in known
            ]
            for group in [group for group in theirs if id(group["params"]) not in in_ours]:
                ours.append({**self._own, **{k: v for k, v in group.items() if k not in self._own}})
            for group in [group for group in ours if id(group["params"]) not in in_theirs]:
                base.add_param_group({k: v for k, v in group.items() if k not in self._own})
                theirs[-1]["params"] = group["params"]
            order = {id(group["params"]): index for index, group in enumerate(ours)}
            theirs.sort(key=lambda group: order[id(group["params"])])
        before = {id(params): values for params, values in self._synced}
        for our, their in zip(ours, theirs, strict=True):
            last = before.get(id(their["params"]), {})
            for name in their.keys() - self._own.keys():
                if name in last and their[name] is not last[name] and our.get(name) is last[name]:
                    our[name] = their[name]
            their.update({name: value for name, value in our.items() if name not in self._own})
            our.update({name: value for name, value in their.items() if name not in our and name not in self._own})
        self._synced = [(their["params"], dict(their)) for their in theirs]


def completed(given: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the state dict ``given``, with options missing in its groups filled in from ``groups``."""
    pairs = zip(groups, given["param_groups"], strict=False)
    filled = [{**{k: v for k, v in own.items() if k != "params"}, **group} for own, group in pairs]
    return {**given, "param_groups": filled + given["param_groups"][len(filled) :]}
