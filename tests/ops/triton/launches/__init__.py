"""What is compiled ahead of time: one module per family of kernels, each with `LAUNCHES`.

A launch calls an op's wrapper with CPU tensors of a real model's dims and dtypes (of few tokens); nothing is computed,
but every kernel that the wrapper launches is compiled, with the very options, for each chip.
"""
