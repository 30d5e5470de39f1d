"""Small helpers without a subject of their own."""

from .errors import CheckpointError, ConfigError, DataError

__all__ = ['CheckpointError', 'ConfigError', 'DataError']
