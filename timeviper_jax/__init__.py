"""TimeViper in JAX: a hybrid Mamba-2 / attention model that watches hour-long videos.

Dimensions, in every signature of the package:

`B` batch · `F` frames · `H W C` pixels · `V` vision tokens · `E` vision width ·
`T` sequence tokens · `D` model width · `N` heads · `K` kv heads ·
`H` head width (in attention; pixels and heads never meet in one file) ·
`G` ssm groups · `P` ssm channels per head · `S` ssm state · `L` tokens per chunk ·
`M` MLP width · `R` removed tokens.

Upper case for sizes and einsum letters alike. Arrays get words, except the field's
own names (`q k v`, `x dt a b c`).
"""
