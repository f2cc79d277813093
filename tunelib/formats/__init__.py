"""In and out: checkpoints of every form. `load_model` gives one as a model to use."""

from tunelib.formats.whole import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
