"""Pretraining text said again (report section 2.2): prompts, pieces, the gate, the mixture."""
