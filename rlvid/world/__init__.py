"""The built-in world: rendered clips, their captions, and an oracle that reads them from pixels."""
