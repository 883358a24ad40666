"""What a choice among a pool's data would gain and cost, before anything is spent on it."""
