"""THE-Mask in plain PyTorch: every formula written out, one after the other, as a paper would state it.

This is the yardstick for ``benchmarks/speed.py`` and an independent second implementation for the tests: it shares no
code with ``mmseg``, only the names of a state dict (THE-Mask: arXiv 2309.08020; MiT: 2105.15203; pixel decoder:
2010.04159; masked attention, matching, point losses: 2112.01527; combination of frame queries: 2112.08275).  Nothing
here is clever: all heads of all layers are evaluated, masks are resized to full size, every output is matched and
sampled on its own.

Shapes: B clips, T frames, Q queries, K classes, h x w a map, H x W the image, "bt" the frames of all clips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Prediction = tuple[Tensor, Tensor]  # class logits [N, Q, K + 1], mask logits [N, Q, frames, h, w]


class Weights:
    """A state dict seen from one module: ``weights / 'layers' / 0`` goes into it, ``weights['bias']`` is a tensor."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = '') -> None:
        self.tensors = tensors
        self.prefix = prefix

    def __truediv__(self, name: str | int) -> Weights:
        return Weights(self.tensors, f'{self.prefix}{name}.')

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def get(self, name: str) -> Tensor | None:
        """The tensor, or ``None`` where the module has none (a convolution without bias)."""
        return self.tensors.get(self.prefix + name)

    def count(self) -> int:
        """Number of children named 0, 1, 2, .."""
        children = {key[len(self.prefix) :].split('.')[0] for key in self.tensors if key.startswith(self.prefix)}
        return len(children)


def linear(x: Tensor, w: Weights) -> Tensor:
    """Affine map of the last axis."""
    return F.linear(x, w['weight'], w['bias'])


def layer_norm(x: Tensor, w: Weights, eps: float = 1e-5) -> Tensor:
    """Layer norm of the last axis."""
    return F.layer_norm(x, x.shape[-1:], w['weight'], w['bias'], eps)


