"""Predictions -> judgement: metrics, intervals, calibration, comparisons, and the leak meter. Reads predictions, never a model."""
