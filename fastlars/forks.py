"""Whether this process was forked from one that had imported fastlars.

A module without torch, so that ``import fastlars`` can import it at once: the modules that need
torch may be imported only after the fork, too late to notice it.
"""

from __future__ import annotations

import os

in_forked_process = False


def _after_fork() -> None:
    global in_forked_process
    in_forked_process = True


os.register_at_fork(after_in_child=_after_fork)