def conv(x: Tensor, w: Weights, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """Convolution with or without bias."""
    return F.conv2d(x, w['weight'], w.get('bias'), stride, padding, groups=groups)


def group_norm(x: Tensor, w: Weights) -> Tensor:
    """Group norm with 32 groups."""
    return F.group_norm(x, 32, w['weight'], w['bias'])


def to_tokens(x: Tensor) -> Tensor:
    """``[N, C, h, w]`` -> ``[N, h * w, C]``."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, h: int, w: int) -> Tensor:
    """``[N, h * w, C]`` -> ``[N, C, h, w]``."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], h, w)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[N, L, C]`` -> ``[N, heads, L, C / heads]``."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


# Backbone


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Zeroes a branch for whole samples, and scales what is left."""
    if rate == 0:
        return x
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * keep / (1 - rate)


def mit_attention(x: Tensor, w: Weights, size: tuple[int, int], heads: int, reduction: int) -> Tensor:
    """Self-attention whose keys and values come from a map reduced by a strided convolution."""
    reduced = x
    if reduction > 1:
        reduced = to_tokens(conv(to_map(x, *size), w / 'sr', stride=reduction))
        reduced = layer_norm(reduced, w / 'norm')
    query = split_heads(linear(x, w / 'q'), heads)
    key, value = (split_heads(part, heads) for part in linear(reduced, w / 'kv').chunk(2, -1))
    attention = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(-1)
    return linear((attention @ value).transpose(1, 2).flatten(2), w / 'proj')


def mit_mlp(x: Tensor, w: Weights, size: tuple[int, int]) -> Tensor:
    """Mix-FFN: linear, depthwise 3x3 convolution, GELU, linear."""
    x = linear(x, w / 'fc1')
    x = to_tokens(conv(to_map(x, *size), w / 'dwconv' / 'dwconv', padding=1, groups=x.shape[2]))
    return linear(F.gelu(x), w / 'fc2')


def mit(x: Tensor, w: Weights, max_drop_path: float = 0.0) -> list[Tensor]:
    """Mix Transformer: images ``[N, 3, H, W]`` -> four maps of strides 4, 8, 16, 32."""
    depths = [(w / f'block{i}').count() for i in (1, 2, 3, 4)]
    rates = iter(torch.linspace(0, max_drop_path, sum(depths)).tolist())
    maps = []
    for i, depth, kernel, stride, heads, reduction in zip(
        (1, 2, 3, 4), depths, (7, 3, 3, 3), (4, 2, 2, 2), (1, 2, 5, 8), (8, 4, 2, 1)
    ):
        x = conv(x, w / f'patch_embed{i}' / 'proj', stride, kernel // 2)
        size = x.shape[2], x.shape[3]
        x = layer_norm(to_tokens(x), w / f'patch_embed{i}' / 'norm')
        for j in range(depth):
            block, rate = w / f'block{i}' / j, next(rates)
            branch = mit_attention(layer_norm(x, block / 'norm1', 1e-6), block / 'attn', size, heads, reduction)
            x = x + drop_path(branch, rate)
            branch = mit_mlp(layer_norm(x, block / 'norm2', 1e-6), block / 'mlp', size)
            x = x + drop_path(branch, rate)
        x = to_map(layer_norm(x, w / f'norm{i}', 1e-6), *size)
        maps.append(x)
    return maps


# Positions


def sine(length: int, channels: int, device: torch.device) -> Tensor:
    """Sine embedding of positions 1..length, normalised to 2 pi: ``[length, channels]``."""
    position = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + 1e-6) * 2 * math.pi
    pair = torch.div(torch.arange(channels, device=device), 2, rounding_mode='floor')
    frequency = 10000 ** (2 * pair / channels)
    angle = position[:, None] / frequency
    return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1)


def position_2d(h: int, w: int, channels: int, device: torch.device) -> Tensor:
    """``[channels, h, w]``: the first half from the row, the second from the column."""
    rows = sine(h, channels // 2, device)[:, None].expand(-1, w, -1)
    columns = sine(w, channels // 2, device)[None].expand(h, -1, -1)
    return torch.cat([rows, columns], 2).permute(2, 0, 1)


def position_3d(frames: int, h: int, w: int, channels: int, device: torch.device) -> Tensor:
    """``[frames, channels, h, w]``: the position in the frame plus that of the frame."""
    return position_2d(h, w, channels, device) + sine(frames, channels, device)[:, :, None, None]


# Pixel decoder


def ms_deform_attn_core(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of all levels.

    Args:
        value: ``[N, S, M, D]``.
        shapes: (h, w) of each level.
        locations: ``[N, Q, M, L, P, 2]``, (x, y) relative to the level.
        weights: ``[N, Q, M, L, P]``.

    Returns:
        ``[N, Q, M * D]``.
    """
    n, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    sampled = []
    for level, (part, (h, w)) in enumerate(zip(value.split([h * w for h, w in shapes], 1), shapes)):
        image = part.permute(0, 2, 3, 1).reshape(n * heads, width, h, w)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid, align_corners=False))  # [N * M, D, Q, P]
    weights = weights.transpose(1, 2).reshape(n * heads, 1, queries, len(shapes) * points)
    out = (torch.cat(sampled, -1) * weights).sum(-1)
    return out.view(n, heads * width, queries).transpose(1, 2)


def ms_deform_attn(
    query: Tensor, source: Tensor, w: Weights, shapes: list[tuple[int, int]], references: Tensor, heads: int
) -> Tensor:
    """Attention to a few points per head and level around each reference point ``[S, 2]``."""
    n, queries = query.shape[:2]
    levels = len(shapes)
    value = linear(source, w / 'value_proj').unflatten(2, (heads, -1))
    offsets = linear(query, w / 'sampling_offsets').view(n, queries, heads, levels, -1, 2)
    weights = linear(query, w / 'attention_weights').view(n, queries, heads, -1).softmax(-1)
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=query.dtype, device=query.device)
    locations = references[None, :, None, None, None] + offsets / sizes[:, None]
    out = ms_deform_attn_core(value, shapes, locations, weights.view(n, queries, heads, levels, -1))
    return linear(out, w / 'output_proj')


