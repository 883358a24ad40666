"""The console commands: arguments, and errors as exit codes; what they do is :mod:`tsqlora_scale.api`'s."""
