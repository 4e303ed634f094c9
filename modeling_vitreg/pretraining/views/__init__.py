"""Crops, masks and batches for the objectives."""
