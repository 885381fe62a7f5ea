"""What the configs of all systems have in common: a field left out takes the default of the original's own code."""

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from looplm.config import Config

Size = Annotated[int, Field(ge=1, le=2**31)]  # a width, a vocabulary, a context
Count = Annotated[int, Field(ge=1, le=10_000)]  # layers, loops, experts
CountOrNone = Annotated[int, Field(ge=0, le=10_000)]


class OriginalConfig(Config):
    """The fields of another system's config that decide its weights or what it computes; other fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)

    shapeless: ClassVar[frozenset[str]] = frozenset()
    """Fields that no tensor's shape depends on."""

    @property
    def unused(self) -> frozenset[str]:
        """Fields that decide nothing beside the others."""
        return frozenset()

    @property
    def taken(self) -> list[str]:
        """The fields that were left out and matter; they took their defaults."""
        return [name for name in type(self).model_fields if name not in self.model_fields_set | self.unused]

    def say_taken(self, names: Iterable[str]) -> str:
        """Fields with their values."""
        return ", ".join(f"{name} {getattr(self, name)!r}" for name in names)
