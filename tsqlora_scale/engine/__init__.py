"""The distributed machinery: collectives, prepare/gather/rebuild under DDP and ZeRO, checkpoints."""
