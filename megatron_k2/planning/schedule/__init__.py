"""The pipeline's schedule: which stage does what when."""
