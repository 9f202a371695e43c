"""What models hold and how they differ, from headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from streammerge.checkpoint import Checkpoint, Storage
from streammerge.compare import differences
from streammerge.models import open_model
from streammerge.owners import roles_from_model
from streammerge.rules import Role, roles


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Models side by side; `differences` compares each with the first."""

    models: tuple[Checkpoint, ...]
    roles: tuple[dict[str, Role], ...]
    differences: tuple[str, ...]

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
            "differences": list(self.differences),
        }


def inspect_models(storage: Storage, *locations: str) -> Inspection:
    """Read the headers of some models. Raises CheckpointError for an unsound one."""
    models = tuple(open_model(storage, location) for location in locations)
    return Inspection(
        models=models,
        roles=tuple(
            roles({n: (e.shape, e.dtype) for n, e in m.tensors.items()}, m.config, roles_from_model) for m in models
        ),
        differences=tuple(
            line for model in models[1:] for line in differences(models[0], model, models[0].location, model.location)
        ),
    )


def _roles(model: Checkpoint) -> dict[str, Role]:
    return roles({n: (e.shape, e.dtype) for n, e in model.tensors.items()}, model.config, roles_from_model)
