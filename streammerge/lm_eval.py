"""The lm-evaluation-harness with a model type that merges first: `python -m streammerge.lm_eval run`.

`--model streammerge --model_args recipe=recipe.yaml` merges the recipe into a temporary folder and evaluates that as
the harness's own type `hf` does; all other arguments are its. The type is registered as the harness has it for models
outside of it; it looks for no plugins by itself, hence this launcher. Needs `lm-eval[hf]`.
"""

from __future__ import annotations

import tempfile
import weakref
from typing import Any


def register() -> None:
    """Make `streammerge` a model type of the harness."""
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    import streammerge

    class Merged(HFLM):  # type: ignore[misc]
        """A recipe's merge, in a folder that lasts as long as this."""

        def __init__(self, recipe: str, memory: str | None = None, **others: Any) -> None:
            folder = tempfile.TemporaryDirectory(prefix="streammerge-")
            weakref.finalize(self, folder.cleanup)
            model = f"{folder.name}/model"
            streammerge.merge(recipe, model, memory=memory)
            super().__init__(pretrained=model, **others)

    register_model("streammerge")(Merged)


def main() -> None:
    """The harness's own command line, knowing the type."""
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
