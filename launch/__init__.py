"""How a run starts: the command line, worker processes, process environment."""
