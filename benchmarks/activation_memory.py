"""Memory of a training step on a GPU, counted without one.

    python -m benchmarks.activation_memory
    python -m benchmarks.activation_memory --backbone mit_b3 --frames 4 --card 16 --json memory.json
    python -m benchmarks.activation_memory --backbone mit_b1 --batch 1 --measure

The step (losses, backward, clipping, AdamW) runs on fake tensors, which have shapes, types and lifetimes but no data.
Every operation that PyTorch dispatches is seen: a storage counts from its birth to its death, once for all its views,
under the part of the step that made it.  The step is the second one, so that AdamW has its states.  Counted beside it
is what the forward pass keeps for the backward pass, by autograd's own hooks.

As on a GPU are: float32 weights and their bfloat16 copies; norms, which CUDA's autocast runs in float32 and a CPU's
does not; fused attention, which keeps neither scores nor dropout masks; AdamW in its fused form, and clipping over all
tensors together.  Not as on a GPU: what stands under `device.type == 'cpu'` in the model runs piece by piece, and a
dropout keeps a mask of the type of its input instead of bool (both only for queries and masks).  Costs have no values,
so the matching takes zeros: every target gets its two queries, as always.

What kernels allocate inside is not seen.  The sum adds allowances, which are assumptions: 0.6 GiB for the CUDA context
and its libraries, 1 GiB for workspaces of cuDNN and cuBLAS, and 15 % of the tensors for what the caching allocator
rounds up or cannot use.  ``--measure`` also runs each step on real tensors of ``--device``, each in a process of its
own, and sets the peak beside the count (both above the weights).

``--json`` writes a list of rows ``{variant, saved_gib, forward_gib, backward_gib, update_gib, total_gib, card_gib,
parts_gib, counted_mib, measured_mib}``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also as `python benchmarks/activation_memory.py`

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import speed
from benchmarks.scaling import grid_labels
from mmseg.config import load_config
from mmseg.core import build_optimizer
from mmseg.core.finetune import FinetuneConfig, freeze
from mmseg.kernels.torch_ops import uses_native
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.layers import MultiHeadAttention
from mmseg.models.structures import ClipTarget

GIB = 2**30
CONTEXT, WORKSPACE, FRAGMENTS = 0.6, 1.0, 0.15
WEIGHTS, GRADIENTS, BACKWARD, UPDATE = 'weights', 'gradients of weights', 'made in backward', 'AdamW'
INPUT = 'clip and labels'


class Tally:
    """Bytes of those storages, among the ones it was shown, that are still alive, by label.

    Attributes:
        alive: label -> bytes.
        total: their sum.
    """

    def __init__(self) -> None:
        self.alive: Counter[Any] = Counter()
        self.total = 0
        self._known: dict[int, tuple[Any, int]] = {}

    def add(self, tensor: Tensor, label: Any) -> None:
        """Counts the tensor's storage under ``label``, unless it is known already."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known[storage._cdata] = label, storage.nbytes()
        self.alive[label] += storage.nbytes()
        self.total += storage.nbytes()
        weakref.finalize(storage, self._remove, storage._cdata).atexit = False

    def relabel(self, tensor: Tensor, label: Any) -> None:
        """Moves a known storage to another label."""
        key = tensor.untyped_storage()._cdata
        old, size = self._known[key]
        self._known[key] = label, size
        self.alive[old] -= size
        self.alive[label] += size

    def _remove(self, key: int) -> None:
        label, size = self._known.pop(key)
        self.alive[label] -= size
        self.total -= size


