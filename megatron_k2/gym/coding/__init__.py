"""Programs that are run: in a sandbox, on tests they do not see, their values compared outside."""
