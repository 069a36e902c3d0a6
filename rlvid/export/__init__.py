"""Export of a run: the model in diffusers' layout, the adapter in PEFT's, and a model card."""
