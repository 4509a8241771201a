"""The engine's own GEMMs, checked while it serves.

`linear` puts a layer under the witness (`fp4tune.watch`); `vectors`, `limits` and `rows` are the
mathematics, `_kernels`, `launch` and `here` what runs behind a call, `plan` which calls; `watcher`
is a process's witness, `ring` what it reads, `confirm` and `respond` what becomes of a suspicion,
`counts` what the node is told.
"""
