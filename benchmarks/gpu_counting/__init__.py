"""Count what a GPU would do, with `meta` tensors in its place."""
