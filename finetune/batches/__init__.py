"""Prepared rows become tensors, padded or packed."""
