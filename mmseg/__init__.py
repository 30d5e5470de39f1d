"""THE-Mask: video semantic segmentation by mask classification."""

from .version import __version__

__all__ = ['__version__']
