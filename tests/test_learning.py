"""The model learns: it over-fits two clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmseg.apps.mini_vspw import render_video
from mmseg.models import build_segmentor

from .tiny import tiny_model

CASTS = (('wall', 'sand', 'sofa', 'lamp'), ('curtain', 'grass', 'pillow'))
SIZE = (64, 96)


@pytest.mark.parametrize('stage, frames', [('1f', 1), ('video', 2)])
def test_two_clips_are_learned_by_heart(stage, frames):
    raw = [list(render_video(np.random.default_rng(i), cast, frames)) for i, cast in enumerate(CASTS)]
    ids = np.unique([label[: SIZE[0], : SIZE[1]] for clip in raw for _, label in clip])
    ids = ids[(ids > 0) & (ids < 255)]
    train_ids = np.full(256, 255)
    train_ids[ids] = np.arange(len(ids))
    images = np.stack([[frame[: SIZE[0], : SIZE[1]] for frame, _ in clip] for clip in raw])
    labels = np.stack([[train_ids[label[: SIZE[0], : SIZE[1]]] for _, label in clip] for clip in raw])
    clips = (torch.from_numpy(images).permute(0, 1, 4, 2, 3).float() - 115) / 58
    labels = torch.from_numpy(labels)

    model = tiny_model(stage)
    model['decode_head'].update(num_classes=len(ids), loss_cfg=dict(warmup_iters=40, train_num_points=256))
    model = build_segmentor(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for iteration in range(100):
        loss = sum(model.loss(clips, labels, iteration=iteration).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model.eval()
    with torch.no_grad():
        predicted = model.predict([clips], [None], SIZE)
    seen = labels != 255
    assert (predicted[seen] == labels[seen]).float().mean() > 0.9
    baseline = max((labels[seen] == k).float().mean() for k in range(len(ids)))
    assert baseline < 0.5  # the largest class alone would not do
