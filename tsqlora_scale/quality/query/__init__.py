"""What a sample is worth for a wanted task: the log density ratio of its rows to the pool's (docs/method.md)."""
