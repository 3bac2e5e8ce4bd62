"""Pretrained models for mmrec: its index, checkpoints and cards lie in this folder."""
