"""Triton's interpreter, without preparations that took over half of its time.

It replaces the functions of ``triton.language`` before each launch, and again whenever one function
of a kernel calls another, where they are replaced already. Here each launch does it once.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def prepare_once() -> None:
    """Change the interpreter of this process."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # a release of Triton that prepares in another way
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[Any] = set()  # modules, since the last launch began

    @cache
    def modules(fn: Any) -> set[Any]:
        names = fn.__globals__.values()
        return {m for m in (language, language.core) if any(m is value for value in names)}

    def patch_new(fn: Any) -> Any:
        if modules(fn) <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules(fn))
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()  # at its end, the last launch put the functions back
        launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_new
    interpreter.GridExecutor.__call__ = launch_anew
