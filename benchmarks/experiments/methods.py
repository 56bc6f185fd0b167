"""The compared methods, and the values of rho among which a validation split selects."""

from __future__ import annotations

from typing import Any

# alpha and beta are those of the table in docs/training.md; "log" uses the defaults.
METHODS: dict[str, dict[str, Any]] = {
    "base": {"alpha": 0.0, "beta": 0.0},
    "SAM": {"alpha": 0.0, "beta": 0.0},
    "CR-SAM": {"alpha": 0.5, "beta": 0.1},
    "CR-SAM, trace only": {"alpha": 0.5, "beta": 0.0},
    "CR-SAM, norm only": {"alpha": 0.0, "beta": 0.1},
    "CR-SAM, log": {"regularizer": "log"},
}
WITHOUT_ABLATION = ("base", "SAM", "CR-SAM")
RHOS, QUICK_RHOS = (0.05, 0.1, 0.2, 0.4), (0.1, 0.3)


def rhos_of(method: str, quick: bool) -> tuple[float, ...]:
    if method == "base":
        return (0.0,)
    return QUICK_RHOS if quick else RHOS
