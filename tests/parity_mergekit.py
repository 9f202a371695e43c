"""Run mergekit on many recipes in one process: `python parity_mergekit.py JOBS.json`, in mergekit's environment.

JOBS.json holds a list of [recipe, folder, seed]. Printed as JSON: the names of its methods, and what failed as
{folder: message}.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.registry import registered_methods
from mergekit.options import MergeOptions


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    failed: dict[str, str] = {}
    for recipe, folder, seed in json.loads(Path(sys.argv[1]).read_text()):
        config = yaml.safe_load(Path(recipe).read_text())
        with_tokenizer = not config.keys().isdisjoint(("tokenizer", "tokenizer_source"))
        options = MergeOptions(copy_tokenizer=with_tokenizer, write_model_card=False, quiet=True, random_seed=seed)
        try:
            run_merge(MergeConfiguration.model_validate(config), folder, options)
        except Exception as error:  # noqa: BLE001  (whatever it raises is its answer)
            failed[folder] = f"{type(error).__name__}: {error}"
    sys.stdout.write(json.dumps({"methods": [method.spec.name for method in registered_methods()], "failed": failed}))


if __name__ == "__main__":
    main()
