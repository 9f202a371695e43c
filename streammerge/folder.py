"""The model folder around the weights: config, tokenizer, chat template, and the model card."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from streammerge.card import model_card
from streammerge.checkpoint import Checkpoint, Storage, parse_json
from streammerge.errors import PlanError, quoted
from streammerge.licences import CARD_NAME
from streammerge.plan import Plan
from streammerge.stacked_config import stacked_config
from streammerge.token_rules import UNION
from streammerge.tokenizer_files import config_with, tokenizer_files_with
from streammerge.vocabulary import Vocabulary

REPORT_NAME = "streammerge.json"
TEMPLATE_NAME = "chat_template.jinja"
LIMIT_BYTES = 100_000_000

_TOKENIZER_NAMES = (
    "added_tokens.json", "chat_template.json", TEMPLATE_NAME, "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
_TOKENIZER_ENDINGS = (".model", ".tiktoken")
# left by trainers and by us: about how a model came to be, not about what it is
_NOT_PART_OF_A_MODEL = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
# what some loader would take for weights, pickled ones among them
_WEIGHTS_ENDINGS = (
    ".bin", ".ckpt", ".gguf", ".h5", ".joblib", ".msgpack", ".npy", ".npz", ".onnx", ".partial",
    ".pickle", ".pkl", ".pt", ".pth", ".safetensors",
)  # fmt: skip
_ID_FILES = ("config.json", "generation_config.json")
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def side_files(plan: Plan, storage: Storage) -> dict[str, bytes]:
    """Every file beside the weights but the report, by name. Read as data; nothing in them is run.

    The tokenizer is `tokenizer_source`'s, with the tokens that a union adds; all else is the base's (the first
    expert's without a base), with that vocabulary's size and ids.
    Raises PlanError when the recipe asks for a tokenizer or a chat template that is not there.
    """
    reference, tokenizer = plan.models[0], _model(plan, plan.recipe.tokenizer_source)
    if plan.recipe.tokenizer_source and not any(map(_is_tokenizer_file, tokenizer.files)):
        raise PlanError(
            f"{quoted(f'tokenizer_source: {plan.recipe.tokenizer_source}')} finds no tokenizer",
            hint="Name a model that has one, or leave it out.",
        )
    files = {
        name: _read(storage, model, name)
        for model, wanted in ((reference, _is_model_file), (tokenizer, _is_tokenizer_file))
        for name in model.files
        if wanted(name)
    }
    if "config.json" in files:
        slices, config = plan.recipe.slices, reference.config
        files["config.json"] = _config(plan, stacked_config(plan.recipe, plan.models, plan.names) if slices else config)
    if plan.vocabulary:
        files |= tokenizer_files_with(plan.vocabulary, files)
        files |= _renumbered(plan.vocabulary, files, tokenizer.config)
    _set_template(plan, storage, files)
    files[CARD_NAME] = model_card(plan).encode()
    return files


def fingerprint_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """What of `side_files` must not change between an interrupted merge and its resumption: all but the card."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items()) if name != CARD_NAME}


def _model(plan: Plan, source: str | None) -> Checkpoint:
    if source in (None, "base", UNION):
        return plan.models[0]
    model = plan.models[plan.recipe.locations.index(str(source))]
    # an adapter's folder may have a tokenizer of its own
    folders = (*reversed(model.besides), model)
    return next((each for each in folders if any(map(_is_tokenizer_file, each.files))), model)


def _is_tokenizer_file(name: str) -> bool:
    return name in _TOKENIZER_NAMES or name.endswith(_TOKENIZER_ENDINGS)


def _is_model_file(name: str) -> bool:
    if _is_tokenizer_file(name) or name in (*_NOT_PART_OF_A_MODEL, REPORT_NAME):
        return False
    if name.endswith(".json"):
        return not name.endswith(".index.json") and not name.startswith("adapter_")
    return name.endswith(".py") or (name.startswith(("LICENSE", "NOTICE")) and not name.endswith(_WEIGHTS_ENDINGS))


def _read(storage: Storage, model: Checkpoint, name: str) -> bytes:
    nbytes = model.files[name].size
    if nbytes > LIMIT_BYTES:
        raise PlanError(
            f"{quoted(f'{model.location}/{name}')} has {nbytes} bytes, over the limit of {LIMIT_BYTES}",
            hint="Files beside the weights are small. Move it out of the model's folder.",
        )
    return storage.read(model.location, name, 0, nbytes)


def _config(plan: Plan, config: Mapping[str, Any]) -> bytes:
    """config.json with the dtype that the output has, and how it is quantised."""
    written = dict(config)
    code = plan.recipe.output_dtype
    for key in ("dtype", "torch_dtype"):
        if code is not None and key in written:
            written[key] = _DTYPE_NAMES[code]
    if plan.recipe.quantize:
        written["quantization_config"] = plan.models[0].quantization
    return _json_text(written)


def _renumbered(vocabulary: Vocabulary, files: Mapping[str, bytes], chosen: Mapping[str, Any]) -> dict[str, bytes]:
    """config.json and generation_config.json with the ids and the size of another vocabulary."""
    tables = {name: parse_json(files[name], quoted(name)) for name in _ID_FILES if name in files}
    return {
        name: _json_text(config_with(vocabulary, table, chosen))
        for name, table in tables.items()
        if isinstance(table, dict)
    }


def _json_text(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def _set_template(plan: Plan, storage: Storage, files: dict[str, bytes]) -> None:
    choice = plan.recipe.chat_template
    if choice is None:
        return
    if "{{" in choice or "{%" in choice:
        template: str | None = choice
    elif choice == "auto":
        template = _most_common(plan, storage)
    else:
        template = template_of(storage, _model(plan, choice))
    if template is None:
        raise PlanError(
            f"{quoted(f'chat_template: {choice}')} finds no chat template",
            hint="Name a model that has one, or leave it out.",
        )
    files[TEMPLATE_NAME] = template.encode("utf-8", "replace")
    files.pop("chat_template.json", None)
    if "tokenizer_config.json" in files:
        config = parse_json(files["tokenizer_config.json"], "`tokenizer_config.json`")
        if isinstance(config, dict) and config.pop("chat_template", None) is not None:
            files["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _most_common(plan: Plan, storage: Storage) -> str | None:
    """The template that most models have; the earlier model's where several are as common."""
    found = [template_of(storage, model) for model in plan.models]
    counts = Counter(template for template in found if template is not None)
    return counts.most_common(1)[0][0] if counts else None


def template_of(storage: Storage, model: Checkpoint) -> str | None:
    """A model's chat template, from its own file or from its tokenizer's config."""
    if TEMPLATE_NAME in model.files:
        return _read(storage, model, TEMPLATE_NAME).decode("utf-8", "replace")
    if "tokenizer_config.json" in model.files:
        config = parse_json(
            _read(storage, model, "tokenizer_config.json"), quoted(f"{model.location}/tokenizer_config.json")
        )
        template = config.get("chat_template") if isinstance(config, dict) else None
        return template if isinstance(template, str) else None
    return None
