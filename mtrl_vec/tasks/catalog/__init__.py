"""Meta-World's fifty tasks: a row of facts each, from ``metaworld/envs/sawyer_*_v3.py``."""
