"""The one place that holds the version of the package."""

__version__ = '1.0.0'