def pixel_decoder(maps: list[Tensor], w: Weights, heads: int = 8) -> tuple[Tensor, list[Tensor]]:
    """Four maps of the backbone -> mask features at stride 4, three maps of strides 32, 16, 8."""
    levels = []
    for i, x in enumerate((maps[3], maps[2], maps[1])):
        levels.append(group_norm(conv(x, w / 'input_proj' / i / 0), w / 'input_proj' / i / 1))
    shapes = [(x.shape[2], x.shape[3]) for x in levels]
    channels = levels[0].shape[1]
    tokens = torch.cat([to_tokens(x) for x in levels], 1)
    embed = (w / 'transformer')['level_embed']
    positions = [position_2d(*shape, channels, tokens.device).flatten(1).t().to(tokens) for shape in shapes]
    position = torch.cat([x + embed[i] for i, x in enumerate(positions)])
    references = torch.cat([pixel_centres(*shape, tokens.device) for shape in shapes]).to(tokens)
    layers = w / 'transformer' / 'encoder' / 'layers'
    for i in range(layers.count()):
        layer = layers / i
        branch = ms_deform_attn(tokens + position, tokens, layer / 'self_attn', shapes, references, heads)
        tokens = layer_norm(tokens + branch, layer / 'norm1')
        branch = linear(F.relu(linear(tokens, layer / 'linear1')), layer / 'linear2')
        tokens = layer_norm(tokens + branch, layer / 'norm2')
    parts = tokens.split([h * w for h, w in shapes], 1)
    out = [to_map(part, *shape) for part, shape in zip(parts, shapes)]
    lateral = group_norm(conv(maps[0], w / 'adapter_1'), w / 'adapter_1' / 'norm')
    upsampled = F.interpolate(out[2], size=lateral.shape[2:], mode='bilinear', align_corners=False)
    features = F.relu(group_norm(conv(lateral + upsampled, w / 'layer_1', padding=1), w / 'layer_1' / 'norm'))
    return conv(features, w / 'mask_features'), out


def pixel_centres(h: int, w: int, device: torch.device) -> Tensor:
    """(x, y) of the pixel centres of a map, relative to its size: ``[h * w, 2]``."""
    rows, columns = ((torch.arange(size, device=device) + 0.5) / size for size in (h, w))
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    return torch.stack([x, y], 2).flatten(0, 1)


# Mask decoders


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Weights,
    heads: int,
    blocked: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head attention; ``blocked`` is bool ``[N, Q, S]``, true where a query must not look."""
    in_weights, in_biases = w['in_proj_weight'].chunk(3), w['in_proj_bias'].chunk(3)
    q, k, v = (split_heads(F.linear(x, a, b), heads) for x, a, b in zip((query, key, value), in_weights, in_biases))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if blocked is not None:
        scores = scores.masked_fill(blocked[:, None], -math.inf)
    weights = F.dropout(scores.softmax(-1), dropout)
    return linear((weights @ v).transpose(1, 2).flatten(2), w / 'out_proj')


def cross_attention_layer(x: Tensor, position: Tensor, key: Tensor, value: Tensor, w: Weights, heads: int,
                          blocked: Tensor) -> Tensor:  # fmt: skip
    """Masked cross-attention, added and normalised."""
    branch = attention(x + position, key, value, w / 'multihead_attn', heads, blocked)
    return layer_norm(x + branch, w / 'norm')


def self_attention_layer(x: Tensor, position: Tensor, w: Weights, heads: int) -> Tensor:
    """Self-attention of queries, added and normalised."""
    branch = attention(x + position, x + position, x, w / 'self_attn', heads)
    return layer_norm(x + branch, w / 'norm')


def ffn_layer(x: Tensor, w: Weights) -> Tensor:
    """Feed-forward layer, added and normalised."""
    branch = linear(F.relu(linear(x, w / 'linear1')), w / 'linear2')
    return layer_norm(x + branch, w / 'norm')


def predict(
    queries: Tensor, mask_features: Tensor, norm: Weights, class_embed: Weights, mask_embed: Weights
) -> Prediction:
    """Class and mask logits of queries ``[N, Q, C]`` on mask features ``[N, T, C, h, w]``."""
    x = layer_norm(queries, norm)
    embedding = x
    for i in range(3):
        embedding = linear(embedding, mask_embed / 'layers' / i)
        if i < 2:
            embedding = F.relu(embedding)
    return linear(x, class_embed), torch.einsum('nqc,ntchw->nqthw', embedding, mask_features)


def blocked_positions(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Where queries must not look: mask logits ``[N, Q, T, h, w]`` -> bool ``[N, Q, T * size]``.

    Positions with a resized mask below one half; a query with nothing left looks everywhere.
    """
    n, q = masks.shape[:2]
    resized = F.interpolate(masks.flatten(0, 1), size=size, mode='bilinear', align_corners=False)
    blocked = resized.sigmoid().view(n, q, -1) < 0.5
    return blocked & ~blocked.all(-1, keepdim=True)


