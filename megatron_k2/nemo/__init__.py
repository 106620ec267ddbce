"""Recipes through NeMo-Run: tasks, executors, experiments, factories of its command line."""
