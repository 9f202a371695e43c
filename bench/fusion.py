"""fusion-bench over model folders, for `peers.py`, in an environment that has it; it computes in float32, as others do.

python bench/fusion.py METHOD SCALE OUT BASE EXPERT…
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from fusion_bench import CausalLMPool
from fusion_bench.method import SimpleAverageForCausalLM, TaskArithmeticForCausalLM


def main() -> None:
    method, scale, out, base, *experts = sys.argv[1:]
    models = {Path(expert).name: expert for expert in experts}
    if method == "linear":
        algorithm = SimpleAverageForCausalLM()
    else:
        models["_pretrained_"] = base
        algorithm = TaskArithmeticForCausalLM(scaling_factor=float(scale))
    pool = CausalLMPool(models=models, tokenizer=None, model_kwargs={"torch_dtype": "float32"})
    # the way it saves takes the models' first shard for the whole
    algorithm.run(pool).to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main()
