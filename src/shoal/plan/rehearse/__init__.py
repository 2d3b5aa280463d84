"""A step of one rank, rehearsed without torch: the sizes and lifetimes of its tensors, its products and its messages."""
