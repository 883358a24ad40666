"""Who chooses the samples of a step: one file a selector, chosen by ``sampling.selector``."""
