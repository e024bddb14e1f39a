"""Measuring a trained model: images drawn in numbers, and what they are compared by."""
