"""How a run talks, survives and spreads. Knows nothing of pronunciation."""
