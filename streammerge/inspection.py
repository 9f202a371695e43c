"""What models hold and how they differ, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.checkpoint import Checkpoint, Storage
from streammerge.compare import differences
from streammerge.errors import PlanError
from streammerge.key_maps import KeyMap, Mapped, map_names
from streammerge.models import open_model
from streammerge.owners import roles_from_model
from streammerge.rules import Role, roles


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Models side by side, by the names they have in their files.

    maps         each one's names as the first's, where they mean the same
    notes        what is to tell of that
    differences  each compared with the first, under its names
    """

    models: tuple[Checkpoint, ...]
    roles: tuple[dict[str, Role], ...]
    differences: tuple[str, ...]
    maps: tuple[KeyMap, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `inspect --json` prints them."""
        return {
            "models": [
                {
                    "location": model.location,
                    "tensor_bytes": model.tensor_bytes,
                    "parameters": sum(e.elements for e in model.tensors.values() if e.is_float),
                    "dtypes": dict(Counter(e.dtype for e in model.tensors.values())),
                    "classes": dict(Counter(role.kind.value for role in kinds.values())),
                    "tensors": [
                        {
                            "name": e.name,
                            "dtype": e.dtype,
                            "shape": list(e.shape),
                            "class": kinds[e.name].kind.value,
                            "transposed": kinds[e.name].transposed,
                            "class_from": kinds[e.name].source,
                            "file": e.file,
                            "offset": e.offset,
                        }
                        for e in model.tensors.values()
                    ],
                }
                for model, kinds in zip(self.models, self.roles, strict=True)
            ],
            "key_maps": [dict(keys.renamed) for keys in self.maps],
            "notes": list(self.notes),
            "differences": list(self.differences),
        }


def inspect_models(storage: Storage, *locations: str) -> Inspection:
    """Read the headers of some models. Raises CheckpointError for an unsound one."""
    models = tuple(open_model(storage, location) for location in locations)
    mapped = _mapped(models, locations)
    return Inspection(
        models=models,
        roles=tuple(
            roles({n: (e.shape, e.dtype) for n, e in m.tensors.items()}, m.config, roles_from_model) for m in models
        ),
        differences=tuple(
            line
            for model in mapped.models[1:]
            for line in differences(mapped.models[0], model, models[0].location, model.location)
        ),
        maps=mapped.maps,
        notes=mapped.notes,
    )


def _mapped(models: tuple[Checkpoint, ...], locations: Sequence[str]) -> Mapped:
    try:
        return map_names(models, locations)
    except PlanError as error:
        # what a merge refuses can be looked at
        return Mapped(models=models, maps=tuple(KeyMap(renamed={}) for _ in models), notes=(error.message,))


def _roles(model: Checkpoint) -> dict[str, Role]:
    return roles({n: (e.shape, e.dtype) for n, e in model.tensors.items()}, model.config, roles_from_model)
