"""States that another group's options have made into other numbers than ours would be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlars.rules import number, pair

Group = Mapping[str, Any]

# Options that change what a momentum buffer or a moment holds, with the value of groups without
# them. Not the learning rate, the momentum or the weight decay, which may change in any run.
DEFAULTS: Group = {"betas": None, "grad_averaging": True, "dampening": 0.0, "maximize": False}
# What says whether Adam's moments hold weight decay.
COUPLING = ("amsgrad", "weight_decay", "decoupled_weight_decay")


def misread(ours: Group, theirs: Group) -> str:
    """Why a group of ours would misread states that were made in a group of theirs; else empty."""
    for name in DEFAULTS.keys() & ours.keys():
        other = theirs.get(name, ours[name] if name == "betas" else DEFAULTS[name])
        if _plain(name, ours[name]) != _plain(name, other):
            return (
                f"these states were made with {name}={other}, and mean something else with "
                f"{name}={ours[name]}, which this group has"
            )
    return _coupling(ours, theirs) if "amsgrad" in theirs and "decay" in ours else ""


def _plain(name: str, value: Any) -> Any:
    # pytorch_optimizer may have three betas, of which its LAMB uses two.
    return pair(name, tuple(value)[:2]) if name == "betas" else number(name, float(value))


def _coupling(ours: Group, theirs: Group) -> str:
    if number("weight_decay", theirs.get("weight_decay", 0.0)) == 0.0:
        return ""
    decoupled = theirs.get("decoupled_weight_decay")
    if decoupled is None:
        return (
            "these states do not say whether Adam or AdamW made them, which is whether they hold "
            "weight decay: put decoupled_weight_decay=True, for AdamW, or False, for Adam, into "
            "the groups of the state_dict"
        )
    if decoupled == (ours["decay"] == "gradient"):
        fits = 'decay="update" or "decoupled"' if decoupled else 'decay="gradient"'
        return (
            f"these moments {'do not ' if decoupled else ''}hold the weight decay, and mean "
            f"something else with decay={ours['decay']!r}: {fits} fits"
        )
    return ""
