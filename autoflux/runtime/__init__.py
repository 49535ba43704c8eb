"""The engine: the pipeline interface, placement of weights, and the session that draws pictures."""
