"""mergekit's recipes as users write them, some for each method that both have.

{base}, {a}, … stand for the models of `parity_models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A recipe for both.

    defect   what mergekit does wrong in it: ours differs, and `compat: mergekit` does the same
    differs  what ours does otherwise, as its warning says
    open     why ours does not do the same yet; the test fails as soon as it does
    """

    name: str
    recipe: str
    defect: str | None = None
    differs: str | None = None
    open: str | None = None

    @property
    def method(self) -> str:
        return self.name.partition(" ")[0]

    def text(self, family: Mapping[str, Path]) -> str:
        text = f"merge_method: {self.method}\ndtype: float32{self.recipe}"
        for name, folder in family.items():
            text = text.replace(f"{{{name}}}", str(folder))
        return text


ADDED_BASE = "merges what `models` lists, where mergekit would add the base"

CASES = (
    Case(
        "linear of weights",
        """
models:
  - model: {a}
    parameters: {weight: 1.0}
  - model: {b}
    parameters: {weight: 0.3}
  - model: {c}
    parameters: {weight: 0.5}
""",
    ),
    Case(
        "linear over depth and by name, base among the models",
        """
base_model: {base}
models:
  - model: {base}
    parameters: {weight: 0.2}
  - model: {a}
    parameters:
      weight:
        - filter: mlp
          value: [0, 0.3, 1]
        - filter: self_attn
          value: [1, 0.25, 0.5, 0]
        - value: 0.75
  - model: {b}
    parameters:
      weight: [0.9, 0.1]
""",
    ),
    Case(
        "linear without normalizing",
        """
models:
  - model: {a}
    parameters: {weight: 0.6}
  - model: {b}
    parameters: {weight: 0.7}
parameters:
  normalize: false
""",
    ),
    Case(
        "linear with one weight for all, and a base that is not among the models",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
parameters:
  weight: 1.0
""",
        differs=ADDED_BASE,
    ),
    Case(
        "task_arithmetic of weights",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.8}
  - model: {b}
    parameters: {weight: -0.4}
parameters:
  lambda: 0.7
  int8_mask: true
""",
    ),
    Case(
        "task_arithmetic normalized, base among the models",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
    parameters:
      weight:
        - filter: down_proj
          value: [0.2, 1.4]
        - filter: '*'
          value: 0.5
  - model: {b}
    parameters: {weight: 1}
  - model: {near_a}
    parameters: {weight: 0.3}
parameters:
  normalize: true
""",
    ),
    Case(
        "ties as in mergekit's examples",
        """
base_model: {base}
models:
  - model: {a}
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: {b}
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: {c}
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
parameters:
  normalize: true
  int8_mask: true
""",
    ),
    Case(
        "ties summed, base among the models",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
    parameters: {density: 0.53, weight: 0.4}
  - model: {frozen}
    parameters: {density: 0.53, weight: 0.3}
parameters:
  normalize: false
  lambda: 1.2
""",
    ),
    Case(
        "ties of changes as small as reinforcement learning's",
        """
base_model: {base}
models:
  - model: {near_a}
  - model: {near_b}
parameters:
  weight: 0.5
  density: 0.2
""",
    ),
    Case(
        "dare_linear that drops nothing",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.5, density: 1}
  - model: {b}
    parameters: {weight: [0.2, 0.9]}
parameters:
  lambda: 1.1
  rescale: false
""",
    ),
    Case(
        "dare_ties that drops nothing",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.4, density: 1.0}
  - model: {b}
    parameters: {weight: 0.3, density: 1.0}
  - model: {c}
    parameters: {weight: 0.3, density: 1.0}
parameters:
  int8_mask: true
""",
    ),
    Case(
        "dare_ties normalized",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.4}
  - model: {b}
    parameters: {weight: [0.3, 0.8]}
parameters:
  normalize: true
""",
    ),
    Case(
        "della that drops nothing",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.4, density: 1, epsilon: 0.1}
  - model: {b}
    parameters: {weight: 0.7}
parameters:
  lambda: 0.9
  int8_mask: true
""",
    ),
    Case(
        "della_linear that drops nothing",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.4}
  - model: {b}
    parameters: {weight: 0.7, density: 1.0, epsilon: 0.05}
parameters:
  normalize: true
