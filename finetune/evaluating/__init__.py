"""Texts become figures with intervals; two runs are compared."""
