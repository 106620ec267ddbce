"""Whether one text says what another says: surface signals, and statements checked by a model."""
