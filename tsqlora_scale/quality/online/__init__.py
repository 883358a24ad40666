"""Scores from the training steps themselves: ``scoring.source: online``."""
