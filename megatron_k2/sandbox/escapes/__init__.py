"""Programs that try to get out, programs that must not be hindered, and what judges them."""
