"""A model that is asked once for each request, and held to a schema."""
