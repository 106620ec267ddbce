"""Wire records between stages: frozen, versioned, one JSON object a line."""
