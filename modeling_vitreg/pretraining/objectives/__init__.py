"""What a run learns from: losses, heads, and one module for each objective."""