def one_frame_decoder(
    maps: list[Tensor], mask_features: Tensor, frames: int, w: Weights, heads: int
) -> list[Prediction]:
    """Clip queries that look at all frames of their clip: one prediction before the layers and one after each."""
    batch = mask_features.shape[0] // frames
    values, keys = memory(maps, frames, w)
    values = [x.reshape(batch, -1, x.shape[-1]) for x in values]
    keys = [x.reshape(batch, -1, x.shape[-1]) for x in keys]
    mask_features = mask_features.unflatten(0, (batch, frames))
    heads_of = w / 'decoder_norm', w / 'class_embed', w / 'mask_embed'
    position = (w / 'query_embed')['weight']
    x = (w / 'query_feat')['weight'].expand(batch, -1, -1)
    outputs = [predict(x, mask_features, *heads_of)]
    for i in range((w / 'transformer_ffn_layers').count()):
        level = i % 3
        blocked = blocked_positions(outputs[-1][1].detach(), (maps[level].shape[2], maps[level].shape[3]))
        cross = w / 'transformer_cross_attention_layers' / i
        x = cross_attention_layer(x, position, keys[level], values[level], cross, heads, blocked)
        x = self_attention_layer(x, position, w / 'transformer_self_attention_layers' / i, heads)
        x = ffn_layer(x, w / 'transformer_ffn_layers' / i)
        outputs.append(predict(x, mask_features, *heads_of))
    return outputs


def video_decoder(
    maps: list[Tensor], mask_features: Tensor, frames: int, w: Weights, heads: int, dropout: float = 0.0
) -> tuple[list[Prediction], list[Prediction]]:
    """Clip queries and frame queries: predictions of both levels before the layers and after each."""
    batch = mask_features.shape[0] // frames
    values, keys = memory(maps, frames, w)
    clip_features = mask_features.unflatten(0, (batch, frames))
    frame_features = mask_features[:, None]
    clip_heads = w / 'decoder_norm1', w / 'class_embed', w / 'mask_embed'
    frame_heads = w / 'decoder_norm2', w / 'class_embed_aux', w / 'mask_embed_aux'
    first = w / 'deformabel_transformer_cross_attention_layers'
    position = (w / 'query_embed')['weight']
    learned = (w / 'query_feat')['weight'].expand(batch, -1, -1)

    def self_attention(x: Tensor, name: str, norm: str) -> Tensor:
        branch = attention(x + position, x + position, x, first / name, heads, dropout=dropout)
        return layer_norm(x + F.dropout(branch, dropout), first / norm)

    def ffn(x: Tensor, end: str) -> Tensor:
        hidden = F.dropout(F.relu(linear(x, first / f'linear1{end}')), dropout)
        return layer_norm(x + F.dropout(linear(hidden, first / f'linear2{end}'), dropout), first / f'norm3{end}')

    def combine(q: Tensor, f: Tensor) -> Tensor:
        f = f.unflatten(0, (batch, frames))
        weights = linear(f, first / 'time_attention_weights').softmax(1)
        branch = (weights * linear(f, first / 'time_attention')).sum(1)
        return ffn(layer_norm(q + F.dropout(branch, dropout), first / 'norm1'), '')

    q = self_attention(learned, 'self_attn', 'norm2')
    f = self_attention(learned, 'self_attn_box', 'norm2_box').repeat_interleave(frames, 0)
    branch = attention(
        f + position, torch.cat(keys, 1), torch.cat(values, 1), first / 'cross_attn', heads, dropout=dropout
    )
    f = ffn(layer_norm(f + F.dropout(branch, dropout), first / 'norm1_box'), '_box')
    clip_outputs = [predict(q, clip_features, *clip_heads)]
    frame_outputs = [predict(f, frame_features, *frame_heads)]
    for i in range((w / 'transformer_ffn_layers').count()):
        level = i % 3
        masks = clip_outputs[-1][1].detach().transpose(1, 2).flatten(0, 1)[:, :, None]  # of the clip query, by frame
        blocked = blocked_positions(masks, (maps[level].shape[2], maps[level].shape[3]))
        cross = w / 'transformer_cross_attention_layers' / i
        f = cross_attention_layer(f, position, keys[level], values[level], cross, heads, blocked)
        f = self_attention_layer(f, position, w / 'transformer_self_attention_layers' / i, heads)
        f = ffn_layer(f, w / 'transformer_ffn_layers' / i)
        q = combine(q, f)
        clip_outputs.append(predict(q, clip_features, *clip_heads))
        frame_outputs.append(predict(f, frame_features, *frame_heads))
    return clip_outputs, frame_outputs


