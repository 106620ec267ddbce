"""K2's chat format: dialogues to token ids with their loss mask, and the parse back."""
