"""Everything that crosses a process boundary, as frozen msgspec structs of plain ids, numbers and bytes.

Reading this package is reading the system diagram:

- `requests`   ingress <-> engine: a request, its cancellation, its tokens, its end
- `steps`      engine <-> runner: what one forward pass computes, and what came out
- `transfer`   decode engine <-> prefill engine, engine <-> KV agent: tickets, publications, block reads
- `cluster`    everybody <-> router: who is there, how loaded, which blocks are cached where

No tensors, no configuration objects, no callables. Nothing is ever unpickled.
"""
