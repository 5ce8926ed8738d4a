"""GLM-4.5 and GLM-4.6 (GLM-4-MoE)."""
