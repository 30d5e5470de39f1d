"""Whole models: losses for training, scores and label maps for inference."""

from .encoder_decoder import EncoderDecoder, InferenceConfig

__all__ = ['EncoderDecoder', 'InferenceConfig']
