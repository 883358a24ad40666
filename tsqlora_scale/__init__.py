"""TsqLoRA at scale: choose which data to learn from, and where to spend rank."""

__version__ = "0.1.0"
