"""What is measured of a run while it trains, and how it is drawn and judged."""
