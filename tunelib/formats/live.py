"""The weights of a spread model as they leave: what is trained beside a frozen weight is merged into it, on a copy."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from tunelib.adapters import AdaptedLinear, merge
from tunelib.formats.source import expected_shapes
from tunelib.formats.tensors import Where
from tunelib.model.decoder import Decoder
from tunelib.model.families import family_of
from tunelib.parallel.pipeline import whole_of
from tunelib.parallel.reduce import local
from tunelib.quantize import dequantize


class LiveWeights:
    """Gives a model's weights by Hugging Face name, one at a time. Its methods are collective where the model is sharded.

    Attributes:
        names: of all weights, without a tied head.
        own: those of them that are on this process, sharded or not.
    """

    def __init__(self, model: Decoder):
        self._model = model
        self.names = list(expected_shapes(model.config))
        self._tied_to = family_of(model.config).embedding
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.own = [name for name in self.names if name in self._parameters or model.config.tie_word_embeddings]
        self._merged: tuple[str, Tensor] = ("", torch.empty(0))
        self._adapted = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}

    def get(self, name: str) -> Tensor:
        """One of ``own``, sharded as its parameter is; a tied head is the embedding."""
        if self._merged[0] != name:  # where files hold parts of a tensor, it is asked for again and again
            self._merged = (name, self._make(name))
        return self._merged[1]

    def _make(self, name: str) -> Tensor:
        module = self._adapted.get(name)
        if module is None:
            return self._parameters[name if name in self._parameters else self._tied_to]
        weight, low, magnitude = module.weight.detach(), gather(module.lora_A.weight.detach()), module.lora_magnitude_vector
        take = gather if is_cut_by_columns(weight) else local  # where no rank has whole rows, each works on all of them
        rows = dequantize(take(weight), low.dtype) if module.is_quantized else take(weight)
        lengths = None if magnitude is None else take(magnitude.detach())
        merged = merge(rows, low, take(module.lora_B.weight.detach()), module.scaling, lengths).to(low.dtype)
        if take is gather or not isinstance(weight, DTensor):
            return merged
        shape = torch.Size((module.out_features, module.in_features))
        return DTensor.from_local(merged, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=(module.in_features, 1))

    def read(self, name: str, where: Where = ()) -> Tensor:
        """A weight, or its part, gathered on every rank."""
        is_here = self._model.pipeline is None or name in self.own
        return whole_of(self._model, name, gather(self.get(name)) if is_here else None)[where]


def is_cut_by_columns(tensor: Tensor) -> bool:
    """Whether ranks have parts of rows, so that none has a row whole."""
    return isinstance(tensor, DTensor) and any(isinstance(placement, Shard) and placement.dim == 1 for placement in tensor.placements)


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
