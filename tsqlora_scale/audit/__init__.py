"""Which labels of a pool are probably wrong: every sample judged by models that have not seen it."""
