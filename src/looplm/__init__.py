"""looplm: small language models that think in loops. `looplm.load(RUN)` gives a model; everything heavy is lazy."""

TYPE_CHECKING = False  # type checkers know the name; `typing` itself takes a while to import
if TYPE_CHECKING:
    from typing import Any

    from looplm.checkpoint import load as load
    from looplm.hf.convert import load_foreign as load_foreign

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_foreign"]


def __getattr__(name: str) -> "Any":
    """Import torch only when something that needs it is asked for: `looplm --help` must not wait for it."""
    if name == "load":
        from looplm.checkpoint import load

        return load
    if name == "load_foreign":
        from looplm.hf.convert import load_foreign

        return load_foreign
    raise AttributeError(f"module 'looplm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
