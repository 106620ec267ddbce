"""The report of a run: tables and figures made from its directory."""
