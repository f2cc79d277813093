"""All that leaves with weights: config, tokenizer, chat template, how to generate; and the whole plan of it.

Training and conversion make the same call, `plan_checkpoint`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunelib import files
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import FormatError
from tunelib.formats.compare import NOT_COMPUTED, different_fields
from tunelib.formats.form import Form
from tunelib.formats.found import CONFIG_FILE, PARAMS_FILE
from tunelib.formats.params import parse_params, plan_params
from tunelib.formats.plan import Companions, Plan, Wish, check_form, form_like, index_name, index_of, plan_form
from tunelib.formats.tensors import TensorInfo, name_of
from tunelib.formats.write import to_json
from tunelib.model.families import parse_config

GENERATION_CONFIG, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
# What a written folder takes along from the tokenizer's folder, all of it from there.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt"),
    *(CHAT_TEMPLATE, "chat_template.json"),
)


TOKENIZER_MODEL, ORIGINAL = "tokenizer.model", "original"


def plan_checkpoint(
    wish: Wish,
    like: Form | None,
    weights: Mapping[str, TensorInfo],
    fields: dict[str, Any],
    home: Path | None,
    tokenizer: Tokenizer | None,
    chat_template: str | None,
    stop_ids: frozenset[int],
) -> Plan:
    """Plan a whole folder, and prove that it holds the model.

    Args:
        wish: the kind of folder, and how it is divided where ``like`` does not say.
        like: files and names to keep; of the kind that is wished for.
        weights: the model's weights by Hugging Face name, a tied head left out, with the types that they are to have.
        fields: the model as a config.json says it.
        home: the folder that config and generation_config.json come from.
        chat_template: in place of the tokenizer's own.
        stop_ids: ids that end an answer.

    Raises:
        FormatError: the form cannot hold this model, or would not hold all of it.
    """
    config = parse_config(fields, "the config of the model to be written")
    form = form_like(like, weights, config) if like is not None else plan_form(wish, weights, config)
    check_form(form, weights, config, f"the {wish.kind} checkpoint")
    fields = _with_dtype(fields, weights)
    companions = find_companions(home, tokenizer.folder if tokenizer else None, fields, chat_template, stop_ids)
    companions |= tokenizer.files_to_write() if tokenizer else {}
    notes = []
    if form.kind == "meta":
        companions.pop(GENERATION_CONFIG, None)
        params = _find_params(home, fields)
        companions[PARAMS_FILE] = to_json(params)
        read_back = parse_config(parse_params(params, config.vocab_size, PARAMS_FILE), PARAMS_FILE)
        for name in NOT_COMPUTED:
            if (value := getattr(config, name)) != (other := getattr(read_back, name)):
                notes.append(f"{PARAMS_FILE} has no key for {name}: it is {value} here, and readers will take {other}")
        folders = [folder for folder in (tokenizer.folder if tokenizer else None, home) if folder is not None]
        places = [folder / name for folder in folders for name in (TOKENIZER_MODEL, f"{ORIGINAL}/{TOKENIZER_MODEL}")]
        found = next((place for place in places if place.is_file()), None)
        if found is not None:
            companions[TOKENIZER_MODEL] = found.read_bytes()
        else:
            notes.append("there is no tokenizer.model, which programs for Meta's form ask for: a tokenizer.json cannot be made into one")
    else:
        companions[CONFIG_FILE] = to_json(fields)
    if (index := index_of(form)) is not None:
        companions[index_name(form)] = to_json(index)
    if taken := sorted(form.files.keys() & {*companions, files.MANIFEST}):
        raise FormatError(f"{taken[0]} cannot be the name of a file with weights")
    return Plan(form, fields, companions, tuple(notes))


def _with_dtype(fields: dict[str, Any], weights: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The fields with the type that the weights have, under the name that the config uses for it; without one they are float32."""
    dtype = name_of(next(iter(weights.values())).dtype)
    name = "torch_dtype" if "torch_dtype" in fields else "dtype"
    return fields if fields.get(name, "float32") == dtype else {**fields, name: dtype}


def _find_params(home: Path | None, fields: dict[str, Any]) -> dict[str, Any]:
    """The params.json that lies at home, where it describes this model, or a new one."""
    config = parse_config(fields, "the config of the model to be written")
    params = plan_params(config, may_change=NOT_COMPUTED)
    path = home / PARAMS_FILE if home is not None else None
    if path is None or not path.is_file():
        return params
    own = files.read_json(path, FormatError)
    own = own if own.get("vocab_size", -1) in (-1, config.vocab_size) else {**own, "vocab_size": config.vocab_size}
    try:
        read = parse_config(parse_params(own, config.vocab_size, str(path)), str(path))
    except FormatError:  # other programs have other files of this name
        return params
    return params if different_fields(read, config, exempt=(*NOT_COMPUTED, "tie_word_embeddings")) else own


def find_companions(
    source: Path | None, tokenizer_folder: Path | None, config: dict[str, Any], chat_template: str | None, stop_ids: frozenset[int]
) -> Companions:
    """The files that make weights a folder for others: the tokenizer that was used, and how to generate.

    Args:
        source: the folder that the weights came from; its generation_config.json stays, but for further stop ids.
        chat_template: the template that was trained with, where it is not the tokenizer's own.
        stop_ids: ids that end an answer.
    """
    folder = tokenizer_folder or source
    try:
        return _read_companions(source, folder, config, chat_template, stop_ids)
    except OSError as error:
        raise FormatError(f"{error.filename} cannot be read: {error.strerror}") from None


def _read_companions(
    source: Path | None, folder: Path | None, config: dict[str, Any], chat_template: str | None, stop_ids: frozenset[int]
) -> Companions:
    found: Companions = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if folder is not None and (folder / name).is_file()}
    if chat_template is not None:
        found[CHAT_TEMPLATE] = chat_template
    path = source / GENERATION_CONFIG if source is not None else None
    if path is not None and path.is_file():
        settings = files.read_json(path, FormatError)
        found[GENERATION_CONFIG] = path.read_bytes()
    else:
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(name) is not None}
        settings = {"_from_model_config": True, **ids}
    listed = settings.get("eos_token_id")
    known = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if further := sorted(stop_ids - set(known)):
        settings["eos_token_id"] = [*known, *further] if known or len(further) > 1 else further[0]
        settings.pop("_from_model_config", None)
    if path is None or not path.is_file() or further:
        found[GENERATION_CONFIG] = to_json(settings)
    return found
