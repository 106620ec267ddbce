"""Logic: puzzles with checkers, and reasoning-gym's generators behind admission."""
