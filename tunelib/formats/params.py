"""Meta's params.json ↔ the fields of Hugging Face's config.json.

A params.json says less than a config.json. It gives the ffn width by a rule (`ffn_width`) and Llama 3.1's rope scaling by a yes or no;
the longest context and the spread of drawn weights are not in it at all. What it leaves open is taken from the published size of that
shape, and else from the rules of `parse_params`.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from tunelib.config.sizes import PARAMS, SIZES, llama3_scaling
from tunelib.errors import FormatError
from tunelib.model.config import ModelConfig, RopeScaling
from tunelib.model.families import parse_config
from tunelib.model.families.llama import ARCHITECTURE, hf_config

REQUIRED = ("dim", "n_layers", "n_heads")
DEFAULTS: dict[str, Any] = {"multiple_of": 256, "ffn_dim_multiplier": None, "norm_eps": 1e-5, "rope_theta": 10000.0, "use_scaled_rope": False}
FIELDS: dict[str, type] = {
    **dict.fromkeys((*REQUIRED, "n_kv_heads", "vocab_size", "multiple_of"), int),
    **dict.fromkeys(("ffn_dim_multiplier", "norm_eps", "rope_theta"), float),
    "use_scaled_rope": bool,
}
"""Every key that is read, with its type; numbers are above 0. Null means the default."""
WITHOUT_EFFECT = {"max_seq_len", "max_batch_size", "model_parallel_size"}
"""Keys that say how Meta's program is started, not what it computes."""
UNKNOWN_VOCAB_SIZE = -1
"""What Llama 2 says for its vocabulary: the tokenizer's."""

PUBLISHED_SPLITS: tuple[tuple[int, float | None], ...] = ((256, None), (1024, 1.3), (4096, 1.3), (256, 1.5), (256, 1.0), (4096, 1.2))
POWERS_OF_TWO = [2**power for power in range(12, -1, -1)]
MOST_DIGITS = 17  # of a float64


