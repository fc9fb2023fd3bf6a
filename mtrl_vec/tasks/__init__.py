"""Meta-World's tasks as data and pure functions. Knows nothing of torch, processes or policies."""
