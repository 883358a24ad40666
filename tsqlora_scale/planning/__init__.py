"""What a run will need, memory and time, told from its config and the model's ``config.json`` alone."""
