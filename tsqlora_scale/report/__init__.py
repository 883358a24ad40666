"""What a run leaves behind: records, progress, the closing table."""
