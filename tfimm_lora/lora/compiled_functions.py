"""Keras' compiled functions of a model whose active adapters change."""

from __future__ import annotations

from typing import Any


class CompiledFunctions:
    """A model's compiled functions for each set of active adapters.

    With another set a function has to be traced anew; with one that was there before, the function
    of that time is taken again.
    """

    def __init__(self) -> None:
        self._now: dict[str, tuple[str, ...]] = {}
        self._others: dict[str, dict[tuple[str, ...], Any]] = {}
        self._stale = False

    def clear(self) -> None:
        """Forgets all, because variables are gone that functions may have read."""
        self._now, self._others, self._stale = {}, {}, True

    def choose(self, model: Any, attribute: str, active: tuple[str, ...]) -> None:
        """Gives a model the function for the active adapters, or ``None`` for Keras to make one.

        Args:
            model: The model.
            attribute: ``train_function``, ``test_function`` or ``predict_function``.
            active: Names of the active adapters.
        """
        if self._stale:
            for name in ("train_function", "test_function", "predict_function"):
                setattr(model, name, None)
            self._stale = False
        found = getattr(model, attribute)
        others = self._others.setdefault(attribute, {})
        if found is None:
            # Compiled again, or merged: what was traced before is no longer right.
            others.clear()
        elif (now := self._now.get(attribute, active)) != active:
            others[now] = found
            setattr(model, attribute, others.pop(active, None))
        self._now[attribute] = active
