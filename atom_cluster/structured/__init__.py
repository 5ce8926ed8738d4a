"""Structured output: a grammar, compiled for a vocabulary, says at each position which tokens may come next.

- `vocabulary`  what each token of a model spells
- `grammar`     a `GrammarSpec` becomes a compiled grammar, in bounded time and memory, or an error that says why not
- `state`       one output's place in its grammar
- `masks`       the tokens that may come next, as bits, for all outputs of a step and along their drafts
- `compiler`    compiled grammars, kept and made off the calling thread
- `held`        those that a rank has compiled for its engine, by the engine's ids

The parsing is done by the library llguidance (docs/decisions/0013-structured-output.md). Knows no torch, no model and
no requests: ingress, simulated engines and runners use it alike.
"""
