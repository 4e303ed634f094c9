"""Measurements, figures and warnings of a running training."""
