"""Ranks that share one model: groups, collectives, who holds which part of a weight."""
