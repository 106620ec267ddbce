"""Many items over shards: resumed, counted, and merged to the same bytes whatever the engine."""
