"""Arms that are compared fairly: what is run, how it is tuned, and tables and figures of what has come out."""
