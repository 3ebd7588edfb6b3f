"""First values of variables, given when the model is complete: no weight is made twice.

A model that is built for a checkpoint would otherwise draw random values for every weight, only to
have them overwritten, which takes longer than reading the file.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tfimm_lora.weights.aligned import aligned
from tfimm_lora.weights.draw import draw
from tfimm_lora.weights.names import is_stored

Reader = Callable[[], np.ndarray]


class _Building:
    """A model whose variables have no values yet, by way of Keras' own deferral."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._scope: Any = None

    def begin(self) -> bool:
        """Starts the deferral, unless somebody else has, who will end it."""
        scope = keras.StatelessScope()
        scope.__enter__()
        if getattr(scope, "original_scope", None) is not None:
            scope.__exit__(None, None, None)
            return False
        self._scope = scope
        return True

    def settle(self, readers: Sequence[tuple[Any, Reader]] = (), failed: bool = False) -> None:
        """Ends the deferral: variables take what is read, or else what their layer declares."""
        if self._scope is None:
            return
        scope, self._scope = self._scope, None
        read = {id(v): reader for v, reader in readers}
        # Readers can be for a model that is made while this one is built, and not yet a part of it.
        variables = {id(v): v for v in (*self.model.variables, *(v for v, _ in readers))}.values()
        # A build that assigns values may depend on how the initialisers have drawn others.
        assigned = [(v, scope.get_current_value(v)) for v in variables]
        assigned = [(v, value) for v, value in assigned if value is not None]
        for v in variables:
            if not _is_pending(v):
                continue
            if failed:
                _replace(v, _zeros)
            elif id(v) in read:
                _replace(v, _from(read[id(v)]))
            elif not assigned:
                _replace(v, _drawn(v._initializer))
        try:
            scope.__exit__(None, None, None)
        except BaseException:
            _abandon()
            raise
        for v, value in assigned:
            if id(v) not in read:
                v.assign(value)


_current: contextvars.ContextVar[_Building | None] = contextvars.ContextVar(
    "tfimm_lora_building", default=None
)


def _is_pending(variable: Any) -> bool:
    # Keras keeps the initialiser of a variable as long as it waits. Without this attribute, which
    # is private, Keras would initialise and assign_all assign: slower, with the same result.
    return getattr(variable, "_initializer", None) is not None


def _replace(variable: Any, initializer: Callable[..., Any]) -> None:
    variable._initializer = initializer


def _zeros(shape: Any, dtype: Any = None) -> np.ndarray:
    return np.zeros(tuple(shape), dtype)


def _abandon() -> None:
    """Gives zeros to the variables that still wait, after an interrupt while others got theirs.

    Keras keeps its list of them until all are initialised, and every later model would fail on
    those that are.
    """
    from keras.src.backend.common import global_state

    waiting = global_state.get_global_attribute("uninitialized_variables") or []
    global_state.set_global_attribute("uninitialized_variables", [])
    for v in waiting:
        if v._value is None:
            _replace(v, _zeros)
            v._deferred_initialize()


def _from(read: Reader) -> Callable[..., np.ndarray]:
    return lambda shape, dtype=None: aligned(read(), dtype)


def _drawn(initializer: Any) -> Callable[..., Any]:
    def value(shape: Any, dtype: Any = None) -> Any:
        drawn = draw(initializer, tuple(shape), keras.backend.standardize_dtype(dtype))
        return initializer(shape, dtype=dtype) if drawn is None else drawn

    return value


@contextlib.contextmanager
def building(model: Any) -> Iterator[None]:
    """Defers the values of variables that a model creates inside this context.

    They come with :func:`assign_all`, or at the end of the context: then they are drawn as their
    layers declare, see :func:`~tfimm_lora.weights.draw.draw`. Inside, reading a variable gives a
    placeholder.

    Args:
        model: The model that is built inside.

    Example:
        >>> with building(model):
        ...     model.build((None, 224, 224, 3))
    """
    now = _Building(model)
    # Shards of a distributed variable are drawn where they live.
    if keras.distribution.distribution() is not None or not now.begin():
        yield
        return
    token = _current.set(now)
    try:
        yield
    except BaseException:
        now.settle(failed=True)
        raise
    finally:
        _current.reset(token)
        now.settle()


def assign_all(readers: Iterable[tuple[Any, Reader]]) -> None:
    """Gives variables their values, one at a time.

    Variables of a model that is being built (see :func:`building`) get them as their first ones;
    its other variables then get the values that their layers declare.

    Args:
        readers: Variables, each with a function that returns its value. It is called when it is the
            variable's turn, so that one value is in memory at a time; the array is not used by
            anybody else afterwards.

    Raises:
        Exception: What the first failing reader has raised.

    Example:
        >>> assign_all([(layer.kernel, lambda: file.read("head.weight").T)])
    """
    # A packed kernel consists of several variables.
    readers = [
        part for v, read in readers for part in (v.readers(read) if is_stored(v) else [(v, read)])
    ]
    now = _current.get()
    if now is not None:
        errors: list[Exception] = []

        def guarded(variable: Any, read: Reader) -> Reader:
            # Keras initialises all variables that wait or trips over the rest of them later.
            def value() -> np.ndarray:
                try:
                    if not errors:
                        found = read()
                        if tuple(found.shape) != tuple(variable.shape):
                            raise ValueError(
                                f"{variable.path} has shape {tuple(variable.shape)} and its value "
                                f"{tuple(found.shape)}."
                            )
                        return found
                except Exception as error:
                    errors.append(error)
                return np.zeros(tuple(variable.shape), "float32")

            return value

        waiting = [(v, read) for v, read in readers if _is_pending(v)]
        readers = [(v, read) for v, read in readers if not _is_pending(v)]
        now.settle([(v, guarded(v, read)) for v, read in waiting])
        if errors:
            raise errors[0]
    for variable, read in readers:
        variable.assign(read())
