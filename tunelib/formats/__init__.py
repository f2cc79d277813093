"""In and out: checkpoints of every form. `load_model` gives one as a model to use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunelib.formats.whole import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    """Models, and with them torch, are imported when they are asked for: training takes its weights by other ways, and a download needs neither."""
    if name in __all__:
        from tunelib.formats import whole

        return getattr(whole, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