def parse_params(params: dict[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    """The fields of a config.json, but for ``tie_word_embeddings``, which only the weights tell.

    A shape that Meta published gets exactly the fields of its named size: Llama 3.2's 1B and 3B say ``use_scaled_rope`` like Llama 3.1
    but have factor 32 in their config.json. Any other shape with ``use_scaled_rope`` gets factor 8 and a longest context of 131072; without
    it the longest context is 4096 where rope_theta is 10000 (Llama 2), and else 8192 (Llama 3).

    Args:
        params: the JSON object.
        vocab_size: rows of ``tok_embeddings`` in the weights.
        where: the file, for messages.

    Raises:
        FormatError: a key is missing, of a wrong type, in contradiction to another or to the weights, or asks for what is not built.
    """
    _check_params(params, vocab_size, where)
    given = _with_defaults(params)
    left_open = _find_what_is_left_open(params)
    fields = hf_config(
        ModelConfig(
            architecture=ARCHITECTURE,
            vocab_size=vocab_size,
            hidden_size=given["dim"],
            intermediate_size=ffn_width(given["dim"], given["multiple_of"], given["ffn_dim_multiplier"]),
            num_hidden_layers=given["n_layers"],
            num_attention_heads=given["n_heads"],
            num_key_value_heads=given["n_kv_heads"],
            head_dim=given["dim"] // given["n_heads"],
            max_position_embeddings=left_open["max_position_embeddings"],
            rms_norm_eps=given["norm_eps"],
            rope_theta=float(given["rope_theta"]),
            rope_scaling=_build_scaling(left_open.get("rope_scaling")),
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
            initializer_range=0.02,
        )
    )
    del fields["tie_word_embeddings"]
    return fields


def plan_params(config: ModelConfig, may_change: Collection[str] = ()) -> dict[str, Any]:
    """The params.json of a model, from which `parse_params` gives the same model back.

    A published shape gets its published content. Others say rope_theta even where it is 10000, since that is what Llama 2's program
    assumes but not what Llama 3's does.

    Args:
        may_change: fields of the config that may come back with another value, such as ``max_position_embeddings`` and
            ``initializer_range``, on which no logit depends. Whether embeddings are tied shows in the weights and is not compared.

    Raises:
        FormatError: the model has something that a params.json has no place for; names it and what a reader would take instead.
    """
    if config.hidden_size != config.head_dim * config.num_attention_heads:
        raise FormatError(
            f"params.json cannot say head_dim = {config.head_dim}: a reader takes hidden_size / num_attention_heads, "
            f"here {config.hidden_size} / {config.num_attention_heads}"
        )
    multiple_of, multiplier = _find_split(config.hidden_size, config.intermediate_size)
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        **({} if multiplier is None else {"ffn_dim_multiplier": multiplier}),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        **({} if config.rope_scaling is None else {"use_scaled_rope": True}),
    }
    if name := _find_published(params):
        same_vocabulary = config.vocab_size == SIZES[name]["vocab_size"]
        params = {**PARAMS[name], "norm_eps": config.rms_norm_eps, **({} if same_vocabulary else {"vocab_size": config.vocab_size})}
    _check_comes_back(params, config, may_change)
    return params


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Rows of w1 and w3: two thirds of 4·dim, times the multiplier, rounded down each time, then up to a multiple (Meta's model.py)."""
    width = _base_width(dim)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def _check_params(params: dict[str, Any], vocab_size: int, where: str) -> None:
    if missing := [name for name in REQUIRED if params.get(name) is None]:
        raise FormatError(f"{where} lacks {', '.join(missing)}")
    for name, value in params.items():
        if name not in FIELDS and name not in WITHOUT_EFFECT and value is not None:
            raise FormatError(f"{where}: {name} = {value!r} is not supported")
        if name in FIELDS and value is not None and not (name == "vocab_size" and value == UNKNOWN_VOCAB_SIZE):
            _check_value(name, value, where)
    stated = params.get("vocab_size")
    if stated not in (None, UNKNOWN_VOCAB_SIZE, vocab_size):
        raise FormatError(f"{where}: vocab_size = {stated}, but the weights' tok_embeddings has {vocab_size} rows")
    given = _with_defaults(params)
    for whole, part in (("dim", "n_heads"), ("n_heads", "n_kv_heads")):
        if given[whole] % given[part]:
            raise FormatError(f"{where}: {whole} = {given[whole]} is not a multiple of {part} = {given[part]}")
    if given["dim"] // given["n_heads"] % 2:
        raise FormatError(f"{where}: dim / n_heads = {given['dim'] // given['n_heads']} is odd; rotary positions turn pairs")
    if given["ffn_dim_multiplier"] is not None and not 1 <= given["ffn_dim_multiplier"] * _base_width(given["dim"]) < math.inf:
        raise FormatError(f"{where}: ffn_dim_multiplier = {given['ffn_dim_multiplier']} leaves no feed-forward for dim = {given['dim']}")


def _check_value(name: str, value: Any, where: str) -> None:
    kind = FIELDS[name]
    is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not (isinstance(value, bool) if kind is bool else is_number and 0 < value < math.inf):
        expected = {int: "a whole number from 1 up", float: "a number above 0", bool: "true or false"}[kind]
        raise FormatError(f"{where}: {name} = {value!r} is not {expected}")


def _check_comes_back(params: dict[str, Any], config: ModelConfig, may_change: Collection[str]) -> None:
    fields = parse_params(params, config.vocab_size, "params.json")
    read = parse_config({**fields, "tie_word_embeddings": config.tie_word_embeddings}, "params.json")
    values = [(field.name, getattr(config, field.name), getattr(read, field.name)) for field in dataclasses.fields(ModelConfig)]
    lost = [f"{name} = {own}, which a reader would take for {other}" for name, own, other in values if own != other and name not in may_change]
    if lost:
        raise FormatError(f"params.json cannot say {'; nor '.join(lost)}")


def _with_defaults(params: dict[str, Any]) -> dict[str, Any]:
    given = {**DEFAULTS, "n_kv_heads": params["n_heads"]}
    return given | {name: params[name] for name in FIELDS if params.get(name) is not None}


def _find_published(params: dict[str, Any]) -> str | None:
    """The first named size whose layers, rope_theta and use_scaled_rope these are; its vocabulary may have been resized."""
    return next((name for name, published in PARAMS.items() if _shape_of(published) == _shape_of(params)), None)


def _find_what_is_left_open(params: dict[str, Any]) -> dict[str, Any]:
    """Longest context and rope_scaling, among other fields of config.json: the published ones, or the rules of `parse_params`."""
    if name := _find_published(params):
        return SIZES[name]
    given = _with_defaults(params)
    if given["use_scaled_rope"]:
        return {"max_position_embeddings": 131072, "rope_scaling": llama3_scaling(8.0)}
    return {"max_position_embeddings": 4096 if given["rope_theta"] == DEFAULTS["rope_theta"] else 8192}


def _shape_of(params: dict[str, Any]) -> tuple[Any, ...]:
    given = _with_defaults(params)
    width = ffn_width(given["dim"], given["multiple_of"], given["ffn_dim_multiplier"])
    return (*(given[name] for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "rope_theta", "use_scaled_rope")), width)


def _build_scaling(table: dict[str, Any] | None) -> RopeScaling | None:
    return RopeScaling(**{name: value for name, value in table.items() if name != "rope_type"}) if table else None


def _find_split(dim: int, width: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give this ffn width: a published pair, else a multiple alone, else the shortest multiplier."""
    multiples = [multiple_of for multiple_of in POWERS_OF_TWO if width % multiple_of == 0]
    base = _base_width(dim)
    candidates: list[tuple[int, float | None]] = [*PUBLISHED_SPLITS, *((multiple_of, None) for multiple_of in multiples)]
    for digits in range(1, MOST_DIGITS + 1):
        # The multiplier lies from (width - multiple_of + 1) / base up to (width + 1) / base; the shortest decimal above the lower end.
        tenths = 10**digits
        candidates += [(multiple_of, -(-(width - multiple_of + 1) * tenths // base) / tenths) for multiple_of in multiples]
    for multiple_of, multiplier in candidates:
        if ffn_width(dim, multiple_of, multiplier) == width:
            return multiple_of, multiplier
    raise FormatError(f"params.json cannot say intermediate_size = {width} for hidden_size = {dim}: no ffn_dim_multiplier gives exactly that")


def _base_width(dim: int) -> int:
    return int(2 * (4 * dim) / 3)
