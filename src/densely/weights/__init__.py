"""Dialects of DenseNet weights, read and written."""
