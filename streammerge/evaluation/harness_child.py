"""Run EleutherAI's lm-evaluation-harness once, in an environment that may have nothing of ours: `SETTINGS RESULTS`.

Both are JSON files: the settings that `streammerge.evaluation.harness` writes, the results that it reads.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(settings_path: str, results_path: str) -> None:
    """Evaluate what the settings say. A missing harness is exit code 3."""
    with open(settings_path, encoding="utf-8") as file:
        settings: dict[str, Any] = json.load(file)
    if settings["offline"]:
        # read by the libraries when they are imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(3)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": settings["model"], "dtype": settings["dtype"]},
        tasks=settings["tasks"],
        task_manager=TaskManager(include_path=settings["include_path"]),
        num_fewshot=settings["num_fewshot"],
        limit=settings["limit"],
        batch_size=settings["batch_size"],
        device=settings["device"],
        apply_chat_template=settings["apply_chat_template"],
        bootstrap_iters=0,
        log_samples=False,
    )
    kept = {key: found.get(key) for key in ("results", "versions", "n-shot", "n-samples", "lm_eval_version")}
    with open(results_path, "w", encoding="utf-8") as file:
        json.dump(kept, file, default=str)


if __name__ == "__main__":
    main(*sys.argv[1:])