""",
    ),
    Case(
        "breadcrumbs where every tensor has outliers",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.6, density: 0.5, gamma: 0.1}
  - model: {b}
    parameters: {weight: 0.5, density: [0.9, 0.3], gamma: 0.07}
parameters:
  int8_mask: true
""",
    ),
    Case(
        "breadcrumbs that drops more outliers than it may",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.6, density: 0.95, gamma: 0.2}
  - model: {b}
    parameters: {weight: 0.5, density: 1.0, gamma: 0.2}
""",
    ),
    Case(
        "breadcrumbs where small tensors have no outlier",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 1.0, density: 0.9}
  - model: {b}
    parameters: {weight: 0.5, density: 0.5}
""",
    ),
    Case(
        "breadcrumbs_ties where every tensor has outliers",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.6, density: 0.5, gamma: 0.1}
  - model: {b}
    parameters: {weight: 0.5, density: 0.8, gamma: 0.07}
  - model: {c}
    parameters: {weight: 0.5, density: 0.8, gamma: 0.07}
parameters:
  lambda: 0.8
""",
    ),
    Case(
        "breadcrumbs_ties normalized",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.6, density: 0.5, gamma: 0.1}
  - model: {b}
    parameters: {weight: 0.5, density: 0.8, gamma: 0.07}
parameters:
  normalize: true
""",
    ),
    Case(
        "breadcrumbs_ties where small tensors have no outlier",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 1.0, density: 0.9}
  - model: {b}
    parameters: {weight: 0.5, density: 0.5}
""",
    ),
    Case(
        "sce of all",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
  - model: {c}
""",
    ),
    Case(
        "sce of the most varied entries",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
  - model: {b}
  - model: {frozen}
parameters:
  select_topk: 0.3
  int8_mask: true
""",
    ),
    Case(
        "sce over depth",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
parameters:
  select_topk: [0.9, 0.2]
""",
    ),
    Case(
        "sce of changes as small as reinforcement learning's",
        """
base_model: {base}
models:
  - model: {near_a}
  - model: {near_b}
  - model: {near_c}
""",
        defect="small changes are weighted equally",
    ),
    Case(
        "model_stock of three",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
  - model: {c}
""",
    ),
    Case(
        "model_stock by rows, base among the models",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
  - model: {b}
parameters:
  filter_wise: true
""",
    ),
    Case(
        "model_stock of changes as small as reinforcement learning's",
        """
base_model: {base}
models:
  - model: {near_a}
  - model: {near_b}
  - model: {near_c}
""",
        defect="small changes go back to the base",
    ),
    Case(
        "model_stock of models that went apart",
        """
base_model: {base}
models:
  - model: {a}
  - model: {against}
""",
        defect="the share is negative",
    ),
    Case(
        "model_stock with an untrained layer",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
  - model: {frozen}
""",
    ),
    Case(
        "slerp as in mergekit's examples",
        """
base_model: {a}
models:
  - model: {a}
  - model: {b}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
""",
    ),
    Case(
        "slerp with the base last",
        """
base_model: {a}
models:
  - model: {b}
  - model: {a}
parameters:
  t: 0.3
""",
    ),
    Case(
        "slerp of models almost alike",
        """
base_model: {base}
models:
  - model: {base}
  - model: {near_a}
parameters:
  t: [0.1, 0.9]
""",
    ),
    Case(
        "nuslerp of weights",
        """
models:
  - model: {a}
    parameters: {weight: 0.7}
  - model: {b}
    parameters: {weight: [0.2, 0.6]}
""",
    ),
    Case(
        "nuslerp of changes",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.7}
  - model: {b}
    parameters: {weight: 0.4}
""",
    ),
    Case(
        "nuslerp by rows",
        """
models:
  - model: {a}
    parameters: {weight: 0.7}
  - model: {b}
    parameters: {weight: 0.4}
parameters:
  nuslerp_flatten: false
""",
    ),
    Case(
        "nuslerp by columns, of changes",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.7}
  - model: {b}
    parameters: {weight: 0.4}
parameters:
  nuslerp_flatten: false
  nuslerp_row_wise: true
