"""looplm: small language models that think in loops. `looplm.load(RUN)` gives a model; everything heavy is lazy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looplm.checkpoint import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for: `looplm --help` must not wait for it."""
    if name == "load":
        from looplm.checkpoint import load

        return load
    raise AttributeError(f"module 'looplm' has no attribute {name!r}")
