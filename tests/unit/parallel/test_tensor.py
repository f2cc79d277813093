"""What cannot be split is said before anything is."""

import dataclasses

import pytest
from unit.samples import TINY_FIELDS

from tunelib.config.schema import Lora
from tunelib.errors import ConfigError
from tunelib.model.families import parse_config
from tunelib.parallel.tensor import check_split

CONFIG = dataclasses.replace(parse_config(TINY_FIELDS, "tiny"), num_attention_heads=12, num_key_value_heads=6, intermediate_size=96, vocab_size=600)


def test_degrees_that_divide_are_taken() -> None:
    for degree in (1, 2, 3, 6):
        check_split(CONFIG, Lora(), degree)
    check_split(CONFIG, Lora(enable=True, quantize_base="nf4", dropout=0.1), 1)


@pytest.mark.parametrize(
    ("degree", "lora", "words"),
    [
        (4, Lora(), r"tensor_parallel_degree = 4 does not divide num_key_value_heads = 6; the nearest below that works is 3"),
        (8, Lora(), r"num_attention_heads = 12 and num_key_value_heads = 6; the nearest below that works is 6"),
        (7, Lora(), r"num_attention_heads = 12 and .* and vocab_size = 600; the nearest below that works is 6"),
        (2, Lora(enable=True, quantize_base="nf4"), r"a base in nf4 is not split; shard it"),
        (2, Lora(enable=True, dropout=0.1), r"lora\.dropout = 0\.1 cannot be drawn alike"),
    ],
)
def test_others_are_refused_with_what_would_work(degree: int, lora: Lora, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_split(CONFIG, lora, degree)