""",
    ),
    Case(
        "nuslerp of an untrained layer",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.5}
  - model: {frozen}
    parameters: {weight: 0.5}
""",
        defect="a zero change counts as orthogonal",
    ),
    Case(
        "nuslerp of models almost alike",
        """
models:
  - model: {near_a}
    parameters: {weight: 0.5}
  - model: {near_b}
    parameters: {weight: 0.5}
""",
    ),
    Case(
        "multislerp of weights",
        """
models:
  - model: {a}
    parameters: {weight: 0.7}
  - model: {b}
    parameters: {weight: 0.4}
  - model: {c}
    parameters: {weight: [0.3, 0.9]}
""",
    ),
    Case(
        "multislerp of changes",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.7}
  - model: {b}
    parameters: {weight: 0.4}
  - model: {c}
    parameters: {weight: 0.4}
parameters:
  normalize_weights: false
""",
    ),
    Case(
        "multislerp of an untrained layer",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.7}
  - model: {b}
    parameters: {weight: 0.4}
  - model: {frozen}
    parameters: {weight: 0.4}
""",
    ),
    Case(
        "multislerp of changes as small as reinforcement learning's",
        """
base_model: {base}
models:
  - model: {near_a}
    parameters: {weight: 0.7}
  - model: {near_b}
    parameters: {weight: 0.4}
""",
    ),
    Case(
        "karcher of three",
        """
models:
  - model: {a}
  - model: {b}
  - model: {c}
""",
    ),
    Case(
        "karcher of settings",
        """
models:
  - model: {a}
  - model: {b}
  - model: {against}
parameters:
  max_iter: 100
  tol: 1e-9
""",
    ),
    Case(
        "karcher of models almost alike",
        """
models:
  - model: {near_a}
  - model: {near_b}
""",
    ),
    Case(
        "nearswap of mergekit's example",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
parameters:
  t: 0.0001
""",
    ),
    Case(
        "nearswap over depth and by name",
        """
base_model: {base}
models:
  - model: {a}
  - model: {base}
parameters:
  t:
    - filter: self_attn
      value: [0.001, 0.02]
    - value: 0.005
""",
    ),
    Case(
        "arcee_fusion of changes",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
""",
        defect="rounding in float32 decides",
    ),
    Case(
        "arcee_fusion of models almost alike",
        """
base_model: {base}
models:
  - model: {base}
  - model: {near_a}
""",
        defect="rounding in float32 decides",
    ),
    Case(
        "arcee_fusion of an untrained layer",
        """
base_model: {base}
models:
  - model: {frozen}
  - model: {base}
""",
        defect="rounding in float32 decides",
    ),
    Case(
        "passthrough of one model",
        """
models:
  - model: {a}
""",
    ),
    Case(
        "passthrough scaled",
        """
models:
  - model: {a}
    parameters:
      scale:
        - filter: o_proj
          value: 0.0
        - filter: down_proj
          value: [1.0, 0.5]
        - value: 1.0
""",
    ),
    Case(
        "ram of three",
        """
base_model: {base}
models:
  - model: {a}
  - model: {near_a}
  - model: {frozen}
""",
    ),
    Case(
        "ram that overlooks small changes",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
  - model: {near_a}
parameters:
  epsilon: 0.0001
""",
    ),
    Case(
        "ramplus_tl of three",
        """
base_model: {base}
models:
  - model: {a}
  - model: {near_a}
  - model: {frozen}
parameters:
  epsilon: 0.0001
""",
    ),
    Case(
        "ramplus_tl of settings",
        """
base_model: {base}
models:
  - model: {a}
  - model: {frozen}
parameters:
  r: 0.3
  alpha: 0.7
  epsilon: 0.005
""",
    ),
    Case(
        "slerp of a tensor that is all zero",
        """
base_model: {hollow}
models:
  - model: {hollow}
  - model: {a}
parameters:
  t: 0.4
""",
        defect="a zero tensor counts as orthogonal",
    ),
    Case(
        "slerp past the end",
        """
base_model: {base}
models:
  - model: {a}
parameters:
  t: 1.3
""",
    ),
    Case(
        "nuslerp with the base among the models",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
    parameters: {weight: 0.7}
  - model: {b}
    parameters: {weight: 0.4}
""",
    ),
    Case(
        "nuslerp of weights that cancel",
        """
models:
  - model: {a}
    parameters: {weight: 0.5}
  - model: {b}
    parameters: {weight: -0.5}
""",
    ),
    Case(
        "multislerp with the base among the models",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
    parameters: {weight: 0.7}
  - model: {b}
    parameters: {weight: 0.4}
""",
    ),
    Case(
        "karcher with the base among the models",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
  - model: {b}
""",
    ),
    Case(
        "karcher with a base that is not among the models",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
""",
        differs=ADDED_BASE,
    ),
    Case(
        "ties of settings for part of the tensors, base with settings of its own",
        """
base_model: {base}
models:
  - model: {base}
    parameters: {weight: 0.7, density: 0.1}
  - model: {a}
    parameters:
      weight: 1
      density:
        - filter: layers.1.mlp
          value: 0.4
  - model: {b}
    parameters: {weight: -0.6}
parameters:
  density: 0.7
""",
    ),
    Case(
        "ties of almost nothing",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
parameters:
  weight: 1
  density: 0.03
""",
    ),
    Case(
        "ties rescaled",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
parameters:
  weight: 1
  density: 0.5
  rescale: true
""",
    ),
    Case(
        "breadcrumbs rescaled",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
parameters:
  weight: 1
  density: 0.5
  gamma: 0.1
  rescale: true
""",
    ),
    Case(
        "breadcrumbs_ties rescaled",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
parameters:
  weight: 1
  density: 0.5
  gamma: 0.1
  rescale: true
""",
    ),
    Case(
        "task_arithmetic with a density and rescaling, which do nothing",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
parameters:
  weight: 1
  density: 0.5
  rescale: true
""",
    ),
    Case(
        "slerp of one slice over all layers, as on model cards",
        """
slices:
  - sources:
      - model: {a}
        layer_range: [0, 4]
      - model: {b}
        layer_range: [0, 4]
base_model: {a}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
""",
    ),
    Case(
        "linear of one slice with settings for each source",
        """
slices:
  - sources:
      - model: {a}
        layer_range: [0, 4]
        parameters: {weight: [0.2, 1]}
      - model: {b}
        layer_range: [0, 4]
parameters:
  weight: 0.7
""",
    ),
    Case(
        "karcher of one slice, with a base that is not among the sources",
        """
base_model: {base}
slices:
  - sources:
      - model: {a}
        layer_range: [0, 4]
      - model: {b}
        layer_range: [0, 4]
""",
    ),
    Case(
        "passthrough of layers of two models, as in frankenmerges",
        """
slices:
  - sources:
      - model: {a}
        layer_range: [0, 3]
  - sources:
      - model: {b}
        layer_range: [1, 4]
  - sources:
      - model: {a}
        layer_range: [3, 4]
""",
    ),
    Case(
        "passthrough of one model's layers twice, scaled over depth and by names, beside a base",
        """
base_model: {base}
slices:
  - sources:
      - model: {a}
        layer_range: [0, 3]
        parameters: {scale: [0.5, 1.5]}
  - sources:
      - model: {a}
        layer_range: [1, 4]
        parameters:
          scale:
            - filter: layers.2.
              value: 0.2
            - filter: o_proj
              value: 0.0
            - value: [1.0, 2.0]
  - sources:
      - model: {a}
        layer_range: [3, 4]
        parameters: {scale: [0.25, 0.75]}
""",
    ),
    Case(
        "linear of two slices of unlike ranges, with settings for sources, slices and all",
        """
slices:
  - sources:
      - model: {a}
        layer_range: [0, 3]
        parameters: {weight: [0, 1]}
      - model: {b}
        layer_range: [1, 4]
        parameters:
          weight:
            - filter: layers.1.
              value: 0.9
            - value: 0.4
    parameters: {normalize: false}
  - sources:
      - model: {c}
        layer_range: [2, 4]
      - model: {b}
        layer_range: [0, 2]
        parameters:
          weight:
            - filter: mlp
              value: [0.1, 0.7]
    parameters:
      weight:
        - filter: self_attn
          value: 2
parameters:
  weight: 0.5
""",
    ),
    Case(
        "linear of one slice without the last layer",
        """
slices:
  - sources:
      - model: {a}
        layer_range: [0, 3]
      - model: {b}
        layer_range: [0, 3]
parameters:
  weight: 1
""",
    ),
    Case(
        "linear of one slice without the first layer",
        """
slices:
  - sources:
      - model: {a}
        layer_range: [1, 4]
      - model: {b}
        layer_range: [1, 4]
parameters:
  weight: 1
""",
    ),
    Case(
        "ties of two slices over depth",
        """
base_model: {base}
slices:
  - sources:
      - model: {base}
        layer_range: [0, 3]
      - model: {a}
        layer_range: [0, 3]
        parameters:
          density: [1, 0.3]
          weight: 1.0
      - model: {b}
        layer_range: [0, 3]
  - sources:
      - model: {b}
        layer_range: [1, 4]
        parameters: {weight: [0.2, 0.9]}
      - model: {base}
        layer_range: [1, 4]
    parameters: {density: 0.8}
parameters:
  density: 0.5
  weight: 0.4
  lambda:
    - filter: layers.4.
      value: 0.7
    - value: 1.0
""",
    ),
    Case(
        "task_arithmetic of slices with bases of their own",
        """
slices:
  - sources:
      - model: {b}
        layer_range: [2, 4]
      - model: {a}
        layer_range: [2, 4]
      - model: {c}
        layer_range: [2, 4]
    base_model: {a}
  - sources:
      - model: {base}
        layer_range: [0, 2]
      - model: {a}
        layer_range: [1, 3]
    base_model: {base}
parameters:
  weight: 0.6
""",
    ),
    Case(
        "slerp of two slices over depth and by name, as on model cards",
        """
base_model: {a}
slices:
  - sources:
      - model: {a}
        layer_range: [0, 3]
      - model: {b}
        layer_range: [0, 3]
  - sources:
      - model: {c}
        layer_range: [1, 4]
      - model: {a}
        layer_range: [1, 4]
    parameters: {t: [0.2, 0.8]}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: layers.1.
      value: 0.9
    - value: 0.5
""",
    ),
    Case(
        "task_arithmetic with densities of models",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.6, density: 0.5}
  - model: {b}
    parameters: {weight: 0.3, density: [0.2, 0.9]}
