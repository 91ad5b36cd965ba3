"""Meaning: whether states that were made in one parameter group are the same in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlars.rules import pair, real

Group = Mapping[str, Any]

# Options that change what a momentum buffer or a moment holds, with their value where a group does
# not say it: None, where that can be anything. Not the learning rate, the momentum or the weight
# decay, which may change in any run.
DEFAULTS: Group = {"betas": None, "grad_averaging": True, "dampening": 0.0, "maximize": None}
# What says whether states hold weight decay: amsgrad shows an Adam, caution timm's SGDW.
COUPLING = ("amsgrad", "caution", "weight_decay", "decoupled_weight_decay")


def why_not_the_same(ours: Group, theirs: Group) -> str:
    """Why states made in a group of theirs mean something else in a group of ours; else empty."""
    for name, default in DEFAULTS.items():
        other = theirs.get(name, default)
        if name in ours and other is not None and _plain(name, ours[name]) != _plain(name, other):
            return (
                f"these states were made with {name}={other}, and mean something else with "
                f"{name}={ours[name]}, which this group has"
            )
    if real("weight_decay", theirs.get("weight_decay") or 0.0) == 0.0:
        return ""
    if "caution" in theirs and "dampening" in theirs and "buffer" in ours:
        return (
            "these buffers are of timm's SGDW, which leaves weight decay out of them, and mean "
            "something else in LARS"
        )
    return _why_not_coupled(ours, theirs) if "amsgrad" in theirs and "decay" in ours else ""


def _plain(name: str, value: Any) -> Any:
    # pytorch_optimizer may have three betas, of which its LAMB uses two.
    return pair(name, tuple(value)[:2]) if name == "betas" else real(name, float(value))


def _why_not_coupled(ours: Group, theirs: Group) -> str:
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
