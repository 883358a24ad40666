"""Texts tokenized once, and kept on disk for every epoch, rank and run that reads them again."""
