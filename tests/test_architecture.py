"""Imports point down: a module knows only those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# top to bottom; a folder stands for its files, which may know each other
LAYERS = (
    "__main__",
    "cli",
    "merge_commands",
    "model_commands",
    "page_commands",
    "night_commands",
    "method_commands",
    "interrupts",
    "options",
    "progress",
    "lm_eval",
    "__init__",
    "api",
    "batching",
    "ranks",
    "evaluation",
    "merging",
    "reporting",
    "diagnosis",
    "capturing",
    "adapter_merge",
    "extraction",
    "adapter_folder",
    "verification",
    "recompute",
    "report",
    "quantised",
    "write",
    "share_journals",
    "journal",
    "entries",
    "stream",
    "device_stream",
    "device_deltas",
    "shared_blocks",
    "schedule",
    "thin_steps",
    "streamed_deltas",
    "outcome",
    "remembered",
    "readahead",
    "torch_dtypes",
    "folder",
    "card",
    "tokenizer_files",
    "fetching",
    "inspection",
    "plan",
    "stacked_config",
    "stacking",
    "work",
    "device_memory",
    "memory",
    "step",
    "layout",
    "models",
    "vocabulary",
    "mixtures",
    "licences",
    "recipe",
    "token_rules",
    "recipe_files",
    "locations",
    "slices",
    "settings",
    "scalars",
    "located_yaml",
    "methods",
    "storage",
    "solve",
    "delta",
    "workspace",
    "streammerge_kernels",
    "alike",
    "key_maps",
    "compare",
    "memory_samples",
    "rates",
    "devices",
    "world",
    "owners",
    "adapters",
    "rules",
    "pools",
    "patterns",
    "intervals",
    "budget",
    "row_maps",
    "fp8",
    "derived",
    "tokenizer",
    "checkpoint",
    "pickled",
    "zipped",
    "errors",
)
SOURCES = sorted([*ROOT.glob("streammerge/**/*.py"), *ROOT.glob("kernels/streammerge_kernels/*.py")])


def layer_of(module: str) -> str:
    """The layer of a dotted module name: `streammerge.solve.cost` lies in `solve`."""
    package, _, rest = module.partition(".")
    if package == "streammerge_kernels":
        return package
    return rest.split(".")[0] if rest else "__init__"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[str]:
    """Every module of ours that a file names anywhere, also inside functions and for types only."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "streammerge":
                found += [f"streammerge.{alias.name}" for alias in node.names if is_module(alias.name)] or [node.module]
            else:
                found.append(node.module)
    return [name for name in found if name.split(".")[0] in ("streammerge", "streammerge_kernels")]


def is_module(name: str) -> bool:
    return (ROOT / "streammerge" / f"{name}.py").exists() or (ROOT / "streammerge" / name).is_dir()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_below(path):
    own = layer_of(module_of(path))
    assert own in LAYERS, f"{own} has no place among the layers"
    for name in imports_of(path):
        target = layer_of(name)
        assert LAYERS.index(target) >= LAYERS.index(own), f"{path.name} ({own}) imports {name}, which lies above it"


def test_every_layer_exists():
    assert set(LAYERS) == {layer_of(module_of(path)) for path in SOURCES}


def test_kernels_know_nothing_of_streammerge():
    for path in ROOT.glob("kernels/streammerge_kernels/*.py"):
        assert not any(name.startswith("streammerge.") for name in imports_of(path)), path
