"""What a pickle describes, without its classes: objects that only record how they would have been built."""

from __future__ import annotations

from typing import Any


class Inert:
    """Placeholder for an object of a class that is not loaded: its class, arguments, state and items."""

    __slots__ = ("arguments", "items", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None
        self.items: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the object that was pickled."""
        if isinstance(self.state, dict) and name in self.state:
            return self.state[name]
        raise AttributeError(f"{self!r} has no attribute {name!r}")

    def __call__(self, *_: Any) -> Inert:
        """Return self; a pickle calls this if the object is a function."""
        return self

    def __repr__(self) -> str:
        return f"<{self.kind:.80}, not loaded>"


class InertClass:
    """A class or function that is not loaded; a call returns an `Inert`."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, *arguments: Any) -> Inert:
        """Record an object of this class, or the result of this function."""
        return Inert(self.kind, arguments)

    def __repr__(self) -> str:
        return f"<{self.kind:.80}, not loaded>"