def memory(maps: list[Tensor], frames: int, w: Weights) -> tuple[list[Tensor], list[Tensor]]:
    """Values (map + level embedding) and keys (value + position) of each level: ``[bt, h * w, C]``."""
    values, keys = [], []
    for level, x in enumerate(maps):
        value = to_tokens(x) + (w / 'level_embed')['weight'][level]
        position = position_3d(frames, x.shape[2], x.shape[3], x.shape[1], x.device).flatten(2).transpose(1, 2).to(x)
        values.append(value)
        keys.append((value.unflatten(0, (-1, frames)) + position).flatten(0, 1))
    return values, keys


# Scores and label maps


def scores_of(outputs: Prediction) -> Tensor:
    """Class scores of every pixel at stride 4, ``[N, T, K, h, w]``."""
    logits, masks = outputs
    return torch.einsum('nqk,nqthw->ntkhw', logits.softmax(-1)[..., :-1], masks.sigmoid())


def resize_and_argmax(scores: Tensor, input_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """``[N, K, h, w]`` -> bilinear to the input size -> bilinear to ``size`` -> the best class, ``[N, *size]``."""
    scores = F.interpolate(scores, size=input_size, mode='bilinear', align_corners=False)
    scores = F.interpolate(scores, size=size, mode='bilinear', align_corners=False)
    return scores.argmax(1)


# Matching and losses


def random_points(rows: int, n: int, device: torch.device | str) -> Tensor:
    """Uniform points ``[rows, n, 2]`` in [0, 1)."""
    return torch.rand(rows, n, 2, device=device)


def point_sample(images: Tensor, points: Tensor) -> Tensor:
    """``[N, C, h, w]`` at points ``[N, P, 2]`` -> ``[N, C, P]``."""
    return F.grid_sample(images, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]


def pairwise_bce(x: Tensor, t: Tensor) -> Tensor:
    """Mean BCE of every row of x ``[Q, P]`` against every row of t ``[n, P]``."""
    positive = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction='none')
    negative = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction='none')
    return (positive @ t.T + negative @ (1 - t).T) / max(x.shape[1], 1)


def pairwise_dice(x: Tensor, t: Tensor) -> Tensor:
    """Dice loss of every row of x ``[Q, P]`` against every row of t ``[n, P]``."""
    p = x.sigmoid()
    return 1 - (2 * p @ t.T + 1) / (p.sum(1)[:, None] + t.sum(1) + 1)


@torch.no_grad()
def match(
    logits: Tensor, masks: Tensor, classes: Tensor, targets: Tensor, known: Tensor, num_points: int, round2: str
) -> list[tuple]:
    """Both rounds for one clip: ``[(queries, targets) of round 1, .. of round 2]``.

    Args:
        logits: ``[Q, K + 1]``.
        masks: ``[Q, T, h, w]``.
        classes: ``[n]``.
        targets: float ``[n, T, H, W]``.
        known: bool ``[T, H, W]``, where labels are known; points elsewhere are dropped.
        num_points: points, the same for all masks and frames.
        round2: ``full`` or ``mask``, the cost of round 2.
    """
    if len(classes) == 0:
        return [(torch.empty(0, dtype=torch.int64),) * 2] * 2
    points = random_points(1, num_points, masks.device)
    x = point_sample(masks.flatten(0, 1)[None], points).view(len(masks), -1)
    t = point_sample(targets.flatten(0, 1)[None], points).view(len(targets), -1)
    if not known.all():
        kept = at_nearest_pixels(known[None], points.expand(len(known), -1, -1)[None])[0].flatten()
        x, t = x[:, kept], t[:, kept]
    bce = pairwise_bce(x, t)
    cost = 2 * -logits.softmax(-1)[:, classes] + 5 * bce + 5 * pairwise_dice(x, t)
    rounds = []
    first, column = linear_sum_assignment(cost.cpu().numpy())
    rounds.append((torch.from_numpy(first), torch.from_numpy(column)))
    second = (cost if round2 == 'full' else bce).cpu().numpy().copy()
    second[first] = 1000 * np.abs(second.max())
    row, column = linear_sum_assignment(second)
    free = ~np.isin(row, first)
    rounds.append((torch.from_numpy(row[free]), torch.from_numpy(column[free])))
    return rounds


