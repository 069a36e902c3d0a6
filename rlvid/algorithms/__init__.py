"""Fine-tuning methods, each a generator of losses."""
