"""Parameters, memory, FLOPs and traffic of one rank, in closed form."""