def bce_and_dice(x: Tensor, t: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows of mean BCE and of dice, over what is known ``[R, N]``."""
    if not known.all():  # rows then have other numbers of points
        ours = torch.ones(1, 1, dtype=torch.bool)
        rows = [bce_and_dice(x[i, k][None], t[i, k][None], ours) for i, k in enumerate(known) if k.any()]
        return sum((row[0] for row in rows), x.sum() * 0), sum((row[1] for row in rows), x.sum() * 0)
    p = x.sigmoid()
    bce = F.binary_cross_entropy_with_logits(x, t, reduction='none').mean(1).sum()
    dice = (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).sum()
    return bce, dice


def primary_losses(x: Tensor, t: Tensor, known: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """BCE and dice of masks ``[R, h, w]`` against targets ``[R, H, W]``, on mostly uncertain points."""
    x, t = x[:, None], t[:, None]
    with torch.no_grad():
        candidates = random_points(len(x), 3 * num_points, x.device)
        uncertainty = -point_sample(x, candidates)[:, 0].abs()
        index = uncertainty.topk(int(0.75 * num_points), 1).indices
        chosen = candidates.gather(1, index[:, :, None].expand(-1, -1, 2))
        rest = random_points(len(x), num_points - int(0.75 * num_points), x.device)
        points = torch.cat([chosen, rest], 1)
        t = point_sample(t, points)[:, 0]
        known = at_nearest_pixels(known[:, None], points[:, None])[:, 0]
    return bce_and_dice(point_sample(x, points)[:, 0], t, known)


def at_nearest_pixels(maps: Tensor, points: Tensor) -> Tensor:
    """Values ``[A, B, P]`` of maps ``[A, B, H, W]`` in the pixels where points ``[A, B, P, 2]`` lie."""
    column, row = (points * points.new_tensor([maps.shape[3], maps.shape[2]])).long().unbind(3)
    return maps.flatten(2).gather(2, row * maps.shape[3] + column)


def secondary_losses(x: Tensor, t: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and dice on every pixel against what is both target and already predicted."""
    x = F.interpolate(x[:, None], size=t.shape[1:], mode='nearest').flatten(1)
    t = t.flatten(1) * (x.sigmoid() > 0.5)
    return bce_and_dice(x, t, known.flatten(1))


def matched_masks(outputs: Prediction, targets: list[Tensor], matches: list[tuple], frame_level: bool
                  ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Matched masks and their targets, a row a mask and frame: ``[R, h, w]`` and ``[R, H, W]``.

    Rows run over clips, queries, frames; at the frame level over clips, frames, queries.
    """
    predicted, wanted = [], []
    for b, (query, index) in enumerate(matches):
        frames = targets[b].shape[1]
        if frame_level:
            predicted.append(outputs[1][b * frames : (b + 1) * frames, query, 0].flatten(0, 1))
            wanted.append(targets[b][index].transpose(0, 1).flatten(0, 1))
        else:
            predicted.append(outputs[1][b, query].flatten(0, 1))
            wanted.append(targets[b][index].flatten(0, 1))
    return torch.cat(predicted), torch.cat(wanted)


def losses_of(
    clip: list[Prediction],
    frame: list[Prediction] | None,
    labels: Tensor,
    empty_weight: Tensor,
    num_points: int = 12544,
    warming_up: bool = False,
) -> dict[str, Tensor]:
    """All weighted losses of labels ``[B, T, H, W]`` (255: void, 254: unknown); the last prediction is final."""
    num_classes = len(empty_weight) - 1
    batch, frames = labels.shape[:2]
    classes = [label.unique() for label in labels]
    classes = [c[c < 254] for c in classes]
    targets = [(label[None] == c[:, None, None, None]).float() for label, c in zip(labels, classes)]
    known = labels != 254
    knowns = [k.expand(len(c), *k.shape) for k, c in zip(known, classes)]
    known_frames = known.any(3).any(2)  # [B, T]
    divisor = max(sum(len(c) * int(k.sum()) for c, k in zip(classes, known_frames)), 1)
    losses = {}
    for s, outputs in enumerate(clip):
        suffix = '' if s == len(clip) - 1 else f'_{s}'
        masks = outputs[1]
        if frame is not None:
            masks = frame[s][1].view(batch, frames, *frame[s][1].shape[1:2], *frame[s][1].shape[3:]).transpose(1, 2)
        rounds = [
            match(outputs[0][b], masks[b], classes[b], targets[b], known[b], num_points,
                  'mask' if frame is None else 'full')
            for b in range(batch)
        ]
        first, second = ([clip_rounds[i] for clip_rounds in rounds] for i in (0, 1))
        for level, level_outputs in (('', outputs), ('_aux', None if frame is None else frame[s])):
            if level_outputs is None:
                continue
            weight = 0.25 if level else 1.0
            end = f'{suffix}{level}'
            wanted = torch.full((batch, outputs[0].shape[1]), num_classes, device=labels.device)
            for clip_matches in (first,) if warming_up else (first, second):
                for b, (query, index) in enumerate(clip_matches):
                    wanted[b, query] = classes[b][index]
            if level and not known_frames.all():
                each = F.cross_entropy(level_outputs[0].transpose(1, 2), wanted.repeat_interleave(frames, 0),
                                       empty_weight, reduction='none').view(batch, frames, -1)
                means = [clip[k].sum() / k.sum() for clip, k in zip(each, known_frames) if k.any()]
                ce = sum(means) / empty_weight[wanted].sum()
            else:
                if level:
                    wanted = wanted.repeat_interleave(frames, 0)
                ce = F.cross_entropy(level_outputs[0].transpose(1, 2), wanted, empty_weight)
            losses[f'loss_ce{end}'] = 2 * weight * ce
            bce, dice = zero, zero = level_outputs[1].sum() * 0, level_outputs[1].sum() * 0
            x, t = matched_masks(level_outputs, targets, first, bool(level))
            _, k = matched_masks(level_outputs, knowns, first, bool(level))
            if len(x):
                bce, dice = primary_losses(x, t, k, num_points)
            prefix = '' if warming_up else 'r0_'
            losses[f'{prefix}loss_mask{end}'] = 5 * weight * bce / divisor
            losses[f'{prefix}loss_dice{end}'] = 5 * weight * dice / divisor
            if warming_up:
                continue
            bce, dice = zero, zero
            x, t = matched_masks(level_outputs, targets, second, bool(level))
            _, k = matched_masks(level_outputs, knowns, second, bool(level))
            if len(x):
                bce, dice = secondary_losses(x, t, k)
            losses[f'r1_loss_mask_unmatched{end}'] = 0.5 * 0.5 * weight * bce / divisor
            losses[f'r1_loss_dice_unmatched{end}'] = 0.5 * 0.5 * weight * dice / divisor
    return losses


# The model


class PlainModel:
    """The whole model on a state dict, whose tensors it copies; one-frame or video as the names say.

    Args:
        state_dict: names and shapes of a THE-Mask checkpoint.
        heads: attention heads of pixel decoder and mask decoder.
        num_points: points of matching and losses.
        warmup_iters: one-frame model: iterations with one round.
    """

    def __init__(
        self, state_dict: Mapping[str, Tensor], heads: int = 8, num_points: int = 12544, warmup_iters: int = 30000
    ) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in state_dict.items()}
        self.weights = Weights(self.tensors)
        self.heads = heads
        self.num_points = num_points
        self.warmup_iters = warmup_iters
        self.video = 'decode_head.predictor.decoder_norm1.weight' in state_dict

    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors by name, made leaves that take gradients."""
        names = [name for name in self.tensors if not name.endswith('empty_weight')]
        return {name: self.tensors[name].requires_grad_() for name in names}

    def outputs(self, clip: Tensor, training: bool = False) -> tuple[list[Prediction], list[Prediction] | None]:
        """Predictions of all stages, clip level and frame level, for frames ``[B, T, 3, H, W]``."""
        frames = clip.shape[1]
        head = self.weights / 'decode_head'
        maps = mit(clip.flatten(0, 1), self.weights / 'backbone', 0.1 if training else 0.0)
        mask_features, levels = pixel_decoder(maps, head / 'pixel_decoder', self.heads)
        predictor = head / 'predictor'
        if self.video:
            return video_decoder(levels, mask_features, frames, predictor, self.heads, 0.1 if training else 0.0)
        return one_frame_decoder(levels, mask_features, frames, predictor, self.heads), None

    @torch.no_grad()
    def scores(self, clip: Tensor) -> Tensor:
        """``[B, T, K, h, w]`` at stride 4."""
        outputs, frame_outputs = self.outputs(clip)
        scores = scores_of(outputs[-1])
        if frame_outputs is not None:
            by_frame = scores_of(frame_outputs[-1])[:, 0].unflatten(0, clip.shape[:2])
            scores = (scores + by_frame) / 2
        return scores

    def predict(self, clip: Tensor, size: tuple[int, int]) -> Tensor:
        """Label maps ``[B, T, *size]`` of frames ``[B, T, 3, H, W]``."""
        scores = self.scores(clip)
        labels = resize_and_argmax(scores.flatten(0, 1), (clip.shape[3], clip.shape[4]), size)
        return labels.unflatten(0, clip.shape[:2])

    def loss(self, clip: Tensor, label: Tensor, iteration: int = 0, training: bool = True) -> dict[str, Tensor]:
        """Weighted losses; ``training`` switches dropout and drop path on."""
        outputs, frame_outputs = self.outputs(clip, training)
        empty_weight = (self.weights / 'decode_head' / 'criterion')['empty_weight']
        warming_up = not self.video and iteration < self.warmup_iters
        losses = losses_of(outputs, frame_outputs, label, empty_weight, self.num_points, warming_up)
        return {f'decode.{name}': loss for name, loss in losses.items()}


def adamw(parameters: Mapping[str, Tensor]) -> torch.optim.AdamW:
    """AdamW 1e-4 with decay 0.05; a tenth of the rate for the backbone, no decay for norms outside it."""
    groups = []
    for name, parameter in parameters.items():
        backbone = 'backbone' in name
        decay = 0.0 if 'norm' in name and not backbone else 0.05
        groups.append({'params': [parameter], 'lr': 1e-5 if backbone else 1e-4, 'weight_decay': decay})
    return torch.optim.AdamW(groups)


def train_step(
    model: PlainModel, optimizer: torch.optim.Optimizer, clip: Tensor, label: Tensor, iteration: int = 0
) -> dict[str, Tensor]:
    """Loss, gradients, clipping at norm 0.01, update."""
    losses = model.loss(clip, label, iteration)
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters().values(), 0.01)
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


# Training pipeline


def train_pipeline(
    frames: list[np.ndarray],
    masks: list[np.ndarray],
    scale: tuple[int, int] = (853, 480),
    crop: tuple[int, int] = (480, 480),
) -> tuple[Tensor, Tensor]:
    """Resize, crop, flip, colour, normalise, pad: BGR uint8 frames, label maps -> ``[T, 3, *crop]``, ``[T, *crop]``."""
    height, width = frames[0].shape[:2]
    ratio = 0.5 + 1.5 * np.random.random_sample()
    long, short = int(scale[0] * ratio), int(scale[1] * ratio)
    factor = min(max(long, short) / max(height, width), min(long, short) / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    frames = [cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR) for frame in frames]
    masks = [cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) for mask in masks]
    window = random_window(masks[-1], crop)
    frames, masks = [frame[window] for frame in frames], [mask[window] for mask in masks]
    if np.random.rand() < 0.5:
        frames, masks = [frame[:, ::-1] for frame in frames], [mask[:, ::-1] for mask in masks]
    frames = [photometric_distortion(frame) for frame in frames]
    bottom, right = crop[0] - frames[0].shape[0], crop[1] - frames[0].shape[1]
    images = []
    for frame in frames:
        image = (frame[..., ::-1].astype(np.float32) - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
        image = np.pad(image.astype(np.float32), ((0, bottom), (0, right), (0, 0)))
        images.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))
    labels = [np.pad(mask, ((0, bottom), (0, right)), constant_values=255).astype(np.int64) for mask in masks]
    return torch.stack(images), torch.from_numpy(np.stack(labels))


