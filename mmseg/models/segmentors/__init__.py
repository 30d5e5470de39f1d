"""Whole models: losses for training, scores and label maps for inference."""

from .encoded import Encoded, Head, Scores
from .encoder_decoder import EncoderDecoder, InferenceConfig

__all__ = ['Encoded', 'EncoderDecoder', 'Head', 'InferenceConfig', 'Scores']
