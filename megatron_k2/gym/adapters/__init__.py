"""Tasks and verifiers of other projects, as domains of this gym; each loads its package late."""
