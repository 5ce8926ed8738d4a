"""Models with latent attention: DeepSeek-V2, V3, R1 and V3.2, Kimi-K2, GLM-4.7-Flash, GLM-5."""
