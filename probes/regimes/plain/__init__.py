"""One launch after another: eagerly, in graphs, with padding, strides, many m, huge sizes."""