def random_window(mask: np.ndarray, crop: tuple[int, int]) -> tuple[slice, slice]:
    """A crop in which no class fills three quarters; the eleventh is taken as it comes."""
    for _ in range(11):
        top = np.random.randint(max(mask.shape[0] - crop[0], 0) + 1)
        left = np.random.randint(max(mask.shape[1] - crop[1], 0) + 1)
        window = slice(top, top + crop[0]), slice(left, left + crop[1])
        labels, counts = np.unique(mask[window], return_counts=True)
        counts = counts[labels != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    return window


def photometric_distortion(image: np.ndarray) -> np.ndarray:
    """Random brightness, contrast, saturation and hue of a BGR uint8 image, each truncated to uint8."""

    def convert(x: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
        return np.clip(x.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    if np.random.randint(2):
        image = convert(image, beta=np.random.uniform(-32, 32))
    mode = np.random.randint(2)
    if mode == 1 and np.random.randint(2):
        image = convert(image, alpha=np.random.uniform(0.5, 1.5))
    if np.random.randint(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 1] = convert(hsv[..., 1], alpha=np.random.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if np.random.randint(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + np.random.randint(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if mode == 0 and np.random.randint(2):
        image = convert(image, alpha=np.random.uniform(0.5, 1.5))
    return image
