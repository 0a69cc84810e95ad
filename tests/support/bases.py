"""Base models that tests watch: what is loaded of them, how much memory they find, what is wrong with them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from placeholder.model.base import BaseModel


@dataclass(frozen=True)
class WatchedBase(BaseModel):
    """A base model that keeps what is loaded of it in `loaded`, by name, after `change` was called with it.

    `frees`: the bytes that are free, each time that somebody asks, and the last from then on; without any, the machine's.
    """

    change: Callable[[str, Any], None] = field(default=lambda name, component: None, kw_only=True)
    frees: list[int] = field(default_factory=list, kw_only=True, hash=False)
    loaded: dict[str, Any] = field(default_factory=dict, kw_only=True, hash=False)

    @classmethod
    def of(cls, base: BaseModel, **options: Any) -> "WatchedBase":
        """A base model, watched."""
        return cls(base.source, base.device, base.dtype, revision=base.revision, **options)

    def component(self, kind: type, name: str, **options: Any) -> Any:
        """The component, noted."""
        found = super().component(kind, name, **options)
        self.change(name, found)
        self.loaded[name] = found
        return found

    def free_bytes(self) -> int:
        """The next of `frees`."""
        if not self.frees:
            return super().free_bytes()
        return self.frees.pop(0) if len(self.frees) > 1 else self.frees[0]
