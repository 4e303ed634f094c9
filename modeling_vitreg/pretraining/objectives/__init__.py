"""Training objectives: losses, heads, and one module for each objective."""