class LiveTensors(TorchDispatchMode):
    """Follows every tensor that an operation makes while the mode is active.

    Attributes:
        tally: what is alive.
        label: where new storages are counted.
        peak: the largest total since :meth:`start`.
        at_peak: label -> bytes at that moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()
        self.label = 'other'
        self.start('other')

    def start(self, label: str) -> None:
        """Counts under ``label`` from now on, and begins a new peak."""
        self.label = label
        self.peak, self.at_peak = self.tally.total, Counter(self.tally.alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs the operation and counts its results."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.tally.add(leaf, self.label)
        if self.tally.total > self.peak:
            self.peak, self.at_peak = self.tally.total, Counter(self.tally.alive)
        return out


def as_on_cuda(model: nn.Module) -> None:
    """Gives the modules the types and the saved tensors that they have on CUDA.

    Autocast runs norms in float32 there (the rest of CUDA's list does not occur in the forward pass before the losses,
    which are float32 anyway, but for the few weights over frames), and attention with dropout is fused as well, which
    it is not on a CPU.
    """
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
        elif isinstance(module, MultiHeadAttention):
            module.dropout = 0.0


class SavedTensors:
    """What autograd keeps for the backward pass.

    Attributes:
        tally: what is alive, by (part, dtype); weights are left out.
        part: where new storages are counted.
    """

    def __init__(self, weights: Iterator[Tensor]) -> None:
        self.tally = Tally()
        self.part = ''
        self._weights = {weight.untyped_storage()._cdata for weight in weights}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which the forward pass is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in self._weights:
            self.tally.add(tensor, (self.part, str(tensor.dtype).removeprefix('torch.')))
        return tensor.detach()  # a result that its own operation keeps would otherwise keep itself alive


@dataclass
class Variant:
    """One way to train.

    Attributes:
        low: autocast to bfloat16.
        checkpointing: of MiT blocks and encoder layers.
        frozen: stage 2: only the mask decoder is trained.
    """

    low: bool = False
    checkpointing: bool = False
    frozen: bool = False

    def __str__(self) -> str:
        parts = ['bf16' if self.low else 'fp32', 'checkpointing' if self.checkpointing else 'no checkpointing']
        return ', '.join(parts + ['stage 2 (mask decoder alone)'] * self.frozen)


VARIANTS = (
    Variant(low=True, checkpointing=True), Variant(low=True), Variant(checkpointing=True), Variant(),
    Variant(low=True, checkpointing=True, frozen=True),
)  # fmt: skip


@dataclass
class Count:
    """Bytes of a training step.

    Attributes:
        saved: what the forward pass keeps for the backward pass, (part, dtype) -> bytes.
        peaks: forward, backward, update -> most bytes that were alive, weights and all.
        largest: part -> bytes at the largest of these moments.
    """

    saved: dict[tuple[str, str], int]
    peaks: dict[str, int]
    largest: dict[str, int] = field(default_factory=dict)

    @property
    def tensors(self) -> int:
        """The most bytes of tensors at any time."""
        return max(self.peaks.values())

    @property
    def total(self) -> float:
        """GiB of tensors and allowances."""
        return self.tensors / GIB * (1 + FRAGMENTS) + CONTEXT + WORKSPACE

    @property
    def above_weights(self) -> int:
        """The most bytes of tensors besides weights, clip and labels: what :func:`speed.own_peak` measures."""
        return self.tensors - self.largest[WEIGHTS] - self.largest[INPUT]


@contextlib.contextmanager
def hostless() -> Iterator[None]:
    """Lets values go to the host and back, though fake tensors have none: zeros arrive there, shapes come back."""

    def numpy(tensor: Tensor, **options: Any) -> np.ndarray:
        if hasattr(tensor, 'on_host'):
            return tensor.on_host
        return np.zeros(tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix('torch.')))

    def from_numpy(array: np.ndarray) -> Tensor:
        tensor = torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)))
        tensor.on_host = array  # type: ignore[attr-defined]
        return tensor

    with mock.patch.object(Tensor, 'numpy', numpy), mock.patch('torch.from_numpy', from_numpy):
        yield


def fake_model(args: argparse.Namespace, variant: Variant) -> EncoderDecoder:
    """The model on the meta device; nothing is initialised."""
    with torch.device('meta'):
        model = speed.model_of(
            argparse.Namespace(backbone=args.backbone, device='meta'), 'video', args.frames, variant.checkpointing
        )
    if variant.frozen:
        freeze(model, FinetuneConfig().train)
    as_on_cuda(model)
    return model.train()


def count(args: argparse.Namespace, variant: Variant) -> Count:
    """Counts one training step.

    Args:
        args: backbone, frames, batch, size and targets.
        variant: the way to train.
    """
    if not uses_native('cpu'):
        raise RuntimeError('the count needs the native op of this machine: the PyTorch form keeps other tensors')
    model = fake_model(args, variant)
    schedule = load_config(speed.CONFIGS / f'video_themask_{args.backbone}.py').optimizer
    with FakeTensorMode(allow_non_fake_inputs=True), hostless():
        model = model.to_empty(device='cpu')
        optimizer = build_optimizer(model, schedule)
        with LiveTensors() as live:
            for tensor in (*model.parameters(), *model.buffers()):
                live.tally.add(tensor, WEIGHTS)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(
                        lambda own: live.tally.relabel(own.grad, GRADIENTS) if own.grad is not None else None
                    )
            step(args, model, optimizer, live, variant.low)
            return step(args, model, optimizer, live, variant.low)


def step(
    args: argparse.Namespace, model: EncoderDecoder, optimizer: torch.optim.Optimizer, live: LiveTensors, low: bool
) -> Count:
    """One training step, counted part by part."""
    head: Any = model.decode_head
    saved = SavedTensors(iter(model.parameters()))
    peaks: dict[str, int] = {}
    at_peak: dict[str, Counter[str]] = {}
    current = 'forward'

    def begin(phase: str, part: str) -> None:
        """From here on storages count for ``part``, and the peak for ``phase``."""
        nonlocal current
        if live.peak >= peaks.get(current, 0):
            peaks[current], at_peak[current] = live.peak, live.at_peak
        live.start(part)
        saved.part, current = part, phase

    live.start(INPUT)
    height, width = args.size
    clip = torch.randn(args.batch, args.frames, 3, height, width)
    labels = torch.zeros(args.batch, args.frames, height, width, dtype=torch.int64)
    targets = [ClipTarget(torch.arange(args.targets), own) for own in labels]
    # torch.compile traces the lines without detours for the CPU, and without caches that would outlive fake tensors.
    with mock.patch('torch.compiler.is_compiling', return_value=True):
        with torch.autocast('cpu', torch.bfloat16, enabled=low), saved.hooks():
            begin('forward', 'backbone')
            features = model.backbone(clip.flatten(0, 1))
            begin('forward', 'pixel decoder')
            mask_features, maps = head.encode(features)
            begin('forward', 'mask decoder')
            output = head.predictor(maps, mask_features, args.frames, all_layers=True)
            begin('forward', 'matching and losses')
            losses = head.criterion(output, targets)
        del features, mask_features, maps, output, targets
        loss = torch.stack(list(losses.values())).sum()
        kept = {key: size for key, size in saved.tally.alive.items() if size}
        begin('backward', BACKWARD)
        loss.backward()
    begin('update', UPDATE)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01, foreach=True)
    optimizer.step()
    optimizer.zero_grad()
    begin('over', 'other')
    largest = max(('forward', 'backward', 'update'), key=lambda phase: peaks[phase])
    return Count(kept, {phase: peaks[phase] for phase in ('forward', 'backward', 'update')}, dict(at_peak[largest]))


def measured(args: argparse.Namespace, variant: Variant) -> float:
    """MiB that the step takes on real tensors of this device, above weights and input."""
    model = speed.model_of(args, 'video', args.frames, variant.checkpointing).train()
    if variant.frozen:
        freeze(model, FinetuneConfig().train)
    clip = torch.cat([speed.clip_of(args, args.frames, *args.size)] * args.batch)
    labels = torch.cat([grid_labels(args.targets, args.frames, *args.size)] * args.batch).to(args.device)
    return speed.own_peak(speed.train_run(args, model, clip, labels, variant.low), args.device)


def row_of(args: argparse.Namespace, variant: Variant, counted: Count, peak: float | None) -> dict[str, Any]:
    """One line of the table and of the JSON file."""
    return {
        'variant': str(variant),
        'saved_gib': sum(counted.saved.values()) / GIB,
        **{f'{phase}_gib': size / GIB for phase, size in counted.peaks.items()},
        'total_gib': counted.total,
        'card_gib': args.card * 1e9 / GIB,
        'parts_gib': {part: size / GIB for part, size in counted.largest.items() if size},
        'counted_mib': counted.above_weights / 2**20,
        'measured_mib': peak,
    }


def variants_table(rows: list[dict[str, Any]]) -> list[str]:
    """All variants as Markdown, GiB."""
    comparing = any(row['measured_mib'] is not None for row in rows)
    lines = [
        '| | kept for backward | peak, forward | backward | update | with allowances | of the card |'
        + (' counted above the weights | measured |' if comparing else ''),
        '|---|---|---|---|---|---|---|' + ('---|---|' if comparing else ''),
    ]
    for row in rows:
        figures = [row[f'{name}_gib'] for name in ('saved', 'forward', 'backward', 'update', 'total')]
        cells = [row['variant'], *(f'{figure:.2f} GiB' for figure in figures)]
        cells.append(f'{row["total_gib"] / row["card_gib"]:.0%}')
        if row['measured_mib'] is not None:
            cells += [f'{row["counted_mib"]:.0f} MiB', f'{row["measured_mib"]:.0f} MiB']
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def parts_table(counted: Count) -> list[str]:
    """The largest moment of one variant by part as Markdown, and what each part keeps for the backward pass."""
    lines = ['| part | at the peak | kept for backward: bfloat16 | float32 | other |', '|---|---|---|---|---|']
    for part, size in counted.largest.items():
        kept = {dtype: own for (owner, dtype), own in counted.saved.items() if owner == part}
        low, full = kept.pop('bfloat16', 0), kept.pop('float32', 0)
        cells = [f'{own / GIB:.3f} GiB' if own else '' for own in (size, low, full, sum(kept.values()))]
        if any(cells):
            lines.append(f'| {part} | {" | ".join(cells)} |')
    total = counted.tensors / GIB
    lines.append(f'| **all tensors** | **{total:.2f} GiB** | | | |')
    lines.append(f'| allocator, {FRAGMENTS:.0%} | {FRAGMENTS * total:.2f} GiB | | | |')
    lines.append(f'| CUDA context; cuDNN, cuBLAS | {CONTEXT:.1f} GiB; {WORKSPACE:.1f} GiB | | | |')
    lines.append(f'| **sum** | **{counted.total:.2f} GiB** | | | |')
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', default='mit_b5', help='mit_b0 .. mit_b5')
    parser.add_argument('--frames', type=int, default=2, help='of a clip')
    parser.add_argument('--batch', type=int, default=2, help='clips')
    parser.add_argument('--size', nargs=2, type=int, default=(480, 480), metavar=('HEIGHT', 'WIDTH'), help='of crops')
    parser.add_argument('--targets', type=int, default=20, help='classes in each clip')
    parser.add_argument('--card', type=float, default=24, help='memory of the GPU, 10^9 bytes')
    parser.add_argument('--measure', action='store_true', help='also on real tensors')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='for --measure')
    parser.add_argument('--json', help='write the rows to this file')
    parser.add_argument('--peak-of', type=int, metavar='VARIANT', help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Counts all variants."""
    arguments = sys.argv[1:] if argv is None else argv
    args = parse(arguments)
    if args.peak_of is not None:
        print(measured(args, VARIANTS[args.peak_of]))
        return
    height, width = args.size
    print(
        f'{args.backbone}, {args.batch} clips of {args.frames} frames of {height}x{width}, {args.targets} targets each,'
        f' on {args.card:g} GB ({args.card * 1e9 / GIB:.1f} GiB); torch {torch.__version__}'
    )
    counts = [count(args, variant) for variant in VARIANTS]
    rows = []
    for index, (variant, counted) in enumerate(zip(VARIANTS, counts)):
        peak = None
        if args.measure:
            peak = float(speed.in_fresh_process('benchmarks.activation_memory', [*arguments, '--peak-of', str(index)]))
        rows.append(row_of(args, variant, counted, peak))
    print('\n' + '\n'.join(variants_table(rows)))
    print(f'\n{VARIANTS[0]}, by part:\n\n' + '\n'.join(parts_table(counts[0])))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
    main()