""",
    ),
    Case(
        "nuslerp with one weight for all, and a base that is not among the models",
        """
base_model: {base}
models:
  - model: {a}
  - model: {b}
parameters:
  weight: 0.4
""",
    ),
)

# where signs are elected, of one expert: so half of it is kept
RANDOM = (
    Case(
        "dare_linear",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.7, density: 0.5}
  - model: {b}
    parameters: {weight: 0.4, density: 0.8}
""",
    ),
    Case(
        "dare_ties",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 1.0, density: 0.5}
""",
    ),
    Case(
        "della_linear",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.7, density: 0.5}
  - model: {b}
    parameters: {weight: 0.4, density: 0.7, epsilon: 0.2}
""",
    ),
    Case(
        "della",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 1.0, density: 0.5}
""",
    ),
)

# mergekit's final norm and head are merged of as many of the last slice's sources as the first slice has
GROWING = Case(
    "linear of slices of one source, then of two",
    """
slices:
  - sources:
      - model: {a}
        layer_range: [0, 2]
  - sources:
      - model: {b}
        layer_range: [2, 4]
      - model: {c}
        layer_range: [2, 4]
parameters:
  weight: 1
""",
)

# what mergekit takes without a word, and ours refuses with one
REFUSED = (
    Case(
        "linear with a parameter of another method",
        """
models:
  - model: {a}
    parameters: {weight: 0.5, density: 0.5}
  - model: {b}
    parameters: {weight: 0.5}
""",
    ),
    Case(
        "slerp with a parameter of another method",
        """
base_model: {base}
models:
  - model: {base}
  - model: {a}
    parameters: {weight: 0.5}
parameters:
  t: 0.3
""",
    ),
    Case(
        "ties with a parameter of the merge under a model",
        """
base_model: {base}
models:
  - model: {a}
    parameters: {weight: 0.5, normalize: false}
  - model: {b}
    parameters: {weight: 0.5}
""",
    ),
    Case(
        "linear of weights that cancel",
        """
models:
  - model: {a}
    parameters: {weight: 1}
  - model: {b}
    parameters: {weight: -1}
""",
    ),
    Case(
        "passthrough of layers that the model does not have",
        """
slices:
  - sources:
      - model: {a}
        layer_range: [0, 2]
  - sources:
      - model: {b}
        layer_range: [3, 3]
""",
    ),
)
