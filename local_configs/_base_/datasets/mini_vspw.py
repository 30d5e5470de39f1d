"""The small VSPW-format data set that ``tools/make_mini_vspw.py`` writes (160 x 120, 12 of the 124 classes)."""

_base_ = './vspw.py'

data_root = 'data/mini_vspw'
img_scale = (160, 120)
ratio_range = (0.75, 1.5)
crop_size = (96, 96)
data = dict(samples_per_gpu=4, workers_per_gpu=2)
