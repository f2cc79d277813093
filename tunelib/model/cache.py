"""Keys and values of what a model has read, so that a new token costs one position and not the whole text.

B rows, n new positions, T positions read so far with the new ones, H heads, K kv heads, D head dim.
"""

import torch
from torch import Tensor

from tunelib.model.form import PLAIN, AttentionForm, attend_to_seen


class KeyValues:
    """What all layers of a whole model remember of B rows, whose texts end at the same place: a shorter one begins later, after padding.

    Given to the model in place of documents' lengths. Layers come in their order; a layer may ask once per forward pass.

    Args:
        begins: (B,) where each row's text begins.
    """

    def __init__(self, begins: Tensor, num_layers: int):
        self.begins = begins
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._next = 0
        self._masks: dict[int, Tensor] = {}  # of this forward pass, by window
        self._is_padded = bool((begins > 0).any())

    def positions(self, num_new: int) -> Tensor:
        """(B, n): of the next n tokens, counted from where each text begins; 0 for padding."""
        places = torch.arange(self.length, self.length + num_new, device=self.begins.device)
        return (places - self.begins[:, None]).clamp(min=0)

    def crop(self, length: int) -> None:
        """Forget all but the first positions, and a forward pass that was broken off."""
        self.length, self._next = min(length, self.length), 0

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all but some rows (indices), whose order becomes the new one."""
        self.begins = self.begins[rows]
        self._is_padded = bool((self.begins > 0).any())
        self._layers = [held and (held[0][rows], held[1][rows]) for held in self._layers]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of new q (B, n, H, D) to all that was read and the new k, v (B, n, K, D), → (B, n, H, D)."""
        num_new = q.shape[1]
        keys, values = self._store(k, v)  # (B, T, K, D)
        num_keys = keys.shape[1]
        needs_mask = self._is_padded or 1 < num_new < num_keys or not form.is_plain_for(num_keys)
        mask = self._mask(num_new, num_keys, form.window) if needs_mask else None
        q, keys, values = (tensor.transpose(1, 2) for tensor in (q, keys, values))
        return attend_to_seen(q, keys, values, mask, form).transpose(1, 2)

    def _store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer whose turn it is; where there is no room for more, room is doubled."""
        number, end = self._next, self.length + k.shape[1]
        if number == 0:
            self._masks.clear()
        held = self._layers[number]
        if held is None or held[0].shape[1] < end:
            shape = (k.shape[0], max(2 * self.length, end + 64), *k.shape[2:])
            larger = (k.new_empty(shape), v.new_empty(shape))
            if held is not None:
                for all_of_layer, before in zip(larger, held, strict=True):
                    all_of_layer[:, : self.length] = before[:, : self.length]
            held = self._layers[number] = larger
        for all_of_layer, new in zip(held, (k, v), strict=True):
            all_of_layer[:, self.length : end] = new
        self._next = (number + 1) % len(self._layers)
        if self._next == 0:
            self.length = end
        return held[0][:, :end], held[1][:, :end]

    def _mask(self, num_new: int, num_keys: int, window: int) -> Tensor:
        """(B, 1, n, T): True where a key counts; made once for all layers. Padding attends to itself, so that it has no softmax over nothing."""
        if window in self._masks:
            return self._masks[window]
        keys = torch.arange(num_keys, device=self.begins.device)
        queries = keys[num_keys - num_new :, None]  # (n, 1)
        counts = (keys <= queries) & (keys >= self.begins[:, None, None])  # (B, n, T)
        if window:
            counts &= keys > queries - window
        self._masks[window] = (counts | (keys == queries))[:, None]
        return self._masks[window]
