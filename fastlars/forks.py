"""Whether this process is a fork of one that had imported fastlars.

A module of its own without torch, because the others may be imported after the fork.
"""

from __future__ import annotations

import os

happened = False


def _note() -> None:
    global happened
    happened = True


os.register_at_fork(after_in_child=_note)
