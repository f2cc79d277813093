"""What is remembered gives what reading everything again gives."""

import pytest
import torch
from unit.samples import tiny_model

from tunelib.model.cache import KeyValues
from tunelib.model.decoder import Decoder


def read(model: Decoder, cache: KeyValues, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, cache.positions(tokens.shape[1]), cache)


@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 1, 3), (2, 7)])
def test_pieces_give_the_logits_of_the_whole(pieces: tuple[int, ...]) -> None:
    model = tiny_model()
    tokens = torch.randint(48, (1, 9), generator=torch.Generator().manual_seed(1))
    expected = model(tokens, torch.arange(9)[None], (9,))
    cache = KeyValues(torch.zeros(1, dtype=torch.long), 2)
    found = torch.cat([read(model, cache, piece) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert cache.length == 9


def test_padded_rows_are_as_if_alone_and_may_be_dropped() -> None:
    model = tiny_model()
    texts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
    alone = [model(torch.tensor([text]), torch.arange(len(text))[None], (len(text),))[0, -1] for text in texts]
    cache = KeyValues(torch.tensor([0, 4, 2]), 2)
    padded = torch.tensor([[0] * (6 - len(text[:-1])) + text[:-1] for text in texts])
    read(model, cache, padded)
    cache.keep_rows(torch.tensor([2, 1]))
    last = read(model, cache, torch.tensor([[17], [13]]))[:, -1]
    torch.testing.assert_close(last, torch.stack([alone[2], alone[1]]), rtol=1e-10, atol=1e-10)


def test_cropped_it_goes_on_from_there_also_after_a_pass_that_was_broken_off() -> None:
    model = tiny_model()
    cache = KeyValues(torch.zeros(1, dtype=torch.long), 2)
    read(model, cache, torch.tensor([[1, 2, 3, 4, 5]]))
    hook = model.model.layers["0"].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read(model, cache, torch.tensor([[6]]))
    hook.remove()
    cache.crop(3)
    found = read(model, cache, torch.tensor([[9]]))
    expected = model(torch.tensor([[1, 2, 3, 9]]), torch.arange(4)[None], (4,))[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_room_grows() -> None:
    model = tiny_model(max_position_embeddings=400)
    tokens = torch.randint(48, (1, 200), generator=torch.Generator().manual_seed(2))
    cache = KeyValues(torch.zeros(1, dtype=torch.long), 2)
    found = torch.cat([read(model, cache, piece) for piece in tokens.split(37, dim=1)], dim=1)
    torch.testing.assert_close(found, model(tokens, torch.arange(200)[None], (200,)), rtol=1e-10, atol=1e-10)
