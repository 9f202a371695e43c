"""One capture: what is summed for which tensors, in which passes, and how it reaches the disk."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, pad
from torch.overrides import TorchFunctionMode

from streammerge import owners
from streammerge.budget import format_bytes
from streammerge.capturing.reading import attention_of, build_skeleton, load_model, refuse_unreadable, stored_as
from streammerge.capturing.samples import Sample, batches_of
from streammerge.checkpoint import Checkpoint
from streammerge.errors import MergeError, OutputError, PlanError, escaped, quoted
from streammerge.journal import is_untidied, partial_folder
from streammerge.layout import lay_out
from streammerge.outcome import Block, Outcome
from streammerge.plan import DEFAULT_SHARD_BYTES
from streammerge.rules import TensorClass, roles
from streammerge.write import CONFIG, Writer
from streammerge_kernels.gram import add_gram_, mirror_

COVARIANCE, FISHER = "covariance", "fisher"
# what neither weights nor sums account for: transformers itself, the tokenizer, oneDNN's code, what the allocator keeps
RESERVE_BYTES = 128 << 20
_PROBE_TOKENS = 16
# rows of one product
_PIECE = 512

Progress = Callable[[int, int], None]
"""Called with bytes of token ids run so far and in all, 4 a token and once a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """What one kind of capture takes, and how it is cut into passes to fit. All in bytes.

    fixed   weights in float32, activations, token ids, buffers and a reserve
    sums    float64 sums of each pass, one or more
    """

    budget: int
    fixed: int
    sums: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most that is held at any time."""
        return self.fixed + max(self.sums, default=0)


class Run:
    """One capture: the model, what is summed for which of its tensors, and the passes that do it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[Sample],
        batch_size: int,
        fisher: bool,
        budget_bytes: int,
        progress: Progress | None,
    ) -> None:
        self._checkpoint, self._samples, self._fisher = checkpoint, samples, fisher
        self._batches = batches_of(samples, batch_size)
        self._budget, self._progress = budget_bytes, progress
        self.tokens = sum(len(sample.ids) for sample in samples)
        self.warnings: list[str] = []
        self.counts: dict[str, int] = {}
        self.memory: dict[str, MemoryNeed] = {}
        self._skeleton = build_skeleton(checkpoint)
        refuse_unreadable(self._skeleton, samples, checkpoint.location, fisher)
        self._stored = stored_as(self._skeleton, checkpoint)
        self.matrices = self._find_matrices()
        # before the weights are loaded: what no way of cutting can mend
        self._cut(COVARIANCE, [8 * max(self.matrices.values()) ** 2])
        if fisher:
            self._cut(FISHER, [8 * self._largest_parameter()])
        self.memory.clear()

    def _find_matrices(self) -> dict[str, int]:
        """Linear layers' weights by name on disk, and how wide their inputs are."""
        tensors = self._checkpoint.tensors
        found = roles(
            {name: (entry.shape, entry.dtype) for name, entry in tensors.items()},
            self._checkpoint.config,
            owners.roles_from_model,
        )
        linears = {
            name: tensors[name].shape[0 if role.transposed else 1]
            for name, role in found.items()
            if role.kind is TensorClass.MATRIX and len(tensors[name].shape) == 2
        }
        self._warn([name for name in linears if name not in self._stored], "not in the model of config.json, left out")
        known = {name: width for name, width in linears.items() if name in self._stored}
        if not known:
            raise PlanError(
                f"{quoted(self._checkpoint.location)} has no linear layers whose inputs could be captured",
                hint="`streammerge inspect` says what each tensor is. Embeddings and stacked experts do not count.",
            )
        return known

    def _warn(self, names: Sequence[str], what: str) -> None:
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.warnings.append(f"{quoted(names[0])}{more}: {what}")

    def load(self) -> None:
        """Load the weights, and see which of them read the same input."""
        self._model = load_model(self._checkpoint, self._skeleton)
        # the head reads nothing that is captured, and its output is the largest there is
        prefix = f"{self._skeleton.base_model_prefix}."
        inside = all(self._stored[name].parameter.startswith(prefix) for name in self.matrices)
        self._body = self._model.base_model if inside else self._model
        self._names_at: dict[int, list[str]] = {}
        for name in self.matrices:
            self._names_at.setdefault(self._stored[name].address(self._model), []).append(name)
        self._sites = self._shared_inputs()

    def _shared_inputs(self) -> list[list[int]]:
        """Weights, by address, in groups that read one input. What a short text does not reach stands alone."""
        seen: dict[int, list[tuple[int, int]]] = {address: [] for address in self._names_at}
        alive: list[Tensor] = []
        widths: dict[int, int] = {}

        def see(address: int, x: Tensor) -> None:
            if address in seen:
                # held until the end, so that no two inputs have one id
                alive.append(x)
                widths[address] = x.shape[-1]
                seen[address].append((id(x), x._version))

        try:
            with torch.no_grad(), _Products(see):
                self._body(input_ids=self._batches[0][:1, :_PROBE_TOKENS])
        except owners.not_buildable() as error:
            raise PlanError(
                f"{quoted(self._checkpoint.location)} cannot be run over text: {escaped(error)}",
                hint="A capture needs a model whose only input is token ids.",
            ) from error
        if not alive:
            raise PlanError(
                f"{quoted(self._checkpoint.location)} reads none of its linear layers in a way that can be seen",
                hint="Its architecture multiplies otherwise than by torch's linear or addmm.",
            )
        for address, width in widths.items():
            name = self._names_at[address][0]
            if width != self.matrices[name]:
                raise PlanError(
                    f"{quoted(name)} has {self.matrices[name]} inputs on disk, but the model gives it {width}",
                    hint="It is stored in a way that is not known here. Report its architecture.",
                )
        sites: dict[object, list[int]] = {}
        for address, inputs in seen.items():
            sites.setdefault(tuple(inputs) or address, []).append(address)
        return list(sites.values())

    def write(self, out: str, identity: Mapping[str, Any], resume: bool) -> None:
        """Capture what is not yet there, tensor by tensor, and publish the folder."""
        layout = lay_out([(name, "F32", (n, n)) for name, n in self.matrices.items()], DEFAULT_SHARD_BYTES)
        with Writer(out, layout, identity, resume=resume) as writer:
            todo = [site for site in self._sites if not set(self._names_of(site)) <= writer.checksums.keys()]
            passes = self._cut(COVARIANCE, [8 * self._width(site) ** 2 for site in todo])
            tell = _meter(self._progress, 4 * self.tokens * len(passes))
            for positions in passes:
                self._covariances([todo[i] for i in positions], _Sink(writer), tell)
            writer.flush()
            for name in self.matrices:
                count = writer.outcomes[name].facts.get("tokens")
                if not isinstance(count, int):
                    raise OutputError(
                        f"the journal in {quoted(writer.partial)} does not say of how many tokens {quoted(name)} is",
                        hint="Delete that folder and capture again.",
                    )
                if count != self.tokens:
                    self.counts[name] = count
            self._warn([name for name, count in self.counts.items() if not count], "no token reached it, so it is zero")
            if self._fisher:
                self._write_fisher(partial_folder(writer.out) / FISHER, identity)
            writer.publish({CONFIG: self._config(COVARIANCE, tokens=self.tokens, counts=self.counts)})

    def _names_of(self, site: Sequence[int]) -> list[str]:
        return [name for address in site for name in self._names_at[address]]

    def _width(self, site: Sequence[int]) -> int:
        return self.matrices[self._names_at[site[0]][0]]

    def _covariances(self, sites: Sequence[Sequence[int]], sink: _Sink, tell: Callable[[int], None]) -> None:
        """One pass over the text for some inputs."""
        sums = {site[0]: torch.zeros(self._width(site), self._width(site), dtype=torch.float64) for site in sites}
        counts = dict.fromkeys(sums, 0)
        product = torch.empty(max(map(torch.numel, sums.values())))

        def see(address: int, x: Tensor) -> None:
            if address in sums:
                total = sums[address]
                rows = x.reshape(-1, x.shape[-1])
                gram = product[: total.numel()].view_as(total).zero_()
                for start in range(0, len(rows), _PIECE):
                    add_gram_(gram, _padded(rows[start : start + _PIECE]))
                total.add_(gram)
                counts[address] += len(rows)

        with torch.inference_mode(), _Products(see):
            for batch in self._batches:
                self._body(input_ids=batch)
                tell(4 * batch.numel())
        for site in sites:
            total = sums.pop(site[0])
            mean = product[: total.numel()].view_as(total)
            mean.copy_(total.div_(max(counts[site[0]], 1)))
            names = self._names_of(site)
            if not mean.diagonal().isfinite().all():
                raise MergeError(
                    f"{quoted(names[0])} reads inputs that are not finite in float32",
                    hint="The model overflows on this text, or its weights hold NaN.",
                )
            sink.write(names, mirror_(mean), {"tokens": counts[site[0]]})

    def _write_fisher(self, out: Path, identity: Mapping[str, Any]) -> None:
        if out.exists() and not is_untidied(out):
            # published before the moments' folder was
            return
        parts = self._fisher_parts()
        tensors = self._checkpoint.tensors
        layout = lay_out(
            [(name, "F32", tensors[name].shape) for name in tensors if any(name in names for _, names in parts)],
            DEFAULT_SHARD_BYTES,
        )
        with Writer(os.fspath(out), layout, identity, resume=True) as writer:
            todo = [part for part in parts if not set(part[1]) <= writer.checksums.keys()]
            passes = self._cut(FISHER, [8 * self._model.get_parameter(name).numel() for name, _ in todo])
            tell = _meter(self._progress, 4 * self.tokens * len(passes))
            for positions in passes:
                self._squares([todo[i] for i in positions], _Sink(writer), tell)
            writer.flush()
            scored = sum(len(sample.ids) - sample.scored_from for sample in self._samples)
            writer.publish({CONFIG: self._config(FISHER, tokens=scored, labels="data", summed="per sample")})

    def _fisher_parts(self) -> list[tuple[str, list[str]]]:
        """Parameters by name in memory, each with the float tensors on disk that it is or that lie in it."""
        skeleton, tensors = self._skeleton, self._checkpoint.tensors
        parameters = dict(skeleton.named_parameters(remove_duplicate=False))
        found: dict[int, tuple[str, list[str]]] = {}
        for name, stored in self._stored.items():
            parameter = parameters.get(stored.parameter)
            if parameter is not None and tensors[name].is_float:
                # tied parameters are one object
                found.setdefault(id(parameter), (stored.parameter, []))[1].append(name)
        parts, lost = [], []
        for parameter_name, names in found.values():
            shapes = {n: tuple(t.shape) for n, t in self._on_disk(parameter_name, names, parameters[parameter_name])}
            if all(shapes.get(name) == tensors[name].shape for name in names):
                parts.append((parameter_name, names))
            else:
                lost += names
        self._warn(lost, "stored otherwise than transformers holds it, so it has no Fisher")
        return parts

    def _on_disk(self, parameter: str, names: Sequence[str], value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A tensor of a parameter's shape as the tensors on disk that it consists of."""
        if all(self._stored[name].whole for name in names):
            for name in names:
                yield name, value
            return
        from transformers.core_model_loading import revert_weight_conversion

        pieces = revert_weight_conversion(self._skeleton, {parameter: value})
        for name in names:
            if (piece := pieces.get(self._stored[name].hub_name)) is not None:
                yield name, piece

    def _squares(self, parts: Sequence[tuple[str, list[str]]], sink: _Sink, tell: Callable[[int], None]) -> None:
        """One pass over the text for some parameters: one sample at a time, since squares of sums are not sums."""
        weights = [self._model.get_parameter(name) for name, _ in parts]
        sums = [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]
        handles = []
        for weight, total in zip(weights, sums, strict=True):

            def add(weight: Tensor, total: Tensor = total) -> None:
                assert weight.grad is not None
                total.add_(weight.grad.square_())
                weight.grad = None

            handles.append(weight.requires_grad_().register_post_accumulate_grad_hook(add))
        for sample in self._samples:
            logits = self._model(input_ids=sample.ids[None]).logits[0, sample.scored_from - 1 : -1].float()
            cross_entropy(logits, sample.ids[sample.scored_from :], reduction="sum").backward()  # type: ignore[no-untyped-call]
            del logits
            tell(4 * len(sample.ids))
        for handle, weight in zip(handles, weights, strict=True):
            handle.remove()
            weight.requires_grad_(False)
        for (parameter, names), total in zip(parts, sums, strict=True):
            mean = total.div_(len(self._samples)).float()
            if not mean.isfinite().all():
                raise MergeError(
                    f"{quoted(names[0])} has gradients whose squares are not finite in float32",
                    hint="The model overflows on this text, or its weights hold NaN.",
                )
            for name, piece in self._on_disk(parameter, names, mean):
                sink.write([name], piece.contiguous(), {"samples": len(self._samples)})

    def _config(self, kind: str, **facts: object) -> bytes:
        table = {"kind": kind, "model": self._checkpoint.location, "samples": len(self._samples), **facts}
        return (json.dumps({"streammerge": table}, indent=2) + "\n").encode()

    def _cut(self, kind: str, sums: Sequence[int]) -> list[list[int]]:
        """Positions of `sums`, bytes each, in order, in as few passes as the budget allows."""
        fixed = self._covariance_fixed() if kind == COVARIANCE else self._fisher_fixed()
        passes: list[list[int]] = []
        taken: list[int] = []
        for position, nbytes in enumerate(sums):
            if fixed + nbytes > self._budget:
                raise PlanError(
                    f"capturing the {kind} needs {format_bytes(fixed + nbytes)}, "
                    f"more than the budget of {format_bytes(self._budget)}",
                    hint="Raise `--memory`, or lower `--batch-size` or `--max-tokens`. Weights are held in float32.",
                )
            if not passes or fixed + taken[-1] + nbytes > self._budget:
                passes.append([])
                taken.append(0)
            passes[-1].append(position)
            taken[-1] += nbytes
        if taken:
            self.memory[kind] = MemoryNeed(budget=self._budget, fixed=fixed, sums=tuple(taken))
        return passes

    def _covariance_fixed(self) -> int:
        """Beside the sums: weights, one layer's activations, one product."""
        rows = max(batch.numel() for batch in self._batches)
        widest = max(sum(self._checkpoint.tensors[name].shape) for name in self.matrices)
        count, length = max((tuple(batch.shape) for batch in self._batches), key=lambda shape: shape[0] * shape[1] ** 2)
        product = 4 * max(self.matrices.values()) ** 2
        return self._weight_bytes() + 4 * rows * 6 * widest + count * self._attention(length) + product

    def _fisher_fixed(self) -> int:
        """Beside the sums: weights, all layers' activations, the logits three times, a gradient and what is written."""
        length = max(len(sample.ids) for sample in self._samples)
        widths = sum(sum(self._checkpoint.tensors[name].shape) for name in self.matrices)
        layers = int(getattr(self._skeleton.config, "num_hidden_layers", 1))
        vocabulary: int = self._skeleton.get_output_embeddings().weight.shape[0]
        activations = 4 * length * (2 * widths + 3 * vocabulary) + layers * self._attention(length)
        return self._weight_bytes() + activations + 8 * self._largest_parameter()

    def _weight_bytes(self) -> int:
        tensors: dict[int, Tensor] = {id(t): t for t in (*self._skeleton.parameters(), *self._skeleton.buffers())}
        return 4 * sum(t.numel() for t in tensors.values()) + 16 * self.tokens + RESERVE_BYTES

    def _largest_parameter(self) -> int:
        return max(int(parameter.numel()) for parameter in self._skeleton.parameters())

    def _attention(self, length: int) -> int:
        """Bytes of one layer's scores for one sample, which the fused kernel never holds."""
        if attention_of(self._skeleton) == "sdpa":
            return 0
        return 3 * 4 * int(getattr(self._skeleton.config, "num_attention_heads", 1)) * length**2


class _Products(TorchFunctionMode):
    """While entered, shows every product of rows with a stored matrix: the matrix's address, and the rows.

    Linear layers, GPT-2's Conv1D and the loops over stacked experts all end here, whatever module holds them.
    """

    def __init__(self, see: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = 0 if func is linear else 1 if func is torch.addmm else None
        if first is not None and len(args) > first + 1:
            self._see(args[first + 1].data_ptr(), args[first])
        return func(*args, **(kwargs or {}))


class _Sink:
    """Hands tensors to a writer, and waits for it before their memory is used again."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def write(self, names: Sequence[str], tensor: Tensor, facts: dict[str, float | int | str | bool]) -> None:
        """Write one tensor under several names."""
        written = threading.Semaphore(0)
        data = tensor.view(-1).numpy().data.cast("B")
        for name in names:
            self._writer.write(Block(name, 0, data, written.release, Outcome(name, "capture", facts)))
        for _ in names:
            written.acquire()


def _padded(rows: Tensor) -> Tensor:
    """Rows with zeros below up to a power of two: products of few shapes, since oneDNN keeps code for each."""
    wanted = 1 << max(len(rows) - 1, 15).bit_length()
    return pad(rows, (0, 0, 0, wanted - len(rows))) if len(rows) < wanted else rows


def _meter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def tell(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    return tell
