"""Meaning of states: whether numbers made with one group's options hold with another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlars.ranges import pair, real

Group = Mapping[str, Any]

# Options that change what a momentum buffer or a moment holds, with the value to assume where a
# group lacks the option; None: assume any value. The learning rate, momentum and weight decay are
# not among them, because any run may change them.
STATE_OPTIONS: Group = {
    "betas": None,
    "grad_averaging": True,
    "normalize_grad": None,
    "norm_eps": None,
    "dampening": 0.0,
    "maximize": None,
}
# Options that show whether states hold weight decay: amsgrad identifies Adam and AdamW, caution
# timm's SGDW.
DECAY_OPTIONS = ("amsgrad", "caution", "weight_decay", "decoupled_weight_decay")


def why_states_differ(group: Group, source: Group) -> str:
    """Why states made in the group ``source`` mean something else in ``group``; else empty."""
    for name, default in STATE_OPTIONS.items():
        made_with = source.get(name, default)
        if name not in group or made_with is None:
            continue
        if _comparable(name, group[name]) != _comparable(name, made_with):
            return (
                f"these states were made with {name}={made_with}, and mean something else with "
                f"{name}={group[name]}, which this group has"
            )
    if real("weight_decay", source.get("weight_decay") or 0.0) == 0.0:
        return ""
    if "caution" in source and "dampening" in source and "buffer" in group:
        return (
            "these buffers are of timm's SGDW, which leaves weight decay out of them, and mean "
            "something else in LARS"
        )
    return _why_decay_differs(group, source) if "amsgrad" in source and "decay" in group else ""


def _comparable(name: str, value: Any) -> Any:
    # Groups of pytorch_optimizer may have three betas, of which its LAMB uses the first two.
    return pair(name, tuple(value)[:2]) if name == "betas" else real(name, float(value))


def _why_decay_differs(group: Group, source: Group) -> str:
    decoupled = source.get("decoupled_weight_decay")
    if decoupled is None:
        return (
            "these states do not say whether Adam or AdamW made them, so whether they hold weight "
            "decay is unknown: put decoupled_weight_decay=True, for AdamW, or False, for Adam, "
            "into the groups of the state_dict"
        )
    if decoupled == (group["decay"] == "gradient"):
        fits = 'decay="update" or "decoupled"' if decoupled else 'decay="gradient"'
        return (
            f"these moments {'do not ' if decoupled else ''}hold the weight decay, and mean "
            f"something else with decay={group['decay']!r}: {fits} fits"
        )
    return ""
