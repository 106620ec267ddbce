"""From a recipe to a run: flags, tables, scripts. Imports neither torch nor Megatron."""
