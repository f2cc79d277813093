"""What a model family is: how its config.json is read and written, and what else its weights are called.

A config.json says much alike in all families (`COMMON`); what a family says besides, and what of it changes the computation, is in its own file.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunelib.errors import FormatError
from tunelib.model.config import ModelConfig, RopeScaling

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LARGEST = 2**63
"""What no number of a config.json reaches; Python's own may have any size."""
# Every field that all families read, with its type; numbers are above 0. Where null is allowed it means the default.
COMMON: dict[str, type] = {
    **dict.fromkeys((*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"), int),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor"), float),
    "tie_word_embeddings": bool,
    **dict.fromkeys(("rope_scaling", "rope_parameters"), dict),
    "hidden_act": str,
}
FROM_ZERO = ("max_window_layers",)
"""Numbers that may be 0."""
# Fields that say nothing about the computation, or only about inference.
WITHOUT_EFFECT = {
    *("_name_or_path", "_attn_implementation_autoset", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id"),
    *("generation_config", "id2label", "label2id", "max_length", "model_type", "pad_token_id", "return_dict", "torch_dtype"),
    *("transformers.js_config", "transformers_version", "unk_token_id", "use_cache", "tie_encoder_decoder"),
}
WINDOWED = {"full_attention": False, "sliding_attention": True}
"""What ``layer_types`` may name, and whether such a layer has a window."""


@dataclass(frozen=True)
class MetaNames:
    """Meta's form of a family's weights.

    Attributes:
        of_hf, to_hf: Meta's name of a Hugging Face weight, and the other way; None where there is none.
        rotary_head_dim: rows of one head of a weight whose rows Meta orders in pairs; 0 for all others.
        split: the dimension along which Meta's model-parallel files divide a weight, None for one that each holds whole, and the number of rows or
            columns there that must stay together.
    """

    of_hf: Callable[[str], str | None]
    to_hf: Callable[[str], str | None]
    rotary_head_dim: Callable[[str, ModelConfig], int]
    split: Callable[[str, ModelConfig], tuple[int | None, int]]


@dataclass(frozen=True)
class Family:
    """A model family: what differs from Llama, in its config.json and in what is computed.

    Attributes:
        architecture, model_type: what a config.json calls it.
        read: of a config.json's fields, checked and with defaults, what of `ModelConfig` differs from Llama; raises FormatError. The second argument
            is the file, for messages.
        write: the fields of a config.json that say it, beside those of `COMMON`.
        fields: those that are read beside `COMMON`, with their types; null is left to ``read``.
        only: fields of which one value alone is built.
        without_effect: fields that say nothing about the computation.
        defaults: what transformers takes for a field that is not there.
        meta: Meta's names, for a family that Meta has a form of.
        embedding, head: Hugging Face's names of the two matrices as wide as the vocabulary.
        derived: tensors that follow from the config, which other tools store besides; by the last parts of their names.
    """

    architecture: str
    model_type: str
    read: Callable[[dict[str, Any], str], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    fields: Mapping[str, type] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    without_effect: Collection[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    meta: MetaNames | None = None
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    derived: tuple[str, ...] = ("rope.freqs", "freqs_cis", "rotary_emb.inv_freq")

    def parse_config(self, fields: dict[str, Any], where: str) -> ModelConfig:
        """The model that a config.json describes; raises FormatError naming the field that cannot be kept."""
        self._check_fields(fields, where)
        rope = fields.get("rope_parameters") or {}  # transformers 5 keeps theta and scaling together
        scaling = _parse_scaling(fields.get("rope_scaling") or rope, where)
        if rope and scaling != _parse_scaling(rope, where):
            raise FormatError(f"{where}: rope_parameters and rope_scaling ask for different scalings")
        said = {name: value for name, value in fields.items() if value is not None or name in self.fields}
        given = {"partial_rotary_factor": rope.get("partial_rotary_factor"), **self.defaults, **said}
        for name, only in {**self.only, "partial_rotary_factor": 1.0}.items():
            if given.get(name) not in (None, only):
                raise FormatError(f"{where}: {name} = {given[name]!r} is not supported for {self.architecture}; only {only!r} is")
        heads = fields["num_attention_heads"]
        # Null, unlike none at all, means as many as there are query heads.
        kv_heads = given.get("num_key_value_heads", heads) if fields.get("num_key_value_heads", 0) is not None else heads
        if heads % kv_heads:
            raise FormatError(f"{where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
        head_dim = given.get("head_dim") or fields["hidden_size"] // heads
        if head_dim % 2:
            raise FormatError(f"{where}: head_dim = {head_dim} is odd; rotary positions turn pairs")
        theta = rope.get("rope_theta", given.get("rope_theta", 10000.0))
        _check_value("rope_theta", theta, float, where)
        return ModelConfig(
            architecture=self.architecture,
            **{name: fields[name] for name in REQUIRED},
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=given.get("max_position_embeddings", 2048),
            rms_norm_eps=given.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling=scaling,
            tie_word_embeddings=given.get("tie_word_embeddings", False),
            initializer_range=given.get("initializer_range", 0.02),
            **{"attention_bias": False, "mlp_bias": False, **self.read(given, where)},
        )

    def hf_config(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json of a model, as transformers writes it."""
        scaling = config.rope_scaling
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "hidden_act": config.hidden_act,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": {"rope_type": "llama3", **vars(scaling)} if scaling else None,
            "tie_word_embeddings": config.tie_word_embeddings,
            **self.write(config),
            "initializer_range": config.initializer_range,
        }

    def to_meta_name(self, name: str) -> str | None:
        """Meta's name of a Hugging Face weight; None where it has none."""
        return self.meta.of_hf(name) if self.meta else None

    def to_hf_name(self, name: str) -> str | None:
        """The Hugging Face name of one of Meta's weights; None where it has none."""
        return self.meta.to_hf(name) if self.meta else None

    def rotary_head_dim(self, name: str, config: ModelConfig) -> int:
        """Rows of one head of a Hugging Face weight whose rows Meta orders in pairs; 0 for all others."""
        return self.meta.rotary_head_dim(name, config) if self.meta else 0

    def _check_fields(self, fields: dict[str, Any], where: str) -> None:
        if missing := [name for name in REQUIRED if name not in fields]:
            raise FormatError(f"{where} lacks {', '.join(missing)}")
        known = {**COMMON, **dict.fromkeys(self.only, str), **self.fields}
        for name, value in fields.items():
            if name in known and not (value is None and name not in REQUIRED):
                _check_value(name, value, known[name], where)
            elif name not in known and name not in WITHOUT_EFFECT and name not in self.without_effect and _asks_for_something(value):
                raise FormatError(f"{where}: {name} = {value!r} is not supported for {self.architecture}")


def read_windows(fields: dict[str, Any], windowed: Collection[int], where: str) -> dict[str, Any]:
    """The windows of a model's layers, as a family's ``read`` gives them.

    Args:
        fields: ``sliding_window``, in tokens or null for none, and ``layer_types``, which may be left out.
        windowed: the numbers of the layers that have a window where ``layer_types`` does not say.

    Raises:
        FormatError: ``layer_types`` are not of this model, or name windows of no width.
    """
    width, kinds, count = fields.get("sliding_window"), fields.get("layer_types"), fields["num_hidden_layers"]
    if kinds is None:
        return {"windows": tuple(width if number in windowed else 0 for number in range(count)) if width and windowed else ()}
    if len(kinds) != count or any(kind not in list(WINDOWED) for kind in kinds):
        raise FormatError(f"{where}: layer_types = {kinds!r} are not {count} of {' and '.join(WINDOWED)}")
    if not any(WINDOWED[kind] for kind in kinds):
        return {"windows": ()}
    if not width:
        raise FormatError(f"{where}: layer_types names layers with a window, and sliding_window says none")
    return {"windows": tuple(width if WINDOWED[kind] else 0 for kind in kinds)}


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The fields that `read_windows` takes."""
    full, sliding = WINDOWED
    kinds = [sliding if window else full for window in config.windows] or [full] * config.num_hidden_layers
    return {"sliding_window": max(config.windows, default=0) or None, "layer_types": kinds}


def _asks_for_something(value: Any) -> bool:
    return value is True or value not in (None, False, 0, 0.0, 1.0, "", [], {})


def _check_value(name: str, value: Any, kind: type, where: str) -> None:
    is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    lowest = 0 if name in FROM_ZERO else 1 if kind is int else 5e-324  # the smallest number above 0
    if not (is_number and lowest <= value < LARGEST if kind in (int, float) else isinstance(value, kind)):
        whole = f"a whole number from {lowest} up"
        expected = {int: whole, float: "a number above 0", bool: "true or false", dict: "a table", list: "a list", str: "text"}[kind]
        raise FormatError(f"{where}: {name} = {value!r} is not {expected}")


def _parse_scaling(scaling: dict[str, Any], where: str) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise FormatError(f"{where}: rope_scaling of type {kind!r} is not supported; 'default' and 'llama3' are")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [name for name in names if name not in scaling]:
        raise FormatError(f"{where}: rope_scaling lacks {', '.join(missing)}")
    if wrong := [name for name in names if isinstance(scaling[name], bool) or not isinstance(scaling[name], (int, float)) or scaling[name] <= 0]:
        raise FormatError(f"{where}: rope_scaling: {wrong[0]} = {scaling[wrong[0]]!r} is not a number above 0")
    return RopeScaling(**{name: scaling[name] for name in names})
