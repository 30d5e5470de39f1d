"""Stand-ins for tests of the training loop: a model of three parts, and batches that depend on their position only."""

from __future__ import annotations

import torch
from torch import nn

from mmseg.core import CheckpointHook, IterBasedRunner, LrSchedule, build_optimizer

OPTIMIZER = dict(
    type='AdamW', lr=1e-2, weight_decay=0.05,
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1), norm=dict(decay_mult=0.0))))


class Model(nn.Module):
    """Predicts 4 classes from 3 numbers; draws from every random generator that a resume must put back."""

    def __init__(self, width=8):
        super().__init__()
        self.backbone = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.3)
        self.predictor = nn.Linear(width, 4)
        self.seen = []

    def forward(self, clip, label, iteration=0):
        self.seen.append(iteration)
        logits = self.predictor(self.drop(self.norm(self.backbone(clip))))
        return {
            'decode.loss_ce': nn.functional.cross_entropy(logits, label),
            'decode.accuracy': (logits.argmax(1) == label).float().mean(),
        }


def batch(position, size=8):
    generator = torch.Generator().manual_seed(position)
    return {
        'img': torch.randn(size, 3, generator=generator),
        'gt_semantic_seg': torch.randint(4, (size,), generator=generator),
    }


def batches(start=0, size=8):
    while True:
        yield batch(start, size)
        start += 1


def make_runner(work_dir, iters=10, hooks=(), model=None, interval=None, optimizer=OPTIMIZER, **options):
    torch.manual_seed(3)
    model = model or Model()
    runner = IterBasedRunner(
        model=model, optimizer=build_optimizer(model, optimizer), schedule=LrSchedule(iters, power=0.9),
        max_iters=iters, work_dir=work_dir, meta={'seed': 3}, **options)
    if interval:
        runner.register_hook(CheckpointHook(interval))
    for hook in hooks:
        runner.register_hook(hook)
    return runner
