"""The commands that people type, and what only they need: tables, plots, videos, profiles."""
