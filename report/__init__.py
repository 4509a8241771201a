"""A page to look at: what a node or a fleet knows, as one HTML file that needs nothing else.

`node` and `fleet` gather, `sections`, `findings`, `heatmap`, `chart`, `tiles` and `changes` draw,
and `page` puts it together. Every string from a database or a bundle goes through `markup`.
"""
